"""Scores that need no language model: chance, popularity, item-kNN, and the oracle of a simulated world.

Each returns one float64 array (1 + K,) per request, the positive first. ``rows`` is a split as written by
``dmpo data prepare``; ``interactions`` has columns user, item, rating, timestamp.
"""

import hashlib

import numpy as np
import pandas as pd
from datasets import Dataset
from scipy import sparse

from dmpo_dist.data.popularity import counts_before

# Above the rounding error of a sum of cosines, far below any difference between two of them.
TIE_BREAK = 1e-9
ITEMS_PER_BLOCK = 256


def random_scores(rows: Dataset, seed: int) -> list[np.ndarray]:
    """Uniform random scores from (seed, user, timestamp) alone: they do not depend on the other rows or their order."""
    scores = []
    for user, timestamp, negatives in zip(*_columns(rows, "user", "timestamp", "negatives"), strict=True):
        digest = hashlib.blake2b(repr((seed, user, timestamp)).encode(), digest_size=16).digest()
        scores.append(np.random.default_rng(int.from_bytes(digest, "big")).random(1 + len(negatives)))
    return scores


def popularity_scores(rows: Dataset, interactions: pd.DataFrame) -> list[np.ndarray]:
    """How often each candidate was taken strictly before the request's timestamp."""
    items, first = _candidate_items(rows)
    request_times = np.repeat(np.asarray(_columns(rows, "timestamp")[0]), np.diff(first))
    return _by_request(counts_before(items, request_times, interactions), first)


def fitted_popularity_scores(rows: Dataset, log: pd.DataFrame) -> list[np.ndarray]:
    """How often each candidate was taken in ``log``, on which other baselines are fitted too."""
    items, first = _candidate_items(rows)
    return _by_request(pd.Series(items).map(log["item"].value_counts()).fillna(0).to_numpy(), first)


def item_knn_scores(rows: Dataset, log: pd.DataFrame, neighbours: int) -> list[np.ndarray]:
    """Sum of the cosine similarities between the candidate and those history items that it is a neighbour of.

    Item-based top-N recommendation (Deshpande and Karypis, TOIS 2004, doi 10.1145/963770.963776): the similarity of two
    items is the cosine between their binary user columns, and each item keeps its ``neighbours`` most similar items.
    Candidates with equal sums are ordered by popularity.

    Args:
        log: the interactions for similarities and popularity, columns user and item: ``fitting_log`` of the requests.
    """
    catalogue = pd.Index(np.unique(log["item"].to_numpy(dtype=object)))
    n_items = len(catalogue)

    def encode(items: list[str]) -> np.ndarray:
        codes = catalogue.get_indexer(items)
        return np.where(codes < 0, n_items, codes)  # unknown items share one last, empty column

    users, _ = pd.factorize(log["user"])
    taken = _incidence(users, encode(log["item"]), (users.max(initial=-1) + 1, n_items + 1))  # users x items
    similarity = _nearest(taken, neighbours)  # items x items, sparse

    (histories,) = _columns(rows, "history_items")
    request = np.repeat(np.arange(len(rows)), [len(history) for history in histories])
    history = _incidence(request, encode([item for items in histories for item in items]), (len(rows), n_items + 1))
    items, first = _candidate_items(rows)
    candidates = encode(items)
    request = np.repeat(np.arange(len(rows)), np.diff(first))
    # (requests x items) @ (items x items), read at (request, candidate): one score for each candidate of all requests
    scores = np.asarray((history @ similarity)[request, candidates]).ravel()

    popularity = np.asarray(taken.sum(axis=0)).ravel()
    return _by_request(scores + TIE_BREAK * popularity[candidates] / (1 + popularity.max()), first)


def oracle_scores(rows: Dataset) -> list[np.ndarray] | None:
    """The true scores of the candidates in a simulated world; None unless every request has them."""
    oracle, negatives = _columns(rows, "oracle", "negatives")
    if not all(len(scores) == 1 + len(others) for scores, others in zip(oracle, negatives, strict=True)):
        return None
    return [np.asarray(scores, dtype=np.float64) for scores in oracle]


def _columns(rows: Dataset, *names: str) -> list[list]:
    """Whole columns as lists, as indexing a Dataset row by row decodes a row at every access."""
    return [rows[name][:] for name in names]


def _candidate_items(rows: Dataset) -> tuple[list[str], np.ndarray]:
    """All candidates in one list, and (n_requests + 1,) bounds: request i has first[i] .. first[i + 1]."""
    per_request = [[p, *n] for p, n in zip(*_columns(rows, "positive_item", "negative_items"), strict=True)]
    first = np.cumsum([0, *(len(candidates) for candidates in per_request)])
    return [item for candidates in per_request for item in candidates], first


def _by_request(flat: np.ndarray, first: np.ndarray) -> list[np.ndarray]:
    return np.split(flat.astype(np.float64), first[1:-1])


def _incidence(rows: np.ndarray, columns: np.ndarray, shape: tuple[int, int]) -> sparse.csr_array:
    """Binary sparse matrix with ones at (rows, columns); a repeated pair counts once."""
    matrix = sparse.csr_array((np.ones(len(rows)), (rows, columns)), shape=shape)
    matrix.sum_duplicates()
    matrix.data[:] = 1
    return matrix


def _nearest(taken: sparse.csr_array, neighbours: int) -> sparse.csr_array:
    """(n_items, n_items) cosines between columns of ``taken``: the largest of each row, without the diagonal."""
    n_items = taken.shape[1]
    norms = np.sqrt(np.asarray(taken.sum(axis=0)).ravel())
    unit = taken @ sparse.diags_array(1 / np.maximum(norms, 1))
    by_item = unit.T.tocsr()
    keep = min(neighbours, n_items)
    blocks = []
    for start in range(0, n_items, ITEMS_PER_BLOCK):  # dense blocks: items x items never exists at once
        cosine = (by_item[start : start + ITEMS_PER_BLOCK] @ unit).toarray()  # (block, n_items)
        row = np.arange(len(cosine))[:, None]
        cosine[row[:, 0], start + row[:, 0]] = 0  # no item is its own neighbour
        top = np.argpartition(-cosine, keep - 1, axis=1)[:, :keep]  # (block, keep) columns, unsorted
        block = sparse.csr_array((cosine[row, top].ravel(), (np.repeat(row, keep), top.ravel())), shape=cosine.shape)
        block.eliminate_zeros()
        blocks.append(block)
    return sparse.vstack(blocks, format="csr")
