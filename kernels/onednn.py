"""Matrix products on a CPU through oneDNN, which runs them at the machine's rate where PyTorch's default does not.

PyTorch hands float32 products to MKL; on AMD processors that leaves half of AVX-512 unused.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

_WORTH_A_CALL = 10_000_000  # FLOPs: oneDNN's call of 20 microseconds is then made up for
_linear_op = torch.ops.mkldnn._linear_pointwise


def _taken(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.is_cpu and torch.backends.mkldnn.is_available()


def matmul(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a [M, K] times b [K, N], and bias [N]: [M, N]. b is as good transposed; a is copied unless its rows are dense."""
    return _linear_op(a, b.mT, bias, "none", [], "") if _taken(a) else torch.nn.functional.linear(a, b.mT, bias)


def bmm(a: Tensor, b: Tensor) -> Tensor:
    """a [B, M, K] times b [B, K, N]: [B, M, N], one after the other where that is worth a call each."""
    if _taken(a) and 2 * a.shape[1] * a.shape[2] * b.shape[2] >= _WORTH_A_CALL:
        return torch.stack([matmul(x, y) for x, y in zip(a, b, strict=True)])
    return a @ b


@register_flop_formula(_linear_op)
def _flops(x, weight, *_, out_shape=None, **__) -> int:
    """Two for each product of a row [..., K] with a weight [N, K]."""
    return 2 * torch.Size(x).numel() * weight[0]
