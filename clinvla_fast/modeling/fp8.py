"""FP8 for frozen linear layers: weights quantised once a channel, activations a row as they come.

PyTorch's scaled matrix product multiplies float8 (e4m3) and sums in float32. The gradient of the input contracts over
the channels that the weight's scales belong to, so the weight is kept a second time, transposed and scaled by its other
side: two float8 copies take what one in bfloat16 takes.
"""

import torch
from torch import Tensor, nn

from ..twins import FastLinear

_FLOAT8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(_FLOAT8).max
_MULTIPLE = 16  # what the scaled product asks of both widths


def _quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [n, K] in float8, and what to multiply each by: float32 [n, 1]."""
    scale = x.abs().amax(1, keepdim=True).float().clamp(min=1e-12) / _LARGEST
    return (x.float() / scale).to(_FLOAT8), scale


def _product(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., K] times weight^T, float8 [N, K] with scales [N, 1]: [..., N] in bfloat16."""
    rows, scales = _quantised(x.flatten(0, -2))
    out = torch._scaled_mm(
        rows, weight.mT, scale_a=scales, scale_b=scale.mT, bias=bias, out_dtype=torch.bfloat16, use_fast_accum=True
    )
    return out.unflatten(0, x.shape[:-1])


class _Float8(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, scale, transposed, transposed_scale, bias):
        ctx.save_for_backward(transposed, transposed_scale)
        return _product(x, weight, scale, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return _product(grad, *ctx.saved_tensors, None), None, None, None, None, None


class Float8Linear(nn.Linear):
    """A frozen linear layer: bfloat16 [..., K] to [..., N]."""

    def forward(self, x: Tensor) -> Tensor:
        return _Float8.apply(x, self.weight, self.scale, self.transposed, self.transposed_scale, self.bias)


def to_float8(tower: nn.Module) -> int:
    """Quantise the linear layers of a frozen bfloat16 tower in place; those of odd widths stay. Return how many.

    Raises:
        ValueError: if a layer's weight is trained, or is no bfloat16.
    """
    layers = [m for m in tower.modules() if type(m) in (nn.Linear, FastLinear)]
    layers = [m for m in layers if not (m.in_features % _MULTIPLE or m.out_features % _MULTIPLE)]
    for layer in layers:
        if isinstance(layer.weight, nn.Parameter) or layer.weight.dtype != torch.bfloat16:
            raise ValueError(f"a weight {tuple(layer.weight.shape)} is trained or {layer.weight.dtype}: expected a "
                             "frozen tower in bfloat16 (see freeze).")  # fmt: skip
        layer.transposed, layer.transposed_scale = map(nn.Buffer, _quantised(layer.weight.mT.contiguous()))
        layer.weight, layer.scale = map(nn.Buffer, _quantised(layer.weight))
        layer.__class__ = Float8Linear
    return len(layers)


def float8_refusal(device: torch.device) -> str:
    """Why a device has no fast FP8 products; nothing if it has."""
    if device.type != "cuda":
        return f"FP8 needs a GPU and the device is {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    return "" if (major, minor) >= (8, 9) else f"FP8 needs compute capability 8.9, and this GPU has {major}.{minor}"
