"""Which implementation of an operation runs.

    reference   plain PyTorch, on any device
    triton      fused Triton kernels; raises where the tensors are not on a GPU
    auto        the fused kernel where the tensors are on a GPU of compute capability 8.0 or more and it takes them
                (float64 never), else the reference

`CLINVLA_BACKEND` sets it for a process, `use` for a block of code. An explicit choice never falls back.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from .kernels.launch import INTERPRETED

BACKENDS = ("reference", "triton", "auto")


class BackendUnavailable(RuntimeError):
    """The backend asked for cannot run an operation where its tensors are."""


class Choice:
    """One of several names, from an environment variable or "auto", until `use` puts another in force.

    Raises:
        ValueError: for a name that is none of them.
    """

    def __init__(self, what: str, names: tuple[str, ...], variable: str):
        self.what, self.names = what, names
        self.current = self._checked(os.environ.get(variable, "auto"))

    def _checked(self, name: str) -> str:
        if name not in self.names:
            raise ValueError(f"{self.what} is {name!r}: expected one of {', '.join(self.names)}.")
        return name

    @contextmanager
    def use(self, name: str) -> Iterator[None]:
        """Run a block of code with one of the names."""
        previous, self.current = self.current, self._checked(name)
        try:
            yield
        finally:
            self.current = previous


_choice = Choice("backend", BACKENDS, "CLINVLA_BACKEND")
use = _choice.use


@cache
def _new_enough(device: torch.device) -> bool:
    return not torch.cuda.is_available() or torch.cuda.get_device_capability(device) >= (8, 0)


@torch.compiler.assume_constant_result
def _has_kernels(device: torch.device) -> bool:
    """Whether this GPU, where there is one, is none older than those that the kernels are built for."""
    return _new_enough(device)


def implementation(operation: ModuleType, tensor: Tensor, form: str = "") -> Callable:
    """The function of a kernels/ module that the current backend asks for, to be given this tensor.

    Args:
        form: where a module has several, the one it calls `reference_<form>` and `triton_<form>`.

    Raises:
        BackendUnavailable: `triton` was asked for and cannot run where the tensor is.
    """
    suffix = f"_{form}" if form else ""
    if _choice.current == "reference":
        return getattr(operation, f"reference{suffix}")
    if _choice.current == "triton" and not (tensor.is_cuda or INTERPRETED):
        name = operation.__name__.rpartition(".")[2]
        raise BackendUnavailable(
            f"the Triton kernel of {name} runs on a GPU and its tensors are on {tensor.device.type}: move them, "
            "or use the reference or auto backend."
        )
    old = tensor.is_cuda and not _has_kernels(tensor.device)
    if _choice.current == "triton" and old:
        raise BackendUnavailable("the Triton kernels need a GPU of compute capability 8.0 or more: use the reference.")
    supported = getattr(operation, "supports", lambda tensor: tensor.dtype != torch.float64)
    if _choice.current == "triton" or (tensor.is_cuda and not old and supported(tensor)):
        return getattr(operation, f"triton{suffix}")
    return getattr(operation, f"reference{suffix}")
