"""The recipes of CONTRIBUTING.md, run as they stand there."""

import re
import sys
from pathlib import Path

import pytest
import torch

from dmpo_dist.config import load_config
from dmpo_dist.data.rules import Rules
from dmpo_dist.errors import UserError
from dmpo_dist.objectives.groups import Groups
from dmpo_dist.objectives.registry import make_objective

TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")


def recipe(name: str) -> str:
    """The code of the recipe that begins with ``name`` in bold."""
    after = TEXT[TEXT.index(f"**{name}.**") :]
    found = re.search(r"```python\n(.*?)```", after, re.DOTALL)
    assert found is not None
    return found[1]


def test_the_objective_trains_by_the_settings_printed_beside_it(tmp_path, monkeypatch):
    (tmp_path / "my_losses.py").write_text(recipe("An objective"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    settings = re.findall(r"objective\.\S+=[^\s`]+", TEXT)
    hinge = make_objective(load_config([], settings).objective)
    groups = Groups(torch.tensor([0, 0, 0]), torch.tensor([True, False, False]), torch.ones(3, dtype=torch.int64), 1)
    policy = torch.tensor([-1.0, -3.0, -2.0], requires_grad=True)
    reference = torch.tensor([-2.0, -1.0, -2.0])
    loss, sums = hinge(policy, reference, groups)
    # beta = 0.25: the mean over both pairs of 1 - beta * (difference of log-ratios), where that is positive
    assert loss.item() == ((1 - 0.25 * (1 + 2)) + (1 - 0.25 * (1 - 0))) / 2
    assert hinge.initial(policy.detach(), groups).tolist() == [1.0]
    loss.backward()
    assert policy.grad is not None
    assert set(sums) == set(hinge.sums)


def test_the_data_source_reads_its_format_and_names_a_broken_row(tmp_path):
    names: dict = {}
    exec(recipe("A data source"), names)
    file = tmp_path / "plays.tsv"
    file.write_text('ann\t200\tm1\tSo "What"\nbob\t100\tm2\tNaima\n', encoding="utf-8")
    log = names["read_plays"](file, Rules())
    assert log.events.to_dict("list") == {
        "user": ["bob", "ann"], "item": ["m2", "m1"], "rating": [5.0, 5.0], "timestamp": [100, 200],
    }  # fmt: skip
    assert dict(zip(log.items["item"], log.items["title"], strict=True)) == {"m1": 'So "What"', "m2": "Naima"}
    file.write_text("ann\t200\tm1\tSo What\nbob\tyesterday\tm2\tNaima\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"plays\.tsv, row 2: .*yesterday"):
        names["read_plays"](file, Rules())
