"""Commands killed at seeded moments, and started again: the result is that of an undisturbed run, to the last bit."""

import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import tally

pytestmark = pytest.mark.faults

KILLS = 3
"""Of each command."""
EARLIEST = 0.4
"""Share of the undisturbed time before which nothing but imports happens."""


@dataclass(frozen=True)
class Command:
    """A command to kill.

    Attributes:
        words: its command line; {out} is where it writes.
        result: what it leaves, from {out}, without what differs between two undisturbed runs.
        resume: whether it is started again with --resume.
        alone: whether it is a rank of its own, without Ray.
    """

    words: str
    result: Callable[[Path], object]
    resume: bool = False
    alone: bool = False


def _digests(*patterns: str) -> Callable[[Path], object]:
    def read(out: Path) -> object:
        files = sorted(path for pattern in patterns for path in out.glob(pattern))
        assert files, f"{out} holds nothing of {patterns}"
        return {path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    return read


def _evaluation(out: Path) -> object:
    content = json.loads((out / "evaluation.json").read_text())
    assert not (out / "scores.parts").exists()
    return content["models"], content["comparisons"]


TRAIN = (
    "data.path=data model.path=model model.max_length=128 {stage}.steps=8 {stage}.checkpoint_every=2 deepspeed=zero0 "
    "{stage}.global_batch_size=8 {stage}.validate_every=3 output_dir={out}"
)
COMMANDS = {
    "data prepare": Command("data prepare data.path={out} data.source.kind=csv data.source.path=log.csv "
                            "data.negatives_per_group=4 data.evaluation_negatives=4",
                            _digests("*.parquet", "*/*.arrow")),
    "report": Command("report report --output {out}.html", lambda out: out.with_suffix(".html").read_bytes()),
    "sft": Command("sft " + TRAIN.replace("{stage}", "sft"), _digests("model/*.safetensors"), resume=True, alone=True),
    "train": Command("train train.negatives=3 " + TRAIN.replace("{stage}", "train"), _digests("model/*.safetensors"),
                     resume=True, alone=True),
    "evaluate": Command("evaluate -m a=model data.path=data model.max_length=128 ranking.users_per_part=1 "
                        "evaluation.order_requests=0 evaluation.bootstrap_samples=100 output_dir={out}",
                        _evaluation, resume=True),
    "rank": Command("rank -m model --requests users.csv --catalogue data model.max_length=128 ranking.users_per_part=1 "
                    "--output {out}.parquet", lambda out: out.with_suffix(".parquet").read_bytes()),
}  # fmt: skip


@pytest.fixture(scope="module")
def shop(world, tmp_path_factory) -> Path:
    from report_folder import write_report_folder

    folder = tmp_path_factory.mktemp("kills")
    for name in ("data", "model"):
        (folder / name).symlink_to(world.folder / name)
    write_report_folder(folder / "report")
    events = [(f"u{u}", f"i{(u + 3 * n) % 20}", 5, 100 * n + u) for u in range(20) for n in range(8)]
    rows = [",".join(map(str, [*event, f"Title {event[1]}"])) for event in events]
    (folder / "log.csv").write_text("\n".join(["user,item,rating,timestamp,title", *rows]) + "\n")
    users = [f"u{n},{'|'.join(world.titles[n : n + 3])}" for n in range(12)]
    (folder / "users.csv").write_text("\n".join(["user,history", *users]) + "\n")
    return folder


def start(shop: Path, command: Command, out: str, *more: str) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if command.alone:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        environment |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        environment |= {"MASTER_PORT": port}
    words = [sys.executable, "-m", "dmpo_dist", *command.words.format(out=out).split(), *more]
    with (shop / f"{out}.log").open("a") as log:
        return subprocess.Popen(words, cwd=shop, env=environment, stdout=log, stderr=log, start_new_session=True)


def finish(shop: Path, command: Command, out: str) -> None:
    """Start the command again, by --resume if it knows it and had begun, and wait for its end."""
    log = shop / f"{out}.log"
    if command.resume:
        log.write_text("")
        if start(shop, command, out, "--resume").wait(timeout=600) == 0:
            return
        told = log.read_text()
        assert "start it without --resume" in told or "is finished" in told, told[-3000:]
        if "is finished" in told:
            return
    status = start(shop, command, out).wait(timeout=600)
    told = log.read_text()
    assert status == 0 or "exists already" in told, told[-3000:]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_killed_command_ends_as_if_nothing_had_happened(shop, name):
    command, tag = COMMANDS[name], name.replace(" ", "-")
    began = time.monotonic()
    whole = start(shop, command, f"{tag}-whole")
    assert whole.wait(timeout=600) == 0, (shop / f"{tag}-whole.log").read_text()[-3000:]
    seconds = time.monotonic() - began
    expected = command.result(shop / f"{tag}-whole")
    for seed in range(KILLS):
        out = f"{tag}-{seed}"
        process = start(shop, command, out)
        time.sleep(seconds * random.Random(f"{name} {seed}").uniform(EARLIEST, 1.0))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        finish(shop, command, out)
        survived = command.result(shop / out) == expected
        tally.count(f"killed: {name}", survived)
        assert survived, f"{name}, kill {seed}"
