"""Counted parameters and operations against closed forms, at 2 operations a multiply-add."""

from dataclasses import dataclass

import pytest
import timm
import torch
from timm.models import save_for_hf
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel

from clinvla_fast import ClinVLA, Recipe, cost
from clinvla_fast.modeling import attention
from clinvla_fast.modeling.masked_modeling import MaskedModeling
from clinvla_fast.modeling.text import TextTower
from clinvla_fast.modeling.towers import make_tiny_text, make_tiny_vision, save_text
from clinvla_fast.presets import TowerTraining
from clinvla_fast.pretraining import Towers


@dataclass(frozen=True)
class Sizes:
    """Both towers have this width; pixels: of a patch, one channel: normalisation and gray to RGB are folded."""

    width: int
    shared: int
    bottleneck: int
    pixels: int
    patches: int
    kept: int
    vision_blocks: int
    text_blocks: int


TINY = Sizes(width=128, shared=24, bottleneck=20, pixels=256, patches=64, kept=16, vision_blocks=3, text_blocks=2)
BASE = Sizes(width=768, shared=128, bottleneck=64, pixels=256, patches=196, kept=49, vision_blocks=12, text_blocks=12)


def _blocks(s, sequences, tokens, depth):
    """Of `sequences` of `tokens` each: queries, keys, values, projection; two attention products; MLP; adapters."""
    a_token = (
        2 * (3 + 1) * s.width**2 + 2 * 2 * tokens * s.width + 2 * 2 * 4 * s.width**2 + 2 * 4 * s.width * s.bottleneck
    )
    invertible = 2 * 2 * 2 * (s.width // 2) * (s.width // 4)
    return sequences * tokens * (depth * a_token + invertible)


def _heads(s, rows):
    return 2 * rows * (s.width * s.shared + s.shared**2)


def _forward(s, views, tokens, masked=False):
    patches = s.kept if masked else s.patches
    embed = 2 * views * patches * s.pixels * s.width
    vision = embed + _blocks(s, views, 1 + patches, s.vision_blocks) + _heads(s, 1 + views * patches)
    return vision + _blocks(s, 1, tokens, s.text_blocks) + _heads(s, 1 + tokens)


@pytest.mark.parametrize("views", [1, 2, 4])
@pytest.mark.parametrize("tokens", [3, 37])
@pytest.mark.parametrize("masked", [False, True])
def test_forward_flops(tiny_model, views, tokens, masked):
    assert cost.forward_flops(tiny_model, views, tokens, masked=masked) == _forward(TINY, views, tokens, masked)


def test_masking_and_fewer_views_save_what_they_promise(tiny_model):
    whole, masked = (cost.forward_flops(tiny_model, 2, 20, masked=m) for m in (False, True))
    text = _blocks(TINY, 1, 20, 2) + _heads(TINY, 21)
    assert masked < whole
    assert (masked - text) / (whole - text) < 0.27  # a quarter of the patches, a CLS token, less attention


@pytest.mark.parametrize("mask_seed", [None, 0])
def test_an_absent_view_costs_nothing(tiny_model, make_batch, mask_seed):
    def count(present):
        batch = make_batch(present, [12])
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            tiny_model(batch, mask_seed)
        return counter.get_total_flops()

    masked = mask_seed is not None
    assert count([[1, 0, 1, 0]]) == count([[0, 1, 0, 1]]) == count([[1, 1]]) == _forward(TINY, 2, 12, masked)
    assert count([[0, 0, 0, 1]]) == count([[1]]) == _forward(TINY, 1, 12, masked)


def test_a_training_step(tiny_model):
    """Frozen weights take no gradient: a step is nearer to two forwards than to end-to-end training's three."""
    forward, step = cost.forward_flops(tiny_model, 2, 20, masked=True), cost.step_flops(tiny_model, 2, 20)
    assert 2 * forward < step < 2.5 * forward
    assert all(p.grad is None for p in tiny_model.parameters())


@pytest.mark.parametrize("towers", [("vision", "text"), ("vision",), ("text",)])
def test_flops_of_making_towers_go_by_what_a_batch_holds(tokenizer, make_batch, towers):
    torch.manual_seed(0)
    made = {"vision": make_tiny_vision(), "text": make_tiny_text(len(tokenizer))}
    parts = [made[kind] if kind in towers else None for kind in made]
    stage = Towers(MaskedModeling(*parts, tokenizer.mask_token_id), TowerTraining(), 0)
    flops = cost.tower_flops(stage)
    assert all(p.grad is None for p in stage.parameters())
    found = []
    for present, lengths in (([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]], [40] * 3), ([[1, 0, 0, 0]] * 3, [9] * 3)):
        batch = make_batch(present, lengths, size=stage.image_size)
        with attention.use("sdpa"), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            stage(batch, 0)["loss"].backward()
        found.append(counter.get_total_flops())
        assert float(flops(batch)) == pytest.approx(found[-1], rel=0.005)  # a share of the words is rounded
    assert found[0] > 1.5 * found[1]


