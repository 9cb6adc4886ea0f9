"""Which patches of each view are kept (ClinVLA, section 3.3): exactly k of N, uniform, independent a view.

Every patch of every view has a number of 32 random bits, and a view keeps its k smallest (equal ones: the first). The
numbers are Philox-4x32-10 (Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3") of key = seed and
counter = (patch, view, 0, 0), where a view's number is study * V + slot. So a mask is a function of the seed and of
its view's own number alone: the same on every device, in both backends and whichever other views are present.

The kernel has a program a view, its N numbers in registers: it finds the largest threshold with at most k numbers
below it, bit by bit, and writes what is below in ascending order, and where every patch went.
"""

import torch
import triton as _triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .traffic import nbytes, register_byte_formula

_LOW = 0xFFFFFFFF


def check(present: Tensor, patches: int, keep: int, seed: int | Tensor) -> None:
    """Raises ValueError where the arguments do not fit together."""
    if present.dtype != torch.bool or present.ndim != 2:
        raise ValueError(f"present is {present.dtype} {list(present.shape)}: expected bool [B, V].")
    if not 0 <= keep <= patches:
        raise ValueError(f"keep is {keep}: expected 0 to {patches}, the number of patches.")
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.ndim or seed.device != present.device:
            found = f"{seed.dtype} {list(seed.shape)} on {seed.device}"
            raise ValueError(f"seed is {found}: expected an int or an int64 scalar on {present.device}.")
    elif not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed is {seed}: expected a number of 64 bits.")


def restore_order(kept: Tensor, patches: int) -> Tensor:
    """Where each of the patches is found in [the kept ones in their order, the others in ascending order].

    Args:
        kept: int64 [n, k], different indices in each row.

    Returns:
        int64 [n, patches]: `cat([kept tokens, other tokens], 1)` gathered by it is in the order of the image.
    """
    n, k = kept.shape
    others = torch.ones(n, patches, dtype=torch.int64, device=kept.device).scatter(1, kept, 0)
    places = torch.arange(k, device=kept.device).expand(n, -1)
    return (others.cumsum(1) + (k - 1)).scatter(1, kept, places)


def _views(present: Tensor) -> Tensor:
    return present.flatten().nonzero().squeeze(1)


def _on_device(seed: int | Tensor, device: torch.device) -> Tensor:
    return seed if isinstance(seed, Tensor) else torch.full((), seed, dtype=torch.int64, device=device)


def _philox(seed: Tensor, patch: Tensor, view: Tensor) -> Tensor:
    """The first of Philox's four words, in 0..2**32 - 1, as int64; its products wrap around, as they should."""
    a, b, c, d = patch, view, 0, 0
    key, other = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        left, right = a * 0xD2511F53, c * 0xCD9E8D57
        a, b = ((right >> 32) & _LOW) ^ b ^ key, right & _LOW
        c, d = ((left >> 32) & _LOW) ^ d ^ other, left & _LOW
        key, other = (key + 0x9E3779B9) & _LOW, (other + 0xBB67AE85) & _LOW
    return a


def reference(present: Tensor, patches: int, keep: int, seed: int | Tensor) -> tuple[Tensor, Tensor]:
    seed = _on_device(seed, present.device)
    noise = _philox(seed, torch.arange(patches, device=present.device), _views(present)[:, None])
    kept = noise.argsort(dim=1, stable=True)[:, :keep].sort(dim=1).values
    return kept, restore_order(kept, patches)


@_triton.jit
def _draw_kernel(view, seed, kept, restore, patches, keep, BLOCK: tl.constexpr, BITS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    patch = tl.arange(0, BLOCK)
    zero = patch * 0
    noise, _, _, _ = tl.philox(tl.load(seed), patch, tl.load(view + row).to(tl.int32) + zero, zero, zero)
    number = noise.to(tl.int64) * BLOCK + patch  # no two are equal
    number = tl.where(patch < patches, number, 1 << 62)
    threshold = tl.zeros((), tl.int64)
    for bit in range(BITS + 1):
        higher = threshold + (tl.full((), 1 << BITS, tl.int64) >> bit)
        below = tl.sum((number < higher).to(tl.int32))
        threshold = tl.where(below <= keep, higher, threshold)
    is_kept = number < threshold
    place = tl.cumsum(is_kept.to(tl.int32)) - is_kept.to(tl.int32)  # kept patches before this one
    tl.store(kept + row * keep + place, patch.to(tl.int64), mask=is_kept)
    place = tl.where(is_kept, place, keep + patch - place)
    tl.store(restore + row * patches + patch, place.to(tl.int64), mask=patch < patches)


@torch.library.custom_op("clinvla_fast::draw_patches", mutates_args=())
def _draw(view: Tensor, patches: int, keep: int, seed: Tensor) -> tuple[Tensor, Tensor]:
    kept, restore = view.new_empty(len(view), keep), view.new_empty(len(view), patches)
    block = _triton.next_power_of_2(max(1, patches))
    meta = {"BLOCK": block, "BITS": 32 + block.bit_length() - 1, "num_warps": min(16, max(1, block // 1024))}
    launch(_draw_kernel, (len(view),), view, seed, kept, restore, patches, keep, **meta)
    return kept, restore


@_draw.register_fake
def _(view: Tensor, patches: int, keep: int, seed: Tensor) -> tuple[Tensor, Tensor]:
    return view.new_empty(view.shape[0], keep), view.new_empty(view.shape[0], patches)


@register_byte_formula(torch.ops.clinvla_fast.draw_patches)
def _(view: Tensor, patches: int, keep: int, seed: Tensor, *, out: tuple[Tensor, Tensor]) -> int:
    return nbytes(view, seed, out)


def triton(present: Tensor, patches: int, keep: int, seed: int | Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.clinvla_fast.draw_patches(_views(present), patches, keep, _on_device(seed, present.device))
