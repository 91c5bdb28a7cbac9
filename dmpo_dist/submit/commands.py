"""Calling sbatch, scancel, kubectl and their like."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from dmpo_dist.errors import UserError

TIMEOUT_SECONDS = 120
INTERRUPTIONS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SAME_PRESS_SECONDS = 1.0


class Unanswered(UserError):
    """A cluster was asked to take a job and did not answer."""


def ask(*command: str) -> str:
    """The output of a command.

    Raises:
        UserError: it is not there, fails, or does not answer.
    """
    done = attempt(*command)
    if done.returncode:
        raise UserError(failure(command, done.stderr))
    return done.stdout


def attempt(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a command, whatever its status."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    except FileNotFoundError:
        raise UserError(_missing(command[0])) from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]} did not answer within {TIMEOUT_SECONDS} s; is the cluster up?") from None


def hand_over(*command: str) -> str:
    """The output of the command that submits; Ctrl-C does not reach it, so that its output always says what it did.

    Raises:
        UserError: it is not there or fails.
        Unanswered: the cluster did not answer it in time.
    """
    try:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
    except FileNotFoundError:
        raise UserError(_missing(command[0])) from None
    out, err = process.communicate()
    if process.returncode:
        raise (Unanswered if "timed out" in err else UserError)(failure(command, err))
    return out


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM and SIGHUP raise KeyboardInterrupt inside, as Ctrl-C does."""
    with _on_interruption(signal.default_int_handler):
        yield


@contextmanager
def holding_interruptions() -> Iterator[list[float]]:
    """Interruptions only fill the yielded list; a second one, a second later, raises KeyboardInterrupt."""
    came: list[float] = []

    def hold(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not came:
            came.append(now)
            say("interrupted; waiting for the cluster's answer, to take the job back (once more: do not wait)")
        elif now - came[0] > SAME_PRESS_SECONDS:
            raise KeyboardInterrupt

    with _on_interruption(hold):
        yield came


@contextmanager
def _on_interruption(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """``handler`` for all interruptions but those that are ignored, as by nohup."""
    before = {number: signal.getsignal(number) for number in INTERRUPTIONS}
    heeded = {number: old for number, old in before.items() if old is not signal.SIG_IGN}
    try:
        for number in heeded:
            signal.signal(number, handler)
        yield
    finally:
        for number, old in heeded.items():
            signal.signal(number, old)


def say(message: str) -> None:
    """A line on stderr: from a signal handler too, and without harm when the terminal is gone."""
    with contextlib.suppress(OSError):
        os.write(2, f"{message}\n".encode())


def failure(command: tuple[str, ...], stderr: str) -> str:
    """What a failed command said, in a line."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()] or ["no message"]
    return f"{' '.join(command[:2])} failed: {lines[-1]}"


def _missing(program: str) -> str:
    where = "a login node" if program != "kubectl" else "a machine with kubectl"
    return f"{program} is not on PATH; submit from {where}, or write the files with --render-only"
