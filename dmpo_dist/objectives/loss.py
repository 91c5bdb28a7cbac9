"""What the training loop asks of a loss."""

from typing import Protocol

from torch import Tensor

from dmpo_dist.objectives.groups import Groups


class Loss(Protocol):
    """A loss on summed log-probs; N responses in G groups.

    Attributes:
        sums: names of the sums over groups that it reports, ``loss`` among them. A loss that adds a likelihood term
            reports the rest as ``preference_loss``.
        needs_reference: whether reference log-probs change it.
        scores_history: whether it also takes the log-probs of the history's titles.
    """

    @property
    def sums(self) -> tuple[str, ...]: ...

    @property
    def needs_reference(self) -> bool: ...

    @property
    def scores_history(self) -> bool: ...

    def initial(self, policy: Tensor, groups: Groups) -> Tensor | None:
        """(G,) what each group's ``preference_loss`` (``loss`` where none is reported) is while the reference has the
        log-probs of ``policy`` (N,); None where that is not known. The first step of a run is checked against it."""
        ...

    def __call__(
        self, policy: Tensor, reference: Tensor | None, groups: Groups, history: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss *summed* over groups (the loop takes the mean over the global batch, once), and its ``sums``.

        Args:
            policy: (N,) log-probs summed over each response's tokens, differentiable.
            reference: (N,) the same of the frozen reference; None where it is not needed.
            groups: which response belongs to which group.
            history: (G,) summed log-probs of each group's history titles, None or (0,) where they are not scored.

        Returns:
            A scalar, and for each name of ``sums`` a detached scalar.
        """
        ...
