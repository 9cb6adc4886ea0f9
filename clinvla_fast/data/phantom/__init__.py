"""Phantom studies: 3-D chests with findings, their radiographs and their reports. Seeded; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from clinvla_fast.data.phantom.findings import (
    FINDINGS,
    Finding,
    StudyTruth,
    boxes,
    patient_split,
    patient_truths,
    render,
)
from clinvla_fast.data.phantom.reports import write_report

if TYPE_CHECKING:
    from clinvla_fast.data.shards import Study

__all__ = [
    "FINDINGS",
    "Finding",
    "StudyTruth",
    "boxes",
    "patient_split",
    "patient_studies",
    "patient_truths",
    "phantom_studies",
    "render",
    "write_report",
]

_PROGRESSIONS = {"improved": "improving", "stable": "stable", "worsened": "worsening"}  # what is new has none


def patient_studies(seed: int, patient: int, size: int) -> Iterator[Study]:
    """The one to three studies of one patient, in time order; a pure function of its arguments."""
    from clinvla_fast.data.shards import Box, Study  # here: who only draws phantoms needs no shards

    past: dict[str, np.ndarray] = {}
    for truth in patient_truths(seed, patient):
        images = render(truth, size)
        prior = {f"prior_{view}": image for view, image in past.items()}
        yield Study(
            study_id=truth.study_id,
            patient_id=truth.patient_id,
            split=truth.split,
            report=write_report(truth),
            images=images | prior,
            labels=truth.labels,
            boxes=tuple(
                Box(label, view, left / size, top / size, (right - left) / size, (bottom - top) / size)
                for label, of_view in boxes(truth, size).items()
                for view, found in of_view.items()
                if found
                for left, top, right, bottom in [found]
            ),
            progressions=tuple((f.label, _PROGRESSIONS[f.change]) for f in truth.findings if f.change in _PROGRESSIONS),
        )
        past = images


def phantom_studies(patients: int, *, seed: int = 0, size: int = 128) -> Iterator[Study]:
    """The studies of `patients` phantom patients, about 1.4 each, patient by patient and in time order.

    The same `seed` and `size` give the same studies in the same order, byte for byte, and the first patients are the
    same however many follow. No patient is in two splits.

    Args:
        size: side of the square images in pixels, at least 64.

    Raises:
        ValueError: if there is no patient, or the pictures would be too small to show anything.
    """
    check(patients, size)
    return (study for patient in range(patients) for study in patient_studies(seed, patient, size))


def check(patients: int, size: int) -> None:
    """Raises ValueError: see `phantom_studies`."""
    if patients < 1:
        raise ValueError(f"patients is {patients}, expected at least 1.")
    if size < 64:
        raise ValueError(f"size is {size} pixels, expected at least 64.")
