"""The objectives on plain tensors, for a training loop of one's own."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dmpo_dist.objectives.dmpo import Dmpo
from dmpo_dist.objectives.groups import Groups
from dmpo_dist.objectives.loss import Loss


def preference_loss(
    policy: Sequence[Tensor] | Tensor,
    reference: Sequence[Tensor] | Tensor | None = None,
    objective: Loss | None = None,
    lengths: Sequence[Tensor] | Tensor | None = None,
    levels: Sequence[Tensor] | Tensor | None = None,
    scores: Sequence[Tensor] | Tensor | None = None,
) -> Tensor:
    """The mean loss over groups of one positive, which comes first, and its negatives, or of responses in levels.

    Args:
        policy: for each group (1 + K,) summed log-probs, as ``shared_prompt_log_probs`` gives them, or (G, 1 + K).
            K may differ between groups.
        reference: the same of the frozen reference; None for an objective that needs none.
        objective: ``Dmpo()`` by default; options as in ``Sdpo(beta=0.1)``.
        lengths: for each group (1 + K,) scored tokens; needed by ``length_normalize`` and ``sft_weight``.
        levels: for each group (1 + K,) integers, 0 for its best responses, larger for less preferred ones; responses
            may then come in any order. None for one positive, first, and its negatives.
        scores: for each group (1 + K,) how much a response is preferred, above 0; needed by ``Recpo``. For
            ``RankReward`` the rewards; None takes those of the ranks by ``policy``.

    Returns:
        A scalar, differentiable in ``policy``.

    Raises:
        ValueError: a group without a negative, with one level or without a best one, an objective that needs what is
            not given or does not take levels, scores that it cannot use, or shapes that differ.

    Example:
        >>> loss = preference_loss(torch.tensor([[-5.0, -6.0]]), torch.tensor([[-5.5, -5.5]]), Dmpo(beta=1.0))
        >>> loss  # softplus(-1)
        tensor(0.3133)
        >>> two_positives = preference_loss(policy, reference, MultDpo(), levels=[torch.tensor([0, 1, 0])])
    """
    objective = objective or Dmpo()
    sizes = [len(group) for group in policy]
    for name, given in (("reference", reference), ("lengths", lengths), ("levels", levels), ("scores", scores)):
        if given is not None and [len(group) for group in given] != sizes:
            raise ValueError(f"{name} has groups of {[len(group) for group in given]} responses, policy of {sizes}")
    options = (getattr(objective, "length_normalize", False), getattr(objective, "likelihood_weight", 0.0))
    if lengths is None and any(options):
        raise ValueError(f"{type(objective).__name__} with these options divides by token counts: give lengths")
    levels = None if levels is None else _whole(levels)
    if levels is not None and not getattr(objective, "takes_levels", True):
        best = [int((level == 0).sum()) for level in levels]
        if max(best) > 1 or any(int(level.max()) > 1 for level in levels):
            name = type(objective).__name__
            raise ValueError(f"{name} takes one positive and its negatives; for levels take MultDpo")
    if scores is not None and getattr(objective, "needs_scores", False):
        for number, score in enumerate(scores):
            if not bool((score > 0).all()):  # a ratio by 0, or below it, would be no preference
                name = type(objective).__name__
                raise ValueError(f"scores of group {number} are {score.tolist()}; {name} needs scores above 0")
    alone = next((number for number, size in enumerate(sizes) if size < 2), None)
    if alone is not None:  # on a GPU the objectives do not look, and S-DPO of no negatives would be 0
        raise ValueError(f"group {alone} has no negatives; at least one is needed")
    log_probs = torch.cat(list(policy))
    level = None if levels is None else torch.cat(levels).to(log_probs.device)
    groups = Groups(
        group_id=torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)).to(log_probs.device),
        is_positive=_positives(sizes, levels).to(log_probs.device),
        lengths=torch.ones_like(log_probs, dtype=torch.int64)
        if lengths is None
        else torch.cat(list(lengths)).to(log_probs.device),
        count=len(sizes),
        level=level,
        scores=None if scores is None else torch.cat(list(scores)).to(log_probs.device),
        n_levels=2 if level is None else int(level.max()) + 1,
    )
    loss, _ = objective(log_probs, None if reference is None else torch.cat(list(reference)), groups)
    return loss / len(sizes)


def _whole(levels: Sequence[Tensor] | Tensor) -> list[Tensor]:
    """``levels`` as int64; ValueError for those between two whole numbers, which would count as one of them."""
    whole = [level.long() for level in levels]
    for number, (level, of_group) in enumerate(zip(levels, whole, strict=True)):
        if bool((level != of_group).any()):
            raise ValueError(f"levels of group {number} are {level.tolist()}; give whole numbers, 0 for the best")
    return whole


def _positives(sizes: Sequence[int], levels: Sequence[Tensor] | Tensor | None) -> Tensor:
    """(N,) bool: the first response of each group's best level, on the CPU."""
    firsts = [0] * len(sizes)
    for number, level in enumerate([] if levels is None else levels):
        best, last = int(level.min()), int(level.max())
        if best != 0 or last == 0:
            raise ValueError(
                f"levels of group {number} go from {best} to {last}; the best is 0, and a preference needs another one"
            )
        firsts[number] = int((level == 0).nonzero()[0])
    starts = torch.tensor(sizes).cumsum(0) - torch.tensor(sizes)
    return torch.zeros(sum(sizes), dtype=torch.bool).index_fill(0, starts + torch.tensor(firsts), True)
