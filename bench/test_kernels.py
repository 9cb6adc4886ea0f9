"""The CPU path of each operation, forward and backward, against the same formula in plain PyTorch, eager and compiled,
and the shares that it reaches of what the machine does in the same run.

FLOPs are those that ran; bytes are those that cannot be avoided: what the fused operator reads and writes, once each.
"""

from collections.abc import Callable
from functools import cache, partial
from statistics import median

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from bench.measure import cpu_rates, turns
from bench.operations import Case, Make, shares
from clinvla_fast.kernels.traffic import ByteCounter

ON_A_CPU = Make("cpu", torch.float32)
CASES: dict[str, tuple[Callable[[], Case], int]] = {  # and rounds: fewer where a turn takes long
    "invertible adapter, 4096 rows": (partial(ON_A_CPU.invertible, 4096), 15),
    "invertible adapter's inverse, 4096 rows": (partial(ON_A_CPU.invertible, 4096, inverse=True), 15),
    "transformer-adapt, 4096 rows": (partial(ON_A_CPU.adapt, 4096, normed=False), 15),
    "transformer-adapt with its norm, 4096 rows": (partial(ON_A_CPU.adapt, 4096, normed=True), 15),
    "masked patches, 32 studies": (partial(ON_A_CPU.embed, 32, trained=True), 15),
    "local alignment, 37 studies": (partial(ON_A_CPU.align, 37), 5),  # the fewest that are not held all at once
    "InfoNCE, 4096 pairs": (partial(ON_A_CPU.contrast, 4096, sigmoid=False), 7),
    "sigmoid loss, 4096 pairs": (partial(ON_A_CPU.contrast, 4096, sigmoid=True), 7),
}


@cache
def ceilings() -> dict[str, float]:
    """Bytes a second of a large copy; FLOP/s of a large product by the library that is quicker at it here."""
    source = torch.ones(1 << 26)
    target = torch.empty_like(source)
    copy = min(turns({"copy": lambda: target.copy_(source)}, 5)["copy"])
    return {"bytes_a_second": 2 * source.nbytes / copy, "flops_a_second": max(cpu_rates())}


def flops(case: Case) -> int:
    with FlopCounterMode(display=False) as counter:
        case.step(case.ours)
    return counter.get_total_flops()


def compulsory_bytes(case: Case) -> int:
    """Counted on tensors without data: the fused operator itself needs a GPU."""
    with FakeTensorMode() as mode, ByteCounter() as moved:
        fake = Case(case.ours, case.plain, case.fused, tree_map_only(torch.Tensor, mode.from_tensor, case.inputs))
        fake.step(fake.fused)
    return moved.total


@pytest.mark.parametrize("name", CASES)
def test_speed(measured, name):
    torch.manual_seed(0)
    torch._dynamo.reset()
    make, rounds = CASES[name]
    case = make()
    for actual, right in zip(case.step(case.ours), case.step(case.plain), strict=True):
        torch.testing.assert_close(actual, right, rtol=1e-3, atol=1e-4 * right.abs().max().item())
    runs = {"ours": case.ours, "eager": case.plain, "compiled": torch.compile(case.plain, fullgraph=True)}
    taken = measured.turns({name: partial(case.step, run) for name, run in runs.items()}, rounds)
    for other in ("eager", "compiled"):
        measured.faster(f"than {other}", taken[other], taken["ours"])
    done, moved = flops(case), compulsory_bytes(case)
    found = {"flops": done, "bytes": moved} | shares(done, moved, median(taken["ours"]), ceilings())
    for key, value in found.items():
        measured.figure(key, value)
