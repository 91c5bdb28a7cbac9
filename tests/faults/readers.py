"""What may be read: for each class of file a whole one, how it is damaged, and what reads it and uses what was read."""

import json
import random
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from conftest import word_tokenizer
from mutations import ODD_TEXTS, ODD_VALUES, copy_of, damaged_bytes, damaged_json, damaged_lines, replace_file
from report_folder import explanations, write_report_folder

from dmpo_dist.artifacts.environment import Environment
from dmpo_dist.artifacts.evaluation import Evaluation
from dmpo_dist.artifacts.explanations import Explanations
from dmpo_dist.artifacts.stamp import ModelStamp
from dmpo_dist.config import RunConfig, TemplateConfig, dump_config, load_config
from dmpo_dist.config.data import Source
from dmpo_dist.config.load import config_of
from dmpo_dist.data.requests import read_catalogue, read_requests
from dmpo_dist.data.sources.download import Download, download
from dmpo_dist.data.sources.preferences import load_preferences
from dmpo_dist.data.sources.read import load_interactions
from dmpo_dist.data.store import PreparedData
from dmpo_dist.data.template import make_template
from dmpo_dist.experiment.grid import expand, read_grid
from dmpo_dist.modeling.backbone import find_model, read_model_config
from dmpo_dist.records.read import read_run
from dmpo_dist.submit.job import find_record

Damage = Callable[[random.Random, bytes], bytes]


@dataclass(frozen=True)
class Reader:
    """A class of files.

    Attributes:
        file: the damaged one.
        whole: its content before.
        damage: how it is damaged.
        use: reads it, and what depends on it.
    """

    file: Path
    whole: bytes
    damage: Damage
    use: Callable[[], object]

    def attempt(self, rng: random.Random) -> Callable[[], object]:
        """Damage the file, and return what reads it."""
        replace_file(self.file, self.damage(rng, self.whole))
        return self.use


def make_readers(folder: Path, world: Any) -> dict[str, Reader]:
    """All classes; their files lie in ``folder``."""
    data = copy_of(world.folder / "data", folder / "data")
    model = copy_of(world.folder / "model", folder / "model")
    report = write_report_folder(folder / "report")
    evaluation, run = report / "evaluation", report / "dmpo"
    (folder / "submitted").mkdir()
    record = json.dumps({"target": "slurm", "id": "7", "where": ""}).encode()
    stamp = json.dumps({"template": TemplateConfig().model_dump(), "stage": "sft", "step": 3, "ndcg@10": 0.5}).encode()

    def reader(file: Path, damage: Damage, use: Callable[[Path], object], whole: bytes | None = None) -> Reader:
        return Reader(file, file.read_bytes() if whole is None else whole, damage, lambda: use(file))

    return {
        "config.yaml": reader(folder / "c.yaml", _yaml, lambda f: dump_config(load_config([f])), _config_text()),
        "grid": reader(folder / "g.yaml", _yaml, lambda f: expand(read_grid(f)), _grid_text()),
        "rows (jsonl)": reader(folder / "r.jsonl", damaged_lines, _preferences, _rows_text(lines=True)),
        "rows (json)": reader(folder / "r.json", damaged_json, _preferences, _rows_text(lines=False)),
        "rows (csv)": reader(folder / "r.csv", damaged_bytes, _interactions, _csv_text()),
        "log (parquet)": reader(_parquet(folder / "r.parquet"), damaged_bytes, _interactions),
        "requests (parquet)": reader(_requests(folder / "q.parquet"), damaged_bytes, read_requests),
        "requests (csv)": reader(folder / "q.csv", damaged_bytes, read_requests, b"user,history\nu,a|b\nv,c\n"),
        "catalogue (csv)": reader(folder / "t.csv", damaged_bytes, read_catalogue, b"title,popularity\na,1\nb,2\n"),
        "dataset.json": reader(data / "dataset.json", damaged_json, lambda f: PreparedData.load(f.parent)),
        "evaluation.json": reader(evaluation / Evaluation.FILE, damaged_json, _evaluation),
        "explanations.json": reader(folder / Explanations.FILE, damaged_json, Explanations.read,
                                    json.dumps(explanations()).encode()),
        "dmpo.json": reader(model / ModelStamp.FILE, damaged_json, lambda f: find_model(str(f.parent)), stamp),
        "config.json": reader(model / "config.json", damaged_json, lambda f: read_model_config(str(f.parent), 8)),
        "environment.json": reader(run / Environment.FILE, damaged_json, lambda f: Environment.read(f.parent)),
        "metrics.jsonl": reader(run / "metrics.jsonl", damaged_lines, lambda f: _run(f.parent)),
        "submitted.json": reader(folder / "submitted/submitted.json", damaged_json, lambda f: find_record(f.parent),
                                 record),
        "zip": reader(_zip(folder / "z.zip"), damaged_bytes, _unpack),
        "template": reader(folder / "template.json", damaged_json, _template,
                           json.dumps(TemplateConfig().model_dump()).encode()),
        "override": reader(folder / "override", _override, lambda f: load_config([], [f.read_text("utf-8", "replace")]),
                           b"train.steps=1"),
    }  # fmt: skip


