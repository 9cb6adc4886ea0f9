"""FP8 for frozen linear layers: weights quantised once a channel, activations a row as they come.

PyTorch's scaled matrix product multiplies float8 (e4m3) and sums in float32. The gradient of the input contracts over
the channels that the weight's scales belong to, so the weight is kept a second time, transposed and scaled by its other
side: two float8 copies take what one in bfloat16 takes.
"""

from bisect import bisect
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

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


def to_float8(layer: nn.Linear) -> None:
    """Quantise a frozen linear layer in place.

    Raises:
        ValueError: if its weight is trained, or is no bfloat16.
    """
    if isinstance(layer.weight, nn.Parameter) or layer.weight.dtype != torch.bfloat16:
        raise ValueError(f"a weight {tuple(layer.weight.shape)} is trained or {layer.weight.dtype}: expected a "
                         "frozen tower in bfloat16 (see freeze).")  # fmt: skip
    layer.transposed, layer.transposed_scale = map(nn.Buffer, _quantised(layer.weight.mT.contiguous()))
    layer.weight, layer.scale = map(nn.Buffer, _quantised(layer.weight))
    layer.__class__ = Float8Linear


def _linears(tower: nn.Module) -> list[nn.Linear]:
    """The linear layers that can be in float8: those of odd widths cannot."""
    layers = [m for m in tower.modules() if type(m) in (nn.Linear, FastLinear)]
    return [m for m in layers if not (m.in_features % _MULTIPLE or m.out_features % _MULTIPLE)]


class _Layer:
    """A linear layer, to be switched between float8 and what it was."""

    def __init__(self, layer: nn.Linear):
        self._layer, self._kind, self._weight = layer, type(layer), layer.weight

    def on(self) -> None:
        to_float8(self._layer)

    def off(self) -> None:
        for name in ("transposed", "transposed_scale", "scale"):
            delattr(self._layer, name)
        self._layer.weight = nn.Buffer(self._weight)
        self._layer.__class__ = self._kind


@torch.no_grad()
def quantise(tower: nn.Module, features: Callable[[], Tensor], least: float = 0.9992) -> tuple[int, int]:
    """Put as many linear layers of a frozen bfloat16 tower in float8 as leave its features where they are.

    All of them, where that keeps the mean cosine between the features and their bfloat16 selves at `least`; else the
    ones that alone move them least. From both the mean over studies is taken off first: what all studies share is most
    of a CLS token, and a head looks at the rest.

    Args:
        features: runs the tower on always the same batch: [n, width], n at least 2.

    Returns:
        How many layers are in float8, and of how many that could be.

    Raises:
        ValueError: if a layer's weight is trained, or is no bfloat16; or for fewer than two studies.
    """
    right = _centred(features())
    layers = [_Layer(layer) for layer in _linears(tower)]

    def closeness(chosen: list[_Layer]) -> float:
        """With these layers in float8, and no others."""
        for layer in chosen:
            layer.on()
        found = cosine_similarity(_centred(features()), right).mean().item()
        for layer in chosen:
            layer.off()
        return found

    enough = len(layers)
    if not closeness(layers) >= least:  # NaN is far from everything
        layers.sort(key=lambda layer: closeness([layer]), reverse=True)
        enough = bisect(range(1, len(layers)), False, key=lambda n: not closeness(layers[:n]) >= least)
    for layer in layers[:enough]:
        layer.on()
    return enough, len(layers)


def _centred(features: Tensor) -> Tensor:
    if len(features) < 2:
        raise ValueError(f"{len(features)} studies: expected at least 2, to see what tells them apart.")
    features = features.float()  # before the mean: what is left of it is small
    return features - features.mean(0)


def float8_refusal(device: torch.device) -> str:
    """Why a device has no fast FP8 products; nothing if it has."""
    if device.type != "cuda":
        return f"FP8 needs a GPU and the device is {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    return "" if (major, minor) >= (8, 9) else f"FP8 needs compute capability 8.9, and this GPU has {major}.{minor}"
