"""How the benchmarks measure on a GPU: by its own clock, in turns, against what it does at most in the same run."""

from collections.abc import Callable
from functools import cache
from statistics import median

import torch

Step = Callable[[], object]
ROUNDS = 20


def seconds(steps: dict[str, Step], rounds: int = ROUNDS) -> dict[str, float]:
    """Median time of each by the device's clock, taking turns after two that are not counted."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 2):
        for name, step in steps.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            step()
            end.record()
            end.synchronize()
            if turn > 1:
                times[name].append(start.elapsed_time(end) / 1e3)
    return {name: median(taken) for name, taken in times.items()}


@cache
def machine() -> dict[str, float]:
    """Bytes a second of a large copy and FLOP/s of a large bf16 product."""
    source = torch.empty(1 << 30, dtype=torch.int8, device="cuda")
    target, (a, b) = torch.empty_like(source), torch.randn(2, 8192, 8192, device="cuda").bfloat16()
    taken = seconds({"copy": lambda: target.copy_(source), "product": lambda: a @ b})
    return {"bytes_a_second": 2 * len(source) / taken["copy"], "flops_a_second": 2 * 8192**3 / taken["product"]}


def peak(step: Step) -> int:
    """Bytes allocated at once, beyond what was there before."""
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - before
