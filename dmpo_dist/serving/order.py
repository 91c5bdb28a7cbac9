"""What is to be served, checked as far as it can be without weights."""

from dataclasses import dataclass
from pathlib import Path

from dmpo_dist.config import RunConfig
from dmpo_dist.evaluation.inputs import given_texts, with_trained_data
from dmpo_dist.evaluation.ranking import GivenTexts, require_no_beams
from dmpo_dist.modeling.backbone import enforce_template, find_model, with_length_of


@dataclass(frozen=True)
class Served:
    """What is served.

    Attributes:
        model: model folder or hub id.
        config: gives template, model, evaluation, ranking and serving settings.
        catalogue: file or folder, see ``read_catalogue``; None for none.
        given: fields of items and users from files, see ``load_ranking_model``.
    """

    model: str
    config: RunConfig
    catalogue: Path | None
    given: GivenTexts | None = None


def what_is_served(model: str, catalogue: Path | None, config: RunConfig) -> Served:
    """The order, checked as far as it can be without weights.

    Raises:
        UserError: no such model, another template than its own, or ``ranking.beams``.
    """
    require_no_beams(config.ranking, "dmpo serve")
    source = find_model(model)
    config = with_length_of([source], with_trained_data(config, Path(source.path)))
    template = enforce_template(source.stamp, config.template, model)
    catalogue = catalogue or config.data.path
    return Served(model, config, catalogue, given_texts(template, catalogue, None))
