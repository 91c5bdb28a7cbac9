"""Calling sbatch, scancel, kubectl and their like."""

import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dmpo_dist.errors import UserError

TIMEOUT_SECONDS = 120


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


def hand_over(*command: str, undo: Callable[[str], None]) -> str:
    """Run the command that submits, to its end even when interrupted; then what it submitted is taken back.

    Args:
        command: what to run; it sees no Ctrl-C, so that its output always says what it has done.
        undo: called with that output.

    Raises:
        UserError: it is not there, fails, or was interrupted.
    """
    with ctrl_c_on_term():
        try:
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
            )
        except FileNotFoundError:
            raise UserError(_missing(command[0])) from None
        try:
            out, err = process.communicate()
        except KeyboardInterrupt:
            out, _ = process.communicate()
            undo(out)
            raise UserError("interrupted: nothing is left running on the cluster") from None
    if process.returncode:
        raise UserError(failure(command, err))
    return out


@contextmanager
def ctrl_c_on_term() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt inside."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def failure(command: tuple[str, ...], stderr: str) -> str:
    """What a failed command said, in a line."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()] or ["no message"]
    return f"{' '.join(command[:2])} failed: {lines[-1]}"


def _missing(program: str) -> str:
    where = "a login node" if program != "kubectl" else "a machine with kubectl"
    return f"{program} is not on PATH; submit from {where}, or write the files with --render-only"
