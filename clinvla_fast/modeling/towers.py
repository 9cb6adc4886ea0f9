"""Where towers come from: timm and transformers, by hub name or local path; or made small, here."""

import json
from pathlib import Path

import timm
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from timm.models import save_for_hf
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from transformers import AutoTokenizer, BertConfig, BertModel, BertTokenizerFast, PreTrainedTokenizerFast

from ..errors import DataError
from .checkpoints import alta_adapters, bert_options, load_weights, read_weights, vit_options
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
_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_RADIOGRAPHS = {  # by a weight that only their files have: MRM and ALTA give all three channels one mean and deviation
    "bert_mlp.weight": {"mean": (0.4978,) * 3, "std": (0.2449,) * 3},
    "bert_embed.weight": {"mean": (0.4785,) * 3, "std": (0.2834,) * 3},
}
_SPECIAL = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}


class TowerUnavailable(DataError):
    """A tower's weights cannot be had, or are of another kind. The message says what to pass."""


def unavailable(kind: str, name: str, expected: str, error: Exception) -> TowerUnavailable:
    """The error that says why a tower cannot be had, and what to pass."""
    reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
    return TowerUnavailable(
        f"{kind} tower {name!r} is neither on this machine nor to be had from its hub ({reason}). "
        f"Pass --{kind}-tower with {expected}."
    )


def load_vision(name: str) -> VisionTower:
    """A ViT with its pretrained weights.

    Args:
        name: a folder that holds timm's config.json and weights; a file of a ViT's weights, .safetensors or what
            torch.save wrote, in the layout of timm, MAE, MRM, ALTA, DINO or transformers (see `checkpoints`); or a name
            on timm's hub such as "vit_base_patch16_224.mae". A config.json or preprocessor_config.json beside a file
            is heeded; without, RGB pixels are normalised as MAE, MRM and ALTA have it, gray ones to -1..1.

    Returns:
        The tower. Its `key_report` says what became of every key of a file; None: timm has loaded it.

    Raises:
        TowerUnavailable: if there is no such thing here or on the hub, or it is no plain ViT.
        DataError: if a file cannot be read.
    """
    if Path(name).is_file():
        return _vision_of_file(Path(name))
    source = f"local-dir:{name}" if Path(name).is_dir() else name
    try:
        vit = timm.create_model(source, pretrained=True, num_classes=0, global_pool="token")
    except Exception as error:  # timm and its hub client raise whatever their parts raise
        expected = "a timm ViT's name, a folder that timm saved, or a file of a ViT's weights"
        raise unavailable("vision", name, expected, error) from error
    if not isinstance(vit, VisionTransformer):
        raise TowerUnavailable(f"vision tower {name!r} is a {type(vit).__name__}: expected a VisionTransformer.")
    pixels, channels = timm.data.resolve_model_data_config(vit), vit.patch_embed.proj.in_channels
    return VisionTower(vit, pixels["mean"][:channels], pixels["std"][:channels])


def _vision_of_file(file: Path) -> VisionTower:
    weights = read_weights(file)
    try:
        options = vit_options(weights, _beside(file, "config.json"))
        vit = VisionTransformer(**options)
        report = load_weights(vit, weights, "vision")
    except DataError as error:
        raise TowerUnavailable(f"vision tower {str(file)!r}: {error}") from error
    channels = options["in_chans"]
    theirs = [_RADIOGRAPHS[mark] for mark in _RADIOGRAPHS if any(key.endswith(mark) for key in weights)]
    pixels = (theirs or [_IMAGENET])[0] if channels == 3 else dict.fromkeys(("mean", "std"), (0.5,) * channels)
    said = _beside(file, "config.json").get("pretrained_cfg", {})  # timm's, else transformers'
    said = said or {key.removeprefix("image_"): x for key, x in _beside(file, "preprocessor_config.json").items()}
    tower = VisionTower(vit, *(tuple(said.get(key, pixels[key]))[:channels] for key in ("mean", "std")))
    tower.key_report, tower.found_adapters = report, alta_adapters(weights, "vision")
    return tower


