"""Several commands at work on one study: what each of them may do, by locks in the folder of the study."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from dmpo_dist.artifacts.locks import in_turn, one_of_several, only_one

LOCKS = ".locks"


class Alone:
    """The only command in the folder: everything is its work."""

    shared = False
    """Whether other commands may take some of the work."""

    def __init__(self, study: Path) -> None:
        self._study = study

    def session(self) -> AbstractContextManager[None]:
        """Holds the folder; raises UserError where another command does."""
        return only_one(self._study)

    @contextmanager
    def turn(self, work: str) -> Iterator[None]:
        """Around what each command does, one after the other."""
        yield

    @contextmanager
    def taken(self, work: str) -> Iterator[bool]:
        """Around what one command does; yields whether it falls to this one."""
        yield True


class Together(Alone):
    """One of several commands, each of which takes what no other has.

    A lock is held by a living process, so the work of one that was killed falls to those that come to it later. What
    another command has gone through since this one began is left alone, even where a model failed: it would be tried
    again by every command.
    """

    shared = True

    def __init__(self, study: Path) -> None:
        super().__init__(study)
        self._began = time.time()

    def session(self) -> AbstractContextManager[None]:
        return one_of_several(self._study)

    @contextmanager
    def turn(self, work: str) -> Iterator[None]:
        with in_turn(self._file(work)):
            yield

    @contextmanager
    def taken(self, work: str) -> Iterator[bool]:
        file = self._file(work)
        with in_turn(file, wait=False) as free:
            mine = free and not (file.stat().st_size and file.stat().st_mtime > self._began)
            yield mine
            if mine:
                file.write_text("done")

    def _file(self, work: str) -> Path:
        return self._study / LOCKS / work
