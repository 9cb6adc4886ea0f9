"""How the benchmarks measure on a CPU: times in turns, and memory. pytest puts this folder on the path."""

import time
from collections.abc import Callable
from statistics import median

import torch

Run = Callable[[], object]


def seconds(runs: dict[str, Run], rounds: int) -> dict[str, float]:
    """Median time of each, taking turns after a first turn that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: median(taken[1:]) for name, taken in times.items()}


def times_faster(slow: Run, fast: Run, rounds: int) -> float:
    """Median time of `slow` over that of `fast`, run in turns."""
    taken = seconds({"slow": slow, "fast": fast}, rounds)
    return taken["slow"] / taken["fast"]


def peak_memory(run: Run) -> int:
    """Bytes allocated at once, beyond what was there before; what is made once is made in a first run."""
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak
