import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

from clinvla_fast import ops


def _plain(image, text, scale):
    """Symmetric InfoNCE, number by number."""
    unit = [[[v / math.sqrt(sum(u * u for u in row)) for v in row] for row in x.tolist()] for x in (image, text)]
    logits = [[scale * sum(a * b for a, b in zip(i, t, strict=True)) for t in unit[1]] for i in unit[0]]
    total = 0.0
    for k in range(len(logits)):
        for line in (logits[k], [row[k] for row in logits]):
            top = max(line)
            total += top + math.log(sum(math.exp(v - top) for v in line)) - logits[k][k]
    return total / (2 * len(logits))


def _random(batch, width, seed=0, dtype=torch.float64):
    return torch.randn(2, batch, width, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@given(batch=st.integers(1, 13), width=st.integers(2, 33), scale=st.floats(0.1, 100), seed=st.integers(0, 99))
def test_formula(batch, width, scale, seed):
    image, text = _random(batch, width, seed)
    loss = ops.contrastive(image, text, torch.tensor(scale, dtype=torch.float64))
    assert loss.item() == pytest.approx(_plain(image, text, scale), rel=1e-9, abs=1e-11)


def test_fp32_at_the_largest_scale():
    image, text = _random(37, 128, dtype=torch.float32)
    loss = ops.contrastive(image, text, torch.tensor(100.0))
    assert loss.item() == pytest.approx(_plain(image, text, 100.0), rel=1e-5)


def test_lengths_do_not_matter():
    image, text = _random(5, 7)
    scale = torch.tensor(14.0, dtype=torch.float64)
    longer = ops.contrastive(image * torch.arange(1, 6)[:, None], text * 1e-3, scale)
    torch.testing.assert_close(longer, ops.contrastive(image, text, scale))


def test_known_values():
    scale = torch.tensor(3.0)
    same = torch.ones(8, 4)
    assert ops.contrastive(same, same, scale).item() == pytest.approx(math.log(8), rel=1e-6)  # tells nothing apart
    apart = torch.eye(8)
    assert ops.contrastive(apart, apart, scale).item() == pytest.approx(math.log(1 + 7 * math.exp(-3)), rel=1e-6)
    assert ops.contrastive(same[:1], -same[:1], scale).item() == 0  # one pair has no negatives


def test_an_empty_batch_is_nan():
    assert ops.contrastive(torch.empty(0, 4), torch.empty(0, 4), torch.tensor(1.0)).isnan()


def test_gradients():
    image, text = _random(5, 3)
    leaves = [x.requires_grad_() for x in (image.clone(), text.clone(), torch.tensor(7.0, dtype=torch.float64))]
    assert gradcheck(ops.contrastive, leaves)
