"""A checkpoint goes on with other numbers of ranks and other ZeRO stages, and with the same ones bit for bit.

Ranks end by SIGKILL where a process ends, and by an exception between two jobs of a process, after a checkpoint.
"""

from pathlib import Path

import pytest
import torch
from processes import run_ranks
from safetensors.torch import load_file

from dmpo_dist.config import LoraConfig, RunConfig

pytestmark = pytest.mark.integration

STEPS, EVERY = 30, 5
WAYS = {
    "one-two-one": [("zero0", 1), ("zero2", 2), ("zero0", 1)],
    "two-three-one": [("zero2", 2), ("zero3", 2), ("zero1", 1)],
    "offload": [("zero3_offload", 3), ("zero2_offload", 2), ("zero3", 1)],
}
SAME = ("zero2", "zero3")
SAMPLE, NIGHTLY = ["two-three-one"], ["one-two-one", "offload"]


def job(project: Path, name: str, deepspeed: str, lora: bool, stop: int | None = None) -> dict:
    config = {
        "data": {"path": str(project / "data")},
        "template": {"item": "{title}{end}", "preamble": "", "request": ""},
        "model": {"max_length": 128, "lora": LoraConfig(r=3, alpha=6).model_dump() if lora else None},
        "train": {
            "negatives": 3, "steps": STEPS, "global_batch_size": 12, "token_budget": 400, "learning_rate": 2e-3,
            "weight_decay": 0.01, "validate_every": STEPS, "checkpoint_every": EVERY, "select": "last",
            "log_every": 5, "self_check": False,
        },
        "deepspeed": deepspeed,
    }  # fmt: skip
    RunConfig.model_validate(config)
    output = str(project / "runs" / name)
    return {"kind": "preference", "start": str(project / "model"), "output": output, "config": config, "stop": stop}


@pytest.fixture(scope="module")
def project(world, tmp_path_factory) -> Path:
    return run_all(world, tmp_path_factory.mktemp("elastic"), SAMPLE)


@pytest.fixture(scope="module")
def nightly_project(world, tmp_path_factory) -> Path:
    return run_all(world, tmp_path_factory.mktemp("elastic"), NIGHTLY)


def run_all(world, folder: Path, ways: list[str]) -> Path:
    """Undisturbed runs, and those that were ended and went on, below ``folder/runs``."""
    for name in ("data", "model"):
        (folder / name).symlink_to(world.folder / name)
    for part in range(3):
        for ranks in (1, 2, 3):
            jobs = [
                job(
                    folder,
                    f"{way}-{kind}",
                    legs[part][0],
                    kind == "lora",
                    stop=EVERY * (part + 1) if part < 2 else None,
                )
                for way, legs in WAYS.items()
                for kind in ("all", "lora")
                if way in ways and legs[part][1] == ranks
            ]
            if part == 1 and ranks == 2:
                jobs += [job(folder, f"{name}-whole", name, name != "zero3") for name in SAME]
                jobs += [
                    job(folder, f"{name}-same", name, name != "zero3", stop) for name in SAME for stop in (10, None)
                ]
                jobs += [job(folder, "undisturbed-all", "zero2", False)]
            if jobs:
                if part < 2:
                    jobs[-1] |= {"kill": jobs[-1]["stop"] is not None}
                run_ranks(folder, jobs, ranks, status=-9 if jobs[-1].get("kill") else 0)
    return folder


def weights(project: Path, name: str) -> dict[str, torch.Tensor]:
    model = project / "runs" / name / "model"
    file = model / "adapter_model.safetensors"
    return load_file(file if file.exists() else model / "model.safetensors")


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def require_same_weights(project: Path, way: str, kind: str) -> None:
    """After 20 more steps, in fp32."""
    undisturbed = weights(project, "undisturbed-all" if kind == "all" else "zero2-whole")
    difference = largest_difference(weights(project, f"{way}-{kind}"), undisturbed)
    print(f"{way} {kind}: largest difference of a weight {difference:.1e}")
    assert difference < 1e-5


@pytest.mark.parametrize("kind", ["all", "lora"])
@pytest.mark.parametrize("way", SAMPLE)
def test_other_ranks_and_stages_come_to_the_same_weights(project, way, kind):
    require_same_weights(project, way, kind)


@pytest.mark.faults
@pytest.mark.parametrize("kind", ["all", "lora"])
@pytest.mark.parametrize("way", NIGHTLY)
def test_offload_and_further_ranks_do_so_too(nightly_project, way, kind):
    """With three ranks ZeRO-3 pads its parts."""
    require_same_weights(nightly_project, way, kind)


@pytest.mark.parametrize("name", SAME)
def test_the_same_ranks_and_stage_go_on_bit_for_bit(project, name):
    assert largest_difference(weights(project, f"{name}-same"), weights(project, f"{name}-whole")) == 0.0
