"""The operations of clinvla_fast as functions of tensors. Formulas and references are in kernels/, a file each."""

from torch import Tensor

from .backend import implementation
from .kernels import contrastive as _contrastive
from .kernels import invertible_adapter as _invertible_adapter
from .kernels import local_alignment as _local_alignment
from .kernels import masked_patches as _masked_patches
from .kernels import transformer_adapt as _transformer_adapt
from .kernels.bottleneck import Bottleneck
from .kernels.local_alignment import word_attention, word_contexts
from .kernels.masked_patches import draw_kept_patches

__all__ = [
    "Bottleneck",
    "contrastive",
    "draw_kept_patches",
    "invertible_adapter",
    "local_alignment",
    "masked_patch_embed",
    "transformer_adapt",
    "word_attention",
    "word_contexts",
]


def invertible_adapter(x: Tensor, f: Bottleneck, g: Bottleneck, inverse: bool = False) -> Tensor:
    """ClinVLA's invertible adapter (Algorithm 1), or its inverse.

    Args:
        x: [..., H], H divisible by 2.
        f, g: bottlenecks of width H/2, in x's dtype.

    Returns:
        [..., H]; `invertible_adapter(invertible_adapter(x, f, g), f, g, inverse=True)` is x up to rounding.
    """
    return implementation(_invertible_adapter, x.is_cuda)(x, f, g, inverse)


def transformer_adapt(
    ffn: Tensor,
    residual: Tensor,
    language: Bottleneck | None,
    task: Bottleneck | None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-12,
) -> Tensor:
    """Language adapter, task adapter, both residuals and the LayerNorm of a block (ClinVLA, section 3.2).

    Args:
        ffn: output of the block's feed-forward network, [..., H].
        residual: the stream it is added to, [..., H].
        language, task: bottlenecks of width H; None leaves that adapter out.
        norm_weight, norm_bias, eps: the LayerNorm of a post-norm block, [H]; None in a pre-norm block.

    Returns:
        The block's output, [..., H].
    """
    operation = implementation(_transformer_adapt, ffn.is_cuda)
    return operation(ffn, residual, language, task, norm_weight, norm_bias, eps)


def masked_patch_embed(
    images: Tensor,
    present: Tensor,
    weight: Tensor,
    bias: Tensor,
    position: Tensor,
    cls: Tensor,
    slot: Tensor,
    mean: Tensor,
    std: Tensor,
    kept: Tensor | None = None,
) -> Tensor:
    """Tokens of the kept patches of present views, from uint8 pixels (ClinVLA, section 3.3).

    Args:
        images: uint8 [B, V, H, W], both sides multiples of p.
        present: bool [B, V]; n of them are True. Absent views are never read.
        weight, bias: the patch projection for normalised C-channel input, [D, C, p, p] and [D].
        position: [1 + N, D], the CLS token's first.
        cls: [D].
        slot: [V, D], added to every token of that view slot.
        mean, std: normalisation of pixels in 0..1, [C].
        kept: int64 [n, k] patch indices of each present view, row-major over (study, view); None keeps all N.

    Returns:
        [n, 1 + k, D] in weight's dtype, CLS first.

    Raises:
        ValueError: if the image's sides are not multiples of p.
    """
    operation = implementation(_masked_patches, images.is_cuda)
    return operation(images, present, weight, bias, position, cls, slot, mean, std, kept)


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

    Args:
        image: patch features [I, N, D]; image_mask: bool [I, N], at least one True a row.
        text: word features [J, T, D]; text_mask: bool [J, T], at least one True a row.
        tau1, tau2, tau3: temperatures, scalars.

    Returns:
        [I, J] in image's dtype.
    """
    operation = implementation(_local_alignment, image.is_cuda)
    return operation(image, image_mask, text, text_mask, tau1, tau2, tau3)


def contrastive(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """Symmetric InfoNCE of matched pairs image [B, D], text [B, D] (normalised here) at a temperature 1/scale.

    Returns:
        A scalar; NaN for an empty batch, as the mean of nothing.
    """
    return implementation(_contrastive, image.is_cuda)(image, text, scale)
