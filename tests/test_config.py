"""Configuration layers, overrides, and messages that name the key and what to write instead."""

import string
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from dmpo_dist.cli import app
from dmpo_dist.config import CONFIG_VERSION, RunConfig, config_of, dump_config, load_config
from dmpo_dist.config.keys import all_keys, find_key, keys_with, write_starting_file
from dmpo_dist.config.load import find_recipe
from dmpo_dist.errors import UserError

RECIPES = sorted((Path(__file__).parents[1] / "launch" / "recipes").glob("*.yaml"))
RECIPES = [recipe for recipe in RECIPES if not recipe.stem.startswith("experiment")]  # grids: test_experiment_grid.py


def write(folder, name, text):
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def message(layers=(), overrides=()):
    with pytest.raises(UserError) as error:
        load_config(list(layers), list(overrides))
    return str(error.value)


def test_later_layers_win_key_by_key_and_overrides_win_last(tmp_path):
    a = write(tmp_path, "a.yaml", "seed: 1\ntrain: {steps: 10, negatives: 3}\ncluster: {workers: 4}\n")
    b = write(tmp_path, "b.yaml", "train: {negatives: 5}\nmodel: {lora: {r: 8}}\n")
    empty = write(tmp_path, "empty.yaml", "# nothing yet\n")
    config = load_config([a, b, empty], ["train.steps=20", "model.lora.alpha=64", "train.steps=30"])
    assert (config.seed, config.cluster.workers) == (1, 4)
    assert (config.train.steps, config.train.negatives) == (30, 5)
    assert (config.model.lora.r, config.model.lora.alpha) == (8, 64.0)
    assert load_config([b, a]).train.negatives == 3
    assert config.sft == RunConfig().sft, "an untouched section has changed"
    assert load_config([]) == RunConfig()


_sections = st.dictionaries(
    st.sampled_from(["steps", "negatives", "log_every", "token_budget"]), st.integers(16, 99), max_size=4
)
_layers = st.lists(st.dictionaries(st.sampled_from(["train", "seed"]), _sections, max_size=2), max_size=4)


@given(_layers.map(lambda layers: [layer | ({"seed": 3} if "seed" in layer else {}) for layer in layers]))
@settings(max_examples=50, deadline=None)
def test_each_key_has_its_value_from_the_last_layer_that_names_it(tmp_path_factory, layers):
    folder = tmp_path_factory.getbasetemp()
    config = load_config([write(folder, f"{i}.yaml", yaml.safe_dump(layer)) for i, layer in enumerate(layers)])
    assert config.seed == (3 if any("seed" in layer for layer in layers) else 0)
    for key in ["steps", "negatives", "log_every", "token_budget"]:
        named = [layer["train"][key] for layer in layers if key in layer.get("train", {})]
        assert getattr(config.train, key) == (named[-1] if named else getattr(RunConfig().train, key))


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.learning_rate=1e-4", 1e-4),  # YAML 1.1 reads a string here
        ("train.learning_rate=3.0e-5", 3e-5),
        ("train.learning_rate=1", 1.0),
        ("train.self_check=false", False),
        ("train.steps=null", None),
        ("model.lora={r: 4, alpha: 8}", {"r": 4, "alpha": 8.0, "target_modules": "all-linear", "variant": "lora"}),
        ("model.lora.target_modules=[q_proj, v_proj]", ["q_proj", "v_proj"]),
        ("model.lora={}", {"r": 16, "alpha": 32.0, "target_modules": "all-linear", "variant": "lora"}),
        ("data.source.columns={user: uid}", {"user": "uid"}),
        ("data.path=a=b/c", Path("a=b/c")),
        ("submit.slurm.time=12:00:00", "12:00:00"),  # YAML 1.1 reads 43200 here
        ("submit.slurm.time=90", "90"),
        ("template.response={title}", "{title}"),
        ("template.item={title}{end}", "{title}{end}"),
        ("template.terminator={eos}", "{eos}"),
        ("template.item=- {title}", "- {title}"),
        ("template.request=Next:", "Next:"),
        ("template.request= Next: ", " Next: "),
        ("template.request=Liked: [a, b]", "Liked: [a, b]"),
        ("template.preamble=", ""),
        ("template.preamble=# Liked", "# Liked"),
        ('template.terminator="\\n"', "\n"),
    ],
)
def test_override_values_are_read_as_meant(override, value):
    seen = load_config([], [override])
    for part in override.partition("=")[0].split("."):
        seen = getattr(seen, part)
    assert (seen.model_dump() if hasattr(seen, "model_dump") else seen) == value
    assert type(value) is not float or isinstance(seen, float)


