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
from ..data.sources.ms_cxr_t import PROGRESSIONS
from ..errors import DataError
from .result import NotApplicable, Result
from .score import Score
from .subject import Subject
from .tasks import Options

DEFAULT_PROMPTS = Path(__file__).parent / "prompts" / "default.toml"
_FEW = 10  # studies: what fewer show is left out, unless the file has phrases for it
_ROC_POINTS = 33
_HERE = "{finding}"

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


@dataclass(frozen=True)
class Prompts:
    """What stands for findings.

    findings: positive and negative phrases, by each name of a finding.
    other: those of findings without, with "{finding}" in them; None: such findings are not evaluated.
    leave_out: labels that are no findings.
    """

    findings: dict[str, tuple[Sequence[str], Sequence[str]]]
    other: tuple[Sequence[str], Sequence[str]] | None
    leave_out: frozenset[str]

    def of(self, finding: str) -> tuple[Sequence[str], Sequence[str]]:
        """Its own, else the general ones."""
        if finding in self.findings:
            return self.findings[finding]
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
        where = ".".join(map(str, wrong["loc"]))
        expected = f"expected prompts such as those in {DEFAULT_PROMPTS}"
        raise DataError(f"{path}: {where} is wrong ({wrong['msg']}): {expected}.") from None
    except ValueError as error:  # TOML's and UTF-8's
        raise DataError(f"{path} is not valid TOML ({error}).") from None
    findings: dict[str, tuple[Sequence[str], Sequence[str]]] = {}
    for key, finding in content.findings.items():
        for name in map(named, (key, *finding.also)):
            if name in findings:
                raise DataError(f"{path}: findings.{key} names {name!r}, which another entry does too.")
            findings[name] = finding.positive, finding.negative
        for phrase in (*finding.positive, *finding.negative):
            if not clean_report(phrase):
                raise DataError(
                    f"{path}: findings.{key} has {phrase!r}, of which cleaning leaves nothing: write a whole sentence."
                )
    other = content.other and (content.other.positive, content.other.negative)
    for phrase in (phrase for side in other or () for phrase in side):
        if _HERE not in phrase:
            raise DataError(f"{path}: other has {phrase!r}: expected {_HERE} in it.")
    return Prompts(findings, other, frozenset(map(named, content.leave_out)))


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
    path = options.prompts or DEFAULT_PROMPTS
    prompts = read_prompts(path)
    split = _Split.of(subject, prompts.leave_out)
    classes, left_out = _classes(split, prompts, subject, options.prompts)
    positive, negative = _ensembles(subject, [prompts.of(name) for name in classes])
    target, scored = split.target(classes), split.image @ (positive - negative).mT
    fitted, why = _validation(subject)
    thresholds: list[float | None] = [None] * len(classes)
    if fitted:
        validate = _Split.of(fitted, prompts.leave_out)
        seen = validate.image @ (positive - negative).mT
        thresholds = [_best(*columns) for columns in zip(validate.target(classes).T, seen.T.numpy(), strict=True)]
    scores, findings = [], {}
    for name, shows, values, threshold in zip(classes, target.T, scored.T.numpy(), thresholds, strict=True):
        if shows.all() or not shows.any():
            left_out[name] = f"{'all' if shows.all() else 'no'} studies show it"
            continue
        rates, hits, _ = roc_curve(shows, values)
        thinned = np.unique(np.linspace(0, len(rates) - 1, _ROC_POINTS).round().astype(int))
        findings[name] = {
            "studies": int(shows.sum()),
            "threshold": threshold,
            "roc": np.stack([rates, hits], 1)[thinned].round(4).tolist(),
        }
        ranked = {"target": shows, "scored": values}
        scores.append(split.score(f"{name}: AUC", "auc", ranked, 0.5))
        scores.append(split.score(f"{name}: average precision", "average precision", ranked, shows.mean()))
        if threshold is not None:
            told = values >= threshold
            # Chance: as many studies called positive, whichever they are.
            p, q, rows = shows.mean(), told.mean(), {"target": shows, "predicted": told}
            scores.append(split.score(f"{name}: accuracy", "accuracy", rows, p * q + (1 - p) * (1 - q)))
            scores.append(split.score(f"{name}: F1", "f1", rows, 2 * p * q / (p + q)))
            counts = confusion_matrix(shows, told, labels=[False, True]).ravel().tolist()
            names = ("true_negative", "false_positive", "false_negative", "true_positive")
            findings[name]["confusion"] = dict(zip(names, counts, strict=True))
    if len(findings) > 1:
        columns = [classes.index(name) for name in findings]
        rows = {"target": target[:, columns], "scored": scored[:, columns].numpy()}
        scores.insert(0, split.score("macro AUC", "macro auc", rows, 0.5))
    several, multi_class = _multi_class(split, classes, positive)
    if not (scores := several + scores):
        raise NotApplicable(f"{subject.root} has no finding in {subject.split} that some studies show and others not.")
    shown = {
        "prompts": {
            name: dict(zip(("positive", "negative"), map(list, prompts.of(name)), strict=True))
            | {"general": name not in prompts.findings}
            for name in classes
        },
        "not_in_data": sorted(prompts.findings.keys() - split.counts.keys()),
        "left_out": left_out,
        "without_labels": sum(not labels for labels in split.labels),
        "thresholds": why or "of the largest F1 on the validate split",
        "findings": findings,
        "multi_class": multi_class,
    }
    return Result("zero-shot", scores, {"prompts": path.name}, shown)


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
        labels = [
            frozenset(named(label) for label in subject.studies[place].labels if not label.endswith(_CHANGES))
            - leave_out
            for place in places
        ]
        return cls(places, subject.patients[places], labels, subject.embedded.image[places].double())

    @property
    def counts(self) -> Counter[str]:
        return Counter(name for labels in self.labels for name in labels)

    def target(self, classes: Sequence[str]) -> np.ndarray:
        """bool [n, classes]"""
        return np.array([[name in labels for name in classes] for labels in self.labels]).reshape(-1, len(classes))

    def score(
        self,
        name: str,
        statistic: str,
        rows: dict[str, np.ndarray],
        chance: float,
        of: np.ndarray | slice = slice(None),
    ) -> Score:
        return Score(name, statistic, rows, self.places[of], self.patients[of], float(chance))


_CHANGES = tuple(f": {progression}" for progression in PROGRESSIONS)  # of MS-CXR-T: how a finding changed


def _classes(split: _Split, prompts: Prompts, subject: Subject, given: Path | None) -> tuple[list[str], dict[str, str]]:
    """The findings to evaluate, and why others are not."""
    if not split.counts:
        raise NotApplicable(f"{subject.root}: no study in {subject.split} has an image and a finding as its label.")
    if given and not prompts.findings.keys() & split.counts.keys():
        there = ", ".join(sorted(split.counts)[:_FEW])
        raise DataError(f"{given}: none of its findings is a label in {subject.split}, which has {there}.")
    classes, left_out = [], {}
    for name, count in sorted(split.counts.items()):
        if name in prompts.findings or (prompts.other and count >= _FEW):
            classes.append(name)
        else:
            left_out[name] = f"no prompts, and {count} studies" if prompts.other else "no prompts"
    return classes, left_out


def _ensembles(subject: Subject, phrases: Sequence[tuple[Sequence[str], Sequence[str]]]) -> tuple[Tensor, Tensor]:
    """The direction of each finding's mean positive phrase, and of the negative one: float64 [classes, D] each."""
    sides = [side for pair in phrases for side in pair]
    embedded = subject.model.encode_reports([phrase for side in sides for phrase in side]).cpu().double()
    means = normalize(torch.stack([part.mean(0) for part in embedded.split([len(side) for side in sides])]), dim=-1)
    return means[0::2], means[1::2]


def _validation(subject: Subject) -> tuple[Subject | None, str]:
    """Where thresholds are fitted, or why they cannot be."""
    if subject.split == "validate":
        return None, "none: the validate split, which they are fitted on, is what is evaluated"
    fitted = subject.on("validate")
    return fitted, "" if fitted else "none: the data have no validate split to fit them on"


def _best(target: np.ndarray, scored: np.ndarray) -> float | None:
    """The threshold with the largest F1, the lowest of several; None without a positive."""
    if not target.any():
        return None
    precision, recall, thresholds = precision_recall_curve(target, scored)
    both = precision + recall
    f1 = 2 * precision * recall / np.where(both > 0, both, 1)
    return float(thresholds[f1[: len(thresholds)].argmax()])


def _multi_class(split: _Split, classes: Sequence[str], positive: Tensor) -> tuple[list[Score], dict]:
    """Of studies with one finding: scores, and what is shown of them."""
    target = split.target(classes)
    single = np.array([len(labels) == 1 for labels in split.labels]) & (target.sum(1) == 1)
    used = np.flatnonzero(target[single].any(0)) if single.any() else []
    if len(used) < 2:
        return [], {"left_out": "fewer than two findings have studies that show them alone"}
    true = target[single][:, used].argmax(1)
    told = (split.image[single] @ positive[used].mT).argmax(1).numpy()
    rows, chance = {"target": true, "predicted": told}, 1 / len(used)
    scores = [split.score(f"multi-class {name}", name, rows, chance, single) for name in ("accuracy", "macro accuracy")]
    matrix = confusion_matrix(true, told, labels=range(len(used))).tolist()
    return scores, {"classes": [classes[i] for i in used], "confusion": matrix, "studies": int(single.sum())}
