import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

from clinvla_fast import ops

# Algorithm 1 of ClinVLA in NumPy, a row at a time.


def _mlp(x, p):
    down_weight, down_bias, up_weight, up_bias = (t.double().numpy() for t in p)
    return up_weight @ np.maximum(down_weight @ x + down_bias, 0) + up_bias


def _forward(row, f, g):
    half = len(row) // 2
    first = _mlp(row[half:], f) + row[:half]
    return np.concatenate([first, _mlp(first, g) + row[half:]])


def _inverse(row, f, g):
    half = len(row) // 2
    second = row[half:] - _mlp(row[:half], g)
    return np.concatenate([row[:half] - _mlp(second, f), second])


def _random(random_bottleneck, shape, inner, seed=0, dtype=torch.float64):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    half = shape[-1] // 2
    return x, random_bottleneck(half, inner, seed + 1, dtype), random_bottleneck(half, inner, seed + 2, dtype)


@pytest.mark.parametrize(("shape", "inner"), [((1, 2), 1), ((7, 12), 3), ((3, 5, 44), 11), ((1, 768), 192)])
@pytest.mark.parametrize("inverse", [False, True])
def test_formula(random_bottleneck, shape, inner, inverse):
    x, f, g = _random(random_bottleneck, shape, inner)
    rows = x.numpy().reshape(-1, shape[-1])
    expected = np.stack([(_inverse if inverse else _forward)(row, f, g) for row in rows]).reshape(shape)
    np.testing.assert_allclose(ops.invertible_adapter(x, f, g, inverse).numpy(), expected, rtol=1e-10, atol=1e-8)


@given(rows=st.integers(1, 9), half=st.integers(1, 40), inner=st.integers(1, 30), seed=st.integers(0, 99))
def test_round_trip(rows, half, inner, seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = (inner, half), (inner,), (half, inner), (half,)
    f, g = (ops.Bottleneck(*(torch.randn(s, generator=generator) * 0.3 for s in shapes)) for _ in range(2))
    x = torch.randn(rows, 2 * half, generator=generator)
    y = ops.invertible_adapter(x, f, g)
    scale = max(1.0, y.abs().max().item())
    torch.testing.assert_close(ops.invertible_adapter(y, f, g, inverse=True), x, rtol=0, atol=1e-5 * scale)
    other_way = ops.invertible_adapter(x, f, g, inverse=True)
    scale = max(1.0, other_way.abs().max().item())
    torch.testing.assert_close(ops.invertible_adapter(other_way, f, g), x, rtol=0, atol=1e-5 * scale)


def test_order_of_the_halves_matters(random_bottleneck):
    x, f, g = _random(random_bottleneck, (3, 8), 2)
    swapped = ops.invertible_adapter(x, g, f)
    assert not torch.allclose(swapped, ops.invertible_adapter(x, f, g))


def test_no_rows(random_bottleneck):
    x, f, g = _random(random_bottleneck, (0, 12), 3)
    for inverse in (False, True):
        assert ops.invertible_adapter(x, f, g, inverse).shape == (0, 12)


@pytest.mark.parametrize("inverse", [False, True])
def test_gradients(random_bottleneck, inverse):
    x, f, g = _random(random_bottleneck, (3, 10), 3)
    leaves = [t.requires_grad_() for t in (x, *f, *g)]
    assert gradcheck(
        lambda x, *p: ops.invertible_adapter(x, ops.Bottleneck(*p[:4]), ops.Bottleneck(*p[4:]), inverse), leaves
    )
