"""Where towers come from: timm and transformers, by hub name or local path; or made small, here."""

from pathlib import Path

import timm
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from timm.models import save_for_hf
from timm.models.vision_transformer import VisionTransformer
from transformers import AutoConfig, AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerFast

from ..errors import DataError
from .text import TextTower
from .vision import VisionTower

_TINY_VISION = {"img_size": 128, "in_chans": 1, "embed_dim": 128, "depth": 3, "num_heads": 4, "num_classes": 0}
_TINY_PIXELS = {"mean": (0.5,), "std": (0.25,)}
_TINY_TEXT = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "initializer_range": 0.06,  # BERT's 0.02 is for a width of 768; at 128 masked words would not be learned in minutes
    "max_position_embeddings": 128,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


class TowerUnavailable(DataError):
    """A tower's weights cannot be had, or are of another kind. The message says what to pass."""


def _unavailable(kind: str, name: str, expected: str, error: Exception) -> TowerUnavailable:
    reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
    return TowerUnavailable(
        f"{kind} tower {name!r} is neither on this machine nor to be had from its hub ({reason}). "
        f"Pass --{kind}-tower with {expected}."
    )


def load_vision(name: str) -> VisionTower:
    """A timm ViT with its pretrained weights.

    Args:
        name: a folder that holds timm's config.json and weights, a .safetensors or .pth file of ViT-B/16 weights
            (as MAE publishes them), or a name on timm's hub such as "vit_base_patch16_224.mae".

    Raises:
        TowerUnavailable: if there is no such thing here or on the hub, or it is no plain ViT.
    """
    source: dict = {"model_name": name}
    if Path(name).is_dir():
        source = {"model_name": f"local-dir:{name}"}
    elif Path(name).is_file():
        overlay = {"file": name, "custom_load": False}
        source = {"model_name": "vit_base_patch16_224.mae", "pretrained_cfg_overlay": overlay}
    try:
        vit = timm.create_model(**source, pretrained=True, num_classes=0, global_pool="token")
    except Exception as error:  # timm and its hub client raise whatever their parts raise
        expected = "a timm ViT's name, a folder that timm saved, or a file of ViT-B/16 weights"
        raise _unavailable("vision", name, expected, error) from error
    if not isinstance(vit, VisionTransformer):
        raise TowerUnavailable(f"vision tower {name!r} is a {type(vit).__name__}: expected a VisionTransformer.")
    pixels, channels = timm.data.resolve_model_data_config(vit), vit.patch_embed.proj.in_channels
    return VisionTower(vit, pixels["mean"][:channels], pixels["std"][:channels])


def load_text(name: str) -> tuple[TextTower, PreTrainedTokenizerFast]:
    """A Hugging Face BERT with its pretrained weights, and its tokenizer.

    Args:
        name: a folder written by `save_pretrained`, or a name on the hub such as "dmis-lab/biobert-v1.1".

    Raises:
        TowerUnavailable: if there is no such thing here or on the hub, or it is no BERT.
    """
    try:
        config = AutoConfig.from_pretrained(name)
        if config.model_type != "bert":
            raise TowerUnavailable(f"text tower {name!r} is a {config.model_type}: expected a bert.")
        bert = BertModel.from_pretrained(name, add_pooling_layer=False)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        expected = "a BERT's name or a folder that holds its config.json, weights and tokenizer"
        raise _unavailable("text", name, expected, error) from error
    return TextTower(bert), tokenizer


def make_tiny_vision() -> VisionTower:
    """A new small image tower with random weights: 128 x 128 pixels in 8 x 8 patches."""
    return VisionTower(timm.create_model("vit_tiny_patch16_224", **_TINY_VISION), **_TINY_PIXELS)


def make_tiny_text(vocabulary: int) -> TextTower:
    """A new small report tower with random weights."""
    return TextTower(BertModel(BertConfig(vocab_size=vocabulary, **_TINY_TEXT), add_pooling_layer=False))


def save_vision(tower: VisionTower, folder: Path) -> None:
    """Write the ViT of a tower, without adapters, in the layout that `load_vision` and timm read."""
    pixels = {"mean": tuple(tower.mean.tolist()), "std": tuple(tower.std.tolist())}
    save_for_hf(tower.vit, str(folder), model_args=_TINY_VISION, data_config=pixels, safe_serialization=True)


def save_text(tower: TextTower, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the BERT of a tower, without adapters, and its tokenizer, as `load_text` and transformers read them."""
    tower.bert.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
