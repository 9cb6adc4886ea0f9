import csv
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.nn.functional import normalize
from torchmetrics.functional.retrieval import retrieval_hit_rate, retrieval_precision

from clinvla_fast import ClinVLA, Recipe, ops
from clinvla_fast.data.phantom import patient_truths, render
from clinvla_fast.data.phantom.dataset import write_phantoms
from clinvla_fast.data.shards import read_studies, write_shards
from clinvla_fast.data.sources.chexpert import FINDINGS as CHEXPERT
from clinvla_fast.errors import DataError
from clinvla_fast.evaluation import retrieval
from clinvla_fast.evaluation.result import NotApplicable
from clinvla_fast.evaluation.retrieval import evaluate_retrieval, retrieval_scores
from clinvla_fast.evaluation.subject import Subject
from clinvla_fast.evaluation.tasks import Options
from training.prepare import main as prepare

FINDINGS = ("edema", "effusion", "pneumonia", "nodule")


def _plain(queries, candidates, labels, k_precision, k_recall):
    similarity = queries.numpy() @ candidates.numpy().T
    n = len(similarity)
    hits, precisions, chances = [], [], []
    for i in range(n):
        best = list(np.argsort(-similarity[i], kind="stable"))
        hits.append(i in best[:k_recall])
        if labels[i] and n > 1:
            others = [labels[i][0] in labels[j] for j in best if j != i]  # its own study shows it whatever it found
            precisions.append(np.mean(others[:k_precision]))
            chances.append(np.mean(others))
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
    scores = retrieval_scores(points, points, labels, precision_at=4, recall_at=1)
    assert scores == pytest.approx(
        {"precision@4": 1.0, "precision@4_chance": 4 / 19, "recall@1": 1.0, "recall@1_chance": 0.05}
    )


def test_only_the_order_of_the_similarities_counts():
    """Cosines of 0 and less rank like any others."""
    candidates = torch.stack([torch.arange(0, -8, -1.0, dtype=torch.float64), torch.ones(8, dtype=torch.float64)], 1)
    candidates = normalize(candidates, dim=-1)
    queries = torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand(8, 2)
    labels = [("edema",)] * 4 + [("nodule",)] * 4
    scores = retrieval_scores(queries, candidates, labels, precision_at=4, recall_at=2)
    # The first four studies find three others of theirs and one more, the last four find all of the others'.
    assert scores["precision@4"] == 3 / 8 and scores["recall@2"] == 0.25


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
    assert scores["precision@5_chance"] == pytest.approx(99 / 399)
    assert abs(scores["precision@5"] - 0.25) < 4 * math.sqrt(0.25 * 0.75 / (5 * n))


def test_without_labels_precision_is_none():
    queries, candidates = _random(6)
    scores = retrieval_scores(queries, candidates, [()] * 6)
    assert scores["precision@5"] is None and scores["precision@5_chance"] is None
    assert scores["recall@10"] == 1.0


def test_one_study():
    queries, candidates = _random(1)
    scores = retrieval_scores(queries, candidates, [("edema",)])
    assert scores == {"precision@5": None, "precision@5_chance": None, "recall@10": 1.0, "recall@10_chance": 1.0}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_a_broken_model_gets_no_score(bad, side):
    pair = _random(9)
    pair[side, 4, 2] = bad
    with pytest.raises(ValueError, match="not finite"):
        retrieval_scores(*pair, [("edema",)] * 9)


# The task


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    out = tmp_path_factory.mktemp("phantoms") / "data"
    write_phantoms(out, patients=60, seed=0, size=64)
    return out


@pytest.fixture
def model(tiny_model, shake):
    shake(tiny_model)
    return tiny_model


@pytest.fixture
def subject(phantoms, model, tmp_path):
    return Subject(tmp_path, model, phantoms, "train")


@pytest.fixture
def few(phantoms, model, tmp_path):
    return Subject(tmp_path, model, phantoms, "test")


def written(out, studies, source="csv"):
    write_shards({"test": studies}, lambda study: [replace(study, split="test")], out, source=source, settings={})
    return out


