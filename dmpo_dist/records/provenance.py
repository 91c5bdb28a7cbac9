"""How a model came about, from what the stages left beside it and beside the models it started from."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dmpo_dist.data.store import few_fingerprint
from dmpo_dist.errors import UserError
from dmpo_dist.modeling.backbone import STAMP, ModelSource

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Provenance:
    """What is written down of how a model came about; empty or None where nothing is.

    Attributes:
        stamp: ``dmpo.json``.
        config, environment: of the run, ``config.yaml`` and ``environment.json`` beside the model folder.
        dataset: ``dataset.json`` of the prepared data.
        same_data: whether ``dataset`` is what the run was trained on, by its fingerprint; None where that is not known.
        stages: what the model went through, oldest first.
        base: hub id of the pretrained model at the beginning; None where there is none or it is not known.
        scratch: whether it began with random weights.
        base_license: what the base model's own card says.
    """

    stamp: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    dataset: dict[str, Any] = field(default_factory=dict)
    same_data: bool | None = None
    stages: tuple[str, ...] = ()
    base: str | None = None
    scratch: bool = False
    base_license: str | None = None


def read_provenance(source: ModelSource, dataset: dict[str, Any] | None) -> Provenance:
    """Look beside the model folder and at the models it started from.

    Args:
        dataset: ``dataset.json`` of data given on the command line; None looks where the run read its data.

    Raises:
        UserError: one of the files is there and damaged.
    """
    run = Path(source.path).resolve().parent
    config, environment = _read(run / "config.yaml"), _read(run / "environment.json")
    if dataset is None:
        place = (config.get("data") or {}).get("path")
        dataset = _read(Path(place) / "dataset.json") if place else {}
        if not {"name", "counts", "fingerprint"} <= dataset.keys():
            dataset = {}
    trained_on, known = environment.get("data_fingerprint"), dataset.get("fingerprint")
    shots = (config.get("data") or {}).get("shots")
    stages, base, scratch = _lineage(source)
    return Provenance(
        stamp=source.stamp,
        config=config,
        environment=environment,
        dataset=dataset,
        same_data=trained_on == few_fingerprint(known, shots) if trained_on and known else None,
        stages=stages,
        base=base,
        scratch=scratch,
        base_license=_license_of(source, base),
    )


def _lineage(source: ModelSource) -> tuple[tuple[str, ...], str | None, bool]:
    """Stages from the oldest on, the hub id at the beginning, and whether that was random weights."""
    stages: list[str] = []
    stamp, seen = source.stamp, set()
    start = stamp.get("start") or (source.base if source.is_adapter else None)
    if stamp.get("stage"):
        stages.append(stamp["stage"])
    while start and start not in seen and (Path(start) / STAMP).exists():
        seen.add(start)
        stamp = _read(Path(start) / STAMP)
        if stamp.get("stage"):
            stages.append(stamp["stage"])
        start = stamp.get("start")
    scratch = stamp.get("stage") == "untuned"
    if start is None and source.is_adapter and not scratch:
        start = source.base
    hub = start if start and HUB_ID.fullmatch(start) and not Path(start).exists() else None
    names = {"untuned": "random weights", "train": "preference optimization", "sft": "supervised fine-tuning"}
    return tuple(names.get(stage, stage) for stage in reversed(stages)), hub, scratch


def _license_of(source: ModelSource, hub: str | None) -> str | None:
    """What the YAML header of the base model's own card says; nothing is downloaded."""
    from huggingface_hub import try_to_load_from_cache

    places = [Path(source.base) / "README.md"]
    cached = try_to_load_from_cache(hub, "README.md") if hub else None
    if isinstance(cached, str):
        places.append(Path(cached))
    for place in places:
        header = re.match(r"---\n(.*?)\n---\n", place.read_text(encoding="utf-8"), re.S) if place.is_file() else None
        try:
            content = yaml.safe_load(header[1]) if header else None
        except yaml.YAMLError:
            continue
        if isinstance(content, dict) and isinstance(content.get("license"), str):
            return content["license"]
    return None


def _read(file: Path) -> dict[str, Any]:
    """A mapping in JSON or YAML, {} where there is no such file."""
    if not file.is_file():
        return {}
    try:
        text = file.read_text(encoding="utf-8")
        content = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{file}: damaged, it holds no mapping; the model card is made from it: restore or remove it")
    return content
