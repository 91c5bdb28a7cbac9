"""The catalogue of a running server: read again when its file changes, while the old one goes on answering."""

import hashlib
import json
import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from dmpo_dist.data.matching import TitleLookup
from dmpo_dist.data.prompt_texts import PromptTexts
from dmpo_dist.data.requests import Catalogue, read_catalogue
from dmpo_dist.errors import UserError
from dmpo_dist.parsing import first_line

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServedCatalogue:
    """A catalogue that was read and checked; requests keep the one that they began with.

    Attributes:
        log_popularity: title -> log(1 + count), where rankings are corrected by it.
        texts: the fields of its items that prompts show, and those of users.
    """

    catalogue: Catalogue
    log_popularity: Mapping[str, float] | None
    texts: PromptTexts

    @cached_property
    def lookup(self) -> TitleLookup:
        """Finds titles by title or item id."""
        return TitleLookup(self.catalogue)

    @cached_property
    def version(self) -> str:
        """12 hexadecimal digits that differ between catalogues that may rank differently."""
        fields = self.texts.of_items(self.catalogue.titles) if self.texts.item_fields else {}
        content = [self.catalogue.titles, self.catalogue.ids, self.log_popularity, fields]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]

    @cached_property
    def item_of(self) -> dict[str, str]:
        """Title -> item id, where the catalogue has ids."""
        return dict(zip(self.catalogue.titles, self.catalogue.ids or (), strict=False))


class CatalogueWatch:
    """Reads a catalogue now, and again in a thread whenever its file changes; a broken file leaves the old one.

    Args:
        path: file or folder, see ``read_catalogue``.
        accept: makes of each new catalogue what is served; raises UserError for one that cannot be.
        seconds: between two looks at the file.

    Attributes:
        current: the latest one that could be read.
        problem: why the file on the disk is not the one in use; None where it is.

    Raises:
        UserError: the first one cannot be read or served.
    """

    def __init__(self, path: Path, accept: Callable[[Catalogue], ServedCatalogue], seconds: float) -> None:
        self._path, self._accept, self._seconds = path, accept, seconds
        self.problem: str | None = None
        self._seen = self._state()
        self.current = self._read()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="dmpo-catalogue", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._stopped.set()
        self._thread.join()

    def look(self) -> None:
        """Take a new version if there is one."""
        state = self._state()
        if state == self._seen:
            return
        self._seen = state
        try:
            self.current, self.problem = self._read(), None
            LOG.warning("catalogue %s: %d titles are in use now", self._path, len(self.current.catalogue.titles))
        except Exception as error:  # whatever a file that is being written makes a reader raise, the old one stays
            self.problem = str(error) if isinstance(error, UserError) else first_line(error)
            LOG.warning("the catalogue in use stays, as the new file cannot be served: %s", self.problem)

    def _watch(self) -> None:
        while not self._stopped.wait(self._seconds):
            self.look()

    def _read(self) -> ServedCatalogue:
        served = self._accept(read_catalogue(self._path))
        _ = served.lookup.title(""), served.version, served.item_of  # computed here rather than in a request
        return served

    def _state(self) -> tuple[tuple[str, int, int], ...]:
        """What shows that the file, or one of the folder's tables, was written: its time and size."""
        files = sorted(self._path.glob("*.*")) if self._path.is_dir() else [self._path]
        state = []
        for file in files:
            try:
                found = file.stat()
            except OSError:
                continue
            state.append((file.name, found.st_mtime_ns, found.st_size))
        return tuple(state)