def _yaml(rng: random.Random, content: bytes) -> bytes:
    """YAML whose text or values are damaged."""
    if rng.random() < 0.5:
        return damaged_bytes(rng, content)
    return damaged_json(rng, json.dumps(yaml.safe_load(content), default=str).encode())


def _override(rng: random.Random, content: bytes) -> bytes:
    keys = [*RunConfig().model_dump(), "train.steps", "train.epochs", "seed", "output_dir", "model.path", "x", ""]
    value = rng.choice(ODD_VALUES)
    text = rng.choice(ODD_TEXTS) if rng.random() < 0.5 else ("9" * 5000 if value == 10**4000 else ascii(value)).encode()
    return rng.choice(keys).encode() + rng.choice((b"=", b"", b"==", b".x=")) + text


def _config_text() -> bytes:
    return yaml.safe_dump(
        config_of({"train.steps": 5, "model.lora": {}, "tracking.tags": ["a"]}).model_dump(mode="json")
    ).encode()


def _grid_text() -> bytes:
    return yaml.safe_dump({
        "output_dir": "runs/x", "config": ["quickstart"], "datasets": {"a": {"path": "runs/a"}},
        "settings": {"train.steps": 3}, "grid": {"k": [1, 3], "seed": [0, 1], "objective": ["dmpo", "sdpo"]},
    }).encode()  # fmt: skip


def _rows_text(lines: bool) -> bytes:
    rows = [{"prompt": f"p{n}", "chosen": f"a{n}", "rejected": [f"b{n}", f"c{n}"]} for n in range(8)]
    return "".join(json.dumps(row) + "\n" for row in rows).encode() if lines else json.dumps(rows).encode()


def _events() -> pd.DataFrame:
    rows = [(f"u{u}", f"i{(u + n) % 9}", "5", 100 * n + u, f"Title {(u + n) % 9}") for u in range(6) for n in range(6)]
    return pd.DataFrame(rows, columns=["user", "item", "rating", "timestamp", "title"])


def _csv_text() -> bytes:
    return _events().to_csv(index=False).encode()


def _parquet(file: Path) -> Path:
    _events().to_parquet(file, index=False)
    return file


def _requests(file: Path) -> Path:
    pd.DataFrame({"user": ["a", "b"], "history": [["x", "y"], ["z"]]}).to_parquet(file, index=False)
    return file


def _zip(file: Path) -> Path:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("ratings.dat", "movies.dat"):
            archive.writestr(f"ml/{name}", bytes(np.random.default_rng(0).integers(0, 255, 300, np.uint8)))
    return file


def _preferences(file: Path) -> object:
    return load_preferences(file, 0)


def _interactions(file: Path) -> object:
    return load_interactions(Source(kind="parquet" if file.suffix == ".parquet" else "csv", path=file), 0)


def _evaluation(file: Path) -> object:
    found = Evaluation.read(file)
    return found.most_negatives, found.content()


def _run(folder: Path) -> object:
    run = read_run(folder)
    return run.result(), run.stage, run.steps, run.began


def _unpack(file: Path) -> object:
    return download(Download({file.name: "x"}, "", False, True), file.parent, True, lambda line: None)


def _template(file: Path) -> object:
    from dmpo_dist.parsing import parse_json

    try:
        content = parse_json(file.read_text("utf-8", "replace"))
    except ValueError:
        return None
    template = config_of({"template": content}).template
    made = make_template(template, word_tokenizer())
    return made.render(("w1", "w2"), ("w3",)), made.render_response("w1"), made.tail
