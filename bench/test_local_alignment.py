"""Local alignment on a CPU, forward and backward, against the loop over captions that public code has: speed, memory,
rounding."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from bench.measure import default_lags, peak_memory
from bench.operations import LOCAL, TAUS, caption_loop
from clinvla_fast import ops


def batch(studies: int, patches: int, lengths: Tensor, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    words = int(lengths.max())
    return [
        torch.randn(studies, patches, LOCAL, generator=generator).to(dtype),
        torch.ones(studies, patches, dtype=torch.bool),
        torch.randn(studies, words, LOCAL, generator=generator).to(dtype),
        torch.arange(words) < lengths[:, None],
        *(torch.tensor(t, dtype=dtype) for t in TAUS),
    ]


def gradients(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    logits = function(*leaves)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    target = torch.arange(len(logits))
    loss = torch.nn.functional.cross_entropy
    (loss(logits, target) + loss(logits.mT, target)).backward()
    return [x.grad for x in leaves if x.grad is not None]


def variable_lengths(studies: int) -> Tensor:
    return torch.randint(10, 128, (studies,), generator=torch.Generator().manual_seed(1))


CASES = {  # studies, patches, caption lengths, rounds, the least ratio of speeds
    "64 studies": (64, 196, torch.full((64,), 127), 5, 1.2),  # 1 where PyTorch's own products are as fast as oneDNN's
    "2 studies": (2, 196, torch.full((2,), 127), 100, 1.0),
    "4 of variable length": (4, 98, variable_lengths(4), 100, 1.0),
    "8 of variable length": (8, 98, variable_lengths(8), 60, 1.0),
    "32 of variable length": (32, 98, variable_lengths(32), 9, 1.0),
}


@pytest.mark.parametrize("case", CASES)
def test_speed(measured, case):
    studies, patches, lengths, rounds, least = CASES[case]
    inputs = batch(studies, patches, lengths)
    loop, ours = (partial(gradients, f, inputs) for f in (caption_loop, ops.local_alignment))
    for actual, right in zip(ours(), loop(), strict=True):
        torch.testing.assert_close(actual, right, rtol=1e-3, atol=1e-4 * right.abs().max().item())
    taken = measured.turns({"loop": loop, "ours": ours}, rounds, begun=True)
    measured.faster("than the loop", taken["loop"], taken["ours"], least if default_lags() else 1.0)


def test_memory(measured):
    inputs = batch(64, 196, torch.full((64,), 127))
    loop, ours = (peak_memory(partial(gradients, f, inputs)) for f in (caption_loop, ops.local_alignment))
    measured.figure("bytes_of_the_loop", loop)
    measured.figure("bytes_held", ours)
    measured.ratio("less memory than the loop", loop / ours, least=50)


def test_bf16_gradients_are_closer_to_the_truth(measured):
    inputs = batch(8, 98, variable_lengths(8), torch.bfloat16)
    truth = gradients(caption_loop, [x.double() if x.is_floating_point() else x for x in inputs])

    def errors(function: Callable[..., Tensor]) -> list[float]:
        found = gradients(function, inputs)
        return [((a.double() - b).abs().max() / b.abs().max()).item() for a, b in zip(found, truth, strict=True)]

    loop, ours = errors(caption_loop), errors(ops.local_alignment)
    measured.figure("errors_of_the_loop", loop)
    measured.figure("errors", ours)
    assert all(a < b for a, b in zip(ours, loop, strict=True))
