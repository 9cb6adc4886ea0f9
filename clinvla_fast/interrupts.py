"""Ctrl-C and SIGTERM: a step is never cut in two."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_SIGNALS = signal.SIGINT, signal.SIGTERM
_raised = False  # by `interruptible`


@contextmanager
def _handled(handler: Callable) -> Iterator[None]:
    previous = {s: signal.signal(s, handler) for s in _SIGNALS}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


@contextmanager
def interruptible() -> Iterator[None]:
    """Around a job's stages: Ctrl-C and SIGTERM raise KeyboardInterrupt. Should a library that runs between stages
    swallow it, or Python where it comes in a `__del__`, the next stage stops after its first step."""
    global _raised
    _raised = False
    report = sys.unraisablehook

    def note_and_raise(signum, frame):
        global _raised
        _raised = True
        raise KeyboardInterrupt

    def report_others(unraisable):
        if unraisable.exc_type is not KeyboardInterrupt:
            report(unraisable)

    sys.unraisablehook = report_others
    try:
        with _handled(note_and_raise):
            yield
    finally:
        sys.unraisablehook = report


@contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Within: Ctrl-C and SIGTERM are noted instead of raised."""
    seen = _raised

    def note(signum, frame):
        nonlocal seen
        if seen:
            raise KeyboardInterrupt
        seen = True

    with _handled(note):
        yield lambda: seen
