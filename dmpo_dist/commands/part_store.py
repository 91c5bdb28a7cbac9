"""Finished parts of a ranking, kept beside its output until all are there."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dmpo_dist.artifacts.files import whole_file, write_json
from dmpo_dist.commands.ranked_files import SCHEMA, WRITERS, with_ids
from dmpo_dist.data.requests import Catalogue
from dmpo_dist.errors import UserError

KEY_FILE = "key.json"


class PartStore:
    """Finished parts beside ``output``.

    Raises:
        UserError: the parts that are there were made from something else; the message names what differs.
    """

    def __init__(self, output: Path, key: dict[str, Any]) -> None:
        self._output, self._folder = output, output.with_name(output.name + ".parts")
        key_file = self._folder / KEY_FILE
        self._folder.mkdir(exist_ok=True)
        if any(self._folder.glob("part-*.parquet")):
            self._require_same(self._read_key(key_file), key)
        else:
            write_json(key_file, key)

    def has(self, number: int) -> bool:
        return self._part(number).exists()

    def write(self, number: int, rows: list[dict[str, Any]]) -> None:
        table = pa.Table.from_pylist(rows, SCHEMA)
        with whole_file(self._part(number)) as part:
            pq.write_table(table, part)

    def join(self, count: int, users: list[str], catalogue: Catalogue | None) -> None:
        """Make ``output`` out of ``count`` parts, with the item ids of ``catalogue``, and remove them.

        Raises:
            UserError: the parts do not hold each of ``users`` once, in order.
        """
        written: list[str] = []

        def parts() -> Iterator[pa.Table]:
            for number in range(count):
                table = pq.read_table(self._part(number))
                written.extend(table["user"].to_pylist())
                yield with_ids(table, catalogue)

        with whole_file(self._output) as whole:
            WRITERS[self._output.suffix.lower()](whole, parts())
            self._require_users(written, users)
        shutil.rmtree(self._folder)

    def _part(self, number: int) -> Path:
        return self._folder / f"part-{number:06d}.parquet"

    def _require_users(self, written: list[str], users: list[str]) -> None:
        if written != users:
            raise UserError(f"{self._folder}: its parts do not hold each user once; remove the folder and run again")

    def _read_key(self, key_file: Path) -> dict[str, Any]:
        try:
            return json.loads(key_file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise UserError(
                f"{key_file}: missing or damaged, so what the parts beside it hold is not known; remove {self._folder}"
            ) from None

    def _require_same(self, before: dict[str, Any], key: dict[str, Any]) -> None:
        names = [name for name in {**before, **key} if before.get(name) != key.get(name)]
        if names:
            changed = [
                f"{name} ({before[name]} before, {key[name]} now)"
                if all(isinstance(of.get(name), int | float | bool) for of in (before, key))
                else name
                for name in names
            ]
            raise UserError(
                f"{self._folder}: holds parts of a ranking with another {' and '.join(changed)}; give the same again "
                "to go on, remove the folder to begin anew, or choose another --output"
            )