def _beside(file: Path, name: str) -> dict:
    """What a JSON file in the same folder says; nothing if there is none."""
    try:
        return json.loads((file.parent / name).read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise DataError(f"{file.parent / name} is no JSON ({error}): mend it, or move it away.") from error


def load_text(name: str) -> tuple[TextTower, PreTrainedTokenizerFast]:
    """A BERT with its pretrained weights, and its tokenizer.

    Args:
        name: a folder written by `save_pretrained`; a file of a BERT's weights, .safetensors or what torch.save wrote,
            alone or within MRM's or ALTA's (see `checkpoints`), with its tokenizer.json or vocab.txt beside it; or a
            name on the hub such as "dmis-lab/biobert-v1.1". A config.json beside a file is heeded.

    Returns:
        The tower and the tokenizer. The tower's `key_report` says what became of every key of a file; None:
        transformers has loaded it.

    Raises:
        TowerUnavailable: if there is no such thing here or on the hub, or it is no BERT.
        DataError: if a file cannot be read.
    """
    if Path(name).is_file():
        return _text_of_file(Path(name))
    try:
        said, _ = BertConfig.get_config_dict(name)
        own, model_type = said.get("model_type") == "bert", said.get("model_type", "model of no type")
        if not own and model_type != "cxr-bert":  # CXR-BERT is a BERT with a head, whose code we do not need
            raise TowerUnavailable(f"text tower {name!r} is a {model_type}: expected a bert.")
        bert = BertModel.from_pretrained(name, config=BertConfig.from_dict(said), add_pooling_layer=False)
        tokenizer = (AutoTokenizer if own else BertTokenizerFast).from_pretrained(name)
    except (OSError, ValueError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        expected = "a BERT's name, a folder that holds its config.json, weights and tokenizer, or a file of its weights"
        raise unavailable("text", name, expected, error) from error
    return TextTower(bert), tokenizer


def _text_of_file(file: Path) -> tuple[TextTower, PreTrainedTokenizerFast]:
    weights = read_weights(file)
    try:
        bert = BertModel(BertConfig(**bert_options(weights, _beside(file, "config.json"))), add_pooling_layer=False)
        report = load_weights(bert, weights, "text")
        tokenizer = _tokenizer_beside(file)
        if len(tokenizer) > bert.config.vocab_size:
            raise DataError(f"its tokenizer has {len(tokenizer)} pieces, the weights {bert.config.vocab_size}.")
    except DataError as error:
        raise TowerUnavailable(f"text tower {str(file)!r}: {error}") from error
    tower = TextTower(bert.eval())
    tower.key_report, tower.found_adapters = report, alta_adapters(weights, "text")
    return tower, tokenizer


def _tokenizer_beside(file: Path) -> PreTrainedTokenizerFast:
    """Of tokenizer.json or vocab.txt; if nothing more is said, with BERT's special tokens and the words' own case."""
    folder, said = file.parent, (file.parent / "tokenizer_config.json").is_file()
    if (folder / "tokenizer.json").is_file():
        return PreTrainedTokenizerFast.from_pretrained(folder, **({} if said else _SPECIAL))
    if not (folder / "vocab.txt").is_file():
        raise DataError(f"it has no tokenizer beside it: put its tokenizer.json or vocab.txt into {str(folder)!r}.")
    words = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
    cased = any(word != word.lower() for word in words if not word.startswith("["))
    return BertTokenizerFast.from_pretrained(folder, **({} if said else {"do_lower_case": not cased}))


def make_tiny_vision() -> VisionTower:
    """A new small image tower with random weights: 128 x 128 pixels in 8 x 8 patches."""
    return VisionTower(timm.create_model("vit_tiny_patch16_224", **_TINY_VISION), **_TINY_PIXELS)


def make_tiny_text(vocabulary: int) -> TextTower:
    """A new small report tower with random weights."""
    return TextTower(BertModel(BertConfig(vocab_size=vocabulary, **_TINY_TEXT), add_pooling_layer=False))


def tower_depths(vision: str | None, text: str | None) -> tuple[int, int]:
    """How many blocks an image and a report tower have, by name; None: those that are made here.

    Raises: as `load_vision` and `load_text`.
    """
    return (
        _TINY_VISION["depth"] if vision is None else len(load_vision(vision).adapts),
        _TINY_TEXT["num_hidden_layers"] if text is None else len(load_text(text)[0].adapts),
    )


def new_vision(tower: VisionTower) -> VisionTower:
    """The same tower, its weights random again, as timm starts them."""
    for module in tower.vit.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    tower.vit.init_weights()
    return tower


def new_text(tower: TextTower) -> TextTower:
    """A tower of the same sizes with random weights, as transformers starts them."""
    return TextTower(BertModel(tower.bert.config, add_pooling_layer=False))


def save_vision(tower: VisionTower, folder: Path) -> None:
    """Write the ViT of a tower, without adapters, in the layout that `load_vision` and timm read."""
    pixels = {"mean": tuple(tower.mean.tolist()), "std": tuple(tower.std.tolist())}
    vit, block = tower.vit, tower.vit.blocks[0]
    sizes = {
        "img_size": tower.image_size,
        "patch_size": tower.patch_size,
        "in_chans": vit.patch_embed.proj.in_channels,
        "embed_dim": vit.embed_dim,
        "depth": len(vit.blocks),
        "num_heads": block.attn.num_heads,
        "mlp_ratio": block.mlp.fc1.out_features / vit.embed_dim,
        "qkv_bias": block.attn.qkv.bias is not None,
        "init_values": None if isinstance(block.ls1, nn.Identity) else 1.0,
        "num_classes": 0,
    }
    if not getattr(vit, "pretrained_cfg", None):  # read from a file: any plain ViT's name, of which all is overridden
        vit.pretrained_cfg = {"architecture": "vit_tiny_patch16_224"}
    save_for_hf(vit, str(folder), model_args=sizes, data_config=pixels, safe_serialization=True)


def save_text(tower: TextTower, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the BERT of a tower, without adapters, and its tokenizer, as `load_text` and transformers read them."""
    tower.bert.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
