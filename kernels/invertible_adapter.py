"""Invertible adapter (ClinVLA, section 3.1.1 and Algorithm 1; the NICE coupling of MAD-X).

With e = [e1, e2] split in halves, and F, G bottlenecks of width H/2:

    forward   o1 = e1 + F(e2)    o2 = e2 + G(o1)
    inverse   e2 = o2 - G(o1)    e1 = o1 - F(e2)

Both are one coupling with a sign s, and so one kernel: a' = a + s P(b), b' = b + s Q(a'). Forward has a = e1, b = e2,
P = F, Q = G, s = 1; the inverse a = o2, b = o1, P = G, Q = F, s = -1. With bottlenecks U ReLU(D x) the gradients are

    h_q = ReLU(D_q a')      b = b' - s U_q h_q                h_p = ReLU(D_p b)       (recomputed from the output)
    d h_q = s (U_q^T d b') * [h_q > 0]                        d a = d a' + D_q^T d h_q
    d h_p = s (U_p^T d a) * [h_p > 0]                         d b = d b' + D_p^T d h_p

Kernels: a program holds a tile of rows and, in registers, one hidden layer of it; the weights stream past in chunks of
the width. What the next bottleneck reads (a'; in the backward pass b and d a) goes to memory and comes back from L2,
rounded as it is stored, so that the inverse sees the same. That is a tenth more to read than if it stayed; the
registers go into tall tiles instead, because every tile reads all the weights anew and L2 limits that first. The
backward pass keeps ReLU's mask the same way, in memory that a gradient takes later: no scratch where the weights are
frozen.

Of a row, forward moves 2 H values, its input and its output, and backward 3 H; they multiply it by 4 and 7 times
H/2 x inner weights. At H = 768 in bf16 that is 192 FLOPs a byte, the balance of an H200. For gradients of the weights,
slices of rows leave 4 inner + H/2 values a row in scratch memory, and four plain matrix products follow.

The input is recomputed to the bit where o2 (inverse: e1) has the exponent of what it came from, else to its rounding,
and then a ReLU may recompute to the other side of 0: seldom where an adapter adds a fraction of what is there.
"""

import math

import torch
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula
from triton import cdiv, constexpr_function, jit, next_power_of_2

from .bottleneck import Bottleneck, bottleneck
from .launch import INTERPRETED, launch, multiplied_in, summed_in
from .traffic import nbytes, register_byte_formula

_SLICE = 1 << 15
"""Rows whose hidden layers are in device memory at a time, while gradients of the weights are computed."""

_MANY_ROWS = 1 << 13
"""Rows from which the taller tiles fill a card."""

_INTERPRETED = tl.constexpr(INTERPRETED)


def check(x: Tensor, f: Bottleneck, g: Bottleneck) -> None:
    """Raise ValueError where shapes, types or devices do not fit together."""
    width = x.shape[-1] if x.dim() else 0
    if width == 0 or width % 2:
        raise ValueError(f"x is {tuple(x.shape)}: expected [..., H] with H even.")
    half = width // 2
    for name, p in (("f", f), ("g", g)):
        inner = p.down_weight.shape[0] if p.down_weight.dim() else 0
        for part, expected in zip(Bottleneck._fields, ((inner, half), (inner,), (half, inner), (half,)), strict=True):
            tensor = getattr(p, part)
            if tuple(tensor.shape) != expected or inner == 0:
                shapes = {"down_weight": f"[d, {half}]", "up_weight": f"[{half}, {inner}]"}.get(part, expected)
                raise ValueError(f"{name}.{part} is {tuple(tensor.shape)}: expected {shapes} for x {tuple(x.shape)}.")
            if tensor.dtype != x.dtype or tensor.device != x.device:
                raise ValueError(
                    f"{name}.{part} is {tensor.dtype} on {tensor.device}: expected {x.dtype} on {x.device}, as x."
                )
    if f.down_bias.shape != g.down_bias.shape:
        raise ValueError(f"f and g have inner widths {len(f.down_bias)} and {len(g.down_bias)}: expected the same.")


def reference(x: Tensor, f: Bottleneck, g: Bottleneck, inverse: bool = False) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    if inverse:
        second = second - bottleneck(first, g)
        first = first - bottleneck(second, f)
    else:
        first = first + bottleneck(second, f)
        second = second + bottleneck(first, g)
    return torch.cat([first, second], dim=-1)


