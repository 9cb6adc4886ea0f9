"""Rankings as a full sort has them, however candidates and queries come; and retrieval in collections."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clinvla_fast import Collection, embed
from clinvla_fast.data.phantom.dataset import write_phantoms
from clinvla_fast.data.shards import read_studies
from clinvla_fast.errors import DataError
from clinvla_fast.evaluation import retrieval
from clinvla_fast.evaluation.retrieval import evaluate_collection, evaluate_retrieval, nearest
from clinvla_fast.evaluation.subject import Subject
from clinvla_fast.evaluation.tasks import Options

FINDINGS = ("edema", "effusion", "nodule")


def drawn(n, width=8, seed=0):
    x = np.random.default_rng(seed).normal(size=(n, width)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def sorted_whole(queries, candidates, k):
    """Of equal candidates the first."""
    products = (queries[:, None].astype(np.float64) * candidates).sum(-1)
    order = np.argsort(-products, axis=1, kind="stable")[:, :k]
    return order, np.take_along_axis(products, order, 1)


def in_blocks(candidates, size):
    return [candidates[at : at + size] for at in range(0, len(candidates), size)]


@given(
    n=st.integers(1, 300),
    k=st.integers(1, 40),
    distinct=st.integers(1, 300),
    size=st.integers(1, 300),
    seed=st.integers(0, 99),
)
def test_a_full_sort(n, k, distinct, size, seed):
    """With many candidates that are the same, too."""
    random = np.random.default_rng(seed)
    candidates = drawn(distinct, seed=seed)[random.integers(0, distinct, n)]
    queries = drawn(7, seed=seed + 1)
    found = nearest(queries, in_blocks(candidates, size), k)
    for mine, expected in zip(found, sorted_whole(queries, candidates, k), strict=True):
        assert np.array_equal(mine, expected)


@pytest.fixture
def crowd():
    """2,500 candidates of which 2,000 are one of ten, and the rest lie within float32's rounding of these."""
    random = np.random.default_rng(3)
    candidates = drawn(10, 64)[random.integers(0, 10, 2500)]
    candidates[::5] += random.normal(0, 1e-8, (500, 64)).astype(np.float32)
    return drawn(40, 64, seed=5), candidates


def test_nothing_depends_on_chunks(crowd, monkeypatch):
    queries, candidates = crowd
    expected = sorted_whole(queries, candidates, 30)
    for size, pairs, exact in ((2500, 2**18, 2**14), (2500, 500, 7), (999, 1, 64), (64, 3000, 2**14), (7, 100, 5)):
        monkeypatch.setattr(retrieval, "_PAIRS", pairs)
        monkeypatch.setattr(retrieval, "_EXACT", exact)
        for mine, its in zip(nearest(queries, in_blocks(candidates, size), 30), expected, strict=True):
            assert np.array_equal(mine, its)
    alone = [nearest(query[None], [candidates], 30)[0][0] for query in queries]
    assert np.array_equal(alone, expected[0])


def test_the_order_of_candidates_does_not_matter():
    queries, candidates = drawn(50, seed=1), drawn(3000, seed=2)
    order = np.random.default_rng(0).permutation(3000)
    number, score = nearest(queries, [candidates], 20)
    again, same = nearest(queries, in_blocks(candidates[order], 256), 20)
    assert np.array_equal(order[again], number) and np.array_equal(same, score)


def test_fewer_candidates_than_asked_for():
    number, score = nearest(drawn(3), [drawn(4, seed=1), drawn(2, seed=2)], 100)
    assert number.shape == score.shape == (3, 6) and (np.sort(number) == np.arange(6)).all()
    assert (np.diff(score) <= 0).all()


# Collections


def arrays_of(n, noise=0.4):
    image = drawn(n, 16)
    text = image + noise * drawn(n, 16, seed=9)
    return {"image": image, "text": text / np.linalg.norm(text, axis=1, keepdims=True)}