@pytest.mark.parametrize("text", ["train:\n  learning_rate: 1e-4\n", "train: {learning_rate: '1e-4'}\n"])
def test_floats_without_a_dot_in_files(tmp_path, text):
    assert load_config([write(tmp_path, "a.yaml", text)]).train.learning_rate == 1e-4


@pytest.mark.parametrize(
    ("typo", "nearest"),
    [
        ("objectve", "objective"),
        ("objective.betta", "objective.beta"),
        ("train.learning-rate", "train.learning_rate"),
        ("sft.learnig_rate", "sft.learning_rate"),
        ("train.negative", "train.negatives"),
        ("cluster.num_workers", "cluster.workers"),
        ("train.batch_size", "train.global_batch_size"),
        ("data.source.simulator.user", "data.source.simulator.users"),
        ("model.lora.rank", "model.lora.r"),
        ("ouput_dir", "output_dir"),
        ("Seed", "seed"),
    ],
)
def test_an_unknown_key_names_the_nearest(typo, nearest):
    assert (
        f"{typo}: unknown key; the nearest known key is {nearest}" in message(overrides=[f"{typo}=1"]).splitlines()[1]
    )


@given(st.text(string.printable, min_size=1, max_size=12).filter(lambda key: key.strip() not in RunConfig.model_fields))
@settings(max_examples=50, deadline=None)
def test_whatever_the_unknown_key_there_is_an_answer(tmp_path_factory, key):
    layer = write(tmp_path_factory.getbasetemp(), "a.yaml", yaml.safe_dump({key: 1}))
    text = message([layer])
    assert "unknown key; the nearest known key is " in text
    assert str(layer) in text


def test_every_mistake_is_listed_at_once(tmp_path):
    layer = write(tmp_path, "a.yaml", "train: {steps: 0, negativs: 3}\nmodel: {dtype: fp8}\n")
    lines = message([layer], ["seed=x"]).splitlines()
    assert lines[0] == f"configuration ({layer}, the command line):"
    assert {line.split(":")[0].strip() for line in lines[1:]} == {
        "train.steps",
        "train.negativs",
        "model.dtype",
        "seed",
    }
    assert "(got 'fp8')" in "\n".join(lines)
    assert message([], ["sft.stps=5"]).startswith("configuration (the command line):")


def test_a_mistake_on_the_command_line_is_not_blamed_on_the_file(tmp_path):
    layer = write(tmp_path, "a.yaml", "train: {steps: 5}\n")
    assert message([layer], ["sft.stps=5"]).startswith("configuration (the command line):")
    assert message([layer], ["train=5"]).startswith("configuration (the command line):")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            f"version={CONFIG_VERSION + 1}",
            f"is of version {CONFIG_VERSION + 1}, this dmpo reads version {CONFIG_VERSION}",
        ),
        ("template.item=no title", "template.item: must contain {title} (got 'no title')"),
        ("template.response=", "template.response: must contain {title} (got '')"),
        ("data.test_quantile=0.5", "data: validation_quantile must be smaller than test_quantile"),
        ("seed=-1", "seed: Input should be greater than or equal to 0 (got -1)"),
        ("train=3", "train: Input should be a valid dictionary"),
        ("objective.label_smoothing=0.5", "objective.label_smoothing: Input should be less than 0.5"),
        ("train.steps", "override 'train.steps' is not of the form key=value"),
        ("=3", "override '=3' is not of the form key=value"),
    ],
)
def test_bad_values_are_explained(override, expected):
    assert expected in message(overrides=[override])


@pytest.mark.parametrize(("override", "expected"), [
    ("evaluation.token_budget=99999999999999999999", "evaluation.token_budget: the number .* more than 64 bits"),
    ("train.steps='99999999999999999999'", "train.steps: the number .* more than 64 bits"),
    ("train.epochs=1e308", "train.epochs: .*less than or equal to 1000000"),
    ("evaluation.bootstrap_samples=10000000000000", "evaluation.bootstrap_samples: .*less than or equal to 1000000"),
])  # fmt: skip
def test_numbers_that_no_run_could_keep_or_count_are_refused(override, expected):
    """Text of the command line becomes a number only when it is checked, and config.yaml must be read back."""
    with pytest.raises(UserError, match=expected):
        load_config([], [override])


