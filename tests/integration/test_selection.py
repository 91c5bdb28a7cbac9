"""A stage that only does harm, on two real ranks: its result is its start, bit for bit, however that is held."""

import json

import pytest
import torch
from processes import run_ranks
from safetensors.torch import load_file

from dmpo_dist.config import DataConfig, LoraConfig, ScratchModel
from dmpo_dist.data.prepare import prepare
from dmpo_dist.modeling.backbone import make_scratch_model

pytestmark = pytest.mark.integration

TEMPLATE = {"item": "{title}{end}", "preamble": "", "request": ""}
LORA = LoraConfig(r=4, alpha=8).model_dump()


def test_a_harmful_stage_gives_back_its_start(tmp_path):
    source = {"simulator": {"users": 60, "items": 30, "events_per_user": 12}}
    settings = DataConfig.model_validate(
        {"source": source, "train_requests_per_user": 1, "negatives_per_group": 3, "evaluation_negatives": 5}
    )
    data = prepare(settings, 0, tmp_path / "data", echo=lambda line: None)
    sizes = ScratchModel(hidden_size=32, layers=2, intermediate_size=48, vocab_size=300)
    make_scratch_model(tmp_path / "model", sizes, data.items["title"].tolist(), 128, seed=0)

    def job(name: str, kind: str, start: str, deepspeed: str, steps: int, rate: float, lora: dict | None = None):
        stage = {"steps": steps, "learning_rate": rate, "global_batch_size": 8, "validate_every": 2, "warmup_ratio": 0}
        more = {} if kind == "sft" else {"negatives": 3}
        config = {
            "data": {"path": str(tmp_path / "data")}, "template": TEMPLATE, "model": {"max_length": 128, "lora": lora},
            "sft" if kind == "sft" else "train": stage | more, "deepspeed": deepspeed,
        }  # fmt: skip
        output = str(tmp_path / name)
        return {"kind": kind, "start": str(tmp_path / start), "output": output, "config": config}

    jobs = [
        job("good", "sft", "model", "zero2", 30, 3e-3),
        job("full", "preference", "good/model", "zero3", 4, 0.5),
        job("adapter", "preference", "good/model", "zero3", 4, 5.0, LORA),
    ]
    run_ranks(tmp_path, jobs, 2)
    good = load_file(tmp_path / "good/model/model.safetensors")
    full = load_file(tmp_path / "full/model/model.safetensors")
    assert full.keys() == good.keys()
    assert all(torch.equal(full[name], good[name]) for name in good)
    adapter = load_file(tmp_path / "adapter/model/adapter_model.safetensors")
    assert not any(tensor.any() for name, tensor in adapter.items() if "lora_B" in name), "an adapter that adds nothing"
    for name in ("full", "adapter"):
        end = json.loads((tmp_path / name / "records.json").read_text())[-1]
        assert (end["kind"], end["selected_step"]) == ("end", 0)
        assert end["best_later"] < end["start"]
