"""Grids of an experiment: every combination once, under names that stay; and what a mistaken grid says."""

import re
import shutil
import textwrap
from itertools import product
from pathlib import Path

import pytest
import yaml
from conftest import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import SETTINGS

from dmpo_dist.data.store import unlike_preparation
from dmpo_dist.errors import UserError
from dmpo_dist.experiment.datasets import open_datasets
from dmpo_dist.experiment.grid import expand, keep_grid, read_grid
from dmpo_dist.experiment.memorization import _probed
from dmpo_dist.experiment.methods import environment_lines
from dmpo_dist.experiment.parts import FOLDERS, _weights, make_parts
from dmpo_dist.experiment.schema import GridConfig

GRIDS = sorted((Path(__file__).parents[1] / "launch" / "recipes").glob("experiment*.yaml"))
DATASETS = {"a": "runs/a", "b": "runs/b"}
BOUNDARY = {"name": "dmpo", "negative_selection": "boundary"}
VALUES = {
    "dataset": ["a", "b"],
    "shots": [16, 64, "all"],
    "k": [1, 3, 7],
    "objective": ["dmpo", "sdpo", BOUNDARY],
    "seed": [0, 1],
    "train.learning_rate": [1e-3, 1e-5],
    "model.lora": [{"r": 4}, {"r": 8}],
    "template.preamble": ["", "a/b", "a b"],
}  # fmt: skip  (of the free axes no default: in a second block it would be the same cell under another name)
MORE = {"k": 2, "seed": 7, "shots": 32}
AXES = {axis: st.lists(st.sampled_from(v), min_size=1, max_size=2, unique_by=str) for axis, v in VALUES.items()}
BLOCKS = st.sets(st.sampled_from(sorted(AXES)), max_size=3).flatmap(
    lambda chosen: st.fixed_dictionaries({axis: AXES[axis] for axis in sorted(chosen)})
)


def grid_of(blocks, **more) -> GridConfig:
    return GridConfig.model_validate({"output_dir": "runs/x", "datasets": DATASETS, "grid": blocks, **more})


def test_a_cell_has_one_name_in_whichever_order_its_axes_stand():
    block = {"model.lora": [{"r": 4}], "template.preamble": [""]}
    turned = dict(reversed(block.items()))
    assert expand(grid_of([block, turned])) == expand(grid_of(block)) == expand(grid_of(turned))


@given(block=BLOCKS, other=BLOCKS, grown=st.sampled_from(sorted(MORE)))
@settings(max_examples=12, deadline=None)
def test_every_combination_is_one_cell_and_growing_keeps_the_cells_there_were(block, other, grown):
    cells = expand(grid_of(block))
    defaults = {"dataset": ["a", "b"], "shots": ["all"], "k": [7], "objective": ["dmpo"], "seed": [0]}
    axes = defaults | block

    def seen(cell):
        """The values of a cell, read from the configuration it trains by."""
        config = cell.config
        objective = BOUNDARY if config.objective.negative_selection == "boundary" else config.objective.name
        found = {"dataset": cell.dataset, "shots": config.data.shots or "all", "k": config.train.negatives,
                 "objective": objective, "seed": config.seed, "train.learning_rate": config.train.learning_rate,
                 "model.lora": config.model.lora and {"r": config.model.lora.r},
                 "template.preamble": config.template.preamble}  # fmt: skip
        return str([found[axis] for axis in axes])

    wanted = sorted(str(list(values)) for values in product(*axes.values()))
    assert sorted(map(seen, cells)) == wanted
    assert len({cell.name for cell in cells}) == len(wanted)
    assert all("/" not in cell.name and " " not in cell.name for cell in cells)

    named = {cell.name: cell for cell in cells}
    both = {cell.name: cell for cell in expand(grid_of([block, other]))}
    assert both == named | {cell.name: cell for cell in expand(grid_of(other))}
    more = {cell.name: cell for cell in expand(grid_of(block | {grown: axes[grown] + [MORE[grown]]}))}
    assert named.items() < more.items()


