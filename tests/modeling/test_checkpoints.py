"""Files in the layouts that others publish, made here at tiny sizes: what is loaded computes what its source does."""

import argparse
import json
import os
import re
from dataclasses import asdict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn.functional import gelu, interpolate, linear
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertModel,
    Dinov2Config,
    Dinov2Model,
    RobertaConfig,
    RobertaModel,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTModel,
)

from clinvla_fast import ClinVLA, Recipe
from clinvla_fast.errors import DataError
from clinvla_fast.modeling.checkpoints import load_weights, match_keys, read_weights
from clinvla_fast.modeling.packing import Packing
from clinvla_fast.modeling.towers import TowerUnavailable, load_text, load_vision

SIZE = {"img_size": 32, "patch_size": 8, "embed_dim": 128, "depth": 2, "num_heads": 2}
HF_SIZE = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 320,
}
BERT_SIZE = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 200,
    "max_position_embeddings": 48,
}


def _random(model, seed=0):
    """Every weight of a new model takes part in what it computes: new biases and norms are zeros and ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return model.eval()


def _vit(**options):
    return _random(VisionTransformer(**SIZE | {"num_classes": 0} | options))


def _prefixed(prefix, weights):
    return {prefix + key: x for key, x in weights.items()}


def _mae_decoder():
    shapes = {"mask_token": (1, 1, 64), "decoder_pos_embed": (1, 17, 64), "decoder_embed.weight": (64, 128)}
    shapes |= {"decoder_blocks.0.attn.qkv.weight": (192, 64), "decoder_norm.weight": (64,)}
    shapes |= {"decoder_pred.weight": (192, 64)}
    return {key: torch.randn(shape) for key, shape in shapes.items()}


def _pixels(channels=3, size=32):
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(9))


@torch.no_grad()
def _same_image(tower, features, channels=3, size=32):
    """The tower's ViT gives the tokens [n, 1 + patches, width] that `features` gives."""
    x = _pixels(channels, size)
    torch.testing.assert_close(tower.vit.eval().forward_features(x), features(x), rtol=0, atol=2e-5)


@torch.no_grad()
def _same_text(tower, bert):
    tokens = torch.randint(5, 60, (2, 11), generator=torch.Generator().manual_seed(9))
    mask = torch.tensor([[1] * 11, [1] * 7 + [0] * 4])
    ours = tower.bert(input_ids=tokens, attention_mask=mask).last_hidden_state[mask.bool()]
    expected = bert.eval()(input_ids=tokens, attention_mask=mask).last_hidden_state[mask.bool()]
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-5)


def _all_accounted(report, weights):
    buckets = [*report.loaded, *report.renamed, *report.refused]
    assert sorted(buckets) == sorted(weights)
    assert not any(name in report.missing for name in (*report.loaded, *report.renamed.values(), *report.changed))
    json.dumps(asdict(report))


@pytest.fixture
def beside(tmp_path, tokenizer):
    """A folder with a tokenizer, to put BERTs beside; and the size of its vocabulary."""
    tokenizer.save_pretrained(tmp_path)
    return tmp_path, len(tokenizer)


# Image towers


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("options", [{}, {"in_chans": 1}, {"init_values": 0.5, "qkv_bias": False, "mlp_ratio": 2.5}])
def test_timm(tmp_path, suffix, options):
    vit, file = _vit(num_classes=5, **options), tmp_path / f"vit.{suffix}"
    weights = vit.state_dict()
    (save_file if suffix == "safetensors" else torch.save)(weights, file)
    tower = load_vision(str(file))
    _same_image(tower, vit.forward_features, options.get("in_chans", 3))
    report = tower.key_report
    assert set(report.loaded) == set(weights) - {"head.weight", "head.bias"} and not report.renamed
    assert report.refused == {"head.weight": "classifier", "head.bias": "classifier"}
    assert len(tower.mean) == len(tower.std) == options.get("in_chans", 3)


@pytest.mark.parametrize("width, heads", [(64, 1), (192, 3), (1280, 16)])
def test_heads_are_told_by_the_width(tmp_path, width, heads):
    torch.save(_vit(embed_dim=width, depth=1, num_heads=heads, mlp_ratio=0.5).state_dict(), tmp_path / "vit.pth")
    assert load_vision(str(tmp_path / "vit.pth")).vit.blocks[0].attn.num_heads == heads


def test_heads_that_only_a_config_tells(tmp_path):
    for width, heads in ((128, 4), (48, 3)):
        vit, file = _vit(embed_dim=width, num_heads=heads), tmp_path / "vit.pth"
        torch.save(vit.state_dict(), file)
        (tmp_path / "config.json").write_text(json.dumps({"hidden_size": width, "num_attention_heads": heads}))
        _same_image(load_vision(str(file)), vit.forward_features)
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 128, "num_attention_heads": 4}))
    with pytest.raises(TowerUnavailable, match=r"vit\.pth.*width of 48 cannot be told: put its config.json"):
        load_vision(str(file))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(DataError, match=r"config\.json is no JSON"):
        load_vision(str(file))


