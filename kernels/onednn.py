"""Matrix products on a CPU through oneDNN, which runs them at the machine's rate where PyTorch's default does not.

PyTorch hands float32 products to MKL; on some AMD processors that leaves half of AVX-512 unused. oneDNN also takes a
frozen weight as it was packed for the processor, and applies a linear layer's bias and GELU while it writes.
"""

import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional
from torch.utils.flop_counter import register_flop_formula
from torch.utils.weak import WeakTensorKeyDictionary

# oneDNN, and PyTorch's wrapper of it, keep about a megabyte for each of the last 1,024 shapes that they multiplied, and
# packed reports have others in every batch. A training step has about 120, of which half come again in the next one.
# Both read this at their first product.
for _cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_cache, "256")

_WORTH_A_CALL = 10_000_000  # FLOPs: oneDNN's call of 20 microseconds is then made up for
_HEAD = 64  # rows or columns: of as many of a frozen weight one element is looked at
_ROWS = 512  # for which a weight is packed: how many there are matters little
_DTYPES: tuple[torch.dtype, ...] = ()
if torch.backends.mkldnn.is_available():
    _DTYPES = (torch.float32, torch.bfloat16) if torch.ops.mkldnn._is_mkldnn_bf16_supported() else (torch.float32,)


def taken(x: Tensor) -> bool:
    """Whether products with x go through oneDNN."""
    return x.is_cpu and x.dtype in _DTYPES


def _dense(x: Tensor) -> Tensor:
    """Without gaps, as it is or transposed: for other strides oneDNN has no fast kernel: 300 times slower."""
    return x if x.is_mkldnn or x.is_contiguous() or x.mT.is_contiguous() else x.contiguous()


