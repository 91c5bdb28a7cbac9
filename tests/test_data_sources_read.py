"""Reading logs: every layout gives the same log, and every kind of bad input one clear error."""

import gzip
import json
import os
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from dmpo_dist.config import DataConfig, Source, load_config
from dmpo_dist.data.database import Database
from dmpo_dist.data.rules import Rules
from dmpo_dist.data.schema import Interactions
from dmpo_dist.data.sources.kinds import kind_of, with_kind
from dmpo_dist.data.sources.read import load_interactions
from dmpo_dist.data.sources.shards import clean_shards
from dmpo_dist.data.tables import read_delimited
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


def test_every_format_gives_the_same_log(tmp_path: Path) -> None:
    """CSV, JSON lines, Parquet with typed columns and Hugging Face folders, under one column map."""
    columns = {"user": "who", "item": "what", "timestamp": "when"}
    rows = [
        {"who": 7, "what": "007", "rating": 4.5, "when": 1_600_000_000, "title": "Golden, Eye"},
        {"who": 8, "what": "b", "rating": 3.0, "when": 1_500_000_000, "title": "Beta"},
    ]
    frame = pd.DataFrame(rows)
    (tmp_path / "hub").mkdir()
    frame.to_csv(tmp_path / "log.csv", index=False)
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    frame.to_parquet(tmp_path / "hub" / "train.parquet")
    Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    frame.assign(when=pd.to_datetime(frame["when"], unit="s", utc=True)).to_parquet(tmp_path / "log.parquet")
    places = {"csv": ["log.csv"], "jsonl": ["log.jsonl"], "parquet": ["log.parquet"], "huggingface": ["hub", "saved"]}
    logs = [
        load_interactions(Source(kind=kind, path=tmp_path / name, columns=columns), seed=0)
        for kind, names in places.items()
        for name in names
    ]
    assert logs[0].events["timestamp"].tolist() == [1_500_000_000, 1_600_000_000]
    assert logs[0].items["item"].tolist() == ["007", "b"]
    for log in logs[1:]:
        pd.testing.assert_frame_equal(log.events, logs[0].events)
        pd.testing.assert_frame_equal(log.items, logs[0].items)
    with pytest.raises(UserError, match=r"hub: no split 'test', it has train"):
        load_interactions(Source(kind="huggingface", path=tmp_path / "hub", split="test"), seed=0)
    with pytest.raises(UserError, match=r"nowhere: `datasets` cannot load it"):
        load_interactions(Source(kind="huggingface", path=tmp_path / "nowhere"), seed=0)


def gzipped(path: Path, rows: list[dict]) -> None:
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


def test_the_amazon_editions_give_one_log(tmp_path: Path) -> None:
    """Reviews joined with metadata: titles on one line, un-escaped; milliseconds as seconds; untitled products out."""
    old, new = tmp_path / "2018", tmp_path / "2023"
    old.mkdir()
    new.mkdir()
    reviews = [("u1", "A1", 5.0, 1_400_000_000), ("u2", "B2", 2.0, 1_300_000_000), ("u2", "C3", 4.0, 1_350_000_000)]
    titles = {"A1": "Tom &amp; Jerry", "B2": " <span class='x'>Two\nlines</span>", "C3": "var aPageStart = getTime()"}
    keys = ("reviewerID", "asin", "overall", "unixReviewTime")
    gzipped(
        old / "Video_Games_5.json.gz", [dict(zip(keys, review, strict=True)) | {"summary": "!"} for review in reviews]
    )
    gzipped(old / "meta_Video_Games.json.gz", [{"asin": item, "title": title} for item, title in titles.items()] * 2)
    keys = ("user_id", "parent_asin", "rating", "timestamp")
    rows = [dict(zip(keys, (u, i, r, 1000 * t + 7), strict=True)) | {"asin": "other"} for u, i, r, t in reviews]
    (new / "Video_Games.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    gzipped(
        new / "meta_Video_Games.jsonl.gz", [{"parent_asin": item, "title": title} for item, title in titles.items()]
    )
    logs = [load_interactions(Source(kind="amazon", path=folder), seed=0) for folder in (old, new)]
    assert [log.name for log in logs] == ["Amazon Video Games 2018", "Amazon Video Games 2023"]
    assert logs[0].items["title"].tolist() == ["Tom & Jerry", "Two lines"]
    assert logs[0].events["timestamp"].tolist() == [1_300_000_000, 1_400_000_000]
    assert "1 reviews of products without a title left out." in logs[0].notes
    pd.testing.assert_frame_equal(logs[0].events, logs[1].events)
    pd.testing.assert_frame_equal(logs[0].items, logs[1].items)
    with pytest.raises(UserError, match=r"set data\.source\.category to one of the categories there: Video_Games"):
        load_interactions(Source(kind="amazon", path=old, category="Books"), seed=0)
    whole = (old / "meta_Video_Games.json.gz").read_bytes()
    (old / "meta_Video_Games.json.gz").write_bytes(whole[:-12])
    with pytest.raises(UserError, match=r"meta_Video_Games\.json\.gz: cut off after row \d+; download it again"):
        load_interactions(Source(kind="amazon", path=old), seed=0)


