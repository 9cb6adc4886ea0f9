"""The losses of clinvla_fast.losses on a CPU against what they take the place of, at its sizes, forward and backward:
open_clip's own, which are equal, and GLoRIA's loop over captions."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from bench.measure import peak_memory
from bench.operations import TAUS, caption_loop
from clinvla_fast import losses


def step(loss: Callable[..., Tensor], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """The loss, and its gradients by the inputs."""
    out = loss(*inputs)
    return out, *torch.autograd.grad(out, inputs)


def compare(measured, theirs: Callable[..., Tensor], ours: Callable[..., Tensor], inputs: list[Tensor], rounds: int):
    runs = {"theirs": partial(step, theirs, inputs), "ours": partial(step, ours, inputs)}
    for actual, right in zip(runs["ours"](), runs["theirs"](), strict=True):
        assert (actual - right).norm() <= 1e-4 * right.norm()
    taken = measured.turns(runs, rounds, begun=True)
    peaks = {name: peak_memory(run) for name, run in runs.items()}
    measured.faster("time", taken["theirs"], taken["ours"])
    measured.ratio("memory", peaks["theirs"] / peaks["ours"])
    measured.figure("peak_bytes", peaks)


@pytest.mark.parametrize("pairs", [256, 1024, 4096])
@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss"])
def test_open_clip(measured, peer, name, pairs):
    """Of features as its models give them, before they are normalised: that is part of a step."""
    peer("open_clip_torch")
    from open_clip import loss as open_clip_loss

    torch.manual_seed(0)
    inputs = [x.requires_grad_() for x in torch.randn(2, pairs, 512)]
    inputs += [torch.tensor(x, requires_grad=True) for x in ((1 / 0.07,), (10.0, -10.0))[name == "SigLipLoss"]]

    def of(loss: nn.Module) -> Callable[..., Tensor]:
        return lambda image, text, *scalars: loss(normalize(image, dim=1), normalize(text, dim=1), *scalars)

    theirs, ours = (of(getattr(module, name)()) for module in (open_clip_loss, losses))
    compare(measured, theirs, ours, inputs, rounds=max(7, 10_000 // pairs))


@pytest.mark.parametrize("studies", [8, 16])
def test_gloria_local(measured, studies):
    torch.manual_seed(0)
    inputs = [torch.randn(studies, 768, 19, 19), torch.randn(studies, 768, 97)]
    lengths = torch.randint(10, 98, (studies,))
    mask, own = torch.arange(97) < lengths[:, None], torch.arange(studies)
    regions = torch.ones(studies, 19 * 19, dtype=torch.bool)

    def loop(image: Tensor, text: Tensor) -> Tensor:
        logits = caption_loop(image.flatten(2).mT, regions, text.mT, mask, *TAUS)
        return cross_entropy(logits, own) + cross_entropy(logits.mT, own)

    def ours(image: Tensor, text: Tensor) -> Tensor:
        return sum(losses.local_loss(image, text, lengths)[:2])

    compare(measured, loop, ours, [x.requires_grad_() for x in inputs], rounds=5)