# Triton. HALF is the width of a half, INNER that of a hidden layer. Chunks divide the first; pieces, a tuple of
# tensors, the second, so that 192 is 128 + 64 and not 256.


@constexpr_function
def _pieces(INNER, PIECE):
    return cdiv(INNER, PIECE)


@constexpr_function
def _piece(j, INNER, PIECE):
    """Columns of the j-th piece of a hidden layer: a power of two, as little over what is left as can be."""
    return min(PIECE, max(16, next_power_of_2(INNER - j * PIECE)))


@jit
def _inside(index, size: tl.constexpr, block: tl.constexpr):
    """Which indices exist; known when compiling, and so free, where blocks fill the size."""
    return (index < size) | (size % block == 0)


@jit
def _rounded(x, pointer):
    """x in the type that a pointer points to. The interpreter would cut bf16 off."""
    if _INTERPRETED and pointer.dtype.element_ty == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16
        x = bits.to(tl.float32, bitcast=True)
    return x.to(pointer.dtype.element_ty)


@jit
def _weight(
    weight, inner, half, DOWN: tl.constexpr, HALF: tl.constexpr, INNER: tl.constexpr, CHUNK: tl.constexpr,
    WIDTH: tl.constexpr, MULTIPLIED: tl.constexpr,
):  # fmt: skip
    """Entries (inner, half) of D [INNER, HALF], or of the transpose of U [HALF, INNER]."""
    address = inner * HALF + half if DOWN else half * INNER + inner
    inside = _inside(inner, INNER, WIDTH) & _inside(half, HALF, CHUNK)
    return tl.load(weight + address, mask=inside, other=0.0).to(MULTIPLIED)


@jit
def _to_inner(
    x, at, real, width, weight, bias, DOWN: tl.constexpr, HALF: tl.constexpr, INNER: tl.constexpr, BLOCK: tl.constexpr,
    CHUNK: tl.constexpr, PIECE: tl.constexpr, MULTIPLIED: tl.constexpr, SUMMED: tl.constexpr,
):  # fmt: skip
    """Rows x [BLOCK, HALF] in memory times D^T or U, plus bias: pieces of [BLOCK, INNER]."""
    sums = ()
    for j in tl.static_range(_pieces(INNER, PIECE)):
        zero = tl.zeros((BLOCK, _piece(j, INNER, PIECE)), SUMMED)
        if bias is not None:
            inner = j * PIECE + tl.arange(0, _piece(j, INNER, PIECE))
            zero += tl.load(bias + inner, mask=inner < INNER, other=0.0).to(SUMMED)[None, :]
        sums += (zero,)
    for start in tl.range(0, width, CHUNK, disable_licm=MULTIPLIED == SUMMED):
        half = start + tl.arange(0, CHUNK)
        chunk = tl.load(x + (at + half[None, :]), mask=real & _inside(half, HALF, CHUNK)[None, :], other=0.0)
        more = ()
        for j in tl.static_range(_pieces(INNER, PIECE)):
            inner = j * PIECE + tl.arange(0, _piece(j, INNER, PIECE))
            w = _weight(
                weight, inner[None, :], half[:, None], DOWN, HALF, INNER, CHUNK, _piece(j, INNER, PIECE), MULTIPLIED
            )
            more += (tl.dot(chunk.to(MULTIPLIED), w, sums[j], input_precision="tf32x3", out_dtype=SUMMED),)
        sums = more
    return sums


@jit
def _to_half(
    hidden, weight, bias, before, after, at, real, width, sums, sum_after, DOWN: tl.constexpr, SIGN: tl.constexpr,
    HALF: tl.constexpr, INNER: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, PIECE: tl.constexpr,
    MULTIPLIED: tl.constexpr, SUMMED: tl.constexpr,
):  # fmt: skip
    """after = before + SIGN (hidden times D or U^T, plus bias), rows [BLOCK, HALF] in memory.

    Unless it is None, `sums` [HALF] gets the sum over the rows, of `after` or of `before`.
    """
    half = tl.arange(0, CHUNK)
    chunk = tl.load(before + (at + half[None, :]), mask=real & (half < HALF)[None, :], other=0.0)
    for start in tl.range(0, width, CHUNK, disable_licm=MULTIPLIED == SUMMED):
        half = start + tl.arange(0, CHUNK)
        following = half + CHUNK  # is on its way while this chunk multiplies
        following = tl.load(before + (at + following[None, :]), mask=real & (following < HALF)[None, :], other=0.0)
        inside = _inside(half, HALF, CHUNK)
        total = tl.zeros((BLOCK, CHUNK), SUMMED)
        if bias is not None:
            total += tl.load(bias + half, mask=inside, other=0.0).to(SUMMED)[None, :]
        for j in tl.static_range(_pieces(INNER, PIECE)):
            inner = j * PIECE + tl.arange(0, _piece(j, INNER, PIECE))
            w = _weight(
                weight, inner[:, None], half[None, :], DOWN, HALF, INNER, CHUNK, _piece(j, INNER, PIECE), MULTIPLIED
            )
            total = tl.dot(hidden[j], w, total, input_precision="tf32x3", out_dtype=SUMMED)
        total = chunk.to(SUMMED) + SIGN * total
        tl.store(after + (at + half[None, :]), _rounded(total, after), mask=real & inside[None, :])
        if sums is not None:
            summed = tl.where(inside[None, :] & sum_after, total, chunk.to(SUMMED))
            tl.store(sums + half, tl.sum(summed, 0), mask=inside)
        chunk = following


