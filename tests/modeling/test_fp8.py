"""FP8 layers on a CPU, which has PyTorch's scaled product too, only slowly."""

import copy

import pytest
import torch
from torch import nn

from clinvla_fast import ClinVLA, Recipe
from clinvla_fast.modeling.fp8 import Float8Linear, float8_refusal, to_float8
from clinvla_fast.modeling.frozen import freeze


def _layer(width, out, seed=0):
    torch.manual_seed(seed)
    layer = nn.Linear(width, out)
    freeze(layer, torch.bfloat16)
    return layer


@pytest.mark.parametrize("shape", [(1, 16, 16), (37, 128, 96), (5, 768, 3072)])
def test_results_and_input_gradients(shape):
    rows, width, out = shape
    layer = _layer(width, out)
    x = torch.randn(2, rows, width).bfloat16().requires_grad_()
    grad = torch.randn(2, rows, out).bfloat16()
    right = layer(x.double().to(torch.bfloat16))
    (expected,) = torch.autograd.grad(right, x, grad)
    assert to_float8(layer) == 1 and type(layer) is Float8Linear
    actual = layer(x)
    (gradient,) = torch.autograd.grad(actual, x, grad)
    for a, b in ((actual, right), (gradient, expected)):
        assert a.dtype == torch.bfloat16 and a.shape == b.shape
        assert (a.double() - b.double()).norm() < 0.05 * b.double().norm()  # e4m3 has three bits after the point


def test_large_and_small_channels_keep_their_accuracy():
    layer = _layer(64, 32)
    layer.weight.mul_(torch.logspace(-6, 6, 32)[:, None])
    x = torch.randn(9, 64).bfloat16() * torch.logspace(-3, 3, 9)[:, None].bfloat16()
    layer.bias.zero_()
    right = x.double() @ layer.weight.double().mT
    to_float8(layer)
    error = (layer(x).double() - right).norm() / right.norm()
    rows = (layer(x).double() / right - 1).abs().median(1).values  # typical error of each row's entries
    assert error < 0.05 and rows.max() < 0.1


def test_what_stays():
    layer = _layer(24, 16)
    assert to_float8(layer) == 0 and type(layer) is nn.Linear
    with pytest.raises(ValueError, match=r"is trained or torch\.float32"):
        to_float8(nn.Linear(16, 16))


def test_zeros_and_no_rows():
    layer = _layer(32, 16)
    to_float8(layer)
    torch.testing.assert_close(layer(torch.zeros(3, 32).bfloat16()), layer.bias.expand(3, -1))


def test_embeddings_stay_close(tiny_towers, make_batch, shake):
    torch.manual_seed(0)
    model = ClinVLA(*tiny_towers.values(), Recipe(width=24, bottleneck=8), torch.bfloat16)
    shake(model)
    other = copy.deepcopy(model)
    assert to_float8(other.vision.vit) and to_float8(other.text.bert)
    batch = make_batch([[1, 0], [1, 1], [0, 1]], [9, 4, 7])
    with torch.no_grad():
        a, b = model(batch), other(batch)
    for side in ("image_global", "text_global"):
        assert torch.cosine_similarity(getattr(a, side), getattr(b, side)).min() > 0.995  # 24 wide: little to average
    other.objective(other(batch, mask_seed=0))["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in other.trainable().values())


def test_where_it_can_run():
    assert "the device is cpu" in float8_refusal(torch.device("cpu"))
