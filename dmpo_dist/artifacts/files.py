"""One way to write a file whole and one for a folder: under another name, synced to disk, then renamed."""

import errno
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import xxhash
from safetensors import SafetensorError

from dmpo_dist.errors import UserError

STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)
"""Errors of a disk: full, over quota, past the largest file, read-only, not ours, broken."""


def write_whole(file: Path, content: str | bytes) -> None:
    """Write ``file`` whole; an error leaves what was there."""
    with whole_file(file) as part:
        part.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(file: Path, content: Any) -> None:
    """Write ``content`` as indented JSON, whole; an error leaves what was there."""
    write_whole(file, json_text(content))


def json_text(content: Any) -> str:
    """Indented JSON with a line's end."""
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """A write to ``path`` within; raises OSError with that name where the storage fails.

    A write to a file that is open raises an error without a name, and libraries in other languages one of their own.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in STORAGE or error.filename not in (None, str(_beside(path))):
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
    except SafetensorError as error:
        found = re.search(r"os error (\d+)", str(error))
        if not found or int(found[1]) not in STORAGE:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error


@contextmanager
def whole_file(file: Path) -> Iterator[Path]:
    """A path beside ``file`` to write to, which takes its place at the end; after an error nothing of it stays."""
    _remove_dead(file.parent)
    part = _beside(file)
    try:
        with naming(file):
            yield part
        _sync(part)
        part.replace(file)
        _sync(file.parent)  # the new name is on disk only when its folder is
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def whole_folder(folder: Path, replace: bool = False) -> Iterator[Path]:
    """A folder beside ``folder`` to write to, which takes its place at the end; after an error nothing of it stays.

    Args:
        replace: whether ``folder`` may exist; it is removed when the new one is complete.

    Raises:
        UserError: it cannot be written, or exists and may not.
    """
    _remove_dead(folder.parent)
    part = _beside(folder)
    missing = [parent for parent in part.parents if not parent.exists()]
    try:
        part.mkdir(parents=True)
        yield part
        replace_folder(part, folder) if replace else _publish(part, folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{folder}: cannot be written ({reason}); check space and permissions, or choose another folder"
        ) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
        if not folder.exists():
            for parent in missing:
                with suppress(OSError):  # not made, or somebody else uses it by now
                    parent.rmdir()


def replace_folder(new: Path, target: Path) -> None:
    """Put the finished folder ``new`` in the place of ``target``, which may exist."""
    old = target.with_name(target.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    _publish(new, target)
    shutil.rmtree(old, ignore_errors=True)


def recover_folder(target: Path) -> None:
    """Put ``target`` back where a ``replace_folder`` was killed between its two renames."""
    old = target.with_name(target.name + ".old")
    if old.exists() and not target.exists():
        old.rename(target)


def _publish(part: Path, folder: Path) -> None:
    """Rename a finished folder when all of its files are on disk."""
    sync_folder(part)
    part.rename(folder)
    _sync(folder.parent)


def sync_folder(folder: Path, below: bool = True) -> None:
    """Have the names in ``folder`` on disk, and with ``below`` all files and folders in it, when this returns."""
    for path in folder.rglob("*") if below else ():
        _sync(path)
    _sync(folder)


def remove_left_overs(folder: Path) -> None:
    """Remove what ``whole_file`` and ``whole_folder`` left in ``folder`` when they were killed.

    Nobody else may be writing there: the caller holds the folder's lock.
    """
    for path in folder.glob(".*.part"):
        if re.fullmatch(r"\..+\.(\w+-)?\d+\.part", path.name):
            _remove(path)


@cache
def _remove_dead(folder: Path) -> None:
    """Remove, once in this process's life, what dead processes of this host left half-written in ``folder``."""
    ours = re.compile(rf"\..+\.{_host()}-(\d+)\.part")
    with suppress(OSError):  # no folder yet, or one that cannot be read
        for entry in os.listdir(folder):
            found = ours.fullmatch(entry)
            if found and not _is_alive(int(found[1])):
                _remove(folder / entry)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        pass
    return True


def _beside(path: Path) -> Path:
    """A name that no other process writes to."""
    return path.with_name(f".{path.name}.{_host()}-{os.getpid()}.part")


@cache
def _host() -> str:
    """What stands in file names for this host and, in a container, for its own numbering of processes."""
    numbering = Path("/proc/self/ns/pid")
    text = f"{socket.gethostname()} {numbering.stat().st_ino if numbering.exists() else ''}"
    return xxhash.xxh32_hexdigest(text.encode())


def _sync(path: Path) -> None:
    """Have the content of a file, or the names in a folder, on disk when this returns."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