@jit
def _relu(sums, MULTIPLIED: tl.constexpr):
    hidden = ()
    for j in tl.static_range(len(sums)):
        hidden += (tl.maximum(sums[j], 0.0, propagate_nan=tl.PropagateNan.ALL).to(MULTIPLIED),)
    return hidden


@jit
def _keep(hidden, out, at, real, INNER: tl.constexpr, PIECE: tl.constexpr):
    """Put a hidden layer in memory, where something may be that has been read before."""
    tl.debug_barrier()
    for j in tl.static_range(len(hidden)):
        inner = j * PIECE + tl.arange(0, _piece(j, INNER, PIECE))
        inside = real & (inner < INNER)[None, :]
        tl.store(out + (at + inner[None, :]), _rounded(hidden[j], out), mask=inside)
    tl.debug_barrier()


@jit
def _through_relu(
    sums, hidden, at, real, SIGN: tl.constexpr, INNER: tl.constexpr, PIECE: tl.constexpr, MULTIPLIED: tl.constexpr
):  # fmt: skip
    """The gradient by what went into the ReLU, of which `hidden` is the result, in memory.

    A product with the mask, because with a select ptxas makes every wgmma of the kernel wait for the one before.
    """
    gradient = ()
    for j in tl.static_range(len(sums)):
        inner = j * PIECE + tl.arange(0, _piece(j, INNER, PIECE))
        passed = tl.load(hidden + (at + inner[None, :]), mask=real & (inner < INNER)[None, :], other=0.0) > 0
        gradient += ((tl.where(passed, SIGN * 1.0, 0.0) * sums[j]).to(MULTIPLIED),)
    tl.debug_barrier()
    return gradient


@jit
def _sum_rows(hidden, sums, INNER: tl.constexpr, PIECE: tl.constexpr, SUMMED: tl.constexpr):
    for j in tl.static_range(len(hidden)):
        inner = j * PIECE + tl.arange(0, _piece(j, INNER, PIECE))
        tl.store(sums + inner, tl.sum(hidden[j].to(SUMMED), 0), mask=inner < INNER)


@jit
def _forward(
    a, b, new_a, new_b, p_down, p_down_bias, p_up, p_up_bias, q_down, q_down_bias, q_up, q_up_bias, rows, width,
    SIGN: tl.constexpr, HALF: tl.constexpr, INNER: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    PIECE: tl.constexpr, MULTIPLIED: tl.constexpr, SUMMED: tl.constexpr,
):  # fmt: skip
    """new_a = a + SIGN P(b), new_b = b + SIGN Q(new_a): halves of rows [rows, 2 HALF].

    `width` is HALF, not known when compiling: loops over it that are unrolled take more registers, as do loops out of
    which everything is moved that does not change: in the backward pass, and the two terms of an fp32 operand.
    """
    tl.assume(width > 0)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    row = tl.arange(0, BLOCK)[:, None]
    real = row < rows - first
    at = row * (2 * HALF)
    a += first * 2 * HALF
    b += first * 2 * HALF
    new_a += first * 2 * HALF
    new_b += first * 2 * HALF
    hidden = _to_inner(
        b, at, real, width, p_down, p_down_bias, True, HALF, INNER, BLOCK, CHUNK, PIECE, MULTIPLIED, SUMMED
    )
    hidden = _relu(hidden, MULTIPLIED)
    _to_half(
        hidden, p_up, p_up_bias, a, new_a, at, real, width, None, True, False, SIGN,
        HALF, INNER, BLOCK, CHUNK, PIECE, MULTIPLIED, SUMMED,
    )  # fmt: skip
    tl.debug_barrier()  # new_a is read by other threads than wrote it
    hidden = _to_inner(
        new_a, at, real, width, q_down, q_down_bias, True, HALF, INNER, BLOCK, CHUNK, PIECE, MULTIPLIED, SUMMED
    )
    hidden = _relu(hidden, MULTIPLIED)
    _to_half(
        hidden, q_up, q_up_bias, b, new_b, at, real, width, None, True, False, SIGN,
        HALF, INNER, BLOCK, CHUNK, PIECE, MULTIPLIED, SUMMED,
    )  # fmt: skip


