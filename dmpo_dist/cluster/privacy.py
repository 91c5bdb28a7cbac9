"""What a local Ray leaves open to everybody on the machine, made private.

Ray (2.60) lets in whoever has its token. It writes the token with the process's umask, for everybody to read, and makes
its session's folder of sockets and logs writable for all.
"""

import os
import stat
from contextlib import suppress
from pathlib import Path

TOKEN_FILE = Path(".ray", "auth_token")
"""Below the home directory."""


def protect_token() -> None:
    """Make the folder of Ray's token, if it is new, and the token, if it is there, this user's alone."""
    token = Path.home() / TOKEN_FILE
    with suppress(OSError):  # a home that cannot be written: Ray says so itself
        token.parent.mkdir(mode=0o700, exist_ok=True)
        only_owner(token)


def only_owner(path: Path) -> None:
    """Take the rights of group and others from a file or folder of this user; nothing where there is none."""
    with suppress(FileNotFoundError):
        found = path.lstat()
        if found.st_uid == os.getuid() and not stat.S_ISLNK(found.st_mode):
            path.chmod(stat.S_IMODE(found.st_mode) & 0o700)
