"""ALTA's blocks against their formulas, written out in float64, and adapters that are new or take one place.

A(z) = U GELU(D z). Image tower: x += a + A_attn(a), a = attn(LN1 x); x += mlp(LN2 x) + A_mlp(LN2 x) / 2.
Report tower: h = LN(attn(x) + x), h += A_attn(h); the output is LN(ffn(h) + h) + A_mlp(h) / 2.
"""

import math

import pytest
import torch
from torch import Tensor, nn

from clinvla_fast import ClinVLA, Recipe
from clinvla_fast.modeling.adapters import TransformerAdapt
from clinvla_fast.modeling.packing import Packing
from clinvla_fast.modeling.text import text_block
from clinvla_fast.modeling.towers import make_tiny_text, make_tiny_vision
from clinvla_fast.modeling.vision import vision_block

RECIPE = Recipe(adapters=("attention", "mlp"), bottleneck=24)
HEADS, WIDTH = 4, 128
LENGTHS = [5, 1, 9, 2]


def _linear(x: Tensor, layer: nn.Linear) -> Tensor:
    return x @ layer.weight.T + layer.bias


def _gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def _norm(x: Tensor, layer: nn.LayerNorm) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + layer.eps).sqrt() * layer.weight + layer.bias


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Of one sequence [L, width], head by head."""
    found, size = [], WIDTH // HEADS
    for head in range(HEADS):
        at = slice(head * size, (head + 1) * size)
        weights = (q[:, at] @ k[:, at].T / math.sqrt(size)).exp()
        found.append(weights / weights.sum(1, keepdim=True) @ v[:, at])
    return torch.cat(found, 1)


def _adapter(z: Tensor, bottleneck: nn.Module) -> Tensor:
    return _linear(_gelu(_linear(z, bottleneck.down)), bottleneck.up)


def _vision_by_hand(block: nn.Module, adapt: TransformerAdapt, x: Tensor) -> Tensor:
    out = []
    for tokens in x:
        a = _linear(_attention(*_linear(_norm(tokens, block.norm1), block.attn.qkv).chunk(3, 1)), block.attn.proj)
        tokens = tokens + a + _adapter(a, adapt.attention)
        z = _norm(tokens, block.norm2)
        out.append(tokens + _linear(_gelu(_linear(z, block.mlp.fc1)), block.mlp.fc2) + _adapter(z, adapt.mlp) / 2)
    return torch.stack(out)


def _text_by_hand(layer: nn.Module, adapt: TransformerAdapt, x: Tensor) -> Tensor:
    own, after, out = layer.attention.self, layer.attention.output, []
    for words in x.split(LENGTHS):
        a = _linear(_attention(*(_linear(words, p) for p in (own.query, own.key, own.value))), after.dense)
        h = _norm(a + words, after.LayerNorm)
        h = h + _adapter(h, adapt.attention)
        ffn = _linear(_gelu(_linear(h, layer.intermediate.dense)), layer.output.dense)
        out.append(_norm(ffn + h, layer.output.LayerNorm) + _adapter(h, adapt.mlp) / 2)
    return torch.cat(out)


class _Block(nn.Module):
    """A tower's block and its adapters, in float64, norms and biases random as well."""

    def __init__(self, kind: str, new: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.packing = kind, Packing.of(torch.tensor(LENGTHS), "cpu")
        tower = make_tiny_vision().vit.blocks if kind == "vision" else make_tiny_text(60).bert.encoder.layer
        self.block = tower[1].eval()
        for p in self.block.parameters():
            nn.init.normal_(p, mean=float(p.ndim == 1), std=0.2)
        self.adapt = TransformerAdapt(WIDTH)
        self.adapt.add(RECIPE)
        if not new:
            for p in self.adapt.parameters():
                nn.init.normal_(p, std=0.2)
        self.double()
        self.x = torch.randn((3, 7, WIDTH) if kind == "vision" else (sum(LENGTHS), WIDTH), dtype=torch.float64)

    def ours(self, x: Tensor, adapt: TransformerAdapt) -> Tensor:
        if self.kind == "vision":
            return vision_block(self.block, adapt, x)
        return text_block(self.block, adapt, x, self.packing)

    def by_hand(self, x: Tensor, adapt: TransformerAdapt) -> Tensor:
        return (_vision_by_hand if self.kind == "vision" else _text_by_hand)(self.block, adapt, x)


@pytest.mark.parametrize("kind", ["vision", "text"])
def test_blocks_against_their_formulas(kind):
    """Outputs, and gradients of all that goes in: the input, the block's weights and the adapters'."""
    block, found = _Block(kind), []
    weights = torch.randn(block.x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for run in (block.ours, block.by_hand):
        x = block.x.clone().requires_grad_()
        out = run(x, block.adapt)
        found.append((out, *torch.autograd.grad((out * weights).sum(), [x, *block.parameters()])))
    for ours, expected, name in zip(*found, ["output", "x", *(n for n, _ in block.named_parameters())], strict=True):
        # an attention's keys have a bias that changes nothing: its gradient is rounding
        atol = 1e-10 * max(1e-2, expected.abs().max().item())
        torch.testing.assert_close(ours, expected, rtol=0, atol=atol, msg=name)
    assert all(p.grad is None for p in block.parameters()) and found[0][0].std() > 0.5


@pytest.mark.parametrize("kind", ["vision", "text"])
@torch.no_grad()
def test_each_adapter_counts(kind):
    block = _Block(kind)
    whole = block.ours(block.x, block.adapt)
    for name in ("attention", "mlp"):
        alone = TransformerAdapt(WIDTH)
        setattr(alone, name, getattr(block.adapt, name))
        assert (block.ours(block.x, alone) - whole).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["vision", "text"])
@torch.no_grad()
def test_new_adapters_change_nothing_in_a_block(kind):
    block = _Block(kind, new=True)
    out, plain = block.ours(block.x, block.adapt), block.ours(block.x, TransformerAdapt(WIDTH))
    torch.testing.assert_close(out, plain, rtol=0, atol=1e-12)
    if kind == "vision":  # timm's own block
        torch.testing.assert_close(out, block.block(block.x), rtol=0, atol=1e-12)


@torch.no_grad()
def test_new_adapters_change_nothing_in_a_model(tiny_towers, make_batch):
    batch, outputs = make_batch([[1, 0, 1, 0], [0, 1, 0, 0]], [7, 4]), []
    for adapters in (RECIPE.adapters, ()):
        model = ClinVLA(**tiny_towers, recipe=Recipe(adapters=adapters, bottleneck=24)).double()
        assert (model.vision.adapts[0].mlp is None) == (not adapters)
        outputs.append((model.image_features(batch), model.text_features(batch)))
    for new, none in zip(*outputs, strict=True):
        torch.testing.assert_close(new, none, rtol=0, atol=1e-12)


@pytest.mark.parametrize("other", ["language", "task"])
def test_adapters_that_take_one_place(tiny_towers, other):
    with pytest.raises(ValueError, match=f"adapters are mlp, {other}: mlp takes the place of language and task"):
        ClinVLA(**tiny_towers, recipe=Recipe(adapters=("mlp", other)))