@jit
def _backward(
    new_a, new_b, d_new_a, d_new_b, b, d_a, d_b, h_q, h_p, d_h_q, d_h_p, sums,
    p_down, p_down_bias, p_up, q_down, q_down_bias, q_up, q_up_bias, rows, width, stages,
    STRIDE_H: tl.constexpr, SIGN: tl.constexpr, HALF: tl.constexpr, INNER: tl.constexpr, BLOCK: tl.constexpr,
    CHUNK: tl.constexpr, PIECE: tl.constexpr, MULTIPLIED: tl.constexpr, SUMMED: tl.constexpr,
):  # fmt: skip
    """b, d_a and, unless it is None, d_b from the output's halves and their gradients: halves of rows [rows, 2 HALF].

    The hidden layers and their gradients are left in rows of STRIDE_H, where a stage may overwrite what it has read;
    and unless `sums` [tiles, 2, HALF + INNER] is None, the sums over each tile's rows of d_a, d_h_q; d_new_b, d_h_p.
    The stages, Q and P, are two, not known when compiling for the same reason as `width`.
    """
    tl.assume(width > 0)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    row = tl.arange(0, BLOCK)[:, None]
    real = row < rows - first
    at, at_h = row * (2 * HALF), row * STRIDE_H
    new_a += first * 2 * HALF
    new_b += first * 2 * HALF
    d_new_a += first * 2 * HALF
    d_new_b += first * 2 * HALF
    b += first * 2 * HALF
    d_a += first * 2 * HALF
    if d_b is not None:
        d_b += first * 2 * HALF
    if sums is not None:
        sums += tl.program_id(0).to(tl.int64) * (2 * (HALF + INNER))
    for stage in tl.range(0, stages, disable_licm=True):
        is_q = stage == 0
        if is_q:
            x, grad, before, after = new_a, d_new_b, d_new_a, d_a
            down, down_bias, up, h, d_h = q_down, q_down_bias, q_up, h_q, d_h_q
        else:
            x, grad, before, after = b, d_a, d_new_b, d_a if d_b is None else d_b
            down, down_bias, up, h, d_h = p_down, p_down_bias, p_up, h_p, d_h_p
        h += first * STRIDE_H
        d_h += first * STRIDE_H
        hidden = _to_inner(
            x, at, real, width, down, down_bias, True, HALF, INNER, BLOCK, CHUNK, PIECE, MULTIPLIED, SUMMED
        )
        hidden = _relu(hidden, MULTIPLIED)
        _keep(hidden, h, at_h, real, INNER, PIECE)
        if is_q:
            _to_half(
                hidden, q_up, q_up_bias, new_b, b, at, real, width, None, True, False, -SIGN,
                HALF, INNER, BLOCK, CHUNK, PIECE, MULTIPLIED, SUMMED,
            )  # fmt: skip
        gradient = _to_inner(
            grad, at, real, width, up, None, False, HALF, INNER, BLOCK, CHUNK, PIECE, MULTIPLIED, SUMMED
        )
        gradient = _through_relu(gradient, h, at_h, real, SIGN, INNER, PIECE, MULTIPLIED)
        _keep(gradient, d_h, at_h, real, INNER, PIECE)
        if sums is not None:
            _sum_rows(gradient, sums + HALF, INNER, PIECE, SUMMED)
        if is_q | (d_b is not None):
            _to_half(
                gradient, down, None, before, after, at, real, width, sums, is_q, True, 1,
                HALF, INNER, BLOCK, CHUNK, PIECE, MULTIPLIED, SUMMED,
            )  # fmt: skip
        if sums is not None:
            sums += HALF + INNER
        tl.debug_barrier()  # the next stage's x and gradient are read by other threads than wrote them


