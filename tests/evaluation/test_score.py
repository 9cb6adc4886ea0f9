"""Figures against formulas, intervals against what they promise, and results on disk."""

import json

import numpy as np
import pytest
import sklearn.metrics

from clinvla_fast.errors import DataError
from clinvla_fast.evaluation.result import FOLDER, Result, read_result, results, write_result
from clinvla_fast.evaluation.score import STATISTICS, Interval, Score


def _mean(values, patients=None, units=None, name="a figure", **more):
    values, places = np.asarray(values, float), np.arange(len(values))
    units = places if units is None else np.asarray(units)
    return Score(name, "mean", {"value": values}, units, places if patients is None else np.asarray(patients), **more)


def _width(interval):
    return interval.high - interval.low


# Statistics


def _auc(target, scored):
    """The share of pairs in order (Mann and Whitney 1947)."""
    more = scored[target][:, None] - scored[~target]
    return ((more > 0) + (more == 0) / 2).mean()


def _f1(target, predicted):
    return 2 * (target & predicted).sum() / (target.sum() + predicted.sum())


# Of rows that are all there as often as they count.
PLAIN = {
    "mean": lambda value: value.sum() / len(value),
    "accuracy": lambda target, predicted: (target == predicted).mean(),
    "macro accuracy": lambda target, predicted: np.mean([(predicted[target == c] == c).mean() for c in set(target)]),
    "f1": _f1,
    "auc": _auc,
    "macro auc": lambda target, scored: np.mean([_auc(*pair) for pair in zip(target.T, scored.T, strict=True)]),
    "average precision": lambda target, scored: sklearn.metrics.average_precision_score(target, scored),
}


def _drawn(statistic, n, random):
    """Rows for a statistic, with equal scores among them, and with weights up to 3."""
    classes, flags, shape = random.integers(0, 3, (2, n)), random.random((2, n)) < 0.4, (n, 4)
    rows = {
        "mean": {"value": random.normal(size=n)},
        "accuracy": {"target": classes[0], "predicted": classes[1]},
        "macro accuracy": {"target": classes[0], "predicted": classes[1]},
        "f1": {"target": flags[0], "predicted": flags[1]},
        "auc": {"target": flags[0], "scored": random.normal(size=n).round(1)},
        "macro auc": {"target": random.random(shape) < 0.4, "scored": random.normal(size=shape).round(1)},
        "average precision": {"target": flags[0], "scored": random.normal(size=n).round(1)},
    }
    return rows[statistic], random.integers(0, 4, n)


@pytest.mark.parametrize("statistic", STATISTICS)
def test_a_weight_is_how_often_a_row_counts(statistic):
    random = np.random.default_rng(0)
    for _ in range(20):
        rows, weights = _drawn(statistic, 60, random)
        if statistic == "macro accuracy":  # its classes are those of the whole
            weights[:3], rows["target"][:3] = 1, range(3)
        score = Score("a figure", statistic, rows, np.arange(60), np.arange(60))
        repeated = {name: x.repeat(weights, 0) for name, x in rows.items()}
        assert score.of(weights.astype(float)) == pytest.approx(PLAIN[statistic](**repeated), abs=1e-12)
        assert score.value == pytest.approx(PLAIN[statistic](**rows), abs=1e-12)


def test_auc_is_scikit_learns():
    random = np.random.default_rng(1)
    rows, _ = _drawn("auc", 300, random)
    weights = random.random(300) + 0.1
    expected = sklearn.metrics.roc_auc_score(rows["target"], rows["scored"], sample_weight=weights)
    for target in (rows["target"], rows["target"].astype(np.int64)):  # flags, however they are kept
        score = Score("a figure", "auc", rows | {"target": target}, np.arange(300), np.arange(300))
        assert score.of(weights) == pytest.approx(expected, abs=1e-12)


def test_macro_accuracy_is_scikit_learns():
    random = np.random.default_rng(1)
    target, predicted = random.integers(0, 5, (2, 80))
    weights = random.integers(1, 4, 80).astype(float)
    score = Score(
        "a figure", "macro accuracy", {"target": target, "predicted": predicted}, *np.arange(160).reshape(2, 80)
    )
    expected = sklearn.metrics.balanced_accuracy_score(target, predicted, sample_weight=weights)
    assert score.of(weights) == pytest.approx(expected, abs=1e-12)


