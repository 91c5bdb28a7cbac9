"""Which reference an explanation compares a model with."""

from dmpo_dist.config import RunConfig
from dmpo_dist.errors import UserError
from dmpo_dist.evaluation.ranking import reference_of
from dmpo_dist.modeling.backbone import ModelSource, find_model


def choose_reference(source: ModelSource, flag: str | None, config: RunConfig) -> tuple[str | None, str]:
    """Folder or hub id of the reference, and what to say where there is none though nobody asked for that.

    Args:
        flag: what the user asked for; None leaves the choice here.

    Raises:
        UserError: the ranking subtracts another reference than ``flag``, or there is no such model.
    """
    ranked_by = config.ranking.reference
    if ranked_by is not None:
        if flag not in (None, ranked_by):
            raise UserError(
                f"--reference {flag}: the ranking subtracts ranking.reference={ranked_by}; give one of the two"
            )
        return reference_of(source, ranked_by), ""
    if flag is None:
        return _usual_reference(source)
    return (None if flag == "none" else reference_of(source, flag, "--reference ")), ""


def _usual_reference(source: ModelSource) -> tuple[str | None, str]:
    """What training started from if that is still there, else an adapter's base."""
    start = source.stamp.start
    lacks = "it does not say what it was trained from"
    if start:
        try:
            return find_model(start).path, ""
        except UserError:
            lacks = f"it was trained from {start}, which is not there"
    if source.is_adapter:
        return source.base, ""
    return (
        None,
        f"note: {source.path} has no reference ({lacks}), so its words are not compared; name one by --reference",
    )