def labelled(subject, labels):
    subject.studies = [replace(study, labels=tuple(of)) for study, of in zip(subject.studies, labels, strict=True)]
    return subject


def values(result):
    return {score.name: score.value for score in result.scores}


def test_figures_are_torchmetrics(subject):
    e = subject.embedded
    reports = [study.report for study in subject.studies]
    text = torch.stack([e.text[reports.index(report)] for report in reports])
    labels, n, result = (
        [study.labels for study in subject.studies],
        len(reports),
        evaluate_retrieval(subject, Options()),
    )
    sides = {"image": e.image.double(), "text": text.double()}
    checked = 0
    for score in result.scores:
        asked, _, wanted, figure = score.name.replace(",", "").split()
        k = int(figure.partition("@")[2])
        # Above 0, as torchmetrics leaves the rest out; of equal ones the first is the best here, the last there.
        similarity = 2 + sides[asked] @ sides[wanted].mT - 1e-12 * torch.arange(n)
        expected, chances = [], []
        for i in score.units.tolist():
            others = torch.arange(n) != i
            if figure.startswith("recall"):
                expected.append(retrieval_hit_rate(similarity[i], ~others, top_k=k).item())
                chances.append(k / n)
            else:
                right = torch.tensor([labels[i][0] in found for found in labels])[others]
                expected.append(retrieval_precision(similarity[i][others], right, top_k=k).double().item())
                chances.append(right.double().mean().item())
        np.testing.assert_allclose(score.rows["value"], expected, rtol=0, atol=1e-7)  # torchmetrics' are float32
        assert score.value == pytest.approx(np.mean(np.round(np.array(expected) * k) / k), abs=1e-12)
        assert score.chance == pytest.approx(np.mean(chances), abs=1e-12)
        assert np.array_equal(score.patients, subject.patients[score.units])
        checked += 1
    assert checked == 3 * 3 + 2 * 3  # precision@5, 10 and 50 three ways, recall@1, 5 and 10 two ways: 100 are too many
    assert all(len(score.units) == n for score in result.scores)


def test_batches_do_not_matter(few):
    result = evaluate_retrieval(few, Options(rerank=8))
    for size in (1, 7):
        again = evaluate_retrieval(Subject(few.run, few.model, few.root, "test", size), Options(rerank=8))
        assert values(again) == values(result)
        for mine, its in zip(result.shown["galleries"], again.shown["galleries"], strict=True):
            hits = [[(hit["place"], hit["right"]) for hit in gallery["results"]] for gallery in (mine, its)]
            assert hits[0] == hits[1] and mine["query"] == its["query"]


def test_a_query_is_judged_alone(subject):
    """Fewer queries are some of the same ones, spread over the split."""
    whole, some = (evaluate_retrieval(subject, Options(queries=most)) for most in (None, 11))
    for score in some.scores:
        assert len(score.units) == 11 and np.ptp(np.diff(score.units)) <= 1
        same = whole.score(score.name).taking(score.units)
        assert np.array_equal(score.rows["value"], same.rows["value"])


def test_shuffled_labels_are_chance(subject):
    """Even where every report finds its own study, which shows the report's finding whatever the labels are."""
    subject.embedded = subject.embedded._replace(text=subject.embedded.image)
    names, inside, off = [study.labels for study in subject.studies], [], []
    for seed in range(20):
        order = np.random.default_rng(seed).permutation(len(names))
        result = evaluate_retrieval(labelled(subject, [names[i] for i in order]), Options())
        assert result.score("text to image, recall@1").value == 1
        for score in result.scores:
            if "precision" in score.name:
                value, low, high = score.interval(100)
                inside.append(low <= score.chance <= high)
                off.append(value - score.chance)
    assert np.mean(inside) > 0.8 and abs(np.mean(off)) < 0.01  # 0.2 of precision@5 if it counted


def test_reports_of_other_studies_are_chance(subject, tmp_path):
    studies = list(read_studies(subject.root, "train"))
    order = np.random.default_rng(0).permutation(len(studies))
    swapped = [replace(study, report=studies[i].report) for study, i in zip(studies, order, strict=True)]
    result = evaluate_retrieval(
        Subject(tmp_path, subject.model, written(tmp_path / "data", swapped), "test"), Options()
    )
    for score in result.scores:
        if "recall" in score.name:
            _, low, high = score.interval()
            assert low <= score.chance <= high