def test_passes_are_refused_where_steps_count(tmp_path):
    layer, above = tmp_path / "steps.yaml", tmp_path / "above.yaml"
    layer.write_text("train: {steps: 7, epochs: 2}\n")  # as in the configuration that a run leaves
    above.write_text("train: {epochs: 3}\n")
    assert load_config([layer]).train.steps == 7
    assert load_config([above, layer]).train.steps == 7
    assert load_config([layer], ["train.epochs=3", "train.steps=null"]).train.epochs == 3
    for make in (
        lambda: load_config([layer, above]),
        lambda: load_config([layer], ["train.epochs=3"]),
        lambda: config_of({"train.steps": 2, "train.epochs": 3}),
    ):
        with pytest.raises(UserError, match=r"train.epochs has no effect while train.steps=\d is set; add train.steps"):
            make()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"train: [1, 2\n", "not valid YAML"),
        (b"train: {a: b: c}\n", "not valid YAML"),
        (b"- train\n- sft\n", "must hold a mapping of keys to values, not a list"),
        (b"just text\n", "must hold a mapping of keys to values, not a str"),
        (b"seed: \xff\xfe\n", "cannot be read"),
        (b"1: 2\n", "1: "),
    ],
)
def test_unreadable_layers_are_named(tmp_path, content, expected):
    layer = tmp_path / "layer.yaml"
    layer.write_bytes(content)
    text = message([layer])
    assert str(layer) in text
    assert expected in text


def test_off_is_a_word_in_files_and_on_the_command_line(tmp_path):
    """YAML 1.1 reads it as false."""
    (tmp_path / "a.yaml").write_text("reference: {cache: off}")
    assert load_config([tmp_path / "a.yaml"]).reference.cache == "off"
    assert load_config([], ["reference.cache=off"]).reference.cache == "off"
    assert load_config([], ["reference.cache=disk"]).reference.cache == "disk"


def test_a_missing_layer_is_named(tmp_path):
    assert f"{tmp_path / 'none.yaml'}: no such configuration file" in message([tmp_path / "none.yaml"])
    assert f"{tmp_path}: cannot be read" in message([tmp_path])


_texts = st.text(st.characters(codec="utf-8"), max_size=20)
_rates = st.floats(1e-12, 1e6, exclude_min=True)


@given(
    template=st.fixed_dictionaries(
        {"preamble": _texts, "request": _texts, "item": _texts.map("{title}".__add__), "terminator": _texts}
    ),
    rate=_rates,
    lora=st.none() | st.fixed_dictionaries({"r": st.integers(1, 64), "target_modules": st.just(["q_proj", "v_proj"])}),
    path=st.none() | st.text(string.ascii_letters + " /.-", min_size=1, max_size=9),
    steps=st.none() | st.integers(1, 10**9),
)
@settings(max_examples=50, deadline=None)
def test_a_dumped_configuration_loads_to_an_equal_one(tmp_path_factory, template, rate, lora, path, steps):
    config = RunConfig.model_validate(
        {
            "template": template, "train": {"learning_rate": rate, "steps": steps}, "model": {"lora": lora},
            "data": {"path": path, "source": {"columns": {"user": template["preamble"]}}},
        }
    )  # fmt: skip
    for extent in ("all", "saved", "changed"):
        layer = write(tmp_path_factory.getbasetemp(), "config.yaml", dump_config(config, extent))
        assert load_config([layer]) == config


def test_what_is_shown_are_the_keys_that_differ(tmp_path):
    overrides = ["train.steps=7", "model.lora={}", "submit.slurm.partition=gpu", "train.negatives=7", "data.path=null"]
    runner, show = CliRunner(), ["config", "show", *overrides]
    assert yaml.safe_load(runner.invoke(app, show).stdout) == {
        "train": {"steps": 7}, "model": {"lora": {}}, "submit": {"slurm": {"partition": "gpu"}},
    }  # fmt: skip
    assert yaml.safe_load(runner.invoke(app, ["train", "--dry-run", *overrides]).stdout)["train"] == {"steps": 7}
    assert yaml.safe_load(runner.invoke(app, [*show, "--all"]).stdout) == load_config([], overrides).model_dump(
        mode="json"
    )
    assert yaml.safe_load(runner.invoke(app, ["config", "show"]).stdout) == {}


def test_a_run_on_this_machine_keeps_no_settings_of_clusters():
    saved = yaml.safe_load(dump_config(RunConfig()))
    assert set(RunConfig.model_fields) - set(saved) == {"submit", "serving", "tune"}
    nodes = RunConfig.model_validate({"submit": {"nodes": 2}})
    assert yaml.safe_load(dump_config(nodes)) == nodes.model_dump(mode="json", exclude={"serving", "tune"})


