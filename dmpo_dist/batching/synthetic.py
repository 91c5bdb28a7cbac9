"""Preference groups of random ids, for benchmarks and for plans."""

import random

from dmpo_dist.data.tokenization import TokenGroup

FIRST_TOKEN, END_TOKEN, PAD_TOKEN = 3, 2, 0


def random_groups(
    count: int, prompt: int, response: int, negatives: int, vocab: int, seed: int = 0
) -> list[TokenGroup]:
    """``count`` groups of random ids with exactly these lengths in tokens; ``response`` includes the end token."""
    rng = random.Random(f"{seed} {prompt} {response} {negatives} {vocab}")

    def ids(n: int) -> list[int]:
        return [rng.randrange(FIRST_TOKEN, vocab) for _ in range(n)]

    return [
        TokenGroup(
            prefix=ids(prompt),
            branches=tuple([*ids(response - 1), END_TOKEN] for _ in range(negatives + 1)),
            scored_from=(0,) * (negatives + 1),
        )
        for _ in range(count)
    ]
