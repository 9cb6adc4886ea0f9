"""What every command line shares: one clear line for an error the user can act on."""

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError

from clinvla_fast.errors import DataError

_FULL = "free some space or write to another disk"
_FORBIDDEN = "choose a path that you may read and write"
_ADVICE = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EFBIG: _FULL,
    errno.EACCES: _FORBIDDEN,
    errno.EPERM: _FORBIDDEN,
    errno.EROFS: _FORBIDDEN,
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path: a file stands where a folder is expected",
    errno.EISDIR: "pass a file, not a folder",
}


@contextmanager
def one_clear_error() -> Iterator[None]:
    """Turn DataError and OSError into one line on stderr and exit code 2, and Ctrl-C into "interrupted" and 130.

    Any other exception is a bug and keeps its traceback. Also works as a decorator.
    """
    try:
        yield
    except DataError as error:
        message = str(error)
    except SafetensorError as error:  # safetensors writes by itself, and says what the system said
        message = f"a weights file cannot be read or written ({error}): check the disk's space and permissions."
    except OSError as error:
        advice = _ADVICE.get(error.errno)
        path = f"{error.filename}: " if error.filename else ""
        message = f"{path}{error.strerror or error}{f': {advice}' if advice else ''}."
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    else:
        return
    print("error:", " ".join(message.split()), file=sys.stderr)
    raise SystemExit(2)
