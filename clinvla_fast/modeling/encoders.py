"""Any encoder of timm or Hugging Face, frozen and whole: uint8 views or packed reports in, all their tokens out."""

import hashlib
import json
from pathlib import Path

import timm
import torch
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .checkpoints import KeyReport
from .packing import Packing
from .towers import load_text, load_vision, unavailable


class _Frozen(nn.Module):
    """A model in evaluation mode for good, without gradients.

    name: where it was loaded from.
    """

    key_report: KeyReport | None = None
    """What became of every key of the file that it was read from; None where a library has read it."""

    def __init__(self, model: nn.Module, name: str, dtype: torch.dtype | None):
        super().__init__()
        self.model, self.name = model.requires_grad_(False).to(dtype), str(name)
        self.eval()

    def train(self, mode: bool = True) -> "_Frozen":
        return super().train(False)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def _identity(self, *settings) -> str:
        """SHA-256 of the model's class, `settings` and all weights as they are stored here, their dtype included."""
        digest = hashlib.sha256(json.dumps([type(self.model).__name__, *settings]).encode())
        for name, x in sorted(self.state_dict().items()):
            digest.update(f"{name} {x.dtype} {list(x.shape)}".encode())
            digest.update(x.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()


class ImageEncoder(_Frozen):
    """A timm model or a Hugging Face image model that reads square gray images.

    Args:
        model: for normalised pixels [n, channels, image_size, image_size].
        name: where it was loaded from.
        image_size, channels: what it reads; a gray image is repeated over the channels.
        mean, std: of the pixels in 0..1 that it expects, one a channel.
        dtype: what it is stored and computes in; None: as it was saved.

    patches and width are of its tokens. timm's `forward_features` gives them, or Hugging Face's `last_hidden_state`:
    of a transformer with its CLS and other prefix tokens, of a conv net the last feature map, row by row.

    Raises:
        ValueError: if it gives anything else than one sequence or one map.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        *,
        image_size: int,
        channels: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        dtype: torch.dtype | None = None,
    ):
        super().__init__(model, name, dtype)
        self.image_size, self._channels = image_size, channels
        for kind, value in (("mean", mean), ("std", std)):
            self.register_buffer(kind, torch.tensor(value).view(-1, 1, 1))
        self.patches, self.width = self._tokens(torch.zeros(1, image_size, image_size, dtype=torch.uint8)).shape[1:]

    @property
    def sha256(self) -> str:
        """Of all that its tokens depend on: another encoder has another."""
        return self._identity(self.image_size)

    def forward(self, views: Tensor) -> Tensor:
        """Tokens of gray images, each on its own.

        Args:
            views: uint8 [n, image_size, image_size].

        Returns:
            [n, patches, width] in the encoder's dtype.

        Raises:
            ValueError: if the images are of another size.
        """
        if views.shape[1:] != (self.image_size, self.image_size):
            raise ValueError(f"images are {tuple(views.shape)}: expected [n, {self.image_size}, {self.image_size}].")
        return self._tokens(views) if len(views) else self.mean.new_empty(0, self.patches, self.width).to(self.dtype)

    @torch.no_grad()
    def _tokens(self, views: Tensor) -> Tensor:
        pixels = (views[:, None] / 255 - self.mean) / self.std
        pixels = pixels.expand(-1, self._channels, -1, -1).to(self.dtype)
        if hasattr(self.model, "forward_features"):
            tokens = self.model.forward_features(pixels)
        else:
            tokens = self.model(pixel_values=pixels).last_hidden_state
        if not isinstance(tokens, Tensor) or tokens.ndim not in (3, 4):
            raise ValueError(f"{self.name} gives neither one sequence of tokens nor one feature map.")
        if tokens.ndim == 4:  # [n, C, H, W] or [n, H, W, C], of square images
            tokens = tokens.flatten(2).mT if tokens.shape[2] == tokens.shape[3] else tokens.flatten(1, 2)
        return tokens


class TextEncoder(_Frozen):
    """A Hugging Face text encoder and its tokenizer.

    Args:
        model: gives `last_hidden_state`.
        tokenizer: with tokens for CLS and SEP, as `StudyLoader` puts them around a report.
        name: where it was loaded from.
        dtype: what it is stored and computes in; None: as it was saved.

    width is of its tokens; max_tokens: of a report that it reads, CLS and SEP included.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, dtype: torch.dtype | None = None
    ):
        super().__init__(model, name, dtype)
        self.tokenizer, self.width = tokenizer, model.config.hidden_size
        positions = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
        first = getattr(positions, "padding_idx", None)  # RoBERTa counts from the one after it
        most = getattr(model.config, "max_position_embeddings", tokenizer.model_max_length)
        self.max_tokens = min(most - (0 if first is None else first + 1), tokenizer.model_max_length)

    @property
    def sha256(self) -> str:
        """Of all that its tokens depend on: another encoder, or another vocabulary, has another."""
        return self._identity(sorted(self.tokenizer.get_vocab().items()))

    @torch.no_grad()
    def forward(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens of the words of packed reports; CLS and SEP are read, but not given back.

        Args:
            tokens: int64 [sum of lengths]; lengths: int64 [B], on the CPU. As in StudyBatch.

        Returns:
            [B, T, width] in the encoder's dtype, anything where there is no word; and where there is one, bool [B, T].
            T: the words of the longest report.

        Raises:
            ValueError: if a report is longer than max_tokens.
        """
        if lengths.max() > self.max_tokens:
            raise ValueError(f"a report has {lengths.max()} tokens: {self.name} reads {self.max_tokens} at most.")
        packing, padding = Packing.of(lengths, tokens.device), self.tokenizer.pad_token_id or 0
        grid = packing.pad(tokens - padding) + padding
        hidden = self.model(input_ids=grid, attention_mask=packing.mask.long()).last_hidden_state
        return hidden[:, 1:-1], packing.mask[:, 2:]


def load_image_encoder(name: str | Path, dtype: torch.dtype | None = None) -> ImageEncoder:
    """Any image encoder with its pretrained weights, from safetensors or a weights-only checkpoint.

    Args:
        name: a folder that timm's `save_for_hf` or Hugging Face's `save_pretrained` wrote (with the preprocessor's
            configuration), a file of a ViT's weights (see `load_vision`), a model's name in timm, "timm/..." on the
            hub, or any other name there.
        dtype: what it is stored and computes in; None: as it was saved.

    Raises:
        TowerUnavailable: if there is no such thing here or on the hub, or it reads no square images.
    """
    name = str(name)
    if Path(name).is_file():
        tower = load_vision(name)
        pixels = {"mean": tuple(tower.mean.tolist()), "std": tuple(tower.std.tolist())}
        sizes = {"image_size": tower.image_size, "channels": tower.vit.patch_embed.proj.in_channels}
        encoder = ImageEncoder(tower.vit, name, **sizes, **pixels, dtype=dtype)
        encoder.key_report = tower.key_report
        return encoder
    try:
        config = Path(name) / "config.json"
        if config.is_file():
            source = None if "model_type" in json.loads(config.read_text()) else f"local-dir:{name}"
        elif name.startswith("timm/"):
            source = f"hf-hub:{name}"
        else:
            source = name if timm.is_model(name) else None
        model, settings = _huggingface_image(name) if source is None else _timm(source)
        return ImageEncoder(model, name, **settings, dtype=dtype)
    except Exception as error:  # timm, transformers and their hub client raise whatever their parts raise
        expected = "an image model's name on timm's or Hugging Face's hub, or a folder that either saved"
        raise unavailable("vision", name, expected, error) from error


def load_text_encoder(name: str | Path, dtype: torch.dtype | None = None) -> TextEncoder:
    """Any Hugging Face text encoder with its pretrained weights, from safetensors or a weights-only checkpoint.

    Args:
        name: a folder written by `save_pretrained`, the tokenizer's too, a file of a BERT's weights with its tokenizer
            beside it (see `load_text`), or a name on the hub.
        dtype: what it is stored and computes in; None: as it was saved.

    Raises:
        TowerUnavailable: if there is no such thing here or on the hub, or its tokenizer knows no CLS and SEP.
    """
    name = str(name)
    if Path(name).is_file():
        tower, tokenizer = load_text(name)
        encoder = TextEncoder(tower.bert, tokenizer, name, dtype)
        encoder.key_report = tower.key_report
        return encoder
    try:
        model, tokenizer = _huggingface(name), AutoTokenizer.from_pretrained(name)
        if tokenizer.cls_token_id is None or tokenizer.sep_token_id is None:
            raise ValueError("its tokenizer has no CLS or no SEP token")
        return TextEncoder(model, tokenizer, name, dtype)
    except Exception as error:
        expected = "a text encoder's name on Hugging Face's hub, or a folder with its weights and tokenizer"
        raise unavailable("text", name, expected, error) from error


def _timm(source: str) -> tuple[nn.Module, dict]:
    model = timm.create_model(source, pretrained=True, num_classes=0)
    pixels = timm.data.resolve_model_data_config(model)
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    channels = first.in_channels if first else 3
    size = _side(*pixels["input_size"][1:])
    return model, {"image_size": size, "channels": channels} | {k: pixels[k][:channels] for k in ("mean", "std")}


def _huggingface_image(name: str) -> tuple[nn.Module, dict]:
    model, pixels = _huggingface(name), AutoImageProcessor.from_pretrained(name)
    model = getattr(model, "vision_model", model)  # the half of a CLIP
    size = dict(getattr(pixels, "crop_size", None) or pixels.size)
    side = size.get("shortest_edge") or _side(size["height"], size["width"])
    mean, std = (pixels.image_mean, pixels.image_std) if pixels.do_normalize else ((0.0,), (1.0,))
    channels = getattr(model.config, "num_channels", 3)
    return model, {"image_size": side, "channels": channels, "mean": tuple(mean), "std": tuple(std)}


def _huggingface(name: str) -> PreTrainedModel:
    """The encoder, with nothing in it that was not in the file."""
    model, loaded = AutoModel.from_pretrained(name, output_loading_info=True)
    for key in loaded["missing_keys"]:
        if not key.startswith("pooler."):
            raise ValueError(f"its weights lack {key}")
        model.pooler = None  # new and random, and not used here
    return model.get_encoder() if model.config.is_encoder_decoder else model


def _side(height: int, width: int) -> int:
    if height != width:
        raise ValueError(f"it reads images of {height} x {width} pixels: expected a square")
    return height
