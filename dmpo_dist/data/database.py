"""A DuckDB database: in memory for logs that fit, in a folder and within a memory limit for logs that do not."""

import os
import tempfile
from pathlib import Path
from typing import Any, Self

import duckdb
import pandas as pd

from dmpo_dist.errors import UserError


class Database:
    """Runs SQL, and says which key to change when the memory limit is too small.

    Args:
        folder: where tables and what sorting spills are kept; None keeps everything in memory.
        memory: limit such as 1GB, only with ``folder``.

    Raises:
        UserError: ``memory`` is no amount of memory.
    """

    def __init__(self, folder: Path | None = None, memory: str = "") -> None:
        self._advice = "raise data.stream_memory"
        if folder is None:
            self._advice = "write the log as Parquet shards and set data.source.kind=parquet and data.stream=true"
            # The default is a folder in the working directory.
            spill = str(Path(tempfile.gettempdir()) / f"dmpo-{os.getpid()}")
            self._connection = duckdb.connect(config={"temp_directory": spill})
            return
        settings = {
            "memory_limit": memory,
            "temp_directory": str(folder / "spill"),
            "preserve_insertion_order": "false",
        }
        try:
            self._connection = duckdb.connect(str(folder / "log.duckdb"), config=settings)
        except duckdb.Error as error:
            raise UserError(f"data.stream_memory={memory}: {first_line(error)}; write it as in 1GB") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._connection.close()

    def run(self, query: str) -> Any:
        """The result of one statement; raises UserError where its memory does not suffice."""
        try:
            return self._connection.execute(query)
        except duckdb.OutOfMemoryException as error:
            raise UserError(f"{first_line(error)}; {self._advice}") from None

    def frame(self, query: str) -> pd.DataFrame:
        """The result as a data frame."""
        return self.run(query).df()

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        """The result as tuples."""
        return self.run(query).fetchall()

    def value(self, query: str) -> Any:
        """The first column of the first row."""
        return self.rows(query)[0][0]

    def show(self, name: str, frame: pd.DataFrame) -> None:
        """Let queries read ``frame`` under ``name``."""
        self._connection.register(name, frame)


def first_line(error: Exception) -> str:
    """What DuckDB says, without its hints on further lines."""
    return str(error).strip().split("\n", 1)[0]


def quoted(name: str) -> str:
    """``name`` as an identifier."""
    return '"' + name.replace('"', '""') + '"'


def literal(text: str) -> str:
    """``text`` as a string."""
    return "'" + text.replace("'", "''") + "'"