# By bytes of an element and major compute capability, forward and backward: how many entries of a hidden layer fit the
# registers of a program, columns of a chunk, columns of a piece, stages of the loops' pipelines. fp32 goes through tf32
# in three products, with both terms of each operand in registers.
_TILES = {
    (2, 8): ((16384, 32, 128, 3), (12288, 32, 64, 3)),
    (2, 9): ((32768, 64, 128, 3), (32768, 64, 128, 2)),
    (2, 10): ((32768, 64, 64, 4), (16384, 64, 64, 3)),
    (4, 8): ((4096, 16, 64, 2), (6144, 16, 64, 2)),
    (4, 9): ((16384, 16, 32, 2), (16384, 16, 32, 2)),
    (4, 10): ((16384, 16, 32, 2), (16384, 16, 32, 2)),
}


def _config(x: Tensor, inner: int, backward: bool) -> dict:
    """Tiles and warps for rows x: as many rows as fit, since each tile reads all the weights."""
    rows, half = x.shape[0], x.shape[1] // 2
    multiplied = multiplied_in(x.dtype)
    kind = (2, 9)
    if not INTERPRETED:
        major = torch.cuda.get_device_capability(x.device)[0]
        kind = min(4, x.element_size()), major if major in (9, 10) else 8
    entries, chunk, piece, stages = _TILES[kind][backward]
    block = next_power_of_2(entries // inner + 1) // 2
    return {
        "HALF": half,
        "INNER": inner,
        "BLOCK": min(max(block, 16), 128 if rows >= _MANY_ROWS else 64),
        "CHUNK": min(chunk, max(16, next_power_of_2(half))),
        "PIECE": piece,
        "MULTIPLIED": multiplied,
        "SUMMED": summed_in(x.dtype),
        "num_warps": 8,
        "num_stages": stages,
    }


def _coupling(halves: tuple[Tensor, Tensor], inverse: bool) -> tuple[Tensor, Tensor]:
    """Halves (or bottlenecks) in the coupling's order."""
    return halves[::-1] if inverse else halves


@torch.library.custom_op("clinvla_fast::invertible_adapter", mutates_args=())
def _op(x: Tensor, f: list[Tensor], g: list[Tensor], inverse: bool) -> Tensor:
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    out = torch.empty_like(rows)
    p, q = _coupling(([w.contiguous() for w in f], [w.contiguous() for w in g]), inverse)
    a, b = _coupling(rows.chunk(2, 1), inverse)
    new_a, new_b = _coupling(out.chunk(2, 1), inverse)
    config = _config(rows, len(p[1]), backward=False)
    grid = (cdiv(len(rows), config["BLOCK"]),)
    launch(_forward, grid, a, b, new_a, new_b, *p, *q, len(rows), a.shape[1], SIGN=-1 if inverse else 1, **config)
    return out.view(x.shape)


@_op.register_fake
def _(x, f, g, inverse):
    return x.new_empty(x.shape)


@torch.library.custom_op("clinvla_fast::invertible_adapter_backward", mutates_args=())
def _backward_op(
    grad: Tensor, out: Tensor, f: list[Tensor], g: list[Tensor], inverse: bool, for_x: bool, for_weights: bool
) -> list[Tensor]:
    """Gradients by x, f and g from the output; empty for x, or for all weights, where not wanted. One is wanted."""
    shape = out.shape
    out = out.reshape(-1, shape[-1]).contiguous()
    grad = grad.reshape(out.shape).contiguous()
    p, q = _coupling(([w.contiguous() for w in f], [w.contiguous() for w in g]), inverse)
    rows, half, inner = len(out), out.shape[1] // 2, len(p[1])
    sign = -1 if inverse else 1
    config = _config(out, inner, backward=True)
    summed = torch.promote_types(out.dtype, torch.float32)
    d_x = torch.empty_like(out) if for_x else out.new_empty(0)
    if for_weights:
        d_p, d_q = ([torch.zeros_like(w, dtype=summed) for w in weights] for weights in (p, q))
    scratch_needed = for_weights or inner > half
    size = max(1, min(rows, _SLICE) if scratch_needed else rows)
    for start in range(0, rows, size):
        part = slice(start, start + size)
        new_a, new_b = _coupling(out[part].chunk(2, 1), inverse)
        d_new_a, d_new_b = _coupling(grad[part].chunk(2, 1), inverse)
        count = len(new_a)
        grid = (cdiv(count, config["BLOCK"]),)
        sums = None
        if for_x:
            d_a, d_b = _coupling(d_x[part].chunk(2, 1), inverse)
            b, hidden = d_b, (d_a, d_b, d_a, d_b)  # each is read for the last time before its gradient comes there
        if for_weights:
            scratch = out.new_empty(count, 2 * half)
            b = scratch[:, :half]
            if not for_x:
                d_a, d_b = scratch[:, half:], None
            sums = out.new_empty(grid[0], 2, half + inner, dtype=summed)
        if scratch_needed:
            hidden = out.new_empty(4, count, inner).unbind()
        launch(
            _backward, grid, new_a, new_b, d_new_a, d_new_b, b, d_a, d_b, *hidden, sums, *p[:3], *q, count, half, 2,
            STRIDE_H=hidden[0].stride(0), SIGN=sign, **config,
        )  # fmt: skip
        if for_weights:
            h_q, h_p, d_h_q, d_h_p = hidden
            (sum_d_a, sum_d_h_q), (sum_d_new_b, sum_d_h_p) = (s.split([half, inner]) for s in sums.sum(0))
            if not for_x:
                sum_d_new_b = d_new_b.sum(0, dtype=summed)
            more_p = d_h_p.T @ b, sum_d_h_p, sign * (d_a.T @ h_p), sign * sum_d_a
            more_q = d_h_q.T @ new_a, sum_d_h_q, sign * (d_new_b.T @ h_q), sign * sum_d_new_b
            for total, more in zip((*d_p, *d_q), (*more_p, *more_q), strict=True):
                total += more
    d_x = d_x.view(shape if for_x else 0)
    if not for_weights:
        return [d_x, *(out.new_empty(0) for _ in range(8))]
    d_f, d_g = _coupling((d_p, d_q), inverse)
    return [d_x, *(w.to(out.dtype) for w in d_f + d_g)]


@_backward_op.register_fake
def _(grad, out, f, g, inverse, for_x, for_weights):
    weights = [w.new_empty(w.shape if for_weights else 0) for w in (*f, *g)]
    return [out.new_empty(out.shape if for_x else 0), *weights]


def _setup_context(ctx, inputs, output) -> None:
    _x, f, g, ctx.inverse = inputs
    ctx.save_for_backward(output, *f, *g)


def _gradient(ctx, grad):
    out, *weights = ctx.saved_tensors
    for_x, for_f, for_g, _inverse = ctx.needs_input_grad
    for_weights = any(for_f) or any(for_g)
    d_x, *d_weights = _backward_op(grad, out, weights[:4], weights[4:], ctx.inverse, for_x, for_weights)
    if not for_weights:
        d_weights = [None] * 8
    return d_x if for_x else None, d_weights[:4], d_weights[4:], None


_op.register_autograd(_gradient, setup_context=_setup_context)


def triton(x: Tensor, f: Bottleneck, g: Bottleneck, inverse: bool = False) -> Tensor:
    return _op(x, list(f), list(g), inverse)


def _products(rows_shape: tuple[int, ...], f_shapes: list[tuple[int, ...]]) -> int:
    """FLOPs of one product of all rows with one weight."""
    return 2 * math.prod(rows_shape[:-1]) * math.prod(f_shapes[0])


@register_flop_formula(torch.ops.clinvla_fast.invertible_adapter)
def _flops(x_shape, f_shapes, g_shapes, inverse, *args, out_shape=None, **kwargs) -> int:
    return 4 * _products(x_shape, f_shapes)


@register_flop_formula(torch.ops.clinvla_fast.invertible_adapter_backward)
def _backward_flops(
    grad_shape, out_of_forward_shape, f_shapes, g_shapes, inverse, for_x, for_weights, *args, out_shape=None, **kwargs
) -> int:
    """Three products recompute, four pass the gradient back (three if it stops at the weights), four are weights'."""
    return (6 + for_x + 4 * for_weights) * _products(grad_shape, f_shapes)


@register_byte_formula(torch.ops.clinvla_fast.invertible_adapter)
def _bytes(x, f, g, inverse, out) -> int:
    return nbytes(x, f, g, out)


@register_byte_formula(torch.ops.clinvla_fast.invertible_adapter_backward)
def _backward_bytes(grad, output, f, g, inverse, for_x, for_weights, out) -> int:
    p, _q = _coupling((f, g), inverse)
    return nbytes(grad, output, f, g, out) - nbytes(p[3])  # a bias that nothing depends on
