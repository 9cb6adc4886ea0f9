import json
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    ConvNextImageProcessor,
    DistilBertConfig,
    DistilBertModel,
    PreTrainedModel,
    ResNetConfig,
    ResNetModel,
    RobertaConfig,
    RobertaModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from clinvla_fast.data.tokenizer import tokenize_reports
from clinvla_fast.modeling.encoders import load_image_encoder, load_text_encoder
from clinvla_fast.modeling.towers import TowerUnavailable

TIMM = {  # tokens and width of each
    "vit_tiny_patch16_224": ({"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3}, 17, 24),
    "deit_tiny_distilled_patch16_224": ({"img_size": 32, "embed_dim": 24, "depth": 1, "num_heads": 3}, 6, 24),
    "resnet18": ({"channels": (8, 8, 16, 24)}, 49, 24),
    "swin_tiny_patch4_window7_224": ({"img_size": 56, "embed_dim": 12, "depths": (1, 1), "num_heads": (2, 2)}, 49, 24),
    "convnext_atto": ({"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 24), "in_chans": 1}, 49, 24),
}
SMALL = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
CLIP_TEXT = SMALL | {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2}
HUGGINGFACE: dict[str, Callable[[], tuple]] = {
    "vit": lambda: (
        ViTModel(ViTConfig(image_size=32, patch_size=8, **SMALL)),
        ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.4, 0.5, 0.6]),
    ),
    "resnet": lambda: (
        ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 24], depths=[1, 1], layer_type="basic")),
        ConvNextImageProcessor(size={"shortest_edge": 32}),
    ),
    "clip": lambda: (
        CLIPModel(CLIPConfig(vision_config=SMALL | {"image_size": 32, "patch_size": 8}, text_config=CLIP_TEXT)),
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
    ),
}
WORDS: dict[str, Callable[[int], PreTrainedModel]] = {
    "bert": lambda n: BertModel(BertConfig(vocab_size=n, **SMALL), add_pooling_layer=False),
    "masked-bert": lambda n: BertForMaskedLM(BertConfig(vocab_size=n, **SMALL)),
    "roberta": lambda n: RobertaModel(RobertaConfig(vocab_size=n, pad_token_id=0, **SMALL)),
    "distilbert": lambda n: DistilBertModel(DistilBertConfig(vocab_size=n, dim=24, n_layers=1, n_heads=2)),
}


