"""The tasks of `training.finetune`, by name: each trains something small on top of a run's model, with shares of the
labels, and says how well that does. To add one, add a line here."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from importlib import import_module
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from sklearn.model_selection import GroupKFold
from torch import Tensor

from ..data.loader import StudyLoader
from ..data.sources.record import hashed_split
from ..errors import DataError
from .result import NotApplicable, Result
from .score import STATISTICS
from .subject import Progress, Subject

TaskName = Literal["linear-probe", "classification", "temporal", "segmentation"]
_HOME = {
    "linear-probe": "probing",
    "classification": "finetuning",
    "temporal": "temporal",
    "segmentation": "segmentation",
}
SEEDS = 3


@dataclass(frozen=True)
class Training:
    """What training downstream can be told."""

    labels: tuple[float, ...] = (0.01, 0.1, 1.0)
    """Shares of the training studies whose labels are used; of temporal, always all."""
    seeds: int | None = None
    """How often each is trained, on other studies and in another order; figures are means over these, ± their standard
    deviation. None: 5 of temporal, 3 of the others."""
    epochs: int = 8
    """At most; training ends when half as many have brought nothing better on the validation split. With few labels an
    epoch is several."""
    batch_size: int = 32
    """Studies a step."""
    lr: float | None = None
    """Of adapters and head. None: that of the run's task adapters; of segmentation, 0.001."""
    unfreeze: bool = False
    """Train all that the run has trained in its image tower, not the task adapters alone."""
    label: str | None = None
    """Of segmentation: what to outline. None: of labels with boxes in each split, the one with the most in train."""
    folds: int = 5
    """Of temporal, where only a test split has progressions: parts by patient, each predicted by a model that was
    trained on others."""

    def __post_init__(self):
        """Raises DataError for a number out of range, or shares of one name."""
        if not self.labels or not all(0 < share <= 1 for share in self.labels):
            raise DataError(f"--labels are {self.labels}: expected shares above 0, at most 1, as 0.01 0.1 1.0.")
        if len(set(map(percent, self.labels))) < len(self.labels):
            raise DataError(f"--labels are {self.labels}: expected each share once.")
        for name, least in (("seeds", 1), ("epochs", 1), ("batch_size", 1), ("folds", 3)):
            if (value := getattr(self, name)) is not None and value < least:
                raise DataError(f"--{name.replace('_', '-')} is {value}: expected at least {least}.")
        if self.lr is not None and not self.lr > 0:
            raise DataError(f"--lr is {self.lr}: expected a rate above 0.")

    def settings(self) -> dict[str, Any]:
        """For a result: JSON values."""
        return {field.name: getattr(self, field.name) for field in fields(Training)}


Task = Callable[[Subject, Training, Progress], Result]


def task(name: str) -> Task:
    """The function that runs a task: `evaluate_NAME` of its module. It is told what it did so far, of how much."""
    module = import_module(f".{_HOME[name]}", __package__)
    return getattr(module, f"evaluate_{name.replace('-', '_')}")


class Part(NamedTuple):
    """Some studies of a split: their places in it, int64 [n]."""

    subject: Subject
    places: np.ndarray

    @property
    def patients(self) -> np.ndarray:
        return self.subject.patients[self.places]


def parts(subject: Subject, usable: Callable[[Subject], np.ndarray], what: str) -> tuple[Part, Part, Part]:
    """Those to train on, to validate on (what is chosen is chosen there), and to test on: `subject`'s own.

    Where there is no validation split beside the one that is tested, a tenth of the training patients stand for it.

    Args:
        usable: whether each study has what the task needs: bool [n].
        what: that is, for errors.

    Raises:
        NotApplicable: if there is no train split, or nothing usable in one of the parts.
    """
    train = None if subject.split == "train" else subject.on("train")
    if train is None:
        raise NotApplicable(
            f"{subject.root} has no train split beside {subject.split!r}: expected {what} to learn from."
        )
    validate = None if subject.split == "validate" else subject.on("validate")
    found = [Part(part, np.flatnonzero(usable(part))) for part in (train, validate, subject) if part]
    if validate is None:
        # Not as patients are hashed into splits: all of a train split may be of the first tenths.
        held = [hashed_split(f"held out {study.patient_id}", (0.9, 0.1)) == "validate" for study in train.studies]
        found[:1] = (Part(train, found[0].places[np.array(held)[found[0].places] == kept]) for kept in (False, True))
    for part, use in zip(found, ("train", "validate", "test"), strict=True):
        if not len(part.places):
            raise NotApplicable(
                f"{subject.root} has no study to {use} on in its {part.subject.split} split with {what}."
            )
    return tuple(found)


def loader_of(part: Part, batch_size: int, **how) -> StudyLoader:
    """A part's studies as the part's model takes them."""
    model = part.subject.model
    return StudyLoader(
        part.subject.root,
        part.subject.split,
        model.tokenizer,
        image_size=model.vision.image_size,
        max_tokens=model.max_tokens,
        batch_size=batch_size,
        device="gpu" if model.device.type == "cuda" else "cpu",
        places=part.places,
        **how,
    )


def views_of(part: Part) -> Tensor:
    """Which of VIEWS each study has: bool [n, views] on the CPU."""
    return torch.cat([batch.present.cpu() for batch in loader_of(part, part.subject.batch_size)])


def share_of(part: Part, share: float, seed: int) -> Part:
    """About that share of a part's studies, of whole patients in an order drawn by a seed: what a smaller share has, a
    larger one of the same seed has too."""
    _, patient, studies = np.unique(part.patients, return_inverse=True, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(studies))
    last = np.searchsorted(studies[order].cumsum(), share * len(patient))
    return Part(part.subject, part.places[np.isin(patient, order[: last + 1])])


def folds_of(part: Part, folds: int, seed: int) -> list[Part]:
    """A part in so many, each patient in one.

    Raises:
        NotApplicable: if there are fewer patients than folds.
    """
    patients = part.patients
    if (several := len(np.unique(patients))) < folds:
        raise NotApplicable(
            f"{part.subject.root} has {several} patients to train and test on: expected at least {folds}, one a fold."
        )
    split = GroupKFold(folds, shuffle=True, random_state=seed).split(patients, groups=patients)
    return [Part(part.subject, part.places[chosen]) for _, chosen in split]


def percent(share: float) -> str:
    """As a reader sees a share of the labels: "10% of labels"."""
    return f"{100 * share:g}% of labels"


def spread(values: list[float]) -> float | None:
    """The standard deviation over seeds; None of one alone."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def statistic(name: str, **rows: np.ndarray) -> float:
    """One of a score's statistics, of whole rows."""
    return float(STATISTICS[name](np.ones(len(next(iter(rows.values())))), **rows))