def test_few_malformed_rows_are_skipped_and_counted(tmp_path: Path) -> None:
    text = GOOD + "u1,c,good,5,Gamma\n,c,5,6,Gamma\nu1,c,5,1600000000000,Gamma\nu3,c,5,7,Gamma\n"
    with pytest.raises(UserError, match=r"row 6: column 'user' is empty"):
        read_csv(tmp_path, text, tolerated_rows=0.4)
    log = read_csv(tmp_path, text, tolerated_rows=0.45)
    assert len(log.events) == 4
    assert "3 malformed rows skipped" in log.notes[0]
    assert "the first in row 5" in log.notes[0]


def test_a_malformed_row_without_item_is_skipped(tmp_path: Path) -> None:
    log = read_csv(tmp_path, GOOD + "u1,,5,5,Gamma\nu1,b_1,1_000,7,Delta\n", tolerated_rows=0.4)
    assert log.items["item"].tolist() == ["a", "b"]
    assert log.notes == [
        "2 malformed rows skipped (no user or item, or no number where one must be), the first in row 5.",
        "1 items without interactions left out.",
    ]


def test_a_repeated_event_keeps_the_first_in_time(tmp_path: Path) -> None:
    log = read_csv(tmp_path, GOOD + "u1,a,1,50,Alpha\n")
    assert log.events.query("user == 'u1' and item == 'a'")["rating"].tolist() == [1.0]
    assert log.notes == ["1 repeated (user, item) events dropped, the first in time kept."]


def test_html_entities_in_titles_are_decoded_and_counted(tmp_path: Path) -> None:
    text = HEADER + "u1,a,5,100,Tom &amp; Jerry&#39;s\nu2,b,4,90,Q&A\nu1,c,4,80,Tom & Jerry's\n"
    with pytest.raises(UserError, match=r"'a' and 'c' share the title"):
        read_csv(tmp_path, text)
    log = read_csv(tmp_path, text, duplicate_titles="merge")
    assert sorted(log.items["title"]) == ["Q&A", "Tom & Jerry's"]
    assert log.notes[0] == "HTML entities decoded in 1 titles."


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
        ("user,item,rating,timestamp\n1,2,3,4\n", r"no column 'title'.*data\.source\.items_path"),
        ("user;item;rating\n1;2;3\n", r"no column 'timestamp'.*data\.source\.columns\.timestamp"),
        ("user/item/rating\n1/2/3\n", r"no column 'user'.*data\.source\.separator"),
        (GOOD + "u1,c,good,5,Gamma\n", r"row 5: rating 'good' is not a number"),
        (GOOD + "u1,c,nan,5,Gamma\n", r"row 5: rating 'nan' is not a number"),
        (GOOD + "u1,c,1_0,5,Gamma\nu1,d,x,5,Delta\n", r"row 5: rating '1_0' is not a number \(2 such rows\)"),
        (GOOD + "u1,c,5,31/05/2024,Gamma\n", r"row 5: timestamp '31/05/2024' is not a moment.*as in 2024-05-31"),
        (GOOD + "\nu1,c,5\n", r"row 6: timestamp '' is not a moment"),
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


