"""Processes that work for another: what they owe it."""

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1  # of Linux


def obey_parent(parent: int) -> None:
    """In a process that `parent` forked: leave Ctrl-C to it, and die with it; one that waits for it would stay."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before
        os._exit(1)