def _run(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    """x W^T + b, through an exact GELU if asked for."""
    if not (x.numel() and weight.numel()):  # oneDNN knows no empty products
        return functional.linear(x, weight, bias)
    after = ("gelu", [], "none") if gelu else ("none", [], "")
    bias = None if bias is None else bias.contiguous()  # oneDNN heeds no strides of it
    return torch.ops.mkldnn._linear_pointwise(_dense(x), _dense(weight), bias, *after)


def matmul(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a [M, K] times b [K, N], and bias [N]: [M, N]. b is as good transposed; a is copied unless its rows are dense.

    Not differentiable.
    """
    return _run(a, b.mT, bias) if taken(a) else functional.linear(a, b.mT, bias)


def over_rows(a: Tensor, b: Tensor, product: Callable[[Tensor, Tensor], Tensor] = matmul) -> Tensor:
    """a^T b, for a [K, M] and b [K, N] of many rows: the narrower first, as the other way round oneDNN is up to four
    times slower."""
    return product(a.mT, b) if a.shape[1] <= b.shape[1] else product(b.mT, a).mT


def bmm(a: Tensor, b: Tensor) -> Tensor:
    """a [B, M, K] times b [B, K, N]: [B, M, N], one after the other where that is worth a call each."""
    if taken(a) and 2 * a.shape[1] * a.shape[2] * b.shape[2] >= _WORTH_A_CALL:
        products = [matmul(x, y) for x, y in zip(a, b, strict=True)]
        return torch.stack(products) if len(products) > 1 else products[0][None]
    return a @ b


def _looked_into() -> bool:
    """Whether torch.func, forward differentiation or torch.jit.trace look at operators, and know PyTorch's alone."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0 or torch.jit.is_tracing()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, gelu: bool = False) -> Tensor:
    """torch.nn.functional.linear of x [..., K], and the exact GELU of it if asked for.

    Gradients are computed only for what needs them: a frozen weight costs nothing.
    """
    ours = taken(x) and not torch.is_autocast_enabled("cpu") and not _looked_into()
    if not (ours and x.ndim >= 2 and x.dtype == weight.dtype and x.shape[-1] == weight.shape[-1]):
        out = functional.linear(x, weight, bias)
        return functional.gelu(out) if gelu else out
    trained = torch.is_grad_enabled() and any(t.requires_grad for t in (x, weight, bias) if t is not None)
    if not trained and not torch.compiler.is_compiling():
        return _linear(x, weight, bias, gelu)  # an operator's call would cost as much as a small product
    out = _linear_op(_dense(x), weight, bias, gelu and not trained)  # with gradients, GELU needs what goes into it
    return functional.gelu(out) if gelu and trained else out


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    frozen = x.numel() and weight.numel() and not weight.requires_grad
    return _run(x, _packed(weight) if frozen else weight, bias, gelu)


_linear_op = torch.library.custom_op("clinvla_fast::linear", _linear, mutates_args=())


@_linear_op.register_fake
def _(x, weight, bias, gelu):
    return x.new_empty(*x.shape[:-1], len(weight))


class _Pack(NamedTuple):
    """A packed weight, where that lay when it was packed, and some of its elements as they were."""

    place: tuple
    elements: Tensor
    packed: Tensor


_packs: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _diagonal(weight: Tensor) -> Tensor:
    """Elements from the first row and column on, as many as heads fit into the longer side."""
    rows, columns = weight.shape
    count = min(-(-max(rows, columns) // _HEAD), rows, columns)
    down, right = weight.stride()
    return weight.as_strided((count,), (rows // count * down + columns // count * right,))


def _packed(weight: Tensor) -> Tensor:
    """A frozen weight as oneDNN wants it, packed once (again if it was written to); it goes when the weight goes.

    What is written through `.data` has no version: that is told by some of the elements, as by averages, a merged
    adapter or a head that is cut out, which change many.
    """
    version = 0 if weight.is_inference() else weight._version
    place, elements = (version, weight.data_ptr(), weight.dtype, weight.stride()), _diagonal(weight)
    known = _packs.get(weight)
    if known is None or known.place != place or not torch.equal(elements, known.elements):
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _ROWS)
        known = _packs[weight] = _Pack(place, elements.clone(), packed)
    return known.packed


def _save(ctx, inputs, output):
    x, weight, _, _ = inputs
    ctx.save_for_backward(x if weight.requires_grad else None, weight)


def _gradients(ctx, grad):
    x, weight = ctx.saved_tensors
    by_x, by_weight, by_bias, _ = ctx.needs_input_grad
    rows = _dense(grad.flatten(0, -2))
    return (
        _by_input_op(rows, weight).view(*grad.shape[:-1], weight.shape[1]) if by_x else None,
        over_rows(rows, x.flatten(0, -2), _by_input_op) if by_weight else None,
        rows.sum(0) if by_bias else None,
        None,
    )


_linear_op.register_autograd(_gradients, setup_context=_save)


@torch.library.custom_op("clinvla_fast::linear_backward", mutates_args=())
def _by_input_op(grad: Tensor, weight: Tensor) -> Tensor:
    """grad W for rows of grad."""
    return _run(grad, weight.mT, None)


@_by_input_op.register_fake
def _(grad, weight):
    return grad.new_empty(*grad.shape[:-1], weight.shape[1])


def _save_again(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _second_gradients(ctx, second):
    grad, weight = ctx.saved_tensors
    by_grad, by_weight = ctx.needs_input_grad
    second = _dense(second)
    return (
        _linear_op(second, weight, None, False) if by_grad else None,
        over_rows(grad, second, _by_input_op) if by_weight else None,
    )


_by_input_op.register_autograd(_second_gradients, setup_context=_save_again)


@register_flop_formula([torch.ops.clinvla_fast.linear, *([torch.ops.mkldnn._linear_pointwise] if _DTYPES else [])])
def _flops(x, weight, *_, out_shape=None, **__) -> int:
    """Two for each product of a row [..., K] with a weight [N, K]."""
    return 2 * torch.Size(x).numel() * weight[0]


@register_flop_formula(torch.ops.clinvla_fast.linear_backward)
def _backward_flops(grad, weight, out_shape=None, **_) -> int:
    return 2 * torch.Size(grad).numel() * weight[1]
