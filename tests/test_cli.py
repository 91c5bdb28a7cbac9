"""The command line as a whole: every command explains itself, its examples can be read, and faults are one line."""

import errno
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from dmpo_dist.cli import app, main
from dmpo_dist.cli.options import asked_to_overwrite
from dmpo_dist.config import load_config
from dmpo_dist.config.load import find_recipe
from dmpo_dist.errors import UserError
from dmpo_dist.tables import Cell, Table, terminal


def commands(command, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], object]]:
    for name, child in getattr(command, "commands", {}).items():
        if hasattr(child, "commands"):
            yield from commands(child, (*path, name))
        else:
            yield (*path, name), child


COMMANDS = {" ".join(path): command for path, command in commands(typer.main.get_command(app))}
EXAMPLES = [
    (name, " ".join(paragraph.replace("\\\n", " ").split()))
    for name, command in COMMANDS.items()
    for paragraph in command.help.partition("Examples:")[2].split("\n\n")
    if paragraph.split()[:1] == ["dmpo"]
]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name):
    shown = CliRunner().invoke(app, [*name.split(), "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
    assert shown.exit_code == 0, shown.output
    assert f"dmpo {name} " in shown.output
    about = COMMANDS[name].help.replace("`", "").split()
    assert " ".join(about[:6]) in " ".join(shown.output.split())


@pytest.mark.parametrize(("name", "example"), EXAMPLES, ids=[example for _, example in EXAMPLES])
def test_every_example_is_read(name, example):
    """Its options and arguments are those of the command, its recipes are there and its overrides name known keys."""
    program, *words = shlex.split(example, comments=True)
    path = name.split()
    assert (program, words[: len(path)]) == ("dmpo", path)
    with COMMANDS[name].make_context(name, words[len(path) :]) as context:
        given = context.params
    if "overrides" in given:
        layers = [find_recipe(str(layer), "-c") for layer in given.get("layers") or [] if not Path(layer).suffix]
        folders = [text for text in given["overrides"] or [] if given.get("resume") and "=" not in text]
        load_config(layers, [text for text in given["overrides"] or [] if text not in folders])


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES], ids=errno.errorcode.get)
def test_storage_that_fails_is_one_line_that_names_the_file(number, tmp_path, monkeypatch, capsys):
    """Wherever it is met: in this case where `dmpo config show` resolves its settings."""

    def fail(*_):
        raise OSError(number, os.strerror(number), str(tmp_path / "model.safetensors"))

    monkeypatch.setattr("dmpo_dist.cli.options.load_config", fail)
    monkeypatch.setattr(sys, "argv", ["dmpo", "config", "show"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    out, errors = capsys.readouterr()
    [line] = errors.splitlines()
    assert (out, line.startswith(f"error: {tmp_path}/model.safetensors: {os.strerror(number)}; ")) == ("", True)
    assert "output_dir" in line


@pytest.mark.parametrize("odd", ["x" * 300, "{at}/loop", "{at}/loop/below", "{at}/file/below", '"a\\0b"', "{at}/[/x]"])
@pytest.mark.parametrize("command", ["data check {}", "train data.path=x output_dir={} -c {}", "submit status {}"])
def test_a_path_that_no_system_takes_is_one_message(command, odd, tmp_path, monkeypatch, capsys):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    odd = odd.format(at=tmp_path)
    monkeypatch.setattr(sys, "argv", ["dmpo", *command.format(odd, odd).split()])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_names_with_brackets_are_shown_as_they_are(capsys):
    from dmpo_dist.records.log import make_console

    console = make_console()
    console.print("exp[lr=1e-3] [/x] [bold]", highlight=False)
    console.print(terminal(Table("[/x]", ["[/x]"], [[Cell("exp[lr=1e-3]")]])))
    shown = capsys.readouterr().out
    assert "exp[lr=1e-3] [/x] [bold]" in shown
    assert shown.count("exp[lr=1e-3]") == 2


def test_a_closed_pipe_ends_a_command_without_a_word(tmp_path):
    command = f"{sys.executable} -m dmpo_dist config show --all | true"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, cwd=tmp_path)
    assert done.stderr == ""
    assert done.returncode in (0, 1)


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch):
    def fail(*_):
        raise OSError(errno.EBADF, "a descriptor that we closed")

    monkeypatch.setattr("dmpo_dist.cli.options.load_config", fail)
    monkeypatch.setattr(sys, "argv", ["dmpo", "config", "show"])
    with pytest.raises(OSError, match="that we closed"):
        main()


def test_usage_errors_and_the_version(monkeypatch, capsys):
    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dmpo", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
        return stopped.value.code, *capsys.readouterr()

    from dmpo_dist import __version__

    assert run("--version") == (0, f"dmpo_dist {__version__}\n", "")
    for line, command in (
        ("shw", "dmpo"), ("config shw", "dmpo config"), ("config show --al", "dmpo config show"),
        ("report", "dmpo report"), ("explain -m x --method y", "dmpo explain"), ("rank -m x", "dmpo rank"),
    ):  # fmt: skip
        code, _, errors = run(*line.split())
        assert code == 2
        assert re.fullmatch(rf"error: [^\n]*[^.\n]; see {command} --help\n", errors), errors
        assert "Value error" not in errors


def test_titles_of_a_history_keep_their_order_or_are_refused(monkeypatch):
    asked = []
    monkeypatch.setattr("dmpo_dist.commands.recommend.recommend", lambda model, titles, *rest: asked.append(titles))
    for words in ("--history A B C", "--history A --history B --history C", "A B C"):
        CliRunner().invoke(app, ["recommend", "m", *words.split(), "seed=1"], catch_exceptions=False)
    assert asked == [["A", "B", "C"]] * 3
    with pytest.raises(UserError, match="--history: is given 2 times with further titles beside it .'B'."):
        CliRunner().invoke(app, ["recommend", "m", "--history", "A", "B", "--history", "C"], catch_exceptions=False)


@pytest.mark.parametrize(("typed", "outcome"), [("y\n", True), ("n\n", SystemExit), ("", UserError)])
def test_an_earlier_run_is_removed_only_by_a_spoken_yes(typed, outcome, tmp_path):
    asks = typer.Typer()
    found = []
    asks.command()(lambda: found.append(asked_to_overwrite(tmp_path, overwrite=True)))
    done = CliRunner().invoke(asks, [], input=typed)
    assert f"remove {tmp_path} and everything in it?" in done.output
    assert found == [True] * (outcome is True)
    assert outcome is True or isinstance(done.exception, outcome)
    assert not asked_to_overwrite(tmp_path, overwrite=False)
    assert asked_to_overwrite(tmp_path / "none", overwrite=True), "nothing to ask about"
