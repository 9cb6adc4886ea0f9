"""Several processes as one: who this is, rows of all with their gradients, and the bytes that go over the wire.

Started by torchrun. Without it, or with one process, everything here does nothing and costs nothing. All ranks call
the same functions in the same order.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from inspect import signature
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.parallel import DistributedDataParallel

sent = 0
"""Bytes that this rank has sent in the functions below, as ring algorithms send them."""


_alone = False


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() and not _alone else 0


def ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() and not _alone else 1


def own_device(kind: str) -> torch.device:
    """This process's device: of several GPUs, that of its number on this machine."""
    if kind != "cuda":
        return torch.device(kind)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


@contextmanager
def alone() -> Iterator[None]:
    """Within, this process is the only one: for what each does by itself."""
    global _alone
    _alone = True
    try:
        yield
    finally:
        _alone = False


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """The processes that torchrun has started, while within; each on its own device: see `own_device`."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=1))
    try:
        yield
        dist.barrier()  # else the first to end takes the others' connections with it
    finally:
        dist.destroy_process_group()


def data_parallel(module: nn.Module) -> DistributedDataParallel:
    """A module whose gradients are averaged over ranks. It is the same on all of them, so nothing else is exchanged:
    no weight as it starts, no buffer ever, and frozen towers are buffers."""
    known = signature(DistributedDataParallel).parameters
    never = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # before PyTorch 2.15
    return DistributedDataParallel(module, init_sync=False, gradient_as_bucket_view=True, **{never: False})


def part(n: int, of: int | None = None, which: int | None = None) -> slice:
    """Which of n rows are a rank's own: consecutive, and as even as can be."""
    of, which = ranks() if of is None else of, rank() if which is None else which
    return slice(n * which // of, n * (which + 1) // of)


def total(*numbers: float) -> tuple[float, ...]:
    """Sums over ranks."""
    if ranks() == 1:
        return numbers
    sums = torch.tensor(numbers, dtype=torch.float64)
    _count(2 * sums.nbytes)
    dist.all_reduce(sums)
    return tuple(sums.tolist())


def summed(x: Tensor, op=None) -> Tensor:
    """A tensor's sum over ranks (or its maximum), without gradients."""
    if ranks() == 1:
        return x.detach()
    x = x.detach().clone()
    _count(2 * x.nbytes)
    dist.all_reduce(x, dist.ReduceOp.SUM if op is None else op)
    return x


def largest(x: Tensor) -> Tensor:
    """A tensor's maximum over ranks, without gradients."""
    return summed(x, dist.ReduceOp.MAX)


def from_first(make: Callable[[], Any]) -> Any:
    """What the first rank makes, while the others wait: a small object."""
    return gathered(make() if rank() == 0 else None)[0]


def gathered(value: Any) -> list[Any]:
    """A small object of every rank, in the order of ranks."""
    if ranks() == 1:
        return [value]
    found = [None] * ranks()
    dist.all_gather_object(found, value)
    return found


class Rows:
    """The rows that each rank holds of one batch; which are this rank's.

    Args:
        own: how many this rank holds.
    """

    def __init__(self, own: int):
        self.own = own
        self.counts = [int(n) for n in _all(torch.tensor([own])).flatten()] if ranks() > 1 else [own]
        self.total = sum(self.counts)
        self.offset = [0, *accumulate(self.counts)][rank()]

    @property
    def weight(self) -> float:
        """Of a mean over this rank's rows, so that the mean over ranks is the mean over all rows."""
        return self.own * ranks() / max(1, self.total)

    def everyone(self, x: Tensor) -> Tensor:
        """The rows x [own, ...] of all ranks, in the order of ranks: [total, ...]. Their gradients go back to the ranks
        that hold them, summed. The second dimension may differ from rank to rank: shorter ones are padded by zeros."""
        if ranks() == 1:
            return x
        if x.ndim > 1:
            longest = int(largest(torch.tensor(x.shape[1])))
            x = torch.cat([x, x.new_zeros(len(x), longest - x.shape[1], *x.shape[2:])], 1)
        return gather_rows(x, self.counts)


def gather_rows(x: Tensor, counts: list[int]) -> Tensor:
    """The rows of all ranks, counts[r] of rank r, in the order of ranks; a row's gradient is the sum of all ranks'."""
    return _Everyone.apply(x, counts)


def _all(x: Tensor) -> Tensor:
    out = x.new_empty(ranks(), *x.shape)
    _count((ranks() - 1) * x.nbytes, whole=True)
    dist.all_gather_into_tensor(out.flatten(0, 1), x.contiguous())
    return out


class _Everyone(Function):
    @staticmethod
    def forward(ctx, x: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        padded = torch.cat([x, x.new_zeros(max(counts) - len(x), *x.shape[1:])])
        return torch.cat([rows[:n] for rows, n in zip(_all(padded), counts, strict=True)])

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        counts = ctx.counts
        wide = torch.promote_types(grad.dtype, torch.float32)  # a sum over many ranks in bfloat16 is not one
        padded = grad.new_zeros(len(counts), max(counts), *grad.shape[1:], dtype=wide)
        for rows, part in zip(padded, grad.split(counts), strict=True):
            rows[: len(part)] = part
        out = torch.empty_like(padded[0])
        _count((len(counts) - 1) * out.nbytes, whole=True)
        dist.reduce_scatter_tensor(out, padded.flatten(0, 1))
        return out[: counts[rank()]].to(grad.dtype), None


def _count(nbytes: int, whole: bool = False) -> None:
    """`whole`: as it is; else an all-reduce of 2 nbytes, of which a ring sends (ranks - 1) / ranks."""
    global sent
    sent += nbytes if whole else nbytes * (ranks() - 1) // ranks()
