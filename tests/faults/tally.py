"""Counts of what was tried and what came out clean, by class; shown at the end of a session."""

import logging
import traceback
from collections import Counter
from collections.abc import Callable

from dmpo_dist.errors import UserError

TRIED: Counter[str] = Counter()
CLEAN: Counter[str] = Counter()
SHOWN_FRAMES = 3


def try_once(kind: str, call: Callable[[], object]) -> str | None:
    """Count ``call`` under ``kind``: clean where it returns or raises a UserError; else the end of its traceback."""
    TRIED[kind] += 1
    logging.disable()  # libraries log halves of emojis, which pytest-xdist cannot send to its other process
    try:
        call()
    except UserError as error:
        str(error).encode("utf-8", errors="backslashreplace")
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)[-SHOWN_FRAMES:]
        where = " < ".join(f"{frame.filename.rpartition('/')[2]}:{frame.lineno}" for frame in reversed(frames))
        return f"{type(error).__name__}: {str(error)[:150]!r} at {where}"
    finally:
        logging.disable(logging.NOTSET)
    CLEAN[kind] += 1
    return None


def count(kind: str, clean: bool) -> None:
    """Count one that was judged elsewhere."""
    TRIED[kind] += 1
    CLEAN[kind] += clean


def table() -> str:
    """``class | tried | clean`` as Markdown, with the sum."""
    rows = [(kind, TRIED[kind], CLEAN[kind]) for kind in sorted(TRIED)]
    rows.append(("all", sum(TRIED.values()), sum(CLEAN.values())))
    lines = ["| class | tried | clean |", "|---|---:|---:|"]
    return "\n".join([*lines, *(f"| {kind} | {tried:,} | {clean:,} |" for kind, tried, clean in rows)])