def test_starts_are_shared_and_come_before_what_needs_them():
    blocks = {"shots": [16, "all"], "k": [1, 3], "objective": ["dmpo", "sdpo"], "objective.beta": [0.5, 1.0],
              "sft.learning_rate": [1e-3, 1e-4], "train.learning_rate": [1e-5, 1e-6]}  # fmt: skip
    grid = grid_of(blocks, arms=["sft", "sft_continued"])
    parts = make_parts(grid, expand(grid), {})
    by_role = {role: [part for part in parts if part.role == role] for role in ("start", "continued", "cell")}
    assert [len(by_role[role]) for role in ("start", "continued", "cell")] == [2 * 2 * 2, 2 * 2 * 2 * 2, 2 * 2**6]
    assert len({part.title for part in parts}) == len({part.config.output_dir for part in parts}) == len(parts)
    order = [part.title for part in parts]
    for part in by_role["continued"] + by_role["cell"]:
        assert order.index(f"sft/{part.start}") < order.index(part.title)
        (start,) = (other for other in by_role["start"] if other.name == part.start)
        assert Path(part.config.model.path) == start.model
        assert (start.cell.dataset, start.shots, start.config.seed) == (part.cell.dataset, part.shots, part.config.seed)
        assert start.config.sft.learning_rate == dict(part.cell.free)["sft.learning_rate"]
    assert not any(part.from_before_training for part in by_role["continued"] + by_role["cell"])
    shared = grid_of(blocks, sft_shots="all")
    assert sum(part.role == "start" for part in make_parts(shared, expand(shared), {})) == 2 * 2


def test_a_start_that_no_arm_and_no_cell_needs_is_not_trained(world, tmp_path):
    settings = {"model": {"path": str(world.model)}}

    def parts_of(starts, arms):
        grid = grid_of({"dataset": "a", "start": starts, "k": [1, 3]}, arms=arms, settings=settings)
        return make_parts(grid, expand(grid), {})

    alone = parts_of(["zero_shot"], [])
    assert [(part.role, part.start) for part in alone] == [("cell", None)] * 2
    assert [part.role for part in parts_of(["zero_shot"], ["sft"])] == ["start", "cell", "cell"]
    assert [part.role for part in parts_of(["zero_shot", "sft"], [])].count("start") == 1
    with_start = parts_of(["zero_shot"], ["sft"])
    assert [part.settings for part in alone] == [part.settings for part in with_start[1:]], "the same models"
    few, many = parts_of(["zero_shot"], ["zero_shot"])  # the model before training is measured once, with a cell
    assert (few.measured, list(many.measured)) == ({"untuned": world.model, "dmpo": few.model}, ["dmpo"])
    assert few.others == many.others == {"zero_shot": few.title}
    # What these cells are trained from is probed and named whether there is a start or not.
    assert [folder for _, folder in _probed(alone, tmp_path)] == [folder for _, folder in _probed(with_start, tmp_path)]
    assert environment_lines(alone) == environment_lines(with_start) != []


def test_each_seed_draws_its_own_shots_if_asked():
    block = {"shots": [16, "all"], "seed": [0, 3], "dataset": "a"}
    for draw, drawn in (("once", 0), ("per_seed", 3)):
        grid = grid_of(block, arms=["sft", "sft_continued"], draw_shots=draw)
        parts = make_parts(grid, expand(grid), {})
        seeds = {(part.shots, part.cell.seed): {p.config.data.shots_seed for p in parts if p.cell == part.cell}
                 for part in parts}  # fmt: skip
        assert seeds == {(16, 0): {0}, (16, 3): {drawn}, (None, 0): {0}, (None, 3): {0}}
    few_starts = grid_of({"seed": [0, 3], "dataset": "a"}, sft_shots=16, draw_shots="per_seed")
    starts = [part for part in make_parts(few_starts, expand(few_starts), {}) if part.role == "start"]
    assert {part.config.data.shots_seed for part in starts} == {0, 3}


def test_all_groups_are_asked_for_once(world):
    data = {"datasets": {"a": str(world.data.path)}}
    for shots, refused in ((len(world.data.train), True), (8, False)):
        grid = grid_of({"shots": [shots, "all"], "k": [4], "dataset": "a"}, **data)
        if refused:
            with pytest.raises(UserError, match=rf"shots={shots} and shots=all, .* leave one of them out"):
                make_parts(grid, expand(grid), {"a": world.data})
        else:
            assert make_parts(grid, expand(grid), {"a": world.data})


