"""Which implementation of an operation runs.

    reference   plain PyTorch, on any device
    triton      fused Triton kernels; raises where there is none
    auto        the fused kernel where there is one and the tensors are on a GPU, the reference elsewhere

`CLINVLA_BACKEND` sets it for a process, `use` for a block of code. An explicit choice never falls back.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType

BACKENDS = ("reference", "triton", "auto")


class BackendUnavailable(RuntimeError):
    """The backend asked for has no implementation of an operation."""


def _checked(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"backend is {name!r}: expected one of {', '.join(BACKENDS)}.")
    return name


_current = _checked(os.environ.get("CLINVLA_BACKEND", "auto"))


@contextmanager
def use(name: str) -> Iterator[None]:
    """Run a block of code with one of BACKENDS."""
    global _current
    previous, _current = _current, _checked(name)
    try:
        yield
    finally:
        _current = previous


def implementation(operation: ModuleType, on_gpu: bool) -> Callable:
    """The function of a kernels/ module that the current backend asks for.

    Raises:
        BackendUnavailable: `triton` was asked for and the module has no such kernel.
    """
    fused = getattr(operation, "triton", None)
    if _current == "triton" and fused is None:
        name = operation.__name__.rpartition(".")[2]
        raise BackendUnavailable(f"{name} has no Triton kernel in this version: use the reference or auto backend.")
    if fused is None or _current == "reference" or (_current == "auto" and not on_gpu):
        return operation.reference
    return fused
