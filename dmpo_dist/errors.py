"""The one exception a user is meant to read."""


class UserError(Exception):
    """A mistake the user can mend: the message names the file, row, key or flag, what was seen, and what to do next.

    The command line prints the message without a traceback and exits with status 2.
    """
