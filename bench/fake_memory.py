"""What a run would hold at its peak, counted on tensors that hold nothing: for batches that no memory is large enough
for, in a second.

Beside operators' outputs it counts nothing: what an operator allocates for itself is not seen.
"""

import copy
import weakref
from collections.abc import Callable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.weak import WeakIdKeyDictionary


class _Held(TorchDispatchMode):
    """Adds up the bytes of what operators return, for as long as it lives."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self.known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for x in _tensors((args, kwargs)):  # was there before, or was returned by an operator
            self.known.setdefault(x.untyped_storage(), True)
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype == torch.bool:
            return False  # transformers 4 asks whether a mask is all true
        out = func(*args, **(kwargs or {}))
        for x in _tensors(out):
            storage = x.untyped_storage()
            if storage not in self.known:
                self.known[storage] = True
                self.held += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.held)
        return out

    def _free(self, nbytes: int) -> None:
        self.held -= nbytes


def _tensors(tree: object) -> list[Tensor]:
    return [x for x in tree_iter(tree) if isinstance(x, Tensor)]


def peak_memory_of_fake(run: Callable[..., object], *given: object) -> int:
    """As `measure.peak_memory` of `run(*given)`, of copies of `given` whose tensors hold nothing."""
    mode = FakeTensorMode()
    with FakeCopyMode(mode):
        given = copy.deepcopy(given)
    with mode, _Held() as counter:
        run(*given)
    return counter.peak
