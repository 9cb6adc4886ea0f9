import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import normalize

from clinvla_fast.evaluation.retrieval import retrieval_scores

FINDINGS = ("edema", "effusion", "pneumonia", "nodule")


def _plain(queries, candidates, labels, k_precision, k_recall):
    similarity = queries.numpy() @ candidates.numpy().T
    n = len(similarity)
    hits, precisions, chances = [], [], []
    for i in range(n):
        best = list(np.argsort(-similarity[i], kind="stable"))
        hits.append(i in best[:k_recall])
        if labels[i]:
            k = min(k_precision, n)
            precisions.append(sum(labels[i][0] in labels[j] for j in best[:k]) / k)
            chances.append(sum(labels[i][0] in found for found in labels) / n)
    return {
        f"precision@{k_precision}": np.mean(precisions) if precisions else None,
        f"precision@{k_precision}_chance": np.mean(chances) if chances else None,
        f"recall@{k_recall}": np.mean(hits),
        f"recall@{k_recall}_chance": min(k_recall, n) / n,
    }


def _random(n, width=8, seed=0):
    points = torch.randn(2, n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return normalize(points, dim=-1)


@given(
    labels=st.lists(st.lists(st.sampled_from(FINDINGS), max_size=3, unique=True).map(tuple), min_size=1, max_size=25),
    k=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    seed=st.integers(0, 99),
)
def test_against_numpy(labels, k, seed):
    queries, candidates = _random(len(labels), seed=seed)
    scores = retrieval_scores(queries, candidates, labels, precision_at=k[0], recall_at=k[1])
    expected = _plain(queries, candidates, labels, *k)
    assert scores.keys() == expected.keys()
    for name, value in expected.items():
        assert scores[name] == (value if value is None else pytest.approx(value, rel=1e-6))


def test_perfect_embeddings():
    """Studies of one finding lie together, each nearest to its own report."""
    centres = torch.eye(4, dtype=torch.float64).repeat_interleave(5, 0)
    points = normalize(torch.cat([centres, 0.1 * torch.eye(20, dtype=torch.float64)], 1), dim=-1)
    labels = [(FINDINGS[i // 5],) for i in range(20)]
    scores = retrieval_scores(points, points, labels, precision_at=5, recall_at=1)
    assert scores == pytest.approx(
        {"precision@5": 1.0, "precision@5_chance": 0.25, "recall@1": 1.0, "recall@1_chance": 0.05}
    )


def test_only_the_order_of_the_similarities_counts():
    """Cosines of 0 and less rank like any others."""
    candidates = torch.stack([torch.arange(0, -8, -1.0, dtype=torch.float64), torch.ones(8, dtype=torch.float64)], 1)
    candidates = normalize(candidates, dim=-1)
    queries = torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand(8, 2)
    labels = [("edema",)] * 4 + [("nodule",)] * 4
    scores = retrieval_scores(queries, candidates, labels, precision_at=4, recall_at=2)
    assert scores["precision@4"] == 0.5 and scores["recall@2"] == 0.25


def test_worst_embeddings():
    points = torch.eye(12, dtype=torch.float64)
    labels = [(FINDINGS[i % 4],) for i in range(12)]
    scores = retrieval_scores(points, -points, labels, precision_at=5, recall_at=11)
    assert scores["recall@11"] == 0


def test_random_embeddings_score_at_chance():
    n = 400
    queries, candidates = _random(n)
    labels = [(FINDINGS[i % 4],) for i in range(n)]
    scores = retrieval_scores(queries, candidates, labels, precision_at=5, recall_at=10)
    assert scores["recall@10_chance"] == 10 / n
    assert abs(scores["recall@10"] - 10 / n) < 4 * math.sqrt(10 / n / n)
    assert scores["precision@5_chance"] == pytest.approx(0.25)
    assert abs(scores["precision@5"] - 0.25) < 4 * math.sqrt(0.25 * 0.75 / (5 * n))


def test_without_labels_precision_is_none():
    queries, candidates = _random(6)
    scores = retrieval_scores(queries, candidates, [()] * 6)
    assert scores["precision@5"] is None and scores["precision@5_chance"] is None
    assert scores["recall@10"] == 1.0


def test_one_study():
    queries, candidates = _random(1)
    scores = retrieval_scores(queries, candidates, [("edema",)])
    assert scores == {"precision@5": 1.0, "precision@5_chance": 1.0, "recall@10": 1.0, "recall@10_chance": 1.0}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_a_broken_model_gets_no_score(bad, side):
    pair = _random(9)
    pair[side, 4, 2] = bad
    with pytest.raises(ValueError, match="not finite"):
        retrieval_scores(*pair, [("edema",)] * 9)
