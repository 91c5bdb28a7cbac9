"""A simulated world of users, items and tastes whose best possible ranking is known.

Users and items have latent tastes. A user takes items one after another without repeats, each with probability
softmax(utility), where utility = taste_strength * affinity + log popularity. The higher the affinity, the likelier is a
like (rating >= 4). Every taste has words of its own, and the title of an item contains words of the item's main tastes,
so a model that reads titles can learn the tastes. The other words of a title mean nothing. Popularity is independent of
taste.
"""

from collections.abc import Callable, Iterator

import numpy as np
import pandas as pd

from dmpo_dist.config.data import Simulator
from dmpo_dist.data.schema import Interactions
from dmpo_dist.errors import UserError

DAY = 86_400
START = 1_640_995_200  # 2022-01-01T00:00:00Z, in seconds
SPAN_DAYS = 730
ACTIVE_DAYS = (30, 200)  # shortest and longest time between a user's arrival and departure
RATING_QUANTILES = (0.04, 0.11, 0.28, 0.64)  # shares of ratings below 2, 3, 4 and 5
LIKE = 4  # the oracle counts a rating at or above this as a like
RATING_SLOPE = 1.0  # weight of the affinity in a rating, against logistic noise of scale RATING_NOISE
RATING_NOISE = 0.5
SECOND_TASTE = 0.5  # share of items with two main tastes
MAIN_TASTES = (1.0, 0.7)  # strengths of the main tastes, before an item's tastes are scaled to length 1
MAX_CELLS = 250_000_000  # users x items of the oracle (float32: 1 GB)
CHUNK_CELLS = 4_000_000  # users x items handled at once
WORDS_PER_TASTE = 4
SYLLABLES = (
    "ba be bo da de do fa fi fo ga go ka ke ki ko la le li lo lu ma me mi mo na ne ni no ra re ri ro ru "
    "sa se so su ta te ti to va ve vi vo za zo"
).split()


def simulate(config: Simulator, seed: int) -> Interactions:
    """Draw a world; equal ``config`` and ``seed`` give an equal world.

    ``oracle[u, i]`` is utility + log P(rating >= 4 | u, i). Up to a constant per user that is the log-probability that
    the user's next like is item i, so the Bayes-optimal ranking sorts candidates by it.

    Raises:
        UserError: more than 250 million user-item cells, or users asked to take more than half of the catalogue.
    """
    _check(config)
    rng = np.random.default_rng(seed)
    user_tastes = rng.standard_normal((config.users, config.taste_dim))
    item_tastes, main_tastes = _item_tastes(rng, config.items, config.taste_dim)
    # User tastes are standard normal, so an item's affinity has variance |item taste|^2; scaling makes it 1.
    item_tastes /= np.linalg.norm(item_tastes, axis=1, keepdims=True)
    log_popularity = _log_popularity(rng, config.items, config.popularity_exponent)
    titles = _titles(rng, main_tastes, config.taste_dim)

    counts = _event_counts(rng, config)
    users = np.repeat(np.arange(config.users), counts)
    items = np.empty(len(users), dtype=np.int64)
    ends = np.cumsum(counts)
    oracle = np.empty((config.users, config.items), dtype=np.float32)
    for rows in _chunks(config):
        affinity = user_tastes[rows] @ item_tastes.T  # (chunk, n_items)
        utility = config.taste_strength * affinity + log_popularity
        events = slice(ends[rows.start] - counts[rows.start], ends[rows.stop - 1])
        items[events] = _choices(rng, utility, counts[rows])
        oracle[rows] = utility
    event_affinity = np.einsum("ed,ed->e", user_tastes[users], item_tastes[items])
    ratings, like_cut = _ratings(rng, event_affinity)
    for rows in _chunks(config):
        margin = (RATING_SLOPE * (user_tastes[rows] @ item_tastes.T) - like_cut) / RATING_NOISE
        oracle[rows] -= np.logaddexp(0.0, -margin)  # log P(like) of the logistic noise
    return _interactions(config, users, items, ratings, _timestamps(rng, users, counts), titles, oracle)


def oracle_scores(log: Interactions) -> Callable[[str, list[str]], list[float]]:
    """A function (user, items) -> true scores; it returns [] for data that is not simulated."""
    if log.oracle is None or log.oracle_users is None:
        return lambda user, items: []
    oracle = log.oracle
    row = {user: number for number, user in enumerate(log.oracle_users)}
    column = {item: number for number, item in enumerate(log.items["item"])}
    return lambda user, items: oracle[row[user], [column[item] for item in items]].astype(float).tolist()


def _check(config: Simulator) -> None:
    cells = config.users * config.items
    if cells > MAX_CELLS:
        raise UserError(
            f"data.source.simulator: {config.users} users x {config.items} items are {cells:,} cells, the limit is "
            f"{MAX_CELLS:,}; lower data.source.simulator.users or .items"
        )
    if config.events_per_user > config.items // 2:
        raise UserError(
            f"data.source.simulator: {config.events_per_user} events per user out of {config.items} items leave too "
            "few to rank; lower data.source.simulator.events_per_user or raise .items"
        )


