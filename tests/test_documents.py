"""What the documents say: commands parse, links lead somewhere, the README is short, imports are ordered as told."""

import ast
import inspect
import re
import runpy
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

import dmpo_dist
from dmpo_dist.cli import app
from dmpo_dist.config import load_config
from dmpo_dist.config.load import find_recipe
from dmpo_dist.errors import UserError

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SLOW_LIBRARIES = {"deepspeed", "peft", "bitsandbytes", "trl", "wandb", "mlflow"}
DMPO = typer.main.get_command(app)


def test_the_readme_has_at_most_1100_words():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1100


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_parse(page):
    text = page.read_text(encoding="utf-8")
    for command in printed_blocks(text):
        check(command, whole=True)
    for command in re.findall(r"`(dmpo [^`]+)`", text):
        check(" ".join(command.split()), whole=False)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("dmpo trian", "no such command"),
        ("dmpo data prepar data.path=a", "no such command"),
        ("dmpo train --dryrun", "--dryrun"),
        ("dmpo train -c movilens", "no recipe"),
        ("dmpo train train.learning_rat=1", "unknown key"),
        ("dmpo train train.steps=many", "valid integer"),
        ("dmpo rank -m exported", "output"),
    ],
)
def test_a_faulty_command_is_found(command, words):
    with pytest.raises((AssertionError, UserError), match=words):
        check(command, whole=True)


@pytest.mark.parametrize("page", ["README.md", "docs/PYTHON.md"])
def test_python_calls_fit_the_functions(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    calls = [line for line in re.findall(r"dmpo\.\w+\(.*\)", text) if "=)" not in line]
    assert calls
    for line in calls:
        for node in ast.walk(ast.parse(line.partition("  #")[0])):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.value.id == "dmpo":
                arguments, keywords = [None] * len(node.args), {keyword.arg: None for keyword in node.keywords}
                inspect.signature(getattr(dmpo_dist, node.func.attr)).bind(*arguments, **keywords)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(text)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page}: {target}"
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), f"{page}: {target}"


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    pages = [page.relative_to(ROOT / "docs") for page in (ROOT / "docs").rglob("*.md")]
    assert [str(page) for page in pages if page.name != "README.md" and f"]({page})" not in index] == []


def test_imports_follow_the_order_in_architecture():
    text = (ROOT / "docs" / "ARCHITECTURE.md").read_text(encoding="utf-8")
    table = text[text.index("| part | holds |") :]
    order = [name for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)]
    files = [file for file in (ROOT / "dmpo_dist").iterdir() if file.suffix == ".py" or (file / "__init__.py").exists()]
    assert set(order) == {file.stem for file in files if not file.stem.startswith("__")}
    backward, misplaced = [], []
    for file, module, top_level in imports():
        part, library = file.parts[0].removesuffix(".py"), module.split(".")[0]
        if library == "dmpo_dist" and part in order:
            other = module.split(".")[1] if "." in module else part
            if order.index(other) > order.index(part):
                backward.append((str(file), module))
            if part == "objectives" and other not in ("objectives", "config", "errors"):
                misplaced.append((str(file), module))
        if library == "ray" and part not in ("cluster", "doctor", "submit"):
            misplaced.append((str(file), module))
        if library in SLOW_LIBRARIES and top_level:
            misplaced.append((str(file), module))
    assert backward == []
    assert misplaced == []


def imports() -> Iterator[tuple[Path, str, bool]]:
    """File below dmpo_dist, imported module, and whether it is imported together with the file."""
    package = ROOT / "dmpo_dist"
    for file in package.rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                yield file.relative_to(package), node.module, node in tree.body
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    yield file.relative_to(package), alias.name, node in tree.body


def printed_blocks(text: str) -> Iterator[str]:
    """The `dmpo` commands of indented and fenced blocks, one line each."""
    fenced = re.findall(r"^```(?:bash|sh)?\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    indented = re.findall(r"(?:^    .*\n)+", text, re.MULTILINE)
    for line in "\n".join(fenced + indented).replace("\\\n", " ").splitlines():
        found = re.search(r"(?:^\s*dmpo|-m dmpo_dist|\bhead dmpo) (.*)", line)
        if found:
            yield f"dmpo {found[1]}"


def check(command: str, whole: bool) -> None:
    """Parse ``command`` without running it, its overrides too; inside a sentence (not ``whole``) it may lack options.

    Commands with ``...``, and alternatives with a bar as in `deepspeed=zero2|zero3`, are outlines and left out.
    """
    words, name = shlex.split(command, comments=True)[1:], "dmpo"
    if "..." in " ".join(words) or "|" in " ".join(words):
        return
    at: Any = DMPO
    while words and hasattr(at, "commands") and words[0] in at.commands:
        name = words.pop(0)
        at = at.commands[name]
    if hasattr(at, "commands"):  # a group of commands, which a sentence may name
        assert not words or words[0].startswith("--"), f"{command}: no such command"
        return
    try:
        given = at.make_context(name, words).params
    except Exception as error:
        if whole or type(error).__name__ != "MissingParameter":
            raise AssertionError(f"{command}: {error}") from None
        return
    if name == "experiment":
        return  # a grid has keys of its own
    layers = [recipe for layer in given.get("config") or [] if (recipe := known_recipe(str(layer)))]
    keys = [text for text in given.get("overrides") or [] if "=" in text or not given.get("resume")]
    try:
        load_config(layers, keys)
    except UserError as error:
        raise AssertionError(f"{command}: {error}") from None


def known_recipe(name: str) -> Path | None:
    """The recipe called ``name``; None for a file that only the reader has."""
    return None if name.endswith((".yaml", ".yml")) else find_recipe(name, "--config")


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```|^    .*$", "", text, flags=re.MULTILINE | re.DOTALL))


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives the headings."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_figures_of_the_results_are_those_that_are_told(tmp_path, monkeypatch):
    """Each number that is drawn stands in RESULTS.md, and the pictures are of these numbers."""
    folder = ROOT / "docs" / "figures"
    told = (ROOT / "docs" / "RESULTS.md").read_text(encoding="utf-8")
    for line in (folder / "results.csv").read_text(encoding="utf-8").splitlines()[1:]:
        *_, value, low, high = line.split(",")
        if not line.startswith(("training", '"steps')):  # these are of the logs
            assert all(number.lstrip("-") in told for number in (value, low, high)), line
    drawing = runpy.run_path(str(folder / "draw.py"))
    monkeypatch.setitem(drawing["main"].__globals__, "HERE", tmp_path)
    shutil.copy(folder / "results.csv", tmp_path)
    drawing["main"]()
    for picture in folder.glob("*.svg"):
        assert texts_of(tmp_path / picture.name) == texts_of(picture), "draw it again by python docs/figures/draw.py"


def texts_of(picture: Path) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)<", picture.read_text(encoding="utf-8"))
