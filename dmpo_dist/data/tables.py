"""Tables of strings out of CSV, Parquet and JSON lines, indexed by row number for messages."""

import csv
import gzip
import re
import warnings
import zlib
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import pyarrow.parquet as pq

from dmpo_dist.errors import UserError
from dmpo_dist.parsing import parse_json, parsing

EVENT_COLUMNS = ["user", "item", "rating", "timestamp"]
TableKind = Literal["csv", "jsonl", "parquet"]
SUFFIX_KINDS: dict[str, TableKind] = {".csv": "csv", ".tsv": "csv", ".jsonl": "jsonl", ".parquet": "parquet"}
SEPARATORS = {"comma": ",", "semicolon": ";", "tab": "\t", "pipe": "|"}


def suffix_kind(path: Path) -> TableKind | None:
    """What a file's name says that it is; the name may end in .gz."""
    return SUFFIX_KINDS.get((path.with_suffix("") if path.suffix == ".gz" else path).suffix.lower())


def read_table(path: Path, kind: str | None = None, separator: str = "auto") -> pd.DataFrame:
    """All fields as strings; ``kind`` csv, jsonl or parquet, by the file's name where it is left out.

    Args:
        separator: of a CSV file, auto or a key of ``SEPARATORS``.
    """
    kind = kind or suffix_kind(path) or "csv"
    if kind == "parquet":
        with parsing(path, "is its text UTF-8?"):  # Arrow looks at the bytes of texts when they are converted
            return as_strings(_read_parquet(path))
    if kind == "jsonl":
        rows = dict(read_json_lines(path))
        return as_strings(pd.DataFrame(list(rows.values()), index=list(rows), dtype=object))
    return read_delimited(path, sep=SEPARATORS.get(separator))


def read_json_lines(path: Path, keys: Sequence[str] | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of a file that may be gzipped; only ``keys`` of each object where given.

    Raises:
        UserError: the file cannot be read, or a line is no JSON object.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with opener(path, "rt", encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                row = parse_json(line)
                if not isinstance(row, dict):
                    raise UserError(f"{path}, row {number}: {row!r} is not an object")
                yield number, row if keys is None else {key: row[key] for key in keys if key in row}
    except EOFError:
        raise UserError(f"{path}: cut off after row {number}; download it again") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error}); convert the file") from None
    except ValueError as error:
        raise UserError(f"{path}, row {number}: not valid JSON ({error}); each line is one object") from None
    except zlib.error as error:
        raise UserError(f"{path}: damaged after row {number} ({error}); download it again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); correct the path") from None
    if number == 0:
        raise UserError(f"{path}: the file is empty; is this the right file?")


def _read_parquet(path: Path) -> pd.DataFrame:
    with parsing(path, "is it a Parquet file, and whole?"):
        # Whole numbers beside nothing would become floats, which know no ids of 16 digits and more.
        dataset = pq.ParquetDataset(path)
        require_once(dataset.schema.names, path)
        frame = dataset.read().to_pandas(integer_object_nulls=True)
    if frame.empty:
        raise UserError(f"{path}: holds no rows; is this the right file?")
    frame.index = pd.RangeIndex(1, len(frame) + 1)
    return frame


def as_strings(frame: pd.DataFrame) -> pd.DataFrame:
    """Every column as text: whole numbers without a point, moments as seconds since 1970, nothing as ""."""
    return pd.DataFrame({name: _column_as_strings(frame[name]) for name in frame.columns}, index=frame.index)