def test_all_of_one_finding(subject):
    result = evaluate_retrieval(labelled(subject, [("edema",)] * len(subject.studies)), Options())
    assert {score.value for score in result.scores if "precision" in score.name} == {1.0}
    assert {score.chance for score in result.scores if "precision" in score.name} == {1.0}


def test_without_labels(subject):
    result = evaluate_retrieval(labelled(subject, [()] * len(subject.studies)), Options(rerank=6))
    figures = [f"{way}, recall@{k}" for way in ("text to image", "image to text") for k in (1, 5, 10)]
    again = [f"{way}, recall@{k}, re-ranked" for way in ("text to image", "image to text") for k in (1, 5)]
    assert list(values(result)) == figures + again
    by_way = {}
    for gallery in result.shown["galleries"]:
        assert gallery["label"] is None
        by_way.setdefault(gallery["way"], []).append(gallery)
    assert {way: len(found) for way, found in by_way.items()} == dict.fromkeys(retrieval.WAYS, 2)
    for gallery in by_way["text to image"]:  # right is the query's own study
        assert all(hit["right"] == (hit["place"] == gallery["query"]) for hit in gallery["results"])
    for gallery in by_way["image to image"]:
        assert all(hit["right"] is None and hit["place"] != gallery["query"] for hit in gallery["results"])


def test_without_reports(subject, tmp_path):
    studies = [replace(study, report="") for study in read_studies(subject.root, "train")]
    data = written(tmp_path / "data", studies)
    result = evaluate_retrieval(Subject(tmp_path, subject.model, data, "test"), Options(rerank=10))
    assert list(values(result)) == [f"image to image, precision@{k}" for k in (5, 10, 50)]
    bare = Subject(tmp_path, subject.model, data, "test")
    with pytest.raises(
        NotApplicable, match=r"nothing to look for .* expected reports of images, or images with labels"
    ):
        evaluate_retrieval(labelled(bare, [()] * len(studies)), Options())


def test_some_without_a_side(subject, tmp_path):
    """Studies without a view or a report are no candidates there, and no queries of their own study."""
    studies = list(read_studies(subject.root, "train"))[:30]
    studies[3], studies[8] = replace(studies[3], images={}), replace(studies[8], report="")
    result = evaluate_retrieval(Subject(tmp_path, subject.model, written(tmp_path / "d", studies), "test"), Options())
    for way, units in (("text to image", 8), ("image to text", 3)):
        precision, recall = result.score(f"{way}, precision@5"), result.score(f"{way}, recall@5")
        assert set(range(30)) - set(precision.units.tolist()) == {units}
        assert set(range(30)) - set(recall.units.tolist()) == {3, 8}
        assert recall.chance == 5 / 29
    assert set(range(30)) - set(result.score("image to image, precision@5").units.tolist()) == {3}
    found = {hit["place"] for one in result.shown["galleries"] if one["way"][-5:] == "image" for hit in one["results"]}
    assert 3 not in found


@pytest.mark.parametrize("n", [1, 2, 6])
def test_few_studies(subject, tmp_path, n):
    studies = list(read_studies(subject.root, "train"))[:n]
    result = evaluate_retrieval(Subject(tmp_path, subject.model, written(tmp_path / "d", studies), "test"), Options())
    expected = {1: {"recall@1"}, 2: {"recall@1"}, 6: {"recall@1", "recall@5", "precision@5"}}[n]
    assert {name.partition(", ")[2] for name in values(result)} == expected
    if n == 1:
        assert set(values(result).values()) == {1.0} == {score.chance for score in result.scores}


