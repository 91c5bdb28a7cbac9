"""Commands that write, what each leaves, and what they read: for tests that kill them or fill the disk."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import yaml
from forks import Forks, Order, Running
from report_folder import write_report_folder

Result = Callable[[Path], object]


@dataclass(frozen=True)
class Command:
    """A command that writes.

    Attributes:
        words: its command line; {out} is where it writes.
        result: what it leaves, from {out}, without what differs between two undisturbed runs.
        resume: whether it is started again with --resume.
        ranks: processes that torchrun would start; 0 for a command that starts what it needs.
        changes, times: kills at changes of its output, and at times.
    """

    words: str
    result: Result
    resume: bool = False
    ranks: int = 0
    changes: int = 4
    times: int = 3


def _digests(*patterns: str) -> Result:
    def read(out: Path) -> dict[str, str]:
        files = sorted(path for pattern in patterns for path in out.glob(pattern) if path.is_file())
        assert files, f"{out} holds nothing of {patterns}"
        return {path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    return read


def _run(*patterns: str) -> Result:
    """Digests of the files of a training run, the losses of all its steps, and what lies in its folder."""

    def read(out: Path) -> object:
        records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        steps = {(r["step"], r["loss"]) for r in records if r["kind"] == "step"}
        validations = {(r["step"], r["ndcg@10"]) for r in records if r["kind"] == "validation"}
        checkpoints = sorted(path.name for path in (out / "checkpoints").glob("step-*"))
        entries = sorted(path.name for path in out.iterdir() if path.name != "failed.txt")
        return _digests("model/*", *patterns)(out), steps, validations, checkpoints, entries

    return read


def _evaluation(out: Path) -> object:
    content = json.loads((out / "evaluation.json").read_text())
    assert not (out / "scores.parts").exists()
    return content["models"], content["comparisons"], (out / "scores.parquet").read_bytes()


def _experiment(out: Path) -> object:
    table = pd.read_parquet(out / "experiment.parquet")
    figures = table[["model", "metric", "value", "low", "high"]].astype(str).values.tolist()
    curves = pd.read_parquet(out / "curves.parquet")
    losses = curves[curves["metric"] == "loss"][["part", "series", "step", "value"]].astype(str).values.tolist()
    return figures, losses, _digests("**/model/*.safetensors")(out)


def _file(suffix: str) -> Result:
    return lambda out: out.with_suffix(suffix).read_bytes()


TRAIN = (
    " data.path=data model.path=model model.max_length=128 deepspeed=zero0 output_dir={out} {stage}.steps=8 "
    "{stage}.checkpoint_every=2 {stage}.global_batch_size=8 {stage}.validate_every=3 {stage}.learning_rate=5e-3 "
    "{stage}.log_every=1"
)
PREFERENCE = "train train.negatives=3 train.self_check=false train.select=last" + TRAIN.replace("{stage}", "train")
COMMANDS = {
    "data prepare": Command(
        "data prepare data.path={out} data.source.kind=csv data.source.path=log.csv data.negatives_per_group=4 "
        "data.evaluation_negatives=4", _digests("*.parquet", "*/*.arrow")),
    "report": Command("report report/sft --output {out}.html", _file(".html"), changes=2, times=2),
    "sft": Command("sft" + TRAIN.replace("{stage}", "sft"), _run(), resume=True, ranks=1),
    "train": Command(PREFERENCE, _run(), resume=True, ranks=1, changes=6),
    "train a LoRA": Command(PREFERENCE + " model.lora.r=4", _run(), resume=True, ranks=1),
    "train, cached reference": Command(
        PREFERENCE + " reference.cache=disk", _run("reference/*/*"), resume=True, ranks=1, changes=6),
    "train, two ranks": Command(PREFERENCE.replace("zero0", "zero2"), _run(), resume=True, ranks=2, changes=2),
    "evaluate": Command(
        "evaluate -m a=model data.path=data model.max_length=128 ranking.users_per_part=1 evaluation.order_requests=0 "
        "evaluation.bootstrap_samples=100 output_dir={out}", _evaluation, resume=True),
    "explain": Command(
        "explain -m model data.path=data model.max_length=128 --users 4 --faithfulness --faithfulness-users 4 "
        "--output {out}", _digests("*.json"), changes=3, times=2),
    "export": Command(
        "export trained/model {out} --dtype float32", _digests("*.safetensors", "*.json"), changes=4, times=2),
    "experiment": Command("experiment grid.yaml output_dir={out}", _experiment, ranks=1, changes=3, times=2),
}  # fmt: skip
WITH_RAY = {
    "rank": Command(
        "rank -m model --requests users.csv --catalogue data model.max_length=128 ranking.users_per_part=1 "
        "cluster.workers=2 --output {out}.parquet", _file(".parquet")),
    "train with Ray": Command(
        PREFERENCE.replace("steps=8", "steps=60") + " cluster.workers=2", _run(), resume=True),
    "quickstart": Command(
        "quickstart output_dir={out} cluster.workers=1 data.source.simulator.users=150 data.source.simulator.items=40 "
        "data.source.simulator.events_per_user=12 data.evaluation_negatives=5 data.negatives_per_group=4 "
        "model.max_length=128 model.scratch.hidden_size=32 model.scratch.layers=2 sft.steps=20 sft.validate_every=20 "
        "sft.global_batch_size=8 sft.checkpoint_every=10 train.negatives=3 train.steps=20 train.global_batch_size=8 "
        "train.validate_every=10 train.checkpoint_every=5",
        lambda out: (_evaluation(out), _digests("*/model/*.safetensors")(out)), resume=True),
}  # fmt: skip


class Shop:
    """A folder with what the commands read, and the process that runs them."""

    def __init__(self, world, folder: Path) -> None:
        self.folder, self.forks = folder, Forks(folder / "forks.log")
        (folder / "logs").mkdir()
        for name in ("data", "model"):
            (folder / name).symlink_to(world.folder / name)
        write_report_folder(folder / "report")
        events = [(f"u{u}", f"i{(u + 3 * n) % 20}", 5, 100 * n + u) for u in range(20) for n in range(8)]
        rows = [",".join(map(str, [*event, f"Title {event[1]}"])) for event in events]
        (folder / "log.csv").write_text("\n".join(["user,item,rating,timestamp,title", *rows]) + "\n")
        users = [f"u{n},{'|'.join(world.titles[n : n + 3])}" for n in range(12)]
        (folder / "users.csv").write_text("\n".join(["user,history", *users]) + "\n")
        (folder / "grid.yaml").write_text(yaml.safe_dump(GRID))
        self.run(COMMANDS["sft"], "trained")

    def start(self, command: Command, out: str, *more: str, kill_at: int = 0) -> Running:
        words = [word.replace("{out}", out) for word in command.words.split(" ")]
        watched = str(self.folder / out)
        return self.forks.start(
            Order([*words, *more], str(self.folder), str(self.log(out)), command.ranks, watched, kill_at)
        )

    def run(self, command: Command, out: str, *more: str) -> list[int]:
        return self.start(command, out, *more).wait()

    def close(self) -> None:
        self.forks.close()

    def log(self, out: str) -> Path:
        return self.folder / "logs" / f"{Path(out).name}.log"

    def changes(self, out: str) -> int:
        """How many changes an undisturbed command made."""
        return int(self.log(out).with_suffix(".changes").read_text())

    def finish(self, command: Command, out: str) -> str:
        """Start the command again, by --resume if it knows it; returns what is wrong with how it ended, or ""."""
        log = self.log(out)
        if command.resume:
            log.write_text("")
            if not any(self.run(command, out, "--resume")):
                return ""
            told = log.read_text()
            if "is finished" in told:
                return ""
            if "start it without --resume" not in told:
                return told[-2000:]
        log.write_text("")
        told = "" if not any(self.run(command, out)) else log.read_text()
        return "" if "exists already" in told or "holds explanations.json already" in told else told[-2000:]


GRID = {
    "output_dir": "unused", "datasets": {"tiny": {"path": "data"}}, "arms": ["sft"],
    "settings": {
        "model": {"max_length": 128, "scratch": {"hidden_size": 32, "layers": 1}},
        "sft": {"steps": 4, "global_batch_size": 8, "validate_every": 2, "checkpoint_every": 2},
        "train": {"steps": 4, "global_batch_size": 8, "validate_every": 2, "checkpoint_every": 2},
        "objective": {"sft_weight": 0, "sft_loss_on": "response"}, "evaluation": {"bootstrap_samples": 100},
    },
    "grid": {"k": [1, 3], "objective": ["dmpo"]},
}  # fmt: skip
