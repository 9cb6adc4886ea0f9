"""Transformer-Adapt (ClinVLA, section 3.2 and Figure 2c): the end of an adapted transformer block.

With r the output of the feed-forward network, x the residual stream that it is added to and, in a post-norm block,
N its LayerNorm (in a pre-norm block N is the identity):

    h   = N(r + x)
    LA  = s (U_l act(D_l h) + b_l) + r        language adapter
    TA  = s (U_t act(D_t LA) + b_t) + r       task adapter
    out = N(TA + x)

ClinVLA has act = ReLU and s = 1. Without a language adapter the task adapter reads h; without a task adapter TA is LA;
without both, out is h. An inner skip adds an adapter's input to its output, inside the brackets. A `source` takes the
place of h as the input of the first adapter. `after_norm` adds a single adapter to the normalised stream instead:
out = h + s (U act(D h) + b). With these, MAD-X's single adapter and the four adapters of ALTA are this operation
too (tests/kernels/test_transformer_adapt.py writes each of them out).

**Forward**, one kernel. A program has a block of rows and sweeps over the width in chunks: the statistics of r + x
(where there is a norm), both down-projections, the statistics of TA + x (norm), the output. Each sweep reads its
chunks of r and x again, from L2: device memory sees r, x and the source once, and the output. h, LA, TA and the hidden
layers stay on chip. LA itself never exists: the task adapter reads it through D_t alone, and

    D_t LA = s M act(D_l h) + D_t (s b_l + r)        with the small matrix M = D_t U_l,

so that both down-projections share one sweep, and a product of d x d takes the place of one of width x d. Sweeps: 2
pre-norm, 4 post-norm; products of width x d: 3 pre-norm, 4 post-norm (the formula has 4).

**Backward**, from the inputs and the row statistics. The first kernel has blocks of rows again: it recomputes the
hidden layers, takes the gradient back to them (through M transposed from the task to the language adapter) and writes
the gradients of r, x and source. For the weights it leaves the hidden layers h_l, h_t and the gradients e_l, e_t in
front of their activations, [rows, d]. Sweeps: 3 pre-norm, 5 post-norm. The second kernel has a chunk of the width and a
share of the rows; it multiplies those with the gradient of TA, with h and with r. What LA and its gradient would add is
again a product of small matrices:

    dD_t = sum e_t (r + s b_l)^T + s S U_l^T        dU_l = s D_t^T S        with S = sum e_t h_l^T,

where the third kernel sums S. Partial sums over the shares of the rows are in fp32 and added in a fixed order: the
results are the same bit for bit in every run.

Bottlenecks wider than 64, float32, and two adapters with inner skips need more registers than there are. There the
hidden layers of a block of rows go through scratch memory, [rows, d], in slices, and each slice has its own sweep.
"""

from math import prod
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, relu
from torch.utils.flop_counter import register_flop_formula
from triton import cdiv, jit, next_power_of_2

from .bottleneck import Bottleneck
from .launch import INTERPRETED, launch, multiplied_in, summed_in
from .onednn import linear
from .traffic import nbytes, register_byte_formula

ACTIVATIONS = {"relu": relu, "gelu": gelu}


def check(
    ffn: Tensor,
    residual: Tensor,
    language: Bottleneck | None,
    task: Bottleneck | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    activation: str,
    source: Tensor | None,
    after_norm: bool,
) -> None:
    """Raises ValueError where the arguments do not fit together."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}: expected one of {', '.join(ACTIVATIONS)}.")
    if after_norm and language is not None and task is not None:
        raise ValueError("after_norm adds one adapter to the normalised stream: language and task were both given.")
    if (norm_weight is None) != (norm_bias is None):
        raise ValueError("a LayerNorm has a weight and a bias: only one of them was given.")
    if ffn.dim() == 0 or ffn.shape[-1] == 0:
        raise ValueError(f"ffn is {list(ffn.shape)}: expected [..., width] with a width of at least 1.")
    width = ffn.shape[-1]
    expected = {"residual": (residual, ffn.shape), "source": (source, ffn.shape)}
    expected |= {"norm_weight": (norm_weight, (width,)), "norm_bias": (norm_bias, (width,))}
    for name, adapter in (("language", language), ("task", task)):
        if adapter is not None:
            inner = adapter.down_bias.shape[0] if adapter.down_bias.dim() == 1 else -1
            if inner < 1:
                shape = list(adapter.down_bias.shape)
                raise ValueError(f"{name}.down_bias is {shape}: expected [inner width], at least 1.")
            shapes = (inner, width), (inner,), (width, inner), (width,)
            for field, tensor, shape in zip(Bottleneck._fields, adapter, shapes, strict=True):
                expected[f"{name}.{field}"] = tensor, shape
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != tuple(shape):
            raise ValueError(f"{name} is {list(tensor.shape)}: expected {list(shape)} beside ffn {list(ffn.shape)}.")
        if tensor.dtype != ffn.dtype or tensor.device != ffn.device:
            found = f"{tensor.dtype} on {tensor.device}"
            raise ValueError(f"{name} is {found}: expected {ffn.dtype} on {ffn.device} as ffn is.")


def reference(
    ffn: Tensor,
    residual: Tensor,
    language: Bottleneck | None,
    task: Bottleneck | None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-12,
    *,
    activation: str = "relu",
    scaling: float = 1.0,
    inner_skip: bool = False,
    source: Tensor | None = None,
    after_norm: bool = False,
) -> Tensor:
    def norm(x: Tensor) -> Tensor:
        return x if norm_weight is None else layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)

    def added(stream: Tensor, z: Tensor, p: Bottleneck) -> Tensor:
        hidden = ACTIVATIONS[activation](linear(z, p.down_weight, p.down_bias))
        out = linear(hidden, p.up_weight, p.up_bias)
        return torch.add(stream, out + z if inner_skip else out, alpha=scaling)

    adapters = [a for a in (language, task) if a is not None]
    if not adapters:
        return norm(ffn + residual)
    if after_norm:
        hidden = norm(ffn + residual)
        return added(hidden, hidden if source is None else source, *adapters)
    hidden = norm(ffn + residual) if source is None else source
    for adapter in adapters:
        hidden = added(ffn, hidden, adapter)
    return norm(hidden + residual)


class _Given(NamedTuple):
    """The operation's tensors. `first` and `second` are the adapters present, in order; second repeats a single one."""

    ffn: Tensor
    residual: Tensor
    source: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    first: Bottleneck
    second: Bottleneck
    merged: Tensor | None
    """M = D_2 U_1, where there are two adapters."""


class _Hidden(NamedTuple):
    """[rows, d]: the hidden layers, and the gradients in front of their activations."""

    h_1: Tensor | None
    h_2: Tensor | None
    e_1: Tensor | None
    e_2: Tensor | None


