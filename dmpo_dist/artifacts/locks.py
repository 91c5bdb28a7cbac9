"""Who may work in a folder: one process, or several that take turns."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dmpo_dist.errors import UserError

LOCK_FILE = ".lock"


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Lock ``folder``, which is made where it does not exist, as long as this process lives; a dead one holds nothing.

    Raises:
        UserError: another process holds the lock, or the folder cannot be written.
    """
    with _lock_of(folder, fcntl.LOCK_EX):
        yield


@contextmanager
def one_of_several(folder: Path) -> Iterator[None]:
    """The same for processes that work in ``folder`` together, but not beside ``only_one``.

    Raises:
        UserError: as ``only_one``, or the file system keeps no locks, so that all would do the same work.
    """
    with _lock_of(folder, fcntl.LOCK_SH):
        yield


@contextmanager
def in_turn(file: Path, wait: bool = True) -> Iterator[bool]:
    """Lock ``file``, which is made with its folder; yields False where another process holds it and ``wait`` is off."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        except OSError:  # a file system without locks
            pass
        yield True


@contextmanager
def _lock_of(folder: Path, kind: int) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK_FILE).open("a+")
    except OSError as error:
        raise UserError(f"output_dir {folder} cannot be written: {error.strerror}; choose another output_dir") from None
    with lock as file:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise UserError(f"{folder}: {holder} is at work there; wait for it or stop it") from None
        except OSError as error:  # a file system without locks
            if kind == fcntl.LOCK_SH:
                raise UserError(
                    f"{folder}: its file system keeps no locks ({error.strerror}), by which several commands share the "
                    "work; leave out --share and run one command, or choose an output_dir on another file system"
                ) from None
        with suppress(OSError):  # a full disk: the lock holds without a name in it
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
