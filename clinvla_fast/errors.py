"""The one error a user can act on."""


class DataError(Exception):
    """Input that cannot be used. The message names the file, row or shape and what was expected."""
