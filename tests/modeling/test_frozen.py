"""Frozen towers: nothing for an optimizer to see, one copy in one dtype, and no work below the first adapter."""

import pytest
import timm
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import BertConfig, BertModel

from clinvla_fast import ClinVLA, Recipe, ops
from clinvla_fast.cost import forward_flops, step_flops
from clinvla_fast.modeling.frozen import freeze
from clinvla_fast.modeling.packing import Packing
from clinvla_fast.modeling.text import TextTower
from clinvla_fast.modeling.vision import VisionTower


def _vit(**sizes):
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 0} | sizes
    return timm.create_model("vit_tiny_patch16_224", **sizes)


def test_a_users_ddp_sends_no_frozen_weight(tiny_model, tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(tiny_model)
        assert wrapped.modules_buffers == []
        assert dict(wrapped.module.named_buffers()).keys() <= wrapped.parameters_to_ignore
        assert not wrapped.parameters_to_ignore & tiny_model.trainable().keys()
    finally:
        dist.destroy_process_group()


def test_buffers_of_the_same_names():
    vit = _vit()
    before = {name: x.clone() for name, x in vit.state_dict().items()}
    freeze(vit)
    assert not list(vit.parameters())
    assert list(vit.state_dict()) == list(before)
    assert all(torch.equal(x, before[name]) for name, x in vit.state_dict().items())
    other = _vit()
    other.load_state_dict(vit.state_dict())  # a plain timm model takes them


def test_one_copy_in_the_dtype_asked_for():
    vit = _vit()
    freeze(vit, torch.bfloat16)
    assert {x.dtype for x in vit.state_dict().values()} == {torch.bfloat16}


def test_shared_weights_stay_shared():
    module = torch.nn.ModuleList([torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)])
    module[1].weight = module[0].weight
    freeze(module)
    assert module[0].weight is module[1].weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masters_and_gradients_are_float32(tiny_towers, make_batch, shake, dtype):
    model = ClinVLA(*tiny_towers.values(), Recipe(width=24, bottleneck=8), dtype)
    shake(model)
    e = model(make_batch([[1, 0], [1, 1]], [9, 4]), mask_seed=0)
    assert e.image_global.dtype == e.text_global.dtype == torch.float32
    assert e.image_local.dtype == e.text_local.dtype == dtype
    model.objective(e)["loss"].backward()
    for name, p in model.trainable().items():
        assert p.dtype == torch.float32 and p.grad is not None and p.grad.isfinite().all(), name
    assert model.vision.vit.blocks[0].mlp.fc1.weight.grad is None


def test_bfloat16_towers_are_near_float32(tiny_towers, make_batch):
    batch = make_batch([[1, 0], [1, 1]], [9, 4])
    embeddings = []
    for dtype in (None, torch.bfloat16):
        torch.manual_seed(0)
        with torch.no_grad():
            embeddings.append(ClinVLA(*tiny_towers.values(), Recipe(width=24, bottleneck=8), dtype)(batch))
    for side in ("image_global", "text_global"):
        a, b = (getattr(e, side) for e in embeddings)
        assert torch.cosine_similarity(a, b).min() > 0.99


def _towers(recipe, depth=4):
    vision = VisionTower(_vit(depth=depth), (0.5,) * 3, (0.25,) * 3)
    sizes = {"hidden_size": 48, "num_hidden_layers": depth, "num_attention_heads": 3, "intermediate_size": 96}
    text = TextTower(BertModel(BertConfig(**sizes), add_pooling_layer=False))
    for tower, frozen in ((vision, vision.vit), (text, text.bert)):
        freeze(frozen)
        tower.add_adapters(recipe)
    return vision, text


def test_adapters_in_some_blocks_alone():
    for tower in _towers(Recipe(bottleneck=8, adapter_blocks=(2, 3))):
        assert [a.task is not None for a in tower.adapts] == [False, False, True, True]
        assert tower.invertible is None
        trained = [name for name, p in tower.named_parameters() if p.requires_grad]
        assert trained and all(name.startswith(("adapts.2.", "adapts.3.")) for name in trained)


def test_nothing_is_kept_for_a_backward_pass_below_the_first_adapter():
    vision, text = _towers(Recipe(bottleneck=8, adapter_blocks=(2, 3)))
    seen = {}
    for kind, blocks in (("vision", vision.vit.blocks), ("text", text.bert.encoder.layer)):
        for i, block in enumerate(blocks):
            norm = block.norm2 if kind == "vision" else block.output.LayerNorm
            norm.register_forward_hook(lambda m, inputs, out, at=(kind, i): seen.update({at: out.requires_grad}))
    images = torch.zeros(1, 1, 32, 32, dtype=torch.uint8)
    vision(images, torch.ones(1, 1, dtype=torch.bool))
    packing = Packing.of(torch.tensor([5]), "cpu")
    text(torch.arange(5), packing)
    assert [seen["vision", i] for i in range(4)] == [False, False, False, True]  # norm2 comes before block 2's adapters
    assert not text.run_block(
        text.bert.encoder.layer[1], text.adapts[1], text.embed(torch.arange(5), packing), packing
    ).requires_grad


def test_a_step_costs_less_the_higher_the_adapters(tiny_towers):
    def backward(recipe):
        model = ClinVLA(*tiny_towers.values(), recipe)
        return step_flops(model, 1, 9) - forward_flops(model, 1, 9, masked=True)

    recipe = Recipe(width=24, bottleneck=8)
    assert backward(Recipe(width=24, bottleneck=8, adapter_blocks=(1,))) < 0.7 * backward(recipe)


@pytest.mark.parametrize("blocks", [(), (4,), (0, 9)])
def test_blocks_that_are_not_there(blocks):
    with pytest.raises(ValueError, match="expected some of 0 to 3" if blocks else "is empty: expected at least one"):
        _towers(Recipe(adapter_blocks=blocks))


@torch.no_grad()
def test_any_mix_of_lengths_and_views_is_what_padded_towers_give():
    """Reports of 1 to 512 tokens, one view to four; new adapters change nothing."""
    vision, text = _towers(Recipe(bottleneck=8), depth=2)
    lengths = torch.tensor([512, 1, 77, 2, 128, 511])
    words = torch.randint(5, 999, (6, 512), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(512) < lengths[:, None]
    expected = text.bert(input_ids=words, attention_mask=mask.long()).last_hidden_state[mask]
    torch.testing.assert_close(text(words[mask], Packing.of(lengths, "cpu")), expected, rtol=0, atol=1e-5)
    images = torch.randint(0, 256, (5, 4, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    present = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0]], dtype=torch.bool)
    pixels = (images[present].float()[:, None].expand(-1, 3, -1, -1) / 255 - 0.5) / 0.25
    expected = vision.vit.forward_features(pixels)
    torch.testing.assert_close(vision(images, present), expected, rtol=0, atol=1e-5)
    kept, _ = ops.draw_kept_patches(present, 16, 4, seed=0)
    assert vision(images, present, kept).shape == (9, 5, 48)
