"""Reading what somebody else has put into a folder."""

import os
import stat
from pathlib import Path


class FileTooLarge(ValueError):
    """A file holds more than is read of one."""


def read_file(path: str | Path, most: int) -> bytes:
    """The content of a regular file of at most so many bytes. Reading a pipe or a device might never end.

    Raises:
        FileTooLarge: if it holds more.
        FileNotFoundError, OSError, ValueError (a NUL byte in the path): if it cannot be read.
    """
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise OSError("not a regular file")
    if found.st_size > most:
        raise FileTooLarge(f"more than {most} bytes")
    with open(path, "rb") as file:
        return file.read(found.st_size)
