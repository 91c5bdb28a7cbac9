"""Which model of an experiment is blamed for a failure, and what goes on; the stages themselves are stand-ins."""

import io
import json
import shutil
from dataclasses import replace
from itertools import repeat

import pytest
from rich.console import Console

from dmpo_dist.artifacts.environment import Environment
from dmpo_dist.config import dump_config
from dmpo_dist.errors import UserError
from dmpo_dist.experiment import train
from dmpo_dist.experiment.grid import expand
from dmpo_dist.experiment.parts import make_parts
from dmpo_dist.experiment.schema import GridConfig
from dmpo_dist.experiment.stamps import begin, failure, require_unchanged, stamp_failed, trained


class Stages:
    """Stands in for ``run_stage`` and ``run_stages``: opens all folders first, as they do, then trains each."""

    def __init__(self, diverge: str = "", refused: str = "", lost: int = 0) -> None:
        self.diverge, self.refused, self.lost, self.calls = diverge, refused, lost, []

    def several(self, stages, console) -> None:
        configs = [config for _, _, config in stages]
        self.calls.append([config.output_dir.parent.name for config in configs])
        for config in configs:
            if self.refused and self.refused in str(config.output_dir):
                raise UserError("too few negatives")
            config.output_dir.mkdir(parents=True)  # must not be there
            (config.output_dir / "config.yaml").write_text(dump_config(config))
        (configs[0].output_dir / "metrics.jsonl").touch()  # opened before there are workers
        if self.lost:
            self.lost -= 1
            raise UserError("the cluster has 0 CPUs")
        for config in configs:
            (config.output_dir / "metrics.jsonl").write_text(json.dumps({"kind": "start"}) + "\n")
            if self.diverge and self.diverge in str(config.output_dir):
                raise UserError("the loss became nan")
            (config.output_dir / "model").mkdir()

    def one(self, kind, config, console, resume) -> None:
        if resume:
            self.calls.append(f"resumed {config.output_dir.parent.name}")
            (config.output_dir / "model").mkdir()
        else:
            self.several([("", kind, config)], console)


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Trains the grid by stand-ins of the stages; returns its parts by name and the calls."""
    blocks = {"k": [1, 3, 7], "seed": [0, 1], "dataset": "a"}
    grid = GridConfig.model_validate({"output_dir": tmp_path, "datasets": {"a": "x"}, "grid": blocks})
    parts = make_parts(grid, expand(grid), {})

    def run(stages: Stages, alone: bool = False):
        monkeypatch.setattr(train, "run_stage", stages.one)
        monkeypatch.setattr(train, "run_stages", stages.several)
        missing = [part for part in parts if not trained(part)]
        train.train_parts(missing, alone, lambda part: part.name, Console(file=io.StringIO()))
        return {part.title: part for part in parts}, stages.calls

    return run


K1, K3, K7 = (f"cells/a_shots-all_k-{k}_dmpo_seed-0" for k in (1, 3, 7))


@pytest.mark.parametrize("alone", [True, False], ids=["one process", "Ray"])
def test_the_one_that_diverges_is_blamed_and_the_others_go_on(study, alone):
    parts, calls = study(Stages(diverge="k-3_dmpo_seed-0"), alone)
    assert [name for name, part in parts.items() if not trained(part)] == [K3]
    assert {name: failure(part) for name, part in parts.items() if failure(part)} == {K3: "the loss became nan"}
    assert len(calls) == (8 if alone else 2)
    parts, calls = study(Stages(), alone)  # run again: it is tried again, from where it was
    assert trained(parts[K3])
    assert not failure(parts[K3])
    assert calls == [f"resumed {K3[6:]}"]


def test_the_one_that_is_refused_before_it_starts_is_found(study):
    parts, calls = study(Stages(refused="k-3_dmpo_seed-0"))
    assert {name: failure(part) for name, part in parts.items() if failure(part)} == {K3: "too few negatives"}
    assert [name for name, part in parts.items() if not trained(part)] == [K3]
    assert len(calls) == 1 + 8


def test_none_is_blamed_where_no_worker_started(study):
    parts, calls = study(Stages(lost=1))
    assert not any(map(failure, parts.values()))
    assert all(map(trained, parts.values()))
    assert not any(map(str.startswith, map(str, calls), repeat("resumed")))


@pytest.mark.parametrize("alone", [True, False], ids=["one process", "Ray"])
def test_cells_of_a_start_that_failed_say_so(study, alone):
    parts, _ = study(Stages(diverge="sft/a_shots-all_seed-0/"), alone)
    failed = {name: failure(part) for name, part in parts.items() if failure(part)}
    assert failed.pop("sft/a_shots-all_seed-0") == "the loss became nan"
    assert failed == dict.fromkeys([K1, K3, K7], "its SFT start a_shots-all_seed-0 failed")
    assert all(trained(part) for name, part in parts.items() if "seed-1" in name)


def test_a_run_whose_checkpoints_are_gone_starts_anew(study):
    parts, _ = study(Stages(diverge="k-3_dmpo_seed-0"))
    run = parts[K3].run
    Environment(run_id="abc").write(run)
    with (run / "metrics.jsonl").open("a") as log:
        log.write(json.dumps({"kind": "checkpoint", "step": 20}) + "\n")
    for names, goes_on in (((), False), (("train-other-step-00000020",), False), (("train-abc-step-00000020",), True)):
        shutil.rmtree(run.parents[2] / "checkpoints", ignore_errors=True)
        for name in names:
            (run.parents[2] / "checkpoints" / name).mkdir(parents=True)
        console = Console(file=io.StringIO(), width=400)
        before = shutil.copytree(run, run.with_name("before"), dirs_exist_ok=True)
        part = replace(parts[K3], config=train.placed(parts[K3].config, run.parents[2], alone=False))
        saved = run / "config.yaml"
        saved.write_text(dump_config(part.config))
        assert train._resumable(part, console) == goes_on == run.exists()
        assert ("checkpoint of step 20, and none of it is left" in console.file.getvalue()) != goes_on
        shutil.copytree(before, run, dirs_exist_ok=True)


def test_an_edited_deepspeed_file_is_another_setting(tmp_path):
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    grid = {"output_dir": tmp_path / "out", "datasets": {"a": "x"}, "grid": {"dataset": ["a"]}}
    plain = GridConfig.model_validate(grid)
    assert not any("json" in key for part in make_parts(plain, expand(plain), {}) for key in part.settings)
    grid = GridConfig.model_validate(grid | {"settings": {"deepspeed": str(file)}})
    start, _ = make_parts(grid, expand(grid), {})
    begin(start)
    Stages().one("sft", start.config, None, resume=False)
    require_unchanged([start])
    file.write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    edited = make_parts(grid, expand(grid), {})
    with pytest.raises(UserError, match=r"deepspeed_json.zero_optimization.stage was 1, is 2"):
        require_unchanged(edited)
    stamp_failed(start, "the loss became nan")
    shutil.rmtree(start.model)
    assert not train._resumable(edited[0], Console())  # an edited optimizer would go on with the old one's moments
    file.unlink()
    with pytest.raises(UserError, match=r"mine.json: cannot be read .*bring the file back"):
        make_parts(grid, expand(grid), {})
