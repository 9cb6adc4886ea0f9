import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from clinvla_fast import ops

# The formulas of ClinVLA, section 3.2, in NumPy, a row at a time.


def _adapter(x, p):
    down_weight, down_bias, up_weight, up_bias = (t.numpy() for t in p)
    return up_weight @ np.maximum(down_weight @ x + down_bias, 0) + up_bias


def _layer_norm(x, weight, bias, eps):
    return (x - x.mean()) / np.sqrt(((x - x.mean()) ** 2).mean() + eps) * weight + bias


def _pre_norm(r, x, language, task):
    la = _adapter(x + r, language) + r
    return x + _adapter(la, task) + r


def _post_norm(r, x, language, task, weight, bias, eps):
    h = _layer_norm(r + x, weight, bias, eps)
    la = _adapter(h, language) + r
    ta = _adapter(la, task) + r
    return _layer_norm(ta + x, weight, bias, eps)


@pytest.fixture
def parts(random_bottleneck):
    def make(shape, inner):
        generator = torch.Generator().manual_seed(3)
        ffn, residual = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
        weight, bias = torch.randn(2, shape[-1], generator=generator, dtype=torch.float64)
        adapters = [random_bottleneck(shape[-1], inner, seed) for seed in (1, 2)]
        return ffn, residual, *adapters, weight, bias

    return make


SHAPES = [((1, 3), 1), ((7, 13), 5), ((2, 5, 36), 7), ((1, 768), 64)]


def _rows(function, ffn, residual, *rest):
    flat = (t.numpy().reshape(-1, t.shape[-1]) for t in (ffn, residual))
    return np.stack([function(r, x, *rest) for r, x in zip(*flat, strict=True)]).reshape(ffn.shape)


@pytest.mark.parametrize(("shape", "inner"), SHAPES)
def test_pre_norm(parts, shape, inner):
    ffn, residual, language, task, *_ = parts(shape, inner)
    expected = _rows(_pre_norm, ffn, residual, language, task)
    out = ops.transformer_adapt(ffn, residual, language, task)
    np.testing.assert_allclose(out.numpy(), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("shape", "inner"), SHAPES)
@pytest.mark.parametrize("eps", [1e-12, 0.3])
def test_post_norm(parts, shape, inner, eps):
    ffn, residual, language, task, weight, bias = parts(shape, inner)
    expected = _rows(_post_norm, ffn, residual, language, task, weight.numpy(), bias.numpy(), eps)
    out = ops.transformer_adapt(ffn, residual, language, task, weight, bias, eps)
    np.testing.assert_allclose(out.numpy(), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("post_norm", [False, True])
def test_one_adapter_alone(parts, post_norm):
    ffn, residual, adapter, _, weight, bias = parts((4, 9), 3)
    norm = (weight, bias, 1e-5) if post_norm else ()

    def expected(r, x):
        normed = (lambda y: _layer_norm(y, weight.numpy(), bias.numpy(), 1e-5)) if post_norm else (lambda y: y)
        return normed(_adapter(normed(r + x), adapter) + r + x)

    for pair in ((adapter, None), (None, adapter)):
        out = ops.transformer_adapt(ffn, residual, *pair, *norm)
        np.testing.assert_allclose(out.numpy(), _rows(expected, ffn, residual), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("post_norm", [False, True])
def test_without_effect_it_is_the_frozen_block(parts, post_norm):
    ffn, residual, language, task, weight, bias = parts((4, 9), 3)
    norm = (weight, bias, 1e-5) if post_norm else ()
    frozen = ffn + residual
    if post_norm:
        frozen = torch.nn.functional.layer_norm(frozen, (9,), weight, bias, 1e-5)
    zeroed = [a._replace(up_weight=a.up_weight * 0, up_bias=a.up_bias * 0) for a in (language, task)]
    for pair in (zeroed, (None, None)):
        torch.testing.assert_close(ops.transformer_adapt(ffn, residual, *pair, *norm), frozen, rtol=0, atol=1e-12)


def test_no_rows(parts):
    ffn, residual, language, task, weight, bias = parts((0, 9), 3)
    assert ops.transformer_adapt(ffn, residual, language, task, weight, bias).shape == (0, 9)
    assert ops.transformer_adapt(ffn, residual, language, task).shape == (0, 9)


@pytest.mark.parametrize("post_norm", [False, True])
def test_gradients(parts, post_norm):
    ffn, residual, language, task, weight, bias = parts((3, 7), 2)
    leaves = [t.requires_grad_() for t in (ffn, residual, *language, *task, *((weight, bias) if post_norm else ()))]

    def function(ffn, residual, *p):
        return ops.transformer_adapt(ffn, residual, ops.Bottleneck(*p[:4]), ops.Bottleneck(*p[4:8]), *p[8:])

    assert gradcheck(function, leaves)