def _films(size: int, n: int = 3) -> Tensor:
    return torch.randint(0, 256, (n, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def _pixels(films: Tensor, channels: int, mean: list[float], std: list[float]) -> Tensor:
    rgb = films[:, None].repeat(1, channels, 1, 1) / 255
    return (rgb - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)


def _save_timm(name: str, folder: Path) -> torch.nn.Module:
    torch.manual_seed(0)
    settings = TIMM[name][0] | {"num_classes": 0}
    model = timm.create_model(name, **settings).eval()
    save_for_hf(model, str(folder), model_args=settings, safe_serialization=True)
    return model


class TestImages:
    @pytest.mark.parametrize("name", TIMM)
    @torch.no_grad()
    def test_timm(self, name, tmp_path):
        model, (_, patches, width) = _save_timm(name, tmp_path), TIMM[name]
        encoder = load_image_encoder(tmp_path)
        assert (encoder.patches, encoder.width) == (patches, width)
        films = _films(encoder.image_size)
        pixels = timm.data.resolve_model_data_config(encoder.model)
        expected = model.forward_features(_pixels(films, pixels["input_size"][0], pixels["mean"], pixels["std"]))
        if expected.ndim == 4 and "swin" not in name:
            expected = expected.movedim(1, -1)
        torch.testing.assert_close(encoder(films), expected.reshape(3, patches, width))

    @pytest.mark.parametrize("kind", HUGGINGFACE)
    @torch.no_grad()
    def test_huggingface(self, kind, tmp_path):
        torch.manual_seed(0)
        model, processor = HUGGINGFACE[kind]()
        model.eval().save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
        encoder = load_image_encoder(tmp_path)
        assert (encoder.image_size, encoder.width) == (32, 24)
        films = _films(32)
        pixels = processor(images=[f[..., None].expand(-1, -1, 3).numpy() for f in films], return_tensors="pt")
        half = model.vision_model if kind == "clip" else model
        if kind == "resnet":  # whose processor would cut a border off
            pixels["pixel_values"] = _pixels(films, 3, processor.image_mean, processor.image_std)
        hidden = half(**pixels).last_hidden_state
        expected = hidden.flatten(2).mT if hidden.ndim == 4 else hidden
        torch.testing.assert_close(encoder(films), expected, rtol=1e-4, atol=1e-4)

    def test_no_views(self, tmp_path):
        _save_timm("resnet18", tmp_path)
        encoder = load_image_encoder(tmp_path, torch.bfloat16)
        empty = encoder(_films(encoder.image_size)[:0])
        assert empty.shape == (0, 49, 24) and empty.dtype == encoder(_films(encoder.image_size)).dtype == torch.bfloat16

    def test_frozen(self, tmp_path):
        _save_timm("resnet18", tmp_path)
        encoder = load_image_encoder(tmp_path)
        films, before = _films(encoder.image_size), encoder.sha256
        first = encoder.train()(films)
        assert not first.requires_grad and not any(p.requires_grad for p in encoder.parameters())
        assert torch.equal(encoder(films), first) and encoder.sha256 == before  # batch norms have learnt nothing
        first.sum().add(torch.zeros(1, requires_grad=True)).backward()  # may be used where gradients are

    def test_identity(self, tmp_path):
        for name in ("a", "b"):
            _save_timm("vit_tiny_patch16_224", tmp_path / name)
        plain = load_image_encoder(tmp_path / "a")
        assert plain.sha256 == load_image_encoder(tmp_path / "b").sha256
        assert plain.sha256 != load_image_encoder(tmp_path / "a", torch.bfloat16).sha256
        with torch.no_grad():
            next(plain.model.parameters()).view(-1)[0] += 1e-6
        assert plain.sha256 != load_image_encoder(tmp_path / "b").sha256

    def test_refused(self, tmp_path):
        with pytest.raises(TowerUnavailable, match=r"vision tower '.*nothing' is neither on this machine"):
            load_image_encoder(tmp_path / "nothing")
        model = timm.create_model("vit_tiny_patch16_224", img_size=(32, 64), num_classes=0, depth=1)
        settings = {"img_size": (32, 64), "num_classes": 0, "depth": 1}
        save_for_hf(model, str(tmp_path / "wide"), model_args=settings, safe_serialization=True)
        config = json.loads((tmp_path / "wide" / "config.json").read_text())
        config["pretrained_cfg"]["input_size"] = [3, 32, 64]
        (tmp_path / "wide" / "config.json").write_text(json.dumps(config))
        with pytest.raises(TowerUnavailable, match="32 x 64 pixels: expected a square"):
            load_image_encoder(tmp_path / "wide")
        _save_timm("vit_tiny_patch16_224", tmp_path / "vit")
        with pytest.raises(ValueError, match=r"images are \(3, 40, 40\): expected \[n, 32, 32\]"):
            load_image_encoder(tmp_path / "vit")(_films(40))

    def test_pickled_code_is_not_run(self, tmp_path):
        class Evil:
            def __reduce__(self):
                return (Path.touch, (tmp_path / "ran",))

        _save_timm("vit_tiny_patch16_224", tmp_path / "vit")
        (tmp_path / "vit" / "model.safetensors").unlink()
        torch.save({"x": Evil()}, tmp_path / "vit" / "pytorch_model.bin")
        with pytest.raises(TowerUnavailable):
            load_image_encoder(tmp_path / "vit")
        assert not (tmp_path / "ran").exists()


class TestReports:
    @pytest.fixture(params=WORDS)
    def saved(self, request, tmp_path, tokenizer) -> tuple[PreTrainedModel, Path]:
        torch.manual_seed(0)
        model = WORDS[request.param](len(tokenizer)).eval()
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        return model.base_model, tmp_path

    @torch.no_grad()
    def test_words(self, saved, tokenizer):
        model, folder = saved
        encoder = load_text_encoder(folder)
        reports = ["The lungs are clear.", "", "Large right pleural effusion. The heart is enlarged."]
        tokens, lengths = tokenize_reports(tokenizer, reports, encoder.max_tokens)
        hidden, mask = encoder(tokens, lengths)
        assert mask.sum(1).tolist() == (lengths - 2).tolist() and hidden.shape == (*mask.shape, encoder.width)
        for row, words, of in zip(hidden, mask, tokens.split(lengths.tolist()), strict=True):
            expected = model(input_ids=of[None]).last_hidden_state[0, 1:-1]
            torch.testing.assert_close(row[words], expected, rtol=1e-4, atol=1e-5)

    def test_reads_as_many_tokens_as_it_has_positions(self, saved):
        encoder = load_text_encoder(saved[1])
        assert encoder.max_tokens == (511 if isinstance(saved[0], RobertaModel) else 512)
        encoder(torch.full((encoder.max_tokens,), 7), torch.tensor([encoder.max_tokens]))
        with pytest.raises(ValueError, match=rf"has {encoder.max_tokens + 1} tokens: .* at most"):
            encoder(torch.full((encoder.max_tokens + 1,), 7), torch.tensor([encoder.max_tokens + 1]))

    def test_identity(self, saved):
        """Also where the file lacks a pooler, which transformers then draws at random."""
        assert load_text_encoder(saved[1]).sha256 == load_text_encoder(saved[1]).sha256

    def test_refused(self, tmp_path, tokenizer):
        with pytest.raises(TowerUnavailable, match=r"text tower '.*nothing' is neither on this machine"):
            load_text_encoder(tmp_path / "nothing")
        WORDS["bert"](len(tokenizer)).save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        weights = load_file(tmp_path / "model.safetensors")
        lost = next(name for name in weights if "encoder.layer.0" in name)
        save_file({k: v for k, v in weights.items() if k != lost}, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(TowerUnavailable, match=f"its weights lack .*{lost}"):
            load_text_encoder(tmp_path)


def test_files_of_weights(tiny_towers):
    image = load_image_encoder(tiny_towers["vision"] / "model.safetensors")
    whole = load_image_encoder(tiny_towers["vision"])
    views = torch.randint(0, 256, (2, 128, 128), dtype=torch.uint8)
    image.mean, image.std = whole.mean, whole.std  # which only a config.json says
    torch.testing.assert_close(image(views), whole(views))
    text, plain = (load_text_encoder(tiny_towers["text"] / name) for name in ("model.safetensors", ""))
    tokens, lengths = torch.arange(5, 14), torch.tensor([5, 4])
    torch.testing.assert_close(text(tokens, lengths), plain(tokens, lengths))
