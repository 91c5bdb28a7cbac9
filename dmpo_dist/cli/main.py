"""The command line: one thin function per verb in the modules beside; the work is done in commands and data."""

import contextlib
import io
import json
import os
import sys
import time
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from dmpo_dist import __version__
from dmpo_dist.artifacts.files import STORAGE
from dmpo_dist.cli.bench import bench_app
from dmpo_dist.cli.config import config_app, start_app
from dmpo_dist.cli.data import data_app
from dmpo_dist.cli.experiment import experiment_app
from dmpo_dist.cli.explain import explain_app
from dmpo_dist.cli.models import models_app
from dmpo_dist.cli.report import report_app
from dmpo_dist.cli.runs import runs_app
from dmpo_dist.cli.serve import serve_app
from dmpo_dist.cli.stages import stages_app
from dmpo_dist.cli.submit import submit_app
from dmpo_dist.cli.tune import tune_app
from dmpo_dist.errors import UserError
from dmpo_dist.parsing import first_line
from dmpo_dist.quiet import silence_libraries
from dmpo_dist.secrets import redact

PATH_ERRORS = ("Symlink loop", "embedded null byte", "embedded null character")
"""How Python's messages begin on paths that no system could have, which it raises as other errors than OSError."""
LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
"""What gloo and PyTorch's store say, as a RuntimeError, where the process of another rank is gone."""
SECONDS_FOR_RANK_0 = 3

app = typer.Typer(
    name="dmpo",
    help="Fine-tune language models into personalised rankers by Direct Multi-Preference Optimization (DMPO).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(data_app, name="data")
app.add_typer(stages_app)
app.add_typer(experiment_app)
app.add_typer(tune_app)
app.add_typer(models_app)
app.add_typer(explain_app)
app.add_typer(serve_app)
app.add_typer(runs_app, name="runs")
app.add_typer(report_app)
app.add_typer(config_app, name="config")
app.add_typer(start_app)
app.add_typer(bench_app, name="bench")
app.add_typer(submit_app, name="submit")


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(f"dmpo_dist {__version__}")
        raise typer.Exit


def main() -> NoReturn:
    """Run the command line; a user's mistake is one message and exit status 2."""
    silence_libraries()
    _print_anything()
    try:
        code = app(standalone_mode=False) or 0  # click hands typer.Exit's code back instead of raising it
        sys.stdout.flush()  # a closed pipe is noticed here, rather than by Python when it exits
    except BrokenPipeError:  # `dmpo runs list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1  # as click ends it where the pipe closes earlier
    except typer.Abort:
        code = 130
    except Exception as error:
        message = _message(error)
        if message is None:
            raise
        if message:
            _tell(message)
        code = 2
    sys.exit(code)


def _message(error: Exception) -> str | None:
    """What to tell of a user's mistake or a file's trouble, "" for nothing; None for an error of ours.

    An operating system's error that names a file is the file's: it is not there, not readable, too long, a loop of
    links, on a full disk. Libraries raise them as well as we do, so this one rule covers what no reader foresaw.
    """
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and (error.filename is not None or error.errno in STORAGE):
        where = "output_dir" if error.filename is None else error.filename
        reason = error.strerror or first_line(error)
        advice = "space and permissions, or write to another output_dir or data.path"
        return f"{where}: {reason}; check {advice if error.errno in STORAGE else 'the path, or choose another'}"
    if "RANK" in os.environ and isinstance(error, RuntimeError) and any(words in str(error) for words in LOST_PEER):
        return "another rank has ended, its own message says why; --resume goes on from the latest checkpoint"
    if str(error).startswith(PATH_ERRORS):
        return f"{first_line(error)}; correct the path"
    if hasattr(error, "format_message"):  # a usage error of click's, without a text where the help was shown instead
        text = error.format_message().replace("Value error, ", "").removesuffix(".")
        return f"{text}; see {_command_of(error)} --help" if text else ""
    return None


def _command_of(error: Exception) -> str:
    """The command that a usage error is about, as it is typed: "dmpo runs list"."""
    names, context = [], getattr(error, "ctx", None)
    while context is not None and context.parent is not None:
        names.insert(0, str(context.info_name))
        context = context.parent
    return " ".join(["dmpo", *names])


def _print_anything() -> None:
    """Let names that the terminal's encoding, or any, cannot show be printed escaped."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _tell(message: str) -> None:
    """Print an error without secrets: rank 0 at once, others after a while, if torchrun has not ended them by then."""
    message, rank = redact(message), os.environ.get("RANK", "0")
    if rank != "0":
        time.sleep(SECONDS_FOR_RANK_0)
        message = f"rank {rank}: {message}"
    print(f"error: {message}", file=sys.stderr)
    if report := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        _tell_torchrun(Path(report), message)


def _tell_torchrun(report: Path, message: str) -> None:
    """Leave an error where torchrun looks for it: its own traceback comes last and ends with this message."""
    content = {"message": f"error: {message}", "extraInfo": {"timestamp": str(int(time.time()))}}
    with contextlib.suppress(OSError):
        report.write_text(json.dumps({"message": content}), encoding="utf-8")
