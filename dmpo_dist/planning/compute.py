"""How much more a step of a preference stage computes than a step of SFT on the same groups."""

from collections.abc import Sequence

from dmpo_dist.batching.layout import group_cost
from dmpo_dist.data.tokenization import TokenGroup
from dmpo_dist.planning.flops import Shape, Work, step_flops
from dmpo_dist.training.groups import with_negatives


def group_work(group: TokenGroup, shared: bool = True) -> Work:
    """The work of one pass over ``group``: its distinct responses behind a shared prompt, or each as a row of its own.

    The head runs on the rows that predict a scored token; the first token of all responses is predicted by one row
    where the prompt is shared.
    """
    cost = group_cost(group, shared)
    responses = [len(branch) for branch in {tuple(branch) for branch in group.branches}]
    rows = 1 + sum(n - 1 for n in responses) if shared else sum(responses)
    return Work(cost.tokens, cost.pairs, rows + len(group.prefix_scored))


def compute_factor(
    shape: Shape,
    groups: Sequence[TokenGroup],
    negatives: int,
    *,
    reference: bool,
    history_in_preference: bool,
    history_in_sft: bool,
    shared: bool = True,
    sft_groups: Sequence[TokenGroup] | None = None,
) -> float:
    """FLOPs of a preference step over those of an SFT step, each on ``groups``; see ``planning.flops``.

    The preference step is the policy's forward and backward over 1 + K responses and, with ``reference``, the
    reference's forward over the same. The SFT step is forward and backward over the positive alone.

    Args:
        groups: with every stored negative, and with the positions of history titles in ``prefix_scored``.
        negatives: K.
        history_in_preference, history_in_sft: whether the stage also scores the titles of the history.
        sft_groups: the same groups as SFT reads them, where its prompts are others; None takes ``groups``.
    """
    preference = sum(
        step_flops(shape, _work(with_negatives(group, negatives, 0), shared, history_in_preference), reference)
        for group in groups
    )
    sft = sum(
        step_flops(shape, _work(group.taking([0]), shared, history_in_sft), reference=False)
        for group in (groups if sft_groups is None else sft_groups)
    )
    return preference / sft


def _work(group: TokenGroup, shared: bool, history: bool) -> Work:
    work = group_work(group, shared)
    return work if history else Work(work.tokens, work.pairs, work.head_rows - len(group.prefix_scored))
