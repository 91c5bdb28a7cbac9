"""What a template's placeholders beside {title} stand for: genres, descriptions and other fields of items and users."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import pandas as pd

from dmpo_dist.artifacts.files import write_json
from dmpo_dist.config import TemplateConfig
from dmpo_dist.errors import UserError

TEXTS_FILE = "item_texts.json"
"""Beside a model whose prompts show fields of items: title -> field -> text, so that it ranks without the data."""
Fields = Mapping[str, str]


@dataclass(frozen=True)
class PromptTexts:
    """Fields of items by title, and of users by name.

    Attributes:
        items, users: title or user -> field -> text on one line.
        item_fields, user_fields: what the template asks for.
    """

    items: Mapping[str, Fields] = field(default_factory=dict)
    users: Mapping[str, Fields] = field(default_factory=dict)
    item_fields: tuple[str, ...] = ()
    user_fields: tuple[str, ...] = ()

    def of_items(self, titles: Iterable[str]) -> dict[str, Fields]:
        """The fields of ``titles``; raises UserError for a title without those that the template asks for."""
        return {title: self._found("title", title, self.items, self.item_fields) for title in titles}

    def of_user(self, user: str) -> Fields:
        """The fields of ``user``; raises UserError for a user without those that the template asks for."""
        return self._found("user", user, self.users, self.user_fields)

    def _found(self, what: str, name: str, known: Mapping[str, Fields], asked: tuple[str, ...]) -> Fields:
        fields = known.get(name, {})
        missing = next((field for field in asked if field not in fields), None)
        if missing is not None:
            where = "--catalogue, data.path or the model's folder" if what == "title" else "--requests or data.path"
            raise UserError(f"{what} {name!r}: its {missing}, which prompts show as {{{missing}}}, is not in {where}")
        return fields

    def with_items(self, table: pd.DataFrame | None) -> Self:
        """The same with the rows of ``table`` (columns title and fields) on top, where it has all that is asked for."""
        if table is None or not set(self.item_fields) <= set(table.columns):
            return self
        return self._with("items", table["title"], table, self.item_fields)

    def with_users(self, table: pd.DataFrame | None) -> Self:
        """The same with the rows of ``table`` (columns user and fields) on top, where it has all that is asked for."""
        if table is None or not set(self.user_fields) <= set(table.columns):
            return self
        return self._with("users", table["user"], table, self.user_fields)

    def _with(self, part: str, names: pd.Series, table: pd.DataFrame, fields: tuple[str, ...]) -> Self:
        columns = [[_on_one_line(text, field) for text in table[field]] for field in fields]
        rows = (dict(zip(fields, texts, strict=True)) for texts in zip(*columns, strict=True))
        known = dict(zip((str(name).strip() for name in names), rows, strict=True)) if fields else {}
        own = {"items": self.items, "users": self.users, part: {**getattr(self, part), **known}}
        return type(self)(own["items"], own["users"], self.item_fields, self.user_fields)

    def texts(self) -> list[str]:
        """Every distinct text, sorted."""
        return sorted({text for part in (self.items, self.users) for of in part.values() for text in of.values()})

    def write(self, folder: Path) -> None:
        """Leave the fields of the items beside a model, where its prompts show any."""
        if self.item_fields:
            write_json(folder / TEXTS_FILE, self.items)


def texts_of_model(template: TemplateConfig, folder: Path) -> PromptTexts:
    """What ``template`` asks for, with the items that training left beside the model.

    Raises:
        UserError: the file is damaged.
    """
    texts = PromptTexts(item_fields=template.item_fields, user_fields=template.user_fields)
    file = folder / TEXTS_FILE
    if not texts.item_fields or not file.is_file():
        return texts
    try:
        items = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: damaged ({error}); copy the model again") from None
    return PromptTexts(items, {}, texts.item_fields, texts.user_fields)


def require_fields(
    template: TemplateConfig, items: pd.DataFrame | None, users: pd.DataFrame | None, where: str
) -> None:
    """Raise UserError where ``template`` has a placeholder that the data in ``where`` knows no text for."""
    known = {"item": _fields_of(items), "user": _fields_of(users)}
    parts = {"item": "template.item", "user": "template.preamble or template.request"}
    keys = {"item": "columns or data.source.items_columns", "user": "users_path and data.source.users_columns"}
    for kind, asked in (("item", template.item_fields), ("user", template.user_fields)):
        unknown = next((field for field in asked if field not in known[kind]), None)
        if unknown is not None:
            listed = ", ".join(f"{{{name}}}" for name in known[kind]) or "none"
            raise UserError(
                f"{parts[kind]}: {{{unknown}}} is no field of the {kind}s in {where}; known are {listed}. Prepare the "
                f"data with data.source.{keys[kind]} to add one"
            )


def _fields_of(table: pd.DataFrame | None) -> list[str]:
    """The columns of ``table`` that hold any text, but names and titles."""
    if table is None:
        return []
    return [name for name in table.columns if name not in ("item", "title", "user") and (table[name] != "").any()]


def _on_one_line(text: object, field: str) -> str:
    line = " ".join(str(text).split())
    return line.replace("|", ", ") if field == "genres" else line