def test_a_constant_answer_does_not_beat_chance_by_draws_that_lack_the_rare_classes():
    target = np.concatenate([np.zeros(40, int), np.arange(1, 13)])
    rows = {"target": target, "predicted": np.zeros(52, int)}
    value, low, _ = Score("a figure", "macro accuracy", rows, *np.arange(104).reshape(2, 52)).interval()
    assert value == pytest.approx(1 / 13) and low is None
    rows["target"] = np.repeat([0, 1, 2], [40, 6, 6])  # few draws lack one
    value, low, high = Score("a figure", "macro accuracy", rows, *np.arange(104).reshape(2, 52)).interval()
    assert low == high == value == pytest.approx(1 / 3)


@pytest.mark.parametrize("statistic", ["f1", "auc", "macro auc", "average precision"])
def test_without_positives_there_is_no_figure(statistic):
    rows, _ = _drawn(statistic, 12, np.random.default_rng(0))
    score = Score(
        "a figure", statistic, rows | {"target": np.zeros_like(rows["target"])}, *np.arange(24).reshape(2, 12)
    )
    assert score.interval(20) == (None, None, None)


def test_a_class_that_is_missing_is_left_out():
    target = np.array([[True, False], [False, False], [True, False]])
    rows = {"target": target, "scored": np.array([[0.9, 0.1], [0.2, 0.8], [0.1, 0.3]])}
    assert Score("a figure", "macro auc", rows, np.arange(3), np.arange(3)).value == 0.5
    three = {"target": np.array([0, 0, 2]), "predicted": np.array([0, 1, 2])}
    assert Score("a figure", "macro accuracy", three, np.arange(3), np.arange(3)).value == 0.75


# Intervals


def test_95_of_100_intervals_hold_the_truth():
    random = np.random.default_rng(2)
    found = [_mean(random.normal(3, 1, 50)).interval(200) for _ in range(300)]
    assert 0.90 < np.mean([low < 3 < high for _, low, high in found]) < 0.98
    assert np.mean([_width(x) for x in found]) == pytest.approx(2 * 1.96 / np.sqrt(50), rel=0.05)


def test_copies_of_a_patient_are_no_evidence():
    values = np.random.default_rng(3).normal(size=80)
    once, copied = _mean(values), _mean(values.repeat(9), np.arange(80).repeat(9))
    assert copied.interval() == pytest.approx(once.interval(), abs=1e-12)
    taken_for_new = _mean(values.repeat(9)).interval()
    assert _width(copied.interval()) / _width(taken_for_new) == pytest.approx(3, rel=0.1)


def test_the_same_draws_every_time():
    values = np.random.default_rng(4).normal(size=30)
    assert _mean(values).interval() == _mean(values).interval()
    assert _mean(values).interval() == _mean(values, np.arange(30) * 7 - 50).interval()  # numbers are names


def test_where_evidence_gives_no_interval():
    assert _mean([1.0, 2.0], [5, 5]).interval() == Interval(1.5, None, None)  # one patient
    assert _mean([]).interval() == (None, None, None)
    few = {"target": np.arange(40) == 0, "scored": np.linspace(1, 0, 40)}
    assert Score("a figure", "auc", few, np.arange(40), np.arange(40)).interval(200) == Interval(1.0, None, None)
    pair = {"target": np.array([True, True, False]), "scored": np.array([0.3, 0.9, 0.5])}
    assert Score("a figure", "auc", pair, np.arange(3), np.array([0, 0, 1])).interval(200).value == 0.5


def test_rows_that_do_not_belong_together():
    with pytest.raises(ValueError, match="expected as many of each"):
        Score("a figure", "mean", {"value": np.zeros(3)}, np.arange(3), np.arange(2))
    with pytest.raises(ValueError, match="is none of mean, accuracy"):
        Score("a figure", "median", {"value": np.zeros(3)}, np.arange(3), np.arange(3))


# Differences


