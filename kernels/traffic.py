"""Bytes that an operation cannot avoid to move, registered beside its FLOPs: what it reads and writes, once each."""

from collections.abc import Callable

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

_FORMULAS: dict[object, Callable[..., int]] = {}


def nbytes(*trees: object) -> int:
    """Bytes of every tensor in nested tuples and lists."""
    return sum(x.numel() * x.element_size() for x in tree_iter(trees) if isinstance(x, Tensor))


def register_byte_formula(operation: object) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Register `formula(*arguments, out) -> bytes` for an operator of `torch.ops`."""

    def register(formula: Callable[..., int]) -> Callable[..., int]:
        _FORMULAS[operation] = formula
        return formula

    return register


class ByteCounter(TorchDispatchMode):
    """Adds up the registered bytes of the operations run inside it, as FlopCounterMode adds up FLOPs.

    Attributes:
        total: bytes; operations without a formula count nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        formula = _FORMULAS.get(func.overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out=out)
        return out