def test_galleries(subject):
    result, labels = evaluate_retrieval(subject, Options()), [study.labels for study in subject.studies]
    shown = {}
    for gallery in result.shown["galleries"]:
        shown.setdefault((gallery["way"], gallery["label"]), []).append(gallery["query"])
        assert labels[gallery["query"]][0] == gallery["label"] and len(gallery["results"]) == 5
        scores = [hit["score"] for hit in gallery["results"]]
        assert scores == sorted(scores, reverse=True)
        for hit in gallery["results"]:
            assert hit["right"] == (gallery["label"] in labels[hit["place"]]) and hit["place"] != gallery["query"]
    firsts = [found[0] for found in labels]
    assert shown.keys() == {(way, label) for way in retrieval.WAYS for label in set(firsts)}
    assert all(len(queries) == min(2, firsts.count(label)) for (_, label), queries in shown.items())
    assert "a third and two thirds" in result.shown["queries_in_galleries"]


def test_towers_of_two_widths(tiny_towers, phantoms, tmp_path):
    """What nothing aligns has images to look for by images alone."""
    model = ClinVLA(**tiny_towers, recipe=Recipe(global_weight=0, local_weight=0, image_weight=1, word_weight=1))
    subject = Subject(tmp_path, model, phantoms, "test")
    subject.embedded = subject.embedded._replace(text=subject.embedded.text[:, :-1])
    assert {name.partition(",")[0] for name in values(evaluate_retrieval(subject, Options()))} == {"image to image"}


@pytest.mark.parametrize("told", [{"rerank": -1}, {"queries": 0}])
def test_numbers_that_are_too_small(subject, told):
    with pytest.raises(DataError, match="expected at least 0, and at least 1"):
        evaluate_retrieval(subject, Options(**told))


def test_a_broken_model(subject):
    with torch.no_grad():
        subject.model.text_global[0].bias[0] = torch.nan
    with pytest.raises(DataError, match="embeddings are not finite"):
        evaluate_retrieval(subject, Options())


# Re-ranking


def test_the_best_are_ordered_by_local_alignment(few, monkeypatch):
    """Against all pairs at once."""
    e, n, some = few.embedded, len(few.studies), 12
    labels, reports = [study.labels for study in few.studies], [study.report for study in few.studies]
    first = [reports.index(report) for report in reports]
    batch = few.batch_of(range(n))
    with torch.inference_mode():
        x, (_, *taus) = few.model(batch), few.model.objective.scales()
        aligned = ops.local_alignment(x.image_local, x.image_mask, x.text_local, x.text_mask, *taus)[:, first]
    monkeypatch.setattr(retrieval, "_TEXTS", 6)
    result = evaluate_retrieval(few, Options(rerank=some))
    ways = {
        "text to image": (e.text[first].double() @ e.image.double().mT, aligned.mT),
        "image to text": (e.image.double() @ e.text[first].double().mT, aligned),
    }
    changed = 0
    for way, (similarity, local) in ways.items():
        best = (similarity - 1e-12 * torch.arange(n)).topk(some).indices
        order = local.gather(1, best).argsort(dim=1, descending=True, stable=True)
        found = best.gather(1, order).tolist()
        for k in (1, 5, 10):
            recall = [i in found[i][:k] for i in range(n)]
            assert result.score(f"{way}, recall@{k}, re-ranked").rows["value"].tolist() == recall
        for k in (5, 10):
            others = [[j for j in found[i] if j != i][:k] for i in range(n)]
            expected = [np.mean([labels[i][0] in labels[j] for j in others[i]]) for i in range(n)]
            again = result.score(f"{way}, precision@{k}, re-ranked")
            np.testing.assert_allclose(again.rows["value"], expected, rtol=0, atol=1e-12)
            changed += again.value != result.score(f"{way}, precision@{k}").value
    assert changed
    assert not any("re-ranked" in name and ("@50" in name or "image to image" in name) for name in values(result))


def test_a_model_that_aligns_nothing_locally(tiny_towers, phantoms, tmp_path):
    subject = Subject(tmp_path, ClinVLA(**tiny_towers, recipe=Recipe(local_weight=0, width=24)), phantoms, "test")
    assert values(evaluate_retrieval(subject, Options()))
    with pytest.raises(DataError, match="--rerank needs local embeddings, and this model's method has no local loss"):
        evaluate_retrieval(subject, Options(rerank=5))


# CheXpert's retrieval sets, from their own files


