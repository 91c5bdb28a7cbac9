"""What a secret looks like, by the name of its setting or by its own shape: refused in settings, blotted out in texts.

A configuration is written into every run's folder, its reports, job scripts and ConfigMaps, so none may hold a secret.
Messages of libraries and folders of earlier versions may hold one all the same; what is told or shown is redacted.
"""

import re
from collections.abc import Mapping
from typing import Any

BLOT = "***"
ENDINGS = tuple("token secret secrets password passwd passphrase pass pwd key keys pat auth credential".split())
"""Last words of names like HF_TOKEN, WANDB_KEY, GITHUB_PAT and DB_PASS; MAX_TOKENS is none."""
INSIDE = ("secret", "password", "apikey")
"""Words that make any name with them one of a secret, such as AWS_SECRET_ACCESS_KEY_ID."""
HARMLESS = ("pwd",)
"""Whole names that only look like one: the working directory."""
SHAPES = [
    (re.compile(r"(?<=:/)(/?)[^/\s:@'\"]*:[^/\s'\"]+(?=@)"), rf"\g<1>{BLOT}"),  # https://user:password@host
    (re.compile(r"(?i)(?<=[?&;])((?:access_|api_?|auth_)?(?:token|key|password|secret|sig|signature)=)[^&\s'\"]+"),
     rf"\g<1>{BLOT}"),
    (re.compile(r"(?i)\b(bearer\s+)[A-Za-z0-9._~+/-]{12,}=*"), rf"\g<1>{BLOT}"),
    (re.compile(r"\b(?:hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{20,})"), BLOT),
    (re.compile(r"\b(?:sk-[A-Za-z0-9]{20,}|sk-(?:proj|ant|or)-[\w-]{20,}|xox[abprs]-[\w-]{16,})"), BLOT),
    (re.compile(r"\bwandb_v\d_\w{20,}"), BLOT),
    (re.compile(r"([A-Z][A-Z0-9_]*(?:TOKEN|SECRET|PASSWORD|PASSWD|_KEY|_PAT)=['\"]?)(?![$/*])[^\s'\"]{8,}"),
     rf"\g<1>{BLOT}"),  # export WANDB_API_KEY=...
    (re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"), BLOT),
    (re.compile(r"\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]{8,}"), BLOT),  # a JSON web token
    (re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.S), BLOT),
]  # fmt: skip
"""Patterns of secrets, and what stands for one that is found."""


def named_like_a_secret(name: str) -> bool:
    """Whether a variable or key of this name holds a secret: HF_TOKEN and githubPat do, TOKEN_BUDGET does not."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().replace("-", "_").split("_")
    together = "".join(words)
    return name.lower() not in HARMLESS and (words[-1] in ENDINGS or any(word in together for word in INSIDE))


def redact(text: str) -> str:
    """``text`` with everything that has a secret's shape blotted out."""
    for shape, blot in SHAPES:
        text = shape.sub(blot, text)
    return text


def has_secret(text: str) -> bool:
    """Whether something in ``text`` has a secret's shape."""
    return redact(text) != text


def redacted(content: Any) -> Any:
    """Nested lists and mappings with the secrets in their texts blotted out."""
    if isinstance(content, Mapping):
        return {key: redacted(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [redacted(value) for value in content]
    return redact(content) if isinstance(content, str) else content