def test_no_difference_is_exactly_none():
    random = np.random.default_rng(5)
    values, patients, units = random.normal(size=90), np.arange(90) // 3, np.arange(90) // 2  # a unit of two rows
    score = _mean(values, patients, units)
    assert score.difference(score) == (0, 0, 0)
    order = np.argsort(random.random(45))[:, None] * 2 + [0, 1]  # units in another order, each with its rows in theirs
    assert score.difference(score.taking(order.ravel())) == (0, 0, 0)


def test_a_difference_is_of_the_same_studies():
    random = np.random.default_rng(6)
    hard, gain = random.normal(0, 5, 100), random.normal(0.5, 0.2, 100)
    before, order = _mean(hard), random.permutation(100)
    after = _mean((hard + gain)[order], order, order)
    found = after.difference(before)
    assert found.value == pytest.approx(gain.mean(), abs=1e-12)
    assert 0 < found.low < found.value < found.high and _width(found) < 0.05 * _width(before.interval())
    half = after.difference(before.taking(np.arange(50)))
    assert half.value == pytest.approx(gain[:50].mean(), abs=1e-12)
    back = before.difference(after)
    assert (back.low, back.high) == pytest.approx((-found.high, -found.low), abs=1e-12)


def test_what_cannot_be_compared():
    score = _mean([1.0, 2.0])
    with pytest.raises(ValueError, match="no row in common"):
        score.difference(_mean([1.0, 2.0], units=[7, 8]))
    other = Score("another", "accuracy", {"target": np.ones(2), "predicted": np.ones(2)}, np.arange(2), np.arange(2))
    with pytest.raises(ValueError, match="a figure is a mean, another a accuracy"):
        score.difference(other)


# On disk


ON = {"data": {"source": "nih", "split": "test", "manifest_sha256": "0123abcd" * 8}}