def test_stages_after_sft_may_learn_from_groups_that_it_has_not_seen(world):
    block = {"shots": [8], "k": [4], "data.shots_skip": [0, 8], "dataset": "a"}
    data = {"datasets": {"a": str(world.data.path)}, "settings": {"train": {"steps": 4}}}
    grid = grid_of(block, arms=["sft", "sft_continued", "sft_continued_compute"], **data)
    parts = make_parts(grid, expand(grid), {"a": world.data})
    taken = {role: [part.config.data.shots_skip for part in parts if part.role == role] for role in FOLDERS}
    assert taken == {"start": [0], "continued": [0, 8], "compute": [0, 8], "cell": [0, 8]}
    assert len({part.settings_hash for part in parts}) == len(parts) == 7
    for cell in (part for part in parts if part.role == "cell"):
        (equal,) = (p for p in parts if p.title == cell.others["sft_continued"])
        assert equal.config.data == cell.config.data, "compared with SFT continued on the same groups"
    for skip, more in ((5, {}), (8, {"sft_shots": "all"})):
        grid = grid_of(block | {"data.shots_skip": [skip]}, **data, **more)
        with pytest.raises(UserError, match=f"data.shots_skip={skip}, but its SFT start learns from shots="):
            make_parts(grid, expand(grid), {})


def test_sft_continued_at_equal_compute_has_as_many_steps_as_a_cells_flops_pay_for(world):
    settings = {"train": {"steps": 10}, "model": {"max_length": 256}}
    blocks = {"k": [1, 4], "objective": ["dmpo", "sdpo"], "shots": 8}
    arms = ["zero_shot", "sft", "sft_continued", "sft_continued_compute"]
    grid = grid_of(blocks, arms=arms, settings=settings, datasets={"a": str(world.data.path)})
    parts = make_parts(grid, expand(grid), {"a": world.data})
    by_role = {role: [part for part in parts if part.role == role] for role in ("continued", "compute", "cell")}
    assert [part.config.sft.steps for part in by_role["continued"]] == [10]
    few, many = by_role["compute"]  # one for each K, shared by the objectives
    assert 10 < few.config.sft.steps < many.config.sft.steps
    assert few.name == f"a_shots-8_steps-{few.config.sft.steps}_seed-0"
    assert [part.distinct for part in (few, many)] == [f"steps={part.config.sft.steps}" for part in (few, many)]
    for cell in by_role["cell"]:
        equal = few if cell.cell.k == 1 else many
        assert cell.others == {
            "sft_continued": by_role["continued"][0].title, "sft_continued_compute": equal.title
        }  # fmt: skip
        assert equal.measured == {"sft_continued_compute": equal.model}
    group_tokens = (
        1 + 4
    )  # responses of the policy; prompts run once, so that 4 negatives cost less than 5 times as much
    assert many.config.sft.steps < 10 * group_tokens * 4 / 3  # the reference adds a third of forward and backward


def test_equal_compute_counts_rows_as_the_route_of_the_model_lays_them_out(world, tmp_path):
    """Gemma 2 has soft-capped attention, so that on a CPU each response runs as its own row."""
    tiny_model("gemma2", vocab=400, tie_word_embeddings=True).save_pretrained(tmp_path)
    for file in world.model.glob("token*"):
        shutil.copy(file, tmp_path)

    def steps(model: Path, **more):
        settings = {"train": {"steps": 100}, "model": {"path": str(model)} | more, "cluster": {"gpus_per_worker": 0}}
        grid = grid_of({"k": [6], "shots": 8}, arms=["sft_continued_compute"], settings=settings,
                       datasets={"a": str(world.data.path)})  # fmt: skip
        parts = make_parts(grid, expand(grid), {"a": world.data})
        (compute,) = (part for part in parts if part.role == "compute")
        return compute.config.sft.steps

    assert steps(tmp_path) == steps(tmp_path, attention="unshared") > 1.5 * steps(world.model)
    assert steps(world.model) == steps(world.model, max_length=256)  # which its folder says it was trained with


