"""Retrieval over global embeddings (METHODS of ConVIRT and GLoRIA; ClinVLA, section 4.5.1)."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics.functional.retrieval import retrieval_hit_rate


def retrieval_scores(
    queries: Tensor,
    candidates: Tensor,
    labels: Sequence[Sequence[str]],
    *,
    precision_at: int = 5,
    recall_at: int = 10,
    own: bool = True,
) -> dict[str, float | None]:
    """How well queries find their candidates; query i and candidate i are of the same study i.

    precision@k: the share of the k best candidates that show the query's first finding, averaged over the queries
    that have one; None where none has. recall@k: the share of queries whose own study is among the k best. Beside
    each, what a random order would give.

    Args:
        queries, candidates: L2-normalised embeddings [n, D], n >= 1.
        labels: the findings of each study, the primary one first.
        precision_at, recall_at: k, capped at n.
        own: False leaves a query's own study out of its candidates, as from image to image, and recall with it.

    Raises:
        ValueError: if an embedding is not finite: it has no place in an order.
    """
    similarity = queries @ candidates.mT
    if not similarity.isfinite().all():
        raise ValueError("embeddings are not finite: expected L2-normalised vectors; the model or its input is broken.")
    n = len(similarity)
    itself = torch.eye(n, dtype=torch.bool, device=similarity.device)
    scores: dict[str, float | None] = {f"precision@{precision_at}": None, f"precision@{precision_at}_chance": None}
    if own:
        k = min(recall_at, n)
        recall = torch.stack([retrieval_hit_rate(s, i, top_k=k) for s, i in zip(similarity, itself, strict=True)])
        scores |= {f"recall@{recall_at}": recall.mean().item(), f"recall@{recall_at}_chance": k / n}
    rows = [i for i in range(n) if labels[i]]
    others = n if own else n - 1
    if rows and others:
        relevant = torch.tensor([[labels[i][0] in found for found in labels] for i in rows], device=similarity.device)
        if not own:
            relevant &= ~itself[rows]
            similarity = similarity.masked_fill(itself, -torch.inf)
        # torchmetrics' retrieval_precision counts no candidate whose similarity is 0 or less
        precision = relevant.gather(1, similarity[rows].topk(min(precision_at, others)).indices).double()
        scores[f"precision@{precision_at}"] = precision.mean().item()
        scores[f"precision@{precision_at}_chance"] = relevant.sum().item() / (len(rows) * others)
    return scores
