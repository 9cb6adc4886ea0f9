from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import recall_score

from clinvla_fast import ClinVLA, Recipe
from clinvla_fast.evaluation.downstream import Training
from clinvla_fast.evaluation.result import NotApplicable
from clinvla_fast.evaluation.subject import Subject
from clinvla_fast.evaluation.temporal import evaluate_temporal

TOLD = Training(seeds=1, epochs=2, batch_size=8, lr=1e-2)
SHORT = replace(TOLD, epochs=1)
EVERY = "macro accuracy"


@pytest.fixture
def classified(tmp_path, tiny_model, squares):
    def classify(*splits, told=TOLD, model=tiny_model):
        root = squares.written(tmp_path / f"data{len(list(tmp_path.iterdir()))}", *splits)
        return evaluate_temporal(Subject(tmp_path, model, root, "test"), told, lambda *_: None)

    return classify


def test_learns_from_the_train_split(classified, squares):
    found = classified(squares.train, squares.validate, squares.test)
    assert found.score(EVERY).interval().low > 1 / 3 and found.score(EVERY).chance == pytest.approx(1 / 3)
    leak = classified(*map(squares.shuffled, (squares.train, squares.validate, squares.test)))
    interval = leak.score(EVERY).interval()
    assert interval.low <= 1 / 3 <= interval.high


def test_without_a_train_split_every_study_is_predicted_once_a_seed(classified, squares):
    found = classified(squares.test[:24], told=replace(SHORT, seeds=2, folds=3))
    score = found.score(EVERY)
    with_course = [place for place, study in enumerate(squares.test[:24]) if study.progressions]
    assert sorted(score.units) == sorted(with_course * 2)
    half = len(with_course)
    each = [
        recall_score(score.rows["target"][part], score.rows["predicted"][part], average="macro")
        for part in (slice(half), slice(half, None))
    ]
    assert score.value == pytest.approx(np.mean(each), abs=1e-12)
    assert score.spread == pytest.approx(np.std(each, ddof=1), abs=1e-12)
    assert len(found.shown["trained"]) == 6


def test_a_model_that_looks_at_frontals_alone_sees_the_prior(classified, tiny_towers, squares):
    model = ClinVLA(**tiny_towers, recipe=Recipe(width=24, adapters=(), trained=("towers",), views=("frontal",)))
    found = classified(squares.train, squares.validate, squares.test, model=model)
    assert found.score(EVERY).interval().low > 1 / 3


def test_studies_without_a_prior_are_left_out(classified, squares):
    alone = replace(squares.test[2], images={"frontal": squares.test[2].images["frontal"]})
    assert alone.progressions
    found = classified(squares.train, squares.validate, [*squares.test[:2], alone, *squares.test[3:]], told=SHORT)
    assert found.shown["without a current or a prior view"] == 1 and 2 not in found.score(EVERY).units


def test_a_course_that_no_study_took(classified, squares):
    def without(course):
        return [replace(s, progressions=tuple(p for p in s.progressions if p[1] != course)) for s in squares.test[:24]]

    found = classified(without("stable"), told=replace(SHORT, folds=3))
    assert found.shown["tested"][squares.label]["stable"] == 0 and found.score(EVERY).chance == 0.5
    one = [replace(study, progressions=((squares.label, "stable"),)) for study in squares.test]
    with pytest.raises(NotApplicable, match=r"no finding of .* has taken two courses"):
        classified(one, told=replace(SHORT, folds=3))


def test_data_without_courses(classified, squares):
    bare = [replace(study, progressions=()) for study in squares.test]
    with pytest.raises(NotApplicable, match=r"no progressions \(improving, stable, worsening\) in its test split"):
        classified(bare)
    with pytest.raises(NotApplicable, match="2 patients to train and test on: expected at least 5, one a fold"):
        classified(squares.test[:8])


def test_what_the_finding_alone_gives_away_is_chance(classified, squares):
    """Two findings, of which one mostly shrinks and the other mostly grows: that is known without a look."""
    usual, rare = (("a", "improving"), ("b", "worsening")), (("a", "worsening"), ("b", "improving"))
    named = [
        [replace(s, progressions=rare if n < 4 else usual) for n, s in enumerate(split)]
        for split in (squares.train, squares.validate, squares.test)
    ]
    score = classified(*named, told=SHORT).score(EVERY)
    share = 1 - 4 / len(squares.test)
    assert score.chance == pytest.approx(share) and set(score.rows["target"]) == {0, 2}
