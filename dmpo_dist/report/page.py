"""From run folders to one self-contained HTML file."""

import base64
import hashlib
import re
from collections.abc import Callable, Sequence
from importlib import resources
from itertools import count
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

import dmpo_dist
from dmpo_dist.artifacts.files import write_whole
from dmpo_dist.errors import UserError
from dmpo_dist.figures.style import Drawing, chart
from dmpo_dist.formats import number, size
from dmpo_dist.report.downloads import TableFiles, table_files, with_downloads
from dmpo_dist.report.gather import MARK, Material, gather, is_report
from dmpo_dist.report.parts import SECTIONS, make_page
from dmpo_dist.tables import Table

TABLE_NAME = re.compile(r"\d\d+-[a-z0-9-]+\.(csv|tex)")


def write_report(
    folders: Sequence[Path],
    output: Path,
    explanations: bool,
    echo: Callable[[str], None],
    tables: Path | None = None,
) -> None:
    """Make the page about ``folders`` and write it to ``output``; an earlier report there is replaced.

    Args:
        folders: see ``gather``.
        output: an HTML file; its folder is made.
        explanations: whether explanations of single users are shown.
        echo: is called with lines for the user.
        tables: a folder for each table of the page as CSV and LaTeX; None writes none.

    Raises:
        UserError: see ``gather``; or ``output`` exists and is not a report, or ``tables`` holds other files.
    """
    if output.suffix != ".html":
        raise UserError(f"--output {output}: must end in .html")
    if output.exists() and not is_report(output):
        raise UserError(f"{output} exists already and is not a dmpo report; give another file by --output")
    if tables is not None and tables.exists() and not _only_tables(tables):
        raise UserError(f"--tables {tables}: holds other files than such tables; give another folder")
    material = gather(folders, explanations)
    content, files = render_with_tables(material)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(output, content)
    if tables is not None:
        _write_tables(tables, files)
    for note in material.notes:
        echo(f"note: {note}")
    echo(f"written: {output} ({size(len(content))}, one file, nothing in it is loaded from elsewhere)")
    if tables is not None:
        echo(f"written: {tables}/ ({len(files)} tables, each as CSV and LaTeX)")


def render(material: Material) -> bytes:
    """The page as UTF-8; equal material gives equal bytes."""
    return render_with_tables(material)[0]


def render_with_tables(material: Material) -> tuple[bytes, list[TableFiles]]:
    """The page, and its tables from top to bottom.

    Titles and names come from data and could hold HTML. Everything is escaped, and the content security policy keeps a
    browser from loading anything and from running any script but the page's own, which it knows by its hash.
    """
    style, script = _part("style.css"), _part("page.js")
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_digest(style)}'; script-src '{_digest(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    environment = Environment(
        loader=PackageLoader("dmpo_dist.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    numbers = count(1)

    def svg(drawing: Drawing) -> Markup:
        return chart(drawing, next(numbers))

    files: list[TableFiles] = []

    def table(shown: Table) -> Markup:
        files.append(table_files(shown, len(files) + 1))
        return with_downloads(shown, files[-1])

    environment.filters["svg"] = svg
    environment.filters["table"] = table
    text = environment.get_template("page.html.j2").render(
        page=make_page(material),
        headings={key: heading for key, (heading, _) in SECTIONS.items()},
        number=number,
        mark=Markup(MARK),
        policy=policy,
        style=Markup(style),
        script=Markup(script),
        version=dmpo_dist.__version__,
    )
    return text.encode("utf-8", errors="replace"), files  # half a surrogate pair in a title becomes a question mark


def _only_tables(folder: Path) -> bool:
    """Whether a folder holds nothing but what ``_write_tables`` writes."""
    return folder.is_dir() and all(TABLE_NAME.fullmatch(file.name) for file in folder.iterdir())


def _write_tables(folder: Path, files: Sequence[TableFiles]) -> None:
    """Write all tables into ``folder``, and remove those of an earlier report."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    for table in files:
        write_whole(folder / f"{table.name}.csv", table.csv.encode("utf-8", errors="replace"))
        write_whole(folder / f"{table.name}.tex", table.latex.encode("utf-8", errors="replace"))


def _part(name: str) -> str:
    return (resources.files("dmpo_dist.report") / "templates" / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
