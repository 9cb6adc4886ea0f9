"""Temporal classification (MS-CXR-T, Bannur et al. 2023): whether each finding is improving, stable or worsening."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..data.shards import PROGRESSIONS, Study
from ..modeling.model import ClinVLA
from ..study import VIEWS, StudyBatch
from .downstream import Part, Training, folds_of, parts, spread, statistic, views_of
from .finetuning import Head, Tuning, encoded, nth_of, rate_of, train, training_loader, tuned
from .probing import Probe
from .result import NotApplicable, Result
from .score import Score
from .subject import Progress, Subject

_SEEDS = 5
_PRIOR = VIEWS.index("prior_frontal")
_COURSES = len(PROGRESSIONS)
_UNKNOWN = -1


def evaluate_temporal(subject: Subject, told: Training, progress: Progress) -> Result:
    """Accuracy of the course that each finding took since the prior study, the mean over the courses, by the image
    tower's task adapters and a linear head for each finding, and that over seeds (ClinVLA's protocol).

    The first figure takes the courses of all findings together, so that each has as many patients as there are; chance
    is what each finding's commonest course in training gives as its answer, at least one by the number of courses.

    Where the train split has courses, training is there, and is stopped on the validation split. Where the tested split
    alone has them, as MS-CXR-T's, it is parted by patient, in other parts for every seed: each part is predicted after
    training on all others but the next, which stops it. Studies without a current or a prior view are left out.

    Raises:
        NotApplicable: if no study has a course, no finding has taken two, or there are too few patients.
    """
    seeds = told.seeds or _SEEDS
    learnable = None if subject.split == "train" else subject.on("train")
    if learnable is not None and any(study.progressions for study in learnable.studies):
        split = parts(subject, _with_course, "progressions and both a current and a prior view")
        tested, seen, splits = split[2], split, [[split]] * seeds
    else:
        tested = Part(subject, np.flatnonzero(_with_course(subject)))
        seen, splits = (tested,), [_rotated(folds_of(tested, told.folds, seed)) for seed in range(seeds)]
    findings = sorted({finding for part in seen for study in _studies(part) for finding, _ in study.progressions})
    target = _targets(tested, findings)
    if not (_taken(target) > 1).any():
        raise NotApplicable(f"no finding of {subject.root} has taken two courses: there is nothing to tell apart.")
    predicted, commonest = np.empty((2, seeds, *target.shape), np.int64)
    trainings = [(seed, split) for seed, of_seed in enumerate(splits) for split in of_seed]
    steps = []
    for number, (seed, split) in enumerate(trainings):
        rows = np.searchsorted(tested.places, split[2].places)
        predicted[seed, rows], about = _classify(split, findings, told, seed, nth_of(progress, number, len(trainings)))
        learned = _targets(split[0], findings)
        commonest[seed, rows] = np.stack([(learned == course).sum(0) for course in range(_COURSES)]).argmax(0)
        steps.append(about)
    shown = {
        "tested": {finding: _counts(column) for finding, column in zip(findings, target.T, strict=True)},
        "trained": {f"training {number}": about for number, about in enumerate(steps)},
        "without a current or a prior view": sum(bool(s.progressions) for s in subject.studies) - len(target),
    }
    scores = _scores(tested, findings, target, predicted, commonest)
    return Result("temporal", scores, told.settings() | {"seeds": seeds}, shown)


def _with_course(subject: Subject) -> np.ndarray:
    """Whether each study has a course of some finding, and a current and a prior view that the model would look at."""
    found = np.array([bool(study.progressions) for study in subject.studies])
    if not found.any():
        raise NotApplicable(
            f"{subject.root} has no progressions (improving, stable, worsening) in its {subject.split} split: expected "
            "those of MS-CXR-T, or of phantoms."
        )
    seen = torch.tensor([view in subject.model.recipe.views for view in VIEWS[:_PRIOR]])
    views = views_of(Part(subject, np.flatnonzero(found))).unflatten(1, (2, _PRIOR))
    found[found] = views[..., seen].any(-1).all(-1).numpy()
    return found


def _rotated(folds: Sequence[Part]) -> list[tuple[Part, Part, Part]]:
    """For each fold: all others but the next to train on, the next to validate on, itself to test on."""
    found = []
    for number, tested in enumerate(folds):
        following = (number + 1) % len(folds)
        others = [fold.places for n, fold in enumerate(folds) if n not in (number, following)]
        found.append((Part(tested.subject, np.sort(np.concatenate(others))), folds[following], tested))
    return found


def _classify(
    split: tuple[Part, Part, Part], findings: Sequence[str], told: Training, seed: int, progress: Progress
) -> tuple[np.ndarray, dict[str, float]]:
    """The course of every finding of the tested studies, int64 [n, findings], and how training went."""
    learned, validate, tested = split
    target, wanted = _targets(learned, findings), _targets(validate, findings)
    weights = torch.from_numpy(_balanced(target)).to(learned.subject.model.device)

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        known = target != _UNKNOWN
        weight = weights.expand(*target.shape, _COURSES).gather(2, target.clamp(min=0)[..., None])[..., 0] * known
        return (
            cross_entropy(_by_course(logits).mT, target.clamp(min=0), reduction="none") * weight
        ).sum() / weight.sum()

    def courses(part: Part) -> np.ndarray:
        return _by_course(stage.predict(part)).argmax(-1)

    with tuned(learned.subject.model, told.unfreeze) as tower:
        features, outputs = encoded(learned, _now_and_before).double().numpy(), target.shape[1] * _COURSES
        scale = np.maximum(features.std(0), 1e-6)
        head = Head(Probe(features.mean(0), scale, np.zeros((outputs, len(scale))), np.zeros(outputs)))
        stage = Tuning(learned.subject.model, _now_and_before, head, loss, learned, target, seed)
        about = train(
            stage,
            [*tower, *head.parameters()],
            lambda at: training_loader(learned, told, seed, at),
            lambda: statistic("macro accuracy", **_cells(wanted, courses(validate))),
            told,
            rate_of(learned.subject.run, told),
            progress,
        )
        return courses(tested), about | {"studies": len(target)}


def _now_and_before(model: ClinVLA, batch: StudyBatch) -> Tensor:
    """Features of the current and of the prior views, both as if they were current, so that a model that was never
    shown a prior sees them alike; and their difference."""
    times = {name: torch.cat(getattr(batch, name).split(_PRIOR, 1)) for name in ("images", "present")}
    now, before = model.image_features(replace(batch, **times)).chunk(2)
    return torch.cat([now, before, now - before], 1)


def _by_course(logits):
    """[n, findings x courses] to [n, findings, courses]."""
    return logits.reshape(len(logits), -1, _COURSES)


def _balanced(target: np.ndarray) -> np.ndarray:
    """Weights [findings, courses] by which the courses of a finding weigh the same."""
    counts = np.stack([(target == course).sum(0) for course in range(_COURSES)], 1)
    return (counts.sum(1, keepdims=True) / np.maximum(counts, 1) / _COURSES).astype(np.float32)


def _studies(part: Part) -> list[Study]:
    return [part.subject.studies[place] for place in part.places]


def _targets(part: Part, findings: Sequence[str]) -> np.ndarray:
    """The course of each finding by its place in PROGRESSIONS, int64 [n, findings]; -1 where it has none."""
    courses = [dict(study.progressions) for study in _studies(part)]
    number = {course: n for n, course in enumerate(PROGRESSIONS)}
    return np.array([[number.get(of.get(finding), _UNKNOWN) for finding in findings] for of in courses], np.int64)


def _taken(target: np.ndarray) -> np.ndarray:
    """How many courses each finding has taken."""
    return np.stack([(target == course).any(0) for course in range(_COURSES)]).sum(0)


def _counts(column: np.ndarray) -> dict[str, int]:
    return {course: int((column == number).sum()) for number, course in enumerate(PROGRESSIONS)}


def _cells(target: np.ndarray, predicted: np.ndarray) -> dict[str, np.ndarray]:
    """Rows for the statistic "macro accuracy": a class each course of each finding."""
    known, offset = target != _UNKNOWN, _COURSES * np.arange(target.shape[1])
    return {"target": (target + offset)[known], "predicted": (predicted + offset)[known]}


def _scores(
    tested: Part, findings: Sequence[str], target: np.ndarray, predicted: np.ndarray, commonest: np.ndarray
) -> list[Score]:
    """Macro accuracy of all findings together and of each. Rows of all seeds follow each other: every seed predicts the
    same courses, so that the figure is the mean of the seeds' own.

    Args:
        predicted, commonest: int64 [seeds, n, findings]; the second what each finding took most often in training.
    """
    taken = _taken(target)

    def score(name: str, columns: np.ndarray) -> Score:
        known = target[:, columns] != _UNKNOWN
        course = target[:, columns][known]
        each, constant = ([{"target": course, "predicted": of[:, columns][known]} for of in x] for x in answers)
        rows = {key: np.concatenate([of[key] for of in each]) for key in each[0]}
        where = (np.tile(np.repeat(x, known.sum(1)), len(each)) for x in (tested.places, tested.patients))
        accuracy, by_training = ([statistic("macro accuracy", **of) for of in x] for x in (each, constant))
        chance = max(1 / len(np.unique(course)), float(np.mean(by_training)))
        return Score(name, "macro accuracy", rows, *where, chance=chance, spread=spread(accuracy))

    several, answers = taken > 1, (predicted, commonest)
    scores = [score("macro accuracy", several)]
    for number in np.flatnonzero(several):
        scores.append(score(f"macro accuracy {findings[number]}", np.arange(len(findings)) == number))
    return scores
