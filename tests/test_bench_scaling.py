"""The cells of a sweep and what is made of them."""

import io

import pandas as pd
import pytest
from matplotlib.image import imread
from rich.console import Console

from dmpo_dist.bench.scaling import ScalingCell, Sweep
from dmpo_dist.bench.scaling_report import report_scaling, scaling_table
from dmpo_dist.planning.flops import Shape, Work, forward_flops, step_flops

SWEEP = Sweep(workers=(2, 4, 8), zero=(1, 3), offload=(False, True), token_budgets=(512, 2048), groups=16)


def test_a_sweep_holds_every_cell_once():
    cells = SWEEP.cells()
    assert len(cells) == len(set(cells)) == len({cell.name for cell in cells})
    settings = {(1, False), (3, False), (3, True)}  # there is no ZeRO-1 offload
    assert {(cell.zero, cell.offload) for cell in cells} == settings
    # strong: 16 groups for all; weak: 8 a worker; at two workers they are one
    assert {(c.workers, c.groups) for c in cells} == {(2, 16), (4, 16), (4, 32), (8, 16), (8, 64)}
    assert len(cells) == len(settings) * 2 * 5


def result(cell: ScalingCell, seconds: float) -> dict:
    """A cell whose ranks need as many CPU seconds as the clock shows."""
    return {
        "workers": cell.workers, "zero": cell.zero, "offload": cell.offload, "token_budget": cell.token_budget,
        "groups": cell.groups, "step_seconds": [9 * seconds, seconds, seconds], "cpu_seconds": seconds,
        "groups_per_second": cell.groups / seconds, "memory_gib": [1.0] * (cell.workers - 1) + [2.0],
        "communication_share": 0.25, "waiting_share": 0.5, "parameters": 10, "device": "cpu", "commit": "0123",
    }  # fmt: skip


def test_efficiency_is_relative_to_the_fewest_workers_of_the_same_setting(tmp_path):
    # ideal strong scaling under ZeRO-1, none at all under ZeRO-3; weak scaling half as good as could be
    def seconds(cell: ScalingCell) -> float:
        slower = cell.token_budget / 512
        if cell.groups == SWEEP.groups:
            return slower * (2 / cell.workers if cell.zero == 1 else 1)
        return 2 * slower

    results = [result(cell, seconds(cell)) for cell in SWEEP.cells()]
    table = scaling_table(results).set_index(["mode", "zero", "offload", "token_budget", "workers"])
    assert (table.xs(("strong", 1), level=("mode", "zero"))["efficiency"] == 1).all()
    strong3 = table.loc["strong", 3, False, 512]
    assert strong3["efficiency"].tolist() == [1, 1 / 2, 1 / 4]
    assert strong3["efficiency_cpu"].tolist() == [1, 1 / 2, 1 / 4]
    assert table.loc["weak", 3, True, 2048]["efficiency"].tolist() == [1, 1 / 2, 1 / 2]
    assert (table["step_ms"] == 1000 * table["step_seconds"].map(min)).all()  # the median, not the slow first step
    assert (table["memory_gib_per_worker"] == 2).all()

    shown = io.StringIO()
    report_scaling(results, tmp_path, Console(file=shown, width=200))
    assert len(pd.read_parquet(tmp_path / "scaling.parquet")) == len(table)
    assert "| strong | ZeRO-3 offload, 512 | 8 | 16 |" in (tmp_path / "scaling.md").read_text()
    assert imread(tmp_path / "scaling.png").std() > 0.05


@pytest.mark.parametrize("rank", [0, 4])
def test_full_training_computes_the_gradient_of_the_weights_too(rank):
    shape, work = Shape(8, 2, 2, 1, 4, 16, 32, rank), Work(10, 55, 3)
    f = forward_flops(shape, work)
    forward = f.linear + f.attention + f.head
    backward = 2 * f.attention + (1 if rank else 2) * (f.linear + f.head) + 2 * f.adapters
    assert step_flops(shape, work) == 2 * forward + f.adapters + backward