def test_a_column_that_occurs_twice_is_refused_by_name(tmp_path: Path) -> None:
    table = pa.table([["u1"], ["a"], [5], ["Ann"], ["Alpha"]], names=["user", "item", "timestamp", "name", "name"])
    pq.write_table(table, tmp_path / "log.parquet")
    source = Source(kind="parquet", path=tmp_path / "log.parquet", columns={"title": "name"})
    message = r"log\.parquet: column 'name' occurs 2 times; rename or remove all but one"
    with pytest.raises(UserError, match=message):
        load_interactions(source, seed=0)
    (tmp_path / "work").mkdir()
    with Database(tmp_path / "work", "500MB") as database, pytest.raises(UserError, match=message):
        clean_shards(database, source, Rules.of(source, "first"), lambda _: None)


def test_a_csv_column_that_occurs_twice_is_refused_and_nameless_ones_are_not(tmp_path: Path) -> None:
    twice = "user,name,item,timestamp,name\nu1,Ann,a,100,Alpha\n"
    with pytest.raises(UserError, match=r"log\.csv: column 'name' occurs 2 times; rename or remove all but one"):
        read_csv(tmp_path, twice, columns={"title": "name"})
    nameless = "user,item,timestamp,title,,\nu1,a,100,Alpha,,\n"
    assert read_csv(tmp_path, nameless).items["title"].tolist() == ["Alpha"]


def test_a_usual_log_loads_as_it_is(tmp_path: Path) -> None:
    """Semicolons, ISO dates with and without time zones, no ratings, an items file with names of its own."""
    (tmp_path / "log.csv").write_text(
        "user;sku;when;shop, city\n"
        "1;a;2024-05-31;x\n1;b;2024-05-31T18:00:00+02:00;x\n2;a;2024-05-31 17:00:00.5Z;x\n2;gone;1717174800;x\n"
    )
    (tmp_path / "items.csv").write_text("id|name|text|genres\na|Alpha|first|Drama\nb|Beta|second|\n")
    source = Source(
        kind="csv",
        path=tmp_path / "log.csv",
        items_path=tmp_path / "items.csv",
        columns={"item": "sku", "timestamp": "when"},
        items_columns={"item": "id", "title": "name", "description": "text"},
        untitled=0.25,
    )
    log = load_interactions(source, seed=0)
    assert log.events["timestamp"].tolist() == [1717113600, 1717171200, 1717174800]
    assert set(log.events["rating"]) == {5.0}
    assert log.items.to_dict("list") == {
        "item": ["a", "b"], "title": ["Alpha", "Beta"], "genres": ["Drama", ""], "description": ["first", "second"]
    }  # fmt: skip
    assert log.notes[0].endswith("If one of 'shop, city' holds ratings, set data.source.columns.rating.")
    assert log.notes[1:] == ["1 items without a title left out with their 1 interactions."]
    with pytest.raises(UserError, match=r"1 items without one have 1 of 4 interactions, more than .*untitled=0\.2"):
        load_interactions(source.model_copy(update={"untitled": 0.2}), seed=0)


