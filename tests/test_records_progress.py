"""The rate and the time left that a long job prints."""

import io

import pytest
from rich.console import Console

from dmpo_dist.records import progress
from dmpo_dist.records.progress import UserProgress


@pytest.mark.parametrize("counted", ["one by one", "at once"])
def test_users_of_one_forward_pass_are_one_moment(monkeypatch, counted):
    lines = printed(monkeypatch, [20, 20, 20], 20.0, counted)
    shown = "1/60" if counted == "one by one" else "20/60"
    assert lines[1] == f"[scoring    20s] {shown} users", "no rate before a second pass"
    assert lines[2].startswith("[scoring    40s]")
    assert ", 1.0 users/s, ETA 0:" in lines[2]
    assert lines[-1] == "[scoring    60s] 60/60 users, 1.0 users/s, ETA 0:00"


def test_a_single_pass_has_no_rate(monkeypatch):
    lines = printed(monkeypatch, [10], 3.0, "one by one")
    assert lines[-1] == "[scoring     3s] 10/10 users"


def test_users_of_an_earlier_run_are_not_in_the_rate(monkeypatch):
    lines = printed(monkeypatch, [2] * 5, 20.0, "one by one", done=100)
    assert lines[-1] == "[scoring   100s] 110/110 users, 0.1 users/s, ETA 0:00"


def test_a_slow_job_tells_the_time_of_each(monkeypatch):
    lines = printed(monkeypatch, [1] * 4, 90.0, "one by one")
    assert lines[2] == "[scoring   180s] 2/4 users, 90 s each, ETA 3:00"


def printed(monkeypatch, passes, seconds, counted, done=0):
    """The lines of a job whose forward passes take ``seconds`` each, two microseconds between users of one pass."""
    clock, out = [1000.0], io.StringIO()
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with UserProgress("scoring", done + sum(passes), done, Console(file=out, width=200)) as shown:
        for users in passes:
            clock[0] += seconds
            for part in [1] * users if counted == "one by one" else [users]:
                clock[0] += 2e-6
                shown.advance(part)
    return out.getvalue().splitlines()
