"""`dmpo bench serve`: the loop's scores are the model's, and its waiting follows from its seconds for a request."""

import numpy as np

from dmpo_dist.bench.serving import queued
from dmpo_dist.bench.serving_load import Load, Loop, requests_of
from dmpo_dist.config import ModelConfig
from dmpo_dist.modeling.ranking_model import RankingModel


def test_one_after_the_other():
    np.testing.assert_allclose(queued(np.array([0.0, 1.0, 1.5, 9.0]), 2.0), [2.0, 3.0, 4.5, 2.0])
    np.testing.assert_allclose(queued(np.arange(5.0), 0.25), [0.25] * 5)


def test_requests_have_the_asked_length_and_the_loop_scores_them(world):
    config = ModelConfig(max_length=256)
    model = RankingModel.load(str(world.model), config)
    load = Load(str(world.model), world.titles, 90, 6, 0.5, 1, (), 0, 1, 1)
    asked = requests_of(load, model)
    requests = [next(asked) for _ in range(12)]
    for request in requests:
        assert 90 <= len(request.group.prefix) < 90 + 20
        assert len(set(request.documents)) == 6
        assert not set(request.documents) & set(request.history)
    histories = [tuple(request.history) for request in requests]
    assert 1 < len(set(histories)) < 12, "some come back"
    loop, request = Loop(str(world.model), config), requests[0]
    expected = model.score(request.history, request.documents)
    for sparing in (True, False):
        scores = [loop.score(request.group.prefix, branch, sparing) for branch in request.group.branches]
        np.testing.assert_allclose(scores, expected, atol=1e-5)
