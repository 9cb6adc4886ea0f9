"""The losses of clinvla_fast.losses on a CPU against what they take the place of: dense logits, the loop over captions.

Both are run forward and backward in turns, in one process, in the sizes that open_clip and GLoRIA have; the ratio of
their medians is recorded, and nothing is asserted of a CPU, which others may share. The slow forms are written here
from the formulas.
"""

import platform
from collections.abc import Callable
from functools import partial

import pytest
import torch
from measure import times_faster
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from clinvla_fast.losses import ClipLoss, local_loss


def dense(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    logits, own = scale * image @ text.T, torch.arange(len(image))
    return (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2


def caption_loop(image: Tensor, text: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor, list[Tensor]]:
    regions, columns, maps = image.flatten(2), [], []
    for j, length in enumerate(lengths):
        words = text[j, :, :length].expand(len(image), -1, -1)
        attention = torch.bmm(regions.mT, words).softmax(2)
        attention = (4 * attention).softmax(1)
        similarity = torch.cosine_similarity(words, torch.bmm(regions, attention), dim=1)
        columns.append(10 * torch.logsumexp(5 * similarity, 1))
        maps.append(attention[j].T.unflatten(1, image.shape[2:])[None])
    logits, own = torch.stack(columns, 1), torch.arange(len(image))
    return cross_entropy(logits, own), cross_entropy(logits.T, own), maps


def step(loss: Callable[..., Tensor], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss(*inputs), inputs)


def compare(benchmark, slow: Callable[[], object], fast: Callable[[], object], rounds: int, **figures) -> None:
    """Record the median time of `slow` over that of `fast`, after a first turn that is not counted."""
    benchmark.extra_info.update(
        figures, times_faster=times_faster(slow, fast, rounds), device="cpu", threads=torch.get_num_threads(),
        torch=torch.__version__, machine=platform.machine(),
    )  # fmt: skip
    benchmark.pedantic(fast, rounds=1)


@pytest.mark.parametrize("batch", [256, 4096])
def test_clip(benchmark, batch):
    torch.manual_seed(0)
    inputs = [normalize(x, dim=1).requires_grad_() for x in torch.randn(2, batch, 512)]
    inputs.append(torch.tensor(1 / 0.07, requires_grad=True))
    compare(
        benchmark, partial(step, dense, inputs), partial(step, ClipLoss(), inputs), 20_000 // batch + 3, batch=batch
    )


@pytest.mark.parametrize("batch", [8, 32])
def test_gloria_local(benchmark, batch):
    torch.manual_seed(0)
    inputs = [torch.randn(batch, 768, 19, 19, requires_grad=True), torch.randn(batch, 768, 97, requires_grad=True)]
    lengths = torch.randint(10, 98, (batch,)).tolist()

    def of(form: Callable[..., tuple]) -> Callable[..., Tensor]:
        return lambda image, text: sum(form(image, text, lengths)[:2])

    compare(benchmark, partial(step, of(caption_loop), inputs), partial(step, of(local_loss), inputs), 5, batch=batch)
