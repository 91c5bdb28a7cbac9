"""Damaged files, read in this process: what comes back is the content, or a UserError."""

import random

import pytest
import tally
from readers import make_readers

SAMPLE, ALL = 400, 6000


def fuzz(readers, cases: int, seed: int) -> list[str]:
    """The distinct ends of tracebacks after ``cases`` damaged files, spread over all classes."""
    found: dict[str, str] = {}
    kinds = list(readers)
    for case in range(cases):
        kind = kinds[case % len(kinds)]
        failure = tally.try_once(kind, readers[kind].attempt(random.Random(f"{seed} {case}")))
        if failure:
            found.setdefault(failure.partition(" at ")[2], f"{kind}, case {case}: {failure}")
    return list(found.values())


@pytest.fixture(scope="module")
def readers(world, tmp_path_factory):
    return make_readers(tmp_path_factory.mktemp("readers"), world)


def test_a_whole_file_of_each_class_is_read(readers):
    for kind, reader in readers.items():
        reader.file.write_bytes(reader.whole)
        try:
            reader.use()
        except Exception as error:
            raise AssertionError(f"{kind}: the undamaged file is refused") from error


def test_a_damaged_file_is_never_a_traceback(readers):
    assert fuzz(readers, SAMPLE, seed=0) == []


@pytest.mark.faults
def test_no_damaged_file_of_thousands_is_a_traceback(readers):
    assert fuzz(readers, ALL, seed=1) == []