def plainly(arrays, labels, way, rows, precision_at, recall_at):
    asked, _, wanted = way.partition(" to ")
    order, _ = sorted_whole(arrays[asked], arrays[wanted], None)
    found = {}
    for k in precision_at:
        of = [np.mean([labels[i][0] in labels[j] for j in order[i][order[i] != i][:k]]) for i in rows]
        chance = [np.mean([labels[i][0] in labels[j] for j in range(len(labels)) if j != i]) for i in rows]
        found[f"{way}, precision@{k}"] = np.mean(of), np.mean(chance)
    for k in recall_at if asked != wanted else ():
        found[f"{way}, recall@{k}"] = np.mean([i in order[i][:k] for i in rows]), k / len(labels)
    return found


@pytest.mark.parametrize("way", retrieval.WAYS)
@pytest.mark.parametrize("most", [None, 33])
def test_arrays_on_disk(tmp_path, monkeypatch, way, most):
    arrays = arrays_of(400)
    labels = [(FINDINGS[i % 3], FINDINGS[i % 2]) for i in range(400)]
    for name, x in arrays.items():
        np.save(tmp_path / f"{name}.npy", x)
    mapped = {name: np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in arrays}
    rows = range(400) if most is None else [i * 400 // 33 for i in range(33)]
    seen, ks = [], ((5, 10, 50), (1, 10))
    monkeypatch.setattr(retrieval, "_BLOCK", 150)
    scores = evaluate_collection(
        mapped, labels, way=way, queries=most, precision_at=ks[0], recall_at=ks[1], progress=lambda *x: seen.append(x)
    )
    assert seen == [(150, 400), (300, 400), (400, 400)]
    expected = plainly(arrays, labels, way, rows, *ks)
    assert {score.name for score in scores} == expected.keys()
    for score in scores:
        assert (score.value, score.chance) == pytest.approx(expected[score.name], abs=1e-12)
        assert score.units.tolist() == list(rows)


def test_without_labels_there_is_recall_alone():
    scores = evaluate_collection(arrays_of(60, noise=0), recall_at=(1, 5, 100))
    assert [(s.name, s.value) for s in scores] == [("text to image, recall@1", 1.0), ("text to image, recall@5", 1.0)]
    assert evaluate_collection(arrays_of(60), way="image to image") == []


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    out = tmp_path_factory.mktemp("phantoms") / "data"
    write_phantoms(out, patients=40, seed=0, size=64)
    return out


def test_a_collection_scores_as_its_split(phantoms, tiny_model, shake, tmp_path):
    shake(tiny_model)
    embed(tiny_model, phantoms, tmp_path / "embedded", split="train")
    collection = Collection(tmp_path / "embedded")
    labels = {study.study_id: study.labels for study in read_studies(phantoms, "train", images=False)}
    whole = evaluate_retrieval(Subject(tmp_path, tiny_model, phantoms, "train"), Options())
    found = {}
    for way in retrieval.WAYS:
        found |= {score.name: score for score in evaluate_collection(collection, labels, way=way)}
    assert found.keys() == {score.name for score in whole.scores}
    for name, score in found.items():
        # Here each report is as its own batch has embedded it: of two in the same words either may be the nearer one.
        exactly = name.startswith("image to image")
        assert score.value == pytest.approx(whole.score(name).value, abs=1e-12 if exactly else 0.05)
        assert score.chance == pytest.approx(whole.score(name).chance, abs=1e-12)
    del labels[next(iter(labels))]
    with pytest.raises(DataError, match="labels miss some studies"):
        evaluate_collection(collection, labels)


def test_what_cannot_be_evaluated():
    arrays = arrays_of(20)
    for told in ({"way": "text to text"}, {"queries": 0}):
        with pytest.raises(DataError, match="expected one of image to image, text to image, image to text, and at"):
            evaluate_collection(arrays, **told)
    for wrong in (
        {"image": arrays["image"]},
        arrays | {"text": arrays["text"][:5]},
        {k: x[0] for k, x in arrays.items()},
    ):
        with pytest.raises(DataError, match=r"arrays are .*: expected image and text, both \[n, D\]"):
            evaluate_collection(wrong)
    with pytest.raises(DataError, match="there is no text among"):
        evaluate_collection({name: x[:0] for name, x in arrays.items()})
    with pytest.raises(DataError, match="labels miss some studies"):
        evaluate_collection(arrays, [("edema",)] * 19)
    arrays["image"][3, 3] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        evaluate_collection(arrays)