def test_a_file_out_of_a_timm_folder(tiny_towers):
    folder = tiny_towers["vision"]
    whole, alone = load_vision(str(folder)), load_vision(str(folder / "model.safetensors"))
    assert whole.key_report is None and alone.key_report.loaded
    _same_image(alone, whole.vit.eval().forward_features, 1, 128)
    assert (alone.mean.tolist(), alone.std.tolist()) == (whole.mean.tolist(), whole.std.tolist())


def test_mae_as_published(tmp_path):
    vit = _vit()
    weights = vit.state_dict() | _mae_decoder()
    slots = {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2)}}
    beside = {"optimizer": {"state": slots, "param_groups": [{"lr": 0.1}]}, "args": argparse.Namespace(lr=0.1)}
    torch.save({"model": weights, **beside, "epoch": 3}, tmp_path / "mae.pth")
    tower = load_vision(str(tmp_path / "mae.pth"))
    _same_image(tower, vit.forward_features)
    report = tower.key_report
    assert set(report.loaded) == set(vit.state_dict())
    reasons = {key: "decoder of masked autoencoding" for key in _mae_decoder()}
    reasons |= {f"optimizer.state.0.{key}": "optimizer" for key in slots[0]}
    assert report.refused == reasons
    _all_accounted(report, read_weights(tmp_path / "mae.pth"))
    assert "refused (decoder of masked autoencoding): mask_token, decoder_pos_embed" in report.summary()
    torch.testing.assert_close(tower.mean, torch.tensor([0.485, 0.456, 0.406]))


def test_mae_fine_tuned_on_the_mean_of_patches(tmp_path):
    """It has fc_norm in place of norm: every token gets it here, which the report says."""
    vit = _vit(num_classes=3, global_pool="avg")
    assert "fc_norm.weight" in vit.state_dict() and "norm.weight" not in vit.state_dict()
    torch.save({"model": vit.state_dict()}, tmp_path / "tuned.pth")
    tower = load_vision(str(tmp_path / "tuned.pth"))
    _same_image(tower, lambda x: vit.fc_norm(vit.forward_features(x)))
    assert tower.key_report.renamed == {"fc_norm.weight": "norm.weight", "fc_norm.bias": "norm.bias"}
    assert "tuned on the mean" in tower.key_report.changed["norm.weight"]
    both = {"fc_norm.weight": torch.zeros(128)} | _vit().state_dict()
    report = match_keys(_vit(), both, "vision")[1]
    assert report.refused == {"fc_norm.weight": "a second value of norm.weight"}


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "backbone.", "visual.trunk.", "model.backbone.vit."]
)
def test_a_prefix_before_every_name(tmp_path, prefix):
    vit = _vit()
    weights = _prefixed(prefix, vit.state_dict()) | {"other.weight": torch.ones(2)}
    torch.save({"state_dict": weights}, tmp_path / "vit.pth")
    tower = load_vision(str(tmp_path / "vit.pth"))
    _same_image(tower, vit.forward_features)
    _all_accounted(tower.key_report, weights)
    assert tower.key_report.refused == {"other.weight": "unknown"}


def test_wrappers_inside_names(tmp_path):
    """Blocks that were compiled, or sharded, one by one."""
    vit = _vit()
    weights = {key.replace("blocks.1.", "blocks.1._orig_mod."): x for key, x in vit.state_dict().items()}
    weights = {key.replace("blocks.0.", "blocks.0._fsdp_wrapped_module."): x for key, x in weights.items()}
    torch.save(weights, tmp_path / "vit.pth")
    tower = load_vision(str(tmp_path / "vit.pth"))
    _same_image(tower, vit.forward_features)
    _all_accounted(tower.key_report, weights)


@pytest.mark.parametrize("flat", [False, True])
def test_dino_gives_its_teacher(tmp_path, flat):
    student, teacher = _vit(), _random(VisionTransformer(**SIZE, num_classes=0), seed=1)
    head = {"head.mlp.0.weight": torch.ones(3, 3), "head.last_layer.weight_g": torch.ones(3, 1)}
    wrapper = "" if flat else "module."
    parts = {
        "student": _prefixed(f"{wrapper}backbone.", student.state_dict()) | _prefixed(wrapper, head),
        "teacher": _prefixed("backbone.", teacher.state_dict()) | head,
    }
    if flat:
        parts = _prefixed("student.", parts["student"]) | _prefixed("teacher.", parts["teacher"])
    torch.save(parts, tmp_path / "dino.pth")
    tower = load_vision(str(tmp_path / "dino.pth"))
    _same_image(tower, teacher.forward_features)
    report = tower.key_report
    _all_accounted(report, read_weights(tmp_path / "dino.pth"))
    assert report.refused[f"student.{wrapper}backbone.cls_token"] == "of another image tower"
    assert {reason for key, reason in report.refused.items() if "head" in key} == {"projection head"}


