"""Retrieval over global embeddings (METHODS of ConVIRT and GLoRIA; ClinVLA, section 4.5.1)."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics.functional.retrieval import retrieval_hit_rate


def retrieval_scores(
    queries: Tensor, candidates: Tensor, labels: Sequence[Sequence[str]], *, precision_at: int = 5, recall_at: int = 10
) -> dict[str, float | None]:
    """How well queries find their candidates; query i and candidate i are of the same study i.

    precision@k: the share of the k best candidates that show the query's first finding, averaged over the queries
    that have one; None where none has. recall@k: the share of queries whose own study is among the k best. Beside
    each, what a random order would give.

    Args:
        queries, candidates: L2-normalised embeddings [n, D], n >= 1.
        labels: the findings of each study, the primary one first.
        precision_at, recall_at: k, capped at n.

    Raises:
        ValueError: if an embedding is not finite: it has no place in an order.
    """
    similarity = queries @ candidates.mT
    if not similarity.isfinite().all():
        raise ValueError("embeddings are not finite: expected L2-normalised vectors; the model or its input is broken.")
    n = len(similarity)
    own = torch.eye(n, dtype=torch.bool, device=similarity.device)
    k = min(recall_at, n)
    recall = torch.stack([retrieval_hit_rate(s, o, top_k=k) for s, o in zip(similarity, own, strict=True)])
    scores = {
        f"precision@{precision_at}": None,
        f"precision@{precision_at}_chance": None,
        f"recall@{recall_at}": recall.mean().item(),
        f"recall@{recall_at}_chance": k / n,
    }
    rows = [i for i in range(n) if labels[i]]
    if rows:
        relevant = torch.tensor([[labels[i][0] in found for found in labels] for i in rows], device=similarity.device)
        k = min(precision_at, n)
        # torchmetrics' retrieval_precision counts no candidate whose similarity is 0 or less
        precision = relevant.gather(1, similarity[rows].topk(k).indices).double()
        scores[f"precision@{precision_at}"] = precision.mean().item()
        scores[f"precision@{precision_at}_chance"] = relevant.double().mean().item()
    return scores
