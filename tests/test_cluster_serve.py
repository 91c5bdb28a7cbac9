"""Requests whose copy of the model dies are asked again; what cannot be answered says when to try again."""

import asyncio

import pytest

from dmpo_dist.errors import UserError

pytest.importorskip("ray.serve", reason="extra [serve]")

from ray.exceptions import ActorDiedError
from ray.serve.exceptions import DeploymentUnavailableError

from dmpo_dist.cluster import serve
from dmpo_dist.serving.backend import UnavailableError

STATE = {"engine": {}}


class Handle:
    """A Ray Serve handle whose answers come one after another; an exception is what a lost copy raises."""

    def __init__(self, *answers):
        self.answers, self.asked = list(answers), []
        self.call = self

    def remote(self, method, argument):
        self.asked.append((method, argument))
        return self._answer(self.answers.pop(0))

    async def _answer(self, answer):
        if isinstance(answer, Exception):
            raise answer
        return answer


def ask(handle, seconds=5.0):
    backend = serve.CopiesBackend(seconds, handle)
    return asyncio.run(backend.call("rerank", {"a": 1})), backend


def test_a_request_of_a_dead_copy_is_asked_of_another(monkeypatch):
    monkeypatch.setattr(serve, "PAUSE", 0.01)
    handle = Handle(ActorDiedError(), ActorDiedError(), {"copy": "b", "state": STATE, "answer": {"results": []}})
    answer, backend = ask(handle)
    assert answer == {"results": []}
    assert handle.asked == [("rerank", {"a": 1})] * 3
    assert backend.states == {"b": STATE}


def test_without_any_copy_the_client_is_told_to_try_again(monkeypatch):
    monkeypatch.setattr(serve, "PAUSE", 0.01)
    with pytest.raises(UnavailableError) as told:
        ask(Handle(*[ActorDiedError()] * 100), seconds=0.1)
    assert told.value.seconds > 0
    with pytest.raises(UnavailableError):
        ask(Handle(DeploymentUnavailableError(None)))


def test_a_mistake_is_told_and_asked_once():
    handle = Handle({"copy": "a", "state": STATE, "mistake": "history: 'x' is unknown"})
    with pytest.raises(UserError, match="'x' is unknown"):
        ask(handle)
    assert len(handle.asked) == 1


def test_the_failure_of_a_deployment_is_told_in_a_line():
    report = "Deploying application dmpo failed: ...\n  raise UserError(x)\ndmpo_dist.errors.UserError: m: no weights\n"
    assert serve._why_not_deployed(report) == "m: no weights"
    assert "--without-ray" in serve._why_not_deployed("Deploying application dmpo failed\nSegmentation fault")