def _save_without_config(model, folder):
    """transformers' file as it is published, and nothing that says its size beside it."""
    model.save_pretrained(folder)
    for name in ("config.json", "generation_config.json"):
        (folder / name).unlink(missing_ok=True)
    return str(folder / "model.safetensors")


@pytest.mark.parametrize("published", [True, False])
def test_transformers_vit(tmp_path, published):
    """In the names of its files, and in those that the model has in memory."""
    vit = _random(ViTModel(ViTConfig(**HF_SIZE)))
    file = _save_without_config(vit, tmp_path)
    if not published:
        torch.save(vit.state_dict(), file := str(tmp_path / "vit.bin"))
    tower = load_vision(file)
    _same_image(tower, lambda x: vit(x).last_hidden_state)
    assert tower.vit.norm.eps == tower.vit.blocks[0].norm1.eps == 1e-12  # too little to show above
    report = tower.key_report
    _all_accounted(report, read_weights(file))
    assert report.changed["blocks.1.attn.qkv.bias"] == "query, key and value joined"
    assert report.refused == {"pooler.dense.weight": "pooler", "pooler.dense.bias": "pooler"}


def test_transformers_vit_under_a_classifier(tmp_path):
    model = _random(ViTForImageClassification(ViTConfig(**HF_SIZE, num_channels=1, qkv_bias=False)))
    tower = load_vision(_save_without_config(model, tmp_path))
    _same_image(tower, lambda x: model.vit(x).last_hidden_state, channels=1)
    assert set(tower.key_report.refused) == {"classifier.weight", "classifier.bias"}


def test_transformers_mae(tmp_path):
    decoder = {"decoder_hidden_size": 64, "decoder_num_attention_heads": 2, "decoder_num_hidden_layers": 1}
    model = _random(ViTMAEForPreTraining(ViTMAEConfig(**HF_SIZE, **decoder, decoder_intermediate_size=64)))
    model.config.mask_ratio = 0.0
    tower = load_vision(_save_without_config(model, tmp_path))
    order = torch.arange(16).float().expand(2, -1)  # its patches come shuffled unless told otherwise
    _same_image(tower, lambda x: model.vit(x, noise=order).last_hidden_state)
    assert set(tower.key_report.refused.values()) == {"decoder of masked autoencoding"}


def test_transformers_dinov2(tmp_path):
    """As RAD-DINO is: with layer scales, and another epsilon than transformers' ViT."""
    size = {key: x for key, x in HF_SIZE.items() if key != "intermediate_size"}
    model = _random(Dinov2Model(Dinov2Config(**size, layerscale_value=0.5)))
    tower = load_vision(_save_without_config(model, tmp_path))
    _same_image(tower, lambda x: model(x).last_hidden_state)
    assert tower.vit.norm.eps == 1e-6
    assert tower.key_report.refused == {"embeddings.mask_token": "decoder of masked autoencoding"}


def test_dinov2_in_chunks(tmp_path):
    vit = _vit(init_values=0.3)
    weights = {re.sub(r"^blocks\.(\d)", r"blocks.0.\1", key): x for key, x in vit.state_dict().items()}
    torch.save(weights | {"mask_token": torch.zeros(1, 128)}, tmp_path / "dinov2.pth")
    _same_image(load_vision(str(tmp_path / "dinov2.pth")), vit.forward_features)


def test_pixels_that_a_processor_tells(tmp_path):
    file = _save_without_config(_random(ViTModel(ViTConfig(**HF_SIZE))), tmp_path)
    said = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    tower = load_vision(file)
    torch.testing.assert_close(tower.mean, torch.tensor(said["image_mean"]))
    torch.testing.assert_close(tower.std, torch.tensor(said["image_std"]))


# Files of both towers


