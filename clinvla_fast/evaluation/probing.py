"""Linear probe: how much of the findings a logistic regression reads from frozen image features."""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from ..study import VIEWS
from .downstream import SEEDS, Part, Training, parts, percent, share_of, spread, statistic, views_of
from .result import NotApplicable, Result
from .score import Score
from .subject import Progress, Subject

_STRENGTHS = 10.0 ** np.arange(-5, 3)  # scikit-learn's C
_ITERATIONS = 2000


def evaluate_linear_probe(subject: Subject, told: Training, progress: Progress) -> Result:
    """AUC of each finding by a logistic regression on `subject.features`, with shares of the training labels."""
    labelled = Labelled(subject)
    shares, too_small = labelled.shares(told)
    made = [(share, seed) for share in shares for seed in range(1 if share == 1 else told.seeds or SEEDS)]
    predicted: dict[float, list[np.ndarray]] = {share: [] for share in shares}
    shown = {}
    for number, (share, seed) in enumerate(made):
        used = share_of(labelled.train, share, seed)
        probe, about = fit_probe(labelled, used)
        learned = labelled.learned(used)
        predicted[share].append(labelled.widened(probe(_features(labelled.test)), learned))
        shown[f"{percent(share)}, seed {seed}"] = about | {"left out": labelled.left_out(learned)}
        progress(number + 1, len(made))
    scores = [score for share in shares for score in labelled.scores(percent(share), predicted[share])]
    return Result("linear-probe", scores, told.settings(), {"trained": shown, "shares left out": too_small})


