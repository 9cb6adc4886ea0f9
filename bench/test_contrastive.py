"""The streaming contrastive loss against the dense form on a CPU, forward and backward (test_kernels_on_gpu.py: GPUs).

Runs alternate and the ratio of their medians is recorded; nothing is asserted of a CPU, which others may share.
"""

import os
from collections.abc import Callable
from functools import partial

import pytest
import torch
from measure import times_faster
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.flop_counter import FlopCounterMode

from clinvla_fast import ops
from clinvla_fast.kernels.contrastive import symmetric_cross_entropy
from clinvla_fast.kernels.traffic import nbytes

WIDTH = 128
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def dense(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    return symmetric_cross_entropy(scale * normalize(image, dim=-1) @ normalize(text, dim=-1).mT)


def _inputs(batch: int) -> list[Tensor]:
    torch.manual_seed(0)
    return [x.requires_grad_() for x in (*torch.randn(2, batch, WIDTH).unbind(), torch.tensor(1 / 0.07))]


def _step(loss: Loss, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss(*inputs), inputs)


def _flops(loss: Loss, inputs: list[Tensor]) -> int:
    with FlopCounterMode(display=False) as counter:
        _step(loss, inputs)
    return counter.get_total_flops()


def _about(inputs: list[Tensor]) -> dict[str, object]:
    """What a stored result needs to be read later."""
    return {
        "device": f"cpu, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "flops": _flops(ops.contrastive, inputs),
        "bytes": 3 * nbytes(inputs),  # the inputs for each pass, and the gradients
        "bytes_of_dense_logits": len(inputs[0]) * len(inputs[1]) * 4,
    }


@pytest.mark.parametrize("batch", [32, 256, 4096])
def test_cpu(benchmark, batch):
    inputs = _inputs(batch)
    slow, fast = partial(_step, dense, inputs), partial(_step, ops.contrastive, inputs)
    ratio = times_faster(slow, fast, rounds=max(5, 20_000 // batch))
    benchmark.extra_info |= _about(inputs) | {"times_faster_than_dense": ratio}
    benchmark.pedantic(_step, (ops.contrastive, inputs), rounds=3)