def test_repeats_first_last_or_all(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text(GOOD + "u1,a,3,200,Alpha\nu1,a,2,200,Alpha\n")
    source = Source(kind="csv", path=tmp_path / "log.csv")

    def kept(repeats: str) -> list[tuple[int, float]]:
        events = load_interactions(source, 0, repeats).events.query("user == 'u1' and item == 'a'")
        return list(zip(events["timestamp"], events["rating"], strict=True))

    assert (kept("first"), kept("last"), kept("keep")) == ([(100, 5)], [(200, 2)], [(100, 5), (200, 3)])


def test_a_text_of_an_item_is_its_first_that_is_not_blank(tmp_path: Path) -> None:
    text = "user,item,timestamp,title,by\n1,a,1,Home,\n2,a,2,Home,Ann\n3,a,3,Home,Bob\n"
    log = read_csv(tmp_path, text, columns={"author": "by"})
    assert log.items["author"].tolist() == ["Ann"]
    assert "1 items have several texts in author, the first kept." in log.notes
    with pytest.raises(UserError, match=r"data.source.columns.row: dmpo has a column of that name"):
        read_csv(tmp_path, text, columns={"row": "by"})


def test_a_quotation_mark_left_open_is_told(tmp_path: Path) -> None:
    text = 'user,item,timestamp,title,remark\n1,a,1,Home,"x\n2,a,2,Home,y\n3,b,3,Away,z"\n4,b,4,Away,w\n'
    log = read_csv(tmp_path, text)
    assert len(log.events) == 2
    assert any(
        note.startswith("1 fields run over several lines, the first in column 'remark', row 2") for note in log.notes
    )


def test_a_text_of_several_lines_is_no_open_quotation_mark_where_there_are_none(tmp_path: Path) -> None:
    rows = {"user": ["1", "2"], "item": ["a", "b"], "timestamp": [1, 2], "title": ["Home", "Away"], "by": ["x\ny", "z"]}
    Dataset.from_dict(rows).save_to_disk(tmp_path / "saved")
    log = load_interactions(Source(kind="huggingface", path=tmp_path / "saved"), seed=0)
    assert not [note for note in log.notes if "several lines" in note]


def test_dates_without_hyphens_are_no_seconds(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="look like dates without hyphens, as in 20240531"):
        read_csv(tmp_path, HEADER + "u1,a,5,20231231,Alpha\nu2,b,4,20240101,Beta\n")
    assert len(read_csv(tmp_path, HEADER + "u1,a,5,20231231,Alpha\nu2,b,4,20241399,Beta\n").events) == 2


def test_ids_are_read_whole_beside_empty_ones_and_as_floats_of_parquet(tmp_path: Path) -> None:
    large = [1234567890123456789, 1234567890123456790, None]
    frame = pd.DataFrame({"user": pd.array(large, dtype="Int64"), "item": [1.0, 2.0, 2.0], "timestamp": [1, 2, 3]})
    (tmp_path / "shards").mkdir()
    frame.assign(title=["Alpha", "Beta", "Beta"]).to_parquet(tmp_path / "shards" / "part.parquet")
    source = {"kind": "parquet", "tolerated_rows": 0.5}
    log = load_interactions(Source(path=tmp_path / "shards" / "part.parquet", **source), seed=0)
    assert log.events["user"].tolist() == ["1234567890123456789", "1234567890123456790"]
    assert log.events["item"].tolist() == ["1", "2"]
    (tmp_path / "work").mkdir()
    with Database(tmp_path / "work", "500MB") as database:
        shards = Source(path=tmp_path / "shards", **source)
        clean_shards(database, shards, Rules.of(shards, "first"), lambda _: None)
        streamed = database.frame("SELECT user, item FROM log ORDER BY timestamp")
    assert streamed["user"].tolist() == log.events["user"].tolist()
    assert streamed["item"].tolist() == log.events["item"].tolist()


def test_numbers_too_large_for_an_id_do_no_harm_beside_it(tmp_path: Path) -> None:
    rows = pd.DataFrame({"user": [1.0, 2.0], "item": [3.0, 4.0], "timestamp": [5.0, 6.0], "title": ["A", "B"]})
    rows.assign(price=[1e20, 2.0]).to_parquet(tmp_path / "log.parquet")
    log = load_interactions(Source(kind="parquet", path=tmp_path / "log.parquet"), seed=0)
    assert log.events[["user", "item", "timestamp"]].values.tolist() == [["1", "3", 5], ["2", "4", 6]]


def test_equal_titles_are_told_apart_by_a_field(tmp_path: Path) -> None:
    text = "user,item,timestamp,title,by\n1,a,1,Home,Ann\n1,b,2,Home,Bob\n1,c,3,Away,Ann\n"
    options = {"columns": {"author": "by"}, "distinguish_by": "author"}
    log = read_csv(tmp_path, text, **options)
    assert log.items["title"].tolist() == ["Home (Ann)", "Home (Bob)", "Away"]
    with pytest.raises(UserError, match=r"distinguish_by=year: items have item, genres, author"):
        read_csv(tmp_path, text, **(options | {"distinguish_by": "year"}))


def test_the_kind_is_what_lies_at_the_path(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text(GOOD)
    (tmp_path / "log.tsv.gz").write_bytes(gzip.compress(GOOD.replace(",", "\t").encode()))
    (tmp_path / "prefs").mkdir()
    (tmp_path / "prefs/train.jsonl").write_text('{"prompt": "x", "chosen": "a", "rejected": "b"}\n')
    (tmp_path / "sdpo.jsonl").write_text('{"history": ["x"], "itemList": ["a"], "trueSelection": "a"}\n')
    (tmp_path / "odd.bin").write_text("x")
    kinds = {"log.txt": "csv", "log.tsv.gz": "csv", "prefs": "preferences", "sdpo.jsonl": "sdpo"}
    assert {name: kind_of(tmp_path / name) for name in kinds} == kinds
    assert len(load_interactions(Source(kind="csv", path=tmp_path / "log.tsv.gz"), 0).events) == 3
    for name, message in (("odd.bin", r"set data\.source\.kind"), ("nowhere", r"no such file.*=huggingface")):
        with pytest.raises(UserError, match=message):
            kind_of(tmp_path / name)


def test_a_simulated_world_is_never_taken_for_the_users_log(tmp_path: Path) -> None:
    said: list[str] = []
    assert with_kind(DataConfig(), said.append).source.kind == "simulator"
    assert said[0].startswith("SIMULATED WORLD: 2,000 made-up users")
    with pytest.raises(UserError, match=r"kind=simulator makes users and titles up and reads no file"):
        load_config([], ["data.source.kind=simulator", f"data.source.path={tmp_path}"])
    with pytest.raises(UserError, match=r"data\.source\.columns is set but data\.source\.path is not"):
        with_kind(load_config([], ["data.source.columns={user: who}"]).data, said.append)


@pytest.mark.parametrize(
    ("given", "key"),
    [({"split": "test"}, "split"), ({"subset": "en"}, "subset"), ({"category": "Books"}, "category"),
     ({"released_negatives": 3}, "released_negatives"), ({"prompts": "original"}, "prompts"),
     ({"kind": "parquet", "separator": "tab"}, "separator"),
     ({"kind": "movielens", "columns": {"item": "x"}}, "columns"),
     ({"kind": "preferences", "tolerated_rows": 0.1}, "tolerated_rows"),
     ({"kind": "simulator", "path": None, "distinguish_by": "item"}, "distinguish_by")],
    ids=lambda given: next(iter(given)) if isinstance(given, dict) else "",
)  # fmt: skip
def test_a_key_that_reading_does_not_heed_is_refused(tmp_path: Path, given: dict[str, object], key: str) -> None:
    source = Source(**({"kind": "csv", "path": tmp_path / "log.csv"} | given))
    with pytest.raises(UserError, match=rf"data\.source\.{key}=.* has no effect on {source.kind}; leave it out"):
        with_kind(DataConfig(source=source), lambda line: None)


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
    with pytest.raises(UserError, match=r"data\.source\.columns\.itm: 'item' is probably meant"):
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


@pytest.mark.parametrize(
    ("content", "titles"),
    [
        (b"item,title,genres\n1,Film\rnoir,Drama\n2,Up,\n", ["Film\rnoir", "Up"]),
        (b'item,title,genres\r\n1,"Film\r\nnoir",Drama\r\n2,Up,\r\n', ["Film\nnoir", "Up"]),
        (b"item,title,genres\r1,Film noir,Drama\r2,Up,\r", ["Film noir", "Up"]),
    ],
)
def test_lines_end_where_the_file_ends_them(tmp_path, content, titles):
    """pandas ends a line at every carriage return, so that a title was cut and the rest of it became an item."""
    file = tmp_path / "items.csv"
    file.write_bytes(content)
    assert read_delimited(file).to_dict("list") == {"item": ["1", "2"], "title": titles, "genres": ["Drama", ""]}