def test_equal_compute_counts_the_prompts_that_training_reads(world):
    def steps(k, **template):
        settings = {"train": {"steps": 100}, "model": {"max_length": 256}, "template": template}
        settings |= {"sft": {"negatives": 6}}
        grid = grid_of({"k": [k], "shots": 8}, arms=["sft_continued_compute"], settings=settings,
                       datasets={"a": str(world.data.path)})  # fmt: skip
        parts = make_parts(grid, expand(grid), {"a": world.data})
        (compute,) = (part for part in parts if part.role == "compute")
        return compute.config.sft.steps

    listing = {"request": "Choose:\n{candidates}Answer:\n", "candidate": "{title}\n"}
    few, many = steps(1, **listing), steps(6, **listing)
    assert few < steps(1), "two titles are listed, by SFT too"
    assert many > few


def test_sft_continued_is_shared_by_cells_that_differ_in_what_it_knows_nothing_of():
    search = {"every": 5, "beams": 4, "top": 4}
    axes = {"dataset": ["a"], "train.on_policy": [None, search], "train.learning_rate": [1e-4, 1e-3]}
    grid = grid_of(axes, arms=["sft_continued"], settings={"train": {"steps": 10}})
    parts = make_parts(grid, expand(grid), {})
    continued = [part for part in parts if part.role == "continued"]
    assert [part.config.sft.learning_rate for part in continued] == [1e-4, 1e-3]
    assert [dict(part.free) for part in continued] == [{"train.learning_rate": rate} for rate in (1e-4, 1e-3)]
    of_cell = {(dict(p.free)["train.learning_rate"], p.others["sft_continued"]) for p in parts if p.role == "cell"}
    assert of_cell == {(part.config.sft.learning_rate, part.title) for part in continued}


def test_a_dataset_has_its_own_value_of_an_axis_that_is_left_out(tmp_path):
    own = {"train": {"negatives": 3}, "objective": {"name": "sdpo"}}
    (tmp_path / "few.yaml").write_text("data: {shots: 16}")
    datasets = {"a": "runs/a", "b": {"path": "runs/b", "settings": own}}
    cells = expand(grid_of({}, datasets=datasets, config=[str(tmp_path / "few.yaml")]))
    assert [cell.name for cell in cells] == ["a_shots-16_k-7_dmpo_seed-0", "b_shots-16_k-3_sdpo_seed-0"]
    assert [(cell.config.train.negatives, cell.config.objective.name) for cell in cells] == [(7, "dmpo"), (3, "sdpo")]
    asked = expand(grid_of([{"dataset": ["b"], "objective": [{"beta": 2}]}], datasets=datasets))
    assert [cell.config.objective.name for cell in asked] == ["sdpo"]


def test_a_key_on_the_command_line_holds_for_all_cells_or_is_refused(tmp_path):
    file = tmp_path / "grid.yaml"
    axes = {"k": [1, 3], "objective": ["dmpo", {"beta": 2}], "train.learning_rate": [0.1], "model.lora": [None]}
    prepare = {"source": {"simulator": {"users": 9}}}
    datasets = {"a": "runs/a", "b": {"prepare": prepare, "settings": {"train": {"steps": 5}}}}
    file.write_text(yaml.safe_dump({"output_dir": "x", "datasets": datasets, "grid": [{"dataset": "a"}, axes]}))
    for override, where in {
        "train.negatives=3": "axis k", "objective.name=sdpo": "axis objective", "objective.beta=3": "axis objective",
        "objective={name: sdpo}": "axis objective", "train.learning_rate=0.01": "axis train.learning_rate",
        "model.lora.r=8": "axis model.lora", "train.steps=9": "datasets.b.settings.train.steps",
        "data.source.simulator.users=8": "datasets.b.prepare.source.simulator.users",
    }.items():  # fmt: skip
        with pytest.raises(UserError) as error:
            read_grid(file, [override])
        message = str(error.value)
        assert override.partition("=")[0] in message
        assert where in message
        assert "\n" not in message
    cells = expand(read_grid(file, ["objective.sft_weight=0.5", "train.weight_decay=0.25"]))
    assert {(cell.config.objective.sft_weight, cell.config.train.weight_decay) for cell in cells} == {(0.5, 0.25)}
    texts = {"item": "- {title}{end}", "preamble": "# Liked:", "request": "{candidates} Next:"}
    written = ["train.on_policy={every:3}", *(f"template.{key}={text}" for key, text in texts.items())]
    for cell in expand(read_grid(file, written)):  # as `dmpo train` reads them
        assert {key: getattr(cell.config.template, key) for key in texts} == texts
        assert cell.config.train.on_policy.every == 3


