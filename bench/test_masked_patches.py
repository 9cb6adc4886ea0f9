"""Masked-patch embedding on a CPU against normalising, embedding every patch and gathering: the same tokens.

On one thread, which neighbours on a shared machine move least.
"""

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d
from torch.utils.flop_counter import FlopCounterMode

from bench.operations import PATCH, PATCHES, WIDTH
from clinvla_fast import ops
from clinvla_fast.kernels.traffic import nbytes

STUDIES, VIEWS, SIDE, KEEP = 32, 2, 224, PATCHES // 4


@pytest.fixture
def parts() -> dict[str, Tensor]:
    """What ViT-B/16 has, in float32, a batch of two views a study, and the patches that are kept."""
    generator = torch.Generator().manual_seed(0)
    present = torch.ones(STUDIES, VIEWS, dtype=torch.bool)
    return {
        "images": torch.randint(0, 256, (STUDIES, VIEWS, SIDE, SIDE), generator=generator, dtype=torch.uint8),
        "present": present,
        "weight": torch.randn(WIDTH, 3, PATCH, PATCH, generator=generator) / PATCH,
        "bias": torch.randn(WIDTH, generator=generator),
        "position": torch.randn(1 + PATCHES, WIDTH, generator=generator),
        "cls": torch.randn(WIDTH, generator=generator),
        "slot": torch.randn(VIEWS, WIDTH, generator=generator),
        "mean": torch.tensor([0.485, 0.456, 0.406]),
        "std": torch.tensor([0.229, 0.224, 0.225]),
        "kept": ops.draw_kept_patches(present, PATCHES, KEEP, seed=0)[0],
    }


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def embed_all_and_gather(images, present, weight, bias, position, cls, slot, mean, std, kept) -> Tensor:
    gray = images[present].float() / 255
    normal = (gray[:, None] - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
    patches = conv2d(normal, weight, bias, stride=PATCH).flatten(2).mT + position[1:]
    patches = patches.gather(1, kept[..., None].expand(-1, -1, WIDTH))
    first = (cls + position[0]).expand(len(patches), 1, -1)
    return torch.cat([first, patches], 1) + slot[present.nonzero()[:, 1]][:, None]


def kept_patches_only(**parts: Tensor) -> Tensor:
    return ops.masked_patch_embed(**parts).tokens


@torch.no_grad()
def test_speed(measured, parts, one_thread):
    with FlopCounterMode(display=False) as counter:
        tokens = kept_patches_only(**parts)
    torch.testing.assert_close(tokens, embed_all_and_gather(**parts), rtol=1e-4, atol=1e-4)
    pixels = parts["kept"].numel() * PATCH**2
    assert counter.get_total_flops() == 2 * pixels * WIDTH
    runs = {"all": partial(embed_all_and_gather, **parts), "ours": partial(kept_patches_only, **parts)}
    taken = measured.turns(runs, rounds=25)
    measured.faster("than embedding all", taken["all"], taken["ours"], least=8)
    measured.figure("flops", counter.get_total_flops())
    measured.figure("bytes", pixels + nbytes([x for name, x in parts.items() if name != "images"], tokens))