@pytest.mark.parametrize(
    "text", ["\x85", "\u2028", "a\u2029b", "\r\n\t", " x ", "1e-4", "null", "{a: b}", "- a: b #", "東京 🎬"]
)
def test_texts_that_look_like_something_else_in_yaml_survive(tmp_path, text):
    config = RunConfig.model_validate({"template": {"preamble": text, "terminator": text}})
    assert load_config([write(tmp_path, "config.yaml", dump_config(config))]) == config


@pytest.mark.parametrize("recipe", RECIPES, ids=[recipe.stem for recipe in RECIPES])
def test_recipes_are_valid(recipe):
    config = load_config([recipe])
    assert load_config([recipe], [f"version={CONFIG_VERSION}"]) == config
    assert config != RunConfig()


def test_there_are_recipes():
    assert "quickstart" in {recipe.stem for recipe in RECIPES}


VERBS = ["sft", "train", "evaluate", "quickstart", "doctor", "plan", "explain", "data prepare"]
VERBS += ["submit train --to slurm", "rank -m x --requests x --output x"]
HEAVY = ["torch", "ray", "transformers", "datasets", "deepspeed"]


def test_mistakes_are_told_before_heavy_libraries_are_imported(tmp_path):
    recipe = [f"{verb} -c movie" for verb in VERBS if verb != "quickstart"]
    commands = [f"{verb} nosuch=1" for verb in VERBS] + recipe
    commands += [f"{verb} data.path=nowhere" for verb in ("sft", "train", "evaluate")]
    script = f"""
import sys
from dmpo_dist.cli import main
for command in {commands}:
    sys.argv = ["dmpo", *command.split()]
    try:
        main()
    except SystemExit as end:
        print(command, end.code, [name for name in {HEAVY} if name in sys.modules], sep=": ")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.splitlines() == [f"{command}: 2: []" for command in commands], done.stderr


def test_keys_are_found_and_explained():
    keys = all_keys()
    assert keys["train.learning_rate"].default == "0.0001"
    assert keys["objective.name"].help
    assert [name for name, key in keys.items() if not key.help] == []
    assert "data.max_history" in {key.name for key in keys_with("HISTORY")}
    with pytest.raises(UserError, match=r"train\.lr: unknown key; the nearest known key is train\.learning_rate"):
        find_key("train.lr")


def test_the_starting_file_is_a_configuration(tmp_path):
    write_starting_file(tmp_path / "my.yaml")
    config = load_config([tmp_path / "my.yaml"])
    assert config.data.source.path == Path("log.csv")
    assert config.template == RunConfig().template
    with pytest.raises(UserError, match=r"my\.yaml: exists already and is kept"):
        write_starting_file(tmp_path / "my.yaml")


def test_grids_are_no_recipes():
    with pytest.raises(UserError, match=r"is the grid of a study, which `dmpo experiment experiment_tiny` runs"):
        find_recipe("experiment_tiny", "--config")


@pytest.mark.parametrize("key", ["cluster.workers", "train.learning_rate", "train.steps", "evaluation.catalogue_beams"])
def test_true_is_no_number(key):
    value = "[true]" if key.endswith("beams") else "true"
    assert f"{key}: must be a number, not true or false" in message(overrides=[f"{key}={value}"])


def test_a_path_in_the_home_directory_is_found_there(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    layer = write(tmp_path, "home.yaml", "data: {path: ~/data}\nranking: {reference: ~/model}\n")
    config = load_config(
        [layer], ["output_dir=~/run", "model.path=~/m", "deepspeed=~/d.json", "template.item=~/{title}"]
    )
    assert config.data.path == tmp_path / "data"
    assert config.output_dir == tmp_path / "run"
    assert [config.model.path, config.deepspeed, config.ranking.reference] == [
        str(tmp_path / name) for name in ("m", "d.json", "model")
    ]
    assert config.template.item == "~/{title}", "a text of a prompt is no path"
    given = config_of({"data.path": Path("~/data"), "output_dir": Path("~/run"), "model.path": Path("~/m")})
    assert (given.data.path, given.output_dir, given.model.path) == (
        tmp_path / "data",
        tmp_path / "run",
        str(tmp_path / "m"),
    )


def test_a_mapping_needs_no_space_after_its_colons():
    given = ["data.source.columns={user:customer,item: sku}", "model.lora={r:8,alpha:64.0}", "template.item={title}"]
    config = load_config([], given)
    assert config.data.source.columns == {"user": "customer", "item": "sku"}
    assert (config.model.lora.r, config.model.lora.alpha) == (8, 64.0)
    assert config.template.item == "{title}"