class Probe(NamedTuple):
    """A logistic regression for each of c findings on standardised features: mean, scale [width], weight [c, width],
    bias [c]."""

    mean: np.ndarray
    scale: np.ndarray
    weight: np.ndarray
    bias: np.ndarray

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Logits [n, c]."""
        return (features - self.mean) / self.scale @ self.weight.T + self.bias


def fit_probe(labelled: "Labelled", used: Part) -> tuple[Probe, dict[str, float]]:
    """A probe of the findings that can be learned from these studies. Features are standardised by them; the
    regularisation, one for all findings, is the one of the best macro AUC on the validation studies."""
    learned = labelled.learned(used)
    target, best = labelled.targets(used)[:, learned], -1.0
    scaler = StandardScaler().fit(_features(used))
    x = scaler.transform(_features(used))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # where it is hardly regularised: validation judges
        for strength in _STRENGTHS:
            models = [LogisticRegression(C=strength, max_iter=_ITERATIONS).fit(x, wanted) for wanted in target.T]
            weights = (np.concatenate([getattr(m, name) for m in models]) for name in ("coef_", "intercept_"))
            made = Probe(scaler.mean_, scaler.scale_, *weights)
            auc = labelled.validated(made(_features(labelled.validate)), learned)
            if auc > best:
                best, probe, about = auc, made, {"studies": len(target), "C": float(strength), "validated": auc}
    return probe, about


def _features(part: Part) -> np.ndarray:
    return part.subject.features[part.places].numpy()


class Labelled:
    """The findings that a data set's training studies are labelled with, and the studies that have a label and a view
    that the model looks at: a study without any label is one that nobody has looked at.

    Raises:
        NotApplicable: if there are none to train, validate or test on, or no finding that some test studies show and
            some do not.
    """

    def __init__(self, subject: Subject):
        self.train, self.validate, self.test = parts(subject, _labelled, "labels and a view that the model looks at")
        studies = self.train.subject.studies
        self.names = sorted({label for place in self.train.places for label in studies[place].labels})
        self._tested = _varies(self.targets(self.test))
        if not self._tested.any():
            raise NotApplicable(f"no finding of the train split is in some test studies of {subject.root} and not all.")

    def targets(self, part: Part) -> np.ndarray:
        """Which findings each study shows: bool [n, findings]."""
        studies = part.subject.studies
        return np.array([[name in studies[place].labels for name in self.names] for place in part.places])

    def learned(self, used: Part) -> np.ndarray:
        """Whether some of the studies show a finding, and some do not: bool [findings].

        Raises:
            NotApplicable: if that is so of none.
        """
        learned = _varies(self.targets(used))
        if not (learned & self._tested).any():
            raise NotApplicable(
                f"all {len(used.places)} studies to train on have the same labels: pass larger --labels."
            )
        return learned

    def shares(self, told: Training) -> tuple[list[float], dict[str, str]]:
        """Shares of the labels that something can be learned from with every seed, and why not from the others.

        Raises:
            NotApplicable: if that is so of none.
        """
        kept, left_out = [], {}
        for share in told.labels:
            try:
                for seed in range(told.seeds or SEEDS):
                    learned = self.learned(share_of(self.train, share, seed))
                    self.validated(np.zeros((len(self.validate.places), learned.sum())), learned)
                kept.append(share)
            except NotApplicable as error:
                left_out[percent(share)] = str(error)
        if not kept:
            raise NotApplicable(left_out[percent(max(told.labels))])
        return kept, left_out

    def left_out(self, learned: np.ndarray) -> dict[str, str]:
        """Findings without a figure, and why."""
        reasons = ((self._tested, "tested on"), (learned, "trained on"))
        return {
            name: f"none or all of the studies {use} show it"
            for some, use in reasons
            for name, there in zip(self.names, some, strict=True)
            if not there
        }

    def validated(self, scored: np.ndarray, learned: np.ndarray) -> float:
        """Macro AUC of the validation studies.

        Raises:
            NotApplicable: if none of the findings is in some of them and not all.
        """
        target = self.targets(self.validate)[:, learned]
        if not _varies(target).any():
            raise NotApplicable(
                f"{self.validate.subject.root} has {len(target)} studies to validate on, none or all of which show "
                "what is learned: expected more."
            )
        return statistic("macro auc", target=target, scored=scored)

    def widened(self, scored: np.ndarray, learned: np.ndarray) -> np.ndarray:
        """Predictions with a column for every finding, NaN where it was not learned."""
        found = np.full((len(scored), len(self.names)), np.nan)
        found[:, learned] = scored
        return found

    def scores(self, title: str, predicted: Sequence[np.ndarray]) -> list[Score]:
        """Macro AUC of the test studies, then the AUC of each finding.

        With several seeds a figure is the mean of theirs: predictions are columns beside each other, of which the
        statistic "macro auc" is the mean of the AUCs.

        Args:
            predicted: by each seed, [n, findings], as `widened`.
        """
        scores = [self._score(f"{title}, macro AUC", self._tested, predicted)]
        for column, name in enumerate(self.names):
            alone = np.arange(len(self.names)) == column
            if (alone & self._tested).any() and any(not np.isnan(scored[:, column]).any() for scored in predicted):
                scores.append(self._score(f"{title}, AUC {name}", alone, predicted))
        return scores

    def _score(self, name: str, columns: np.ndarray, predicted: Sequence[np.ndarray]) -> Score:
        target, of_seeds = self.targets(self.test), []
        for scored in predicted:
            kept = columns & ~np.isnan(scored).any(0)
            if kept.any():
                of_seeds.append({"target": target[:, kept], "scored": scored[:, kept]})
        rows = {name: np.concatenate([of_seed[name] for of_seed in of_seeds], 1) for name in ("target", "scored")}
        deviation = spread([statistic("macro auc", **of_seed) for of_seed in of_seeds])
        where = self.test.places, self.test.patients
        return Score(name, "macro auc", rows, *where, chance=0.5, spread=deviation)


def _labelled(subject: Subject) -> np.ndarray:
    """Whether each study has a label, and a view that the model looks at."""
    found = np.array([bool(study.labels) for study in subject.studies])
    if found.any():
        seen = np.array([view in subject.model.recipe.views for view in VIEWS])
        found[found] = views_of(Part(subject, np.flatnonzero(found))).numpy()[:, seen].any(1)
    return found


def _varies(target: np.ndarray) -> np.ndarray:
    return target.any(0) & ~target.all(0)
