"""Adaptor ("Freeze the backbones", Qin et al.): one small block over the tokens of two frozen encoders.

The block is cross-attention and a feed-forward network, the same weights for both modalities (the paper's Figure 1).
It embeds a study in two ways, and is trained with the symmetric contrastive loss of both:

    paired      image tokens attend to the study's words, words to its image tokens. Each embedding has seen its match:
                the loss is easy, and a retrieval score means nothing
    separate    each modality attends to itself: for retrieval, and wherever one modality is alone
"""

import json
from collections.abc import Iterable
from dataclasses import replace
from math import isqrt
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn.functional import layer_norm, normalize, scaled_dot_product_attention

from ..data.features import FeatureBatch, stored_dtype, view_tokens
from ..distributed import Rows, gathered
from ..errors import DataError
from ..evaluation.retrieval import retrieval_scores
from ..methods.adaptor import METHOD
from ..objectives import global_contrastive
from ..run import replacing, write_json
from ..study import Embeddings, StudyBatch
from .encoders import ImageEncoder, TextEncoder, load_image_encoder, load_text_encoder
from .encoding import Encoding
from .packing import Packing

WEIGHTS = "adaptor.safetensors"
_TEMPERATURE, _LARGEST_SCALE = 0.07, 100.0


class Tokens(NamedTuple):
    """The real tokens of B studies in one modality, packed, in the block's width: x [total, width]; and in the padded
    grid for attention: query, key and value, [B, heads, L, width / heads]."""

    x: Tensor
    packing: Packing
    query: Tensor
    key: Tensor
    value: Tensor


