"""The first loss: how far it may be from the known one follows from how steep the loss is."""

from types import SimpleNamespace

import pytest
import torch

from dmpo_dist.config import config_of
from dmpo_dist.errors import UserError
from dmpo_dist.objectives.groups import Groups
from dmpo_dist.objectives.registry import make_objective
from dmpo_dist.training.checks import FirstLoss
from dmpo_dist.training.job import Job

GROUPS = Groups(
    torch.tensor([0, 0, 0, 1, 1]), torch.tensor([True, False, False, True, False]), torch.tensor([3, 2, 4, 1, 2]), 2,
    history_lengths=torch.tensor([5, 6]),
)  # fmt: skip
POLICY = torch.tensor([-20.0, -31.0, -25.0, -9.0, -8.0])


class Steep:
    """A loss of a user's own, with a slope of 50 and no beta."""

    sums = ("loss",)
    needs_reference, scores_history = True, False

    def initial(self, policy, groups):
        return policy.new_zeros(groups.count)

    def __call__(self, policy, reference, groups, history=None):
        loss = 50 * groups.positive(reference - policy).sum()
        return loss, {"loss": loss.detach()}


def first(loss, dtype: str) -> FirstLoss:
    config = config_of({"model.dtype": dtype})
    check = FirstLoss(Job("preference", config, "start", config.output_dir), loss, torch.device("cpu"))
    check.count(POLICY, GROUPS)
    return check


def objective(**keys):
    return make_objective(config_of({f"objective.{key}": value for key, value in keys.items()}).objective)


TERM = {"sft_weight": 30.0, "sft_loss_on": "all_titles", "negative_selection": "boundary"}


@pytest.mark.parametrize(
    ("loss", "slope"),
    [
        (objective(name="dmpo"), 1), (objective(name="dmpo", beta=5.0), 5), (objective(name="dmpo", beta=0.1), 1),
        (objective(name="sdpo", **TERM), 1), (objective(name="ipo"), 2), (objective(name="ipo", beta=0.1), 20),
        (objective(name="ipo", beta=0.1, **TERM), 20), (Steep(), 50),
    ],
)  # fmt: skip
@pytest.mark.parametrize(("dtype", "nats"), [("bfloat16", 2e-2), ("float32", 1e-4)])
def test_the_first_loss_may_differ_by_as_much_as_rounding_makes_of_it(one_rank, loss, slope, dtype, nats):
    notes = []
    runtime = SimpleNamespace(log=notes.append)
    known = loss.initial(POLICY, GROUPS).mean().item()
    for away, good in ((0.0, True), (0.9, True), (-0.9, True), (1.1, False), (-1.1, False)):
        line = {"loss": 7.0, "preference_loss": known + away * nats * slope}
        if good:
            first(loss, dtype).check(line, GROUPS.count, runtime)
            continue
        with pytest.raises(UserError, match="first preference loss"):
            first(loss, dtype).check(line, GROUPS.count, runtime)
    assert len(notes) == 3
