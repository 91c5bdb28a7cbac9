"""A check of ``data.path`` that comes before the libraries that read the data are imported, which takes seconds."""

from pathlib import Path

from dmpo_dist.artifacts.dataset import DatasetCard
from dmpo_dist.errors import UserError


def require_prepared(path: Path | None) -> Path:
    """Return ``path`` if it is a folder with the card of prepared data.

    Raises:
        UserError: it is not set, is not a folder, or has no card.
    """
    if path is None:
        raise UserError(
            "data.path is not set; give the folder that `dmpo data prepare` wrote, as in data.path=runs/data"
        )
    if not path.is_dir():
        raise UserError(f"{path}: no such folder of prepared data; write it with `dmpo data prepare data.path={path}`")
    if not (path / DatasetCard.FILE).is_file():
        raise UserError(
            f"{path}: not prepared data (it has no {DatasetCard.FILE}); give what `dmpo data prepare` wrote"
        )
    return path
