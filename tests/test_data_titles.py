"""Articles behind a comma come first, HTML entities are decoded, and nothing else changes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmpo_dist.config import config_of
from dmpo_dist.data.sources.read import load_interactions
from dmpo_dist.data.titles import article_first, without_entities
from dmpo_dist.errors import UserError


@pytest.mark.parametrize(
    ("sorted_title", "title"),
    [
        ("Matrix, The (1999)", "The Matrix (1999)"),
        (
            "Cité des enfants perdus, La (City of Lost Children) (1995)",
            "La Cité des enfants perdus (City of Lost Children) (1995)",
        ),
        ("Postino, Il (1994)", "Il Postino (1994)"),
        ("Bug's Life, A (1998)", "A Bug's Life (1998)"),
        ("American President, The", "The American President"),
        ("Crow: City of Angels, The (1996)", "The Crow: City of Angels (1996)"),
        ("Good, the Bad and the Ugly, The (1966)", "The Good, the Bad and the Ugly (1966)"),
        ("Me, Myself & Irene (2000)", "Me, Myself & Irene (2000)"),
        ("Paris, France (1993)", "Paris, France (1993)"),
    ],
)
def test_known_titles(sorted_title, title):
    assert article_first(sorted_title) == (title or sorted_title)


@pytest.mark.parametrize(
    ("written", "title"),
    [
        ("Tom &amp; Jerry&#39;s &#x201c;Ball&#x201D;", "Tom & Jerry's \u201cBall\u201d"),
        ("Nightmares &amp;amp; Dreamscapes", "Nightmares & Dreamscapes"),
        ("AT&T, R&copy and Q&A &co; 100&#", "AT&T, R&copy and Q&A &co; 100&#"),
    ],
)
def test_entities_are_decoded(written, title):
    assert without_entities(written) == title


@given(st.text())
def test_it_does_nothing_the_second_time_and_loses_no_letter(text):
    once = article_first(text)
    assert sorted(once.replace(",", "").replace(" ", "")) == sorted(text.replace(",", "").replace(" ", ""))


def log(folder, titles, **source):
    (folder / "ratings.csv").write_text(
        "userId,movieId,rating,timestamp\n" + "".join(f"1,{i},5,{i}\n" for i in range(len(titles)))
    )
    (folder / "movies.csv").write_text(
        "movieId,title,genres\n" + "".join(f'{i},"{title}",Drama\n' for i, title in enumerate(titles))
    )
    values = {"data.source": {"kind": "movielens", "path": folder} | source}
    return load_interactions(config_of(values).data.source, 0)


def test_a_catalogue_is_rewritten_on_request_and_a_clash_named(tmp_path):
    assert log(tmp_path, ["Matrix, The (1999)", "Up (2009)"]).items["title"].tolist() == [
        "Matrix, The (1999)",
        "Up (2009)",
    ]
    changed = log(tmp_path, ["Matrix, The (1999)", "Up (2009)"], articles="first")
    assert changed.items["title"].tolist() == ["The Matrix (1999)", "Up (2009)"]
    assert "Titles whose article was put first: 1." in changed.notes
    with pytest.raises(UserError, match="The Matrix"):
        log(tmp_path, ["Matrix, The (1999)", "The Matrix (1999)"], articles="first")
    with pytest.raises(UserError, match=r"articles=first has no effect for kind=csv"):
        config_of({"data.source": {"kind": "csv", "articles": "first"}})
