"""Reading logs: every layout gives the same log, and every kind of bad input one clear error."""

import os
from pathlib import Path

import pandas as pd
import pytest

from dmpo_dist.config import Source
from dmpo_dist.data.schema import Interactions
from dmpo_dist.data.sources import load_interactions
from dmpo_dist.errors import UserError

HEADER = "user,item,rating,timestamp,title\n"
GOOD = HEADER + "u1,a,5,100,Alpha\nu2,b,3.5,90,Beta\nu1,b,4,120,Beta\n"


def read_csv(tmp_path: Path, text: str, **source: object) -> Interactions:
    (tmp_path / "log.csv").write_text(text, encoding="utf-8")
    return load_interactions(Source(kind="csv", path=tmp_path / "log.csv", **source), seed=0)


def test_a_csv_log_is_sorted_by_time_and_keeps_strings(tmp_path: Path) -> None:
    text = HEADER + 'NA,007,5,100.0,"Null, the ""Movie"""\n\nu2,b,3.5,90, Beta \nNA,b,4,90,Beta\n'
    log = read_csv(tmp_path, text)
    assert log.events.to_dict("list") == {
        "user": ["NA", "u2", "NA"],
        "item": ["b", "b", "007"],
        "rating": [4.0, 3.5, 5.0],
        "timestamp": [90, 90, 100],
    }
    assert dict(zip(log.items["item"], log.items["title"], strict=True)) == {"007": 'Null, the "Movie"', "b": "Beta"}


