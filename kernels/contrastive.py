"""Contrastive losses over a batch of matched pairs: symmetric InfoNCE and its sigmoid form, never storing the logits.

    c(i, j) = cos(image i, text j)        the match of image i is text i + offset
    InfoNCE   z = scale * c               loss = mean_m (lse_j z(m, j) + lse_i z(i, m)) / 2 - z(m, m)    (CLIP)
    sigmoid   z = scale * c + bias        loss = mean_i sum_j log(1 + exp(-y z(i, j))), y = +1 for a match, else -1
                                                                                              (SigLIP, equation 1)

Without `symmetric` InfoNCE is mean_m lse_j z(m, j) - z(m, m). Either way every product is over all I x J pairs and the
means over the matches m, of which there are min(I, J): each row of the shorter side has one.

A program of the forward kernel holds a block of images and streams the texts past it. A tile of logits lives in
registers only: its sums over texts are accumulated there, its sums over images leave as one number a text and block
and are merged after. Backward makes G = dloss/dz from the saved log-sum-exps: dimage = scale * G text and dtext =
scale * G^T image. One kernel, started once with each side held, multiplies a tile of logits again, makes G of it and
multiplies G by the streamed tile. Raw rows are multiplied, so half precision is exact into fp32 sums, and 1/|row| and
the scale come in afterwards. The gradient of the scale is free: sum_i x_i . dx_i / scale, of the normalised rows x.

While |scale| <= 70, exp(z), its sums and their inverses are in fp32's range: there is no maximum to follow, and one
exponential a pair serves both directions: exp(z - a) + exp(z - b) = exp(z) (exp(-a) + exp(-b)). Above, two, with true
maxima. A Hopper multiprocessor takes as long for one exponential as for a dot product of 128 numbers.

Bytes: the inputs over and over from the L2 cache, and 4 for every 128 logits (64 in fp32) to memory and back. FLOPs:
forward 2 I J D, backward 8 I J D where 6 would do, as each side multiplies the logits for itself: what a tile adds to
the other side's gradient would be 64 KB to read, add to and write, longer than multiplying again. Where rows are wider
than a program's columns of the gradient (128; 64 in fp32), each such chunk multiplies the logits for itself too.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from torch.library import custom_op
from torch.nn.functional import cross_entropy, logsigmoid
from torch.utils.flop_counter import register_flop_formula
from triton import cdiv, jit, next_power_of_2

from .launch import launch, multiplied_in
from .onednn import matmul, over_rows
from .traffic import nbytes, register_byte_formula

_SHORTEST = 1e-12  # a shorter row counts as zero, which has no direction: cosine 0, gradient 0
_ONE_EXP_UP_TO = tl.constexpr(70.0)
_LOG2_E = tl.constexpr(math.log2(math.e))
_LIFT = tl.constexpr(8192.0)  # G is at most 1: lifts what is small in it over the subnormals of fp16
_PROGRAMS = 264  # two for each multiprocessor of an H200: fewer, and the streamed side is split
_BLOCK_LOGITS, _BLOCK_ROWS = 1 << 18, 192  # that the reference holds at least: 1 MB, within a CPU core's cache


def check(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None, offset: int) -> None:
    if image.ndim != 2 or text.ndim != 2 or image.shape[1] != text.shape[1] or not image.shape[1]:
        raise ValueError(
            f"image and text are {list(image.shape)} and {list(text.shape)}: expected [I, D] and [J, D], D > 0."
        )
    if image.dtype != text.dtype or not image.is_floating_point():
        raise ValueError(f"image and text are {image.dtype} and {text.dtype}: expected one floating dtype.")
    for name, x in (("scale", scale), ("bias", bias)):
        if x is not None and (x.ndim or not x.is_floating_point()):
            raise ValueError(f"{name} is {x.dtype} {list(x.shape)}: expected a floating scalar [].")
    if len({x.device for x in (image, text, scale, bias) if x is not None}) > 1:
        raise ValueError("image, text, scale and bias are on different devices: expected one.")
    spare = text.shape[0] - image.shape[0]
    if not min(0, spare) <= offset <= max(0, spare):
        raise ValueError(
            f"offset is {offset} with {image.shape[0]} images and {text.shape[0]} texts: every row of the shorter "
            f"side must have its match, so expected {min(0, spare)} to {max(0, spare)}."
        )


# Reference -----------------------------------------------------------------------------------------------------------


def symmetric_cross_entropy(logits: Tensor) -> Tensor:
    """Mean of the cross-entropies over rows and over columns of logits [B, B] whose diagonal is right."""
    target = torch.arange(len(logits), device=logits.device)
    return (cross_entropy(logits, target) + cross_entropy(logits.mT, target)) / 2


def _matches(images: int, texts: int, offset: int) -> tuple[slice, slice]:
    """The images and the texts that have a match, in order."""
    count = min(images, texts)
    return slice(max(0, -offset), max(0, -offset) + count), slice(max(0, offset), max(0, offset) + count)


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _unit(x: Tensor) -> Tensor:
    x = x.to(_sum_dtype(x))
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / length.masked_fill(length <= _SHORTEST, torch.inf)


def _logits(x: Tensor, y: Tensor, bias: Tensor | None, diagonal: int) -> Tensor:
    """z = x y^T, or -y z of the sigmoid loss; matches are on this diagonal."""
    z = x @ y.mT if torch.is_grad_enabled() else matmul(x, y.mT)
    if bias is None:
        return z
    z += bias
    z.diagonal(diagonal).neg_()
    return z


def _weighted(lse: Tensor, matched: slice, weight: float) -> Tensor:
    """lse - log2(weight) where there is a match, elsewhere infinity: exp2(z - this) is the softmax with its weight."""
    out = torch.full_like(lse, torch.inf)
    out[matched] = lse[matched] - math.log2(weight)
    return out


def _one_exponential(z: Tensor, scale: Tensor) -> bool:
    """Whether exp(z), its sums and their inverses are in range. Only a CPU's scale is looked at, it is there already;
    a graph that is captured knows none."""
    known = type(z) is Tensor and z.device.type == "cpu" and not torch.compiler.is_compiling()
    return known and abs(float(scale.detach())) <= _ONE_EXP_UP_TO.value


def _log2_sum(z: Tensor, dim: int) -> Tensor:
    """log2 of the sum of exp2(z)."""
    top = z.amax(dim, keepdim=True)
    return (z - top).exp2_().sum(dim).log2_().add_(top.squeeze(dim))


def _block_rows(y: Tensor) -> int:
    """Fewer rows than these, or than y is wide, would cost more to add to its gradient than to multiply."""
    return max(_BLOCK_LOGITS // max(1, len(y)), y.shape[1], _BLOCK_ROWS)


class _InfoNCE(Function):
    """InfoNCE of z = x y^T / log2(e) by blocks of rows, multiplied again in the backward pass.

    The logits are in units of log 2: exp2 takes a third of exp's time on a CPU.
    """

    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor, offset: int, symmetric: bool, size: int, one_exponential: bool) -> Tensor:
        row_parts, column_lse, match = [], None, x.new_zeros(())
        for start, block in zip(range(0, len(x), size), x.split(size), strict=True):
            z = _logits(block, y, None, offset + start)
            match += z.diagonal(offset + start).sum()
            if one_exponential:
                z.exp2_()
            row_parts.append(z.sum(1).log2_() if one_exponential else _log2_sum(z, 1))
            if symmetric:
                below = (z.mT @ z.new_ones(len(z))).log2_() if one_exponential else _log2_sum(z, 0)
                column_lse = below if column_lse is None else torch.logaddexp2(column_lse, below)
        rows, columns = _matches(len(x), len(y), offset)
        weight = 0.5 if symmetric else 1.0
        row_lse = torch.cat(row_parts)
        total = weight * row_lse[rows].sum() - match
        if symmetric:
            total += weight * column_lse[columns].sum()
            column_lse = _weighted(column_lse, columns, weight)
        ctx.save_for_backward(x, y, _weighted(row_lse, rows, weight), column_lse)
        ctx.offset, ctx.size, ctx.one_exponential = offset, size, one_exponential
        return total / (_LOG2_E.value * min(len(x), len(y)))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, y, row_lse, column_lse = ctx.saved_tensors

        def slope(z: Tensor, start: int) -> Tensor:
            row = row_lse[start : start + len(z), None]
            if ctx.one_exponential:
                factor = row.neg().exp2_()
                g = z.exp2_().mul_(factor if column_lse is None else factor + column_lse.neg().exp2_())
            else:
                g = (z - row).exp2_()
                if column_lse is not None:
                    g += (z - column_lse).exp2_()
            g.diagonal(ctx.offset + start).sub_(1)
            return g

        dx, dy, _ = _multiply_back(ctx, x, y, None, grad / (_LOG2_E.value * min(len(x), len(y))), slope)
        return dx, dy, None, None, None, None


class _Sigmoid(Function):
    """The sigmoid loss of z = x y^T + bias by blocks of rows, multiplied again in the backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor, bias: Tensor, offset: int, size: int) -> Tensor:
        total = x.new_zeros(())
        for start, block in zip(range(0, len(x), size), x.split(size), strict=True):
            total -= logsigmoid(-_logits(block, y, bias, offset + start)).sum()
        ctx.save_for_backward(x, y, bias)
        ctx.offset, ctx.size = offset, size
        return total / len(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, y, bias = ctx.saved_tensors

        def slope(z: Tensor, start: int) -> Tensor:
            g = z.sigmoid()
            g.diagonal(ctx.offset + start).neg_()
            return g

        return *_multiply_back(ctx, x, y, bias, grad / len(x), slope), None, None


def _multiply_back(
    ctx, x: Tensor, y: Tensor, bias: Tensor | None, grad: Tensor, slope: Callable[[Tensor, int], Tensor]
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Gradients for x, y and bias from G = slope(z of a block, its first row), times grad."""
    dx, dy, dbias = [], torch.zeros_like(y) if ctx.needs_input_grad[1] else None, torch.zeros_like(grad)
    for start, block in zip(range(0, len(x), ctx.size), x.split(ctx.size), strict=True):
        g = slope(_logits(block, y, bias, ctx.offset + start), start)
        if ctx.needs_input_grad[0]:
            dx.append(matmul(g, y))
        if dy is not None:
            dy += over_rows(g, block)
        if bias is not None:
            dbias += g.sum()
    return grad * torch.cat(dx) if dx else None, None if dy is None else grad * dy, grad * dbias


def reference(image: Tensor, text: Tensor, scale: Tensor, offset: int = 0, symmetric: bool = True) -> Tensor:
    x, y = _unit(image), _unit(text)
    x = scale.to(x.dtype) * x
    if len(x) > _block_rows(y):
        one_exponential = _one_exponential(x, scale)
        return _InfoNCE.apply(_LOG2_E.value * x, y, offset, symmetric, _block_rows(y), one_exponential)
    z = _logits(x, y, None, offset)
    rows, columns = _matches(len(x), len(y), offset)
    to_text = cross_entropy(z[rows], torch.arange(columns.start, columns.stop, device=z.device))
    if not symmetric:
        return to_text
    return (to_text + cross_entropy(z.mT[columns], torch.arange(rows.start, rows.stop, device=z.device))) / 2


def reference_sigmoid(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, offset: int = 0) -> Tensor:
    x, y = _unit(image), _unit(text)
    x, bias = scale.to(x.dtype) * x, bias.to(x.dtype)
    if len(x) > _block_rows(y):
        return _Sigmoid.apply(x, y, bias, offset, _block_rows(y))
    return -logsigmoid(-_logits(x, y, bias, offset)).sum() / len(x)


# Kernels -------------------------------------------------------------------------------------------------------------


@jit
def _tile(x, first, count, column, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile of x [count, WIDTH], zero outside it."""
    rows, columns = tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    inside = (first + rows < count)[:, None] & (columns < WIDTH)[None, :]
    start = x + tl.cast(first, tl.int64) * WIDTH
    return tl.load(start + rows[:, None] * WIDTH + columns[None, :], mask=inside, other=0)


@jit
def _rows_kernel(
    image, text, image_inverse, text_inverse, match,
    images, texts, offset, WIDTH: tl.constexpr, SHORTEST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """1/|row| of both sides, and the cosine of each image and its match."""
    first = tl.program_id(0) * ROWS
    rows = first + tl.arange(0, ROWS)
    x = _tile(image, first, images, 0, WIDTH, ROWS, COLUMNS).to(match.dtype.element_ty)
    y = _tile(text, first, texts, 0, WIDTH, ROWS, COLUMNS).to(match.dtype.element_ty)
    x_length, y_length = tl.sqrt(tl.sum(x * x, 1)), tl.sqrt(tl.sum(y * y, 1))
    x_inverse = tl.where(x_length > SHORTEST, 1 / x_length, 0.0)
    y_inverse = tl.where(y_length > SHORTEST, 1 / y_length, 0.0)
    tl.store(image_inverse + rows, x_inverse, mask=rows < images)
    tl.store(text_inverse + rows, y_inverse, mask=rows < texts)
    # Negative rows of the text are no match: image `rows` has one where its text exists.
    others = rows + offset
    paired = (rows < images) & (others >= 0) & (others < texts)
    columns = tl.arange(0, COLUMNS)
    at = tl.cast(others, tl.int64)[:, None] * WIDTH + columns[None, :]
    y = tl.load(text + at, mask=paired[:, None] & (columns < WIDTH)[None, :], other=0).to(match.dtype.element_ty)
    y_length = tl.sqrt(tl.sum(y * y, 1))
    cosine = tl.sum(x * y, 1) * x_inverse * tl.where(y_length > SHORTEST, 1 / y_length, 0.0)
    tl.store(match + rows, cosine, mask=rows < images)


@jit
def _sums_kernel(
    held, streamed, held_inverse, streamed_inverse, scale, bias, held_sums, streamed_sums,
    held_rows, streamed_rows, offset, steps,
    WIDTH: tl.constexpr, SIGMOID: tl.constexpr, BOTH: tl.constexpr, MULTIPLIED_IN: tl.constexpr,
    HELD: tl.constexpr, STREAMED: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Sums over a split of the streamed rows, for a block of held rows; with BOTH, sums over the block too.

    InfoNCE: log2 of the sum of exp(z), [splits, held] and [blocks, streamed]. Sigmoid: the sum of the losses,
    [splits, held].
    """
    SUMMED_IN: tl.constexpr = held_sums.dtype.element_ty
    block, split = tl.program_id(0), tl.program_id(1)
    first = block * HELD
    rows = first + tl.arange(0, HELD)
    scaled = tl.load(scale).to(SUMMED_IN) * _LOG2_E
    one_exp = tl.abs(scaled) <= _ONE_EXP_UP_TO * _LOG2_E
    held_factor = tl.load(held_inverse + rows, mask=rows < held_rows, other=0) * scaled
    top = tl.zeros((HELD,), SUMMED_IN)
    if not (SIGMOID or one_exp):
        top -= float("inf")
    total = tl.zeros((STREAMED, HELD), SUMMED_IN)
    if WIDTH <= CHUNK:
        kept = _tile(held, first, held_rows, 0, WIDTH, HELD, CHUNK).to(MULTIPLIED_IN)
    for step in range(split * steps, tl.minimum(split * steps + steps, tl.cdiv(streamed_rows, STREAMED))):
        start = step * STREAMED
        others = start + tl.arange(0, STREAMED)
        if WIDTH <= CHUNK:
            tile = _tile(streamed, start, streamed_rows, 0, WIDTH, STREAMED, CHUNK).to(MULTIPLIED_IN)
            z = tl.dot(tile, tl.trans(kept), input_precision="tf32x3", out_dtype=SUMMED_IN)
        else:
            z = tl.zeros((STREAMED, HELD), SUMMED_IN)
            for column in range(0, WIDTH, CHUNK):
                tile = _tile(streamed, start, streamed_rows, column, WIDTH, STREAMED, CHUNK).to(MULTIPLIED_IN)
                piece = _tile(held, first, held_rows, column, WIDTH, HELD, CHUNK).to(MULTIPLIED_IN)
                z = tl.dot(tile, tl.trans(piece), z, input_precision="tf32x3", out_dtype=SUMMED_IN)
        there = others < streamed_rows
        factor = tl.load(streamed_inverse + others, mask=there, other=0)
        z = z * factor[:, None] * held_factor[None, :]
        live = there.to(SUMMED_IN)[:, None]
        if SIGMOID:
            z += tl.load(bias).to(SUMMED_IN) * _LOG2_E
            if (start < first + offset + HELD) & (start + STREAMED > first + offset):
                z = tl.where(others[:, None] == (rows + offset)[None, :], -z, z)
            total += _softplus(z) * live
        elif one_exp:
            e = tl.exp2(z)
            total += e * live
            if BOTH:
                if first + HELD > held_rows:
                    e = tl.where((rows < held_rows)[None, :], e, 0.0)
                out = streamed_sums + tl.cast(block, tl.int64) * streamed_rows + others
                tl.store(out, tl.log2(tl.sum(e, 1)), mask=there)
        else:
            z = tl.where(there[:, None], z, -float("inf"))
            higher = tl.maximum(top, tl.max(z, 0))
            total = total * tl.exp2(top - higher)[None, :] + tl.exp2(z - higher[None, :])
            top = higher
            if BOTH:
                z = tl.where((rows < held_rows)[None, :], z, -float("inf"))
                highest = tl.max(z, 1)
                sums = highest + tl.log2(tl.sum(tl.exp2(z - highest[:, None]), 1))
                out = streamed_sums + tl.cast(block, tl.int64) * streamed_rows + others
                tl.store(out, sums, mask=there)
    sums = tl.sum(total, 0)
    if not SIGMOID:
        sums = top + tl.log2(sums)
    tl.store(held_sums + tl.cast(split, tl.int64) * held_rows + rows, sums, mask=rows < held_rows)


@jit
def _softplus(z):
    """log2(1 + 2^z)."""
    small = tl.exp2(-tl.abs(z))
    log = tl.log2(1 + small)
    if z.dtype == tl.float32:  # 1 + small has lost what is small: a series, right to 2e-7
        series = small * (1 - small * (1 / 2 - small * (1 / 3 - small / 4))) * _LOG2_E
        log = tl.where(small < 0.03, series, log)
    return tl.maximum(z, 0) + log


@jit
def _merge_kernel(
    parts, merged, count, parts_count, first_match, matches, LOG2_WEIGHT: tl.constexpr,
    PARTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """log2 of the sum of 2^part, less log2 of the weight; infinity for a row without a match, whose weight is 0."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    top = tl.full((ROWS,), -float("inf"), parts.dtype.element_ty)
    total = tl.zeros((ROWS,), parts.dtype.element_ty)
    for start in range(0, parts_count, PARTS):
        which = start + tl.arange(0, PARTS)
        at = tl.cast(which, tl.int64)[:, None] * count + rows[None, :]
        inside = (which < parts_count)[:, None] & (rows < count)[None, :]
        part = tl.load(parts + at, mask=inside, other=-float("inf"))
        higher = tl.maximum(top, tl.max(part, 0))
        total = total * tl.exp2(top - higher) + tl.sum(tl.exp2(part - higher[None, :]), 0)
        top = higher
    matched = (rows >= first_match) & (rows < first_match + matches)
    out = tl.where(matched, top + tl.log2(total) - LOG2_WEIGHT, float("inf"))
    tl.store(merged + rows, out, mask=rows < count)


@jit
def _products_kernel(
    held, streamed, held_inverse, streamed_inverse, streamed_longest, held_lse, streamed_lse, scale, bias,
    products, sums, held_rows, streamed_rows, offset, steps,
    WIDTH: tl.constexpr, SIGMOID: tl.constexpr, MULTIPLIED_IN: tl.constexpr,
    HELD: tl.constexpr, STREAMED: tl.constexpr, CHUNK: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """G times the normalised streamed rows, [splits, held, WIDTH], for a block of held rows and OUT columns.

    Rows are raw, so 1/|row| goes into G before it is rounded: relative to the largest, and lifted. For the sigmoid
    loss also the sum of G, [splits, held].
    """
    SUMMED_IN: tl.constexpr = products.dtype.element_ty
    block, split, column = tl.program_id(0), tl.program_id(1), tl.program_id(2) * OUT
    first = block * HELD
    rows = first + tl.arange(0, HELD)
    live = rows < held_rows
    scaled = tl.load(scale).to(SUMMED_IN) * _LOG2_E
    one_exp = tl.abs(scaled) <= _ONE_EXP_UP_TO * _LOG2_E
    held_factor = tl.load(held_inverse + rows, mask=live, other=0) * scaled
    longest = tl.load(streamed_longest)
    lift = tl.where(longest > 0, _LIFT / longest, 0.0)
    if SIGMOID:
        total = tl.zeros((HELD,), SUMMED_IN)
    else:
        lse = tl.load(held_lse + rows, mask=live, other=float("inf"))
        softmax = tl.exp2(-lse)
    product = tl.zeros((HELD, OUT), SUMMED_IN)
    if WIDTH <= CHUNK:
        kept = _tile(held, first, held_rows, 0, WIDTH, HELD, CHUNK).to(MULTIPLIED_IN)
    for step in range(split * steps, tl.minimum(split * steps + steps, tl.cdiv(streamed_rows, STREAMED))):
        start = step * STREAMED
        others = start + tl.arange(0, STREAMED)
        there = others < streamed_rows
        if WIDTH <= CHUNK:
            tile = _tile(streamed, start, streamed_rows, 0, WIDTH, STREAMED, CHUNK).to(MULTIPLIED_IN)
            z = tl.dot(kept, tl.trans(tile), input_precision="tf32x3", out_dtype=SUMMED_IN)
        else:
            z = tl.zeros((HELD, STREAMED), SUMMED_IN)
            for k in range(0, WIDTH, CHUNK):
                piece = _tile(held, first, held_rows, k, WIDTH, HELD, CHUNK).to(MULTIPLIED_IN)
                tile = _tile(streamed, start, streamed_rows, k, WIDTH, STREAMED, CHUNK).to(MULTIPLIED_IN)
                z = tl.dot(piece, tl.trans(tile), z, input_precision="tf32x3", out_dtype=SUMMED_IN)
            tile = _tile(streamed, start, streamed_rows, column, WIDTH, STREAMED, OUT).to(MULTIPLIED_IN)
        factor = tl.load(streamed_inverse + others, mask=there, other=0)
        z = z * held_factor[:, None] * factor[None, :]
        if SIGMOID:
            z += tl.load(bias).to(SUMMED_IN) * _LOG2_E
            g = 1 / (1 + tl.exp2(-z))
        else:
            other_lse = tl.load(streamed_lse + others, mask=there, other=float("inf"))
            if one_exp:
                g = tl.exp2(z) * (softmax[:, None] + tl.exp2(-other_lse)[None, :])
            else:
                z = tl.where(there[None, :], z, -float("inf"))
                g = tl.exp2(z - lse[:, None]) + tl.exp2(z - other_lse[None, :])
        if (start < first + offset + HELD) & (start + STREAMED > first + offset):
            less = -1 / (1 + tl.exp2(z)) if SIGMOID else g - 1  # the same, of a sigmoid without cancelling
            g = tl.where((rows + offset)[:, None] == others[None, :], less, g)
        if SIGMOID:
            total += tl.sum(tl.where(there[None, :], g, 0.0), 1)
        g = (g * (factor * lift)[None, :]).to(MULTIPLIED_IN)
        product = tl.dot(g, tile, product, input_precision="tf32x3", out_dtype=SUMMED_IN)
    at = tl.cast(split, tl.int64) * held_rows + rows
    columns = column + tl.arange(0, OUT)
    tl.store(
        products + at[:, None] * WIDTH + columns[None, :],
        product,
        mask=live[:, None] & (columns < WIDTH)[None, :],
    )
    if SIGMOID and column == 0:
        tl.store(sums + at, total, mask=live)


@jit
def _gradient_kernel(
    products, x, inverse, other_longest, scale, grad, gradient, along, rows_count, splits, count,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The gradient for rows x from that for their normalised forms, and that for the scale of each row."""
    SUMMED_IN: tl.constexpr = products.dtype.element_ty
    first = tl.program_id(0) * ROWS
    rows = first + tl.arange(0, ROWS)
    total = tl.zeros((ROWS, COLUMNS), SUMMED_IN)
    for split in range(splits):
        part = products + tl.cast(split, tl.int64) * rows_count * WIDTH
        total += _tile(part, first, rows_count, 0, WIDTH, ROWS, COLUMNS)
    total *= tl.load(grad).to(SUMMED_IN) * tl.load(other_longest) / (_LIFT * count)
    shrink = tl.load(inverse + rows, mask=rows < rows_count, other=0)
    unit = _tile(x, first, rows_count, 0, WIDTH, ROWS, COLUMNS).to(SUMMED_IN) * shrink[:, None]
    dot = tl.sum(total * unit, 1)
    out = (total - dot[:, None] * unit) * (shrink * tl.load(scale).to(SUMMED_IN))[:, None]
    columns = tl.arange(0, COLUMNS)
    at = tl.cast(rows, tl.int64)[:, None] * WIDTH + columns[None, :]
    inside = (rows < rows_count)[:, None] & (columns < WIDTH)[None, :]
    tl.store(gradient + at, out.to(gradient.dtype.element_ty), mask=inside)
    tl.store(along + rows, dot, mask=rows < rows_count)


# Launchers -----------------------------------------------------------------------------------------------------------


class _Config(NamedTuple):
    """Rows held and streamed by a program, columns multiplied and returned at a time, and how it is compiled."""

    held: int
    streamed: int
    chunk: int
    out: int
    num_warps: int
    num_stages: int


def _config(dtype: torch.dtype, width: int, backward: bool) -> _Config:
    whole = max(16, next_power_of_2(width))  # a product needs 16
    if dtype.itemsize > 2:  # three products of tf32 stand for one: registers for the parts of both operands
        return _Config(64, 32, 16, min(whole, 64), 4, 2) if backward else _Config(64, 64, 16, 16, 4, 2)
    if width <= 128:
        return _Config(64, 64, whole, whole, 4, 3) if backward else _Config(128, 64, whole, whole, 8, 3)
    return _Config(128, 64, 64, 128, 8, 3) if backward else _Config(128, 64, 64, 64, 8, 3)


def _split(programs: int, tiles: int) -> tuple[int, int]:
    """How many tiles a program streams, and how many programs share the streamed side so that the device is full."""
    steps = cdiv(tiles, max(1, _PROGRAMS // programs))
    return steps, cdiv(tiles, steps)


def _row_tile(width: int) -> dict[str, int]:
    columns = next_power_of_2(width)
    return {"ROWS": max(1, 1024 // columns), "COLUMNS": columns, "num_warps": 4 if columns <= 2048 else 16}


def _merged(parts: Tensor, matched: slice, weight: float) -> Tensor:
    count = parts.shape[1]
    merged = parts.new_empty(count)
    matches = matched.stop - matched.start
    launch(
        _merge_kernel, (cdiv(count, 64),), parts, merged, count, len(parts), matched.start, matches,
        LOG2_WEIGHT=math.log2(weight), PARTS=32, ROWS=64, num_warps=4,
    )  # fmt: skip
    return merged


@custom_op("clinvla_fast::contrastive", mutates_args=())
def _forward(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None, offset: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss, 1/|row| of images and of texts, and, of InfoNCE, their weighted log-sum-exps."""
    images, texts, width = len(image), len(text), image.shape[1]
    dtype = _sum_dtype(image)
    image, text = image.contiguous(), text.contiguous()
    image_inverse, match = (torch.empty(images, dtype=dtype, device=image.device) for _ in range(2))
    text_inverse = torch.empty(texts, dtype=dtype, device=image.device)
    tile = _row_tile(width)
    launch(
        _rows_kernel, (cdiv(max(images, texts), tile["ROWS"]),), image, text, image_inverse, text_inverse, match,
        images, texts, offset, WIDTH=width, SHORTEST=_SHORTEST, **tile,
    )  # fmt: skip
    sigmoid = bias is not None
    config = _config(image.dtype, width, backward=False)
    blocks = cdiv(images, config.held)
    steps, splits = _split(max(1, blocks), max(1, cdiv(texts, config.streamed)))
    image_parts = torch.empty(splits, images, dtype=dtype, device=image.device)
    text_parts = torch.empty(blocks if symmetric else 0, texts, dtype=dtype, device=image.device)
    launch(
        _sums_kernel, (blocks, splits), image, text, image_inverse, text_inverse, scale, bias if sigmoid else scale,
        image_parts, text_parts, images, texts, offset, steps,
        WIDTH=width, SIGMOID=sigmoid, BOTH=symmetric, MULTIPLIED_IN=multiplied_in(image.dtype),
        HELD=config.held, STREAMED=config.streamed, CHUNK=config.chunk,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    if sigmoid:
        nothing = image_parts.new_empty(0)
        loss = image_parts.sum() * (math.log(2) / images) if images else image_parts.sum() * torch.nan
        return loss, image_inverse, text_inverse, nothing, nothing.clone()
    matched_images, matched_texts = _matches(images, texts, offset)
    weight = 0.5 if symmetric else 1.0
    image_lse = _merged(image_parts, matched_images, weight)
    lse = image_lse[matched_images]
    if symmetric:
        text_lse = _merged(text_parts, matched_texts, weight)
        lse = (lse + text_lse[matched_texts]) / 2
    else:
        text_lse = torch.full_like(text_inverse, torch.inf)
    loss = (lse + math.log2(weight)).mean() * math.log(2) - scale.to(dtype) * match[matched_images].mean()
    return loss, image_inverse, text_inverse, image_lse, text_lse


@_forward.register_fake
def _(image, text, scale, bias, offset, symmetric):
    def empty(*shape: int) -> Tensor:
        return image.new_empty(shape, dtype=_sum_dtype(image))

    images, texts = image.shape[0], text.shape[0]
    lse = (empty(images), empty(texts)) if bias is None else (empty(0), empty(0))
    return empty(), empty(images), empty(texts), *lse


@custom_op("clinvla_fast::contrastive_backward", mutates_args=())
def _backward(
    grad: Tensor, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None,
    image_inverse: Tensor, text_inverse: Tensor, image_lse: Tensor, text_lse: Tensor,
    offset: int, for_image: bool, for_text: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients for image, text, scale and bias; at least one side is asked for, what is not comes out empty."""
    sides = (
        (image.contiguous(), image_inverse, image_lse, offset, for_image),
        (text.contiguous(), text_inverse, text_lse, -offset, for_text),
    )
    count = len(image) if bias is not None else min(len(image), len(text))
    gradients = [image.new_empty(0), text.new_empty(0)]
    scale_grad = bias_grad = image_inverse.new_zeros(())
    for i, (held, other) in enumerate((sides, sides[::-1])):
        if held[-1]:
            gradients[i], along, sums = _gradient(*held[:-1], *other[:3], scale, bias, grad, count)
            scale_grad = along.sum()
            bias_grad = sums.sum() * grad / max(1, count) if bias is not None else bias_grad
    bias_grad = image.new_empty(0) if bias is None else bias_grad.to(bias.dtype)
    return *gradients, scale_grad.to(scale.dtype), bias_grad


def _gradient(
    x: Tensor, x_inverse: Tensor, x_lse: Tensor, offset: int, y: Tensor, y_inverse: Tensor, y_lse: Tensor,
    scale: Tensor, bias: Tensor | None, grad: Tensor, count: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradient for x, each row's for the scale, and each row's sum of G for the bias; y is streamed."""
    if not (len(x) and len(y)):
        return torch.zeros_like(x), torch.zeros_like(x_inverse), torch.zeros_like(x_inverse)
    width = x.shape[1]
    config = _config(x.dtype, width, backward=True)
    blocks, chunks = cdiv(len(x), config.held), cdiv(width, config.out)
    steps, splits = _split(blocks * chunks, cdiv(len(y), config.streamed))
    products = x_inverse.new_empty(splits, len(x), width)
    sums = x_inverse.new_empty(splits if bias is not None else 0, len(x))
    longest = y_inverse.max()
    launch(
        _products_kernel, (blocks, splits, chunks), x, y, x_inverse, y_inverse, longest, x_lse, y_lse,
        scale, scale if bias is None else bias, products, sums, len(x), len(y), offset, steps,
        WIDTH=width, SIGMOID=bias is not None, MULTIPLIED_IN=multiplied_in(x.dtype),
        HELD=config.held, STREAMED=config.streamed, CHUNK=config.chunk, OUT=config.out,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    gradient, along = torch.empty_like(x), torch.empty_like(x_inverse)
    tile = _row_tile(width)
    launch(
        _gradient_kernel, (cdiv(len(x), tile["ROWS"]),), products, x, x_inverse, longest, scale, grad,
        gradient, along, len(x), splits, count, WIDTH=width, **tile,
    )  # fmt: skip
    return gradient, along, sums


@_backward.register_fake
def _(
    grad, image, text, scale, bias, image_inverse, text_inverse, image_lse, text_lse, offset, for_image, for_text
):  # fmt: skip
    return (
        torch.empty_like(image, memory_format=torch.contiguous_format) if for_image else image.new_empty(0),
        torch.empty_like(text, memory_format=torch.contiguous_format) if for_text else text.new_empty(0),
        scale.new_empty(()),
        image.new_empty(0) if bias is None else bias.new_empty(()),
    )


def _setup_context(ctx, inputs, output):
    image, text, scale, bias, ctx.offset, _ = inputs
    ctx.save_for_backward(image, text, scale, bias, *output[1:])
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad, *_):
    if grad is None:
        return (None,) * 6
    image, text, scale, bias, *saved = ctx.saved_tensors
    for_image, for_text, for_scale, for_bias = ctx.needs_input_grad[:4]
    # The gradients for the scalars come with either side's.
    gradients = torch.ops.clinvla_fast.contrastive_backward(
        grad, image, text, scale, bias, *saved, ctx.offset, for_image or not for_text, for_text
    )
    wanted = for_image, for_text, for_scale, for_bias
    return *(g if want else None for g, want in zip(gradients, wanted, strict=True)), None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def triton(image: Tensor, text: Tensor, scale: Tensor, offset: int = 0, symmetric: bool = True) -> Tensor:
    return torch.ops.clinvla_fast.contrastive(image, text, scale, None, offset, symmetric)[0]


def triton_sigmoid(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, offset: int = 0) -> Tensor:
    return torch.ops.clinvla_fast.contrastive(image, text, scale, bias, offset, False)[0]


@register_flop_formula(torch.ops.clinvla_fast.contrastive)
def _forward_flops(image, text, *_, **__) -> int:
    return 2 * image[0] * text[0] * image[1]


@register_flop_formula(torch.ops.clinvla_fast.contrastive_backward)
def _backward_flops(grad, image, text, *arguments, **_) -> int:
    """The logits again, and a product for each side."""
    return 2 * image[0] * text[0] * image[1] * (1 + sum(arguments[-2:]))


@register_byte_formula(torch.ops.clinvla_fast.contrastive)
def _forward_bytes(image, text, scale, bias, *_, out) -> int:
    return nbytes(image, text, scale, bias, out[0])


@register_byte_formula(torch.ops.clinvla_fast.contrastive_backward)
def _backward_bytes(grad, image, text, scale, bias, *_, out) -> int:
    return nbytes(grad, image, text, scale, bias, out)
