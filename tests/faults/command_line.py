"""The command line in this process, and whether it ended as it may: done, or one message and status 2."""

import contextlib
import hashlib
import io
import sys
import traceback
from pathlib import Path

import tally

from dmpo_dist.cli import main
from dmpo_dist.cluster import train as ray_train
from dmpo_dist.errors import UserError


class WouldStart(UserError):
    """In place of Ray: everything that needs no worker was in order."""


def stop_before_workers(monkeypatch) -> None:
    """Have every command end where it would start or join Ray."""

    def no_ray(*_):
        raise WouldStart("workers would start here")

    monkeypatch.setattr(ray_train, "ray_session", no_ray)


def run(kind: str, arguments: list[str]) -> str | None:
    """Run ``dmpo`` with ``arguments`` and count it under ``kind``; returns what is wrong with how it ended, or None."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    before, failure, status = sys.argv, None, None
    try:
        sys.argv = ["dmpo", *arguments]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as stop:
        status = stop.code
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)[-3:]
        where = " < ".join(f"{frame.filename.rpartition('/')[2]}:{frame.lineno}" for frame in reversed(frames))
        failure = f"{type(error).__name__}: {str(error)[:120]!r} at {where}"
    finally:
        sys.argv = before
    message = err.buffer.getvalue().decode("utf-8", "replace")
    well = status == 0 or (status == 2 and "error: " in message)
    if failure is None and ("Traceback" in message or not well):
        failure = f"status {status}: {message[-200:]!r} at {kind}"
    tally.count(kind, failure is None)
    return failure and f"{' '.join(arguments)[:200]!r}: {failure}"


def contents(folder: Path) -> dict[str, str]:
    """Digest of every file in and below ``folder``."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
