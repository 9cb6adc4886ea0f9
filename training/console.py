"""What command lines share: one clear line for an error the user can act on, a progress bar, the model."""

from __future__ import annotations

import errno
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TimeRemainingColumn
from rich.text import Text
from safetensors import SafetensorError

from clinvla_fast.errors import DataError

if TYPE_CHECKING:
    import torch

    from clinvla_fast import AdaptorModel, ClinVLA

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


class _OnStderr(logging.Handler):
    """A record as one line on what is stderr by then: a progress bar takes its place while it is drawn."""

    def emit(self, record: logging.LogRecord) -> None:
        print(record.getMessage(), file=sys.stderr)


def _of_first_process(record: logging.LogRecord) -> bool:
    from clinvla_fast.distributed import rank

    return rank() == 0


@contextmanager
def _own_log_shown() -> Iterator[None]:
    """Within: what clinvla_fast logs is on stderr; other libraries' loggers stay as they are."""
    log, handler = logging.getLogger("clinvla_fast"), _OnStderr()
    handler.addFilter(_of_first_process)
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


@contextmanager
def one_clear_error() -> Iterator[None]:
    """Turn DataError and OSError into one line on stderr and exit code 2, and Ctrl-C into "interrupted" and 130.

    Any other exception is a bug and keeps its traceback. What clinvla_fast logs is on stderr too. Also works as a
    decorator.
    """
    try:
        with _own_log_shown():
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


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.0f}/s" if task.speed else "")


@contextmanager
def progress_bar(words: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr, where that is a terminal; its function takes how many are done, and how many in all."""
    columns = (words, BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
    drawn = 0.0
    console = Console(stderr=True)
    # No refreshing thread: the readers are forked from this process.
    with Progress(*columns, console=console, auto_refresh=False, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)

        def show(done: int, total: int) -> None:
            nonlocal drawn
            due = time.monotonic() - drawn > 0.1
            drawn = time.monotonic() if due else drawn
            bar.update(task, completed=done, total=total, refresh=due)

        yield show


# A command that only prepares files does not wait for PyTorch: it is imported at first use.


def quiet_libraries() -> None:
    """A tower that cannot be had gets one error, from us; one that can needs no progress bar."""
    import huggingface_hub
    import transformers

    huggingface_hub.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # "no CUDA runtime", on a machine without


def device_name(name: str) -> str:
    """cpu or cuda for what --device was given: one of these, or auto.

    Raises:
        DataError: if it was given something else, or cuda where there is none.
    """
    import torch

    if name not in ("auto", "cpu", "cuda"):
        raise DataError(f"--device is {name!r}: expected auto, cpu or cuda.")
    if name == "cuda" and not torch.cuda.is_available():
        raise DataError("--device cuda: PyTorch sees no GPU here; pass --device cpu.")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def check_attention(device: str, dtype: torch.dtype) -> None:
    """Make sure that the attention asked for, by an option or by CLINVLA_ATTENTION, runs there.

    Raises:
        DataError: if it cannot.
    """
    from clinvla_fast.backend import BackendUnavailable
    from clinvla_fast.modeling import attention

    try:
        attention.check(device, dtype)
    except BackendUnavailable as error:
        raise DataError(str(error)) from None


def load_model(folder: Path, device: str, precision: str | None = None) -> ClinVLA | AdaptorModel:
    """The model of a finished run, on a device as `device_name` takes it.

    Args:
        precision: of its frozen towers: auto, float32 or bfloat16; None: as they were saved, which is float32 for those
            that pretraining makes.

    Raises:
        DataError: if `folder` holds no model, there is no such device, or the attention asked for does not run there.
    """
    import torch

    from clinvla_fast.collection import load_model, tower_dtype

    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder, expected that of a finished python -m training.pretrain.")
    quiet_libraries()
    on = torch.device(device_name(device))
    check_attention(on.type, tower_dtype(precision, on) or torch.float32)
    return load_model(folder, on, precision)
