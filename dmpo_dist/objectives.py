"""Preference objectives over one positive and K negative responses per group, as pure functions.

All tensors are flat over the responses of a batch, so that K may differ from group to group:

    policy, reference   (N,) log-probs summed over each response's tokens
    group_id            (N,) int64 in [0, n_groups)
    is_positive         (N,) bool, exactly one per group among the unmasked
    mask                (N,) bool, False for padding: it never counts, neither in sums nor in K

With r = beta * (policy - reference), w the positive and n the negatives of a group, s = softplus:

    dmpo       s(mean_n r_n - r_w)          Bai et al., arXiv 2405.16127
    sdpo       s(logsumexp_n(r_n - r_w))    Chen et al., arXiv 2406.09215
    dpo_pairs  mean_n s(r_n - r_w)          Rafailov et al., arXiv 2305.18290, averaged over the K pairs

Objectives return the *sum* over groups; the mean over the global batch is taken once, by the training loop.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

Name = Literal["dmpo", "sdpo", "dpo_pairs", "dmpo_released"]


@dataclass(frozen=True)
class Groups:
    """Which response belongs to which group, and what it is there.

    Attributes:
        group_id: (N,) int64 in [0, count).
        is_positive: (N,) bool.
        mask: (N,) bool, False for padding.
        count: number of groups.
    """

    group_id: Tensor
    is_positive: Tensor
    mask: Tensor
    count: int

    @property
    def positive(self) -> Tensor:
        """(N,) bool: unmasked positives."""
        return self.is_positive & self.mask

    @property
    def negative(self) -> Tensor:
        """(N,) bool: unmasked negatives."""
        return ~self.is_positive & self.mask

    def sum(self, values: Tensor, where: Tensor) -> Tensor:
        """(count,) sum of ``values`` (N,) over the responses of each group selected by ``where`` (N,)."""
        out = values.new_zeros(self.count)
        return out.index_add(0, self.group_id, torch.where(where, values, torch.zeros_like(values)))

    def max(self, values: Tensor, where: Tensor) -> Tensor:
        """(count,) maximum over the selected responses of each group, -inf where there are none."""
        low = torch.full_like(values, -torch.inf)
        out = values.new_full((self.count,), -torch.inf)
        return out.scatter_reduce(0, self.group_id, torch.where(where, values, low), "amax")

    def check(self) -> None:
        """Raise ValueError unless every group has exactly one positive and at least one negative."""
        ones = torch.ones_like(self.group_id)
        positives, negatives = self.sum(ones, self.positive), self.sum(ones, self.negative)
        if (positives != 1).any():
            group = int((positives != 1).nonzero()[0])
            raise ValueError(f"group {group} has {int(positives[group])} positives; exactly one is needed")
        if (negatives < 1).any():
            raise ValueError(f"group {int((negatives < 1).nonzero()[0])} has no negatives; at least one is needed")


@dataclass(frozen=True)
class Objective:
    """A preference objective with its options; call it on the log-probs of a batch.

    Attributes:
        name: see the module's table; ``dmpo_released`` is what the DMPO authors' released code trains:
            reference-free ``dpo_pairs`` plus 1.0 times the mean-token NLL of the positive.
        beta: scale of the log-ratio.
        sft_weight: adds this times the mean-token negative log-likelihood of the positive (and of the history,
            where that is given).
        label_smoothing: e in (1 - e) * s(z) + e * s(-z).
        reference_free: take all reference log-probs as equal.
        length_normalize: divide policy and reference log-probs by the response lengths.
        negative_selection: ``boundary`` keeps the negatives that the policy rates at least as high as the positive,
            or the hardest ones where there are none (arXiv 2605.00327); the choice is not differentiated.
    """

    name: Name = "dmpo"
    beta: float = 1.0
    sft_weight: float = 0.0
    label_smoothing: float = 0.0
    reference_free: bool = False
    length_normalize: bool = False
    negative_selection: Literal["all", "boundary"] = "all"

    @property
    def needs_reference(self) -> bool:
        """Whether reference log-probs change the loss."""
        return not (self.reference_free or self.name == "dmpo_released")

    def __call__(
        self,
        policy: Tensor,
        reference: Tensor | None,
        lengths: Tensor,
        group_id: Tensor,
        is_positive: Tensor,
        mask: Tensor,
        n_groups: int,
        history: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss summed over groups, and sums over groups of what is worth watching.

        Args:
            policy, reference: (N,) summed log-probs; ``reference`` may be None where it is not needed.
            lengths: (N,) number of scored tokens of each response.
            group_id, is_positive, mask, n_groups: see the module's docstring.
            history: (G,) summed log-probs of each group's history titles and their numbers of tokens, which join the
                positive in the ``sft_weight`` term; None or empty where they are not scored.

        Returns:
            A scalar and a dict of detached scalars: ``loss``, ``preference_loss``, ``margin`` (r_w - mean r_n),
            ``accuracy`` (share of negatives the policy rates below the positive), ``reward_accuracy`` (the same
            for r), ``logp_positive``, ``logp_negative`` (mean over negatives), ``negatives`` (K kept), and
            ``initial_loss``, what ``preference_loss`` would be with the policy equal to the reference.

        Raises:
            ValueError: a group without exactly one positive and at least one negative (checked on the CPU only,
                where it costs no synchronisation; the collator checks before data goes to an accelerator).
        """
        groups = Groups(group_id, is_positive, mask, n_groups)
        if policy.device.type == "cpu":
            groups.check()
        policy, lengths = _widen(policy, mask), torch.where(mask, lengths, 1)
        ratio = policy
        if self.needs_reference:
            if reference is None:
                raise ValueError(f"{self.name} needs reference log-probs")
            ratio = policy - _widen(reference.detach(), mask)
        rewards = self.beta * (ratio / lengths if self.length_normalize else ratio)
        chosen = groups.negative
        if self.negative_selection == "boundary":
            chosen = boundary_negatives(policy.detach(), groups)
        positive_reward = groups.sum(rewards, groups.positive)  # (G,)
        kept = groups.sum(torch.ones_like(rewards), chosen)
        form = FORMS["dpo_pairs" if self.name == "dmpo_released" else self.name]
        preference = form(rewards, positive_reward, kept, chosen, groups, self.label_smoothing)  # (G,)
        nll = _mean_token_nll(policy, lengths, groups, history)
        sft_weight = self.sft_weight + (1.0 if self.name == "dmpo_released" else 0.0)
        loss = (preference + sft_weight * nll if sft_weight else preference).sum()
        stats = _statistics(policy.detach(), rewards.detach(), groups)
        stats |= {
            "loss": loss.detach(),
            "preference_loss": preference.detach().sum(),
            "initial_loss": self.initial_loss(kept).sum(),
            "negatives": kept.sum(),
        }
        return loss, stats

    def initial_loss(self, negatives: Tensor) -> Tensor:
        """(G,) preference loss of groups with ``negatives`` (G,) negatives while the policy equals the reference.

        log 2 for every form but ``sdpo``, which starts at log(1 + K).
        """
        z = negatives.log() if self.name == "sdpo" else torch.zeros_like(negatives)
        return _smoothed(z, self.label_smoothing)


