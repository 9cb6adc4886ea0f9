"""Symmetric InfoNCE over a batch of matched pairs (CLIP; the contrastive form of ClinVLA's L_global).

z = scale * normalise(image) normalise(text)^T
loss = (cross_entropy(z, i) + cross_entropy(z^T, i)) / 2
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize


def symmetric_cross_entropy(logits: Tensor) -> Tensor:
    """Mean of the cross-entropies over rows and over columns of logits [B, B] whose diagonal is right."""
    target = torch.arange(len(logits), device=logits.device)
    return (cross_entropy(logits, target) + cross_entropy(logits.mT, target)) / 2


def reference(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    return symmetric_cross_entropy(scale * normalize(image, dim=-1) @ normalize(text, dim=-1).mT)
