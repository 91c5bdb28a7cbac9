"""Finished parts of a long job, kept in a folder until the whole is written, so that an interruption costs one part."""

import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dmpo_dist.artifacts.files import whole_file, write_json
from dmpo_dist.errors import UserError
from dmpo_dist.parsing import parse_json

KEY_FILE = "key.json"


class PartFolder:
    """Numbered Parquet files of one schema, made from what ``key`` describes.

    Args:
        folder: made where it does not exist; its parent must.
        key: everything that the parts depend on, in JSON types.
        schema: of every part.
        advice: what else may be done where parts of something else are there.

    Raises:
        UserError: the parts that are there were made from something else; the message names what differs.
    """

    def __init__(self, folder: Path, key: dict[str, Any], schema: pa.Schema, advice: str) -> None:
        self.folder, self._schema, self._advice = folder, schema, advice
        folder.mkdir(exist_ok=True)
        if any(folder.glob("part-*.parquet")):
            self._require_same(key)
        else:
            write_json(folder / KEY_FILE, key)

    def has(self, number: int) -> bool:
        """Whether a part is there and whole; one that is damaged counts as missing and is made again."""
        try:
            return self.read(number) is not None
        except (OSError, pa.ArrowException):
            return False

    def read(self, number: int) -> pa.Table | None:
        """A part; None where it is of another schema. Raises what Arrow does where it is missing or damaged."""
        table = pq.read_table(self._part(number))
        return table if table.schema.equals(self._schema) else None

    def write(self, number: int, rows: list[dict[str, Any]]) -> None:
        """Keep a part, whole."""
        table = pa.Table.from_pylist(rows, self._schema)
        with whole_file(self._part(number)) as part:
            pq.write_table(table, part)

    def remove(self) -> None:
        """Remove the folder, when the whole is written."""
        shutil.rmtree(self.folder)

    def _part(self, number: int) -> Path:
        return self.folder / f"part-{number:06d}.parquet"

    def _require_same(self, key: dict[str, Any]) -> None:
        before = self._read_key()
        names = [name for name in {**before, **key} if before.get(name) != key.get(name)]
        if names:
            changed = [
                f"{name} ({before[name]} before, {key[name]} now)"
                if all(isinstance(of.get(name), int | float | bool) for of in (before, key))
                else name
                for name in names
            ]
            raise UserError(
                f"{self.folder}: holds parts of a ranking with another {' and '.join(changed)}; give the same again "
                f"to go on, remove the folder to begin anew, or {self._advice}"
            )

    def _read_key(self) -> dict[str, Any]:
        file = self.folder / KEY_FILE
        try:
            before = parse_json(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            before = None
        if not isinstance(before, dict):
            raise UserError(
                f"{file}: missing or damaged, so what the parts beside it hold is not known; remove {self.folder}"
            )
        return before
