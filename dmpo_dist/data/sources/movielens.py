"""MovieLens folders as GroupLens ships them."""

from pathlib import Path

import pandas as pd

from dmpo_dist.data.cleaning import assemble
from dmpo_dist.data.rules import Rules
from dmpo_dist.data.schema import Interactions
from dmpo_dist.data.tables import EVENT_COLUMNS, pick, read_delimited
from dmpo_dist.errors import UserError

GENRES_100K = (
    "unknown Action Adventure Animation Children Comedy Crime Documentary Drama Fantasy Film-Noir Horror Musical "
    "Mystery Romance Sci-Fi Thriller War Western"
).split()
MOVIELENS_TERMS = (
    "MovieLens data by GroupLens (F. M. Harper and J. A. Konstan, 2015, doi 10.1145/2827872): non-commercial use, "
    "to be cited; see the README that came with it."
)


def read_movielens(folder: Path, rules: Rules) -> Interactions:
    """Read an unpacked folder: 100K; 1M, 10M; latest-small, latest, 20M, 25M, 32M."""
    if not folder.is_dir():
        raise UserError(f"{folder}: data.source.kind=movielens wants the unpacked folder, not a file")
    layouts = {
        ("ratings.csv", "movies.csv"): _latest,
        ("u.data", "u.item"): _hundred_k,
        ("ratings.dat", "movies.dat"): _one_m,
    }
    for files, reader in layouts.items():
        if all((folder / name).is_file() for name in files):
            ratings_file, items_file = (folder / name for name in files)
            events, items = reader(ratings_file, items_file)
            name = f"MovieLens {folder.resolve().name.removeprefix('ml-')}"
            return assemble(events, items, ratings_file, items_file, name, [MOVIELENS_TERMS], rules)
    wanted = "; ".join(" and ".join(files) for files in layouts)
    found = ", ".join(sorted(p.name for p in folder.iterdir())[:12]) or "nothing"
    raise UserError(f"{folder}: not a MovieLens folder; looked for {wanted}; found {found}")


def _latest(ratings_file: Path, items_file: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """latest-small, latest, 20M, 25M, 32M: two CSV files with headers."""
    advice = "this is not a MovieLens file: use data.source.kind=csv with data.source.columns"
    columns = {"user": "userid", "item": "movieid", "rating": "rating", "timestamp": "timestamp"}
    item_columns = {"item": "movieid", "title": "title", "genres": "genres"}
    ratings, items = read_delimited(ratings_file), read_delimited(items_file)
    ratings.columns, items.columns = ratings.columns.str.lower(), items.columns.str.lower()
    return pick(ratings, columns, ratings_file, advice), pick(items, item_columns, items_file, advice)


def _hundred_k(ratings_file: Path, items_file: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """100K: tab and pipe separated, latin-1, no headers; 19 genre flags."""
    events = read_delimited(ratings_file, sep="\t", names=EVENT_COLUMNS, encoding="latin-1")
    names = ["item", "title", "date", "video_date", "url", *GENRES_100K]
    items = read_delimited(items_file, sep="|", names=names, encoding="latin-1")
    flags = (items[GENRES_100K] == "1").to_numpy()
    genres = ["|".join(g for g, on in zip(GENRES_100K, row, strict=True) if on) for row in flags]
    return events, items[["item", "title"]].assign(genres=genres)


def _one_m(ratings_file: Path, items_file: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """1M (titles in latin-1) and 10M (in UTF-8): fields separated by ``::``, no headers."""
    events = read_delimited(ratings_file, sep="::", names=EVENT_COLUMNS)
    try:
        items_file.read_bytes().decode()
        encoding = "utf-8"
    except UnicodeDecodeError:
        encoding = "latin-1"
    return events, read_delimited(items_file, sep="::", names=["item", "title", "genres"], encoding=encoding)
