"""What this machine can do and what it holds, measured: the yardsticks beside a run's speed."""

import resource
import time
from functools import cache

import torch


@cache
def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of the best of several large matrix products: a tenth of a second's work."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.ones(side, side, device=device, dtype=dtype) for _ in range(2))
    best, stop = float("inf"), time.perf_counter() + 0.1
    while True:
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        now = time.perf_counter()
        best = min(best, now - start)
        if now > stop:
            return 2 * side**3 / best


def peak_memory(device: torch.device) -> int:
    """Bytes that this process has held at most: of a GPU's memory, or, on a CPU, of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
