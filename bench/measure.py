"""How the benchmarks measure: times in turns, ratios of them with their noise, and memory; on a CPU or a GPU."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from statistics import median

import torch
from torch.utils.flop_counter import FlopCounterMode

from clinvla_fast.kernels import onednn
from clinvla_fast.machine import matrix_rate

Run = Callable[[], object]
Times = dict[str, list[float]]
"""Seconds of each run, a turn each."""
LEAST, LONGEST = 3, 1.5
"""Turns that there are in any case (one fewer where a turn takes longer), and seconds after which there are no more."""
OF_ONE_TURN = 0.1
"""Share by which the ratio of a single turn is off."""


@dataclass(frozen=True)
class Ratio:
    """How often one thing goes into another, and half of the 95% interval of that."""

    value: float
    noise: float = 0.0


def turns(
    runs: dict[str, Run], rounds: int, device: str = "cpu", longest: float = LONGEST, begun: bool = False
) -> Times:
    """Seconds of each of `runs`, which take turns, after turns that are not counted: one, or two on a GPU, where times
    are by its own clock; none where they have `begun`. There are fewer than `rounds` where they would take `longest`
    seconds."""
    clock, first = (seconds, 1) if device == "cpu" else (_seconds_on_gpu, 2)
    times: Times = {name: [] for name in runs}
    begin = time.perf_counter()
    for turn in range(0 if begun else -first, rounds):
        if turn == 0:
            begin = time.perf_counter()
        passed = time.perf_counter() - begin
        if turn >= LEAST - (passed > turn * longest) and passed > longest:
            break
        for name, run in runs.items():
            taken = clock(run)
            if turn >= 0:
                times[name].append(taken)
    return times


def seconds(run: Run) -> float:
    """Of one run, on a CPU."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _seconds_on_gpu(run: Run) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def faster(slow: list[float], fast: list[float]) -> Ratio:
    """Times that `fast` is as fast as `slow`: the median over turns. Its noise is that of a median, from the median
    absolute deviation, so that a neighbour who wakes up for one turn moves neither."""
    ratios = [a / b for a, b in zip(slow, fast, strict=True)]
    middle = median(ratios)
    if len(ratios) == 1:
        return Ratio(middle, OF_ONE_TURN * middle)
    deviation = 1.4826 * median(abs(x - middle) for x in ratios)
    return Ratio(middle, 1.96 * 1.2533 * deviation / len(ratios) ** 0.5)


def peak_memory(run: Run) -> int:
    """Bytes of a CPU's memory allocated at once, beyond what was there before; what is made once is made in a first
    run."""
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def peak_memory_on_gpu(run: Run) -> int:
    """As `peak_memory`, of the current GPU's."""
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


@cache
def cpu_rates() -> tuple[float, float]:
    """FLOP/s of a large float32 product: by oneDNN, and by PyTorch's default."""
    a, b = torch.randn(2, 2048, 2048)
    taken = turns({"onednn": lambda: onednn.matmul(a, b), "default": lambda: a @ b}, 15)
    return tuple(2 * 2048**3 / min(of) for of in taken.values())


def default_lags() -> bool:
    """Whether PyTorch's float32 products are at about half of the CPU's rate, as the project's claims suppose."""
    fast, default = cpu_rates()
    return fast > 1.8 * default


def at_matrix_rate(run: Run, dtype: torch.dtype) -> float:
    """Seconds that the products of a run would take on this CPU if nothing else did."""
    with FlopCounterMode(display=False) as flops:
        run()
    rate = cpu_rates()[0] if dtype == torch.float32 else matrix_rate(torch.device("cpu"), dtype)
    return flops.get_total_flops() / rate


def promised(claim: float, slow: list[float], floor: float) -> float:
    """What a run is held to, of which `claim` says how many times it is faster than `slow` where `default_lags`:
    elsewhere, if less, two thirds of what its time `at_matrix_rate` allows."""
    return claim if default_lags() else min(claim, median(slow) / floor * 2 / 3)


@cache
def ceilings() -> dict[str, float]:
    """What the current GPU does at most: bytes a second of a large copy, FLOP/s of a large bf16 product."""
    source = torch.empty(1 << 30, dtype=torch.int8, device="cuda")
    target, (a, b) = torch.empty_like(source), torch.randn(2, 8192, 8192, device="cuda").bfloat16()
    taken = turns({"copy": lambda: target.copy_(source), "product": lambda: a @ b}, 20, "cuda")
    return {
        "bytes_a_second": 2 * len(source) / median(taken["copy"]),
        "flops_a_second": 2 * 8192**3 / median(taken["product"]),
    }
