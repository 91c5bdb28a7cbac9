"""The comparison end to end on a tiny model, its guard, and the gate's verdicts."""

import copy
import json
from importlib.util import find_spec
from itertools import pairwise

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from dmpo_dist.batching.synthetic import random_groups
from dmpo_dist.bench.gate import read_baseline, violations
from dmpo_dist.bench.implementations import BENCH_MODEL, LORA_RANK, LayoutImplementation, ModelSpec
from dmpo_dist.bench.settings import SpeedCell, check_outputs, make_settings
from dmpo_dist.bench.speed import check_agreement, step_flops_of
from dmpo_dist.bench.timing import Turn, fastest
from dmpo_dist.cli import app, main
from dmpo_dist.errors import UserError
from dmpo_dist.planning.flops import forward_flops, shape_of, shared_work, unshared_work

needs_trl = pytest.mark.skipif(find_spec("trl") is None, reason="needs trl: pip install 'dmpo_dist[bench]'")
TINY = BENCH_MODEL | {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
    "intermediate_size": 48, "initializer_range": 0.2,
}  # fmt: skip
SPEC = ModelSpec(TINY | {"vocab_size": 97}, "cpu", "float32")
GROUPS = random_groups(2, 16, 5, 2, 97)
FIGURES = {
    "groups_per_second", "logical_tokens_per_second", "physical_tokens_per_second", "reuse", "padding", "mfu",
    "peak_memory_mib", "seconds_per_group", "seconds_per_group_quartiles", "flops_per_group",
}  # fmt: skip


def settings(**values):
    standard = {"prompts": [], "negatives": [], "vocabs": [], "response": 12, "model_config": None, "device": "cpu"}
    return make_settings(
        **standard | {"threads": 1, "rounds": 2, "with_trl": False, "groups_per_row": 1, "compiled": False} | values
    )


@pytest.fixture(scope="module")
def ours():
    return LayoutImplementation(SPEC, True, 21)


def test_the_guard_passes_equals_and_catches_another_model(ours):
    """Weights, adapters and ids are the same for all; one weight of one implementation moved is noticed."""
    unshared = LayoutImplementation(SPEC, False, 21)
    assert check_agreement({"ours": ours, "unshared": unshared}, GROUPS[0], 1e-4) < 1e-4
    with torch.no_grad():
        next(p for n, p in unshared._model.named_parameters() if "lora_B" in n).add_(0.05)
    with pytest.raises(UserError, match="log-probs of unshared differ from ours by .* no ratio is given"):
        check_agreement({"ours": ours, "unshared": unshared}, GROUPS[0], 1e-4)


@needs_trl
def test_trl_computes_the_same_in_any_batching():
    from dmpo_dist.bench.trl_pairs import TrlImplementation

    trl = TrlImplementation(SPEC, pairs_per_batch=2)
    field = {"ours": LayoutImplementation(SPEC, True, 21), "trl": trl}
    assert check_agreement(field, GROUPS[0], 1e-4) < 1e-4
    gradients: list[torch.Tensor] = []
    trl._optimizer.register_step_pre_hook(lambda optimizer, *_: gradients.append(_gradients(optimizer)))
    trl._optimizer.param_groups[0] |= {"lr": 0.0, "weight_decay": 0.0}
    for variant in (trl.with_batches(1, 2), trl.with_batches(2, 2), trl.with_batches(4, 2)):
        variant.step(GROUPS)
    for one, other in pairwise(gradients):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)
    assert trl.tokens(GROUPS[0]).logical == field["ours"].tokens(GROUPS[0]).logical == 3 * 21


def _gradients(optimizer):
    return torch.cat([p.grad.flatten() for group in optimizer.param_groups for p in group["params"]])


def test_groups_in_one_row_take_the_same_step(ours):
    """One row of two groups and two rows of one: the same loss gradient, so the same adapters after the step."""
    after = []
    for rows in (1, 2):
        implementation = LayoutImplementation(SPEC, True, 21).with_rows(rows, 2)
        implementation.step(GROUPS)
        after.append(torch.cat([p.detach().flatten() for p in implementation._model.parameters() if p.requires_grad]))
    assert torch.allclose(*after, atol=1e-6)


