"""Local alignment on a CPU against the loop over captions that public code has (GLoRIA, ALTA): memory, speed, rounding.

Both are run forward and backward in turns, in one process; a ratio is of the medians. The loop is written here from
the formula of METHODS, section 2: for each caption, all images at once, and autograd keeps what it made.
"""

import platform
from collections.abc import Callable
from functools import partial

import pytest
import torch
from measure import peak_memory, times_faster
from torch import Tensor

from clinvla_fast import ops

WIDTH, TAUS = 128, (4.0, 5.0, 10.0)


def caption_loop(image, image_mask, text, text_mask, tau1, tau2, tau3) -> Tensor:
    columns = []
    for words, real in zip(text, text_mask, strict=True):
        words = words[real].expand(len(image), -1, -1)
        attention = torch.bmm(image, words.mT).softmax(-1)
        attention = (attention * tau1).masked_fill(~image_mask[..., None], -torch.inf).softmax(1)
        contexts = torch.bmm(attention.mT, image)
        similarity = torch.cosine_similarity(words, contexts, dim=-1)
        columns.append(torch.logsumexp(similarity * tau2, 1))
    return tau3 * torch.stack(columns, 1)


def batch(studies: int, patches: int, lengths: Tensor, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    words = int(lengths.max())
    return [
        torch.randn(studies, patches, WIDTH, generator=generator).to(dtype),
        torch.ones(studies, patches, dtype=torch.bool),
        torch.randn(studies, words, WIDTH, generator=generator).to(dtype),
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


def record(benchmark, **figures) -> None:
    benchmark.extra_info.update(
        figures, device="cpu", threads=torch.get_num_threads(), torch=torch.__version__, machine=platform.machine()
    )


def variable_lengths(studies: int) -> Tensor:
    return torch.randint(10, 128, (studies,), generator=torch.Generator().manual_seed(1))


CASES = {  # studies, patches, caption lengths, the least ratio of speeds
    "64 studies": (64, 196, torch.full((64,), 127), 1.2),
    "2 studies": (2, 196, torch.full((2,), 127), 1.0),
    "4 of variable length": (4, 98, variable_lengths(4), 1.0),
    "8 of variable length": (8, 98, variable_lengths(8), 1.0),
    "32 of variable length": (32, 98, variable_lengths(32), 1.0),
}


@pytest.mark.parametrize("case", CASES)
def test_speed(benchmark, case):
    studies, patches, lengths, least = CASES[case]
    inputs = batch(studies, patches, lengths)
    ours = partial(gradients, ops.local_alignment, inputs)
    ratio = times_faster(partial(gradients, caption_loop, inputs), ours, rounds=5 if studies > 32 else 30)
    pairs = 2 * 2 * 3 * studies * int(lengths.sum()) * patches * WIDTH
    record(benchmark, times_faster=ratio, flops=pairs, bytes=sum(x.nbytes for x in inputs))
    benchmark.pedantic(ours, rounds=1)
    assert ratio >= least


def test_memory(benchmark):
    inputs = batch(64, 196, torch.full((64,), 127))
    loop, ours = (peak_memory(partial(gradients, f, inputs)) for f in (caption_loop, ops.local_alignment))
    record(benchmark, bytes_of_the_loop=loop, bytes_held=ours)
    benchmark.pedantic(partial(gradients, ops.local_alignment, inputs), rounds=1)
    assert ours <= loop / 50


def test_bf16_gradients_are_closer_to_the_truth(benchmark):
    inputs = batch(8, 98, variable_lengths(8), torch.bfloat16)
    truth = gradients(caption_loop, [x.double() if x.is_floating_point() else x for x in inputs])

    def error(function) -> list[float]:
        found = gradients(function, inputs)
        return [((a.double() - b).abs().max() / b.abs().max()).item() for a, b in zip(found, truth, strict=True)]

    loop, ours = error(caption_loop), error(ops.local_alignment)
    record(benchmark, errors_of_the_loop=loop, errors=ours)
    benchmark.pedantic(partial(gradients, ops.local_alignment, inputs), rounds=1)
    assert all(a < b for a, b in zip(ours, loop, strict=True))
