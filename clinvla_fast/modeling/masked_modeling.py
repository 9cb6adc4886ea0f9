"""Masked modelling of both modalities: how small towers are made, and a probe of what adapters leave intact.

Images: masked autoencoding (He et al. 2022): encode the kept patches, decode all, compare the masked ones with their
pixels normalised a patch. Words: BERT's masked words. ClinVLA's global embeddings are read from the CLS tokens, which
neither method trains, so here they have work too: the image's must tell a thumbnail of the whole view, the report's
helps with every masked word. Where a tower has an invertible adapter, the heads read the inverse of its output
(ClinVLA, section 3.1.1): they live in the space that the tower was trained in.
"""

import numpy as np
import torch
from timm.layers import trunc_normal_
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy

from ..kernels.masked_patches import to_patches
from .packing import Packing
from .text import TextTower
from .vision import VisionTower


class ImageDecoder(nn.Module):
    """Predicts every patch's normalised pixels from the kept patches' tokens; `inner` is its own width."""

    def __init__(self, width: int, patches: int, pixels: int, depth: int, inner: int):
        super().__init__()
        heads = max(4, inner // 64)
        self.embed = nn.Linear(width, inner)
        self.mask_token = nn.Parameter(torch.zeros(inner))
        self.position = nn.Parameter(torch.zeros(patches, inner))
        self.blocks = nn.Sequential(*(Block(inner, heads, qkv_bias=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(inner)
        self.predict = nn.Linear(inner, pixels)
        trunc_normal_(self.mask_token, std=0.02)
        trunc_normal_(self.position, std=0.02)

    def forward(self, tokens: Tensor, kept: Tensor) -> Tensor:
        """[n, 1 + k, width] and the kept patches [n, k] to [n, N, pixels]."""
        x = self.embed(tokens.to(self.embed.weight.dtype))
        grid = (self.mask_token + x[:, :1]).expand(-1, len(self.position), -1)
        grid = grid.scatter(1, kept[..., None].expand(-1, -1, x.shape[-1]), x[:, 1:])
        return self.predict(self.norm(self.blocks(grid + self.position)))


class WordHead(nn.Module):
    """Logits over the vocabulary; the projection is the tower's own word embedding."""

    def __init__(self, width: int, vocabulary: int):
        super().__init__()
        self.transform = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width))
        self.bias = nn.Parameter(torch.zeros(vocabulary))

    def forward(self, x: Tensor, words: Tensor) -> Tensor:
        return self.transform(x) @ words.mT + self.bias


def patch_targets(views: Tensor, patch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Every patch's normalised pixels [n, N, patch^2], and the mean and the deviation [n, N, 1] that give them back.

    Args:
        views: floating [n, H, W], gray levels.
    """
    pixels = to_patches(views, patch).flatten(-2).flatten(1, 2)
    # + 100: the film's noise, a few gray levels, is not worth predicting
    mean, deviation = pixels.mean(-1, keepdim=True), (pixels.var(-1, keepdim=True) + 100).sqrt()
    return (pixels - mean) / deviation, mean, deviation


def patch_errors(predicted: Tensor, views: Tensor, kept: Tensor, patch: int) -> Tensor:
    """Mean squared errors of masked patches, their pixels normalised a patch: the sum over patches.

    Args:
        predicted: [n, N, patch^2].
        views: [n, H, W], gray levels.
        kept: int64 [n, k], k < N.
    """
    target, _, _ = patch_targets(views.to(predicted.dtype), patch)
    errors = (predicted - target).square().mean(-1)
    masked = torch.ones_like(errors).scatter(1, kept, 0.0)
    return (errors * masked).sum()


def _mean(x: Tensor) -> Tensor:
    """Zero for nothing: a process may have a part of a batch without a view or a word."""
    return x.mean() if x.numel() else x.sum()


class MaskedModeling(nn.Module):
    """Both towers with their heads, or one of them: None is a tower that is not to be trained."""

    def __init__(self, vision: VisionTower | None, text: TextTower | None, mask_token: int):
        super().__init__()
        self.vision, self.text, self.mask_token = vision, text, mask_token
        if vision is not None:
            self.decoder = ImageDecoder(vision.width, vision.patches, vision.patch_size**2, 1, vision.width // 2)
            self.thumbnail = nn.Linear(vision.width, 4 * vision.patches)  # two by two pixels a patch
        if text is not None:
            self.words = WordHead(text.width, text.word_embeddings.num_embeddings)

    def image_loss(self, images: Tensor, present: Tensor, kept: Tensor) -> Tensor:
        """Mean squared error of the masked patches, their pixels normalised a patch, plus that of the thumbnail.

        Args: as VisionTower; `kept` leaves at least one patch out.
        """
        tokens = self.vision(images, present, kept)
        if self.vision.invertible is not None:
            tokens = self.vision.invertible.inverse(tokens)
        views, patch = images[present].float(), self.vision.patch_size
        small = avg_pool2d(views[:, None], patch // 2).flatten(1)
        thumbnail = _mean((self.thumbnail(tokens[:, 0]) - (small - 128) / 64).square())
        masked = max(1, len(kept) * (self.vision.patches - kept.shape[1]))
        return patch_errors(self.decoder(tokens, kept), views, kept, patch) / masked + thumbnail

    def word_loss(self, tokens: Tensor, packing: Packing, masked: Tensor) -> Tensor:
        """Cross-entropy of the words at `masked`, int64 [m], indices into the packed tokens [total]."""
        hidden = self.text(tokens.index_fill(0, masked, self.mask_token), packing)
        hidden = hidden[masked] + hidden[packing.first[packing.row[masked]]]
        if self.text.invertible is not None:
            hidden = self.text.invertible.inverse(hidden)
        logits = self.words(hidden, self.text.word_embeddings.weight)
        return _mean(cross_entropy(logits, tokens[masked], reduction="none"))


def masked_words(length: int, share: float) -> int:
    """How many words of a report of so many tokens are masked: at least one, where it has any."""
    return max(1, round(share * (length - 2))) if length > 2 else 0


def draw_masked_words(lengths: Tensor, share: float, seed: int, row: int = 0) -> Tensor:
    """Which packed tokens are masked: `masked_words` of each report, never its first or last.

    They depend on the seed and the report's row in the whole batch alone, not on how the batch is cut.

    Args:
        lengths: int64 [B], on the CPU.
        row: of the first report.

    Returns:
        int64 [m], ascending indices into the packed tokens, on the CPU.
    """
    masked, start = [], 0
    for number, length in enumerate(lengths.tolist()):
        if length > 2:
            order = np.random.default_rng([seed % 2**64, row + number]).permutation(length - 2)
            masked.append(start + 1 + np.sort(order[: masked_words(length, share)]))
        start += length
    return torch.from_numpy(np.concatenate(masked)) if masked else torch.empty(0, dtype=torch.int64)
