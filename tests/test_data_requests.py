"""What users and catalogues are read from, and what is refused, with user, title or row named."""

import numpy as np
import pandas as pd
import pytest
from worlds import prepared

from dmpo_dist.data.requests import RankingRequest, check_against, read_catalogue, read_requests
from dmpo_dist.errors import UserError

ROWS = {
    "user": ["u1", "u2"],
    "history": [["Heat", "Up"], ["Alien"]],
    "candidates": [["Tron", "Alien"], ["Heat"]],
}


def write(folder, columns, kind):
    """A table as Parquet, or as CSV with lists joined."""
    frame, path = pd.DataFrame(columns), folder / f"table.{kind}"
    if kind == "parquet":
        frame.to_parquet(path)
    else:
        frame.map(lambda cell: "|".join(cell) if isinstance(cell, list) else cell).to_csv(path, index=False)
    return path


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_requests(tmp_path, kind):
    expected = [RankingRequest("u1", ("Heat", "Up"), ("Tron", "Alien")), RankingRequest("u2", ("Alien",), ("Heat",))]
    assert read_requests(write(tmp_path, ROWS, kind)) == expected
    without = {name: ROWS[name] for name in ("user", "history")}
    assert [request.candidates for request in read_requests(write(tmp_path, without, kind))] == [None, None]


@pytest.mark.parametrize("kind", ["parquet", "csv"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"user": ["u1", "u1"]}, r"2 rows with a user who occurs more than once: 'u1' \(row \d\), 'u1' \(row \d\)"),
        ({"user": ["u1", " "]}, r"1 row with no user: row \d"),
        ({"history": [[], ["Up"]]}, r"1 row with an empty history: 'u1' \(row \d\)"),
        ({"history": [["", " "], ["Up"]]}, r"1 row with an empty history: 'u1' \(row \d\)"),
        ({"candidates": [["Tron"], []]}, r"1 row with no usable candidates: 'u2' \(row \d\)"),
        ({"candidates": [["Tron", "Up", "Tron"], ["Up"]]}, r"a candidate that occurs twice: 'u1' \(row \d\): 'Tron'"),
    ],
)
def test_bad_requests_are_named(tmp_path, kind, change, message):
    with pytest.raises(UserError, match=message):
        read_requests(write(tmp_path, ROWS | change, kind))


def test_ids_that_are_numbers_are_those_of_prepared_data(tmp_path):
    """A column beside an empty cell, or one that pandas had read as floats, has whole numbers with a point."""
    numbers = {"user": [1.0, 2.0], "history": [[7, 8], [9]], "candidates": [[10.0, 11.0], [12.0]]}
    expected = [RankingRequest("1", ("7", "8"), ("10", "11")), RankingRequest("2", ("9",), ("12",))]
    pd.DataFrame(numbers).to_json(tmp_path / "table.jsonl", orient="records", lines=True)
    for path in (write(tmp_path, numbers, "parquet"), tmp_path / "table.jsonl"):
        assert read_requests(path) == expected
    items = read_catalogue(write(tmp_path, {"title": [1984.0, 1917.0], "item": [1.0, 2.0]}, "parquet"))
    assert (items.titles, items.ids) == (("1984", "1917"), ("1", "2"))
    for odd in ([True], [0.5], 7, [["Heat"]]):
        lines = pd.DataFrame({"user": ["u1"], "history": [odd]}).to_json(orient="records", lines=True)
        (tmp_path / "odd.jsonl").write_text(lines)
        with pytest.raises(UserError, match="row 1: history is .*; it must be a list of titles or item ids"):
            read_requests(tmp_path / "odd.jsonl")


def test_bad_files(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_requests(tmp_path / "none.parquet")
    with pytest.raises(UserError, match="no column 'history' .*it has 'user'"):
        read_requests(write(tmp_path, {"user": ["u1"]}, "parquet"))
    (tmp_path / "text.parquet").write_text("user,history\n")
    with pytest.raises(UserError, match="cannot be read"):
        read_requests(tmp_path / "text.parquet")
    with pytest.raises(UserError, match="row 1: history is 'Heat'; it must be a list"):
        read_requests(write(tmp_path, {"user": ["u1"], "history": ["Heat"]}, "parquet"))
    with pytest.raises(UserError, match="holds no rows"):
        read_requests(write(tmp_path, {"user": [], "history": []}, "parquet"))


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_catalogue(tmp_path, kind):
    read = read_catalogue(write(tmp_path, {"title": ["Heat", "Up"], "popularity": [3, 0]}, kind))
    assert (read.titles, read.counts.tolist()) == (("Heat", "Up"), [3, 0])
    assert read_catalogue(write(tmp_path, {"title": ["Heat"]}, kind)).counts is None
    for columns, message in [
        ({"title": ["Heat", "Up", "Heat"]}, r"2 rows with a title that occurs more than once: 'Heat' \(row \d\)"),
        ({"title": ["Heat", " "]}, r"1 row with no title: row \d"),
        ({"title": ["Heat", "Up"], "popularity": [1.5, -1]}, "2 rows with a popularity that is not a count: row"),
    ]:
        with pytest.raises(UserError, match=message):
            read_catalogue(write(tmp_path, columns, kind))


def test_the_popularity_of_prepared_data_counts_likes_as_every_baseline_does(tmp_path):
    rng = np.random.default_rng(0)
    rows = [
        {"user": f"u{u}", "item": f"i{item}", "title": f"T{item}", "rating": 3 + u % 3, "timestamp": 100 * u + place}
        for u in range(60)
        for place, item in enumerate(rng.permutation(20)[:12])
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "log.csv", index=False)
    data = prepared(tmp_path / "data", source={"path": str(tmp_path / "log.csv")})
    catalogue, log = read_catalogue(tmp_path / "data"), data.interactions
    liked = log[log["rating"] >= 4]["item"].value_counts()
    assert catalogue.counts.tolist() == [liked.get(item, 0) for item in catalogue.ids]
    assert 0 < catalogue.counts.sum() < len(log)


def test_requests_against_the_catalogue(tmp_path):
    catalogue = read_catalogue(write(tmp_path, {"title": ["Heat", "Up"]}, "csv"))
    strange = [RankingRequest("u1", ("Up",), ("Heat", "Tron"))]
    with pytest.raises(UserError, match="not in the catalogue: 'u1': 'Tron'"):
        check_against(strange, catalogue, tmp_path, exclude_history=True)
    full = [RankingRequest("u7", ("Up", "Heat", "Tron"), None)]
    with pytest.raises(UserError, match="no usable candidates: 'u7'"):
        check_against(full, catalogue, tmp_path, exclude_history=True)
    check_against(full, catalogue, tmp_path, exclude_history=False)
