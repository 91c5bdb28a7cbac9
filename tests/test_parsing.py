"""What others wrote is read as values that can be written again, or refused with the file's name."""

import json
import zipfile

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dmpo_dist.data.sources.download import Download, download
from dmpo_dist.errors import UserError
from dmpo_dist.parsing import DEEPEST, parse_json, parse_yaml, parsing, read_text

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63) + 1, 2**63 - 1) | st.floats(allow_nan=False) | TEXT,
    lambda below: st.lists(below, max_size=4) | st.dictionaries(TEXT, below, max_size=4),
    max_leaves=20,
)


@given(PLAIN)
def test_what_can_be_written_is_read_back(content):
    assert parse_json(json.dumps(content)) == content
    assert parse_json(json.dumps(content, ensure_ascii=False), mend_halves=True) == content


REFUSED = {
    r'{"a": "cut \ud83d"}': "half of a character",
    r'{"a\ude00": 1}': "half of a character",
    "[" * (DEEPEST + 2) + "]" * (DEEPEST + 2): "nested more than 64 levels",
    "[" * 100_000: "nested more than 64 levels",
    "[100000000000000000000]": "more than 64 bits",
    "[" + "9" * 5000 + "]": "digits",
    "{": "Expecting",
}


@pytest.mark.parametrize("text", REFUSED)
def test_json_that_no_file_can_hold_again_is_a_value_error(text):
    with pytest.raises(ValueError, match=REFUSED[text]):
        parse_json(text)


def test_pairs_stay_and_halves_become_question_marks():
    assert parse_json(r'["\ud83c\udfac \ud83d"]', mend_halves=True) == ["🎬 ?"]
    assert parse_json(r'["\ud83c\udfac"]') == ["🎬"]


def test_yaml_whose_aliases_multiply_is_refused_before_it_fills_the_memory():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    with pytest.raises(ValueError, match="more than 1,000,000 values"):
        parse_yaml("\n".join(lines))


@pytest.mark.parametrize(
    "text", ["a: &a [*a]", "!!timestamp x", "!!int ''", "2024-13-45", "9" * 5000, "[" * 2000, "a: ["]
)
def test_yaml_that_trips_its_parser_is_a_value_error(text):
    with pytest.raises(ValueError):  # noqa: PT011
        parse_yaml(text)


def test_yaml_means_what_it_did():
    text = "a: [1, 2.5, null, yes, 2024-07-26, x]\nb: {c: &d [e], f: *d}\n"
    assert parse_yaml(text) == yaml.safe_load(text)


def test_a_time_in_yaml_is_no_number_to_the_base_60():
    times = "[12:00:00, 8:30, -1:30, 1:30.5]"
    assert yaml.safe_load(times) == [43200, 510, -90, 90.5], "as YAML 1.1 has it"
    assert parse_yaml(times) == ["12:00:00", "8:30", "-1:30", "1:30.5"]
    numbers = "[0, -7, +3, 1_000, 0x1F, 0b101, 010, 09, 1.5, -1.5e+3, 1., .5, 1e-4, 1.0e-4, .inf, -.INF, '5', 1.2.3]"
    found, expected = parse_yaml(numbers), yaml.safe_load(numbers)
    assert (found, [*map(type, found)]) == (expected, [*map(type, expected)])


@pytest.mark.parametrize("error", [KeyError("x"), OSError(5, "broken"), MemoryError(), ZeroDivisionError()])
def test_whatever_a_parser_raises_names_the_file(error):
    with pytest.raises(UserError, match=r"a\.file: cannot be read .*; look"), parsing("a.file", "look"):
        raise error


def test_text_of_a_folder_of_links_to_itself_is_one_message(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UserError, match="loop: cannot be read"):
        read_text(tmp_path / "loop", "correct it")


def unpacked(folder, *members: tuple[str, bytes]) -> None:
    with zipfile.ZipFile(folder / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(name, content)
    download(Download({"a.zip": "unused"}, "", False, True), folder, True, lambda line: None)


def test_an_archive_unpacks_to_what_it_says_and_no_more(tmp_path):
    unpacked(tmp_path, ("ml/ratings.dat", b"1::2::3\n"))
    assert (tmp_path / "ml/ratings.dat").read_bytes() == b"1::2::3\n"
    for members in ([("ml/bomb", bytes(10**7))], [], [("../evil", b"x")], [("/evil", b"x")]):
        folder = tmp_path / f"n{len(members)}{len(str(members))}"
        folder.mkdir()
        with pytest.raises(UserError, match="so nothing was unpacked"):
            unpacked(folder, *members)
        assert [path.name for path in folder.iterdir()] == ["a.zip"]
