"""Local alignment (the local loss of GLoRIA and ALTA; ClinVLA's L_local): every image scored against every report.

For image i with patch features C [N, D] and report j with word features W [T, D]:

    S    = C W^T                              [N, T], not normalised
    A    = softmax_n(tau1 * softmax_t(S))     over the words, then over the patches
    c_t  = sum_n A[n, t] C[n]                 what the image shows of word t
    s    = log sum_t exp(tau2 * cos(W[t], c_t))
    logit(i, j) = tau3 * s(i, j)

Two identities save work: cos does not see the length of c_t, so A needs no denominator; and W[t] . c_t is the sum over n
of A[n, t] S[n, t], so the products of S serve twice. The reference goes through the images in chunks and recomputes
each chunk in the backward pass, so that what it holds does not grow with the number of images.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_CHUNK_ELEMENTS = 1 << 22


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


def reference(
    image: Tensor,
    image_mask: Tensor,
    text: Tensor,
    text_mask: Tensor,
    tau1: Tensor,
    tau2: Tensor,
    tau3: Tensor,
) -> Tensor:
    rows = max(1, _CHUNK_ELEMENTS // max(1, image.shape[1] * text.shape[0] * text.shape[1]))
    if len(image) <= rows:
        return tau3 * _scores(image, image_mask, text, text_mask, tau1, tau2)
    chunks = zip(image.split(rows), image_mask.split(rows), strict=True)
    scores = [checkpoint(_scores, *chunk, text, text_mask, tau1, tau2, use_reentrant=False) for chunk in chunks]
    return tau3 * torch.cat(scores)
