"""The package's folder in the user's cache."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/dmpo_dist``, or ``~/.cache/dmpo_dist`` where that variable is not set; need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dmpo_dist"
