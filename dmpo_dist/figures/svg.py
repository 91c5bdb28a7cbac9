"""From matplotlib's SVG file to an svg element that fits into a web page with several of them and a content policy."""

import re
from xml.etree.ElementTree import Element, SubElement, fromstring, tostring

SVG, XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"
TOOLTIP = "\u241e"
"""Separates the texts of a series' markers, which ``style.hover`` passes in the id of the series."""


def inline_svg(saved: str, title: str, alt: str, prefix: str) -> str:
    """Clean an SVG that matplotlib saved with ``svg.fonttype: none``.

    Inline styles become attributes: the page's content policy forbids inline styles, and its style sheet can override
    attributes. Fonts, the fixed size, metadata and ids without a reference are removed.

    Args:
        saved: the text of the file.
        title, alt: the element's accessible name and description.
        prefix: begins all ids of the element; no other element of the page may have the same prefix.
    """
    root = fromstring(saved)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{SVG}metadata", f"{SVG}style"):
                parent.remove(child)
    ids = {old: f"{prefix}-{number}" for number, old in enumerate(_referred(root))}
    for element in list(root.iter()):
        element.tag = element.tag.removeprefix(SVG)
        _add_tooltips(element)
        _clean(element, ids)
        if not (element.text or "").strip():
            element.text = None
        element.tail = None
    root.attrib = {
        "viewBox": root.attrib["viewBox"], "class": "chart", "role": "img",
        "aria-labelledby": f"{prefix}-title", "aria-describedby": f"{prefix}-alt",
    }  # fmt: skip
    for index, (tag, name, text) in enumerate((("title", "title", title), ("desc", "alt", alt))):
        element = Element(tag, {"id": f"{prefix}-{name}"})
        element.text = printable(text)
        root.insert(index, element)
    return tostring(root, encoding="unicode", short_empty_elements=False)


def printable(text: str) -> str:
    """``text`` with question marks for control characters and surrogates, which XML and fonts cannot represent."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _referred(root: Element) -> list[str]:
    """Ids that another element of the figure refers to, in order."""
    found = []
    for element in root.iter():
        found += re.findall(r"url\(#(.*?)\)", element.get("clip-path", ""))
        found += [element.get(f"{XLINK}href", "").removeprefix("#")] * (f"{XLINK}href" in element.attrib)
    return list(dict.fromkeys(found))


def _add_tooltips(element: Element) -> None:
    """Add a ``title`` to each marker of a series whose id holds texts for them; browsers show it as a tooltip."""
    _, *texts = element.get("id", "").split(TOOLTIP)
    markers = list(element.iter(f"{SVG}use"))
    if len(texts) == len(markers):
        for marker, text in zip(markers, texts, strict=True):
            SubElement(marker, "title").text = text


def _clean(element: Element, ids: dict[str, str]) -> None:
    attributes = dict(element.attrib)
    for declaration in filter(None, attributes.pop("style", "").split(";")):
        name, _, value = declaration.partition(":")
        if name.strip() != "font-family":
            attributes[name.strip()] = value.strip()
    old = attributes.pop("id", "")
    if old in ids:
        attributes["id"] = ids[old]
    if f"{XLINK}href" in attributes:
        attributes["href"] = "#" + ids[attributes.pop(f"{XLINK}href").removeprefix("#")]
    if "clip-path" in attributes:
        attributes["clip-path"] = re.sub(r"#(.*?)\)", lambda m: f"#{ids[m[1]]})", attributes["clip-path"])
    for name in ("d", "x", "y", "transform", "width", "height"):
        if name in attributes:
            tenths = re.sub(r"-?\d+\.\d+", lambda m: f"{float(m[0]):.2f}".rstrip("0").rstrip("."), attributes[name])
            attributes[name] = " ".join(tenths.split())
    if attributes.get("transform", "").startswith("rotate(-0"):
        del attributes["transform"]
    element.attrib = attributes
