"""Odd paths and values on the command line: done, or one message and status 2; what was there stays as it was."""

import random

import pytest
from command_line import contents, run, stop_before_workers
from report_folder import write_report_folder

SAMPLE = 40
COMMANDS = [
    "data prepare data.path=new data.source.kind=csv data.source.path={odd}",
    "data prepare data.path={odd} data.source.kind=csv data.source.path=there/log.csv",
    "data prepare data.path=new data.source.kind=preferences data.source.path={odd}",
    "data prepare data.path=new data.source.kind=movielens data.source.path={odd}",
    "data check {odd}",
    "train data.path={odd} output_dir=new",
    "train data.path=there/data model.path={odd} model.max_length=128 output_dir=new",
    "train data.path=there/data model.path=there/model model.max_length=128 train.negatives=3 output_dir={odd}",
    "sft data.path=there/data deepspeed={odd}.json output_dir=new",
    "sft -c {odd}",
    "evaluate data.path=there/data model.max_length=128 output_dir=new -m {odd}=there/model",
    "evaluate data.path=there/data output_dir=new -m a={odd}",
    "rank -m {odd} --requests there/users.csv --output new.parquet",
    "rank -m there/model --requests {odd} --output new.parquet model.max_length=128",
    "rank -m there/model --requests there/users.csv --output {odd} model.max_length=128",
    "rank -m there/model --requests there/users.csv --catalogue {odd} --output new.parquet model.max_length=128",
    "report {odd} --output new.html",
    "report there/report --output {odd}",
    "runs list {odd}",
    "runs plot {odd} --output new.png",
    "config validate {odd}",
    "runs compare there/report/sft {odd}",
    "experiment {odd}",
    "submit train --to slurm --render-only data.path=x submit.folder={odd}",
    "submit train --to slurm --render-only data.path=x output_dir={odd} submit.folder=new",
    "submit status {odd}",
    "plan model.path={odd}",
    "export {odd} new",
    "config show {odd}",
    "config show seed={odd}",
    "config show train.epochs={odd}",
    "config show tracking.mlflow.tracking_uri={odd}",
    "{odd}",
]
ODD = [
    "nowhere", "there/file/below", "x" * 300, "there/loop", "there/loop/below", "there", "there/empty", "there/file",
    "exp[lr=1e-3]", "[/x]", "[bold]", "caf\udce9", "a b", "", ".", "..", "-", "--", "---", "s3://x/y",
    "a/" * 2100 + "a",
    "10^20", "100000000000000000000", "inf", "nan", "1e999", "9" * 5000, "[" * 5000, "'\\0'", '"\\0"', '"\\ud83d"',
    "null",
    "there/folder[x]", "/dev/null", "/proc/self/nothing", "http://u:hunter2hunter2@h/x", "\n", "\u202e",
    "🎬", "!!python/x y",
]  # fmt: skip


@pytest.fixture
def workplace(world, tmp_path, monkeypatch):
    """A working folder with something of each kind in the folder ``there``."""
    there = tmp_path / "work" / "there"  # so that .. is of this test alone
    there.mkdir(parents=True)
    monkeypatch.chdir(there.parent)
    stop_before_workers(monkeypatch)
    (there / "data").symlink_to(world.folder / "data")
    (there / "model").symlink_to(world.folder / "model")
    (there / "loop").symlink_to("loop")
    (there / "empty").touch()
    (there / "file").write_text("a text\n")
    (there / "folder[x]").mkdir()
    (there / "log.csv").write_text("user,item,rating,timestamp,title\nu,i,5,1,T\n")
    (there / "users.csv").write_text(
        f"user,history,candidates\nu,{world.titles[0]},{world.titles[1]}|{world.titles[2]}\n"
    )
    write_report_folder(there / "report")
    before = contents(there)
    yield
    assert before.items() <= contents(there).items(), "what was there has changed"


def tried(cases: list[tuple[str, str]]) -> list[str]:
    """What went wrong, for each command with an odd value."""
    found = []
    for command, odd in cases:
        arguments = [word.format(odd=odd) for word in command.split(" ")]
        found.append(run(f"input: {' '.join(command.split(' ')[:2])}", arguments))
    return [failure for failure in found if failure]


ALL = [(command, odd) for command in COMMANDS for odd in ODD]


def test_an_odd_input_is_one_message(workplace):
    assert tried(random.Random(0).sample(ALL, SAMPLE)) == []


@pytest.mark.faults
@pytest.mark.parametrize("command", COMMANDS)
def test_every_odd_input_to_every_command_is_one_message(workplace, command):
    assert tried([(command, odd) for odd in ODD]) == []