def test_the_flops_of_a_step_are_those_torch_counts(tmp_path):
    """All matrix products but those a kernel hides from torch (attention) and the gradient of the first layer's input:
    nothing asks for that."""
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    asked = settings(prompts=[16], negatives=[2], vocabs=[97], response=5, model_config=tmp_path / "config.json")
    [cell] = asked.cells
    counted_by_us = step_flops_of(cell, asked)
    shape = shape_of(asked.spec(cell).transformers_config, LORA_RANK)
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    unasked = 2 * shape.hidden * (queries + 2 * keys) + 3 * 2 * shape.hidden * LORA_RANK
    for shared, work in ((True, shared_work(16, 5, 2)), (False, unshared_work(16, 5, 2))):
        implementation = LayoutImplementation(asked.spec(cell), shared, 21)
        with FlopCounterMode(display=False) as counter:
            implementation.step(random_groups(1, 16, 5, 2, 97))
        products = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
        attention = 4 * forward_flops(shape, work).attention  # reference, policy and twice backward
        assert counted_by_us[implementation.name] - attention - unasked * work.tokens == products


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompts": [9000]}, "--prompt 9000 with --response 12 exceeds the model's 8192 positions"),
        ({"device": "tpu"}, "--device tpu is not known; choose auto, cpu or cuda"),
    ],
)
def test_bad_values_name_the_flag(values, message):
    with pytest.raises(UserError, match=message):
        settings(**values)


@pytest.mark.parametrize("flag", ["--prompt=0", "--negatives=-1", "--vocab=15", "--response=1", "--rounds=0"])
def test_values_out_of_range_name_the_flag(flag):
    done = CliRunner().invoke(app, ["bench", "speed", flag], env={"COLUMNS": "200"})
    assert done.exit_code == 2
    assert flag.partition("=")[0] in done.output


def test_bad_models_name_the_file(tmp_path):
    file = tmp_path / "config.json"
    for content, message in [
        ("{", "cannot be read"),
        ("{}", "names no model_type"),
        ('{"model_type": "lama"}', "not a configuration transformers can use"),
        ('{"model_type": "mixtral", "vocab_size": 97}', "mixture of experts"),
    ]:
        file.write_text(content)
        with pytest.raises(UserError, match=message):
            settings(model_config=file)


def test_without_trl_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr("dmpo_dist.bench.trl_pairs.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'dmpo_dist\[bench\]'.*--without-trl"):
        settings(with_trl=True)
    assert not settings(with_trl=False).with_trl


def test_defaults_are_the_grid():
    asked = settings()
    assert len(asked.cells) == 24
    assert asked.cells[0] == SpeedCell(64, 1, 4096, 12)
    assert asked.dtype == "float32"


def test_what_does_not_fit_is_passed_over(monkeypatch):
    """The fastest of what fits is found; nothing that fits is an error."""
    monkeypatch.setattr("dmpo_dist.bench.timing.MIN_TURN_SECONDS", 0.0)
    monkeypatch.setattr(
        "dmpo_dist.bench.timing.time_rounds", lambda field, *_: {n: [c.turn()] for n, c in field.items()}
    )

    class Fake:
        def __init__(self, seconds):
            self.seconds, self.groups_per_step = seconds, 1

        def turn(self):
            if self.seconds is None:
                raise torch.OutOfMemoryError
            return Turn(self.seconds, self.seconds)

    slow, fast, large = Fake(3.0), Fake(1.0), Fake(None)
    best, seen = fastest({"1": slow, "8": fast, "32": large}, GROUPS, "cuda", 1)
    assert best is fast
    assert seen == {"1": 3.0, "8": 1.0}
    with pytest.raises(torch.OutOfMemoryError):
        fastest({"1": large}, GROUPS, "cuda", 1)


