"""Local alignment on a CPU against the loop over captions that public code has (GLoRIA, ALTA): memory, speed, rounding.

Both are run forward and backward in turns, in one process; a ratio is of the medians. The loop is written here from
the formula of METHODS, section 2: for each caption, all images at once, and autograd keeps what it made.
"""

import statistics
import time
from collections.abc import Callable

import pytest
import torch
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
    logits = function(*leaves).float()
    target = torch.arange(len(logits))
    loss = torch.nn.functional.cross_entropy
    (loss(logits, target) + loss(logits.mT, target)).backward()
    return [x.grad for x in leaves if x.grad is not None]


def ratio(slow: Callable[[], object], fast: Callable[[], object], rounds: int) -> float:
    """Median time of `slow` over that of `fast`, run in turns."""
    times: dict[Callable[[], object], list[float]] = {slow: [], fast: []}
    for _ in range(rounds + 1):
        for function, taken in times.items():
            start = time.perf_counter()
            function()
            taken.append(time.perf_counter() - start)
    return statistics.median(times[slow][1:]) / statistics.median(times[fast][1:])


def peak_memory(function: Callable[[], object]) -> int:
    """Bytes allocated at once, beyond what was there before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak
