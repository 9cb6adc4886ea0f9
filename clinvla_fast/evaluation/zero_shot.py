"""Zero-shot classification: images against phrases that stand for a finding, and for its absence (METHODS 5)."""

import tomllib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import BaseModel, Field, StringConstraints, ValidationError
from sklearn.metrics import confusion_matrix, precision_recall_curve, roc_curve
from torch import Tensor
from torch.nn.functional import normalize

from ..data.reports import clean_report
from ..errors import DataError
from .result import NotApplicable, Result
from .score import Score
from .subject import Subject
from .tasks import Options

DEFAULT_PROMPTS = Path(__file__).parent / "prompts" / "default.toml"
_FEW = 10  # studies: what fewer show is left out, unless the file has phrases for it
_ROC_POINTS = 33
_HERE = "{finding}"
_CHANGES = "ms-cxr-t"

_Phrases = Annotated[
    tuple[Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)], ...], Field(min_length=1)
]


class _Sides(BaseModel, extra="forbid"):
    positive: _Phrases
    negative: _Phrases


class _Finding(_Sides):
    also: tuple[str, ...] = ()


class _File(BaseModel, extra="forbid"):
    findings: dict[str, _Finding]
    leave_out: tuple[str, ...] = ()
    other: _Sides | None = None


_Pair = tuple[Sequence[str], Sequence[str]]  # positive and negative phrases


@dataclass(frozen=True)
class Prompts:
    """What stands for findings.

    entries: the phrases of each.
    names: the entry of each of their names.
    other: phrases for any other finding, with "{finding}" in them; None: others are not evaluated.
    leave_out: labels that are no findings.
    """

    entries: dict[str, _Pair]
    names: dict[str, str]
    other: _Pair | None
    leave_out: frozenset[str]

    def of(self, finding: str) -> _Pair:
        """Its own phrases, else those for others."""
        if finding in self.names:
            return self.entries[self.names[finding]]
        return tuple([phrase.replace(_HERE, finding) for phrase in side] for side in self.other)


def read_prompts(path: Path) -> Prompts:
    """The phrases in a TOML file such as prompts/default.toml.

    Raises:
        DataError: if it is none; the message names the key.
    """
    try:
        content = _File.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file, expected prompts in TOML such as {DEFAULT_PROMPTS}.") from None
    except ValidationError as error:
        wrong = error.errors()[0]
        where, reason = ".".join(map(str, wrong["loc"])), wrong["msg"]
        raise DataError(f"{path}: {where} is wrong ({reason}): expected as in {DEFAULT_PROMPTS}.") from None
    except ValueError as error:  # TOML's and UTF-8's
        raise DataError(f"{path} is not valid TOML ({error}).") from None
    names: dict[str, str] = {}
    for key, finding in content.findings.items():
        for name in map(named, (key, *finding.also)):
            if name in names:
                raise DataError(f"{path}: findings.{key} is also {name!r}, as findings.{names[name]} is.")
            names[name] = key
        for phrase in (*finding.positive, *finding.negative):
            if not clean_report(phrase):
                raise DataError(f"{path}: findings.{key}: cleaning leaves nothing of {phrase!r}: write a sentence.")
    other = content.other and (content.other.positive, content.other.negative)
    for phrase in (phrase for side in other or () for phrase in side):
        if _HERE not in phrase:
            raise DataError(f"{path}: other: {phrase!r} has no {_HERE} in it, where the finding would go.")
    entries = {key: (finding.positive, finding.negative) for key, finding in content.findings.items()}
    return Prompts(entries, names, other, frozenset(map(named, content.leave_out)))


def named(label: str) -> str:
    """A label as prompts name it."""
    return label.strip().lower().replace("_", " ")


def evaluate_zero_shot(subject: Subject, options: Options) -> Result:
    """Findings told from images by phrases alone.

    Binary, of every finding that some studies show and others do not: the score of a study is its cosine to the
    positive ensemble less that to the negative one, so it depends on no other study. Accuracy and F1 are at the
    threshold with the largest F1 on the validate split. A study whose labels lack a finding does not show it.
    Multi-class, of the studies with a single finding: the nearest positive ensemble.

    Raises:
        NotApplicable: if the model does not align images and text, or the data have no findings to tell apart.
        DataError: if the prompt file cannot be used.
    """
    if not subject.model.aligns:
        raise NotApplicable(f"{subject.run} does not align images with text: expected a method that does.")
    if subject.manifest["source"] == _CHANGES:
        raise NotApplicable(
            f"{subject.root} ({_CHANGES}) names only findings whose change is known: others may be there too."
        )
    path = options.prompts or DEFAULT_PROMPTS
    prompts = read_prompts(path)
    split = _Split.of(subject, prompts.leave_out)
    classes, left_out = _classes(split, prompts, subject, options.prompts)
    if not classes:
        reasons = ", ".join(f"{name}: {reason}" for name, reason in left_out.items()) or "no labels"
        raise NotApplicable(f"{subject.root} has no finding in {subject.split} to evaluate ({reasons}).")
    positive, negative = _ensembles(subject, [prompts.of(name) for name in classes])
    fitted, thresholds = _validation(subject)
    validate = fitted and _Split.of(fitted, prompts.leave_out)
    several, multi_class = _multi_class(split, classes, positive)
    binary, findings = [], {}
    for number, name in enumerate(classes):
        direction = positive[number] - negative[number]
        shows, scored = split.shows(name), (split.image @ direction).numpy()
        if shows.all() or not shows.any():
            left_out[name] = "all studies show it"
            continue
        threshold = validate and _best(validate.shows(name), (validate.image @ direction).numpy())
        scores, findings[name] = _binary(split, name, shows, scored, threshold)
        binary += scores
    if len(findings) > 1:
        ranked = [score.rows for score in binary if score.statistic == "auc"]
        rows = {key: np.stack([columns[key] for columns in ranked], 1) for key in ("target", "scored")}
        several.append(split.score("macro AUC", "macro auc", rows, 0.5))
    if not several + binary:
        raise NotApplicable(f"{subject.root} has no finding in {subject.split} that some studies show and others not.")
    shown = {
        "prompts": {
            name: dict(zip(("positive", "negative"), map(list, prompts.of(name)), strict=True))
            | {"general": name not in prompts.names}
            for name in classes
        },
        "not_in_data": sorted(prompts.entries.keys() - {prompts.names.get(name) for name in split.counts}),
        "left_out": left_out,
        "without_labels": sum(not labels for labels in split.labels),
        "thresholds": thresholds,
        "findings": findings,
        "multi_class": multi_class,
    }
    return Result("zero-shot", several + binary, {"prompts": path.name}, shown)


@dataclass
class _Split:
    """The studies with an image: their places in the split, patients, findings, and embeddings in float64."""

    places: np.ndarray
    patients: np.ndarray
    labels: list[frozenset[str]]
    image: Tensor

    @classmethod
    def of(cls, subject: Subject, leave_out: frozenset[str]) -> "_Split":
        places = np.flatnonzero(subject.embedded.has_image)
        labels = [frozenset(map(named, subject.studies[place].labels)) - leave_out for place in places]
        return cls(places, subject.patients[places], labels, subject.embedded.image[places].double())

    @property
    def counts(self) -> Counter[str]:
        return Counter(name for labels in self.labels for name in labels)

    def shows(self, finding: str) -> np.ndarray:
        """Which studies have this label, bool [n]."""
        return np.array([finding in labels for labels in self.labels], bool)

    def score(
        self,
        name: str,
        statistic: str,
        rows: dict[str, np.ndarray],
        chance: float,
        of: np.ndarray | slice = slice(None),
    ) -> Score:
        return Score(name, statistic, rows, self.places[of], self.patients[of], float(chance))


def _classes(split: _Split, prompts: Prompts, subject: Subject, given: Path | None) -> tuple[list[str], dict[str, str]]:
    """The findings to evaluate, and why others are not."""
    if not split.counts:
        raise NotApplicable(f"{subject.root}: no study in {subject.split} has an image and a finding as its label.")
    if given and not prompts.names.keys() & split.counts.keys():
        there = ", ".join(sorted(split.counts)[:_FEW])
        raise DataError(f"{given}: none of its findings is a label in {subject.split}, which has {there}.")
    classes, left_out = [], {}
    for name, count in sorted(split.counts.items()):
        if name in prompts.names or (prompts.other and count >= _FEW):
            classes.append(name)
        else:
            left_out[name] = f"no prompts, and {count} studies" if prompts.other else "no prompts"
    return classes, left_out


def _ensembles(subject: Subject, phrases: Sequence[_Pair]) -> tuple[Tensor, Tensor]:
    """The direction of each finding's mean positive phrase, and of the negative one: float64 [classes, D] each."""
    sides = [side for pair in phrases for side in pair]
    embedded = subject.model.encode_reports([phrase for side in sides for phrase in side]).cpu().double()
    means = normalize(torch.stack([part.mean(0) for part in embedded.split([len(side) for side in sides])]), dim=-1)
    return means[0::2], means[1::2]


def _validation(subject: Subject) -> tuple[Subject | None, str]:
    """Where thresholds are fitted, and what is said of them."""
    if subject.split == "validate":
        return None, "none: what is evaluated is the validate split, which they would be fitted on"
    if fitted := subject.on("validate"):
        return fitted, "those of the largest F1 on the validate split; none for a finding that it lacks"
    return None, "none: the data have no validate split to fit them on"


def _best(shows: np.ndarray, scored: np.ndarray) -> float | None:
    """The threshold with the largest F1, the lowest of several; None without a positive."""
    if not shows.any():
        return None
    precision, recall, thresholds = precision_recall_curve(shows, scored)
    both = precision + recall
    f1 = 2 * precision * recall / np.where(both > 0, both, 1)
    return float(thresholds[f1[: len(thresholds)].argmax()])


def _of_random_order(shows: np.ndarray) -> float:
    """Average precision to be expected of a random order: of few positives it is well above their share."""
    n, positive = len(shows), int(shows.sum())
    harmonic = (1 / np.arange(1, n + 1)).sum()
    return float(((positive - 1) / (n - 1) * (n - harmonic) + harmonic) / n)


def _binary(
    split: _Split, name: str, shows: np.ndarray, scored: np.ndarray, threshold: float | None
) -> tuple[list[Score], dict]:
    """Of one finding, bool and float64 [n]: scores, and what is shown of it."""
    ranked = {"target": shows, "scored": scored}
    scores = [
        split.score(f"{name}: AUC", "auc", ranked, 0.5),
        split.score(f"{name}: average precision", "average precision", ranked, _of_random_order(shows)),
    ]
    wrongly, rightly, _ = roc_curve(shows, scored)
    thinned = np.unique(np.linspace(0, len(wrongly) - 1, _ROC_POINTS).round().astype(int))
    roc = np.stack([wrongly, rightly], 1)[thinned].round(4).tolist()
    shown = {"studies": int(shows.sum()), "roc": roc, "threshold": threshold}
    if threshold is not None:
        told = scored >= threshold
        rows, p, q = {"target": shows, "predicted": told}, shows.mean(), told.mean()
        # by chance: as many called positive, whichever they are
        scores.append(split.score(f"{name}: accuracy", "accuracy", rows, p * q + (1 - p) * (1 - q)))
        scores.append(split.score(f"{name}: F1", "f1", rows, 2 * p * q / (p + q)))
        counts = confusion_matrix(shows, told, labels=[False, True]).ravel().tolist()
        kinds = ("true_negative", "false_positive", "false_negative", "true_positive")
        shown["confusion"] = dict(zip(kinds, counts, strict=True))
    return scores, shown


def _multi_class(split: _Split, classes: Sequence[str], positive: Tensor) -> tuple[list[Score], dict]:
    """Of studies with one finding: scores, and what is shown of them."""
    only = [next(iter(labels)) if len(labels) == 1 else "" for labels in split.labels]
    there = [name for name in classes if name in only]
    if len(there) < 2:
        return [], {"left_out": "fewer than two findings have studies that show nothing else"}
    single = np.array([name in there for name in only])
    target = np.array([there.index(name) for name in only if name in there])
    nearest = positive[[classes.index(name) for name in there]]
    told = (split.image[single] @ nearest.mT).argmax(1).numpy()
    rows = {"target": target, "predicted": told}
    shares = (np.bincount(of, minlength=len(there)) / len(target) for of in (target, told))
    chances = {"accuracy": np.dot(*shares), "macro accuracy": 1 / len(there)}  # both this where classes are as large
    scores = [split.score(f"multi-class {name}", name, rows, chance, single) for name, chance in chances.items()]
    matrix = confusion_matrix(target, told, labels=range(len(there))).tolist()
    return scores, {"classes": there, "confusion": matrix, "studies": len(target)}