def sft_loss(
    policy: Tensor,
    lengths: Tensor,
    group_id: Tensor,
    is_positive: Tensor,
    mask: Tensor,
    n_groups: int,
    history: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean-token negative log-likelihood of each group's positive, and of its history where that is scored, summed
    over groups; arguments as in Objective."""
    groups = Groups(group_id, is_positive, mask, n_groups)
    policy, lengths = _widen(policy, mask), torch.where(mask, lengths, 1)
    loss = _mean_token_nll(policy, lengths, groups, history).sum()
    return loss, {"loss": loss.detach(), "logp_positive": groups.sum(policy.detach(), groups.positive).sum()}


def _mean_token_nll(policy: Tensor, lengths: Tensor, groups: Groups, history: tuple[Tensor, Tensor] | None) -> Tensor:
    """(G,) mean over the tokens of the positive, and of the history where there is one."""
    total, count = groups.sum(policy, groups.positive), groups.sum(lengths, groups.positive)
    if history is not None and len(history[0]):
        total, count = total + history[0], count + history[1]
    return -total / count


def boundary_negatives(policy: Tensor, groups: Groups) -> Tensor:
    """(N,) bool: negatives with log pi(y_n) >= log pi(y_w), or a group's hardest ones where there are none."""
    threshold = groups.sum(policy, groups.positive)[groups.group_id]
    over = groups.negative & (policy >= threshold)
    hardest = groups.max(policy, groups.negative)[groups.group_id]
    any_over = groups.max(over.to(policy.dtype), groups.negative)[groups.group_id] > 0
    return torch.where(any_over, over, groups.negative & (policy == hardest))


def _dmpo(rewards: Tensor, positive: Tensor, kept: Tensor, chosen: Tensor, groups: Groups, smoothing: float) -> Tensor:
    mean_negative = groups.sum(rewards, chosen) / kept
    return _smoothed(mean_negative - positive, smoothing)


def _sdpo(rewards: Tensor, positive: Tensor, kept: Tensor, chosen: Tensor, groups: Groups, smoothing: float) -> Tensor:
    top = groups.max(rewards.detach(), chosen)
    shifted = torch.where(chosen, rewards - top[groups.group_id], torch.zeros_like(rewards))
    log_sum = groups.sum(shifted.exp(), chosen).log() + top
    return _smoothed(log_sum - positive, smoothing)


def _dpo_pairs(
    rewards: Tensor, positive: Tensor, kept: Tensor, chosen: Tensor, groups: Groups, smoothing: float
) -> Tensor:
    pairs = _smoothed(rewards - positive[groups.group_id], smoothing)
    return groups.sum(pairs, chosen) / kept


FORMS = {"dmpo": _dmpo, "sdpo": _sdpo, "dpo_pairs": _dpo_pairs}


def _smoothed(z: Tensor, smoothing: float) -> Tensor:
    """softplus(z), mixed with the loss of the flipped preference."""
    return softplus(z) if not smoothing else (1 - smoothing) * softplus(z) + smoothing * softplus(-z)


def _statistics(policy: Tensor, rewards: Tensor, groups: Groups) -> dict[str, Tensor]:
    k = groups.sum(torch.ones_like(policy), groups.negative)
    positive_logp, positive_reward = groups.sum(policy, groups.positive), groups.sum(rewards, groups.positive)
    below = (policy < positive_logp[groups.group_id]).to(policy.dtype)
    reward_below = (rewards < positive_reward[groups.group_id]).to(policy.dtype)
    return {
        "margin": (positive_reward - groups.sum(rewards, groups.negative) / k).sum(),
        "accuracy": (groups.sum(below, groups.negative) / k).sum(),
        "reward_accuracy": (groups.sum(reward_below, groups.negative) / k).sum(),
        "logp_positive": positive_logp.sum(),
        "logp_negative": (groups.sum(policy, groups.negative) / k).sum(),
    }


def _widen(log_probs: Tensor, mask: Tensor) -> Tensor:
    """Half types become fp32: a softplus of bf16 sums would lose the third digit. Padding, which may hold anything,
    becomes 0: a ``where`` after the arithmetic would keep NaN and inf out of the loss but not out of its gradient.
    """
    wide = log_probs if log_probs.dtype in (torch.float32, torch.float64) else log_probs.float()
    return torch.where(mask, wide, 0.0)
