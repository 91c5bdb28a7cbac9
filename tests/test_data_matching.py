"""Requests against a catalogue, and the files that ranked titles are written to."""

import json

import pandas as pd
import pyarrow as pa
import pytest

from dmpo_dist.commands.ranked_files import SCHEMA, WRITERS, with_ids
from dmpo_dist.data.matching import matched, requests_of_data, with_taken_by_id
from dmpo_dist.data.requests import Catalogue, RankingRequest, read_catalogue, read_requests
from dmpo_dist.errors import UserError

CATALOGUE = Catalogue(("Heat", "Yes | No", "7"), None, ("7", "8", "9"))


def test_titles_and_ids_are_found_and_a_name_of_two_items_is_refused():
    request = RankingRequest("u", ("8", "9", "Heat"), ("9", "8"))
    found = RankingRequest("u", ("Yes | No", "7", "Heat"), ("7", "Yes | No"))
    assert matched([request], CATALOGUE, "users.csv") == [found]
    with pytest.raises(UserError, match="'7' is a title, and the id of another item, 'Heat': write '9', the title's"):
        matched([RankingRequest("u", ("7",), None)], CATALOGUE, "users.csv")
    with pytest.raises(UserError, match="user 'u' has the candidate 'Yes | No' twice, as title or id"):
        matched([RankingRequest("u", ("8",), ("8", "Heat", "Yes | No"))], CATALOGUE, "users.csv")
    strange = RankingRequest("u", ("heat", "Heat"), None)
    with pytest.raises(UserError, match=r"users.csv: 1 titles or ids .*'heat' of user 'u' \(nearest: 'Heat'\).*--keep"):
        matched([strange], CATALOGUE, "users.csv")
    assert matched([strange], CATALOGUE, "users.csv", keep_unknown=True) == [strange]


def test_a_separator_within_a_title_is_escaped(tmp_path):
    (tmp_path / "users.csv").write_text("user,history\nu,Heat|Yes \\| No\n")
    (tmp_path / "users.jsonl").write_text('{"user": "u", "history": ["Heat", "Yes | No"]}\n')
    for kind in ("csv", "jsonl"):
        assert read_requests(tmp_path / f"users.{kind}") == [RankingRequest("u", ("Heat", "Yes | No"), None)]


def test_ids_of_a_catalogue_differ(tmp_path):
    (tmp_path / "items.jsonl").write_text('{"item": 1, "title": "Heat"}\n{"item": 1, "title": "Up"}\n')
    with pytest.raises(UserError, match=r"2 rows with an item id that is empty or occurs more .*: '1' \(row 1\)"):
        read_catalogue(tmp_path / "items.jsonl")


def test_users_of_prepared_data_are_asked_after_all_their_likes(world):
    data = world.data
    user = data.test["user"][0]
    (request,) = requests_of_data(data, [user])
    likes = data.interactions.query("user == @user and rating >= 4").sort_values(["timestamp", "item"])["item"]
    title = dict(zip(data.items["item"], data.items["title"], strict=True))
    history = tuple(title[item] for item in likes)[-20:]
    taken = data.interactions.query("user == @user")["item"]
    rest = {title[item] for item in taken} - {*history}
    assert request == RankingRequest(user, history, None, tuple(sorted(rest)), tuple(sorted(taken.unique())))
    assert rest, "older likes, and what was taken and not liked"
    other = Catalogue(("Elsewhere", "Never taken"), None, (taken.iloc[0], "no such item"))
    (there,) = with_taken_by_id([request], other)
    assert {*there.taken} == rest | {"Elsewhere"}, "by its id, whatever the catalogue calls it"
    assert user in {request.user for request in requests_of_data(data)}
    with pytest.raises(UserError, match=r"user 'nobody' has no like in"):
        requests_of_data(data, ["nobody"])


def test_every_kind_of_output_holds_the_same(tmp_path):
    rows = [{"user": "u", "titles": ["Yes | No", "Heat"], "scores": [-1.5, -2.0]}]
    rows += [{"user": "v", "titles": ["Heat"], "scores": [0.1]}]
    tables = [with_ids(pa.Table.from_pylist([row], SCHEMA), CATALOGUE) for row in rows]
    for kind, write in WRITERS.items():
        write(tmp_path / f"ranked{kind}", iter(tables))
    parquet = pd.read_parquet(tmp_path / "ranked.parquet")
    lines = [json.loads(line) for line in (tmp_path / "ranked.jsonl").read_text().splitlines()]
    assert lines == [rows[0] | {"items": ["8", "7"]}, rows[1] | {"items": ["7"]}]
    assert [list(row) for row in parquet["items"]] == [line["items"] for line in lines]
    long = pd.read_csv(tmp_path / "ranked.csv", dtype={"item": str})
    assert long.to_dict("list") == {
        "user": ["u", "u", "v"], "rank": [1, 2, 1], "item": ["8", "7", "7"],
        "title": ["Yes | No", "Heat", "Heat"], "score": [-1.5, -2.0, 0.1],
    }  # fmt: skip
