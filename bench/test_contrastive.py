"""The streaming contrastive loss against all logits at once on a CPU, forward and backward, over the size of a batch:
time and memory (GPUs: test_kernels_on_gpu.py)."""

from functools import partial

import pytest
import torch

from bench.measure import peak_memory
from bench.operations import Make


@pytest.mark.parametrize("pairs", [32, 256, 1024, 4096])
def test_contrastive(measured, pairs):
    torch.manual_seed(0)
    case = Make("cpu", torch.float32).contrast(pairs, sigmoid=False)
    runs = {"dense": partial(case.step, case.plain), "ours": partial(case.step, case.ours)}
    for actual, right in zip(runs["ours"](), runs["dense"](), strict=True):
        torch.testing.assert_close(actual, right, rtol=1e-4, atol=1e-6)
    taken = measured.turns(runs, rounds=max(9, 20_000 // pairs))
    peaks = {name: peak_memory(run) for name, run in runs.items()}
    measured.faster("than dense", taken["dense"], taken["ours"])
    measured.ratio("less memory than dense", peaks["dense"] / peaks["ours"])
    measured.figure("peak_bytes", peaks)