def test_tables_name_the_likelihood_that_the_layers_below_add_to_every_objective():
    below = {"objective": {"sft_weight": 30, "sft_loss_on": "all_titles"}, "template": {"item": "{title}{end}"}}
    block = {"dataset": ["a"], "objective": ["sdpo", {"name": "dmpo", "sft_weight": 1}]}
    cells = expand(grid_of(block, settings=below))
    assert {cell.objective for cell in cells} == {"sdpo-sft_weight30.0-all_titles", "dmpo-all_titles-sft_weight1"}
    assert {cell.objective for cell in expand(grid_of({"dataset": ["a"], "objective.beta": [0.5]}))} == {"dmpo"}


def test_a_model_that_is_trained_again_in_its_folder_is_another_start(world, tmp_path):
    model = shutil.copytree(world.model, tmp_path / "model")

    def hash_of_start():
        _weights.cache_clear()
        grid = grid_of({"dataset": ["a"], "seed": [0]}, settings={"model": {"path": str(model)}})
        return [part.settings_hash for part in make_parts(grid, expand(grid), {})]

    before = hash_of_start()
    assert hash_of_start() == before
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    assert not {*hash_of_start()} & {*before}  # neither the start nor the cell that goes on from it


def test_a_model_before_training_is_zero_shot_if_it_is_pretrained_and_untuned_if_it_is_random(world):
    for path, called in (("scratch", "untuned"), (str(world.model), "zero_shot")):
        for arm in ("untuned", "zero_shot"):
            grid = grid_of({}, arms=[arm], settings={"model": {"path": path}})
            start = make_parts(grid, expand(grid), {})[0]
            assert [start.called(name) for name in start.measured] == [called]


@pytest.mark.parametrize("recipe", GRIDS, ids=[recipe.stem for recipe in GRIDS])
def test_the_grids_that_are_shipped_expand(recipe):
    grid = read_grid(recipe)
    assert make_parts(grid, expand(grid), {})