def test_mrm(beside):
    folder, words = beside
    vit, bert = _vit(), _random(BertForMaskedLM(BertConfig(vocab_size=words, **BERT_SIZE)))
    report_side = _prefixed("bert_encoder.model.", bert.state_dict())
    report_side["bert_encoder.model.bert.embeddings.position_ids"] = torch.arange(48)[None]
    weights = vit.state_dict() | _mae_decoder() | report_side | {"bert_mlp.weight": torch.ones(128, 128)}
    torch.save({"model": weights, "args": argparse.Namespace()}, folder / "MRM.pth")
    vision, (text, _) = load_vision(str(folder / "MRM.pth")), load_text(str(folder / "MRM.pth"))
    _same_image(vision, vit.forward_features)
    _same_text(text, bert.bert)
    for report in (vision.key_report, text.key_report):
        _all_accounted(report, weights)
        assert report.refused["bert_encoder.model.cls.predictions.bias"] == "head of masked words"
        assert report.refused["decoder_pred.weight"] == "decoder of masked autoencoding"
        assert report.refused["bert_mlp.weight"] == "projection head"
    bert_word, vit_word = "bert_encoder.model.bert.embeddings.word_embeddings.weight", "blocks.0.attn.qkv.weight"
    assert vision.key_report.refused[bert_word] == "of the report tower"
    assert text.key_report.refused[vit_word] == "of the image tower"
    assert text.key_report.refused["bert_encoder.model.bert.embeddings.position_ids"] == "constant"
    torch.testing.assert_close(vision.mean, torch.full((3,), 0.4978))


@pytest.fixture
def alta(beside):
    """A file in ALTA's layout, its weights, and the two towers that are in it."""
    folder, words = beside
    vit, bert = _vit(), _random(BertForMaskedLM(BertConfig(vocab_size=words, **BERT_SIZE)))
    generator = torch.Generator().manual_seed(3)
    shapes = {"D_fc1.weight": (32, 128), "D_fc1.bias": (32,), "D_fc2.weight": (128, 32), "D_fc2.bias": (128,)}
    places = [f"{layer}.{n}." for layer in ("blocks", "bert_encoder.bert.encoder.layer") for n in (0, 1)]
    shapes = {p + kind + k: x for p in places for kind in ("attn_adapter.", "mlp_adapter.") for k, x in shapes.items()}
    shapes |= {"view_embedding": (1, 2, 128), "temporal_embedding": (1, 2, 128)}
    adapters = {key: torch.randn(shape, generator=generator) * 0.1 for key, shape in shapes.items()}
    heads = {
        f"{h}.dense_to_hidden.weight": torch.ones(8, 128)
        for h in ("projection_head", "bert_encoder.cls_projection_head")
    }
    other = heads | {"bert_embed.weight": torch.ones(128, 128), "logit_scale": torch.ones(())}
    other |= {"missing_token": torch.ones(1, 16, 128)}
    weights = vit.state_dict() | _prefixed("bert_encoder.", bert.state_dict()) | adapters | other
    torch.save({"model": weights, "scaler": {"scale": 2.0}}, folder / "ALTA.pth")
    return str(folder / "ALTA.pth"), weights, vit, bert


def test_alta(alta):
    """The towers alone: its adapters are named, and left to its recipe."""
    file, weights, vit, bert = alta
    vision, (text, _) = load_vision(file), load_text(file)
    _same_image(vision, vit.forward_features)
    _same_text(text, bert.bert)
    for report in (vision.key_report, text.key_report):
        _all_accounted(report, weights)
        assert {report.refused[key] for key in weights if "adapter" in key} == {
            "ALTA's adapter: the recipe has none there"
        }
        views = "view_embedding", "temporal_embedding"
        assert {report.refused[key] for key in views} == {"ALTA's view embedding: the recipe is another"}
        assert "unknown" not in report.refused.values()
    torch.testing.assert_close(vision.std, torch.full((3,), 0.2834))


def _alta_adapter(w, name, x):
    return linear(
        gelu(linear(x, w[f"{name}.D_fc1.weight"], w[f"{name}.D_fc1.bias"])),
        w[f"{name}.D_fc2.weight"],
        w[f"{name}.D_fc2.bias"],
    )


