"""A folder with everything that `dmpo report` can show; its titles and ids are as nasty as data can be."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import yaml
from datasets import Dataset

from dmpo_dist.artifacts.evaluation import Evaluation
from dmpo_dist.config import RunConfig
from dmpo_dist.evaluation.report import evaluate_scores, write_evaluation

NASTY = [
    "<script>document.title = 'owned'</script>",
    "Tom & \"Jerry\" 'again' <b>",
    "</script></style><img src=x onerror=\"document.title='owned'\">",
    "مرحبا بالعالم (2001)",
    "🎬 Amélie \u202egnp.exe",
    "A title that goes on and on " * 6,
    "Unbreakable" * 20,
    "{{ 7 * 7 }} {% raw %} \x0b half \ud83d",
]
VISIBLE = [title.replace("\ud83d", "?") for title in NASTY]
"""As the page has them: half a surrogate pair is no text."""
MODELS = {"random": 0.0, "popularity": 0.9, "sft": 0.8, "dmpo": 1.4}
STRATA = {"popularity": ["head", "middle", "tail"], "history": ["3-5", "6-12"], "item_cold": ["cold", "warm"]}


def write_run(folder: Path, stage: str, steps: int = 120, **config: object) -> Path:
    """A training run with noisy curves."""
    folder.mkdir(parents=True)
    settings = RunConfig.model_validate({"output_dir": "runs/x", **config}).model_dump(mode="json")
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    environment = {"dmpo_dist": "0.1.0", "git_commit": "0123456789abcdef", "python": "3.11.7", "cpus": 2,
                   "packages": {"torch": "2.13.0"}, "seed": 0, "data_fingerprint": "f1"}  # fmt: skip
    (folder / "environment.json").write_text(json.dumps(environment))
    rng = np.random.default_rng(len(stage))
    records: list[dict] = [
        {"kind": "start", "time": 1e9 + len(stage), "stage": stage, "steps": steps, "world_size": 2, "device": "cpu"}
    ]
    for step in range(1, steps + 1):
        noise = float(rng.normal()) / 20
        record = {
            "kind": "train",  # as steps were called before
            "step": step,
            "loss": 3 / step**0.5 + noise,
            "groups_per_second": 8.0 + noise,
            "memory_gib": 0.5,
            "learning_rate": 1e-3 * (1 - step / steps),
            "logp_positive": -6 + noise,
        }
        if stage == "train":
            record |= {
                "margin": step / steps + noise,
                "accuracy": 0.6,
                "reward_positive": noise,
                "reward_negative": -step / steps,
                "logp_negative": -6 - step / steps,
                "preference_loss": 0.6,
            }
        records.append(record)
        if step % 30 == 0:
            records.append(
                {"kind": "validation", "step": step, "ndcg@10": 0.4 + noise, "hr@1": 0.2, "mrr": 0.3, "auc": 0.7}
            )
    records.append({"kind": "end", "selected_step": 90, "model": str(folder / "model")})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def evaluation_of(folders: dict[str, str], users: int = 80) -> tuple[Evaluation, dict, Dataset]:
    """An evaluation as `dmpo evaluate` makes it, its scores and rows."""
    rng = np.random.default_rng(0)
    rows = Dataset.from_dict({
        "user": [f"<u{u}>" for u in range(users)], "timestamp": list(range(users)),
        "positive": [NASTY[u % 7] for u in range(users)], "positive_item": [f"item {u}" for u in range(users)],
        "negatives": [[f"title {u}-{n}" for n in range(4)] for u in range(users)],
        "negative_items": [[f"item {u}-{n}" for n in range(4)] for u in range(users)],
    })  # fmt: skip
    scores = {m: list(rng.normal(size=(users, 5)) + lift * np.eye(1, 5)) for m, lift in MODELS.items()}
    evaluation = evaluate_scores(scores, rows, 200, 0)
    evaluation.folders = folders
    evaluation.data = {"path": "runs/data", "fingerprint": "f1"}
    return evaluation, scores, rows


def with_more(evaluation: dict) -> dict:
    """The evaluation with strata, catalogue and seeds, written out here as they may stand in the file."""
    models = evaluation["models"]
    strata = {
        way: {name: {"requests": 20 + len(name), "models": models} for name in names} for way, names in STRATA.items()
    }
    catalogue = {
        "items": 400, "models": {name: {"hr@10": m["hr@10"], "recall@20": m["hr@5"]} for name, m in models.items()},
        "coverage@10": {name: 0.4 for name in models}, "gini@10": dict.fromkeys(models, 0.7),
    }  # fmt: skip
    seeds = {
        name: {str(seed): {"ndcg@10": models[name]["ndcg@10"]["value"] + seed / 100} for seed in range(3)}
        for name in ("sft", "dmpo")
    }
    moved = {"max_difference": 3e-5, "ndcg@10": {"lowest": 0.1, "highest": 0.1}}
    ease = {"settings": {"regularization": 300.0}, "validation": {"300": 0.51, "1000": 0.5}, "unknown_positives": 6}
    return evaluation | {
        "strata": strata, "catalogue": catalogue, "seeds": seeds, "notes": ["leave-one-out: not <b> comparable"],
        "baselines": {"ease": ease},
        "order": {"requests": 32, "models": {"dmpo": {"candidates": moved, "packing": moved}}},
    }  # fmt: skip


def explanations() -> dict:
    """Two users, titles from NASTY."""
    history = [
        {"item": str(i), "title": title, "contribution": (-1) ** i * (i + 0.5), "rank_without": i + 1}
        for i, title in enumerate(NASTY)
    ]
    requests = [
        {"user": user, "item": "7", "title": title, "rank": 2, "candidates": 20, "compared": 9, "history": history,
         "tokens": [{"text": text, "log_ratio": ratio} for text, ratio in (("Tom", 0.4), (" <b>", -1.2), (" &", 0.0))],
         "counterfactual": {"removed": [NASTY[0]], "rank_before": 2, "rank_after": 31,
                            "sentence": f"Without {NASTY[0]} it falls from rank 2 to 31."}}
        for user, title in (("<u1>", NASTY[2]), ("u2", NASTY[3]))
    ]  # fmt: skip
    area = {"area": 0.4, "low": 0.1, "high": 0.7, "users_above": 9, "users_below": 1, "sign_test_p": 0.02}
    curves = {"share_removed": [0.0, 0.5, 1.0], "attribution": [0.0, -2.0, -3.0], "random": [0.0, -1.0, -3.0]}
    faithfulness = {"value": "margin", "users": 10, "areas": {"attribution_vs_random": area}, "curves": curves}
    return {
        "model": "runs/dmpo/model",
        "reference": "runs/sft/model",
        "requests": requests,
        "faithfulness": faithfulness,
    }


def study() -> pd.DataFrame:
    """Two datasets, two objectives, K from 1 to 15, three sizes, two seeds; and an SFT arm and a baseline."""
    rows = []
    for dataset, other in (("games", "films"), ("films", "games")):
        for seed in (0, 1):
            for metric in ("ndcg@10", "hr@1"):
                common = {"dataset": dataset, "seed": seed, "metric": metric}
                for objective in ("dmpo", "sdpo"):
                    for k in (1, 3, 7, 15):
                        value = 0.5 - 0.01 * k * (objective == "dmpo") + seed / 100
                        cell = common | {"evaluated_on": dataset, "k": k, "objective": objective, "model": objective}
                        cell |= {
                            "shots": None,
                            "value": value,
                            "loss": 0.7 / k,
                            "low": value - 0.02,
                            "high": value + 0.02,
                        }
                        rows += [cell, cell | {"evaluated_on": other, "value": value - 0.2}]
                        rows += [cell | {"shots": shots, "value": value - 1 / shots} for shots in (16, 64)]
                rows.append(common | {"evaluated_on": dataset, "model": "sft", "value": 0.45})
                rows.append(common | {"evaluated_on": dataset, "model": "popularity", "value": 0.4, "seed": None})
    return pd.DataFrame(rows).astype({"shots": "Int64", "k": "Int64", "seed": "Int64"})


def summary() -> dict[str, pd.DataFrame]:
    """The means over seeds of ``study``, and differences from SFT, two baselines and the fewest K."""
    means = study().rename(columns={"objective": "cell"}).assign(train_groups=100, free="", seeds=2)
    key = ["dataset", "evaluated_on", "shots", "train_groups", "k", "model", "free", "metric", "seeds"]
    means = means.groupby(key, dropna=False, sort=False)[["value", "low", "high"]].mean().reset_index()
    cells = means[means["k"].notna() & (means["dataset"] == means["evaluated_on"])]
    others = {"sft": 0.45, "random": 0.2, "popularity": 0.4, "K=1": 0.49}
    differences = [
        cells.assign(against=name, value=cells["value"] - value, low=cells["value"] - value - 0.01,
                     high=cells["value"] - value + 0.01, p=np.where((cells["value"] - value).abs() > 0.011, 0.002, 0.4))
        for name, value in others.items()
    ]  # fmt: skip
    return {"means": means, "differences": pd.concat(differences)}


def card() -> dict:
    """``dataset.json``."""
    finding = {
        "check": "duplicate titles",
        "verdict": "warning",
        "text": "2 titles.",
        "figures": {},
        "examples": [NASTY[0], NASTY[3]],
    }
    return {
        "format_version": 1, "name": "films & <i>more</i>", "seed": 0, "fingerprint": "f1", "notes": [NASTY[4]],
        "counts": {"train": 100, "validation": 10, "test": 80}, "users": {"train": 90, "validation": 10, "test": 80},
        "cuts": {"validation": {"timestamp": 1, "utc": "2023-01-01Z"}, "test": {"timestamp": 2, "utc": "2023-02-01Z"}},
        "dropped": {"train": {"short_history": 7}}, "items": True, "interactions": True, "config": {"split": "time"},
        "leaks": [
            finding | {"check": "position", "verdict": "ok"},
            finding,
            finding | {"check": "candidate look-up", "verdict": "leak"},
        ],
    }  # fmt: skip


def write_report_folder(root: Path) -> Path:
    """Everything below ``root``."""
    write_run(root / "sft", "sft")
    start = {"path": str(root / "sft" / "model")}
    write_run(root / "dmpo", "train", model=start, objective={"name": "dmpo", "sft_weight": 0.5})
    evaluation, scores, rows = evaluation_of({"sft": "sft/model", "dmpo": "dmpo/model"})
    write_evaluation(root / "evaluation", evaluation, scores, rows)
    (root / "evaluation" / "evaluation.json").write_text(json.dumps(with_more(evaluation.content())))
    (root / "explanations.json").write_text(json.dumps(explanations()))
    for name in ("data", "study"):
        (root / name).mkdir()
    (root / "data" / "dataset.json").write_text(json.dumps(card()))
    write_run(root / "study" / "cells" / "one", "train")  # in the study's table, not among the runs
    study().to_parquet(root / "study" / "experiment.parquet")
    for name, table in summary().items():
        table.to_parquet(root / "study" / f"{name}.parquet")
    return root
