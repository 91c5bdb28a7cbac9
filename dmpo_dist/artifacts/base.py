"""What all typed files have in common, and how a broken or foreign one is told."""

from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from dmpo_dist.artifacts.files import write_json
from dmpo_dist.errors import UserError
from dmpo_dist.parsing import first_line, parse_json, parse_yaml, read_text
from dmpo_dist.secrets import redacted


class Typed(BaseModel):
    """A part of a file. Keys that this version does not know are kept, and written again."""

    model_config = ConfigDict(extra="allow", populate_by_name=True, validate_assignment=True)

    def content(self) -> dict[str, Any]:
        """What stands in the file: the keys that were set, in plain JSON types."""
        return self.model_dump(by_alias=True, exclude_unset=True)


class Artifact(Typed):
    """A JSON file that a run leaves.

    Attributes:
        FILE: its name.
        ADVICE: what to do about a broken one.
    """

    FILE: ClassVar[str]
    ADVICE: ClassVar[str]

    @classmethod
    def read(cls, path: Path) -> Self:
        """The content of the file ``path``, or of the file of this kind in the folder ``path``.

        Raises:
            UserError: it cannot be read, is not JSON, or a field is missing or of another type.
        """
        file = path / cls.FILE if path.is_dir() else path
        text = read_text(file, "correct the path, or restore the file")
        try:
            content = parse_json(text, mend_halves=True)
        except ValueError as error:
            raise UserError(f"{file}: damaged, not JSON ({first_line(error)}); {cls.ADVICE}") from None
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise UserError(f"{file}: {first_problem(error)}; {cls.ADVICE}") from None

    @classmethod
    def read_if_there(cls, folder: Path) -> Self | None:
        """The content of the file of this kind in ``folder``, None where there is none; raises as ``read`` does."""
        return cls.read(folder) if (folder / cls.FILE).is_file() else None

    def write(self, folder: Path) -> None:
        """Write the file into ``folder``, whole."""
        write_json(folder / self.FILE, self.content())


def first_problem(error: ValidationError) -> str:
    """``field: what is wrong with it``, of the first field."""
    first = error.errors()[0]
    field = ".".join(map(str, first["loc"])) or "the file"
    return f"{field}: {first['msg'].lower()}"


def read_config(file: Path) -> dict[str, Any]:
    """A ``config.yaml`` of any version as a mapping, without the secrets that earlier ones let in; {} for no file.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    if not file.exists():
        return {}
    text = read_text(file, "restore or remove it")
    try:
        content = parse_yaml(text)
    except ValueError as error:
        raise UserError(f"{file}: damaged, cannot be read ({first_line(error)}); restore or remove it") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: damaged, it holds no mapping of keys to values; restore or remove it")
    return redacted(content)
