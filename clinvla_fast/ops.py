"""The operations of clinvla_fast as functions of tensors. Formulas and references are in kernels/, a file each."""

import torch
from torch import Tensor

from .backend import implementation
from .kernels import contrastive as _contrastive
from .kernels import draw_patches as _draw_patches
from .kernels import invertible_adapter as _invertible_adapter
from .kernels import local_alignment as _local_alignment
from .kernels import masked_patches as _masked_patches
from .kernels import transformer_adapt as _transformer_adapt
from .kernels.bottleneck import Bottleneck
from .kernels.local_alignment import word_attention, word_contexts
from .kernels.masked_patches import PatchTokens

__all__ = [
    "Bottleneck",
    "PatchTokens",
    "contrastive",
    "draw_kept_patches",
    "invertible_adapter",
    "local_alignment",
    "masked_patch_embed",
    "sigmoid_contrastive",
    "transformer_adapt",
    "word_attention",
    "word_contexts",
]


def invertible_adapter(x: Tensor, f: Bottleneck, g: Bottleneck, inverse: bool = False) -> Tensor:
    """ClinVLA's invertible adapter (Algorithm 1), or its inverse.

    Args:
        x: [..., H], H divisible by 2.
        f, g: bottlenecks of width H/2 and one inner width, in x's dtype.

    Returns:
        [..., H]; `invertible_adapter(invertible_adapter(x, f, g), f, g, inverse=True)` is x up to rounding.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit together.
    """
    _invertible_adapter.check(x, f, g)
    return implementation(_invertible_adapter, x)(x, f, g, inverse)


def transformer_adapt(
    ffn: Tensor,
    residual: Tensor,
    language: Bottleneck | None,
    task: Bottleneck | None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-12,
    *,
    activation: str = "relu",
    scaling: float = 1.0,
    inner_skip: bool = False,
    source: Tensor | None = None,
    after_norm: bool = False,
) -> Tensor:
    """Language adapter, task adapter, both residuals and the LayerNorm of a block (ClinVLA, section 3.2).

    Args:
        ffn: output of the block's feed-forward network, [..., H].
        residual: the stream it is added to, [..., H].
        language, task: bottlenecks of width H; None leaves that adapter out.
        norm_weight, norm_bias, eps: the LayerNorm of a post-norm block, [H]; None in a pre-norm block.
        activation: of the bottlenecks, "relu" or "gelu" (exact).
        scaling: of what an adapter adds.
        inner_skip: an adapter adds its input too.
        source: what the first adapter reads, [..., H]; None: the hidden state, `norm(ffn + residual)`.
        after_norm: add the adapter (one only) to the hidden state, not to ffn before the last norm.

    Returns:
        The block's output, [..., H].

    Raises:
        ValueError: if shapes, dtypes or devices do not fit together, or after_norm has two adapters.
    """
    _transformer_adapt.check(ffn, residual, language, task, norm_weight, norm_bias, activation, source, after_norm)
    operation = implementation(_transformer_adapt, ffn)
    options = {"activation": activation, "scaling": scaling, "inner_skip": inner_skip}
    options |= {"source": source, "after_norm": after_norm}
    return operation(ffn, residual, language, task, norm_weight, norm_bias, eps, **options)


def draw_kept_patches(present: Tensor, patches: int, keep: int, seed: int | Tensor) -> tuple[Tensor, Tensor]:
    """Which patches each present view keeps: `keep` of `patches`, uniform, independent a view (ClinVLA, section 3.3).

    A view's mask depends on the seed, its study's row and its slot alone: it is the same on every device, in both
    backends, and whichever other views are present.

    Args:
        present: bool [B, V]; n of them are True.
        seed: 64 bits; as an int64 scalar tensor on present's device, a new one neither compiles anew nor waits.

    Returns:
        kept: int64 [n, keep], ascending in each row; rows in the row-major order of `present`.
        restore: int64 [n, patches], where each patch is found in [kept ones, others in ascending order]:
            `cat([kept tokens, mask tokens], 1)` gathered by it is in the order of the image.

    Raises:
        ValueError: if the arguments do not fit together.
    """
    _draw_patches.check(present, patches, keep, seed)
    return implementation(_draw_patches, present)(present, patches, keep, seed)