def _alta_image(w, vit, pixels, slot):
    """Tokens of a film [1, 3, H, W] that is the view and of the time in `slot`, by the weights in ALTA's names."""
    patches = vit.patch_embed(pixels) + w["pos_embed"][:, 1:]
    x = torch.cat([w["cls_token"] + w["pos_embed"][:, :1], patches], 1)
    x = x + w["view_embedding"][:, slot % 2] + w["temporal_embedding"][:, slot // 2]
    for n, block in enumerate(vit.blocks):
        a = block.attn(block.norm1(x))
        x = x + a + _alta_adapter(w, f"blocks.{n}.attn_adapter", a)
        z = block.norm2(x)
        x = x + block.mlp(z) + 0.5 * _alta_adapter(w, f"blocks.{n}.mlp_adapter", z)
    return vit.norm(x)


def _alta_text(w, bert, tokens):
    """Hidden states of a report [1, L]."""
    x = bert.embeddings(tokens)
    for n, layer in enumerate(bert.encoder.layer):
        name = f"bert_encoder.bert.encoder.layer.{n}"
        a = layer.attention(x)[0]
        a = a + _alta_adapter(w, f"{name}.attn_adapter", a)
        x = layer.output(layer.intermediate(a), a) + 0.5 * _alta_adapter(w, f"{name}.mlp_adapter", a)
    return x


@torch.no_grad()
def test_altas_adapters_go_on_in_its_recipe(alta):
    file, weights, vit, bert = alta
    recipe = Recipe(adapters=("attention", "mlp"), bottleneck=32, missing_views=True)
    model = ClinVLA(file, file, recipe)
    films = torch.randint(0, 256, (1, 4, 32, 32), generator=torch.Generator().manual_seed(4), dtype=torch.uint8)
    ours = model.vision(films, torch.ones(1, 4, dtype=torch.bool))
    for slot in range(4):
        pixels = ((films[:, slot, None] / 255 - 0.4785) / 0.2834).expand(-1, 3, -1, -1)
        torch.testing.assert_close(ours[slot], _alta_image(weights, vit, pixels, slot)[0], rtol=0, atol=5e-5)
    tokens = torch.randint(5, 60, (11,), generator=torch.Generator().manual_seed(9))
    expected = _alta_text(weights, bert.bert, tokens[None])[0]
    torch.testing.assert_close(model.text(tokens, Packing.of(torch.tensor([11]), "cpu")), expected, rtol=0, atol=5e-5)
    for tower in (model.vision, model.text):
        _all_accounted(tower.key_report, weights)
    renamed = model.vision.key_report.renamed | model.text.key_report.renamed
    assert renamed["blocks.1.mlp_adapter.D_fc2.bias"] == "adapts.1.mlp.up.bias"
    assert renamed["temporal_embedding"] == "time_embedding"
    assert {key for key in weights if "adapter" in key} < set(renamed)


def test_altas_adapters_where_its_recipe_differs(alta):
    file, weights, *_ = alta
    narrow = ClinVLA(file, file, Recipe(adapters=("attention", "mlp"), bottleneck=8)).vision.key_report
    upper = ClinVLA(file, file, Recipe(adapters=("attention", "mlp"), bottleneck=32, adapter_blocks=(1,))).text
    clinvla = ClinVLA(file, file, Recipe()).vision
    misfit = "blocks.0.attn_adapter.D_fc1.weight: shape [32, 128], expected [8, 128]"
    assert {narrow.refused[f"blocks.0.attn_adapter.D_fc{k}.bias"] for k in (1, 2)} == {misfit}  # whole or not at all
    name = "bert_encoder.bert.encoder.layer.{}.mlp_adapter.D_fc1.bias"
    assert name.format(1) in upper.key_report.renamed
    assert upper.key_report.refused[name.format(0)] == "ALTA's adapter: the recipe has none there"
    assert not clinvla.view_embedding.any() and "view_embedding" in clinvla.key_report.refused
    for report in (narrow, upper.key_report, clinvla.key_report):
        _all_accounted(report, weights)


def test_open_clip_with_timm_and_transformers(beside):
    """BiomedCLIP's layout."""
    folder, words = beside
    vit, bert = _vit(), _random(BertModel(BertConfig(vocab_size=words, **BERT_SIZE)))
    weights = _prefixed("visual.trunk.", vit.state_dict()) | _prefixed("text.transformer.", bert.state_dict())
    weights |= {"visual.head.proj.weight": torch.ones(4, 128), "text.proj.0.weight": torch.ones(4, 128)}
    save_file(weights | {"logit_scale": torch.ones(())}, folder / "clip.safetensors")
    vision, (text, _) = (load(str(folder / "clip.safetensors")) for load in (load_vision, load_text))
    _same_image(vision, vit.forward_features)
    _same_text(text, bert)
    assert "unknown" not in (vision.key_report.refused | text.key_report.refused).values()
    assert vision.key_report.refused["text.transformer.pooler.dense.bias"] == "pooler"


# Report towers


@pytest.mark.parametrize("model", [BertModel, BertForMaskedLM, BertForPreTraining])
def test_bert(beside, model):
    folder, words = beside
    source = _random(model(BertConfig(vocab_size=words, **BERT_SIZE)))
    torch.save(source.state_dict(), folder / "pytorch_model.bin")
    tower, tokenizer = load_text(str(folder / "pytorch_model.bin"))
    _same_text(tower, getattr(source, "bert", source))
    _all_accounted(tower.key_report, source.state_dict())
    assert set(tower.key_report.refused.values()) <= {"pooler", "head of masked words"}
    assert tokenizer("The lungs are clear.").input_ids[0] == tokenizer.cls_token_id


def test_bert_converted_from_tensorflow(beside):
    """As BioBERT was first published: gamma and beta, and constants among the weights."""
    folder, words = beside
    bert = _random(BertForPreTraining(BertConfig(vocab_size=words, **BERT_SIZE)))
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    weights = {re.sub(r"LayerNorm\.\w+$", lambda m: old[m[0]], key): x for key, x in bert.state_dict().items()}
    weights["bert.embeddings.position_ids"] = torch.arange(48)[None]
    torch.save(weights, folder / "biobert.bin")
    tower, _ = load_text(str(folder / "biobert.bin"))
    _same_text(tower, bert.bert)
    _all_accounted(tower.key_report, weights)
    ours = tower.key_report.renamed["bert.encoder.layer.1.output.LayerNorm.gamma"]
    assert ours == "encoder.layer.1.output.LayerNorm.weight"


def test_cxr_bert(beside):
    folder, words = beside
    bert = _random(BertForMaskedLM(BertConfig(vocab_size=words, **BERT_SIZE)))
    head = {
        "cls_projection_head.dense_to_hidden.weight": torch.ones(16, 128),
        "cls_projection_head.LayerNorm.bias": torch.ones(16),
    }
    torch.save(bert.state_dict() | head, folder / "cxr.bin")
    tower, _ = load_text(str(folder / "cxr.bin"))
    _same_text(tower, bert.bert)
    assert all(tower.key_report.refused[key] == "projection head" for key in head)


def test_bert_whose_heads_a_config_tells(beside):
    """MiniLM has heads of 32; and a config may say another activation and epsilon."""
    folder, words = beside
    options = {"num_attention_heads": 4, "hidden_act": "relu", "layer_norm_eps": 1e-3}
    bert = _random(BertModel(BertConfig(vocab_size=words, **BERT_SIZE | options)))
    bert.save_pretrained(folder)
    tower, _ = load_text(str(folder / "model.safetensors"))
    _same_text(tower, bert)


def test_a_roberta(beside):
    folder, words = beside
    size = BERT_SIZE | {"vocab_size": words, "max_position_embeddings": 50, "type_vocab_size": 1}
    weights = RobertaModel(RobertaConfig(**size)).state_dict()
    for prefix in ("", "roberta."):
        torch.save(_prefixed(prefix, weights), folder / "roberta.bin")
        with pytest.raises(TowerUnavailable, match=r"it is a RoBERTa .50 positions.*expected a BERT"):
            load_text(str(folder / "roberta.bin"))


def test_tokenizers_beside_a_file(tmp_path, tokenizer):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "lung", "##s"]
    file, size = tmp_path / "bert.bin", BERT_SIZE | {"num_hidden_layers": 1}
    torch.save(BertModel(BertConfig(vocab_size=9, **size)).state_dict(), file)
    with pytest.raises(TowerUnavailable, match=r"no tokenizer beside it: put its tokenizer\.json or vocab\.txt into"):
        load_text(str(file))
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    assert load_text(str(file))[1]("The lungs").input_ids == [2, 5, 6, 7, 3]
    (tmp_path / "vocab.txt").write_text("\n".join([*words, "The"]))  # a cased vocabulary, as BioBERT's
    uncased_or_not = load_text(str(file))[1]
    assert uncased_or_not("The the").input_ids == [2, 8, 5, 3] and uncased_or_not.mask_token_id == 4
    uncased_or_not.save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "vocab.txt").unlink(missing_ok=True)
    alone = load_text(str(file))[1]
    assert alone("The the").input_ids == [2, 8, 5, 3]
    assert (alone.pad_token_id, alone.cls_token_id, alone.mask_token_id) == (0, 2, 4)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(TowerUnavailable, match=rf"its tokenizer has {len(tokenizer)} pieces, the weights 9"):
        load_text(str(file))


