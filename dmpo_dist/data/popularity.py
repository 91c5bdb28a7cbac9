"""How often items were taken before given moments."""

import numpy as np
import pandas as pd


def counts_before(items: list[str], times: np.ndarray, interactions: pd.DataFrame) -> np.ndarray:
    """(n,) events of ``items[i]`` strictly before ``times[i]``; an unknown item has none.

    Args:
        items: n item names.
        times: (n,) seconds.
        interactions: columns item and timestamp.
    """
    catalogue = pd.Index(interactions["item"].unique())
    event_times = interactions["timestamp"].to_numpy()
    start = event_times.min()
    span = event_times.max() - start + 2
    # One sorted array of (item, time) as item * span + time: two searches count any item before any time. An unknown
    # item has code -1, which lies before all keys and counts 0.
    events = np.sort(catalogue.get_indexer(interactions["item"]) * span + (event_times - start))
    item_start = catalogue.get_indexer(items) * span
    until = item_start + np.clip(times - start, 0, span - 1)
    return np.searchsorted(events, until) - np.searchsorted(events, item_start)