def _adapter(width, inner):
    return 2 * width * inner + inner + width


def _trainable(s):
    blocks = (s.vision_blocks + s.text_blocks) * 2 * _adapter(s.width, s.bottleneck)
    invertible = 2 * 2 * _adapter(s.width // 2, s.width // 4)
    head = s.width * s.shared + s.shared + 2 * s.shared + s.shared**2 + s.shared
    slots, scales = 4 * s.width, 4
    return blocks + invertible + 4 * head + slots + scales


def test_parameters(tiny_model):
    counted = cost.parameters(tiny_model)
    frozen = sum(
        p.numel() for tower in (tiny_model.vision.vit, tiny_model.text.bert) for p in tower.state_dict().values()
    )
    assert counted == {"total": frozen + _trainable(TINY), "trainable": _trainable(TINY)}


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer):
    """ViT-B/16 and BERT-base with random weights, through files as anyone's towers come."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    vit = timm.create_model("vit_base_patch16_224", num_classes=0)
    save_for_hf(vit, str(folder / "vision"), model_args={"num_classes": 0})
    bert = BertModel(BertConfig(vocab_size=28996), add_pooling_layer=False)
    save_text(TextTower(bert), tokenizer, folder / "text")
    model = ClinVLA(folder / "vision", folder / "text")
    for weights in folder.rglob("*.safetensors"):  # 0.8 GB that pytest would keep
        weights.unlink()
    return model


def test_parameters_of_the_published_size(base):
    """FLOORS.md, Sizes: 199.3 M in all, 5.81 M of them trained."""
    h, mlp = 768, 2 * 768 * 3072 + 3072 + 768
    block = 4 * (h * h + h) + mlp + 2 * 2 * h
    vit = 3 * 16 * 16 * h + h + h + 197 * h + 12 * block + 2 * h
    bert = (28996 + 512 + 2) * h + 2 * h + 12 * block
    assert (vit, bert) == (85_798_656, 107_719_680)
    assert _trainable(BASE) == 5_814_532
    assert cost.parameters(base) == {"total": vit + bert + 5_814_532, "trainable": 5_814_532}
    assert (BASE.bottleneck, BASE.shared) == (Recipe().bottleneck, Recipe().width)


@pytest.mark.parametrize(("tokens", "masked", "gflop"), [(128, False, 95.5), (128, True, 40.9), (60, False, 83.1)])
def test_flops_of_the_published_size(base, tokens, masked, gflop):
    """FLOORS.md counts two views. Its patches have three channels except where it says one; folded weights read one,
    which saves 2 * 512 * 768 operations a patch: 0.31 GFLOP unmasked, 0.08 masked."""
    counted = cost.forward_flops(base, 2, tokens, masked=masked)
    assert counted == _forward(BASE, 2, tokens, masked)
    channels = 2 * 2 * (49 if masked else 196) * 2 * 256 * 768
    assert (counted + channels) / 1e9 == pytest.approx(gflop, abs=0.06)
