"""Attention of the towers: one function, three libraries, chosen by name.

    xformers    memory-efficient attention; packed sequences under a BlockDiagonalMask. On a GPU
    varlen      torch.nn.attention.varlen. On a GPU, in half precision
    sdpa        PyTorch's scaled_dot_product_attention, anywhere; packed sequences are padded for this product alone
    auto        the first of these that can run; said once in the log, with why others were refused

`CLINVLA_ATTENTION` sets it for a process, `use` for a block of code. An explicit choice never falls back.
"""

import logging
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..backend import BackendUnavailable, Choice
from .packing import Grid, Packing

KERNELS = ("xformers", "varlen", "sdpa")
_log = logging.getLogger("clinvla_fast")


_choice = Choice("attention", (*KERNELS, "auto"), "CLINVLA_ATTENTION")
use = _choice.use


@cache
def _refusal(kernel: str, device: str, dtype: torch.dtype) -> str:
    """Why a library cannot attend there; nothing if it can."""
    if kernel == "sdpa":
        return ""
    if device != "cuda":
        return f"it needs a GPU and the tensors are on {device}"
    if dtype == torch.float64 or (kernel == "varlen" and dtype == torch.float32):
        return f"it has no kernel for {dtype}"
    try:
        rows = torch.zeros(1, 8, 1, 64, device=device, dtype=dtype)
        _ON_GPU[kernel](rows, rows, rows, None)
    except ImportError as error:
        return f"it cannot be imported ({error})"
    except Exception as error:  # built for another GPU or another PyTorch, it may raise anything
        return f"it does not run here ({(str(error).splitlines() or [type(error).__name__])[0]})"
    return ""


@cache
def _choose(asked: str, device: str, dtype: torch.dtype) -> str:
    if asked != "auto":
        if reason := _refusal(asked, device, dtype):
            raise BackendUnavailable(f"{asked} attention was asked for, but {reason}: use another, or auto.")
        return asked
    refused = {}
    for kernel in KERNELS:
        if not (reason := _refusal(kernel, device, dtype)):
            why = "".join(f"; not {name}: {reason}" for name, reason in refused.items())
            _log.info("attention on %s in %s: %s%s", device, dtype, kernel, why)
            return kernel
        refused[kernel] = reason
    raise AssertionError("sdpa runs anywhere")


def check(device: str, dtype: torch.dtype) -> None:
    """Make sure, before there is anything to attend to, that the library asked for can.

    Raises:
        BackendUnavailable: as `attention`.
    """
    if _choice.current != "auto":
        _choose(_choice.current, device, dtype)


@torch.compiler.assume_constant_result
def _chosen(asked: str, device: str, dtype: torch.dtype) -> str:
    """The library that attends to tensors of this dtype on this type of device; logged once for each."""
    return _choose(asked, device, dtype)


def attention(query: Tensor, key: Tensor, value: Tensor, packing: Packing | None = None) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V, each sequence attending to itself.

    Args:
        query, key, value: [B, L, heads, d], B sequences of one length; or with a packing, [total, heads, d], sequences
            one after the other.
        packing: in a Grid, which has padding, SDPA attends whichever library is chosen: the others take no mask.

    Returns:
        As query.

    Raises:
        BackendUnavailable: the library asked for cannot run where the tensors are.
    """
    kernel = _chosen(_choice.current, query.device.type, query.dtype)
    if kernel == "sdpa" or isinstance(packing, Grid):
        return _sdpa(query, key, value, packing)
    return _ON_GPU[kernel](query, key, value, packing)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, packing: Packing | None) -> Tensor:
    if packing is not None and len(packing.mask) == 1 and not isinstance(packing, Grid):
        return _sdpa(query[None], key[None], value[None], None)[0]  # one sequence has no padding
    if packing is not None:
        query, key, value = (packing.pad(x) for x in (query, key, value))
    bias = None if packing is None else packing.bias(query.dtype)
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    if query.is_cpu and query.dtype == torch.bfloat16:
        out = _products(query, key, value, bias)
    else:
        out = scaled_dot_product_attention(query, key, value, attn_mask=bias)
    out = out.transpose(1, 2)
    return out if packing is None else packing.pack(out)


def _products(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    """Attention as two batched products: twice as fast as PyTorch's fused kernel where a CPU has bf16 instructions."""
    batch, heads, length, depth = query.shape
    query, key, value = (x.reshape(batch * heads, length, depth) for x in (query, key, value))
    bias = query.new_zeros(()) if bias is None else bias
    bias = bias.expand(batch, heads, 1, length).reshape(batch * heads, 1, length)
    weights = torch.baddbmm(bias, query, key.mT, alpha=depth**-0.5).softmax(-1)
    return torch.bmm(weights, value).unflatten(0, (batch, heads))


def _varlen(query: Tensor, key: Tensor, value: Tensor, packing: Packing | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    if packing is not None:
        starts, longest = packing.starts, packing.mask.shape[1]
        return varlen_attn(query, key, value, starts, starts, longest, longest)
    batch, length = query.shape[:2]
    starts = torch.arange(0, (batch + 1) * length, length, device=query.device, dtype=torch.int32)
    query, key, value = (x.flatten(0, 1) for x in (query, key, value))
    return varlen_attn(query, key, value, starts, starts, length, length).unflatten(0, (batch, length))


def _by_xformers(query: Tensor, key: Tensor, value: Tensor, packing: Packing | None) -> Tensor:
    return _xformers_op(query, key, value, None if packing is None else packing.lengths)


_ON_GPU = {"xformers": _by_xformers, "varlen": _varlen}


# xformers builds its mask from Python numbers, which torch.compile would compile for anew: an operator hides that. Its
# backward pass runs the forward pass again, as the shape of what xformers saves depends on the kernel that it picks.


def _xformers(query: Tensor, key: Tensor, value: Tensor, lengths: Tensor | None) -> Tensor:
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    if lengths is None:
        return memory_efficient_attention(query, key, value)
    mask = BlockDiagonalMask.from_seqlens([n for n in lengths.tolist() if n], device=query.device)
    return memory_efficient_attention(query[None], key[None], value[None], attn_bias=mask)[0]


_xformers_op = torch.library.custom_op("clinvla_fast::xformers_attention", _xformers, mutates_args=())


@_xformers_op.register_fake
def _(query, key, value, lengths):
    return torch.empty_like(query)


@torch.library.custom_op("clinvla_fast::xformers_attention_backward", mutates_args=())
def _xformers_backward_op(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, lengths: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = [x.detach().requires_grad_() for x in (query, key, value)]
    with torch.enable_grad():
        out = _xformers(*inputs, lengths)
    return torch.autograd.grad(out, inputs, grad)


@_xformers_backward_op.register_fake
def _(grad, query, key, value, lengths):
    return tuple(torch.empty_like(x) for x in (query, key, value))


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _gradients(ctx, grad):
    return *_xformers_backward_op(grad.contiguous(), *ctx.saved_tensors), None


_xformers_op.register_autograd(_gradients, setup_context=_save)