class Adaptor(nn.Module):
    """All that is trained, in the dtype of its own weights; the encoders are elsewhere, and frozen.

    Tokens are normalised (encoders differ in scale) and projected, each modality by its own layer. The block is
    post-norm: attention, residual, LayerNorm, feed-forward network with GELU, residual, LayerNorm. The mean over a
    study's tokens is its embedding. The published abstract gives no sizes and no pooling: these are chosen here.

    Args:
        image_width, text_width: of the encoders' tokens.
        width: of the block and of the embeddings, divisible by heads.
        hidden: of the feed-forward network.
        image_encoder, text_encoder: names or folders, for whoever loads this to embed new studies.
        max_tokens: of a report that it was trained on, CLS and SEP included; for the same.
    """

    def __init__(
        self,
        image_width: int,
        text_width: int,
        *,
        width: int = 512,
        heads: int = 8,
        hidden: int = 2048,
        image_encoder: str = "",
        text_encoder: str = "",
        max_tokens: int = METHOD.recipe.max_tokens,
    ):
        super().__init__()
        self.sizes = {"image_width": image_width, "text_width": text_width}
        self.sizes |= {"width": width, "heads": heads, "hidden": hidden}
        self.encoders = {"image_encoder": str(image_encoder), "text_encoder": str(text_encoder)}
        self.max_tokens = max_tokens
        self.image_in, self.text_in = nn.Linear(image_width, width), nn.Linear(text_width, width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.ffn = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.log_scales = nn.Parameter(torch.full((2,), 1 / _TEMPERATURE).log())

    def scales(self) -> Tensor:
        """Of the paired and of the separate loss: [2]."""
        return self.log_scales.exp().clamp(max=_LARGEST_SCALE)

    def paired(self, batch: FeatureBatch) -> tuple[Tensor, Tensor]:
        """Embeddings that have seen each other, of the B studies' images and texts: [B, width] each.

        Zero where the study lacks that modality; meaningless where it lacks the other.
        """
        image, text = self._read(batch)
        return self._embed(image, text), self._embed(text, image)

    def separate(self, batch: FeatureBatch) -> tuple[Tensor, Tensor]:
        """Embeddings of each modality by itself, of the B studies' images and texts: [B, width] each.

        Zero where the study lacks that modality.
        """
        image = self.alone("image", batch.image, batch.image_mask)
        return image, self.alone("text", batch.text, batch.text_mask)

    def alone(self, side: Literal["image", "text"], tokens: Tensor, mask: Tensor) -> Tensor:
        """Embeddings of one modality by itself, from its tokens and mask in a FeatureBatch: [B, width]."""
        read = self._tokens(self.image_in if side == "image" else self.text_in, tokens, mask)
        return self._embed(read, read)

    def losses(self, batch: FeatureBatch) -> dict[str, Tensor]:
        """Of the studies that have both a view and a word: scalars `paired`, `separate` and their mean, `loss`.

        Without any such study all three are zero. Over several ranks each has its part of a batch and contrasts it
        with everyone's: the mean of the ranks' losses is that of the batch.
        """
        batch = batch.paired()
        rows, scales = Rows(len(batch)), self.scales()
        zero = sum(p.sum() for p in self.parameters()) * 0
        losses = {"paired": zero, "separate": zero}
        if rows.total:
            image, text = self._read(batch)
            paired = self._embed(image, text), self._embed(text, image)
            separate = self._embed(image, image), self._embed(text, text)
            with torch.autocast(scales.device.type, enabled=False):  # whatever the block computes in
                losses["paired"] = zero + global_contrastive(*paired, scales[0], rows)
                losses["separate"] = zero + global_contrastive(*separate, scales[1], rows)
        return {"loss": (losses["paired"] + losses["separate"]) / 2, **losses}

    def block(self, asking: Tokens, asked: Tokens) -> Tensor:
        """The tokens of `asking` [total, width], having attended to those of `asked`, which may be the same."""
        # A study without any token to attend to sees padding, which is zero: no NaN, and nothing is made of it.
        mask = asked.packing.mask | ~asked.packing.mask.any(1, keepdim=True)
        found = scaled_dot_product_attention(asking.query, asked.key, asked.value, attn_mask=mask[:, None, None])
        x = self.norm1(asking.x + self.out(asking.packing.pack(found.transpose(1, 2).flatten(2))))
        return self.norm2(x + self.ffn(x))

    def _read(self, batch: FeatureBatch) -> tuple[Tokens, Tokens]:
        return (
            self._tokens(self.image_in, batch.image, batch.image_mask),
            self._tokens(self.text_in, batch.text, batch.text_mask),
        )

    def _tokens(self, project: nn.Linear, features: Tensor, mask: Tensor) -> Tokens:
        packing = Packing.of(mask.sum(1).cpu(), mask.device)
        x = features[mask].to(project.weight.dtype)  # padding is never computed on
        x = project(layer_norm(x, x.shape[-1:]))
        qkv = packing.pad(self.qkv(x)).unflatten(-1, (3, self.sizes["heads"], -1)).permute(2, 0, 3, 1, 4)
        return Tokens(x, packing, *qkv)

    def _embed(self, asking: Tokens, asked: Tokens) -> Tensor:
        total = asking.packing.pad(self.block(asking, asked)).sum(1)
        return total / asking.packing.mask.sum(1, keepdim=True).clamp(min=1)

    # Files: config.json, with the encoders named, and the weights

    def save(self, folder: Path) -> None:
        """Write config.json and adaptor.safetensors. An encoder that lies in `folder` is named relative to it."""
        folder = Path(folder).resolve()
        encoders = dict(self.encoders)
        for kind, name in encoders.items():
            if name and Path(name).exists():  # a path, then, and not a name on a hub
                path = Path(name).resolve()
                encoders[kind] = str(path.relative_to(folder) if path.is_relative_to(folder) else path)
        write_json(folder / "config.json", self.sizes | encoders | {"max_tokens": self.max_tokens})
        with replacing(folder / WEIGHTS) as partial:
            partial.write_bytes(save({name: x.detach().cpu().contiguous() for name, x in self.state_dict().items()}))

    @classmethod
    def load(cls, folder: Path) -> "Adaptor":
        """The Adaptor that was saved in `folder`; its `encoders` say what to load beside it.

        Raises:
            DataError: if the folder holds no Adaptor, or a damaged one.
        """
        folder = Path(folder)
        if not (folder / "config.json").is_file() or not (folder / WEIGHTS).is_file():
            raise DataError(f"{folder} holds no config.json and {WEIGHTS}: pass a folder that an Adaptor was saved in.")
        try:
            settings = json.loads((folder / "config.json").read_text())
            for kind in ("image_encoder", "text_encoder"):
                if settings[kind] and (folder / settings[kind]).exists():
                    settings[kind] = str(folder / settings[kind])
            adaptor = cls(**settings)
            adaptor.load_state_dict(load_file(folder / WEIGHTS))
        except (ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            reason = str(error).splitlines()[0]
            raise DataError(f"{folder}: the Adaptor is damaged ({reason}): copy or train it again.") from None
        return adaptor


class AdaptorModel(nn.Module, Encoding):
    """An Adaptor and its encoders as one model, with what evaluation, embedding and search use of a ClinVLA.

    Args:
        vision, text: the encoders.
    """

    aligns = True
    """Images and reports are in one space: so the loss has it."""

    def __init__(self, adaptor: Adaptor, vision: ImageEncoder, text: TextEncoder):
        super().__init__()
        self.adaptor, self.vision, self.text = adaptor, vision, text
        self.tokenizer, self.max_tokens = text.tokenizer, min(adaptor.max_tokens, text.max_tokens)
        self.width = adaptor.sizes["width"]
        self.recipe = replace(METHOD.recipe, width=self.width, max_tokens=self.max_tokens)
        self.eval()

    @classmethod
    def load(cls, folder: Path) -> "AdaptorModel":
        """What was saved in `folder`, with the encoders that it names.

        Raises:
            DataError: if the folder holds no Adaptor, a damaged one, or one of other encoders than it names.
            TowerUnavailable: if an encoder cannot be had.
        """
        adaptor = Adaptor.load(folder)
        vision = load_image_encoder(adaptor.encoders["image_encoder"])
        text = load_text_encoder(adaptor.encoders["text_encoder"])
        for kind, encoder in (("image", vision), ("text", text)):
            if encoder.width != adaptor.sizes[f"{kind}_width"]:
                expected = adaptor.sizes[f"{kind}_width"]
                raise DataError(
                    f"{folder}: {encoder.name} gives tokens of {encoder.width} numbers, its Adaptor reads {expected}."
                )
        return cls(adaptor, vision, text)

    @property
    def device(self) -> torch.device:
        return self.adaptor.log_scales.device

    def forward(self, batch: StudyBatch) -> Embeddings:
        """Of whole studies, each modality by itself; zero where a study has none. There is nothing local."""
        return Embeddings(
            *self.embed_images(batch.images, batch.present), *self.embed_reports(batch.tokens, batch.lengths)
        )

    def embed_images(self, images: Tensor, present: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The image side of Embeddings. Args: as StudyBatch."""
        return self._embed("image", *view_tokens(images, present, self.vision))

    def embed_reports(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The report side of Embeddings. Args: as StudyBatch."""
        return self._embed("text", *self.text(tokens, lengths))

    def image_features(self, batch: StudyBatch) -> Tensor:
        """The mean of the tokens of a study's views, as the image encoder gives them: [B, its width]."""
        tokens, mask = view_tokens(batch.images, batch.present, self.vision)
        return tokens.masked_fill(~mask[..., None], 0).float().sum(1) / mask.sum(1, keepdim=True).clamp(min=1)

    def patch_features(self, batch: StudyBatch) -> Tensor:
        """Patch tokens of the n current frontal views, row by row of patches, which follow a transformer's prefix:
        [n, patches, the image encoder's width]."""
        tokens = self.vision(batch.images[batch.present[:, 0], 0])
        return tokens[:, -(isqrt(tokens.shape[1]) ** 2) :]

    def _embed(self, side: Literal["image", "text"], tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rounded = tokens.to(stored_dtype(tokens.dtype))  # as it was trained on them
        return self.adaptor.alone(side, rounded, mask), rounded.new_zeros(*mask.shape, 0), mask


@torch.inference_mode()
def retrieve_features(adaptor: Adaptor, batches: Iterable[FeatureBatch]) -> dict[str, dict[str, float | None]]:
    """Retrieval among the studies that have both a view and a word.

    Args:
        batches: of a FeatureLoader, or made by `encode_features`.

    Returns:
        text_to_image, image_to_text: `retrieval_scores` of the separate embeddings. "paired (leaks the match)": of the
        paired ones, which were given their match: recall@1, the share of studies whose text embedding is nearest to
        their own image embedding. It says that the paired path is trained, and nothing about retrieval.

    Raises:
        DataError: if no study has both.
    """
    mine = []
    for batch in batches:
        batch = batch.to(adaptor.log_scales.device).paired()
        if len(batch):
            found = (*adaptor.separate(batch), *adaptor.paired(batch))
            # As arrays: a tensor's row would be sent with all of the tensor.
            mine += list(zip(*(normalize(x, dim=-1).float().cpu().numpy() for x in found), batch.labels, strict=True))
    everyone = [study for share in gathered(mine) for study in share]
    if not everyone:
        raise DataError("no study has both a view and a word: there is nothing to retrieve.")
    *embeddings, labels = zip(*everyone, strict=True)
    image, text, paired_image, paired_text = (torch.from_numpy(np.stack(x)) for x in embeddings)
    leaking = retrieval_scores(paired_text, paired_image, labels, recall_at=1)
    return {
        "text_to_image": retrieval_scores(text, image, labels),
        "image_to_text": retrieval_scores(image, text, labels),
        "paired (leaks the match)": {name: leaking[name] for name in ("recall@1", "recall@1_chance")},
    }
