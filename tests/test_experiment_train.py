"""Which model of an experiment is blamed for a failure, and what goes on; the stages themselves are stand-ins."""

import io
import json
from itertools import repeat

import pytest
from rich.console import Console

from dmpo_dist.config import dump_config
from dmpo_dist.errors import UserError
from dmpo_dist.experiment import train
from dmpo_dist.experiment.grid import expand
from dmpo_dist.experiment.parts import make_parts
from dmpo_dist.experiment.schema import GridConfig
from dmpo_dist.experiment.stamps import failure, trained


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
