"""Memorisation probes against generation, on a model that knows nothing and on one that knows a dataset by heart."""

import json
import sys
from dataclasses import replace

import pytest
import torch

from dmpo_dist.artifacts.memorization import Memorization
from dmpo_dist.cli import main
from dmpo_dist.config import ModelConfig
from dmpo_dist.errors import UserError
from dmpo_dist.evaluation.followed import Text, followed
from dmpo_dist.evaluation.memorization import memorization_probes, number_of_texts
from dmpo_dist.modeling.ranking_model import RankingModel


@pytest.fixture
def model(world):
    return RankingModel.load(str(world.model), ModelConfig(max_length=256))


def ids_of(model, text):
    return model.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_what_is_called_greedy_is_what_the_model_generates(world, model):
    writer = model.load_weights().writer()
    context = [model.tokenizer.bos_token_id, *ids_of(model, world.titles[0])]
    out = writer.generate(torch.tensor([context]), max_new_tokens=5, do_sample=False, eos_token_id=None)
    written = out[0, len(context) :].tolist()
    other = [*written[:-1], (written[-1] + 1) % 300]
    counted = []
    found = followed(writer, [Text(context, written), Text(context, other), Text(context, other[:4])], counted.append)
    assert found.greedy.tolist() == [1, 0, 1]
    assert sum(counted) == 3
    logits = writer(torch.tensor([context + written])).logits[0, len(context) - 1 : -1].double().log_softmax(-1)
    assert found.log_prob[0] == pytest.approx(logits[torch.arange(5), torch.tensor(written)].sum().item(), abs=1e-4)


def test_a_random_model_knows_nothing(world, model):
    counted = []
    probes = memorization_probes(model, world.data, 40, 30, 200, 0, counted.append)
    assert 0 < sum(counted) <= number_of_texts(world.data, 40, 30)
    assert [probe.figure.value for probe in probes if probe.control] == [0, 0, 0]
    for probe in probes:
        assert probe.figure.low <= probe.figure.value <= probe.figure.high
        if probe.control is None:
            assert abs(probe.figure.value - 0.5) < 0.3, probe
    again = memorization_probes(model, world.data, 40, 30, 200, 0)
    assert [probe.content() for probe in again] == [probe.content() for probe in probes]


def test_a_model_that_learned_titles_and_ids_shows_that_it_did_and_nothing_of_histories(world, model):
    learner, bos = model.load_weights().writer(), model.tokenizer.bos_token_id
    items = world.data.items
    texts = [*items["title"], *(f"{i}::{t}" for i, t in zip(items["item"], items["title"], strict=True))]
    rows = [torch.tensor([bos, *ids_of(model, text)]) for text in texts]
    batch = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # behind a text, where nothing looks back from
    labels = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)
    learner.requires_grad_(True)
    optimizer = torch.optim.AdamW(learner.parameters(), lr=1e-2)
    for _ in range(150):
        learner(input_ids=batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    probes = {p.probe.split(" (")[0]: p for p in memorization_probes(model, world.data, 40, 20, 200, 0, examples=0)}
    titles, ids = probes["titles completed from their first half"], probes["title written after its item's id"]
    assert titles.figure.value > 0.2
    assert titles.difference.low > 0
    assert ids.difference.low > 0
    assert probes["title likelier after its item's id than after another's"].figure.low > 0.7
    assert probes["next title written after the user's history"].figure.value < 0.3


def test_no_example_gives_an_answer_away(world, model, monkeypatch):
    """Titles may hold several spaces, and of few items another one's id is soon among the examples."""
    items = world.data.items.head(12).assign(title=[title.replace(" ", "  ") for title in world.titles[:12]])
    contexts = []

    def spied(writer, texts, advance):
        contexts.extend(model.tokenizer.decode(text.context, skip_special_tokens=True) for text in texts)
        return followed(writer, texts, advance)

    monkeypatch.setattr("dmpo_dist.evaluation.memorization.followed", spied)
    memorization_probes(model, replace(world.data, items=items), 12, 4, 10, 0)
    titles, asked = contexts[:12], contexts[-24:]
    assert all(len(text.splitlines()) == 6 for text in titles + asked)
    for text in titles:
        *examples, begun = [" ".join(line.split()) for line in text.splitlines()]
        assert not any(line.startswith(begun + " ") for line in examples) or len(begun.split()) == 1, text
    for text in asked:
        *examples, begun = text.splitlines()
        assert not any(line.startswith(begun) for line in examples), text


def test_the_command_writes_figures_and_a_table_and_refuses_data_without_a_catalogue(
    world, tmp_path, monkeypatch, capsys
):
    folder, data = tmp_path / "out", world.data.path
    command = ["dmpo", "models", "memorized", "-m", str(world.model), "model.max_length=256", f"data.path={data}"]
    monkeypatch.setattr(sys, "argv", [*command, f"output_dir={folder}", "--titles", "5", "--users", "4"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0, capsys.readouterr().err
    found = Memorization.read(folder)
    assert found.settings == {"titles": 5, "users": 4, "seed": 0, "bootstrap_samples": 1000}
    assert found.data["fingerprint"] == json.loads((data / "dataset.json").read_text())["fingerprint"]
    page = (folder / "memorization.md").read_text()
    assert all(probe.probe in page for probe in found.probes)

    bare = replace(world.data, items=None, interactions=None)
    with pytest.raises(UserError, match="have no catalogue and no histories"):
        memorization_probes(RankingModel.load(str(world.model)), bare, 5, 5, 100, 0)
