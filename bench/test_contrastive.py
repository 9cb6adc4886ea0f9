"""The streaming contrastive loss against the dense form, forward and backward: on a CPU the reference, on a GPU the
kernels against eager and compiled PyTorch, the floor of the same run, and the memory that each takes.

Runs alternate and the ratio of their medians is recorded; nothing is asserted of a CPU, which others may share.
"""

import os
import time
from collections.abc import Callable
from statistics import median

import pytest
import torch
import triton
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.flop_counter import FlopCounterMode

from clinvla_fast import ops
from clinvla_fast.kernels.contrastive import reference, symmetric_cross_entropy
from clinvla_fast.kernels.traffic import nbytes

WIDTH = 128
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def dense(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    return symmetric_cross_entropy(scale * normalize(image, dim=-1) @ normalize(text, dim=-1).mT)


def _inputs(batch: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    torch.manual_seed(0)
    rows = torch.randn(2, batch, WIDTH, device=device).to(dtype)
    return [x.requires_grad_() for x in (rows[0].clone(), rows[1].clone(), torch.tensor(1 / 0.07, device=device))]


def _step(loss: Loss, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss(*inputs), inputs)


def _flops(loss: Loss, inputs: list[Tensor]) -> int:
    with FlopCounterMode(display=False) as counter:
        _step(loss, inputs)
    return counter.get_total_flops()


def _about(inputs: list[Tensor]) -> dict[str, object]:
    """What a stored result needs to be read later."""
    return {
        "device": torch.cuda.get_device_name() if inputs[0].is_cuda else f"cpu, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "threads": torch.get_num_threads(),
        "flops": _flops(ops.contrastive, inputs),
        "bytes": 3 * nbytes(inputs),  # the inputs for each pass, and the gradients
        "bytes_of_dense_logits": len(inputs[0]) * len(inputs[1]) * 4,
    }


def _medians(losses: dict[str, Loss], inputs: list[Tensor], rounds: int) -> dict[str, float]:
    """Seconds a step of each, taking turns after a first step that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in losses}
    for turn in range(rounds + 1):
        for name, loss in losses.items():
            start = time.perf_counter()
            _step(loss, inputs)
            if inputs[0].is_cuda:
                torch.cuda.synchronize()
            if turn:
                times[name].append(time.perf_counter() - start)
    return {name: median(taken) for name, taken in times.items()}


@pytest.mark.parametrize("batch", [32, 256, 4096])
def test_cpu(benchmark, batch):
    inputs = _inputs(batch, torch.float32, "cpu")
    taken = _medians({"dense": dense, "streaming": ops.contrastive}, inputs, rounds=max(5, 20_000 // batch))
    benchmark.extra_info |= _about(inputs) | {"times_faster_than_dense": taken["dense"] / taken["streaming"]}
    benchmark.pedantic(_step, (ops.contrastive, inputs), rounds=3)


def _matrix_rate() -> float:
    """FLOP/s of a large bf16 product."""
    a, b = torch.randn(2, 8192, 8192, device="cuda").bfloat16()
    for _ in range(3):
        a @ b
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(20):
        a @ b
    torch.cuda.synchronize()
    return 20 * 2 * 8192**3 / (time.perf_counter() - start)


def _peak(loss: Loss, inputs: list[Tensor]) -> int:
    """Bytes beyond the inputs."""
    _step(loss, inputs)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    _step(loss, inputs)
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.gpu
def test_gpu(benchmark):
    """At least 80% of the floor, 3 times eager, 1.5 times torch.compile of the dense form and of the reference."""
    inputs = _inputs(32_768, torch.bfloat16, "cuda")
    losses = {
        "dense": dense,
        "compiled": torch.compile(dense),
        "compiled_reference": torch.compile(reference),
        "streaming": ops.contrastive,
    }
    taken = _medians(losses, inputs, rounds=10)
    about = _about(inputs)
    floor = about["flops"] / _matrix_rate()
    ratios = {f"times_faster_than_{name}": taken[name] / taken["streaming"] for name in losses if name != "streaming"}
    benchmark.extra_info |= about | ratios | {"floor": floor, "of_floor": floor / taken["streaming"]}
    benchmark.pedantic(_step, (ops.contrastive, inputs), rounds=3)
    assert ratios["times_faster_than_dense"] >= 3
    assert min(ratios["times_faster_than_compiled"], ratios["times_faster_than_compiled_reference"]) >= 1.5
    assert floor / taken["streaming"] >= 0.8


@pytest.mark.gpu
def test_gpu_memory(benchmark):
    """At 65,536 pairs under 0.5 GB beyond the inputs; the dense logits alone would be 17 GB."""
    inputs = _inputs(65_536, torch.bfloat16, "cuda")
    benchmark.extra_info |= _about(inputs) | {"peak_bytes": _peak(ops.contrastive, inputs)}
    benchmark.pedantic(_step, (ops.contrastive, inputs), rounds=3)
    assert benchmark.extra_info["peak_bytes"] < 500_000_000