def _chunks(config: Simulator) -> Iterator[slice]:
    size = max(1, CHUNK_CELLS // config.items)
    for start in range(0, config.users, size):
        yield slice(start, min(start + size, config.users))


def _item_tastes(rng: np.random.Generator, n_items: int, dim: int) -> tuple[np.ndarray, list[list[int]]]:
    """Tastes (n_items, dim) with one or two main dimensions, and each item's main dimensions, strongest first."""
    tastes = 0.15 * rng.standard_normal((n_items, dim))
    order = rng.random((n_items, dim)).argsort(axis=1)
    n_main = np.where(rng.random(n_items) < SECOND_TASTE, min(2, dim), 1)
    main_tastes = [order[i, :n].tolist() for i, n in enumerate(n_main)]
    for item, main in enumerate(main_tastes):
        tastes[item, main] += MAIN_TASTES[: len(main)]
    return tastes, main_tastes


def _log_popularity(rng: np.random.Generator, n_items: int, exponent: float) -> np.ndarray:
    rank = rng.permutation(n_items) + 1
    return -exponent * np.log(rank)


def _event_counts(rng: np.random.Generator, config: Simulator) -> np.ndarray:
    """Events per user: at least 2, over-dispersed around the mean, at most half of the catalogue."""
    mean = (config.events_per_user - 2) * rng.gamma(4.0, 0.25, config.users)
    return np.minimum(2 + rng.poisson(mean), config.items // 2)


def _choices(rng: np.random.Generator, utility: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(sum of counts,) the items taken by each user, in order, user after user.

    Sorting utility + Gumbel noise (users, items) is drawing items one by one from softmax(utility) without replacement.
    """
    perturbed = utility + rng.gumbel(size=utility.shape)
    order = np.argsort(-perturbed, axis=1)[:, : counts.max()]
    return order[np.arange(order.shape[1]) < counts[:, None]]


def _ratings(rng: np.random.Generator, affinity: np.ndarray) -> tuple[np.ndarray, float]:
    """Ratings 1-5 by affinity plus logistic noise, and the latent value from which a rating is a like."""
    latent = RATING_SLOPE * affinity + rng.logistic(0.0, RATING_NOISE, len(affinity))
    cuts = np.quantile(latent, RATING_QUANTILES)
    return 1.0 + np.searchsorted(cuts, latent, side="right"), float(cuts[LIKE - 2])


def _timestamps(rng: np.random.Generator, users: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Seconds since 1970, ascending within each user, spread over the user's own active period."""
    n_users = len(counts)
    length = rng.uniform(*ACTIVE_DAYS, n_users)
    begin = rng.uniform(0.0, SPAN_DAYS - length)
    days = begin[users] + length[users] * rng.random(len(users))
    days = days[np.lexsort((days, users))]
    return START + (days * DAY).astype(np.int64)


def _titles(rng: np.random.Generator, main_tastes: list[list[int]], dim: int) -> list[str]:
    """A unique title of 2-4 words for each item: one word for each of its main tastes, and words without meaning."""
    n_noise = max(40, len(main_tastes) // 8)
    words = _words(rng, dim * WORDS_PER_TASTE + n_noise)
    pools, noise = np.split(np.array(words), [dim * WORDS_PER_TASTE])
    pools = pools.reshape(dim, WORDS_PER_TASTE)
    titles: dict[str, None] = {}
    for tastes in main_tastes:
        title = _title(rng, tastes, pools, noise)
        while title in titles:
            title = _title(rng, tastes, pools, noise)
        titles[title] = None
    return list(titles)


def _title(rng: np.random.Generator, tastes: list[int], pools: np.ndarray, noise: np.ndarray) -> str:
    telling = [str(rng.choice(pools[taste])) for taste in tastes]
    fillers = [str(word) for word in rng.choice(noise, rng.integers(1, 3), replace=False)]
    return " ".join(rng.permutation(np.array(telling + fillers)).tolist())


def _words(rng: np.random.Generator, count: int) -> list[str]:
    """Distinct pronounceable words of two or three syllables."""
    words: dict[str, None] = {}
    while len(words) < count:
        syllables = rng.choice(SYLLABLES, rng.integers(2, 4))
        words["".join(syllables).capitalize()] = None
    return list(words)


def _interactions(
    config: Simulator,
    users: np.ndarray,
    items: np.ndarray,
    ratings: np.ndarray,
    timestamps: np.ndarray,
    titles: list[str],
    oracle: np.ndarray,
) -> Interactions:
    user_names = np.array([f"u{u:0{len(str(config.users - 1))}d}" for u in range(config.users)])
    item_names = np.array([f"i{i:0{len(str(config.items - 1))}d}" for i in range(config.items)])
    events = pd.DataFrame(
        {"user": user_names[users], "item": item_names[items], "rating": ratings, "timestamp": timestamps}
    ).sort_values(["timestamp", "user", "item"], ignore_index=True)
    return Interactions(
        events=events,
        items=pd.DataFrame({"item": item_names, "title": titles, "genres": ""}),
        name=f"simulator ({config.users} users, {config.items} items)",
        notes=["Made-up users, items and titles; the oracle score of each candidate assumes likes are ratings >= 4."],
        oracle=oracle,
        oracle_users=user_names.tolist(),
    )
