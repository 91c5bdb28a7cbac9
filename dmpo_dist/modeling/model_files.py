"""The files of a model folder by their digests: what tells a model from another, and whether it is what was written.

Training and export leave the digests of what they wrote in ``dmpo.json``. A folder without them, such as a model of
somebody else's, is taken as it is.
"""

from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from dmpo_dist.artifacts.digest import digests_of, file_digest, json_digest
from dmpo_dist.artifacts.environment import Environment
from dmpo_dist.artifacts.stamp import ModelStamp
from dmpo_dist.errors import UserError
from dmpo_dist.modeling.backbone import ADAPTER, ModelSource, find_model
from dmpo_dist.parsing import parse_json

MODEL_FILES = ("*.safetensors", "*.bin", "*.json", "*.model", "*.jinja")
WEIGHTS = MODEL_FILES[:2]
FREE = ("generation_config.json", "README.md", ModelStamp.FILE)
"""Files that no score depends on, and the one that holds the digests."""


def content_digests(model: str) -> dict[str, str]:
    """File -> digest of a model's folder, or the revision of a downloaded hub id; {} for one that is not downloaded."""
    folder = Path(model)
    if folder.exists():
        files = {path for pattern in MODEL_FILES for path in folder.glob(pattern) if path.is_file()}
        return digests_of(folder, (path for path in files if path.name != ModelStamp.FILE))
    config = try_to_load_from_cache(model, "config.json")
    return {"revision": Path(config).parent.name} if isinstance(config, str) else {}


def start_digests(source: ModelSource) -> dict[str, str]:
    """``content_digests`` of a model and, where it is an adapter, of its base; the names begin with base or adapter.

    Raises:
        UserError: a file is not what training wrote.
    """
    folders = {"base": source.base} | ({"adapter": source.path} if source.is_adapter else {})
    found = {part: content_digests(model) for part, model in folders.items()}
    for part, model in folders.items():
        _require(model, found[part])
    _require_base(source, found["base"])
    return {f"{part}/{name}": digest for part, digests in found.items() for name, digest in digests.items()}


def start_was_changed(source: ModelSource) -> bool:
    """Whether the model that ``source`` was trained from holds other weights now than its run wrote down.

    False where the run's folder or that model are not there to say so.
    """
    start, environment = source.stamp.start, Environment.read_if_there(Path(source.path).parent)
    if not start or not Path(start).is_dir() or environment is None or not environment.start_digests:
        return False
    try:
        return start_digests(find_model(start)) != environment.start_digests
    except UserError:  # damaged, or no model any more
        return True


def weights_key(source: ModelSource) -> dict[str, str]:
    """``start_digests`` for a key of what the weights gave: a hub id that is not downloaded yet stands for itself.

    Raises:
        UserError: a file is not what training wrote.
    """
    digests = start_digests(source)
    named = {"base": source.base} | ({"adapter": source.path} if source.is_adapter else {})
    return digests | {part: name for part, name in named.items() if not any(d.startswith(f"{part}/") for d in digests)}


def require_as_written(source: ModelSource) -> None:
    """Raise UserError where a file of the model or of its base is not what training or export wrote.

    Every file is read once, 0.11 s for a GiB that is in memory.
    """
    for model in {source.path, source.base}:
        _require(model, {})
    if source.stamp.base_digests:
        _require_base(source, weights_digests(source.base))


def weights_digests(model: str) -> dict[str, str]:
    """File -> digest of the weights in a model's folder; {} for a hub id."""
    folder = Path(model)
    files = [path for pattern in WEIGHTS for path in folder.glob(pattern)] if folder.is_dir() else []
    return digests_of(folder, files)


def written_digests(folder: Path) -> dict[str, str]:
    """Path -> digest of the files of a model folder that was just written, for its ``dmpo.json``."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in FREE)
    return {path.relative_to(folder).as_posix(): _digest(path) for path in sorted(files)}


def damage_of(folder: Path, stamp: ModelStamp, known: Mapping[str, str] | None = None) -> str:
    """What is wrong with the files that ``stamp`` names by their digests, a sentence; "" where nothing is.

    Args:
        known: digests of files that have been computed already.
    """
    for name, written in (stamp.digests or {}).items():
        file = folder / name
        if file.name in FREE:
            continue
        try:
            found = (known or {}).get(name) or file_digest(file)
            if written not in (found, _digest(file) if file.name == ADAPTER else found):
                return f"{name} is damaged or was changed, by its digest in {ModelStamp.FILE}"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return ""


def _require(model: str, known: Mapping[str, str]) -> None:
    folder = Path(model)
    stamp = ModelStamp.read_if_there(folder)
    why = damage_of(folder, stamp, known) if stamp else ""
    if why:
        raise UserError(
            f"{folder}: {why}; copy the model again or, if you changed it yourself, remove the key digests there"
        )


def _require_base(source: ModelSource, now: Mapping[str, str]) -> None:
    """Raise UserError where an adapter was trained on other weights than its base has ``now`` (file -> digest)."""
    for name, digest in (source.stamp.base_digests or {}).items():
        if source.is_adapter and now.get(name, digest) != digest:
            raise UserError(
                f"{source.base}: {name} is not what the adapter {source.path} was trained on; was that base trained "
                "again in its folder? Bring it back, or train the adapter again; if all is well, remove the key "
                f"base_digests from the adapter's {ModelStamp.FILE}"
            )


def _digest(file: Path) -> str:
    """Of a file; of an adapter's configuration without the folder of its base, which may be corrected."""
    if file.name != ADAPTER:
        return file_digest(file)
    try:
        content = parse_json(file.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, dict):
        return file_digest(file)
    return json_digest({key: value for key, value in content.items() if key != "base_model_name_or_path"})
