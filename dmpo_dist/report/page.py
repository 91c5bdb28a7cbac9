"""From run folders to one self-contained HTML file."""

import base64
import hashlib
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
from dmpo_dist.report.gather import MARK, Material, gather, is_report
from dmpo_dist.report.parts import SECTIONS, make_page
from dmpo_dist.tables import html


def write_report(folders: Sequence[Path], output: Path, explanations: bool, echo: Callable[[str], None]) -> None:
    """Make the page about ``folders`` and write it to ``output``; an earlier report there is replaced.

    Args:
        folders: see ``gather``.
        output: an HTML file; its folder is made.
        explanations: whether explanations of single users are shown.
        echo: is called with lines for the user.

    Raises:
        UserError: see ``gather``; or ``output`` exists and is not a report.
    """
    if output.suffix != ".html":
        raise UserError(f"--output {output}: must end in .html")
    if output.exists() and not is_report(output):
        raise UserError(f"{output} exists already and is not a dmpo report; give another file by --output")
    material = gather(folders, explanations)
    content = render(material)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(output, content)
    for note in material.notes:
        echo(f"note: {note}")
    echo(f"written: {output} ({size(len(content))}, one file, nothing in it is loaded from elsewhere)")


def render(material: Material) -> bytes:
    """The page as UTF-8; equal material gives equal bytes.

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

    environment.filters["svg"] = svg
    environment.filters["table"] = html
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
    return text.encode("utf-8", errors="replace")  # half a surrogate pair in a title becomes a question mark


def _part(name: str) -> str:
    return (resources.files("dmpo_dist.report") / "templates" / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
