"""Phantoms as a prepared data set, the same shards as real studies."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from ..reports import clean_report
from ..shards import SPLITS, Study, write_shards
from . import check, patient_split, patient_studies


def write_phantoms(
    out: Path,
    *,
    patients: int,
    seed: int,
    size: int,
    progress: Callable[[int, int], None] = lambda done, patients: None,
) -> dict:
    """Write the studies of `patients` phantoms, `size` pixels a side, as shards under `out`; return the manifest.

    Raises:
        ValueError: if there is no patient, or the pictures would be too small to show anything.
        DataError, OSError: as `write_shards`.
    """
    check(patients, size)
    of_split = {split: [p for p in range(patients) if patient_split(p) == split] for split in SPLITS}
    settings = {"patients": patients, "seed": seed, "size": size}
    make = partial(_studies, seed, size)
    return write_shards(of_split, make, out, source="phantom", settings=settings, progress=progress)


def _studies(seed: int, size: int, patient: int) -> Iterator[Study]:
    for study in patient_studies(seed, patient, size):
        yield replace(study, report=clean_report(study.report))
