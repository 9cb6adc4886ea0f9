"""Masked-patch embedding (ClinVLA, section 3.3): tokens of the kept patches, straight from gray pixels.

A patch embedding is linear, so what precedes it folds into its weights exactly. With pixel x in 0..top (255, or 65535
of 16-bit images), u = (x - half)/half its centred value (half = 128 or 32768), gray copied to C channels, mean m_c and
deviation s_c:

    sum_c W_c (x/top - m_c)/s_c + b  =  W' u + b'
    W' = half/top sum_c W_c/s_c,   b' = b + sum_c (half/top - m_c)/s_c sum W_c

    token of patch p  =  W' u_p + b' + position[1 + p] + slot[view]
    CLS               =  cls + position[0] + slot[view]

Only kept patches of present views are read, converted and multiplied, and each token is written once. Centred pixels
are whole numbers that 16-bit types hold exactly; those of 16-bit images are the sum of two such numbers, a multiple of
256 and 0..255, each with a product of its own. So all that rounds is W', a token's sum (in fp32) and its store.

Forward: the tokens of all views are the rows of one matrix product, 2 k p^2 D operations a view. It must read k p^2
pixels a view and write (1 + k) D numbers, each once. A program holds p^2 x BN weights on the chip, where they fit, and
goes through many blocks of BM rows: it finds each row's patch through `kept`, gathers its pixels (a byte each, so that
reading them again for every BN columns is cheap), and adds bias or CLS, position and slot to the sum.

Backward reads the tokens' gradient and, only where the projection trains, the pixels again. The weights' gradient is
the product of pixels and gradient, summed in fp32 over a share of the rows a program and then over programs. Position,
bias and CLS share a pass: a program sums the gradient of one patch, or of CLS, over the views that kept it, found
through `restore`. The slots' gradient sums each view's tokens, then views. Nothing is added atomically.
"""

from collections.abc import Callable
from math import isqrt
from typing import NamedTuple

import torch
import triton as _triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.flop_counter import register_flop_formula

from . import draw_patches
from .launch import launch, multiplied_in, summed_in
from .traffic import nbytes, register_byte_formula

_SIGNED = {torch.uint8: torch.int8, torch.uint16: torch.int16}
_HALF = {torch.uint8: 128, torch.uint16: 32768}


class PatchTokens(NamedTuple):
    """tokens: [n, 1 + k, D], CLS first. kept: int64 [n, k], the patches that they are of. restore: int64 [n, N], where
    each patch is found in [kept ones in their order, others in ascending order]."""

    tokens: Tensor
    kept: Tensor
    restore: Tensor


def check(
    images: Tensor,
    present: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    position: Tensor,
    cls: Tensor,
    slot: Tensor,
    mean: Tensor,
    std: Tensor,
    kept: Tensor | None = None,
    keep: int | None = None,
    seed: int | Tensor | None = None,
) -> None:
    """Raises ValueError where the arguments do not fit together."""
    if images.ndim != 4 or images.dtype not in _HALF:
        raise ValueError(f"images are {images.dtype} {list(images.shape)}: expected uint8 or uint16 [B, V, H, W].")
    if present is not None and (present.dtype != torch.bool or present.shape != images.shape[:2]):
        found = f"{present.dtype} {list(present.shape)}"
        raise ValueError(f"present is {found}: expected bool {list(images.shape[:2])}, as the images.")
    if weight.ndim != 4 or weight.shape[2] != weight.shape[3]:
        raise ValueError(f"weight is {list(weight.shape)}: expected [D, C, p, p].")
    width, channels, size, _ = weight.shape
    patches = to_patches(images, size).shape[2:4].numel()
    shapes = {
        "bias": (bias, [width]),
        "position": (position, [1 + patches, width]),
        "cls": (cls, [width]),
        "slot": (slot, [images.shape[1], width]),
        "mean": (mean, [channels]),
        "std": (std, [channels]),
    }
    for name, (tensor, expected) in shapes.items():
        if list(tensor.shape) != expected:
            raise ValueError(f"{name} is {list(tensor.shape)}: expected {expected}.")
        if tensor.dtype != weight.dtype or tensor.device != weight.device:
            found = f"{tensor.dtype} on {tensor.device}"
            raise ValueError(f"{name} is {found}: expected {weight.dtype} on {weight.device}, as the weight.")
    if kept is not None:
        if keep is not None or seed is not None:
            raise ValueError("pass either kept, or keep and seed, or none of them.")
        if kept.dtype != torch.int64 or kept.ndim != 2 or kept.shape[1] > patches:
            found = f"{kept.dtype} {list(kept.shape)}"
            raise ValueError(f"kept is {found}: expected int64 [n, k] with k up to {patches}, the number of patches.")
    elif (keep is None) != (seed is None):
        raise ValueError("a draw needs both keep and seed.")
    elif keep is not None:
        draw_patches.check(_flags(images, present), patches, keep, seed)


