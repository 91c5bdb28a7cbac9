"""An exported model handed to a model hub, by Hugging Face's own client."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dmpo_dist.errors import UserError
from dmpo_dist.modeling.backbone import ADAPTER
from dmpo_dist.parsing import first_line
from dmpo_dist.secrets import redact


def check_hub(repository: str) -> None:
    """Whether a push could work, before hours of other work: the name, a token, and a hub that knows it.

    Raises:
        UserError: it could not, and what to do.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repository)
        reason = "" if "/" in repository else "it names no user"
    except HFValidationError as error:
        reason = first_line(error)
    if reason:
        raise UserError(
            f"--push-to-hub {repository}: write USER/NAME or ORGANISATION/NAME, as in --push-to-hub me/ranker; {reason}"
        )

    with _told(f"--push-to-hub {repository}"):
        HfApi().whoami()


def push(folder: Path, repository: str, public: bool) -> str:
    """Upload ``folder`` to ``repository``, which is made where it does not exist, private unless ``public``.

    Returns:
        The address of the model.

    Raises:
        UserError: the hub refused it or cannot be reached; ``folder`` stays.
    """
    from huggingface_hub import HfApi

    _require_base_elsewhere(folder)
    with _told(f"{folder} is written, but --push-to-hub {repository}"):
        made = HfApi().create_repo(repository, private=not public, exist_ok=True)
        HfApi().upload_folder(repo_id=repository, folder_path=folder, commit_message="Written by dmpo export")
    return str(made)


def _require_base_elsewhere(folder: Path) -> None:
    """Raise UserError for an adapter whose base is a folder of this machine, which nobody else could load."""
    file = folder / ADAPTER
    base = json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"] if file.is_file() else ""
    if base and Path(base).exists():
        raise UserError(
            f"{folder} is written, but not pushed: its {ADAPTER} names the base by the folder {base}, which others do "
            "not have; export with --merge, or put the base's hub id there and push it by `hf upload`"
        )


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Errors of the client as one message."""
    import httpx
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    try:
        yield
    except LocalTokenNotFoundError:
        raise UserError(f"{what}: no token for the hub; log in by `hf auth login`, or set HF_TOKEN") from None
    except OfflineModeIsEnabled:
        raise UserError(f"{what}: HF_HUB_OFFLINE is set; unset it, or leave --push-to-hub out") from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no answer"
        hint = "is the token valid, and may it write there?" if status in (401, 403) else "try again"
        raise UserError(f"{what}: the hub refused it ({status}: {redact(first_line(error))}); {hint}") from None
    except ValueError as error:  # what the client raises where the hub does not take the header of README.md
        said = redact(" ".join(str(error).split()))
        raise UserError(f"{what}: the hub refused it ({said}); correct the file, and push it by `hf upload`") from None
    except (httpx.HTTPError, ConnectionError) as error:
        raise UserError(f"{what}: the hub cannot be reached ({redact(first_line(error))}); try again") from None
