"""Which weights become the result: no sequence of validations and kills gives one that is below the start."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from dmpo_dist.artifacts.stamp import ModelStamp
from dmpo_dist.config import RunConfig
from dmpo_dist.training import selection
from dmpo_dist.training.job import Job
from dmpo_dist.training.selection import Selection

STEPS = 4


class Killed(Exception):
    pass


def train(folder: Path, values: list[float], checkpoint_at: int, kill_at: int | None) -> list[dict]:
    """A run that validates to ``values`` and is killed before its ``kill_at``-th write or rename, then resumed."""
    records: list[dict] = []
    with pytest.MonkeyPatch.context() as patch:
        clock = itertools.count()

        def write(*_):
            if next(clock) == kill_at:
                raise Killed

        step_now = [0]

        def save_model(engine, tokenizer, target, job, stamp):
            part = target.with_name("part")
            part.mkdir(exist_ok=True)
            (part / "dmpo.json").write_text(json.dumps(stamp))
            (part / "weights").write_text(str(step_now[0]))
            replace(part, target)

        def replace(new, target):
            old = target.with_name(target.name + ".old")
            for rename in [(target, old)] * target.exists() + [(new, target)]:
                write()
                rename[0].rename(rename[1])
            for left in [*old.glob("*"), old] if old.exists() else []:
                left.rmdir() if left.is_dir() else left.unlink()

        patch.setattr(selection, "rank_with_all", lambda *_: {"ndcg@10": values[step_now[0]]})
        patch.setattr(selection, "save_model", save_model)
        patch.setattr(selection, "replace_folder", replace)
        patch.setattr(selection, "from_rank_zero", lambda value: value)
        patch.setattr(selection.dist, "barrier", lambda: None)
        checkpoint: dict = {}
        for _ in range(2):
            job = Job("preference", RunConfig(), "start", folder)
            runtime = SimpleNamespace(rank=0, world_size=1, log=records.append)
            batches = SimpleNamespace(token_budget=1, shared=True)
            one = Selection(job, runtime, None, None, batches, [], None)
            try:
                first = checkpoint.get("step", 0)
                if first:
                    one.resume(first, dict(checkpoint["best"]))
                for step in range(first + 1 if first else 0, STEPS + 1):
                    step_now[0] = step
                    one.validate(step)
                    if step == checkpoint_at:
                        checkpoint = {"step": step, "best": dict(one.best)}
                write()
                one.finish(STEPS)
                break
            except Killed:
                continue
    return records


@pytest.mark.parametrize("values", [
    [0.7, 0.6, 0.65, 0.6, 0.5], [0.7, 0.7, 0.7, 0.6, 0.7], [0.5, 0.6, 0.55, 0.7, 0.6], [0.5, 0.6, 0.4, 0.4, 0.4],
    [0.6, 0.5, 0.7, 0.7, 0.65],
])  # fmt: skip
def test_the_first_best_is_the_result_and_the_start_counts(tmp_path, values):
    best = values.index(max(values))
    for number, (checkpoint, kill) in enumerate(itertools.product([2, 9], [None, *range(8)])):
        folder = tmp_path / str(number)
        folder.mkdir()
        end = train(folder, values, checkpoint, kill)[-1]
        assert (end["kind"], end["selected_step"]) == ("end", best), (checkpoint, kill)
        assert (folder / "model/weights").read_text() == str(best), (checkpoint, kill)
        assert ModelStamp.read(folder / "model").step == best
        assert (end["start"], end["best_later"]) == (values[0], max(values[1:])), (checkpoint, kill)
