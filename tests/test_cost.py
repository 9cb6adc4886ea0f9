"""What counts operations, at 2 a multiply-add; bench/test_counts.py holds what it counts to closed forms."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from clinvla_fast import cost
from clinvla_fast.modeling import attention
from clinvla_fast.modeling.masked_modeling import MaskedModeling
from clinvla_fast.modeling.towers import make_tiny_text, make_tiny_vision
from clinvla_fast.presets import TowerTraining
from clinvla_fast.pretraining import Towers


def test_masking_and_fewer_views_save_what_they_promise(tiny_model):
    whole, masked = (cost.forward_flops(tiny_model, 2, 20, masked=m) for m in (False, True))
    text = 2 * cost.forward_flops(tiny_model, 1, 20) - whole  # as views cost alike, but for the head of their mean
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
    assert (
        count([[1, 0, 1, 0]])
        == count([[0, 1, 0, 1]])
        == count([[1, 1]])
        == cost.forward_flops(tiny_model, 2, 12, masked=masked)
    )
    assert count([[0, 0, 0, 1]]) == count([[1]]) == cost.forward_flops(tiny_model, 1, 12, masked=masked)


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
