"""Training groups whose prompts list the candidates of the step they are used in."""

from collections.abc import Sequence

from dmpo_dist.batching.layout import group_cost
from dmpo_dist.data.candidates import balance_line, lists_as_stored, place_of, require_no_finished_prompts
from dmpo_dist.data.schema import PreferenceGroup, above_last
from dmpo_dist.data.store import PreparedData, groups_from_rows
from dmpo_dist.data.tokenization import GroupTokenizer, TokenGroup
from dmpo_dist.errors import UserError
from dmpo_dist.training.groups import candidate_columns, require_negatives
from dmpo_dist.training.job import Job


class ListedGroups:
    """``(index, epoch) -> TokenGroup``: a group whose prompt lists its positive and the K negatives of the epoch.

    A group depends on its index, the epoch and the seed alone, so that ranks agree and a resumed run goes on alike.

    Args:
        groups: with every stored negative.
        encode: tokenizes them, for a template that lists candidates.
        negatives: K of a step.
        responses: which candidates become responses: all, or the positive alone (SFT).
        as_stored: list all stored candidates in every step, not those of the step.
    """

    def __init__(
        self, groups: Sequence[PreferenceGroup], encode: GroupTokenizer, negatives: int, responses: bool,
        as_stored: bool,
    ) -> None:  # fmt: skip
        self._groups, self._encode, self._negatives = groups, encode, negatives
        self._responses, self._as_stored = responses, as_stored

    def __len__(self) -> int:
        return len(self._groups)

    def __call__(self, index: int, epoch: int) -> TokenGroup:
        group, listed = self.at(index, epoch)
        return self._encode(group, epoch, listed)

    def at(self, index: int, epoch: int) -> tuple[PreferenceGroup, tuple[str, ...]]:
        """The group whose candidates become responses, and what its prompt lists, in no particular order."""
        group = self._groups[index]
        stored, above = (group.positive, *group.negatives), above_last(group.levels)
        chosen = candidate_columns(len(stored) - above, self._negatives, epoch * self._negatives, above)
        of_step = tuple(stored[column] for column in chosen)
        return group.taking(chosen if self._responses else [0]), stored if self._as_stored else of_step

    def largest(self, epochs: int, shared: bool) -> int:
        """Tokens of the largest group in any of so many epochs; raises UserError where a list does not fit."""
        used = ((index, epoch) for epoch in range(epochs) for index in range(len(self)))
        return max(group_cost(self(index, epoch), shared).tokens for index, epoch in used)

    def balance(self, epochs: int) -> str:
        """Where the positives stand in the lists of so many epochs, see ``balance_line``."""
        used = ((index, epoch) for epoch in range(epochs) for index in range(len(self)))
        return balance_line([place_of(*self.at(index, epoch), self._encode.seed, epoch) for index, epoch in used])


def listed_groups(job: Job, data: PreparedData, encode: GroupTokenizer) -> ListedGroups:
    """The training groups of ``job``, whose template lists candidates."""
    negatives = job.config.train.negatives if job.kind == "preference" else job.config.sft.negatives
    rows = groups_from_rows(data.train)
    return ListedGroups(rows, encode, negatives, job.kind == "preference", lists_as_stored(data))


def require_lists(job: Job, data: PreparedData) -> None:
    """Whether every group can list candidates, where the template of ``job`` does.

    Raises:
        UserError: finished prompts, too few negatives, or a setting that does not go with such prompts.
    """
    config = job.config
    if not config.template.lists_candidates:
        return
    require_no_finished_prompts(config.template, data.train["prompt"], str(data.path))
    if job.kind == "sft" and config.sft.history_order == "shuffled":
        raise UserError(
            "sft.history_order=shuffled draws new positives, to which the stored negatives do not belong, but "
            "template.request lists {candidates}; set sft.history_order=given"
        )
    if job.kind == "sft":
        wanted = 1 if lists_as_stored(data) else config.sft.negatives
        require_negatives(data.stored_negatives(), wanted, fixed_rows=data.ragged, section="sft")
    if job.kind == "preference" and config.reference.cache != "off":
        raise UserError(
            f"reference.cache={config.reference.cache} keeps one value for each response, but template.request lists "
            "{candidates}, so that a prompt is another one in each epoch; set reference.cache=off"
        )
