"""RecBole's atomic files: titles as other sources have them, and each way a file can be broken named by its line."""

from pathlib import Path

import pytest

from dmpo_dist.config import Source
from dmpo_dist.data.schema import Interactions
from dmpo_dist.data.sources.read import load_interactions
from dmpo_dist.errors import UserError

INTER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n196\t242\t3\t881250949\n186\t1\t5\t891717742.0\n"
ITEM = (
    "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
    "242\tKolya\t1996\tComedy\n"
    '1\t"Amélie" & co\t2001\tAnimation Children\'s\n'
    "7\tLand Before Time III (1995)\tV\tAnimation\n"
)


def read(folder: Path, inter: str = INTER, item: str | None = ITEM, **source: object) -> Interactions:
    (folder / "films.inter").write_text(inter, encoding="utf-8")
    if item is not None:
        (folder / "films.item").write_text(item, encoding="utf-8")
    return load_interactions(Source(kind="recbole", path=folder, **source), seed=0)


def test_years_join_titles_and_genres_are_separated(tmp_path: Path) -> None:
    log = read(tmp_path, INTER + "\n186\t7\t4\t891717743\n")
    assert log.name == "films"
    assert log.events.to_dict("list") == {
        "user": ["196", "186", "186"],
        "item": ["242", "1", "7"],
        "rating": [3.0, 5.0, 4.0],
        "timestamp": [881250949, 891717742, 891717743],
    }
    assert log.items.to_dict("list") == {
        "item": ["242", "1", "7"],
        "title": ["Kolya (1996)", '"Amélie" & co (2001)', "Land Before Time III (1995)"],
        "genres": ["Comedy", "Animation|Children's", "Animation"],
    }


def test_fields_of_other_names_and_windows_line_ends(tmp_path: Path) -> None:
    inter = "uid:token\titem_id:token\tweight:float\ttimestamp:float\r\n1\t2\t9\t5\r\n"
    item = "item_id:token\tsong:token\r\n2\tSo What\r\n"
    log = read(tmp_path, inter, item, columns={"user": "uid", "rating": "weight", "title": "song"})
    assert log.events.to_dict("list") == {"user": ["1"], "item": ["2"], "rating": [9.0], "timestamp": [5]}
    assert log.items.to_dict("list") == {"item": ["2"], "title": ["So What"], "genres": [""]}


def test_a_carriage_return_within_a_title_does_not_cut_it(tmp_path: Path) -> None:
    """pandas ends a line there, so the title was cut, its year and genres were lost, and the rest became an item."""
    with pytest.raises(UserError, match=r"title of item '242', 'Kol\\rya \(1996\)', contains a line break"):
        read(tmp_path, item=ITEM.replace("Kol", "Kol\r"))


@pytest.mark.parametrize(
    ("inter", "item", "message"),
    [
        ("196\t242\t3\t881250949\n", ITEM, r"films\.inter, line 1: '196' is no header field; the first line names"),
        (
            INTER.replace("rating:float", "rating:int"),
            ITEM,
            r"line 1: field 'rating' has the unknown type 'int'; types are",
        ),
        (INTER.replace("item_id:", "user_id:"), ITEM, r"line 1: field 'user_id' occurs twice"),
        (INTER + "186\t1\t5\n", ITEM, r"films\.inter, line 4: 3 fields, the header names 4"),
        (INTER + "186\t1\t5\t7\t8\n", ITEM, r"films\.inter, line 4: 5 fields, the header names 4"),
        (INTER + "186\t1\tgood\t7\n", ITEM, r"films\.inter, row 4: rating 'good' is not a number"),
        (INTER + "186\t99\t5\t7\n", ITEM, r"films\.inter, row 4: item '99' has no title in films\.item"),
        (INTER.splitlines()[0] + "\n", ITEM, r"films\.inter: a header but no rows"),
        ("", ITEM, r"films\.inter, line 1: '' is no header field"),
        (INTER, ITEM.replace("movie_title", "film"), r"films\.item: no column 'movie_title'; .*columns\.title"),
        (INTER, ITEM + "9\tHeat\n", r"films\.item, line 5: 2 fields, the header names 4"),
        (INTER, None, r"films\.item: no such file; titles are read from it"),
    ],
)
def test_what_is_broken_is_named(tmp_path: Path, inter: str, item: str | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(tmp_path, inter, item)


def test_the_folder_says_which_dataset(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"one file NAME\.inter is needed, found none"):
        load_interactions(Source(kind="recbole", path=tmp_path), seed=0)
    (tmp_path / "other.inter").write_text(INTER)
    with pytest.raises(UserError, match=r"found films\.inter, other\.inter"):
        read(tmp_path)
    with pytest.raises(UserError, match=r"wants the folder"):
        load_interactions(Source(kind="recbole", path=tmp_path / "films.inter"), seed=0)