def test_files_are_kept(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(UserError, match="a.json exists already and is kept"):
        check_outputs(tmp_path / "a.json")
    with pytest.raises(UserError, match="write to another folder"):
        check_outputs(tmp_path / "a.json" / "b.json")


def made(memory=20.0, trl=10.0, unshared=5.0):
    """A result with one cell, as far as the gate reads it."""
    cell = {"prompt": 256, "negatives": 7, "vocab": 4096, "response": 12}
    cell |= {"speedup_trl": trl, "speedup_unshared": unshared, "implementations": {"ours": {"peak_memory_mib": memory}}}
    head = {"model": TINY, "device_type": "cpu", "dtype": "float32", "threads": 1, "rounds": 2, "with_trl": True}
    return {**head, "cells": [cell]}


@pytest.mark.parametrize(
    ("now", "complaints"),
    [
        ({}, []),
        ({"memory": 20.9, "trl": 7.6, "unshared": 3.8}, []),
        ({"memory": 10.0, "trl": 20.0}, []),
        ({"memory": 21.1}, ["memory 21.1 MiB"]),
        ({"trl": 7.4}, ["speed-up over trl 7.40 is 26% below the baseline's 10.00"]),
        ({"trl": None, "unshared": 3.7}, ["speed-up over unshared"]),
        ({"memory": 30.0, "trl": 1.0}, ["memory 30.0", "over trl"]),
    ],
)
def test_the_gate_finds_planted_regressions(now, complaints):
    lines = violations(made(), made(**now))
    assert len(lines) == len(complaints)
    for line, part in zip(lines, complaints, strict=True):
        assert part in line
        assert line.startswith("P=256 K=7 V=4096")


def test_a_cell_left_out_is_a_violation():
    assert violations(made(), made() | {"cells": []}) == ["P=256 K=7 V=4096 R=12: was not measured"]


def test_the_gate_refuses_other_files(tmp_path):
    (tmp_path / "a.json").write_text('{"cells": []}')
    with pytest.raises(UserError, match="has no model, device_type"):
        read_baseline(tmp_path / "a.json")
    with pytest.raises(UserError, match="cannot be read"):
        read_baseline(tmp_path / "missing.json")


@needs_trl
@pytest.mark.integration
def test_the_command_measures_draws_and_gates(tmp_path, monkeypatch, capsys):
    """A tiny grid through the real command; then the gate on its result, with a regression planted and without."""
    monkeypatch.setattr("dmpo_dist.bench.timing.MIN_TURN_SECONDS", 0.1)
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    out = tmp_path / "speed.json"
    grid = ["--prompt", "16", "--negatives", "2", "--vocab", "97", "--rounds", "2", "--threads", "1", "--device", "cpu"]
    app(
        [
            "bench",
            "speed",
            *grid,
            "--model-config",
            f"{tmp_path}/config.json",
            "--json",
            str(out),
            "--groups-per-row",
            "3",
        ],
        standalone_mode=False,
    )
    result = json.loads(out.read_text())
    assert out.with_suffix(".png").stat().st_size > 10_000
    assert {"versions", "device", "commit", "threads", "peak_flops", "model"} <= result.keys()
    assert result["versions"]["trl"]
    (cell,) = result["cells"]
    assert (cell["prompt"], cell["negatives"], cell["vocab"]) == (16, 2, 97)
    assert cell["largest_difference"] < 1e-4
    assert set(cell["implementations"]) == {"ours", "unshared", "trl"}
    for figures in cell["implementations"].values():
        assert figures.keys() >= FIGURES
        assert figures["peak_memory_mib"] > 0
    for rival in ("trl", "unshared"):
        low, high = cell[f"speedup_{rival}_quartiles"]
        assert low <= cell[f"speedup_{rival}"] <= high
        assert cell[f"memory_ratio_{rival}"] > 0
        assert cell[f"ceiling_{rival}"] > 1
    assert cell["implementations"]["ours"]["reuse"] == 3 * 28 / (16 + 3 * 11)
    assert cell["implementations"]["trl"]["physical_tokens_per_second"] == pytest.approx(
        4 * 28 * cell["implementations"]["trl"]["groups_per_second"]
    )
    assert cell["one_row"]["groups"] == 3
    assert "Ours against the others" in capsys.readouterr().out

    worse = copy.deepcopy(result)
    worse["cells"][0]["implementations"]["ours"]["peak_memory_mib"] = 0.01
    (tmp_path / "worse.json").write_text(json.dumps(worse))
    monkeypatch.setattr(
        "sys.argv", ["dmpo", "bench", "gate", "--without-trl", "--baseline", str(tmp_path / "worse.json")]
    )
    with pytest.raises(SystemExit, match="1"):
        main()
    assert "worse: P=16 K=2 V=97 R=12: memory" in capsys.readouterr().out
