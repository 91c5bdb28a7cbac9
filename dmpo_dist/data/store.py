"""Reading the prepared folder, and its rows as preference groups."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value, load_from_disk

from dmpo_dist.artifacts.dataset import DatasetCard
from dmpo_dist.artifacts.digest import damage
from dmpo_dist.config import DataConfig, TemplateConfig
from dmpo_dist.data.place import require_prepared
from dmpo_dist.data.prompt_texts import PromptTexts, require_fields
from dmpo_dist.data.schema import PreferenceGroup, above_last
from dmpo_dist.data.splits import SPLITS
from dmpo_dist.errors import UserError
from dmpo_dist.parsing import parsing

FORMAT_VERSION = 1
INTERACTIONS_FILE, USERS_FILE = "interactions.parquet", "users.parquet"
ROWS_AT_ONCE = 1000
NOT_PREPARED_BY = ("path", "shots", "shots_seed", "shots_skip", "source", "stream", "stream_memory")
"""Keys of the data section that say where data lies, or how it is read, and not what it becomes."""
ROW_FEATURES = Features(
    {
        "user": Value("string"),
        "timestamp": Value("int64"),
        "history": List(Value("string")),
        "history_items": List(Value("string")),
        "positive": Value("string"),
        "positive_item": Value("string"),
        "negatives": List(Value("string")),
        "negative_items": List(Value("string")),
        "oracle": List(Value("float64")),
        "prompt": Value("string"),
    }
)
LEVEL_FEATURES = Features({"levels": List(Value("int64")), "scores": List(Value("float64"))})
"""Columns that a training split has as well where a row has levels, or scores: see ``PreferenceGroup``. The column
``negatives`` then holds all responses but the positive, level by level; [] stands for one positive and K negatives."""


@dataclass(frozen=True)
class PreparedData:
    """Preference groups ready to train and rank on.

    Attributes:
        train, validation, test: rows with the columns of ``ROW_FEATURES``, training rows also with those of
            ``LEVEL_FEATURES`` where any has levels. ``oracle`` holds the true score of the
            positive, then those of the negatives; it is empty unless the data is simulated. Rows of ready preferences
            have a ``prompt``, no history and no items ("" and []); their validation and test may be empty.
        items: columns item, title, genres and further texts; None for ready preferences.
        users: columns user and the fields that ``data.source.users_columns`` named; None where it named none.
        interactions: columns user, item, rating, timestamp; None for ready preferences.
        card: the content of ``dataset.json``.
        fingerprint: sha256 over the content of rows and items.
        path: the folder.
    """

    train: Dataset
    validation: Dataset
    test: Dataset
    items: pd.DataFrame | None
    users: pd.DataFrame | None
    interactions: pd.DataFrame | None
    card: DatasetCard
    fingerprint: str
    path: Path
    shots_seed: int = 0
    shots_skip: int = 0

    @classmethod
    def for_training(cls, config: DataConfig) -> "PreparedData":
        """The data in ``config.path`` with the training groups that its ``shots`` take.

        Raises:
            UserError: see ``load``; no path, or too few training groups.
        """
        whole = cls.load(require_prepared(config.path))
        return whole if config.shots is None else whole.few(config.shots, config.shots_seed, config.shots_skip)

    @classmethod
    def load(cls, path: Path) -> "PreparedData":
        """Read a folder that ``dmpo data prepare`` wrote.

        Raises:
            UserError: no such folder, not a prepared folder, another format version, or damaged files.
        """
        path = Path(path)
        card = _read_card(path)
        why = damage(path, card.digests or {})
        if why:
            raise _damaged(path, why)
        splits = {split: _read_split(path / split, card.counts[split]) for split in SPLITS}
        items, interactions = (
            _read_table(path / f"{name}.parquet") if there else None
            for name, there in (("items", card.items), ("interactions", card.interactions))
        )
        users = _read_table(path / USERS_FILE) if (path / USERS_FILE).exists() else None
        return cls(
            **splits,
            items=items,
            interactions=interactions,
            users=users,
            card=card,
            fingerprint=card.fingerprint,
            path=path,
        )

    def few(self, shots: int, shots_seed: int = 0, shots_skip: int = 0) -> "PreparedData":
        """The same data with fewer training groups.

        Args:
            shots: how many; the groups of a smaller number are among those of a larger one.
            shots_seed: which ones; another number draws others.
            shots_skip: take those after this many of the draw, so that none is among ``few(shots_skip, shots_seed)``.

        Raises:
            UserError: there are fewer than ``shots_skip + shots``.
        """
        train = _few(self.train, shots, shots_seed, shots_skip, self.path)
        fingerprint = few_fingerprint(self.fingerprint, shots, shots_seed, shots_skip)
        return replace(self, train=train, fingerprint=fingerprint, shots_seed=shots_seed, shots_skip=shots_skip)

    def stored_negatives(self) -> list[int]:
        """How many negatives each training group has, among levels how many responses at the last one."""
        counts = pc.list_value_length(self.train.data.column("negatives")).to_pylist()
        if "levels" not in self.train.features:
            return counts
        above = map(above_last, self.train["levels"][:])
        return [1 + others - number for others, number in zip(counts, above, strict=True)]

    @property
    def log_digest(self) -> str | None:
        """Of the interactions, which the fingerprint does not cover; None without any, or where no digest was kept."""
        return (self.card.digests or {}).get(INTERACTIONS_FILE)

    def about(self) -> dict[str, str | None]:
        """What a file of figures says of the data that they are of; see ``is_that_of``."""
        return {"path": str(self.path), "fingerprint": self.fingerprint, "log": self.log_digest}

    def is_that_of(self, about: Mapping[str, Any]) -> bool:
        """Whether figures of the data ``about`` are of this one, by rows, items and, where it is told, the log."""
        return about.get("fingerprint") == self.fingerprint and about.get("log", self.log_digest) == self.log_digest

    @property
    def ragged(self) -> bool:
        """Whether rows came ready-made and may hold more negatives, or longer lists, one than another."""
        return self.items is None or (self.interactions is None and any(self.lists()))

    def lists(self) -> list[bool]:
        """For each training group whether it has several positives or more than two levels."""
        return [bool(levels) for levels in self.train["levels"][:]] if "levels" in self.train.features else []


def unlike_preparation(config: DataConfig, card: DatasetCard) -> list[str]:
    """Settings of ``config`` that only preparing data heeds, and that the data of ``card`` was not prepared by."""
    asked = config.model_dump(mode="json", exclude=set(NOT_PREPARED_BY), exclude_defaults=True)
    return [
        f"data.{key}={value} has no effect here: the data was prepared with {card.config[key]}"
        for key, value in asked.items()
        if key in card.config and card.config[key] != value
    ]


def texts_of_data(template: TemplateConfig, data: PreparedData) -> PromptTexts:
    """What the placeholders of ``template`` stand for in ``data``.

    Raises:
        UserError: one of them is no field of its items or users; the message names those that are.
    """
    require_fields(template, data.items, data.users, str(data.path))
    texts = PromptTexts(item_fields=template.item_fields, user_fields=template.user_fields)
    return texts.with_items(data.items).with_users(data.users)


def few_fingerprint(fingerprint: str, shots: int | None, shots_seed: int = 0, shots_skip: int = 0) -> str:
    """The fingerprint of the data with ``shots`` training groups; with None it is that of the whole data."""
    if shots is None:
        return fingerprint
    drawn = (f" by {shots_seed}" if shots_seed else "") + (f" after {shots_skip}" if shots_skip else "")
    return hashlib.sha256(f"{fingerprint} {shots} shots{drawn}".encode()).hexdigest()


def seen_fingerprint(fingerprint: str, config: Mapping[str, Any]) -> str:
    """The fingerprint of what a run with this ``data`` section saw of the data with ``fingerprint``."""
    drawn = (config.get(key) or 0 for key in ("shots_seed", "shots_skip"))
    return few_fingerprint(fingerprint, config.get("shots"), *drawn)


def group_from_row(row: Mapping[str, Any]) -> PreferenceGroup:
    """The preference group of one dataset row."""
    return PreferenceGroup(
        user=row["user"],
        timestamp=row["timestamp"],
        history=tuple(row["history"]),
        positive=row["positive"],
        negatives=tuple(row["negatives"]),
        prompt=row["prompt"],
        levels=tuple(row.get("levels", ())),
        scores=tuple(row.get("scores", ())),
    )


def groups_from_rows(rows: Dataset) -> list[PreferenceGroup]:
    """The preference groups of a split."""
    columns = [field.name for field in fields(PreferenceGroup) if field.name in rows.features]
    return [group_from_row(row) for row in rows.select_columns(columns).to_list()]


def dataset_of(rows: Sequence[Mapping[str, Any]]) -> Dataset:
    """A split made from ``rows``, which have the columns of ``ROW_FEATURES`` and maybe those of ``LEVEL_FEATURES``."""
    if any(row.get(name) for row in rows for name in LEVEL_FEATURES):
        features = Features(ROW_FEATURES | LEVEL_FEATURES)
        return Dataset.from_dict({name: [row.get(name, []) for row in rows] for name in features}, features=features)
    return Dataset.from_dict({name: [row[name] for row in rows] for name in ROW_FEATURES}, features=ROW_FEATURES)


def on_disk(rows: Dataset, folder: Path) -> Dataset:
    """Save ``rows`` to ``folder`` and return them as read from there on demand."""
    rows.save_to_disk(str(folder))
    return load_from_disk(str(folder))


def rows_of(split: Dataset) -> Iterator[dict[str, Any]]:
    """The rows of a split, with one batch at a time in memory."""
    for batch in split.with_format("arrow").iter(ROWS_AT_ONCE):
        yield from batch.to_pylist()


def _few(train: Dataset, shots: int, shots_seed: int, shots_skip: int, path: Path) -> Dataset:
    """By the hashes of their content and ``shots_seed``: the ``shots`` groups after the first, in their old order."""
    if shots_skip + shots > len(train):
        after = f" after data.shots_skip={shots_skip}" if shots_skip else ""
        raise UserError(
            f"data.shots={shots}{after}, but {path} holds {len(train)} training groups; lower data.shots"
            + (" or data.shots_skip" if shots_skip else "")
        )
    keys = zip(*(train[name][:] for name in ("user", "timestamp", "history", "positive", "prompt")), strict=True)
    salt = str(shots_seed).encode() if shots_seed else b""
    rank = [hashlib.blake2b(repr(key).encode(), digest_size=16, key=salt).digest() for key in keys]
    drawn = sorted(range(len(rank)), key=rank.__getitem__)[shots_skip : shots_skip + shots]
    return train.select(sorted(drawn))


def _read_card(path: Path) -> DatasetCard:
    card = DatasetCard.read(require_prepared(path))
    if card.format_version != FORMAT_VERSION:
        raise UserError(
            f"{path / DatasetCard.FILE}: format version {card.format_version}, this dmpo reads version "
            f"{FORMAT_VERSION}; prepare the data again"
        )
    if {*card.counts} != {*SPLITS}:
        raise _damaged(path / DatasetCard.FILE, f"counts must be of {', '.join(SPLITS)}")
    return card


def _read_split(folder: Path, count: int) -> Dataset:
    """The rows of a split; an empty split has no folder."""
    if count == 0:
        return dataset_of([])
    try:
        dataset = load_from_disk(str(folder))
    # A damaged Arrow file can raise nearly any exception, depending on the byte that is wrong.
    except Exception as error:
        raise _damaged(folder, error) from None
    known = (ROW_FEATURES, Features(ROW_FEATURES | LEVEL_FEATURES))
    if not isinstance(dataset, Dataset) or dataset.features not in known or len(dataset) != count:
        raise _damaged(folder, f"{count} rows of preference groups expected")
    return dataset


def _read_table(file: Path) -> pd.DataFrame:
    with parsing(file, "is it damaged or incomplete? Remove the folder and run `dmpo data prepare` again"):
        return pd.read_parquet(file)


def _damaged(path: Path, reason: object) -> UserError:
    return UserError(f"{path}: damaged or incomplete ({reason}); remove the folder and run `dmpo data prepare` again")