def test_the_grid_in_the_documents_expands(world, tmp_path, monkeypatch):
    page = (Path(__file__).parents[1] / "docs/EXPERIMENTS.md").read_text(encoding="utf-8")
    [block] = re.findall(r"^    output_dir: .*\n(?:    .*\n)+", page, re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    Path("grid.yaml").write_text(textwrap.dedent(block), encoding="utf-8")
    Path("runs/ml").mkdir(parents=True)
    Path("runs/ml/data").symlink_to(world.folder / "data")
    grid = read_grid(Path("grid.yaml"))
    assert {(cell.shots, cell.config.data.shots_skip) for cell in expand(grid)} == set(product([16, 64], [0, 100]))


MISTAKES = {
    "axis": ({"grid": {"shot": [1]}}, ("grid: shot: unknown axis", "nearest is shots")),
    "dotted_axis": ({"grid": {"train.learning_rat": [1]}}, ("train.learning_rat: unknown key", "train.learning_rate")),
    "empty": ({"grid": {"k": []}}, ("grid: k is an empty list", "leave the axis out")),
    "quoted_number": ({"grid": {"seed": [0, "1"]}}, ("grid: seed: '1' is not a whole number", "quotation marks")),
    "no_number": ({"grid": {"shots": ["all", True]}}, ("grid: shots: True is neither a whole number nor all",)),
    "nameless": ({"grid": {"objective": [None]}}, ("grid: objective: None is neither the name of an objective",)),
    "path": ({"grid": {"objective": [{"import_path": 3}]}}, ("{'import_path': 3} is neither the name",)),
    "start": ({"grid": {"start": [["sft"]]}}, ("grid: start: cells start from sft (the default) or zero_shot",)),
    "value": ({"grid": {"k": [0]}}, ("a_shots-all_k-0_dmpo_seed-0", "train.negatives", "greater than or equal to 1")),
    "objective": ({"grid": {"objective": ["dmop"]}}, ("objective.name", "'dmop'")),
    "twice": ({"grid": {"k": [1, 3, 1]}}, ("cell a_shots-all_k-1_dmpo_seed-0 comes up twice", "remove")),
    "twice_in_other_words": (
        {"grid": {"objective": ["dmpo", {"name": "dmpo", "beta": 1.0}]}},
        ("a_shots-all_k-7_dmpo_seed-0 and a_shots-all_k-7_dmpo-beta1.0_seed-0 have equal settings", "remove one"),
    ),
    "set_twice": ({"grid": {"objective": [{"beta": 1}], "objective.beta": [2]}},
                  ("objective.beta is set by", "remove")),
    "long_name_of_an_axis": ({"grid": {"train.negatives": [3]}}, ("train.negatives: write it as the axis k",)),
    "of_the_data": ({"grid": {"data.negatives": ["uniform"]}},
                    ("data.negatives: decided when data is prepared", "datasets")),
    "of_the_cluster": ({"grid": {"cluster.workers": [1, 2]}},
                       ("cluster.workers: does not change a trained model", "settings")),
    "dataset": ({"grid": {"dataset": ["c"]}}, ("no dataset 'c'", "nearest is")),
    "key": ({"grid": {}, "dataset": {}}, ("dataset: unknown key", "nearest known key is datasets")),
    "setting": ({"grid": {}, "settings": {"train": {"step": 3}}},
                ("its settings or the command line", "train.step: unknown key", "train.steps")),
    "path_as_setting": ({"grid": {}, "settings": {"data": {"path": "x"}}},
                        ("settings.data.path: cannot be set there", "datasets")),
    "shots_seed": ({"grid": {"shots": [8]}, "settings": {"data": {"shots_seed": 1}}},
                   ("settings.data.shots_seed: cannot be set there", "draw_shots: per_seed")),
    "shots_skip_is_an_axis": ({"grid": {"shots": [8]}, "settings": {"data": {"shots_skip": 8}}},
                              ("settings.data.shots_skip: cannot be set there", "as an axis of the grid")),
    "shots_skip_without_shots": ({"grid": {"data.shots_skip": [8]}}, ("shots_skip has no effect",)),
    "shots_seed_as_axis": ({"grid": {"shots": [8], "data.shots_seed": [1]}}, ("draw_shots: per_seed",)),
    "no_file": ({"grid": {}, "config": ["moovielens"]}, ("config moovielens", "movielens, ")),
    "unheard": (
        {"grid": [{"k": [1]}, {"dataset": "a"}, {"k": [3], "train.epochs": [2]}],
         "datasets": {"a": "runs/a", "b": {"path": "runs/b", "settings": {"train": {"negatives": 3}}}}},
        ("datasets.b.settings.train.negatives has no effect", "axis k", "leave one of them out"),
    ),
    "neither": ({"grid": {}, "datasets": {"a": {"seed": 1}}}, ("datasets.a", "either path", "or prepare")),
}  # fmt: skip


def test_a_date_of_yaml_is_the_text_of_it(tmp_path):
    text = f"output_dir: x\ndatasets: {DATASETS}\nsettings: {{template: {{preamble: 2026-01-31}}}}\ngrid: "
    file = tmp_path / "grid.yaml"
    file.write_text(text + "{template.request: [2026-02-28]}")
    config = expand(read_grid(file))[0].config
    assert (config.template.preamble, config.template.request) == ("2026-01-31", "2026-02-28")
    file.write_text(text + "{train.steps: [2026-02-28]}")
    with pytest.raises(UserError, match=r"train.steps.*2026-02-28"):
        read_grid(file)


@pytest.mark.parametrize(("content", "words"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistaken_grid_says_what_to_mend(tmp_path, content, words):
    file = tmp_path / "grid.yaml"
    file.write_text(yaml.safe_dump({"output_dir": "x", "datasets": DATASETS} | content))
    with pytest.raises(UserError) as error:
        expand(read_grid(file))
    for word in words:
        assert word in str(error.value), str(error.value)


def test_datasets_that_are_missing_too_small_or_prepared_in_another_way(world, tmp_path):
    shutil.copytree(world.data.path, tmp_path / "out/data/own")

    def refused(message: str, blocks, **datasets) -> None:
        grid = grid_of(blocks, output_dir=tmp_path / "out", datasets=datasets)
        with pytest.raises(UserError, match=message):
            make_parts(grid, expand(grid), open_datasets(grid, None))

    own = {"prepare": SETTINGS}
    over = {"settings": {"data": {"max_history": 9}}, "datasets": {"own": {"prepare": SETTINGS | {"max_history": 20}}}}
    grid = grid_of({"k": 4}, output_dir=tmp_path / "out", **over)
    part = make_parts(grid, expand(grid), open_datasets(grid, None))[0]
    assert not unlike_preparation(part.config.data, world.data.card), "no note on keys that only the preparation has"
    refused(
        "datasets.a: .*no such folder of prepared data; write it with `dmpo data prepare", {}, a=str(tmp_path / "none")
    )
    refused("own_shots-all_k-7_dmpo_seed-0: train.negatives=7, but the prepared data holds 6", {"k": [4, 7]}, own=own)
    for axes, words in (
        ({"objective": "rank_reward"}, "rank-reward.*: objective.name=rank_reward trains on titles that the model"),
        ({"train.on_policy": [{"beams": 99}]}, "train.on_policy.beams=99, but the catalogue of .* has 40 titles"),
        ({"sft.negatives": [9], "template.request": "{candidates}"}, "sft.negatives=9, but the prepared data holds 6"),
    ):  # what training would refuse only once the SFT start is there
        refused(words, {"k": 4} | axes, own=own)
    refused("own_shots-9999_k-4_dmpo_seed-0: shots=9999, but .* holds", {"k": 4, "shots": [16, 9999]}, own=own)
    refused(
        "was prepared with seed=0, the grid now says 1; give the dataset another name", {"k": 4}, own=own | {"seed": 1}
    )
    more = {"prepare": SETTINGS | {"max_history": 5}}
    refused("data.max_history=20, the grid now says 5", {"k": 4}, own=more)
    source = SETTINGS["source"] | {"columns": {"rating": "stars"}}
    columns = {"prepare": SETTINGS | {"source": source}}
    refused(r"data.source.columns=\{\}, the grid now says \{'rating': 'stars'\}", {"k": 4}, own=columns)
    card = tmp_path / "out/data/own/dataset.json"
    card.write_text(card.read_text().replace('"columns": {}', '"columns": {"rating": "stars"}', 1))
    refused(r"data.source.columns=\{'rating': 'stars'\}, the grid now says \{\}", {"k": 4}, own=own)


def test_the_folder_of_a_study_holds_its_grid(tmp_path, monkeypatch):
    """Also where it was given by a relative path and with overrides, and once it is moved."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(next(grid for grid in GRIDS if grid.stem == "experiment_k_sweep"), "here.yaml")
    Path("more.yaml").write_text("train: {log_every: 3}")
    grid = read_grid(Path("here.yaml"), ["output_dir=study", "train.weight_decay=0.5"])
    grid = grid.model_copy(update={"config": [*grid.config, "more.yaml"]})
    Path("study").mkdir()
    keep_grid(grid)
    shutil.move("study", "moved")
    monkeypatch.chdir("moved")
    found = read_grid(tmp_path / "moved")
    assert found.output_dir == tmp_path / "moved"
    cells = [[(cell.name, cell.config.train) for cell in expand(one)] for one in (found, grid_in(tmp_path, grid))]
    assert cells[0] == cells[1]
    assert {config.log_every for _, config in cells[0]} == {3}
    assert {config.weight_decay for _, config in cells[0]} == {0.5}
    with pytest.raises(UserError, match="holds no study to go on with"):
        read_grid(tmp_path)


def grid_in(folder, grid: GridConfig) -> GridConfig:
    """``grid`` with the file of its configuration by an absolute path."""
    return grid.model_copy(update={"config": [*grid.config[:-1], str(folder / "more.yaml")]})