def test_columns_and_a_second_file_of_titles(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("who,what,stars,when\n1,10,4,5\n2,11,2,6\n")
    (tmp_path / "items.csv").write_text("what,title,genres\n10,Ten,Drama\n11,Eleven,\n12,Never taken,\n")
    columns = {"user": "who", "item": "what", "rating": "stars", "timestamp": "when"}
    source = Source(kind="csv", path=tmp_path / "log.csv", items_path=tmp_path / "items.csv", columns=columns)
    log = load_interactions(source, seed=0)
    assert log.items.to_dict("list") == {"item": ["10", "11"], "title": ["Ten", "Eleven"], "genres": ["Drama", ""]}
    assert log.notes == ["1 items without interactions left out."]


def test_the_movielens_layouts_give_one_log(tmp_path: Path) -> None:
    titles = {"1": "Amélie, le film (2001)", "2": "Heat (1995)"}
    events = [("7", "1", "4", "300"), ("8", "2", "3", "200")]
    latest, hundred_k, one_m = (tmp_path / name for name in ("ml-latest", "ml-100k", "ml-1m"))
    for folder in (latest, hundred_k, one_m):
        folder.mkdir()
    (latest / "ratings.csv").write_text(
        "userId,movieId,rating,timestamp\n" + "".join(",".join(e) + "\n" for e in events)
    )
    (latest / "movies.csv").write_text(
        "movieId,title,genres\n" + "".join(f'{i},"{t}",Comedy|Crime\n' for i, t in titles.items()), encoding="utf-8"
    )
    flags = "|".join("1" if n in (5, 6) else "0" for n in range(19))
    (hundred_k / "u.data").write_text("".join("\t".join(e) + "\n" for e in events))
    lines = "".join(f"{i}|{t}|01-Jan-1995||http://x|{flags}\n" for i, t in titles.items())
    (hundred_k / "u.item").write_text(lines, encoding="latin-1")
    (one_m / "ratings.dat").write_text("".join("::".join(e) + "\n" for e in events))
    (one_m / "movies.dat").write_text(
        "".join(f"{i}::{t}::Comedy|Crime\n" for i, t in titles.items()), encoding="latin-1"
    )
    logs = [load_interactions(Source(kind="movielens", path=p), seed=0) for p in (latest, hundred_k, one_m)]
    assert [log.name for log in logs] == ["MovieLens latest", "MovieLens 100k", "MovieLens 1m"]
    assert logs[0].items["genres"].tolist() == ["Comedy|Crime"] * 2
    for log in logs[1:]:
        pd.testing.assert_frame_equal(log.events, logs[0].events)
        pd.testing.assert_frame_equal(log.items, logs[0].items)


def test_a_repeated_event_keeps_the_first_in_time(tmp_path: Path) -> None:
    log = read_csv(tmp_path, GOOD + "u1,a,1,50,Alpha\n")
    assert log.events.query("user == 'u1' and item == 'a'")["rating"].tolist() == [1.0]
    assert log.notes == ["1 repeated (user, item) events dropped, the first in time kept."]


def test_duplicate_titles_stop_or_merge(tmp_path: Path) -> None:
    text = GOOD + "u3,c,2,10,Alpha\nu1,c,4,20,Alpha\n"
    with pytest.raises(UserError, match=r"'a' and 'c' share the title 'Alpha'.*data\.source\.duplicate_titles=merge"):
        read_csv(tmp_path, text)
    log = read_csv(tmp_path, text, duplicate_titles="merge")
    assert log.items["item"].tolist() == ["a", "b"]
    assert log.events.query("item == 'a'")[["user", "timestamp"]].values.tolist() == [["u3", 10], ["u1", 20]]
    assert log.notes[0] == "1 items merged into another item of the same title."


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"log\.csv: the file is empty"),
        (HEADER, r"log\.csv: a header but no rows"),
        ("user,movie,rating,timestamp,title\n1,2,3,4,x\n", r"no column 'item'.*'movie'.*data\.source\.columns\.item"),
        ("user,item,timestamp,title\n1,2,4,x\n", r"no column 'rating'.*data\.rating_threshold=1"),
        ("user,item,rating,timestamp\n1,2,3,4\n", r"no column 'title'.*data\.source\.items_path"),
        ("user;item;rating\n1;2;3\n", r"no column 'user'.*separated by commas"),
        (GOOD + "u1,c,good,5,Gamma\n", r"row 5: rating 'good' is not a number"),
        (GOOD + "u1,c,nan,5,Gamma\n", r"row 5: rating 'nan' is not a number"),
        (GOOD + "u1,c,5,2020-01-01,Gamma\n", r"row 5: timestamp '2020-01-01' is not a number.*seconds since 1970"),
        (GOOD + "\nu1,c,5\n", r"row 6: timestamp '' is not a number"),
        (GOOD + ",c,5,5,Gamma\n", r"row 5: column 'user' is empty"),
        (GOOD + "u1,c,5,5,\n", r"row 5: item 'c' has no title"),
        (GOOD + "u2,a,5,5,Other\n", r"row 5: item 'a' has title 'Other' here and 'Alpha' before"),
        (GOOD + 'u1,c,5,5,"Two\nlines"\n', r"title of item 'c', 'Two\\nlines', contains a line break"),
        (GOOD + "u1,c,5,5,Gamma,more\n", r"malformed table.*line 5"),
        (HEADER + "u1,c,5,1600000000000,Gamma\n", r"median timestamp is 1600000000000.*milliseconds"),
        (GOOD + "u1,c,5,1e30,Gamma\n", r"row 5: timestamp .* out of range"),
    ],
)
def test_bad_csv(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_csv(tmp_path, text)


def test_bad_places(tmp_path: Path) -> None:
    def load(**source: object) -> Interactions:
        return load_interactions(Source(**source), seed=0)

    with pytest.raises(UserError, match=r"needs data\.source\.path"):
        load(kind="csv")
    with pytest.raises(UserError, match=r"nowhere: no such file or folder"):
        load(kind="movielens", path=tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(
        UserError, match=r"looked for ratings\.csv and movies\.csv; u\.data and u\.item.*found notes\.txt"
    ):
        load(kind="movielens", path=tmp_path)
    with pytest.raises(UserError, match=r"cannot be read"):
        load(kind="csv", path=tmp_path)
    (tmp_path / "latin.csv").write_bytes(HEADER.encode() + b"1,2,3,4,Am\xe9lie\n")
    with pytest.raises(UserError, match=r"not utf-8 text"):
        load(kind="csv", path=tmp_path / "latin.csv")
    with pytest.raises(UserError, match=r"data\.source\.columns\.itm: unknown"):
        load(kind="csv", path=tmp_path / "latin.csv", columns={"itm": "x"})
    (tmp_path / "log.csv").write_text(GOOD)
    with pytest.raises(UserError, match=r"no column 'kind'.*data\.source\.columns\.genres"):
        load(kind="csv", path=tmp_path / "log.csv", columns={"genres": "kind"})


@pytest.mark.skipif("DMPO_MOVIELENS" not in os.environ, reason="DMPO_MOVIELENS names no folder")
def test_real_movielens() -> None:
    path = Path(os.environ["DMPO_MOVIELENS"])
    log = load_interactions(Source(kind="movielens", path=path, duplicate_titles="merge"), seed=0)
    assert log.items["title"].is_unique
    assert set(log.events["item"]) == set(log.items["item"])
    assert log.events["timestamp"].is_monotonic_increasing
    assert not log.events.duplicated(["user", "item"]).any()
