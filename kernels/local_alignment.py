"""Local alignment (the local loss of GLoRIA and ALTA; ClinVLA's L_local): every image scored against every report.

For image i with patch features C [N, D] and report j with word features W [T, D]:

    S    = C W^T                              [N, T], not normalised
    A    = softmax_n(tau1 * softmax_t(S))     over the words, then over the patches
    c_t  = sum_n A[n, t] C[n]                 what the image shows of word t
    s    = log sum_t exp(tau2 * cos(W[t], c_t))
    logit(i, j) = tau3 * s(i, j)

Two identities save work: cos does not see the length of c_t, so A needs no denominator; and W[t] . c_t is the sum over
n of A[n, t] S[n, t], so the products of S serve twice. The reference takes images and reports by length, in blocks
small enough for a CPU's cache and cut to the longest of each, and recomputes a block in the backward pass: little
padding is computed, and what is held does not grow with the batch.
"""

import math

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_BLOCK_ELEMENTS = 1 << 19
_NO_RANDOM = {"preserve_rng_state": False}


def word_attention(image: Tensor, image_mask: Tensor, text: Tensor, text_mask: Tensor, tau1: Tensor | float) -> Tensor:
    """A of matched pairs, patches [..., N, D] and words [..., T, D]: [..., N, T], each word's weights sum to 1."""
    scores = (image @ text.mT).masked_fill(~text_mask.unsqueeze(-2), -torch.inf)
    weights = tau1 * scores.softmax(-1)
    return weights.masked_fill(~image_mask.unsqueeze(-1), -torch.inf).softmax(-2)


def word_contexts(image: Tensor, image_mask: Tensor, text: Tensor, text_mask: Tensor, tau1: Tensor | float) -> Tensor:
    """c_t of matched pairs: [..., T, D]."""
    return word_attention(image, image_mask, text, text_mask, tau1).mT @ image


def _scores(image: Tensor, image_mask: Tensor, text: Tensor, text_mask: Tensor, tau1: Tensor, tau2: Tensor) -> Tensor:
    """s for images [I, N, D] against reports [J, T, D]: [I, J]. All tensors inside are [I, N, J * T] or smaller."""
    words = text.flatten(0, 1)
    products = image @ words.mT
    share = products.unflatten(-1, text_mask.shape).masked_fill(~text_mask, -torch.inf).softmax(-1).flatten(-2)
    logits = (tau1 * share).masked_fill(~image_mask[..., None], -torch.inf)
    weights = (logits - logits.detach().amax(1, keepdim=True)).exp()
    length = torch.linalg.vector_norm(weights.mT @ image, dim=-1) * torch.linalg.vector_norm(words, dim=-1)
    cosine = (weights * products).sum(1) / length.clamp(min=torch.finfo(length.dtype).tiny)
    return (tau2 * cosine).unflatten(-1, text_mask.shape).masked_fill(~text_mask, -torch.inf).logsumexp(-1)


def _blocks(features: Tensor, mask: Tensor, size: int) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Features [B, L, D] and mask [B, L] in blocks of `size` by length, each cut to its longest, and the way back."""
    length = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).amax(1)
    length, order = length.sort(stable=True)
    blocks = []
    for rows, longest in zip(order.split(size), length.split(size), strict=True):
        cut = int(longest[-1])
        blocks.append((features[rows, :cut], mask[rows, :cut]))
    return blocks, order.argsort()


def reference(
    image: Tensor,
    image_mask: Tensor,
    text: Tensor,
    text_mask: Tensor,
    tau1: Tensor,
    tau2: Tensor,
    tau3: Tensor,
) -> Tensor:
    side = max(1, math.isqrt(_BLOCK_ELEMENTS // max(1, image.shape[1] * text.shape[1])))
    images, image_order = _blocks(image, image_mask, side)
    reports, report_order = _blocks(text, text_mask, side)
    rows = [
        torch.cat([checkpoint(_scores, *i, *j, tau1, tau2, use_reentrant=False, **_NO_RANDOM) for j in reports], 1)
        for i in images
    ]
    return tau3 * torch.cat(rows)[image_order][:, report_order]