class _Plan(NamedTuple):
    """What a kernel is compiled for.

    Where the hidden layers of a block of rows do not fit into registers they are `stored` in scratch memory, and a
    bottleneck is worked through in slices of `padded` columns; elsewhere one slice holds all of it.
    """

    two: tl.constexpr
    gelu: tl.constexpr
    skip: tl.constexpr
    after: tl.constexpr
    width: tl.constexpr
    d_1: tl.constexpr
    d_2: tl.constexpr
    padded_1: tl.constexpr
    padded_2: tl.constexpr
    stored: tl.constexpr
    op: tl.constexpr
    sum: tl.constexpr
    block_m: tl.constexpr
    block_h: tl.constexpr


# Tiles. A block of rows begins at row `begin` (int64) of a matrix, which goes on for `left` rows; `row` numbers the
# rows of the block: at = (begin, left, row). What is outside of a matrix reads as zero.


@jit
def _block(index, rows, plan):
    begin = tl.cast(index, tl.int64) * plan.block_m
    return begin, rows - begin, tl.arange(0, plan.block_m)


@jit
def _tile(matrix, row, column, height, width: tl.constexpr, to: tl.constexpr):
    inside = (row[:, None] < height) & (column[None, :] < width)
    return tl.load(matrix + row[:, None] * width + column[None, :], mask=inside, other=0.0).to(to)


@jit
def _rows_of(matrix, at, column, width: tl.constexpr, to: tl.constexpr):
    return _tile(matrix + at[0] * width, at[2], column, at[1], width, to)


@jit
def _store_rows(matrix, value, at, column, width: tl.constexpr):
    inside = (at[2][:, None] < at[1]) & (column[None, :] < width)
    place = matrix + at[0] * width + at[2][:, None] * width + column[None, :]
    tl.store(place, value.to(matrix.dtype.element_ty), mask=inside)


@jit
def _line(vector, column, width: tl.constexpr, to: tl.constexpr):
    return tl.load(vector + column, mask=column < width, other=0.0).to(to)[None, :]


@jit
def _load_pair(pairs, at, rows, plan):
    """Both numbers that each row has in [2, rows]; zeros where there are none."""
    one = tl.zeros((plan.block_m,), plan.sum)
    other = one
    if pairs is not None:
        one = tl.load(pairs + at[0] + at[2], mask=at[2] < at[1], other=0.0)
        other = tl.load(pairs + rows + at[0] + at[2], mask=at[2] < at[1], other=0.0)
    return one, other


@jit
def _store_pair(pairs, one, other, at, rows):
    tl.store(pairs + at[0] + at[2], one, mask=at[2] < at[1])
    tl.store(pairs + rows + at[0] + at[2], other, mask=at[2] < at[1])


@jit
def _dot(a, b, onto, plan):
    return tl.dot(a.to(plan.op), b.to(plan.op), onto, input_precision="tf32x3", out_dtype=plan.sum)


# The formulas, on a chunk of the width. `statistics` are mean and 1/std of r + x, `y_statistics` those of y = TA + x.