@pytest.fixture
def result():
    random = np.random.default_rng(7)
    rows, _ = _drawn("macro auc", 40, random)
    scores = [
        _mean(random.normal(size=40), np.arange(40) // 2, name="text to image, precision@5", chance=0.125),
        _mean(random.normal(size=40), name="error", spread=0.25, lower_is_better=True),
        Score("AUC", "macro auc", rows, np.arange(40) * 3, np.arange(40)),
        _mean([], name="of nothing"),
    ]
    arrays = {"film": random.integers(0, 256, (4, 5), dtype=np.uint8), "map": random.random((3, 2), np.float32).T}
    return Result("retrieval", scores, {"queries": None}, {"galleries": [{"query": 3}]}, arrays)


def test_a_result_is_read_as_it_was_written(result, tmp_path):
    path = write_result(result, tmp_path, {"run": "first"} | ON)
    found = read_result(tmp_path, "retrieval")
    assert path == tmp_path / FOLDER / "nih-test-0123abcd" / "retrieval.json"
    assert (found.task, found.settings, found.shown) == (result.task, result.settings, result.shown)
    assert found.about["run"] == "first" and found.about["data"] == ON["data"]
    assert found.intervals == result.intervals == {score.name: score.interval() for score in result.scores}
    assert found.intervals["of nothing"] == (None, None, None)
    for name, x in result.arrays.items():
        assert found.arrays[name].dtype == x.dtype and np.array_equal(found.arrays[name], x)
    for mine, its in zip(result.scores, found.scores, strict=True):
        assert (mine.name, mine.statistic, mine.chance) == (its.name, its.statistic, its.chance)
        assert (mine.spread, mine.lower_is_better) == (its.spread, its.lower_is_better)
        assert np.array_equal(mine.units, its.units) and np.array_equal(mine.patients, its.patients)
        assert mine.rows.keys() == its.rows.keys() and mine.value == its.value
    assert found.score("AUC").difference(result.score("AUC")) == (0, 0, 0)
    with pytest.raises(KeyError):
        found.score("no such figure")


def test_results_are_all_that_was_found(result, tmp_path):
    assert results(tmp_path) == []
    write_result(result, tmp_path, ON)
    write_result(Result("collapse", [_mean([1.0, 2.0])]), tmp_path, ON)
    (tmp_path / FOLDER / "report.json").write_text("{}")  # a report's figures lie beside them
    assert [found.task for found in results(tmp_path)] == ["collapse", "retrieval"]
    write_result(Result("collapse", [_mean([3.0, 4.0])]), tmp_path, ON)
    assert read_result(tmp_path, "collapse").scores[0].value == 3.5


@pytest.mark.parametrize(("positives", "known"), [(9, False), (10, True), (50, True), (51, False)])
@pytest.mark.parametrize("columns", [None, 1, 3])  # of one seed, of several
def test_a_finding_of_few_patients_gets_no_interval(positives, known, columns):
    random = np.random.default_rng(0)
    target, scored = np.arange(60) < positives, random.normal(size=(60, columns or 1))
    rows = {"target": np.stack([target] * columns, 1), "scored": scored} if columns else {}
    rows = rows or {"target": target, "scored": scored[:, 0]}
    score = Score("AUC", "macro auc" if columns else "auc", rows, np.arange(60), np.arange(60))
    for value, low, high in (score.interval(), score.difference(score)):
        assert value is not None and (low is not None, high is not None) == (known, known)


def test_a_mean_over_findings_of_few_patients_gets_no_interval():
    random = np.random.default_rng(0)
    positives = {"enough": [30, 20], "one of few": [30, 9], "one that none show": [30, 0], "all of few": [51, 9]}
    known = {}
    for name, counts in positives.items():
        rows = {"target": np.arange(60)[:, None] < counts, "scored": random.normal(size=(60, 2))}
        known[name] = Score("macro AUC", "macro auc", rows, np.arange(60), np.arange(60)).interval().low is not None
    assert known == {"enough": True, "one of few": True, "one that none show": True, "all of few": False}


def test_results_on_other_data_stay(result, tmp_path):
    """A model is evaluated on many data sets: one does not take another's place."""
    others = [
        ON["data"] | change for change in ({}, {"source": "rsna"}, {"split": "validate"}, {"manifest_sha256": "f" * 64})
    ]
    for data in others:
        write_result(result, tmp_path, {"data": data})
    assert sorted(str(found.about["data"]) for found in results(tmp_path)) == sorted(map(str, others))
    with pytest.raises(DataError, match=r"retrieval of nih-test-0123abcd, nih-test-ffffffff, nih-validate.*, rsna"):
        read_result(tmp_path, "retrieval")


def test_what_was_not_run(tmp_path):
    with pytest.raises(DataError, match=r"has retrieval of none: expected .* python -m training\.evaluate"):
        read_result(tmp_path, "retrieval")


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "{}", '{"format": 1}', "\xff"])
def test_damaged_figures(result, tmp_path, content):
    write_result(result, tmp_path, ON).write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError, match=r"is damaged .*: evaluate again"):
        read_result(tmp_path, "retrieval")


@pytest.mark.parametrize("change", [{"scores": [{}]}, {"scores": 3}, {"settings": None, "format": 0}, {"scores": [[]]}])
def test_changed_figures(result, tmp_path, change):
    path = write_result(result, tmp_path, ON)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match="is damaged"):
        read_result(tmp_path, "retrieval")


def test_damaged_rows(result, tmp_path):
    path = write_result(result, tmp_path, ON).with_suffix(".safetensors")
    whole = path.read_bytes()
    flipped = whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:]
    for content in (b"", whole[:50], whole[:-1], flipped):
        path.write_bytes(content)
        with pytest.raises(DataError, match="is damaged"):
            read_result(tmp_path, "retrieval")
    path.unlink()
    with pytest.raises(DataError, match="is damaged"):
        read_result(tmp_path, "retrieval")


def test_figures_and_rows_of_two_evaluations(result, tmp_path):
    """As a kill between the two files leaves them."""
    path = write_result(result, tmp_path, ON)
    before = path.read_bytes()
    result.scores[0].rows["value"][3] += 1
    write_result(result, tmp_path, ON)
    path.write_bytes(before)
    with pytest.raises(DataError, match="is damaged"):
        read_result(tmp_path, "retrieval")


def test_a_name_is_of_one_figure(tmp_path):
    with pytest.raises(ValueError, match="two scores have one name"):
        write_result(Result("retrieval", [_mean([1.0]), _mean([2.0])]), tmp_path, ON)
    assert not (tmp_path / FOLDER).exists()
