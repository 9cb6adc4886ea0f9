"""The linear probe, and what every downstream task shares: parts, shares, figures over seeds."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from clinvla_fast import ClinVLA, Recipe
from clinvla_fast.data.sources.record import hashed_split
from clinvla_fast.errors import DataError
from clinvla_fast.evaluation.downstream import Part, Training, folds_of, parts, share_of
from clinvla_fast.evaluation.probing import Labelled, evaluate_linear_probe
from clinvla_fast.evaluation.result import NotApplicable
from clinvla_fast.evaluation.score import STATISTICS
from clinvla_fast.evaluation.subject import Subject

ALL = Training(labels=(1.0,))


@pytest.fixture
def probed(tmp_path, tiny_model, squares):
    def probe(*splits, told=ALL, split="test"):
        root = squares.written(tmp_path / f"data{len(list(tmp_path.iterdir()))}", *splits)
        return evaluate_linear_probe(Subject(tmp_path, tiny_model, root, split), told, lambda *_: None)

    return probe


def test_reads_what_there_is_and_no_more(probed, squares):
    found = probed(squares.train, squares.validate, squares.test)
    assert found.score("100% of labels, macro AUC").interval().low > 0.9
    leak = (
        probed(squares.shuffled(squares.train), squares.shuffled(squares.validate), squares.test)
        .score("100% of labels, macro AUC")
        .interval()
    )
    assert leak.low < 0.5 < leak.high


def test_labels_of_the_test_split_change_nothing_but_the_figure(probed, squares):
    turned = {squares.label: ("no finding",), "no finding": (squares.label,)}
    other = [replace(study, labels=turned[study.labels[0]]) for study in squares.test]
    right, wrong = (
        probed(squares.train, squares.validate, test).score("100% of labels, macro AUC")
        for test in (squares.test, other)
    )
    assert np.array_equal(right.rows["scored"], wrong.rows["scored"])
    assert right.value == pytest.approx(1 - wrong.value, abs=1e-12)


def test_figures_over_seeds_are_means_of_theirs(probed, squares):
    found = probed(squares.train, squares.validate, squares.test, told=Training(labels=(0.1, 1.0), seeds=3))
    some, every = (found.score(f"{share}% of labels, AUC {squares.label}") for share in (10, 100))
    each = [roc_auc_score(t, s) for t, s in zip(some.rows["target"].T, some.rows["scored"].T, strict=True)]
    assert len(each) == 3 and some.value == pytest.approx(np.mean(each), abs=1e-12)
    assert some.spread == pytest.approx(np.std(each, ddof=1), abs=1e-12)
    assert every.spread is None  # every seed would be the same
    assert len(some.units) == len(squares.test) == len(set(some.units.tolist())) and some.chance == 0.5


def test_a_finding_that_is_not_there_is_left_out_with_the_reason(probed, squares):
    once = [
        replace(study, labels=(*study.labels, "rare") if n == 3 else study.labels)
        for n, study in enumerate(squares.train)
    ]
    tested = [replace(s, labels=(*s.labels, "rare") if n < 5 else s.labels) for n, s in enumerate(squares.test)]
    found = probed(once, squares.validate, tested, told=Training(labels=(0.1,), seeds=1))
    assert not [score.name for score in found.scores if "rare" in score.name]
    (about,) = found.shown["trained"].values()
    assert about["left out"] == {"rare": "none or all of the studies trained on show it"}


def test_a_share_too_small_to_learn_from_is_left_out_with_the_reason(probed, squares):
    same = [replace(s, labels=("no finding",)) for s in squares.train if squares.label not in s.labels]
    few = [s for s in squares.train if squares.label in s.labels][:2]
    told = Training(labels=(0.01, 1.0), seeds=2)
    found = probed([*same, *few], squares.validate, squares.test, told=told)
    assert {score.name.partition(",")[0] for score in found.scores} == {"100% of labels"}
    assert "have the same labels" in found.shown["shares left out"]["1% of labels"]
    with pytest.raises(NotApplicable, match="have the same labels: pass larger --labels"):
        probed(same, squares.validate, squares.test, told=told)


def test_shares_are_nested_and_of_whole_patients(tmp_path, tiny_model, squares):
    subject = Subject(tmp_path, tiny_model, squares.written(tmp_path / "data", squares.train), "train")
    part = Part(subject, np.arange(len(squares.train)))
    shares = [share_of(part, share, seed=1) for share in (0.01, 0.1, 0.5, 1.0)]
    assert [len(found.places) for found in shares] == [2, 6, 30, 60]
    for small, large in pairwise(shares):
        assert set(small.places) < set(large.places)
    for found in shares[:-1]:
        assert not set(found.patients) & set(np.setdiff1d(subject.patients, found.patients))
        assert set(found.places) == set(np.flatnonzero(np.isin(subject.patients, found.patients)))
    assert set(share_of(part, 0.1, seed=2).places) != set(shares[1].places)
    folds = folds_of(part, 4, seed=0)
    assert sorted(np.concatenate([fold.places for fold in folds])) == list(range(len(squares.train)))
    assert sum(len(set(fold.patients)) for fold in folds) == 30


def test_without_a_validation_split_some_training_patients_stand_for_it(tmp_path, tiny_model, squares):
    subject = Subject(tmp_path, tiny_model, squares.written(tmp_path / "data", squares.train, squares.test), "test")
    train, validate, test = parts(subject, lambda of: np.ones(len(of.studies), bool), "anything")
    assert sorted([*train.places, *validate.places]) == list(range(len(squares.train))) and len(validate.places)
    assert not set(train.patients) & set(validate.patients) and len(test.places) == len(squares.test)


def test_training_patients_are_held_out_of_splits_by_hash(tmp_path, tiny_model, squares):
    names = (name for name in map(str, range(99)) if hashed_split(name) == "train")
    named = {patient: next(names) for patient in dict.fromkeys(study.patient_id for study in squares.train)}
    train = [replace(study, patient_id=named[study.patient_id]) for study in squares.train]
    subject = Subject(tmp_path, tiny_model, squares.written(tmp_path / "data", train, squares.test), "test")
    learned, validate, _ = parts(subject, lambda of: np.ones(len(of.studies), bool), "anything")
    assert 0 < len(validate.places) < len(learned.places)


def test_data_that_cannot_be_learned_from(probed, tmp_path, squares):
    with pytest.raises(NotApplicable, match="no train split beside 'test': expected labels and a view that the model"):
        probed(squares.test)
    bare = [replace(study, labels=()) for study in squares.train]
    with pytest.raises(NotApplicable, match="no study to train on in its train split with labels"):
        probed(bare, squares.validate, squares.test)
    same = [replace(study, labels=("other",)) for study in squares.test]
    with pytest.raises(NotApplicable, match="no finding of the train split is in some test studies"):
        probed(squares.train, squares.validate, same)
    alone = [replace(study, labels=("no finding",)) for study in squares.validate]
    with pytest.raises(NotApplicable, match="20 studies to validate on, none or all of which show"):
        probed(squares.train, alone, squares.test)


@pytest.mark.parametrize(("told", "words"), [({"labels": (0.0,)}, "--labels"), ({"labels": (1.0, 1.0)}, "once"),
                                             ({"labels": (0.5, 0.50000001)}, "once"), ({"seeds": 0}, "--seeds is 0"),
                                             ({"folds": 2}, "--folds is 2"), ({"lr": -1.0}, "--lr")])  # fmt: skip
def test_numbers_out_of_range(told, words):
    with pytest.raises(DataError, match=words):
        Training(**told)


def test_auc_is_scikit_learns():
    random = np.random.default_rng(0)
    for _ in range(50):
        target, scored = random.random(60) < 0.3, random.integers(0, 12, 60) / 7  # many ties
        weights = random.integers(1, 5, 60).astype(float)
        expected = roc_auc_score(target, scored, sample_weight=weights)
        assert STATISTICS["auc"](weights, target, scored) == pytest.approx(expected, abs=1e-12)
    assert np.isnan(STATISTICS["auc"](np.ones(3), np.ones(3, bool), np.arange(3.0)))


def test_unlabelled_studies_are_not_negatives(tmp_path, tiny_model, squares):
    blank = [replace(study, labels=()) if n % 2 else study for n, study in enumerate(squares.train)]
    root = squares.written(tmp_path / "data", blank, squares.validate, squares.test)
    labelled = Labelled(Subject(tmp_path, tiny_model, root, "test"))
    assert len(labelled.train.places) == len(squares.train) / 2 and labelled.targets(labelled.train).any(1).all()


def test_studies_that_the_model_sees_nothing_of_are_left_out(tmp_path, tiny_towers, squares):
    def lateral(studies):
        return [replace(study, images={"lateral": study.images["frontal"]}) for study in studies]

    model = ClinVLA(**tiny_towers, recipe=Recipe(width=24, adapters=(), trained=("towers",), views=("frontal",)))
    split = [*lateral(squares.train[:6]), *squares.train[6:]], squares.validate, [*squares.test, *lateral(squares.test)]
    labelled = Labelled(Subject(tmp_path, model, squares.written(tmp_path / "some", *split), "test"))
    assert labelled.train.places.tolist() == list(range(6, len(squares.train)))
    assert labelled.test.places.tolist() == list(range(len(squares.test)))
    none = squares.written(tmp_path / "none", squares.train, squares.validate, lateral(squares.test))
    with pytest.raises(NotApplicable, match="no study to test on in its test split with labels and a view that"):
        Labelled(Subject(tmp_path, model, none, "test"))