def to_patches(images: Tensor, size: int) -> Tensor:
    """A view of images [..., H, W] as a grid of patches [..., H/p, W/p, p, p]; no copy."""
    height, width = images.shape[-2:]
    if height % size or width % size:
        raise ValueError(f"images are {height}x{width}: expected both sides to be multiples of the patch size {size}.")
    return images.unflatten(-1, (-1, size)).unflatten(-3, (-1, size)).transpose(-3, -2)


def fold_normalisation(
    weight: Tensor, bias: Tensor, mean: Tensor, std: Tensor, half: int = 128
) -> tuple[Tensor, Tensor]:
    """Patch weights [D, C, p, p] and bias [D] for normalised C-channel input, as W' [D, p*p] and b' [D] for gray."""
    dtype = weight.dtype
    weight, bias, mean, std = (x.to(torch.promote_types(dtype, torch.float32)) for x in (weight, bias, mean, std))
    centre = half / (2 * half - 1)
    scaled = weight.flatten(2) / std[:, None]
    shifted = bias + (scaled.sum(2) * (centre - mean)).sum(1)
    return (scaled.sum(1) * centre).to(dtype), shifted.to(dtype)


def _centred_pixels(images: Tensor, view: Tensor, kept: Tensor, size: int) -> Tensor:
    """u of the patches kept [n, k] of the flat views [n], times half: whole numbers, int8 or int16 [n, k, p*p]."""
    height, width = images.shape[2:]
    columns = width // size
    lines = images.view(_SIGNED[images.dtype]).reshape(-1, size)  # what a patch has of a row of pixels lies together
    top = (view[:, None] * height + kept // columns * size) * columns + kept % columns
    index = top[..., None] + torch.arange(size, device=kept.device) * columns
    # the highest bit flipped, an unsigned number less half is the signed one of the same bits
    return lines.index_select(0, index.flatten()).view(*kept.shape, size * size).bitwise_xor_(-_HALF[images.dtype])


def _embed_reference(
    images: Tensor,
    view: Tensor,
    kept: Tensor,
    weight: Tensor,
    bias: Tensor,
    position: Tensor,
    cls: Tensor,
    slot: Tensor,
) -> Tensor:
    pixels = _centred_pixels(images, view, kept, isqrt(weight.shape[1])).to(weight.dtype).div_(_HALF[images.dtype])
    # Few large tensors: on a CPU new memory costs as much as arithmetic.
    added = torch.cat([cls + position[:1], bias + position[1:]]) + slot[:, None]  # [V, 1 + N, D], all but the pixels
    row = torch.cat([kept.new_zeros(len(view), 1), 1 + kept], dim=1)
    tokens = added[(view % len(slot))[:, None], row]
    tokens[:, 1:] += linear(pixels, weight)
    return tokens


def _flags(images: Tensor, present: Tensor | None) -> Tensor:
    return images.new_ones(images.shape[:2], dtype=torch.bool) if present is None else present


def _find_patches(
    images: Tensor, present: Tensor | None, patches: int, kept: Tensor | None, keep: int | None,
    seed: int | Tensor | None, draw: Callable,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """What is embedded: the flat numbers of the present views [n], kept [n, k] and restore [n, N]."""
    if kept is None and keep is None:
        views = torch.arange(images.shape[:2].numel(), device=images.device)
        view = views if present is None else views[present.flatten()]
        every = torch.arange(patches, device=images.device).expand(len(view), -1)
        return view, every, every
    present = _flags(images, present)
    if kept is None:
        kept, restore = draw(present, patches, keep, seed)
    else:
        torch._assert_async(present.sum() == len(kept), "kept does not have one row for each present view")
        torch._assert_async(((kept >= 0) & (kept < patches)).all(), "kept names a patch that the images do not have")
        restore = draw_patches.restore_order(kept, patches)
    # The number of views is known by now, so no device is waited for.
    view = torch.nonzero_static(present.flatten(), size=len(kept)).squeeze(1)
    return view, kept, restore


def reference(
    images: Tensor,
    present: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    position: Tensor,
    cls: Tensor,
    slot: Tensor,
    mean: Tensor,
    std: Tensor,
    kept: Tensor | None = None,
    keep: int | None = None,
    seed: int | Tensor | None = None,
) -> PatchTokens:
    view, kept, restore = _find_patches(images, present, len(position) - 1, kept, keep, seed, draw_patches.reference)
    weight, bias = fold_normalisation(weight, bias, mean, std, _HALF[images.dtype])
    tokens = _embed_reference(images, view, kept, weight, bias, position, cls, slot)
    return PatchTokens(tokens, kept, restore)


@_triton.jit
def _pixels(
    images, origin, is_patch, first, row_stride, column_stride,
    SIZE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """CHUNK pixels of each row's patch, from the `first` on; 0 where there is none."""
    pixel = first + tl.arange(0, CHUNK)
    offset = pixel // SIZE * row_stride + pixel % SIZE * column_stride
    inside = is_patch[:, None] & (pixel < SIZE * SIZE)[None, :]
    return tl.load(images + origin[:, None] + offset[None, :], mask=inside, other=0)


@_triton.jit
def _product(pixels, other, total, HALF: tl.constexpr, SPLIT: tl.constexpr, SUMMED: tl.constexpr):
    """total + (pixels - HALF) @ other; SPLIT where pixels of 16 bits meet numbers of 16 bits."""
    if SPLIT:
        high = (pixels & 0xFF00).to(other.dtype) - HALF
        total = tl.dot(high, other, total, out_dtype=SUMMED)
        centred = (pixels & 0xFF).to(other.dtype)
    else:
        centred = pixels.to(other.dtype) - HALF
    return tl.dot(centred, other, total, input_precision="tf32x3", out_dtype=SUMMED)


@_triton.jit
def _find_rows(
    row, rows, view, kept, study_stride, slot_stride, row_stride, column_stride, kept_stride, patch_stride,
    TOKENS: tl.constexpr, SLOTS: tl.constexpr, COLUMNS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Of each row: its patch (-1: CLS or none), its view slot, and the offset of its first pixel."""
    inside = row < rows
    token = row % TOKENS
    entry = (row // TOKENS).to(tl.int64)
    patch = tl.load(kept + entry * kept_stride + (token - 1) * patch_stride, mask=inside & (token > 0), other=-1)
    flat = tl.load(view + entry, mask=inside, other=0).to(tl.int32)
    patch = patch.to(tl.int32)
    origin = (flat // SLOTS).to(tl.int64) * study_stride + (flat % SLOTS).to(tl.int64) * slot_stride
    origin += (patch // COLUMNS * SIZE).to(tl.int64) * row_stride + (patch % COLUMNS * SIZE).to(
        tl.int64
    ) * column_stride
    return patch, flat % SLOTS, origin


@_triton.jit(do_not_specialize=["rows"])
def _forward_kernel(
    images, view, kept, weight, starts, position, out,
    rows, study_stride, slot_stride, row_stride, column_stride, kept_stride, patch_stride,
    TOKENS: tl.constexpr, SLOTS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr,
    HALF: tl.constexpr, SPLIT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, HELD: tl.constexpr,
    MULTIPLIED: tl.constexpr, SUMMED: tl.constexpr,
):  # fmt: skip
    PIXELS: tl.constexpr = SIZE * SIZE
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    is_column = n < WIDTH
    k = tl.arange(0, BK)
    weights = weight + n[None, :] * PIXELS + k[:, None]
    held = ()
    if HELD:
        for first in tl.static_range(0, PIXELS, BK):
            part = tl.load(weights + first, mask=is_column[None, :] & (first + k < PIXELS)[:, None], other=0)
            held = held + (part.to(MULTIPLIED),)  # noqa: RUF005
    for block in range(tl.program_id(1), tl.cdiv(rows, BM), tl.num_programs(1)):
        row = block * BM + tl.arange(0, BM)
        patch, view_slot, origin = _find_rows(
            row, rows, view, kept, study_stride, slot_stride, row_stride, column_stride, kept_stride, patch_stride,
            TOKENS, SLOTS, COLUMNS, SIZE,
        )  # fmt: skip
        is_patch = patch >= 0
        total = tl.zeros((BM, BN), SUMMED)
        if HELD:
            for first in tl.static_range(0, PIXELS, BK):
                pixels = _pixels(images, origin, is_patch, first, row_stride, column_stride, SIZE, BK)
                total = _product(pixels, held[first // BK], total, HALF, SPLIT, SUMMED)
        else:
            for first in range(0, PIXELS, BK):
                pixels = _pixels(images, origin, is_patch, first, row_stride, column_stride, SIZE, BK)
                part = tl.load(weights + first, mask=is_column[None, :] & (first + k < PIXELS)[:, None], other=0)
                total = _product(pixels, part.to(MULTIPLIED), total, HALF, SPLIT, SUMMED)
        is_out = (row < rows)[:, None] & is_column[None, :]
        start = view_slot + tl.where(is_patch, 0, SLOTS)
        added = tl.load(position + (1 + patch)[:, None] * WIDTH + n[None, :], mask=is_out, other=0).to(SUMMED)
        added += tl.load(starts + start[:, None] * WIDTH + n[None, :], mask=is_out, other=0)
        total = total * tl.where(is_patch, 1 / HALF, 0)[:, None] + added  # CLS rows have multiplied no pixels of theirs
        tl.store(out + row.to(tl.int64)[:, None] * WIDTH + n[None, :], total, mask=is_out)


@_triton.jit(do_not_specialize=["rows", "share"])
def _weight_gradient_kernel(
    images, view, kept, gradient, sums,
    rows, study_stride, slot_stride, row_stride, column_stride, kept_stride, patch_stride,
    share,
    TOKENS: tl.constexpr, SLOTS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr,
    HALF: tl.constexpr, SPLIT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, MULTIPLIED: tl.constexpr, SUMMED: tl.constexpr,
):  # fmt: skip
    PIXELS: tl.constexpr = SIZE * SIZE
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    first = tl.program_id(1) * BK
    start = tl.program_id(2) * share
    total = tl.zeros((BK, BN), SUMMED)
    for block in range(start, tl.minimum(start + share, rows), BM):
        row = block + tl.arange(0, BM)
        patch, _, origin = _find_rows(
            row, rows, view, kept, study_stride, slot_stride, row_stride, column_stride, kept_stride, patch_stride,
            TOKENS, SLOTS, COLUMNS, SIZE,
        )  # fmt: skip
        is_patch = patch >= 0
        inside = is_patch[:, None] & (n < WIDTH)[None, :]
        g = tl.load(gradient + row.to(tl.int64)[:, None] * WIDTH + n[None, :], mask=inside, other=0)
        pixels = _pixels(images, origin, is_patch, first, row_stride, column_stride, SIZE, BK)
        total = _product(tl.trans(pixels), g.to(MULTIPLIED), total, HALF, SPLIT, SUMMED)
    k = first + tl.arange(0, BK)
    place = tl.program_id(2).to(tl.int64) * WIDTH * PIXELS + n[None, :] * PIXELS + k[:, None]
    tl.store(sums + place, total * (1 / HALF), mask=(n < WIDTH)[None, :] & (k < PIXELS)[:, None])


@_triton.jit(do_not_specialize=["views", "tokens"])
def _patch_sums_kernel(
    gradient, restore, sums, views, tokens, view_stride, patch_stride,
    WIDTH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SUMMED: tl.constexpr,
):  # fmt: skip
    """The gradients of one patch, or of CLS, summed over the views that have it."""
    which = tl.program_id(0)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros((BN,), SUMMED)
    for block in tl.range(0, views, BM, num_stages=3):
        view = (block + tl.arange(0, BM)).to(tl.int64)
        of_patch = view < tl.where(which > 0, views, 0)
        token = 1 + tl.load(restore + view * view_stride + (which - 1) * patch_stride, mask=of_patch, other=-1)
        inside = ((view < views) & (token < tokens))[:, None] & (n < WIDTH)[None, :]
        g = tl.load(gradient + ((view * tokens + token) * WIDTH)[:, None] + n[None, :], mask=inside, other=0)
        total += tl.sum(g.to(SUMMED), axis=0)
    tl.store(sums + which * WIDTH + n, total, mask=n < WIDTH)


def _multiprocessors(device: torch.device) -> int:
    """Of a GPU; a few for the interpreter, which runs one program after the other."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _forward_config(pixels: int, dtype: torch.dtype, split: bool) -> dict:
    if dtype.itemsize > 2:
        return {"BM": 64, "BN": 64, "BK": 32, "HELD": False, "num_warps": 4, "num_stages": 3}
    if split or pixels % 64:  # more numbers a pixel, or an address for each: fewer sums, or registers run out
        return {"BM": 64, "BN": 64, "BK": 64, "HELD": pixels <= 256, "num_warps": 4, "num_stages": 3}
    if pixels <= 256:
        return {"BM": 64, "BN": 128, "BK": 64, "HELD": True, "num_warps": 4, "num_stages": 3}
    return {"BM": 128, "BN": 128, "BK": 64, "HELD": False, "num_warps": 8, "num_stages": 3}


def _gradient_config(dtype: torch.dtype, split: bool) -> dict:
    if dtype.itemsize > 2:
        return {"BM": 32, "BN": 64, "BK": 64, "num_warps": 4, "num_stages": 2}
    return {"BM": 64, "BN": 64 if split else 128, "BK": 128, "num_warps": 8, "num_stages": 3}


def _pixel_arguments(images: Tensor, view: Tensor, kept: Tensor, weight: Tensor) -> tuple[list, list, dict]:
    """What every kernel that reads pixels takes: tensors, sizes and strides, and constants."""
    size = isqrt(weight.shape[1])
    tokens = 1 + kept.shape[1]
    sizes = [len(view) * tokens, *images.stride(), *kept.stride()]
    meta = {
        "TOKENS": tokens,
        "SLOTS": images.shape[1],
        "COLUMNS": images.shape[3] // size,
        "WIDTH": len(weight),
        "SIZE": size,
        "HALF": _HALF[images.dtype],
        "SPLIT": images.dtype == torch.uint16 and weight.dtype.itemsize == 2,
        "MULTIPLIED": multiplied_in(weight.dtype),
        "SUMMED": summed_in(weight.dtype),
    }
    return [images, view, kept], sizes, meta


@torch.library.custom_op("clinvla_fast::masked_patch_embed", mutates_args=())
def _embed(
    images: Tensor,
    view: Tensor,
    kept: Tensor,
    restore: Tensor,
    weight: Tensor,
    bias: Tensor,
    position: Tensor,
    cls: Tensor,
    slot: Tensor,
) -> Tensor:
    width, pixels = weight.shape
    out = weight.new_empty(len(view), 1 + kept.shape[1], width)
    summed = torch.promote_types(weight.dtype, torch.float32)
    starts = torch.cat([x.to(summed) + slot for x in (bias, cls)])  # of a patch's token and of CLS, for each slot
    tensors, sizes, meta = _pixel_arguments(images, view, kept, weight)
    config = _forward_config(pixels, weight.dtype, meta["SPLIT"])
    columns = _triton.cdiv(width, config["BN"])
    blocks = _triton.cdiv(sizes[0], config["BM"])
    if config["HELD"]:
        blocks = min(blocks, _triton.cdiv(2 * _multiprocessors(out.device), columns))  # two programs fit on one
    tensors += [weight.contiguous(), starts, position.contiguous(), out]
    launch(_forward_kernel, (columns, blocks), *tensors, *sizes, **meta, **config)
    return out


@_embed.register_fake
def _(images, view, kept, restore, weight, bias, position, cls, slot):
    return weight.new_empty(view.shape[0], 1 + kept.shape[1], weight.shape[0])


@torch.library.custom_op("clinvla_fast::masked_patch_embed_backward", mutates_args=())
def _embed_backward(
    gradient: Tensor,
    images: Tensor,
    view: Tensor,
    kept: Tensor,
    restore: Tensor,
    weight: Tensor,
    of_weight: bool,
    of_patches: bool,
    of_slot: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of weight; of bias, position and cls; and of slot: empty where they are not asked for."""
    gradient = gradient.contiguous()
    views, tokens, width = gradient.shape
    summed = torch.promote_types(gradient.dtype, torch.float32)
    weight_gradient, bias, position, cls, slot = (gradient.new_empty(0) for _ in range(5))
    if of_weight:
        tensors, sizes, meta = _pixel_arguments(images, view, kept, weight)
        config = _gradient_config(gradient.dtype, meta["SPLIT"])
        grid = _triton.cdiv(width, config["BN"]), _triton.cdiv(weight.shape[1], config["BK"])
        shares = _triton.cdiv(_multiprocessors(gradient.device), grid[0] * grid[1])
        blocks = _triton.cdiv(sizes[0], config["BM"])
        share = max(1, _triton.cdiv(blocks, shares)) * config["BM"]
        sums = gradient.new_empty(shares, *weight.shape, dtype=summed)
        launch(_weight_gradient_kernel, (*grid, shares), *tensors, gradient, sums, *sizes, share, **meta, **config)
        weight_gradient = sums.sum(0).to(gradient.dtype)
    if of_patches:
        patches = restore.shape[1]
        sums = gradient.new_empty(1 + patches, width, dtype=summed)
        config = {"BM": 64, "BN": 128, "SUMMED": summed_in(summed), "num_warps": 4}
        grid = 1 + patches, _triton.cdiv(width, config["BN"])
        sizes = views, tokens, *restore.stride()
        launch(_patch_sums_kernel, grid, gradient, restore, sums, *sizes, WIDTH=width, **config)
        bias, position, cls = (x.to(gradient.dtype) for x in (sums[1:].sum(0), sums, sums[0].clone()))
    if of_slot:
        sums = gradient.sum(1, dtype=summed)
        every = sums.new_zeros(images.shape[:2].numel(), width).index_copy_(0, view, sums)
        slot = every.unflatten(0, images.shape[:2]).sum(0).to(gradient.dtype)
    return weight_gradient, bias, position, cls, slot


@_embed_backward.register_fake
def _(gradient, images, view, kept, restore, weight, of_weight, of_patches, of_slot):
    def empty(needed: bool, *shape: int) -> Tensor:
        return gradient.new_empty(shape if needed else 0)

    width, pixels = weight.shape
    return (
        empty(of_weight, width, pixels),
        empty(of_patches, width),
        empty(of_patches, 1 + restore.shape[1], width),
        empty(of_patches, width),
        empty(of_slot, images.shape[1], width),
    )


@register_flop_formula(torch.ops.clinvla_fast.masked_patch_embed)
def _(images, view, kept, restore, weight, *args, out_shape=None, **kwargs) -> int:
    return 2 * kept[0] * kept[1] * weight[0] * weight[1]


@register_flop_formula(torch.ops.clinvla_fast.masked_patch_embed_backward)
def _(gradient, images, view, kept, restore, weight, of_weight, *args, out_shape=None, **kwargs) -> int:
    return 2 * kept[0] * kept[1] * weight[0] * weight[1] if of_weight else 0


def _pixel_bytes(images: Tensor, view: Tensor, kept: Tensor, weight: Tensor) -> int:
    return kept.numel() * weight.shape[1] * images.element_size() + nbytes(view, kept)


@register_byte_formula(torch.ops.clinvla_fast.masked_patch_embed)
def _(images, view, kept, restore, *weights, out) -> int:
    return _pixel_bytes(images, view, kept, weights[0]) + nbytes(weights, out)


@register_byte_formula(torch.ops.clinvla_fast.masked_patch_embed_backward)
def _(gradient, images, view, kept, restore, weight, of_weight, of_patches, of_slot, *, out) -> int:
    moved = nbytes(gradient, out)
    if of_weight:
        moved += _pixel_bytes(images, view, kept, weight)
    if of_patches:
        moved += nbytes(restore)
    if of_slot and not of_weight:
        moved += nbytes(view)
    return moved


def _setup_context(ctx, inputs, output) -> None:
    images, view, kept, restore, weight, *_ = inputs
    ctx.save_for_backward(images, view, kept, restore, weight)


def _backward(ctx, gradient):
    needed = ctx.needs_input_grad[4:]
    of_weight, *of_patches, of_slot = needed
    found = torch.ops.clinvla_fast.masked_patch_embed_backward(
        gradient, *ctx.saved_tensors, of_weight, any(of_patches), of_slot
    )
    return None, None, None, None, *(x if need else None for x, need in zip(found, needed, strict=True))


_embed.register_autograd(_backward, setup_context=_setup_context)


def triton(
    images: Tensor,
    present: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    position: Tensor,
    cls: Tensor,
    slot: Tensor,
    mean: Tensor,
    std: Tensor,
    kept: Tensor | None = None,
    keep: int | None = None,
    seed: int | Tensor | None = None,
) -> PatchTokens:
    view, kept, restore = _find_patches(images, present, len(position) - 1, kept, keep, seed, draw_patches.triton)
    weight, bias = fold_normalisation(weight, bias, mean, std, _HALF[images.dtype])
    tokens = torch.ops.clinvla_fast.masked_patch_embed(images, view, kept, restore, weight, bias, position, cls, slot)
    return PatchTokens(tokens, kept, restore)
