"""A loss class of the user's own: what is loaded, and what is refused."""

import pytest
import torch

from dmpo_dist.config import load_config
from dmpo_dist.errors import UserError
from dmpo_dist.objectives.groups import Groups
from dmpo_dist.objectives.registry import make_objective

MODULE = '''
from dmpo_dist.objectives.preference import Preference

class Ipo(Preference):
    """Azar et al., arXiv 2310.12036, averaged over the K pairs."""
    def preference_loss(self, rewards, negatives, groups):
        z = (groups.positive(rewards)[groups.group_id] - rewards) / self.beta
        return groups.mean((z - 1 / (2 * self.beta)) ** 2, negatives)

class Bare:
    """Nothing of ours but the protocol."""
    sums, needs_reference, scores_history = ("loss",), False, False
    def __init__(self, scale: float):
        self.scale = scale
    def initial(self, policy, groups):
        return None
    def __call__(self, policy, reference, groups, history=None):
        loss = -self.scale * groups.positive(policy).sum()
        return loss, {"loss": loss.detach()}

class NoFormula(Preference):
    pass

class NoInitial:
    sums, needs_reference, scores_history = ("loss",), False, False
    def __call__(self, policy, reference, groups, history=None): ...

class NoLoss(Bare):
    sums = ("margin",)

class FewArguments(Bare):
    def __call__(self, policy, reference): ...

def function(): ...
'''
GROUPS = Groups(torch.tensor([0, 0, 0, 1, 1]), torch.tensor([1, 0, 0, 1, 0]) > 0, torch.ones(5, dtype=torch.int64), 2)


@pytest.fixture(autouse=True)
def working_directory(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("project")
    (folder / "losses_of_a_user.py").write_text(MODULE)
    (folder / "broken_losses.py").write_text("1 / 0\n")
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    monkeypatch.delitem(__import__("sys").modules, "losses_of_a_user", raising=False)
    monkeypatch.chdir(folder)


def objective(import_path, *options):
    return make_objective(load_config([], [f"objective.import_path={import_path}", *options]).objective)


def test_ipo_in_three_lines_has_the_papers_value_and_its_own_initial_one():
    ipo = objective("losses_of_a_user:Ipo", "objective.kwargs.beta=0.25")
    policy, reference = torch.tensor([-1.0, -3.0, -2.0, -4.0, -1.0]), torch.tensor([-2.0, -1.0, -2.0, -3.0, -3.0])
    loss, sums = ipo(policy, reference, GROUPS)
    pairs = [[1 - -2, 1 - 0], [-1 - 2]]  # log-ratio of the positive minus each negative's
    assert loss.item() == sum(sum((z - 2) ** 2 for z in of_group) / len(of_group) for of_group in pairs)
    assert ipo.initial(policy, GROUPS).tolist() == [4.0, 4.0] == [ipo(policy, policy, GROUPS)[0].item() / 2] * 2
    assert set(sums) == set(ipo.sums)


def test_a_class_that_knows_nothing_of_ours():
    bare = objective("losses_of_a_user:Bare", "objective.kwargs.scale=2")
    assert bare(torch.tensor([-1.0, 0, 0, -2.0, 0]), None, GROUPS)[0].item() == 6.0


@pytest.mark.parametrize(
    ("import_path", "options", "words"),
    [
        ("no_such_module:Ipo", [], "module no_such_module cannot be imported .*working directory"),
        ("broken_losses:Ipo", [], "module broken_losses cannot be imported .ZeroDivisionError"),
        ("losses_of_a_user:Ip", [], "has no class Ip; its classes are Bare, FewArguments, Ipo"),
        ("losses_of_a_user:function", [], "has no class function"),
        ("losses_of_a_user:Bare", [], r"kwargs=\{\} do not fit Bare\(scale: float\): missing .*'scale'"),
        ("losses_of_a_user:Bare", ["objective.kwargs.scal=1"], "kwargs=.* do not fit Bare"),
        ("losses_of_a_user:Ipo", ["objective.kwargs.bta=1"], "do not fit.*bta"),
        ("losses_of_a_user:Ipo", ["objective.kwargs.beta=-1"], "do not fit: beta: .*greater than 0"),
        ("losses_of_a_user:NoFormula", [], "has no preference_loss"),
        ("losses_of_a_user:NoInitial", [], "the class has no initial; see"),
        ("losses_of_a_user:NoLoss", ["objective.kwargs.scale=1"], "sums is .'margin',., but must be names with 'loss'"),
        ("losses_of_a_user:FewArguments", ["objective.kwargs.scale=1"], "__call__ does not take its 4 arguments"),
    ],
)
def test_what_does_not_fit_is_refused(import_path, options, words):
    with pytest.raises(UserError, match=f"(?s)objective.import_path={import_path}: .*{words}"):
        objective(import_path, *options)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["objective.import_path=losses"], "objective.import_path: must be of the form module:Class"),
        (
            ["objective.import_path=a:B", "objective.beta=1"],
            "objective.beta: is no option beside objective.import_path",
        ),
        (["objective={name: dmpo, import_path: 'a:B'}"], "objective: name=dmpo is an objective of ours"),
        (["objective.name=dmop"], "objective.name: must be one of dmpo, sdpo"),
        (["objective.kwargs={x: 1}"], "objective.kwargs: is no option of objective.name=dmpo"),
    ],
)
def test_an_objective_takes_its_own_options_alone(overrides, words):
    with pytest.raises(UserError, match=words):
        load_config([], overrides)


def test_a_layer_may_change_between_ours_and_the_users(tmp_path):
    ours, theirs = tmp_path / "ours.yaml", tmp_path / "theirs.yaml"
    ours.write_text("objective: {name: sdpo, beta: 0.5, sft_weight: 2}\n")
    theirs.write_text("objective: {import_path: 'a:B', kwargs: {x: 1}}\n")
    assert load_config([ours], ["objective.kwargs.x=1", "objective.import_path=a:B"]).objective.model_dump() == {
        "name": "B", "import_path": "a:B", "kwargs": {"x": 1},
    }  # fmt: skip
    assert load_config([theirs, ours]).objective.beta == 0.5
    assert load_config([ours], ["objective.name=dmpo"]).objective.beta == 0.5, "among ours options stay"