def masked_patch_embed(
    images: Tensor,
    present: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    position: Tensor,
    cls: Tensor,
    slot: Tensor,
    mean: Tensor,
    std: Tensor,
    kept: Tensor | None = None,
    *,
    keep: int | None = None,
    seed: int | Tensor | None = None,
) -> PatchTokens:
    """Tokens of the kept patches of present views, from gray pixels (ClinVLA, section 3.3).

    Patches are given as `kept`, or drawn by `seed` (as draw_kept_patches); with neither, all N are embedded.

    Args:
        images: uint8 or uint16 [B, V, H, W] over the type's whole range, both sides multiples of p.
        present: bool [B, V]; n of them are True. Absent views are never read. None: all are there.
        weight, bias: the patch projection for normalised C-channel input, [D, C, p, p] and [D].
        position: [1 + N, D], the CLS token's first.
        cls: [D].
        slot: [V, D], added to every token of that view slot.
        mean, std: normalisation of pixels in 0..1, [C].
        kept: int64 [n, k], different patches for each present view in any order, row-major over (study, view).
        keep: how many patches a view keeps; seed: see draw_kept_patches.

    Returns:
        PatchTokens: tokens [n, 1 + k, D] in weight's dtype, CLS first, then patches in the order of `kept`; the kept
        patches [n, k]; and restore [n, N], as of draw_kept_patches.

    Raises:
        ValueError: if the arguments do not fit together.
        RuntimeError: if `kept` does not have one row for each present view (on a GPU a device-side assertion).
    """
    arguments = (images, present, weight, bias, position, cls, slot, mean, std, kept, keep, seed)
    _masked_patches.check(*arguments)
    return implementation(_masked_patches, weight)(*arguments)


def local_alignment(
    image: Tensor,
    image_mask: Tensor,
    text: Tensor,
    text_mask: Tensor,
    tau1: Tensor,
    tau2: Tensor,
    tau3: Tensor,
) -> Tensor:
    """Logits of every image against every report from patches and words (GLoRIA's local loss, as ALTA has it).

    Of more than a few studies nothing of size images x reports x patches x words is held, forward or backward. Autocast
    is left aside, here and in the losses below. For the attention of a word over the patches of one image, as a heatmap
    shows it, see `word_attention`.

    Args:
        image: patch features [I, N, D]; image_mask: bool [I, N], at least one True a row.
        text: word features [J, T, D] in image's dtype; text_mask: bool [J, T], at least one True a row. Features that
            the masks leave out must be finite.
        tau1, tau2, tau3: temperatures, scalars.

    Returns:
        [I, J] in float32 (float64 for float64 features), to float32's accuracy also for half-precision features.

    Raises:
        ValueError: if shapes or dtypes do not fit, or `triton` was asked for and its kernels do not take such features:
            on a GPU they take bfloat16, float16 and float32 up to 128 wide.
    """
    _local_alignment.check(image, image_mask, text, text_mask)
    operation = implementation(_local_alignment, image)
    with _without_autocast(image):
        return operation(image, image_mask, text, text_mask, tau1, tau2, tau3)


def contrastive(image: Tensor, text: Tensor, scale: Tensor, offset: int = 0, symmetric: bool = True) -> Tensor:
    """InfoNCE of matched pairs: the cross-entropy of each image's match among all texts, and of each text's among all
    images, halved; the logits are scale * cosine and are never stored.

    Of a batch sharded over ranks, rank r's part is half the sum of two calls with symmetric=False: its I images
    against all texts and its I texts against all images, both with offset r * I; the mean over ranks is the loss.

    Args:
        image: [I, D]; text: [J, D]. Normalised here; a row of zeros has cosine 0 with everything and gradient 0.
        scale: 1/temperature, a scalar tensor of any floating dtype.
        offset: the match of image i is text i + offset. Every row of the shorter side must have its match: 0 to J - I,
            or, with more images than texts, J - I to 0; rows of the longer side without one are negatives only.
        symmetric: False leaves out the texts' half: the mean cross-entropy of images among texts alone.

    Returns:
        A scalar in float32, float64 for float64 inputs; NaN for an empty batch, as the mean of nothing.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit together, or a match lies outside the batch.
    """
    _contrastive.check(image, text, scale, None, offset)
    with _without_autocast(image):
        return implementation(_contrastive, image)(image, text, scale, offset, symmetric)


def sigmoid_contrastive(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, offset: int = 0) -> Tensor:
    """The sigmoid loss (SigLIP): each of the I x J pairs is told, match or not, from scale * cosine + bias; the sum
    over pairs divided by I.

    Args, returns and raises as `contrastive`; bias is a scalar tensor. The mean over shards of images is the loss.
    """
    _contrastive.check(image, text, scale, bias, offset)
    with _without_autocast(image):
        return implementation(_contrastive, image, "sigmoid")(image, text, scale, bias, offset)


def _without_autocast(x: Tensor) -> torch.autocast:
    """Many training scripts call losses under autocast, whose products would lose what float32 is there for."""
    return torch.autocast(x.device.type, enabled=False)