@jit
def _activate(p, plan):
    if plan.gelu:
        out = 0.5 * p * (1 + tl.erf(p * 0.7071067811865476))
    else:
        out = tl.maximum(p, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return out


@jit
def _activate_gradient(p, plan):
    if plan.gelu:
        out = 0.5 * (1 + tl.erf(p * 0.7071067811865476)) + p * tl.exp(-0.5 * p * p) * 0.3989422804014327
    else:
        out = tl.where(p > 0, 1.0, 0.0)
    return out


@jit
def _add_chunk(mean, squares, v, start, column, plan):
    """Rows' mean and sum of squared deviations with one more chunk (Chan's update: no row mean is too large for it)."""
    count = tl.minimum(plan.width - start, plan.block_h).to(plan.sum)
    chunk_mean = tl.sum(v, 1) / count
    deviation = tl.where(column[None, :] < plan.width, v - chunk_mean[:, None], 0.0)
    apart = chunk_mean - mean
    share = count / (count + start)
    return mean + apart * share, squares + tl.sum(deviation * deviation, 1) + apart * apart * share * start


@jit
def _standardise(v, statistics):
    return (v - statistics[0][:, None]) * statistics[1][:, None]


@jit
def _streams(given, statistics, at, column, plan):
    """r, x, h and the first adapter's input z."""
    r = _rows_of(given.ffn, at, column, plan.width, plan.sum)
    x = _rows_of(given.residual, at, column, plan.width, plan.sum)
    h = r + x
    if given.norm_weight is not None:
        h = _standardise(h, statistics) * _line(given.norm_weight, column, plan.width, plan.sum)
        h += _line(given.norm_bias, column, plan.width, plan.sum)
    z = h
    if given.source is not None:
        z = _rows_of(given.source, at, column, plan.width, plan.sum)
    return r, x, h, z


@jit
def _adapter(hidden, z, p, d: tl.constexpr, padded: tl.constexpr, scaling, at, column, plan):
    """s (U hidden + b [+ z])."""
    start = tl.zeros_like(z) + _line(p.up_bias, column, plan.width, plan.sum)
    if plan.skip:
        start += z
    inner = tl.arange(0, padded)
    if plan.stored:
        for slice in range(0, d, padded):
            up = _tile(p.up_weight, column, slice + inner, plan.width, d, plan.op)
            start = _dot(_rows_of(hidden, at, slice + inner, d, plan.op), up.T, start, plan)
    else:
        start = _dot(hidden, _tile(p.up_weight, column, inner, plan.width, d, plan.op).T, start, plan)
    return scaling * start


@jit
def _y(r, x, z, hidden, given, scaling, at, column, plan):
    """TA + x."""
    if plan.two:
        if plan.skip:
            z = _adapter(hidden[0], z, given.first, plan.d_1, plan.padded_1, scaling, at, column, plan) + r
        out = _adapter(hidden[1], z, given.second, plan.d_2, plan.padded_2, scaling, at, column, plan)
    else:
        out = _adapter(hidden[0], z, given.first, plan.d_1, plan.padded_1, scaling, at, column, plan)
    return out + r + x


@jit
def _through_down(e, p, d: tl.constexpr, padded: tl.constexpr, onto, at, column, plan):
    """D^T e."""
    inner = tl.arange(0, padded)
    if plan.stored:
        for slice in range(0, d, padded):
            down = _tile(p.down_weight, slice + inner, column, d, plan.width, plan.op)
            onto = _dot(_rows_of(e, at, slice + inner, d, plan.op), down, onto, plan)
    else:
        onto = _dot(e, _tile(p.down_weight, inner, column, d, plan.width, plan.op), onto, plan)
    return onto


@jit
def _before_merged(r, z, given, scaling, column, plan):
    """LA but for its product U_1 h_1, which goes through M."""
    added = _line(given.first.up_bias, column, plan.width, plan.sum)
    if plan.skip:
        added += z
    return r + scaling * added


@jit
def _store_layer(h_out, e_out, p, slopes: tl.constexpr, scaling, at, inner, d: tl.constexpr, plan):
    """act(p), and with `slopes` s act'(p) where e will be."""
    _store_rows(h_out, _activate(p, plan), at, inner, d)
    if slopes:
        _store_rows(e_out, scaling * _activate_gradient(p, plan), at, inner, d)


@jit
def _hidden_layers(given, statistics, hidden_out, slopes: tl.constexpr, scaling, at, plan):
    """h_1 = act(D_1 z + c_1) and h_2 = act(D_2 LA + c_2), kept."""
    inner_1, inner_2 = tl.arange(0, plan.padded_1), tl.arange(0, plan.padded_2)
    p_1 = tl.zeros((plan.block_m, plan.padded_1), plan.sum) + _line(given.first.down_bias, inner_1, plan.d_1, plan.sum)
    p_2 = tl.zeros((plan.block_m, plan.padded_2), plan.sum) + _line(given.second.down_bias, inner_2, plan.d_2, plan.sum)
    for start in range(0, plan.width, plan.block_h):
        column = start + tl.arange(0, plan.block_h)
        r, _x, _h, z = _streams(given, statistics, at, column, plan)
        p_1 = _dot(z, _tile(given.first.down_weight, inner_1, column, plan.d_1, plan.width, plan.op).T, p_1, plan)
        if plan.two:
            la = _before_merged(r, z, given, scaling, column, plan)
            p_2 = _dot(la, _tile(given.second.down_weight, inner_2, column, plan.d_2, plan.width, plan.op).T, p_2, plan)
    h_1 = _activate(p_1, plan)
    h_2 = h_1
    if slopes:
        _store_layer(hidden_out.h_1, hidden_out.e_1, p_1, slopes, scaling, at, inner_1, plan.d_1, plan)
    if plan.two:
        m = _tile(given.merged, inner_2, inner_1, plan.d_2, plan.d_1, plan.op)
        p_2 = _dot(scaling * h_1, m.T, p_2, plan)
        h_2 = _activate(p_2, plan)
        if slopes:
            _store_layer(hidden_out.h_2, hidden_out.e_2, p_2, slopes, scaling, at, inner_2, plan.d_2, plan)
    return h_1.to(plan.op), h_2.to(plan.op)


@jit
def _stored_hidden_layers(given, statistics, hidden_out, slopes: tl.constexpr, scaling, at, plan):
    """The same a slice at a time, stored."""
    for slice in range(0, plan.d_1, plan.padded_1):
        inner = slice + tl.arange(0, plan.padded_1)
        p = tl.zeros((plan.block_m, plan.padded_1), plan.sum) + _line(given.first.down_bias, inner, plan.d_1, plan.sum)
        for start in range(0, plan.width, plan.block_h):
            column = start + tl.arange(0, plan.block_h)
            r, _x, _h, z = _streams(given, statistics, at, column, plan)
            p = _dot(z, _tile(given.first.down_weight, inner, column, plan.d_1, plan.width, plan.op).T, p, plan)
        _store_layer(hidden_out.h_1, hidden_out.e_1, p, slopes, scaling, at, inner, plan.d_1, plan)
    tl.debug_barrier()
    h_1 = hidden_out.h_1
    h_2 = h_1
    if plan.two:
        h_2 = hidden_out.h_2
        for slice in range(0, plan.d_2, plan.padded_2):
            inner = slice + tl.arange(0, plan.padded_2)
            p = tl.zeros((plan.block_m, plan.padded_2), plan.sum)
            p += _line(given.second.down_bias, inner, plan.d_2, plan.sum)
            for start in range(0, plan.width, plan.block_h):
                column = start + tl.arange(0, plan.block_h)
                r, _x, _h, z = _streams(given, statistics, at, column, plan)
                la = _before_merged(r, z, given, scaling, column, plan)
                p = _dot(la, _tile(given.second.down_weight, inner, column, plan.d_2, plan.width, plan.op).T, p, plan)
            for slice_1 in range(0, plan.d_1, plan.padded_1):
                inner_1 = slice_1 + tl.arange(0, plan.padded_1)
                m = _tile(given.merged, inner, inner_1, plan.d_2, plan.d_1, plan.op)
                p = _dot(scaling * _rows_of(h_1, at, inner_1, plan.d_1, plan.sum), m.T, p, plan)
            _store_layer(h_2, hidden_out.e_2, p, slopes, scaling, at, inner, plan.d_2, plan)
        tl.debug_barrier()
    return h_1, h_2


@jit
def _d_ta(d_out, x, r, z, hidden, given, y_statistics, projections, scaling, at, column, plan):
    """The gradient of TA, or of what a single adapter adds after the norm."""
    out = d_out
    if given.norm_weight is not None and not plan.after:
        y = _standardise(_y(r, x, z, hidden, given, scaling, at, column, plan), y_statistics)
        out *= _line(given.norm_weight, column, plan.width, plan.sum)
        out = y_statistics[1][:, None] * (out - projections[0][:, None] - projections[1][:, None] * y)
    return out


@jit
def _d_first(d_ta, e_2, given, scaling, at, column, plan):
    """The gradient of what the first adapter adds: of LA where there are two, of TA otherwise."""
    out = d_ta
    if plan.two:
        start = tl.zeros_like(d_ta)
        if plan.skip:
            start += scaling * d_ta
        out = _through_down(e_2, given.second, plan.d_2, plan.padded_2, start, at, column, plan)
    return out


@jit
def _d_z(d_first, e_1, given, scaling, at, column, plan):
    start = tl.zeros_like(d_first)
    if plan.skip:
        start += scaling * d_first
    return _through_down(e_1, given.first, plan.d_1, plan.padded_1, start, at, column, plan)


@jit
def _d_h(d_out, d_z, given, plan):
    """The gradient of h, where anything reads h."""
    if plan.after and given.source is not None:
        out = d_out
    elif plan.after:
        out = d_out + d_z
    else:
        out = d_z
    return out


# The kernels.


@jit(do_not_specialize=("rows", "eps", "scaling"))
def _forward(out, statistics_out, y_statistics_out, hidden_out, given, rows, eps, scaling, plan):
    at = _block(tl.program_id(0), rows, plan)
    eps, scaling = tl.cast(eps, plan.sum), tl.cast(scaling, plan.sum)
    mean = tl.zeros((plan.block_m,), plan.sum)
    statistics = (mean, mean)
    if statistics_out is not None:
        squares = mean
        for start in range(0, plan.width, plan.block_h):
            column = start + tl.arange(0, plan.block_h)
            v = _rows_of(given.ffn, at, column, plan.width, plan.sum)
            v += _rows_of(given.residual, at, column, plan.width, plan.sum)
            mean, squares = _add_chunk(mean, squares, v, start, column, plan)
        statistics = (mean, 1 / tl.sqrt(squares / plan.width + eps))
        _store_pair(statistics_out, statistics[0], statistics[1], at, rows)

    if plan.stored:
        hidden = _stored_hidden_layers(given, statistics, hidden_out, False, scaling, at, plan)
    else:
        hidden = _hidden_layers(given, statistics, hidden_out, False, scaling, at, plan)

    y_mean = tl.zeros((plan.block_m,), plan.sum)
    y_statistics = (y_mean, y_mean)
    if y_statistics_out is not None:
        squares = y_mean
        for start in range(0, plan.width, plan.block_h):
            column = start + tl.arange(0, plan.block_h)
            r, x, h, z = _streams(given, statistics, at, column, plan)
            y = _y(r, x, z, hidden, given, scaling, at, column, plan)
            y_mean, squares = _add_chunk(y_mean, squares, y, start, column, plan)
        y_statistics = (y_mean, 1 / tl.sqrt(squares / plan.width + eps))
        _store_pair(y_statistics_out, y_statistics[0], y_statistics[1], at, rows)

    for start in range(0, plan.width, plan.block_h):
        column = start + tl.arange(0, plan.block_h)
        r, x, h, z = _streams(given, statistics, at, column, plan)
        if plan.after:
            y = h + _adapter(hidden[0], z, given.first, plan.d_1, plan.padded_1, scaling, at, column, plan)
        else:
            y = _y(r, x, z, hidden, given, scaling, at, column, plan)
            if given.norm_weight is not None:
                y = _standardise(y, y_statistics) * _line(given.norm_weight, column, plan.width, plan.sum)
                y += _line(given.norm_bias, column, plan.width, plan.sum)
        _store_rows(out, y, at, column, plan.width)


@jit
def _d_ta_again(back, scaling, at, column, plan):
    d_out, given, statistics, y_statistics, projections, hidden = back
    r, x, _h, z = _streams(given, statistics, at, column, plan)
    d_ta = _rows_of(d_out, at, column, plan.width, plan.sum)
    return _d_ta(d_ta, x, r, z, hidden, given, y_statistics, projections, scaling, at, column, plan)


@jit
def _hidden_gradients(back, hidden_out, scaling, at, plan):
    """Through the up-projections to e_1 and e_2, the gradients in front of the activations."""
    given = back[1]
    inner_1, inner_2 = tl.arange(0, plan.padded_1), tl.arange(0, plan.padded_2)
    e_1 = tl.zeros((plan.block_m, plan.padded_1), plan.sum)
    e_2 = tl.zeros((plan.block_m, plan.padded_2), plan.sum)
    for start in range(0, plan.width, plan.block_h):
        column = start + tl.arange(0, plan.block_h)
        d_ta = _d_ta_again(back, scaling, at, column, plan)
        if plan.two:
            e_2 = _dot(d_ta, _tile(given.second.up_weight, column, inner_2, plan.width, plan.d_2, plan.op), e_2, plan)
        if plan.skip or not plan.two:
            e_1 = _dot(d_ta, _tile(given.first.up_weight, column, inner_1, plan.width, plan.d_1, plan.op), e_1, plan)
    tl.debug_barrier()
    if plan.two:
        e_2 *= _rows_of(hidden_out.e_2, at, inner_2, plan.d_2, plan.sum)
        m = _tile(given.merged, inner_2, inner_1, plan.d_2, plan.d_1, plan.op)
        e_1 = _dot(e_2, m, scaling * e_1, plan)
    e_1 *= _rows_of(hidden_out.e_1, at, inner_1, plan.d_1, plan.sum)
    tl.debug_barrier()
    _store_rows(hidden_out.e_1, e_1, at, inner_1, plan.d_1)
    if plan.two:
        _store_rows(hidden_out.e_2, e_2, at, inner_2, plan.d_2)
    return e_1.to(plan.op), e_2.to(plan.op)


@jit
def _stored_hidden_gradients(back, hidden_out, scaling, at, plan):
    given = back[1]
    if plan.two:
        for slice in range(0, plan.d_2, plan.padded_2):
            inner = slice + tl.arange(0, plan.padded_2)
            e = tl.zeros((plan.block_m, plan.padded_2), plan.sum)
            for start in range(0, plan.width, plan.block_h):
                column = start + tl.arange(0, plan.block_h)
                d_ta = _d_ta_again(back, scaling, at, column, plan)
                e = _dot(d_ta, _tile(given.second.up_weight, column, inner, plan.width, plan.d_2, plan.op), e, plan)
            e *= _rows_of(hidden_out.e_2, at, inner, plan.d_2, plan.sum)
            tl.debug_barrier()
            _store_rows(hidden_out.e_2, e, at, inner, plan.d_2)
        tl.debug_barrier()
    for slice in range(0, plan.d_1, plan.padded_1):
        inner = slice + tl.arange(0, plan.padded_1)
        e = tl.zeros((plan.block_m, plan.padded_1), plan.sum)
        if plan.skip or not plan.two:
            for start in range(0, plan.width, plan.block_h):
                column = start + tl.arange(0, plan.block_h)
                d_ta = _d_ta_again(back, scaling, at, column, plan)
                e = _dot(d_ta, _tile(given.first.up_weight, column, inner, plan.width, plan.d_1, plan.op), e, plan)
        if plan.two:
            e *= scaling
            for slice_2 in range(0, plan.d_2, plan.padded_2):
                inner_2 = slice_2 + tl.arange(0, plan.padded_2)
                m = _tile(given.merged, inner_2, inner, plan.d_2, plan.d_1, plan.op)
                e = _dot(_rows_of(hidden_out.e_2, at, inner_2, plan.d_2, plan.op), m, e, plan)
        e *= _rows_of(hidden_out.e_1, at, inner, plan.d_1, plan.sum)
        tl.debug_barrier()
        _store_rows(hidden_out.e_1, e, at, inner, plan.d_1)
    tl.debug_barrier()
    e_1 = hidden_out.e_1
    e_2 = e_1
    if plan.two:
        e_2 = hidden_out.e_2
    return e_1, e_2


@jit(do_not_specialize=("rows", "scaling"))
def _backward(
    d_ffn, d_residual, d_source, projections_out, hidden_out,
    d_out, statistics_in, y_statistics_in, given, rows, scaling, plan,
):  # fmt: skip
    """Gradients of the streams (None: not wanted), and what the weights' gradients need of every row."""
    at = _block(tl.program_id(0), rows, plan)
    scaling = tl.cast(scaling, plan.sum)
    statistics = _load_pair(statistics_in, at, rows, plan)
    y_statistics = _load_pair(y_statistics_in, at, rows, plan)

    # The activations' slopes wait in memory, where e will be, until e has come through the up-projections.
    if plan.stored:
        hidden = _stored_hidden_layers(given, statistics, hidden_out, True, scaling, at, plan)
    else:
        hidden = _hidden_layers(given, statistics, hidden_out, True, scaling, at, plan)

    # The last norm takes a row's mean and its projection on y out of the gradient.
    mean = tl.zeros((plan.block_m,), plan.sum)
    on_y = mean
    if y_statistics_in is not None:
        for start in range(0, plan.width, plan.block_h):
            column = start + tl.arange(0, plan.block_h)
            r, x, h, z = _streams(given, statistics, at, column, plan)
            y = _standardise(_y(r, x, z, hidden, given, scaling, at, column, plan), y_statistics)
            d_y = _rows_of(d_out, at, column, plan.width, plan.sum)
            d_y *= _line(given.norm_weight, column, plan.width, plan.sum)
            mean += tl.sum(d_y, 1) / plan.width
            on_y += tl.sum(d_y * y, 1) / plan.width
        _store_pair(projections_out, mean, on_y, at, rows)
    projections = (mean, on_y)

    back = (d_out, given, statistics, y_statistics, projections, hidden)
    if plan.stored:
        e_1, e_2 = _stored_hidden_gradients(back, hidden_out, scaling, at, plan)
    else:
        e_1, e_2 = _hidden_gradients(back, hidden_out, scaling, at, plan)

    if d_residual is not None:
        # The first norm does the same to the gradient of h.
        mean = tl.zeros((plan.block_m,), plan.sum)
        on_h = mean
        if statistics_in is not None:
            for start in range(0, plan.width, plan.block_h):
                column = start + tl.arange(0, plan.block_h)
                r, x, h, z = _streams(given, statistics, at, column, plan)
                d_out_chunk = _rows_of(d_out, at, column, plan.width, plan.sum)
                d_first = d_out_chunk
                if plan.skip:
                    d_first = _d_ta_again(back, scaling, at, column, plan)
                    d_first = _d_first(d_first, e_2, given, scaling, at, column, plan)
                d_h = _d_h(d_out_chunk, _d_z(d_first, e_1, given, scaling, at, column, plan), given, plan)
                d_h *= _line(given.norm_weight, column, plan.width, plan.sum)
                mean += tl.sum(d_h, 1) / plan.width
                on_h += tl.sum(d_h * _standardise(r + x, statistics), 1) / plan.width

        for start in range(0, plan.width, plan.block_h):
            column = start + tl.arange(0, plan.block_h)
            r, x, h, z = _streams(given, statistics, at, column, plan)
            d_out_chunk = _rows_of(d_out, at, column, plan.width, plan.sum)
            d_ta = _d_ta(d_out_chunk, x, r, z, hidden, given, y_statistics, projections, scaling, at, column, plan)
            d_first = _d_first(d_ta, e_2, given, scaling, at, column, plan)
            d_z = _d_z(d_first, e_1, given, scaling, at, column, plan)
            d_sum = tl.zeros_like(d_z)
            if not plan.after:
                d_sum = d_ta
            if given.source is None or plan.after:
                d_h = _d_h(d_out_chunk, d_z, given, plan)
                if statistics_in is not None:
                    d_h *= _line(given.norm_weight, column, plan.width, plan.sum)
                    h = _standardise(r + x, statistics)
                    d_h = statistics[1][:, None] * (d_h - mean[:, None] - on_h[:, None] * h)
                d_sum += d_h
            _store_rows(d_residual, d_sum, at, column, plan.width)
            if plan.two:
                _store_rows(d_ffn, d_sum + d_first, at, column, plan.width)
            if given.source is not None:
                _store_rows(d_source, d_z, at, column, plan.width)


@jit
def _store_sum(sums, value, column, inner, d: tl.constexpr, stride, plan):
    """A chunk of a [width, d] matrix into this share's part of the partial sums."""
    inside = (column[:, None] < plan.width) & (inner[None, :] < d)
    tl.store(sums + tl.program_id(1) * stride + column[:, None] * d + inner[None, :], value, mask=inside)


@jit(do_not_specialize=("turns", "rows", "scaling"))
def _weight_gradients(
    d_out, statistics_in, y_statistics_in, projections_in, hidden_in, given, sums, stride, turns, rows, scaling, plan
):
    """Sums over a share of the rows, for one chunk of the width; `sums` says which are wanted."""
    scaling = tl.cast(scaling, plan.sum)
    column = tl.program_id(0) * plan.block_h + tl.arange(0, plan.block_h)
    inner_1 = tl.program_id(2) * plan.padded_1 + tl.arange(0, plan.padded_1)
    inner_2 = tl.program_id(2) * plan.padded_2 + tl.arange(0, plan.padded_2)
    up_1 = tl.zeros((plan.block_h, plan.padded_1), plan.sum)
    up_2 = tl.zeros((plan.block_h, plan.padded_2), plan.sum)
    down_1, down_2 = up_1, up_2
    up_bias = tl.zeros((plan.block_h,), plan.sum)
    norm_weight, norm_bias = up_bias, up_bias
    for turn in range(0, turns):
        at = _block(turn * tl.num_programs(1) + tl.program_id(1), rows, plan)
        statistics = _load_pair(statistics_in, at, rows, plan)
        y_statistics = _load_pair(y_statistics_in, at, rows, plan)
        projections = _load_pair(projections_in, at, rows, plan)
        r, x, _h, z = _streams(given, statistics, at, column, plan)
        d_out_chunk = _rows_of(d_out, at, column, plan.width, plan.sum)
        h_1 = _rows_of(hidden_in.h_1, at, inner_1, plan.d_1, plan.op)
        e_1 = _rows_of(hidden_in.e_1, at, inner_1, plan.d_1, plan.op)
        h_2, e_2 = h_1, e_1
        if plan.two:
            h_2 = _rows_of(hidden_in.h_2, at, inner_2, plan.d_2, plan.op)
            e_2 = _rows_of(hidden_in.e_2, at, inner_2, plan.d_2, plan.op)
        hidden, gradients = (h_1, h_2), (e_1, e_2)
        if plan.stored:
            hidden, gradients = (hidden_in.h_1, hidden_in.h_2), (hidden_in.e_1, hidden_in.e_2)
        d_ta = _d_ta(d_out_chunk, x, r, z, hidden, given, y_statistics, projections, scaling, at, column, plan)
        if sums.up_bias is not None:
            up_bias += tl.sum(d_ta, 0)
        if sums.up_1 is not None:
            up_1 = _dot(d_ta.T, h_1, up_1, plan)
        if sums.up_2 is not None:
            up_2 = _dot(d_ta.T, h_2, up_2, plan)
        if sums.down_1 is not None:
            down_1 = _dot(z.T, e_1, down_1, plan)
        if sums.down_2 is not None:
            down_2 = _dot(_before_merged(r, z, given, scaling, column, plan).T, e_2, down_2, plan)
        if sums.norm_weight is not None:
            if not plan.after:
                y = _standardise(_y(r, x, z, hidden, given, scaling, at, column, plan), y_statistics)
                norm_weight += tl.sum(d_out_chunk * y, 0)
                norm_bias += tl.sum(d_out_chunk, 0)
            if statistics_in is not None:
                d_first = _d_first(d_ta, gradients[1], given, scaling, at, column, plan)
                d_h = _d_h(d_out_chunk, _d_z(d_first, gradients[0], given, scaling, at, column, plan), given, plan)
                norm_weight += tl.sum(d_h * _standardise(r + x, statistics), 0)
                norm_bias += tl.sum(d_h, 0)

    if sums.up_1 is not None:
        _store_sum(sums.up_1, up_1, column, inner_1, plan.d_1, stride, plan)
    if sums.up_2 is not None:
        _store_sum(sums.up_2, up_2, column, inner_2, plan.d_2, stride, plan)
    if sums.down_1 is not None:
        _store_sum(sums.down_1, down_1, column, inner_1, plan.d_1, stride, plan)
    if sums.down_2 is not None:
        _store_sum(sums.down_2, down_2, column, inner_2, plan.d_2, stride, plan)
    share = tl.program_id(1) * stride
    inside = column < tl.where(tl.program_id(2) == 0, plan.width, 0)  # every slice has these
    if sums.up_bias is not None:
        tl.store(sums.up_bias + share + column, up_bias, mask=inside)
    if sums.norm_weight is not None:
        tl.store(sums.norm_weight + share + column, norm_weight, mask=inside)
        tl.store(sums.norm_bias + share + column, norm_bias, mask=inside)


@jit(do_not_specialize=("turns", "rows"))
def _hidden_products(products, hidden, turns, rows, plan):
    """S = sum e_2 h_1^T over a share of the rows, [shares, d_2, d_1], in tiles of 64 x 64."""
    inner_2 = tl.program_id(1) * 64 + tl.arange(0, 64)
    inner_1 = tl.program_id(2) * 64 + tl.arange(0, 64)
    s = tl.zeros((64, 64), plan.sum)
    for turn in range(0, turns):
        at = _block(turn * tl.num_programs(0) + tl.program_id(0), rows, plan)
        e_2 = _rows_of(hidden.e_2, at, inner_2, plan.d_2, plan.op)
        s = _dot(e_2.T, _rows_of(hidden.h_1, at, inner_1, plan.d_1, plan.op), s, plan)
    products += tl.program_id(0) * plan.d_2 * plan.d_1
    inside = (inner_2[:, None] < plan.d_2) & (inner_1[None, :] < plan.d_1)
    tl.store(products + inner_2[:, None] * plan.d_1 + inner_1[None, :], s, mask=inside)


# The launchers.


class _Sums(NamedTuple):
    """What the weights' gradients are made of, each summed over the rows; None where it is not wanted."""

    up_1: Tensor | None
    """d_TA h_1^T, [width, d_1]"""
    up_2: Tensor | None
    """d_TA h_2^T, [width, d_2]"""
    down_1: Tensor | None
    """z e_1^T, [width, d_1]"""
    down_2: Tensor | None
    """(LA without U_1 h_1) e_2^T, [width, d_2]"""
    up_bias: Tensor | None
    """d_TA, [width]"""
    norm_weight: Tensor | None
    norm_bias: Tensor | None


def _padded(d: int, dtype: torch.dtype, two_skips: bool) -> int:
    """A bottleneck's width, or the slices in which it is worked through: of 32 where a chunk takes most products."""
    return min(max(16, next_power_of_2(d)), 32 if dtype == torch.float32 or two_skips else 64)


def _by_rows(plan: dict[str, object], dtype: torch.dtype) -> dict[str, int]:
    """Blocks of rows, tall so that the weights are not read too often."""
    if dtype == torch.float32:
        return {"block_m": 64, "block_h": 16, "num_warps": 8, "num_stages": 2}
    return {"block_m": 64 if plan["stored"] else 128, "block_h": 32, "num_warps": 8, "num_stages": 2}


def _by_columns(plan: dict[str, object], dtype: torch.dtype) -> dict[str, int]:
    """Chunks of the width, for sums over the rows: of the 64 that wgmma takes, or of what else fits."""
    if dtype == torch.float32:
        return {"block_m": 32, "block_h": 64, "num_warps": 8, "num_stages": 2}
    if not INTERPRETED and torch.cuda.get_device_capability()[0] < 9:
        return {"block_m": 128, "block_h": 32, "num_warps": 8, "num_stages": 2}
    short = plan["stored"] or 16 in (plan["padded_1"], plan["padded_2"])  # with 16 columns and 128 rows, sm_100 spills
    return {"block_m": 64 if short else 128, "block_h": 64, "num_warps": 8, "num_stages": 2}


def _sums_at_once(plan: dict[str, object]) -> list[tuple[str, ...]]:
    """The fields of _Sums by launch: as many as fit into the registers."""
    last = (("up_1",), ("up_2", "up_bias")) if plan["two"] else (("up_1", "up_bias"),)
    downs = (("down_1",), ("down_2",)) if plan["stored"] else (("down_1", "down_2"),)
    return [*last, *downs, ("norm_weight", "norm_bias")]


_PROGRAMS = 264
"""Programs that sum over the rows: two for each of the 132 multiprocessors of an H100. Fixed, so that sums are too."""


def _prepared(
    ffn: Tensor,
    residual: Tensor,
    source: Tensor | None,
    adapters: list[Tensor],
    norm: list[Tensor],
    activation: str,
    inner_skip: bool,
    after_norm: bool,
) -> tuple[_Given, dict[str, object]]:
    """The kernels' tensors, and their plan but for the blocks."""
    first, second = Bottleneck(*adapters[:4]), Bottleneck(*adapters[-4:])
    two = len(adapters) == 8
    merged = second.down_weight @ first.up_weight if two else None
    given = _Given(ffn, residual, source, *(norm or (None, None)), first, second, merged)
    d_1, d_2 = (p.down_weight.shape[0] for p in (first, second))
    plan = {
        "two": two,
        "gelu": activation == "gelu",
        "skip": inner_skip,
        "after": after_norm and bool(norm),
        "width": ffn.shape[-1],
        "d_1": d_1,
        "d_2": d_2,
        "padded_1": _padded(d_1, ffn.dtype, two and inner_skip),
        "padded_2": _padded(d_2, ffn.dtype, two and inner_skip),
        "stored": max(d_1, d_2) > 64 or ffn.dtype == torch.float32 or (two and inner_skip),
        "op": multiplied_in(ffn.dtype),
        "sum": summed_in(ffn.dtype),
    }
    return given, plan


def _start(kernel, grid: tuple[int, ...], *args, plan: dict[str, object], config: dict[str, int]) -> None:
    config = dict(config)
    blocks = {name: config.pop(name) for name in ("block_m", "block_h")}
    constants = {name: tl.constexpr(value) for name, value in (plan | blocks).items()}
    launch(kernel, grid, *args, _Plan(**constants), **config)


def _hidden(ffn: Tensor, plan: dict[str, object], gradients: bool) -> _Hidden:
    rows = ffn.numel() // ffn.shape[-1]
    widths = plan["d_1"], plan["d_2"] if plan["two"] else 0
    layers = [ffn.new_empty(rows, d) if d else None for d in widths * (1 + gradients)]
    return _Hidden(*layers, *[None] * (4 - len(layers)))


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _statistics(ffn: Tensor, wanted: bool) -> Tensor:
    """Two numbers a row for a norm, none where there is no such norm."""
    shape = (2, ffn.numel() // ffn.shape[-1]) if wanted else (0,)
    return ffn.new_empty(shape, dtype=_sum_dtype(ffn))


def _norms(source: Tensor | None, norm: list[Tensor], after_norm: bool) -> tuple[bool, bool]:
    """Whether h and whether y is normalised."""
    return bool(norm) and (source is None or after_norm), bool(norm) and not after_norm


@torch.library.custom_op("clinvla_fast::transformer_adapt", mutates_args=())
def _op(
    ffn: Tensor,
    residual: Tensor,
    source: Tensor | None,
    adapters: list[Tensor],
    norm: list[Tensor],
    eps: float,
    activation: str,
    scaling: float,
    inner_skip: bool,
    after_norm: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output and both norms' row statistics. Contiguous tensors; `adapters` are the four of one or eight of two."""
    out = torch.empty_like(ffn)
    statistics, y_statistics = (_statistics(ffn, wanted) for wanted in _norms(source, norm, after_norm))
    given, plan = _prepared(ffn, residual, source, adapters, norm, activation, inner_skip, after_norm)
    config = _by_rows(plan, ffn.dtype)
    rows = ffn.numel() // ffn.shape[-1]
    outputs = out, *(s if s.dim() == 2 else None for s in (statistics, y_statistics))
    hidden = _hidden(ffn, plan, gradients=False) if plan["stored"] else _Hidden(None, None, None, None)
    grid = (cdiv(rows, config["block_m"]),)
    _start(_forward, grid, *outputs, hidden, given, rows, eps, scaling, plan=plan, config=config)
    return out, statistics, y_statistics


@_op.register_fake
def _(ffn, residual, source, adapters, norm, eps, activation, scaling, inner_skip, after_norm):
    return torch.empty_like(ffn), *(_statistics(ffn, wanted) for wanted in _norms(source, norm, after_norm))


def _empty_gradients(
    ffn: Tensor, source: Tensor | None, adapters: list[Tensor], norm: list[Tensor], needs: list[bool]
) -> list[Tensor]:
    streams, first, second, normed = needs
    two = len(adapters) == 8
    wanted = [(ffn, streams and two), (ffn, streams), (ffn, streams and source is not None)]
    wanted += [(p, needed) for p, needed in zip(adapters, [first] * 4 + [second] * 4, strict=False)]
    wanted += [(p, normed) for p in norm]
    return [torch.empty_like(like) if needed else like.new_empty(0) for like, needed in wanted]


def _summed(
    d_out: Tensor,
    statistics: Tensor | None,
    y_statistics: Tensor | None,
    projections: Tensor | None,
    hidden: _Hidden,
    given: _Given,
    scaling: float,
    plan: dict[str, object],
    needs: list[bool],
) -> _Sums:
    """Every sum over the rows that the weights' gradients need, in fp32."""
    _, first, second, normed = needs
    two, skip, width, d_1, d_2 = (plan[name] for name in ("two", "skip", "width", "d_1", "d_2"))
    last = second if two else first
    through_skip = two and skip and first
    sizes = {
        "up_1": width * d_1 if through_skip or (last and not two) else 0,
        "up_2": width * d_2 if last and two else 0,
        "down_1": width * d_1 if first else 0,
        "down_2": width * d_2 if second else 0,
        "up_bias": width if last or through_skip else 0,
        "norm_weight": width if normed else 0,
        "norm_bias": width if normed else 0,
    }
    rows, stride = d_out.numel() // width, sum(sizes.values())
    config = _by_columns(plan, d_out.dtype)
    chunks, blocks = cdiv(width, config["block_h"]), cdiv(rows, config["block_m"])
    shares = min(blocks, max(1, _PROGRAMS // chunks))
    slices = max(cdiv(d_1, plan["padded_1"]), cdiv(d_2, plan["padded_2"]))
    partial = d_out.new_empty(shares, stride, dtype=_sum_dtype(d_out))

    def pieces(sums: Tensor) -> list[Tensor | None]:
        return [piece if piece.shape[-1] else None for piece in sums.split(list(sizes.values()), -1)]

    inputs = d_out, statistics, y_statistics, projections, hidden, given
    wanted = {name: piece for name, piece in zip(sizes, pieces(partial), strict=True) if piece is not None}
    for names in _sums_at_once(plan):
        if wanted.keys().isdisjoint(names):
            continue
        sums = _Sums(*(wanted.get(name) if name in names else None for name in _Sums._fields))
        grid, counts = (chunks, shares, slices), (stride, cdiv(blocks, max(shares, 1)), rows)
        _start(_weight_gradients, grid, *inputs, sums, *counts, scaling, plan=plan, config=config)
    shapes = (width, d_1), (width, d_2), (width, d_1), (width, d_2), (width,), (width,), (width,)
    return _Sums(*(s if s is None else s.view(shape) for s, shape in zip(pieces(partial.sum(0)), shapes, strict=True)))


def _cross(hidden: _Hidden, plan: dict[str, object]) -> Tensor:
    """S, [d_2, d_1]."""
    rows, config = hidden.h_1.shape[0], _by_columns(plan, hidden.h_1.dtype)
    tiles = cdiv(plan["d_2"], 64), cdiv(plan["d_1"], 64)
    blocks = cdiv(rows, config["block_m"])
    shares = min(blocks, max(1, _PROGRAMS // (tiles[0] * tiles[1])))
    turns = cdiv(blocks, max(shares, 1))
    partial = hidden.h_1.new_empty(shares, plan["d_2"], plan["d_1"], dtype=_sum_dtype(hidden.h_1))
    _start(_hidden_products, (shares, *tiles), partial, hidden, turns, rows, plan=plan, config=config)
    return partial.sum(0)


@torch.library.custom_op("clinvla_fast::transformer_adapt_backward", mutates_args=())
def _backward_op(
    d_out: Tensor,
    statistics: Tensor,
    y_statistics: Tensor,
    ffn: Tensor,
    residual: Tensor,
    source: Tensor | None,
    adapters: list[Tensor],
    norm: list[Tensor],
    activation: str,
    scaling: float,
    inner_skip: bool,
    after_norm: bool,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of ffn, residual, source, each of adapters and each of norm.

    `needs` has a flag for the streams, the first adapter, the second, the norm. A gradient that is not needed is empty,
    and so is that of ffn where there is one adapter: it equals that of residual.
    """
    given, plan = _prepared(ffn, residual, source, adapters, norm, activation, inner_skip, after_norm)
    two, rows = plan["two"], ffn.numel() // ffn.shape[-1]
    _, first, second, normed = needs
    statistics, y_statistics = (s if s.dim() == 2 else None for s in (statistics, y_statistics))
    gradients = _empty_gradients(ffn, source, adapters, norm, needs)

    hidden = _hidden(ffn, plan, gradients=True)
    projections = None if y_statistics is None else torch.empty_like(y_statistics)
    config = _by_rows(plan, ffn.dtype)
    d_streams = (g if g.numel() else None for g in gradients[:3])
    inputs = d_out, statistics, y_statistics, given, rows, scaling
    grid = (cdiv(rows, config["block_m"]),)
    _start(_backward, grid, *d_streams, projections, hidden, *inputs, plan=plan, config=config)
    if not (first or second or normed):
        return gradients

    sums = _summed(d_out, statistics, y_statistics, projections, hidden, given, scaling, plan, needs)
    d_first, d_second, d_norm = gradients[3:7], gradients[7:11], gradients[3 + len(adapters) :]
    if normed:
        for gradient, s in zip(d_norm, (sums.norm_weight, sums.norm_bias), strict=True):
            gradient.copy_(s)
    if not two and first:
        found = sums.down_1.T, hidden.e_1.sum(0), scaling * sums.up_1, scaling * sums.up_bias
        for gradient, s in zip(d_first, found, strict=True):
            gradient.copy_(s)
    if two and (first or second):
        wide = _sum_dtype(ffn)
        cross, e_2 = _cross(hidden, plan), hidden.e_2.sum(0, dtype=wide)
        if second:
            down = sums.down_2.T + scaling * cross @ given.first.up_weight.to(wide).T
            for gradient, s in zip(d_second, (down, e_2, scaling * sums.up_2, scaling * sums.up_bias), strict=True):
                gradient.copy_(s)
        if first:
            through = given.second.down_weight.to(wide).T
            up, up_bias = through @ cross, through @ e_2
            if inner_skip:
                up, up_bias = up + scaling * sums.up_1, up_bias + scaling * sums.up_bias
            found = sums.down_1.T, hidden.e_1.sum(0, dtype=wide), scaling * up, scaling * up_bias
            for gradient, s in zip(d_first, found, strict=True):
                gradient.copy_(s)
    return gradients


@_backward_op.register_fake
def _(d_out, statistics, y_statistics, ffn, residual, source, adapters, norm, *rest):
    return _empty_gradients(ffn, source, adapters, norm, rest[-1])


def _save(ctx, inputs, output) -> None:
    ffn, residual, source, adapters, norm, _, *ctx.options = inputs
    ctx.save_for_backward(*output[1:], ffn, residual, source, *adapters, *norm)
    ctx.adapters = len(adapters)


def _differentiate(ctx, d_out, *_):
    statistics, y_statistics, ffn, residual, source, *rest = ctx.saved_tensors
    adapters, norm = rest[: ctx.adapters], rest[ctx.adapters :]
    ffn_needed, residual_needed, source_needed, adapters_needed, norm_needed, *_ = ctx.needs_input_grad
    streams = ffn_needed or residual_needed or source_needed
    needs = [streams, any(adapters_needed[:4]), any(adapters_needed[4:]), any(norm_needed)]
    given = d_out.contiguous(), statistics, y_statistics, ffn, residual, source, adapters, norm
    gradients = _backward_op(*given, *ctx.options, needs)
    d_ffn, d_residual, d_source = gradients[:3]
    if len(adapters) == 4:
        d_ffn = d_residual
    d_adapters, d_norm = gradients[3 : 3 + len(adapters)], gradients[3 + len(adapters) :]
    return (
        d_ffn if ffn_needed else None,
        d_residual if residual_needed else None,
        d_source if source_needed else None,
        [g if needed else None for g, needed in zip(d_adapters, adapters_needed, strict=True)],
        [g if needed else None for g, needed in zip(d_norm, norm_needed, strict=True)],
        *[None] * 5,
    )


_op.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.clinvla_fast.transformer_adapt)
def _flops(ffn, residual, source, adapters, *_, **__) -> int:
    """Of the products in the formula: D z and U h, for each adapter. (Through M, the kernel does a little less.)"""
    rows = prod(ffn) // ffn[-1]
    return sum(2 * 2 * rows * prod(down) for down in adapters[::4])


@register_flop_formula(torch.ops.clinvla_fast.transformer_adapt_backward)
def _backward_flops(d_out, statistics, y_statistics, ffn, residual, source, adapters, norm, *options, **_) -> int:
    """Of the products in the formula: D z again, and U h where LA is made of it; U^T, D^T and the weights' two."""
    streams, first, second, normed = options[4]
    rows, downs = prod(ffn) // ffn[-1], adapters[::4]
    below = streams or (normed and source is None)  # whether what the adapter reads has a gradient
    products = 0
    for down, trained, between in zip(downs, (first, second), (len(downs) == 2, False), strict=False):
        products += (1 + between + 2 * trained + (trained or below) + below) * prod(down)
        below = below or trained
    return 2 * rows * products


@register_byte_formula(torch.ops.clinvla_fast.transformer_adapt)
def _bytes(ffn, residual, source, adapters, norm, *_, out) -> int:
    return nbytes(ffn, residual, source, adapters, norm, out[0])


@register_byte_formula(torch.ops.clinvla_fast.transformer_adapt_backward)
def _backward_bytes(d_out, statistics, y_statistics, ffn, residual, source, adapters, norm, *_, out) -> int:
    return nbytes(d_out, ffn, residual, source, adapters, norm, out)


def triton(
    ffn: Tensor,
    residual: Tensor,
    language: Bottleneck | None,
    task: Bottleneck | None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-12,
    *,
    activation: str = "relu",
    scaling: float = 1.0,
    inner_skip: bool = False,
    source: Tensor | None = None,
    after_norm: bool = False,
) -> Tensor:
    adapters = [t.contiguous() for a in (language, task) if a is not None for t in a]
    if not adapters:  # nothing is left to fuse: the norm has a kernel of PyTorch's own
        return reference(ffn, residual, None, None, norm_weight, norm_bias, eps)
    norm = [] if norm_weight is None else [norm_weight.contiguous(), norm_bias.contiguous()]
    source = source if source is None else source.contiguous()
    streams = ffn.contiguous(), residual.contiguous(), source
    return _op(*streams, adapters, norm, eps, activation, float(scaling), inner_skip, after_norm)[0]