# What is done to values


@torch.no_grad()
def test_gray_and_rgb_projections():
    """Of a gray image a gray tower makes what the RGB tower makes of it three times, and the other way round."""
    gray = _pixels(1)
    for channels, other in ((3, 1), (1, 3)):
        source, module = _vit(in_chans=channels), _vit(in_chans=other, depth=2)
        report = load_weights(module, source.state_dict(), "vision")
        expected = source.forward_features(gray.expand(-1, channels, -1, -1))
        torch.testing.assert_close(module.forward_features(gray.expand(-1, other, -1, -1)), expected, rtol=0, atol=2e-5)
        assert list(report.changed) == ["patch_embed.proj.weight"] and "gray" in report.summary()
    _, report = match_keys(_vit(), _vit(in_chans=4).state_dict(), "vision")
    assert report.refused == {"patch_embed.proj.weight": "shape [128, 4, 8, 8], expected [128, 3, 8, 8]"}


@pytest.mark.parametrize("size", [48, 24])
def test_positions_of_another_grid(size):
    source, module = _vit(), _vit(img_size=size)
    report = load_weights(module, source.state_dict(), "vision")
    grid = size // 8
    assert report.changed == {"pos_embed": f"position embedding resampled 4x4 -> {grid}x{grid}"}
    cls, patches = source.pos_embed[:, :1], source.pos_embed[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    expected = interpolate(patches, (grid, grid), mode="bicubic", antialias=True).flatten(2).mT
    torch.testing.assert_close(module.pos_embed, torch.cat([cls, expected], 1))


def test_half_precision_is_loaded_into_the_towers_own(tmp_path):
    vit = _vit()
    save_file({key: x.bfloat16() for key, x in vit.state_dict().items()}, tmp_path / "half.safetensors")
    tower = load_vision(str(tmp_path / "half.safetensors"))
    assert tower.vit.cls_token.dtype == torch.float32
    _same_image(tower, vit.bfloat16().float().forward_features)


# Every key is accounted for


def _pool():
    """Names of every layout and none, in shapes that fit and that do not."""
    vit, hf = (
        VisionTransformer(**SIZE | {"depth": 1}, num_classes=2),
        ViTModel(ViTConfig(**HF_SIZE | {"num_hidden_layers": 1})),
    )
    bert = BertForPreTraining(BertConfig(vocab_size=20, **BERT_SIZE | {"num_hidden_layers": 1}))
    pool = vit.state_dict() | hf.state_dict() | _mae_decoder() | bert.state_dict()
    pool |= _prefixed("bert_encoder.", bert.state_dict()) | _prefixed("module.", vit.state_dict())
    pool |= {key.replace("blocks.0.", "blocks.0._orig_mod."): x for key, x in vit.state_dict().items()}
    pool |= {"fc_norm.weight": torch.ones(128), "blocks.0.attn.q_norm.weight": torch.ones(64), "x": torch.ones(())}
    pool |= {"bert.embeddings.LayerNorm.gamma": torch.ones(128), "blocks.0.attn_adapter.D_fc1.bias": torch.ones(8)}
    return pool


POOL = _pool()
MODULES = {
    "vision": VisionTransformer(**SIZE | {"depth": 1}, num_classes=0),
    "text": BertModel(BertConfig(vocab_size=20, **BERT_SIZE | {"num_hidden_layers": 1})),
}
VALUES = [lambda x: x, lambda x: x[..., :1], lambda x: x * torch.nan, lambda x: x.to(torch.int8), lambda x: x.sum()]


@given(
    st.dictionaries(st.sampled_from(sorted(POOL)), st.sampled_from([VALUES[0]] * 6 + VALUES[1:]), max_size=len(POOL)),
    st.sampled_from(["vision", "text"]),
)
def test_every_key_is_in_one_bucket(chosen, kind):
    weights = {key: change(POOL[key]) if POOL[key].dim() else POOL[key] for key, change in chosen.items()}
    state, report = match_keys(MODULES[kind], weights, kind)
    _all_accounted(report, weights)
    own = MODULES[kind].state_dict()
    assert all(x.shape == own[name].shape and x.isfinite().all() for name, x in state.items())
    assert set(state) == {*own} - {*report.missing} >= {*report.changed}
    assert {*report.loaded, *report.renamed.values()} <= {*own} and all(report.refused.values())
    assert len(report.summary().splitlines()[0].split()) == 9


# Files that cannot be used


class _Runs:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_file_with_code_in_it_is_not_run(tmp_path):
    weights, trap = _vit().state_dict(), tmp_path / "it-ran"
    torch.save({"model": weights, "args": _Runs(trap)}, tmp_path / "bad.pth")
    with pytest.raises(DataError, match=r"bad\.pth holds Python objects.*posix\.mkdir.*save its state_dict alone"):
        load_vision(str(tmp_path / "bad.pth"))
    assert not trap.exists()
    torch.save(nn.Linear(2, 2), tmp_path / "whole.pth")
    with pytest.raises(DataError, match=r"whole\.pth holds Python objects.*Linear"):
        load_text(str(tmp_path / "whole.pth"))


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_file_that_was_cut(tmp_path, suffix, share):
    file = tmp_path / f"cut.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(_vit().state_dict(), file)
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.raises(DataError, match=rf"cut\.{suffix} is damaged or no file of weights: get it again") as error:
        load_vision(str(file))
    assert "\n" not in str(error.value)


def test_files_that_are_something_else(tmp_path):
    (tmp_path / "page.pth").write_text("<!DOCTYPE html><title>Quota exceeded</title>")
    with pytest.raises(DataError, match=r"page\.pth is damaged or no file of weights"):
        read_weights(tmp_path / "page.pth")
    torch.save({"epoch": 3, "model": {}}, tmp_path / "empty.pth")
    with pytest.raises(DataError, match=r"empty\.pth holds no tensor"):
        read_weights(tmp_path / "empty.pth")
    with pytest.raises(DataError, match=r"none\.pth cannot be read: No such file"):
        read_weights(tmp_path / "none.pth")


def _fails(load, weights, tmp_path, match):
    torch.save(weights, tmp_path / "bad.pth")
    with pytest.raises(TowerUnavailable, match=match) as error:
        load(str(tmp_path / "bad.pth"))
    assert "bad.pth" in str(error.value) and "\n" not in str(error.value)


def test_a_file_in_which_nothing_fits(tmp_path):
    resnet = {"conv1.weight": torch.ones(4, 3, 7, 7), "layer1.0.conv1.weight": torch.ones(4, 4, 3, 3)}
    match = r"nothing in it is of the {}: its first names are conv1\.weight, layer1.*expected .*{}"
    _fails(load_vision, resnet, tmp_path, match.format("image tower", r"patch_embed\.proj\.weight"))
    _fails(load_text, resnet, tmp_path, match.format("report tower", r"embeddings\.word_embeddings\.weight"))
    bert = BertModel(BertConfig(vocab_size=9, **BERT_SIZE)).state_dict()
    _fails(load_vision, bert, tmp_path, "nothing in it is of the image tower")
    _fails(load_text, _vit().state_dict(), tmp_path, "nothing in it is of the report tower")


def test_weights_that_are_missing_misshapen_or_not_finite(tmp_path):
    good = _vit().state_dict()
    _fails(load_vision, {k: x for k, x in good.items() if k != "norm.bias"}, tmp_path, r"no value for norm\.bias\.$")
    name, value = "blocks.1.mlp.fc1.weight", good["blocks.1.mlp.fc1.weight"]
    why = rf"no value for {name} \(refused: {name}: "
    _fails(load_vision, good | {name: value[:7]}, tmp_path, why + r"shape \[7, 128\], expected \[512, 128\]\)")
    _fails(load_vision, good | {name: value / 0}, tmp_path, why + "not finite")
    _fails(load_vision, good | {name: value.to(torch.int8)}, tmp_path, why + r"torch\.int8, expected floating-point")
    _fails(
        load_vision, {k: x for k, x in good.items() if "blocks.0" not in k}, tmp_path, r"blocks\.0\.mlp\.fc1.*not there"
    )
    _fails(load_vision, good | {"pos_embed": torch.ones(1, 16, 128)}, tmp_path, "16 positions of patches of 8x8")
    key = re.compile(r"\.0\.attention\..*(k_proj|key)\.")  # of transformers 5, of 4
    vit = {k: x for k, x in ViTModel(ViTConfig(**HF_SIZE)).state_dict().items() if not key.search(k)}
    _fails(load_vision, vit, tmp_path, r"no value for blocks\.0\.attn\.qkv\.weight.*do not make one projection")
    bert = BertModel(BertConfig(vocab_size=9, **BERT_SIZE)).state_dict()
    bert["encoder.layer.0.output.LayerNorm.bias"][3] = torch.nan
    _fails(load_text, bert, tmp_path, r"no value for encoder\.layer\.0\.output\.LayerNorm\.bias \(refused.*not finite")


@pytest.mark.parametrize("options", [{"qk_norm": True}, {"reg_tokens": 2}, {"pre_norm": True}])
def test_another_architecture_under_the_same_names(tmp_path, options):
    """Without the weights that have no place here it would load, and compute something else."""
    weights = _vit(**options).state_dict()
    _fails(
        load_vision,
        weights,
        tmp_path,
        "no place in a plain VisionTransformer for (blocks.0.attn.q_norm|reg_token|norm_pre)|positions",
    )


def test_nothing_is_loaded_from_a_file_that_fails():
    module = _vit()
    before = {key: x.clone() for key, x in module.state_dict().items()}
    other = _random(VisionTransformer(**SIZE, num_classes=0), seed=4).state_dict()
    with pytest.raises(DataError, match="no value for cls_token"):
        load_weights(module, {key: x for key, x in other.items() if key != "cls_token"}, "vision")
    assert all(torch.equal(x, before[key]) for key, x in module.state_dict().items())


def test_a_pooler_may_be_missing():
    bert = BertModel(BertConfig(vocab_size=9, **BERT_SIZE))
    weights = {key: x for key, x in bert.state_dict().items() if "pooler" not in key}
    assert load_weights(bert, weights, "text").missing == ("pooler.dense.weight", "pooler.dense.bias")
