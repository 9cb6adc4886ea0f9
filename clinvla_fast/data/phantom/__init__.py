"""Phantom studies: 3-D chests with findings, their radiographs and their reports. Seeded; nothing is downloaded."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from clinvla_fast.data.phantom.findings import FINDINGS, Finding, StudyTruth, boxes, patient_truths, render
from clinvla_fast.data.phantom.reports import write_report

if TYPE_CHECKING:
    from clinvla_fast.data.shards import Study

__all__ = ["FINDINGS", "Finding", "StudyTruth", "boxes", "patient_truths", "phantom_studies", "render", "write_report"]

_CHUNK = 8  # patients a task


def _render_patients(seed: int, patients: range, size: int) -> list[tuple[StudyTruth, str, dict[str, np.ndarray]]]:
    """The work of one task: truth, report and images of each study of `patients`."""
    truths = [truth for patient in patients for truth in patient_truths(seed, patient)]
    return [(truth, write_report(truth), render(truth, size)) for truth in truths]


def _chunks(seed: int, patients: int, size: int, workers: int) -> Iterator[list]:
    tasks = ((seed, range(start, min(start + _CHUNK, patients)), size) for start in range(0, patients, _CHUNK))
    if workers <= 1:
        yield from (_render_patients(*task) for task in tasks)
        return
    pool = ProcessPoolExecutor(workers)
    try:
        # A short queue keeps memory flat however slowly the studies are consumed.
        pending = deque(pool.submit(_render_patients, *task) for task in islice(tasks, 2 * workers))
        while pending:
            yield pending.popleft().result()
            pending.extend(pool.submit(_render_patients, *task) for task in islice(tasks, 1))
    finally:
        pool.shutdown(cancel_futures=True)


def phantom_studies(patients: int, *, seed: int = 0, size: int = 128, workers: int = 2) -> Iterator[Study]:
    """The studies of `patients` phantom patients, about 1.4 each, patient by patient and in time order.

    The same `seed` and `size` give the same studies in the same order, byte for byte, whatever `workers` is, and the
    first patients are the same however many follow. No patient is in two splits.

    Args:
        size: side of the square images in pixels, at least 64.
        workers: processes that render; 0 or 1 renders here.
    """
    if patients < 1:
        raise ValueError(f"patients is {patients}, expected at least 1.")
    if size < 64:
        raise ValueError(f"size is {size} pixels, expected at least 64.")
    return _studies(_chunks(seed, patients, size, workers))


def _studies(chunks: Iterator[list]) -> Iterator[Study]:
    from clinvla_fast.data.shards import Study  # here: rendering needs no shards, so workers start lighter

    before: StudyTruth | None = None
    past: dict[str, np.ndarray] = {}
    for chunk in chunks:
        for truth, report, images in chunk:
            followup = before is not None and before.patient_id == truth.patient_id
            prior = {f"prior_{view}": image for view, image in past.items()} if followup else {}
            yield Study(
                study_id=truth.study_id,
                patient_id=truth.patient_id,
                split=truth.split,
                report=report,
                images=images | prior,
                labels=truth.labels,
            )
            before, past = truth, images
