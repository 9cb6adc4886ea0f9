"""FP8 layers on a CPU, which has PyTorch's scaled product too, only slowly."""

import copy

import pytest
import torch
from torch import nn

from clinvla_fast import ClinVLA, Recipe
from clinvla_fast.modeling.fp8 import Float8Linear, float8_refusal, quantise, to_float8
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
    to_float8(layer)
    assert type(layer) is Float8Linear
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


def test_a_trained_weight_is_refused():
    with pytest.raises(ValueError, match=r"is trained or torch\.float32"):
        to_float8(nn.Linear(16, 16))


def test_zeros_and_no_rows():
    layer = _layer(32, 16)
    to_float8(layer)
    torch.testing.assert_close(layer(torch.zeros(3, 32).bfloat16()), layer.bias.expand(3, -1))


def _tower():
    """Layers whose float8 selves differ in what they do to the features; the last is too odd."""
    tower = nn.Sequential(*(nn.Linear(32, 32) for _ in range(6)), nn.Linear(32, 24), nn.Linear(24, 32))
    torch.manual_seed(0)
    for i, layer in enumerate(tower):
        nn.init.normal_(layer.weight, std=10.0**-i if i < 6 else 0.1)
    freeze(tower, torch.bfloat16)
    return tower


def _added(tower, x):
    """Each layer's part of the features, the first the greatest."""
    return sum(layer(x) for layer in tower[:6]) + tower[7](tower[6](x))


@pytest.mark.parametrize(("least", "few", "many"), [(0.0, 6, 6), (1 - 1e-6, 1, 5), (1.1, 0, 0)])
def test_as_many_layers_as_leave_the_features_close(least, few, many):
    tower, x = _tower(), torch.randn(40, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    right = _added(tower, x)
    chosen, of = quantise(tower, lambda: _added(tower, x), least)
    assert of == 6 and few <= chosen <= many
    fast = [i for i, layer in enumerate(tower) if type(layer) is Float8Linear]
    assert len(fast) == chosen and fast == list(range(6 - chosen, 6))  # those that matter least
    if chosen < 6:
        centred = (right - right.mean(0)).float(), (_added(tower, x) - _added(tower, x).mean(0)).float()
        assert torch.cosine_similarity(*centred).mean() > min(least, 1) - 1e-5
    if not chosen:
        assert torch.equal(_added(tower, x), right) and list(tower.state_dict()) == list(_tower().state_dict())


def test_features_that_are_no_numbers_put_nothing_in_float8():
    tower, x = _tower(), torch.randn(40, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    nan = torch.tensor(float("nan"))
    assert quantise(tower, lambda: _added(tower, x) * (nan if Float8Linear in map(type, tower) else 1)) == (0, 6)


def test_one_study_tells_nothing():
    with pytest.raises(ValueError, match="1 studies: expected at least 2"):
        quantise(_layer(16, 16), lambda: torch.zeros(1, 16))


def test_a_model_keeps_its_embeddings_and_trains(tiny_towers, make_batch, shake):
    torch.manual_seed(0)
    model = ClinVLA(*tiny_towers.values(), Recipe(width=24, bottleneck=8), torch.bfloat16)
    shake(model)
    other = copy.deepcopy(model)
    batch = make_batch([[1, 0], [1, 1], [0, 1], [1, 0]], [9, 4, 7, 12])
    found = [
        quantise(other.vision.vit, lambda: other.image_features(batch)),
        quantise(other.text.bert, lambda: other.text_features(batch)),
    ]
    assert all(chosen > 0 for chosen, _ in found)
    with torch.no_grad():
        a, b = model(batch), other(batch)
    for side in ("image_global", "text_global"):
        features = (getattr(e, side) - getattr(e, side).mean(0) for e in (a, b))
        assert torch.cosine_similarity(*features).mean() > 0.998  # 24 wide: little to average
    other.objective(other(batch, mask_seed=0))["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in other.trainable().values())


def test_where_it_can_run():
    assert "the device is cpu" in float8_refusal(torch.device("cpu"))
