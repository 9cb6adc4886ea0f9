"""A figure, the rows of evidence that it is computed from, and how sure it is: by a bootstrap over patients."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

_DRAWS = 1000
_FEWEST = 10  # patients with a finding, and without it: the bootstrap of fewer is far too sure
_ENOUGH = 0.5  # of the draws must give a figure: a class that few patients have is missing in the others


# scikit-learn's figures, 30 times as fast and more: a bootstrap over findings calls each thousands of times.


def _mean(weights: np.ndarray, value: np.ndarray) -> float:
    return np.average(value, weights=weights)


def _accuracy(weights: np.ndarray, target: np.ndarray, predicted: np.ndarray) -> float:
    return np.average(target == predicted, weights=weights)


def _macro_accuracy(weights: np.ndarray, target: np.ndarray, predicted: np.ndarray) -> float:
    _, place = np.unique(target, return_inverse=True)
    total = np.bincount(place, weights)
    # Without a class that few patients have, the mean of the others would be of other chance.
    return (np.bincount(place, weights * (target == predicted)) / total).mean() if total.all() else np.nan


def _f1(weights: np.ndarray, target: np.ndarray, predicted: np.ndarray) -> float:
    shown = weights @ target
    return 2 * (weights @ (target & predicted)) / (shown + weights @ predicted) if shown else np.nan


def _auc(weights: np.ndarray, target: np.ndarray, scored: np.ndarray) -> float:
    _, place = np.unique(scored, return_inverse=True)
    found, other = np.bincount(place, weights * target), np.bincount(place, weights * (1 - target))
    pairs = found.sum() * other.sum()
    return (found * (other.cumsum() - other / 2)).sum() / pairs if pairs else np.nan


def _macro_auc(weights: np.ndarray, target: np.ndarray, scored: np.ndarray) -> float:
    found = [_auc(weights, *columns) for columns in zip(target.T, scored.T, strict=True)]
    return np.nan if np.isnan(found).all() else np.nanmean(found)


def _average_precision(weights: np.ndarray, target: np.ndarray, scored: np.ndarray) -> float:
    there = weights > 0
    _, place = np.unique(-scored[there], return_inverse=True)  # equal scores are one threshold
    found, called = (np.bincount(place, x[there]) for x in (weights * target, weights))
    return (found * found.cumsum() / called.cumsum()).sum() / found.sum() if found.any() else np.nan


# Each takes weights [n], some above 0, and rows by name, [n] or [n, classes]; NaN where it has no meaning.
STATISTICS: dict[str, Callable[..., float]] = {
    "mean": _mean,  # value
    "accuracy": _accuracy,  # target, predicted
    "macro accuracy": _macro_accuracy,  # target, predicted: the mean of the classes' recalls, if each has a weight
    "f1": _f1,  # target, predicted: booleans
    "auc": _auc,  # target: booleans, scored
    "macro auc": _macro_auc,  # target: booleans, scored: a column a class; classes that all or none show are left out
    "average precision": _average_precision,  # target: booleans, scored
}


class Interval(NamedTuple):
    """A figure and its 95% interval; None where the evidence cannot give one."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Score:
    """A figure over n rows of evidence.

    name: what a reader sees, as "text to image, precision@5".
    statistic: a name of STATISTICS.
    rows: its arguments, n rows each.
    units: int64 [n], what each row is of, mostly a study's place in its split. Rows of two runs are paired by it.
    patients: int64 [n], whose row it is, as a number: a patient's rows are drawn together.
    chance: what it would be by chance, where that is known.
    spread: its standard deviation over seeds, where there were several.
    lower_is_better: of errors.
    """

    name: str
    statistic: str
    rows: Mapping[str, np.ndarray]
    units: np.ndarray
    patients: np.ndarray
    chance: float | None = None
    spread: float | None = None
    lower_is_better: bool = False

    def __post_init__(self):
        """Raises ValueError if the statistic is none, or the rows do not belong together."""
        if self.statistic not in STATISTICS:
            raise ValueError(f"{self.name}: {self.statistic!r} is none of {', '.join(STATISTICS)}.")
        sizes = {name: len(x) for name, x in (*self.rows.items(), ("units", self.units), ("patients", self.patients))}
        if len(set(sizes.values())) != 1:
            raise ValueError(f"{self.name}: rows are {sizes}: expected as many of each.")

    def of(self, weights: np.ndarray) -> float:
        """The figure with rows that count so often; NaN where it has none."""
        return float(STATISTICS[self.statistic](weights, **self.rows)) if weights.any() else float("nan")

    @property
    def value(self) -> float | None:
        return _known(self.of(np.ones(len(self.units))))

    def interval(self, draws: int = _DRAWS) -> Interval:
        """The figure and the 2.5th and 97.5th percentile of the same over patients drawn with replacement (Efron 1979),
        always the same draws. A finding that fewer than ten patients have, or lack, gets none; a mean over
        findings does, unless all are such."""
        if self._of_few():
            return Interval(self.value, None, None)
        found = [self.of(weights) for weights in _drawn(self.patients, draws)]
        return Interval(self.value, *_percentiles(found))

    def _of_few(self) -> bool:
        """Whether all findings among the rows are of too few patients; what all or none show is in no figure."""
        target = self.rows.get("target")
        if target is None or target.dtype != bool:
            return False
        columns = target.reshape(len(target), -1).T
        sides = [[len(np.unique(self.patients[column == side])) for side in (True, False)] for column in columns]
        return max(map(min, sides)) < _FEWEST

    def difference(self, other: "Score", draws: int = _DRAWS) -> Interval:
        """Of this figure to another's, both over the same draws of the patients that both have rows of: what two
        models share, the easy and the difficult studies, is not in it. Without an interval where `interval` has none.

        Raises:
            ValueError: if their statistics differ or they have no row in common.
        """
        if self.statistic != other.statistic:
            raise ValueError(f"{self.name} is a {self.statistic}, {other.name} a {other.statistic}.")
        mine, its = self._paired(other)
        if not len(mine.units):
            raise ValueError(f"{self.name} and {other.name} have no row in common.")
        whole = np.ones(len(mine.units))
        value = _known(mine.of(whole) - its.of(whole))
        if mine._of_few() or its._of_few():
            return Interval(value, None, None)
        found = [mine.of(weights) - its.of(weights) for weights in _drawn(mine.patients, draws)]
        return Interval(value, *_percentiles(found))

    def _paired(self, other: "Score") -> tuple["Score", "Score"]:
        """Both with the rows that both have, in one order. A unit may have several rows, as over seeds."""
        places = []
        for score in (self, other):
            order = np.argsort(score.units, kind="stable")
            units = score.units[order]
            number = np.arange(len(units)) - np.searchsorted(units, units)  # of a unit's rows, from 0
            places.append(dict(zip(zip(units.tolist(), number.tolist(), strict=True), order.tolist(), strict=True)))
        common = sorted(places[0].keys() & places[1].keys())
        return tuple(
            score.taking(np.array([place[key] for key in common], np.int64))
            for score, place in zip((self, other), places, strict=True)
        )

    def taking(self, rows: np.ndarray) -> "Score":
        """The same of some of its rows."""
        parts = {name: x[rows] for name, x in self.rows.items()}
        given = (self.chance, self.spread, self.lower_is_better)
        return Score(self.name, self.statistic, parts, self.units[rows], self.patients[rows], *given)


def _drawn(patients: np.ndarray, draws: int) -> Iterator[np.ndarray]:
    """How often each row counts, over and over: as often as its patient was drawn."""
    _, numbers = np.unique(patients, return_inverse=True)
    random, several = np.random.default_rng(0), int(numbers.max(initial=-1)) + 1
    for _ in range(draws if several > 1 else 0):  # one patient says nothing of others
        yield np.bincount(random.integers(several, size=several), minlength=several)[numbers].astype(float)


def _percentiles(found: list[float]) -> tuple[float | None, float | None]:
    known = [x for x in found if not np.isnan(x)]
    if len(known) < _ENOUGH * max(1, len(found)):
        return None, None
    low, high = np.percentile(known, [2.5, 97.5])
    return float(low), float(high)


def _known(x: float) -> float | None:
    return None if np.isnan(x) else float(x)
