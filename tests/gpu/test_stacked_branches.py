"""The arithmetic of ``mfu.StackedBranches`` on the CPU, flash attention on the prompts replaced by plain arithmetic."""

import pytest
import torch
from conftest import random_groups
from mfu import StackedBranches
from test_modeling_attention import EDGES, PlainVarlen, attend

from dmpo_dist.batching.layout import prefix_layout
from dmpo_dist.modeling import attention, flash
from dmpo_dist.modeling.attention import dense_attention, two_part_attention


class PlainPrompts(PlainVarlen):
    """Rows behind the last offset, the branches', are left as they are: nothing may be read from them."""

    @staticmethod
    def _bound(operator, args, kwargs):
        names = [argument.name for argument in operator._schema.arguments if not argument.kwarg_only]
        return dict(zip(names, args, strict=True)) | kwargs


@pytest.mark.parametrize("groups", [*EDGES.values(), random_groups(5, seed=3, response=20)])
def test_stacked_branches_are_one_softmax_with_the_prompt(monkeypatch, groups):
    plain = PlainPrompts()
    monkeypatch.setattr(flash, "_cuda_forward", plain.forward)
    monkeypatch.setattr(flash, "_cuda_backward", plain.backward)
    monkeypatch.setattr(torch, "empty_like", lambda x, **kwargs: torch.full_like(x, torch.nan, **kwargs))
    monkeypatch.setattr(attention, "flash_for", lambda query: StackedBranches)
    layout = prefix_layout(groups)
    for seen, expected in zip(attend(two_part_attention, layout), attend(dense_attention, layout), strict=True):
        torch.testing.assert_close(seen, expected, rtol=1e-11, atol=1e-11)
