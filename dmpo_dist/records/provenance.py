"""The origin of a model, from the files that stages wrote beside it and beside the models it started from."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dmpo_dist.artifacts.base import read_config
from dmpo_dist.artifacts.dataset import DatasetCard
from dmpo_dist.artifacts.environment import Environment
from dmpo_dist.artifacts.stamp import ModelStamp
from dmpo_dist.data.store import seen_fingerprint
from dmpo_dist.modeling.backbone import ModelSource
from dmpo_dist.parsing import parse_yaml

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)/snapshots/")
"""In the path of a model that the hub's library has downloaded."""


@dataclass(frozen=True)
class Provenance:
    """The origin of a model as far as its files tell it; None or empty where they do not.

    Attributes:
        stamp: the content of ``dmpo.json``.
        config, environment: the run's ``config.yaml`` and ``environment.json``, which lie beside the model folder.
        dataset: ``dataset.json`` of the prepared data.
        same_data: whether the run was trained on ``dataset``, by its fingerprint; None where that is not known.
        stages: the stages that made the model, oldest first.
        base: hub id of the pretrained model at the beginning, by its path or the card in its folder; None where there
            is none or it is not known.
        scratch: whether the first stage began with random weights.
        base_license: the licence that the base model's own card names.
    """

    stamp: ModelStamp = field(default_factory=ModelStamp)
    config: dict[str, Any] = field(default_factory=dict)
    environment: Environment | None = None
    dataset: DatasetCard | None = None
    same_data: bool | None = None
    stages: tuple[str, ...] = ()
    base: str | None = None
    scratch: bool = False
    base_license: str | None = None


def read_provenance(source: ModelSource, dataset: DatasetCard | None) -> Provenance:
    """Read the files beside the model folder and beside the models it started from.

    Args:
        dataset: ``dataset.json`` of data given on the command line; None reads it where the run read its data.

    Raises:
        UserError: one of the files exists and is damaged.
    """
    run = Path(source.path).resolve().parent
    config, environment = read_config(run / "config.yaml"), Environment.read_if_there(run)
    if dataset is None and (data := (config.get("data") or {}).get("path")):
        dataset = DatasetCard.read_if_there(Path(data))
    trained_on = environment.data_fingerprint if environment else None
    known = dataset.fingerprint if dataset else None
    seen = seen_fingerprint(known, config.get("data") or {}) if known else None
    stages, start, base, scratch = _lineage(source)
    header = _card_header(source, start, base)
    named = header.get("base_model")
    return Provenance(
        stamp=source.stamp,
        config=config,
        environment=environment,
        dataset=dataset,
        same_data=trained_on == seen if trained_on and known else None,
        stages=stages,
        base=base or (named if isinstance(named, str) and HUB_ID.fullmatch(named) and not scratch else None),
        scratch=scratch,
        base_license=header["license"] if isinstance(header.get("license"), str) else None,
    )


def _lineage(source: ModelSource) -> tuple[tuple[str, ...], str | None, str | None, bool]:
    """The stages from the oldest on, path and hub id of the first model, and whether it had random weights."""
    # Each stamp names the model that its stage started from. Follow these to a model without a stamp: one of the hub,
    # or a folder that another program made. ``seen`` ends a circle, which overwritten folders can make.
    stamps, seen = [source.stamp], set[str]()
    start = source.stamp.start or (source.base if source.is_adapter else None)
    while start and start not in seen and (stamp := ModelStamp.read_if_there(Path(start))):
        seen.add(start)
        stamps.append(stamp)
        start = stamp.start
    scratch = stamps[-1].stage == "untuned"
    if start is None and source.is_adapter and not scratch:
        start = source.base
    hub = start if start and HUB_ID.fullmatch(start) and not Path(start).exists() else None
    if hub is None and start and (cached := CACHED.search(start)):
        hub = "/".join(cached.groups())
    names = {"untuned": "random weights", "train": "preference optimization", "sft": "supervised fine-tuning"}
    return tuple(names.get(s.stage, s.stage) for s in reversed(stamps) if s.stage), start, hub, scratch


def _card_header(source: ModelSource, start: str | None, hub: str | None) -> dict[str, Any]:
    """The YAML header of the base model's card, on disk or in the hub's cache; nothing is downloaded.

    Args:
        start: path or hub id of the model at the beginning.
    """
    from huggingface_hub import try_to_load_from_cache

    cards = [Path(folder) / "README.md" for folder in (source.base, start) if folder]
    cached = try_to_load_from_cache(hub, "README.md") if hub else None
    if isinstance(cached, str):
        cards.append(Path(cached))
    for card in cards:
        text = card.read_text(encoding="utf-8-sig", errors="replace") if card.is_file() else ""
        header = re.match(r"---\n(.*?)\n---\n", text, re.S)
        try:
            content = parse_yaml(header[1]) if header else None
        except ValueError:  # somebody else's file, which need not be sound
            continue
        if isinstance(content, dict) and {"license", "base_model"} & content.keys():
            return content
    return {}
