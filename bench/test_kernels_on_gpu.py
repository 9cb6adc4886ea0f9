"""Each kernel on a GPU at training shapes, forward and backward: against the floor of the same run (the larger of its
bytes over the bandwidth and its FLOPs over the matrix rate, both measured here), against the same formula in eager
PyTorch and under torch.compile, and the memory it takes.

    pytest -m gpu bench/test_kernels_on_gpu.py

Their accuracy on the device is in tests/kernels; there, `compute-sanitizer python -m pytest -m gpu tests/kernels` looks
for reads and writes out of bounds.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.measure import ceilings, peak_memory_on_gpu
from bench.operations import Case, Make, shares
from clinvla_fast.kernels.traffic import ByteCounter

pytestmark = pytest.mark.gpu
TIMES_EAGER, TIMES_COMPILED = 3, 1.5
ON_A_GPU = Make("cuda", torch.bfloat16)


@dataclass(frozen=True)
class Held:
    """What an operation at a shape is held to."""

    make: Callable[[], Case]
    of_floor: float = 0.8


CASES: dict[str, Held] = {
    **{
        f"{name}, {rows} rows": Held(partial(make, rows))
        for name, make in {
            "invertible adapter": ON_A_GPU.invertible,
            "invertible adapter's inverse": partial(ON_A_GPU.invertible, inverse=True),
            "transformer-adapt": partial(ON_A_GPU.adapt, normed=False),
            "transformer-adapt with its norm": partial(ON_A_GPU.adapt, normed=True),
        }.items()
        for rows in (25_600, 100_000)
    },
    "masked patches, 256 studies": Held(partial(ON_A_GPU.embed, 256, trained=False)),
    "masked patches, 256 studies, trained": Held(partial(ON_A_GPU.embed, 256, trained=True)),
    "local alignment, 256 studies": Held(partial(ON_A_GPU.align, 256), of_floor=0.5),
    "local alignment, 1024 studies": Held(partial(ON_A_GPU.align, 1024), of_floor=0.5),
    "InfoNCE, 32768 pairs": Held(partial(ON_A_GPU.contrast, 32_768, sigmoid=False)),
    "sigmoid loss, 32768 pairs": Held(partial(ON_A_GPU.contrast, 32_768, sigmoid=True)),
}


@pytest.mark.parametrize("name", CASES)
def test_speed(measured, name):
    torch.manual_seed(0)
    torch._dynamo.reset()
    held = CASES[name]
    case = held.make()
    actual, right = (f(*case.inputs).detach().float() for f in (case.ours, case.plain))
    assert (actual - right).norm() <= 0.03 * right.norm()  # both are rounded; tests/kernels is where this is strict
    forms = {"ours": case.ours, "eager": case.plain, "compiled": case.compiled or torch.compile(case.plain)}
    runs = {name: partial(case.step, form) for name, form in forms.items()}
    with FlopCounterMode(display=False) as flops, ByteCounter() as moved:
        case.step(case.ours)
    taken = measured.turns(runs, rounds=20)
    done, top = (flops.get_total_flops(), moved.total), ceilings()
    floor = max(done[0] / top["flops_a_second"], done[1] / top["bytes_a_second"])
    measured.faster("share of the floor", [floor] * len(taken["ours"]), taken["ours"], least=held.of_floor)
    for other, least in (("eager", TIMES_EAGER), ("compiled", TIMES_COMPILED)):
        measured.faster(f"than {other}", taken[other], taken["ours"], least)
    seconds = {f"seconds_{name}": median(t) for name, t in taken.items()}
    peaks = {f"peak_bytes_{name}": peak_memory_on_gpu(run) for name, run in runs.items()}
    found = {"flops": done[0], "bytes": done[1], "seconds": seconds["seconds_ours"], "floor": floor}
    found |= top | shares(*done, found["seconds"], top) | seconds | peaks | {"peak_bytes": peaks["peak_bytes_ours"]}
    for key, value in found.items():
        measured.figure(key, value)


@pytest.mark.parametrize(
    ("make", "dense", "most"),
    [
        (partial(ON_A_GPU.align, 1024), 4 * 1024**2 * 98 * 128, 1_000_000_000),
        (partial(ON_A_GPU.contrast, 65_536, sigmoid=False), 4 * 65_536**2, 500_000_000),
    ],
    ids=["local alignment, 1024 studies", "InfoNCE, 65536 pairs"],
)
def test_memory(measured, make, dense, most):
    """Beyond the inputs, against one dense float32 tensor of all pairs."""
    case = make()
    held = peak_memory_on_gpu(partial(case.step, case.ours))
    measured.figure("peak_bytes", held)
    measured.ratio("less memory than one dense tensor", dense / held, least=dense / most)
