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
) -> Tensor:
    """The mean loss over groups of one positive, which comes first, and its negatives.

    Args:
        policy: for each group (1 + K,) summed log-probs, as ``shared_prompt_log_probs`` gives them, or (G, 1 + K).
            K may differ between groups.
        reference: the same of the frozen reference; None for an objective that needs none.
        objective: ``Dmpo()`` by default; options as in ``Sdpo(beta=0.1)``.
        lengths: for each group (1 + K,) scored tokens; needed by ``length_normalize`` and ``sft_weight``.

    Returns:
        A scalar, differentiable in ``policy``.

    Raises:
        ValueError: a group without a negative, an objective that needs what is not given, or shapes that differ.

    Example:
        >>> loss = preference_loss(torch.tensor([[-5.0, -6.0]]), torch.tensor([[-5.5, -5.5]]), Dmpo(beta=1.0))
        >>> loss  # softplus(-1)
        tensor(0.3133)
    """
    objective = objective or Dmpo()
    sizes = [len(group) for group in policy]
    for name, given in (("reference", reference), ("lengths", lengths)):
        if given is not None and [len(group) for group in given] != sizes:
            raise ValueError(f"{name} has groups of {[len(group) for group in given]} responses, policy of {sizes}")
    options = (getattr(objective, "length_normalize", False), getattr(objective, "likelihood_weight", 0.0))
    if lengths is None and any(options):
        raise ValueError(f"{type(objective).__name__} with these options divides by token counts: give lengths")
    log_probs = torch.cat(list(policy))
    counts = torch.tensor(sizes, device=log_probs.device)
    starts = counts.cumsum(0) - counts
    groups = Groups(
        group_id=torch.arange(len(sizes), device=log_probs.device).repeat_interleave(counts),
        is_positive=torch.zeros(len(log_probs), dtype=torch.bool, device=log_probs.device).index_fill(0, starts, True),
        lengths=torch.ones_like(log_probs, dtype=torch.int64) if lengths is None else torch.cat(list(lengths)),
        count=len(sizes),
    )
    loss, _ = objective(log_probs, None if reference is None else torch.cat(list(reference)), groups)
    return loss / len(sizes)
