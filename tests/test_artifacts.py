"""Files of a run: literal ones of 0.1 load, what is read is written again as it was, a broken one names its field."""

import json
from pathlib import Path

import pytest

from dmpo_dist.artifacts.dataset import DatasetCard
from dmpo_dist.artifacts.environment import Environment
from dmpo_dist.artifacts.evaluation import Evaluation
from dmpo_dist.artifacts.explanations import Explanations
from dmpo_dist.artifacts.files import whole_folder, write_json, write_whole
from dmpo_dist.artifacts.log import StepRecord, ValidationRecord, by_step, read_log
from dmpo_dist.artifacts.stamp import ModelStamp
from dmpo_dist.errors import UserError

INTERVAL = {"value": 0.5, "low": 0.25, "high": 0.75}
TEMPLATE = {
    "preamble": "Liked:\n",
    "item": "{title}{end}\n",
    "request": "Next: ",
    "response": "{title}",
    "terminator": "{eos}",
}
FILES = {
    Evaluation: {
        "requests": 26, "negatives": {"fewest": 5, "most": 5}, "bootstrap": {"samples": 200, "seed": 0},
        "models": {"popularity": {"ndcg@10": INTERVAL}, "dmpo": {"ndcg@10": INTERVAL}},
        "seeds": {"dmpo": {"0": {"ndcg@10": 0.5}}},
        "strata": {"history": {"5-9": {"requests": 20, "models": {"dmpo": {"ndcg@10": INTERVAL}}}}},
        "comparisons": [{"a": "dmpo", "b": "popularity", "metric": "ndcg@10",
                         "difference": 0.0, "low": -0.1, "high": 0.1,
                         "p": 1.0, "seeds": []}],
        "data": {"path": "data", "fingerprint": "f0"}, "folders": {"dmpo@0": "dmpo/model"}, "notes": ["a note"],
        "baselines": {"sasrec": {"settings": {"epochs": 5}, "validation": {"5": 0.5}, "seconds": 1.5,
                                 "requests_with_unknown_history": 0, "unknown_positives": 2}},
        "order": {"requests": 5, "orders": 3, "models": {"dmpo": {"candidates": {
            "max_difference": 1e-6, "ndcg@10": {"lowest": 0.5, "highest": 0.5}}}}},
        "catalogue": {"items": 40, "models": {"dmpo": {"hr@10": INTERVAL}}, "coverage@10": {"dmpo": 0.7},
                      "gini@10": {"dmpo": 0.6}},
    },
    Explanations: {
        "model": "dmpo/model", "reference": "sft/model", "method": "margin",
        "requests": [{"user": "u7", "item": "i1", "title": "Heat", "rank": 2, "candidates": 6, "compared": 6,
                      "tokens": [{"text": "Heat", "log_ratio": 0.5}], "others_log_ratio": -0.25,
                      "history": [{"item": "i2", "title": "Alien", "contribution": 0.1, "rank_without": 3}],
                      "cut_off": [],
                      "counterfactual": {"removed": ["Alien"], "rank_before": 2, "rank_after": 3,
                                         "sentence": "It falls.",
                                         "top": 5}}],
        "faithfulness": {"value": "margin", "left_out": 0, "users": 6, "requests": 6, "random_orders": 5,
                         "bootstrap": {"samples": 200, "seed": 0},
                         "areas": {"attribution_vs_random": {"area": 0.1, "low": 0.0, "high": 0.2, "users_above": 5,
                                                             "users_below": 1, "sign_test_p": 0.2}},
                         "curves": {"share_removed": [0.0, 1.0], "attribution": [0.0, -1.0]}},
    },
    DatasetCard: {
        "format_version": 1, "name": "simulator", "seed": 0, "counts": {"train": 104, "validation": 28, "test": 26},
        "users": {"train": 104, "validation": 28, "test": 26},
        "cuts": {"validation": {"timestamp": 1, "utc": "1970-01-01T00:00:01Z"},
                 "test": {"timestamp": 2, "utc": "1970-01-01T00:00:02Z"}},
        "dropped": {"train": {"short_history": 3}, "validation": {}, "test": {}}, "notes": [], "items": True,
        "interactions": True, "fingerprint": "f0", "config": {"split": "time"},
        "leaks": [{"check": "duplicate titles", "verdict": "ok", "text": "None.", "figures": {"titles": 0},
                   "examples": []}],
    },
    Environment: {
        "dmpo_dist": "0.1.0", "git_commit": None, "python": "3.11.7", "platform": "Linux", "cpus": 2,
        "packages": {"torch": "2.13.0", "bitsandbytes": None}, "seed": 0, "run_id": "r0", "data_fingerprint": "f0",
    },
    ModelStamp: {
        "dmpo_dist": "0.1.0", "template": TEMPLATE, "stage": "train", "start": "sft/model", "stages": 2,
        "quantization": "none", "step": 20, "ndcg@10": 0.5, "hr@1": 0.25,
    },
}  # fmt: skip
LOG = """\
{"time": 1.0, "kind": "start", "stage": "train", "route": "two_part", "reference": "copy", "groups": 104, "steps": 20}
{"time": 2.0, "kind": "note", "text": "the first loss is as it must be"}
{"time": 3.0, "kind": "validation", "step": 0, "ndcg@10": 0.25, "hr@1": 0.125}
{"time": 4.0, "kind": "train", "step": 1, "total_steps": 20, "loss": 0.75, "margin": 0.0, "grad_norm": null}
{"time": 5.0, "kind": "train", "step": 2, "total_steps": 20, "loss": 0.5, "margin": 0.5, "grad_norm": NaN}
{"time": 6.0, "kind": "checkpoint", "step": 2}
{"time": 7.0, "kind": "train", "step": 2, "total_steps": 20, "loss": 0.25, "margin": 0.5, "grad_norm": 1.5}
{"time": 8.0, "kind": "validation", "step": 2, "ndcg@10": 0.5, "hr@1": 0.25}
{"time": 9.0, "kind": "end", "selected_step": 2, "model": "dmpo/model"}
{"time": 9.5, "kind": "tr"""