@pytest.fixture(scope="module")
def films():
    return [render(patient_truths(3, patient)[0], 160)["frontal"] for patient in range(5)]


def table(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def film_of(root, films, number):
    name = f"CheXpert-v1.0/train/patient{number:05d}/study1/view1_frontal.jpg"
    (root / name).parent.mkdir(parents=True)
    Image.fromarray(np.roll(films[number % 5], number, 1)).save(root / name)
    return {"Path": name}


def prepared(tmp_path, source, root, model):
    out = tmp_path / "prepared"
    prepare([source, str(root), "--out", str(out), "--short-side", "64", "--workers", "2", "--keep-poor-films"])
    return Subject(tmp_path, model, out, "test")


def positive(finding):
    return {name: "1.0" if name == finding else "" for name in CHEXPERT}


def write_8x200(root, films, classes, candidates):
    films_of = iter(range(1, 1000))
    for kind in ("image", "text"):
        asked = [{"Text": f"{c} is seen."} if kind == "text" else film_of(root, films, next(films_of)) for c in classes]
        table(root / f"{kind}-retrieval/query.csv", [{"Variable": c, **a} for c, a in zip(classes, asked, strict=True)])
        rows = [film_of(root, films, next(films_of)) | positive(candidates[i % len(candidates)]) for i in range(12)]
        table(root / f"{kind}-retrieval/candidate.csv", rows)


def test_chexpert_8x200(tmp_path, films, model):
    classes = ["Atelectasis", "Edema", "No Finding", "Pneumothorax"]
    write_8x200(tmp_path / "data", films, classes, classes)
    subject = prepared(tmp_path, "chexpert-8x200", tmp_path / "data", model)
    result, ids = evaluate_retrieval(subject, Options()), [study.study_id for study in subject.studies]
    ways = ("image to image", "text to image")
    assert list(values(result)) == [f"{way}, precision@{k}" for way in ways for k in (5, 10)]  # 12 candidates, not 50
    e, labels = subject.embedded, [study.labels for study in subject.studies]
    for way in ways:
        side = way.partition(" ")[0]
        queries, among = (
            [i for i, name in enumerate(ids) if name.startswith(f"{side}-retrieval/{role}/")]
            for role in ("query", "candidate")
        )
        assert (len(queries), len(among)) == (4, 12)
        similarity = getattr(e, side)[queries] @ e.image[among].mT
        expected = [
            retrieval_precision(s + 2, torch.tensor([labels[q][0] in labels[c] for c in among]), top_k=5).item()
            for q, s in zip(queries, similarity, strict=True)
        ]
        score = result.score(f"{way}, precision@5")
        assert score.units.tolist() == queries and score.chance == 0.25
        np.testing.assert_allclose(score.rows["value"], expected, atol=1e-7)
        shown = [one for one in result.shown["galleries"] if one["way"] == way]
        assert [one["query"] for one in shown] == queries
        assert {hit["place"] for one in shown for hit in one["results"]} <= set(among)


def test_chexpert_8x200_without_a_class(tmp_path, films, model):
    write_8x200(tmp_path / "data", films, ["Edema", "Fracture"], ["Edema"])
    with pytest.raises(DataError, match="image to image: no candidate shows fracture, which queries look for"):
        evaluate_retrieval(prepared(tmp_path, "chexpert-8x200", tmp_path / "data", model), Options())


def test_chexpert_5x200(tmp_path, films, model):
    classes = ["Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion"]
    rows = [
        {"": i, **film_of(tmp_path / "data", films, i), **positive(classes[i % 5])}
        | {"Report Impression": f"{classes[i % 5]} is seen, number {i}."}
        for i in range(15)
    ]
    table(tmp_path / "data" / "chexpert_5x200.csv", rows)
    result = evaluate_retrieval(prepared(tmp_path, "chexpert-5x200", tmp_path / "data", model), Options())
    assert [name for name in values(result) if name.startswith("image to text")] == [
        f"image to text, {figure}" for figure in ("precision@5", "precision@10", "recall@1", "recall@5", "recall@10")
    ]
    score = result.score("image to text, precision@10")
    assert len(score.units) == 15 and score.chance == pytest.approx(2 / 14)
