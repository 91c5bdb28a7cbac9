"""Several commands in the folder of one study: who may work there, and on what."""

import errno
import os
import time

import pytest

from dmpo_dist.artifacts import locks
from dmpo_dist.errors import UserError
from dmpo_dist.experiment.sharing import LOCKS, Alone, Together


def test_several_share_a_folder_and_one_alone_does_not(tmp_path):
    one, other, alone = Together(tmp_path), Together(tmp_path), Alone(tmp_path)
    at_work = pytest.raises(UserError, match=f"process {os.getpid()} on .* is at work there")
    with one.session(), other.session(), at_work, alone.session():
        pass
    with alone.session(), at_work, one.session():
        pass


def test_without_locks_nobody_shares(tmp_path, monkeypatch):
    def flock(file, kind):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    with Alone(tmp_path).session():
        pass
    with pytest.raises(UserError, match="keeps no locks .* leave out --share"), Together(tmp_path).session():
        pass


def test_each_piece_of_work_falls_to_one(tmp_path):
    one, other = Together(tmp_path), Together(tmp_path)
    with one.taken("a") as mine, other.taken("a") as theirs, other.taken("b") as also:
        assert (mine, theirs, also) == (True, False, True)
    with other.taken("a") as theirs:
        assert not theirs, "it was gone through meanwhile, and what failed there would fail again"


def test_the_work_of_a_killed_command_falls_to_another(tmp_path):
    one, other = Together(tmp_path), Together(tmp_path)
    with pytest.raises(KeyboardInterrupt), one.taken("a"):
        raise KeyboardInterrupt
    with other.taken("a") as theirs:
        assert theirs


def test_a_later_command_tries_again(tmp_path):
    with Together(tmp_path).taken("a"):
        pass
    past = time.time() - 10
    os.utime(tmp_path / LOCKS / "a", (past, past))
    with Together(tmp_path).taken("a") as mine:
        assert mine
