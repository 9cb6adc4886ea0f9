"""Phantoms as a prepared data set, the same shards as real studies."""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from ..reports import clean_report
from ..shards import Study, empty_or_absent, write_shards
from . import phantom_studies

Progress = Callable[[int, int], None]


def write_phantoms(
    out: Path, *, patients: int, seed: int, size: int, progress: Progress = lambda done, patients: None
) -> dict:
    """Write the studies of `patients` phantoms, `size` pixels a side, as shards under `out`; return the manifest.

    Raises:
        ValueError: if there is no patient, or the pictures would be too small to show anything.
        DataError, OSError: as `write_shards`.
    """
    empty_or_absent(Path(out))
    studies = phantom_studies(patients, seed=seed, size=size, workers=os.cpu_count() or 1)
    settings = {"patients": patients, "seed": seed, "size": size}
    return write_shards(_cleaned(studies, patients, progress), out, source="phantom", settings=settings)


def _cleaned(studies: Iterator[Study], patients: int, progress: Progress) -> Iterator[Study]:
    seen: set[str] = set()
    for study in studies:
        seen.add(study.patient_id)
        progress(len(seen), patients)
        yield replace(study, report=clean_report(study.report))