def _column_as_strings(column: pd.Series) -> pd.Series:
    missing = column.isna()
    if pd.api.types.is_datetime64_any_dtype(column):
        epoch = pd.Timestamp(0, tz=getattr(column.dtype, "tz", None))
        text = ((column - epoch) // pd.Timedelta(1, "s")).astype("Int64").astype(str)
    elif pd.api.types.is_float_dtype(column) and (column[~missing] % 1 == 0).all() and column.abs().max() < 2**63:
        text = column.astype("Int64").astype(str)
    elif pd.api.types.is_numeric_dtype(column):
        text = column.astype(str)
    else:
        text = column.map(str)
    return text.mask(missing, "")


def fields_over_lines(frame: pd.DataFrame) -> list[str]:
    """What to say of fields that hold a line break: text may, and a quotation mark that is left open takes rows in."""
    broken = frame.apply(lambda column: column.str.contains("\n", regex=False))
    if not broken.any(axis=None):
        return []
    column = broken.columns[broken.any()][0]
    return [
        f"{int(broken.to_numpy().sum())} fields run over several lines, the first in column {column!r}, row "
        f"{broken.index[broken[column]][0]}: if that is no text of several lines, a quotation mark is left open there "
        "and the rows after it were taken into the field."
    ]


def read_delimited(
    path: Path, *, sep: str | None = None, names: list[str] | None = None, encoding: str = "utf-8-sig"
) -> pd.DataFrame:
    """All fields as strings, indexed by row number (the file's first row, header or not, is 1), without blank rows.

    Args:
        sep: stands between fields; None takes the separator that the header has most of.
        names: of the fields, for files without a header, which also know no quotes.

    Where lines end in a line feed, a carriage return within one is part of a field.
    """
    content = _read_bytes(path, encoding)
    sep = sep or _separator_of(content.split(b"\n", 1)[0].decode(encoding), path)
    if sep == "::":  # two characters would need pandas' slow parser; a tab does not occur in these files
        content, sep = content.replace(b"::", b"\t"), "\t"
    by_line_feed = b"\n" in content
    if by_line_feed:
        content = re.sub(rb"\r+\n", b"\n", content)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # rows longer than the header
            if names is None:  # read as any row, as pandas would call the second of two columns `name` `name.1`
                header = pd.read_csv(BytesIO(content), sep=sep, header=None, nrows=1, encoding=encoding, dtype=str)
                require_once(header.iloc[0].fillna("").tolist(), path)
            frame = pd.read_csv(
                BytesIO(content),
                sep=sep,
                header=None if names else 0,
                names=names,
                index_col=False,
                encoding=encoding,
                dtype=str,
                na_filter=False,
                skip_blank_lines=False,
                quoting=csv.QUOTE_NONE if names else csv.QUOTE_MINIMAL,
                lineterminator="\n" if by_line_feed else None,
            )
    except (ValueError, pd.errors.ParserWarning) as error:  # pandas' errors for malformed tables are ValueErrors
        raise UserError(f"{path}: malformed table; quote fields that contain {sep!r}: {str(error).strip()}") from None
    frame.index += 1 if names else 2
    blank = (frame == "").all(axis=1)
    if blank.all():
        raise UserError(f"{path}: a header but no rows; is this the right file?")
    return frame[~blank]


def _separator_of(header: str, path: Path) -> str:
    """The separator that ``header`` has most of outside quotes; a tab in a .tsv file and else a comma on a tie."""
    bare = re.sub(r'"[^"]*"', "", header)
    usual = "\t" if ".tsv" in path.suffixes else ","
    return max([usual, *SEPARATORS.values()], key=bare.count)


def _read_bytes(path: Path, encoding: str) -> bytes:
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
        content.decode(encoding)
    except (EOFError, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: cut off or not gzipped ({error}); download it again") from None
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror or error}); correct the path or its permissions"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not {encoding.removesuffix('-sig')} text ({error}); convert the file") from None
    if not content.strip():
        raise UserError(f"{path}: the file is empty; is this the right file?")
    return content


def require_once(names: Sequence[str], path: Path | str) -> None:
    """Raise UserError for a column that occurs twice among ``names``: which of the two is meant cannot be known.

    Columns without a name, as separators at the end of each line make them, may be many.
    """
    twice = next((name for name in names if name.strip() and names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{path}: column {twice!r} occurs {names.count(twice)} times; rename or remove all but one")


def pick(frame: pd.DataFrame, columns: dict[str, str], path: Path, advice: str) -> pd.DataFrame:
    """The columns under our names; ``advice`` says how to mend a missing one, with our name for {column}."""
    require_columns(columns, list(frame.columns), path, advice)
    return frame[list(columns.values())].set_axis(list(columns), axis=1)


def require_columns(columns: dict[str, str], there: list[str], path: Path, advice: str) -> None:
    """Raise UserError for the first of ``columns`` (our name -> the file's) that is not ``there``; see ``pick``."""
    for ours, theirs in columns.items():
        if theirs not in there:
            todo = advice.format(column=ours)
            if len(there) == 1:
                todo = "its fields must be separated by commas, semicolons, tabs or |: see data.source.separator"
            raise UserError(f"{path}: no column {theirs!r}; the file has {', '.join(map(repr, there))}; {todo}")
