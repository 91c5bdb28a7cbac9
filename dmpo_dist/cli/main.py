"""The command line: one thin function per verb in the modules beside; the work is done in commands and data."""

import contextlib
import errno
import json
import os
import sys
import time
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from dmpo_dist import __version__
from dmpo_dist.cli.bench import bench_app
from dmpo_dist.cli.config import config_app, start_app
from dmpo_dist.cli.data import data_app
from dmpo_dist.cli.experiment import experiment_app
from dmpo_dist.cli.explain import explain_app
from dmpo_dist.cli.models import models_app
from dmpo_dist.cli.report import report_app
from dmpo_dist.cli.runs import runs_app
from dmpo_dist.cli.stages import stages_app
from dmpo_dist.cli.submit import submit_app
from dmpo_dist.errors import UserError
from dmpo_dist.quiet import silence_libraries

STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
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
app.add_typer(models_app)
app.add_typer(explain_app)
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
    try:
        code = app(standalone_mode=False) or 0  # click hands typer.Exit's code back instead of raising it
    except UserError as error:
        _tell(str(error))
        code = 2
    except OSError as error:
        if error.errno not in STORAGE:
            raise
        where = error.filename or "output_dir"
        _tell(f"{where}: {error.strerror}; check space and permissions, or write to another output_dir or data.path")
        code = 2
    except typer.Abort:
        code = 130
    except Exception as error:
        if not hasattr(error, "format_message"):  # not a usage error of click's
            raise
        if error.format_message():  # nothing where the help was shown instead
            _tell(f"{error.format_message()}; see dmpo --help")
        code = 2
    sys.exit(code)


def _tell(message: str) -> None:
    """Print an error: rank 0 at once, another rank after a while, if torchrun has not ended it by then."""
    rank = os.environ.get("RANK", "0")
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
