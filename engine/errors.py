"""Errors that are the user's to mend: one line that names the file, the value and the remedy."""


class UserError(ValueError):
    """Bad input or a bad setting. The command line prints its message alone, without a traceback."""