@pytest.mark.parametrize("kind", FILES, ids=lambda kind: kind.FILE)
def test_a_file_of_today_is_read_and_written_as_it_was(kind, tmp_path):
    """And keys of a later version are kept."""
    content = FILES[kind] | {"newer": {"unknown": [1]}}
    (tmp_path / kind.FILE).write_text(json.dumps(content))
    read = kind.read(tmp_path)
    (tmp_path / "again").mkdir()
    read.write(tmp_path / "again")
    assert json.loads((tmp_path / "again" / kind.FILE).read_text()) == content
    assert kind.read(tmp_path / "again" / kind.FILE) == read


@pytest.mark.parametrize(
    ("kind", "text", "problem"),
    [(Evaluation, '{"requests": 2', "damaged, not JSON"),
     (Evaluation, "[]", "the file: input should be a valid dictionary"),
     (Evaluation, json.dumps(FILES[Evaluation] | {"requests": "many"}), "requests: input should be a valid integer"),
     (Explanations, '{"model": "m"}', "requests: field required"),
     (DatasetCard, json.dumps({**FILES[DatasetCard], "cuts": {"test": {"utc": "x"}}}),
      "cuts.test.timestamp: field required"),
     (Environment, '{"packages": []}', "packages: input should be a valid dictionary"),
     (ModelStamp, '{"template": {"preambel": ""}}', "template.preambel: extra inputs are not permitted")],
)  # fmt: skip
def test_a_broken_file_is_one_line_with_file_and_field(kind, text, problem, tmp_path):
    (tmp_path / kind.FILE).write_text(text)
    with pytest.raises(UserError) as told:
        kind.read(tmp_path)
    assert f"{tmp_path / kind.FILE}: " in str(told.value)
    assert problem in str(told.value)
    assert "\n" not in str(told.value)


def test_a_log_of_today_has_steps_of_its_stage(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text(LOG)
    log = read_log(file)
    assert [record.kind for record in log.records] == [
        "start", "note", "validation", "step", "step", "checkpoint", "step", "validation", "end",
    ]  # fmt: skip
    assert (log.lines, list(log.damaged)) == (10, [10])
    assert {record.stage for record in log.records if isinstance(record, StepRecord)} == {"preference"}
    steps = by_step(log.records, StepRecord)
    assert steps["loss"].to_dict() == {1: 0.75, 2: 0.25}  # of a step logged again the last
    assert steps["grad_norm"].isna().tolist() == [True, False]
    assert by_step(log.records, ValidationRecord)["ndcg@10"].to_dict() == {0: 0.25, 2: 0.5}
    file.write_text('{"kind": "validation", "step": 1}\n{"kind": "step", "step": "one"}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl: line 2: step.step: input should be a valid integer"):
        read_log(file)


def test_a_file_or_folder_is_there_whole_or_not_at_all(tmp_path):
    file, folder = tmp_path / "file.json", tmp_path / "folder"
    write_json(file, {"title": "Amélie"})
    with pytest.raises(TypeError):
        write_json(file, {"title": object()})
    assert json.loads(file.read_text()) == {"title": "Amélie"}

    def fill(replace: bool, text: str, fail: bool = False) -> None:
        with whole_folder(folder, replace) as part:
            write_whole(part / "a", text)
            assert not fail, "stopped"

    fill(False, "first")
    with pytest.raises(UserError, match="folder: cannot be written"):
        fill(False, "second")
    with pytest.raises(AssertionError):
        fill(True, "third", fail=True)
    assert (folder / "a").read_text() == "first"
    fill(True, "fourth")
    assert (folder / "a").read_text() == "fourth"
    assert sorted(path.name for path in Path(tmp_path).iterdir()) == ["file.json", "folder"]
