"""A study of a source before anything of it is read, and what every source does to a list of them."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..shards import SPLITS, Box, LeftOut

FRONTAL, LATERAL = "frontal", "lateral"


@dataclass(frozen=True)
class Record:
    """A study whose files are still to be read.

    row: of the source's table, from 1: names the study without identifying anyone.
    split: of SPLITS, or "": by a hash of patient_id.
    views: the file of each view, keyed by a name of VIEWS. spare: other films of a view, in order, for where that file
        cannot be used.
    report: its text, or the file that holds it; None where the source has no reports.
    when: what the patient's studies are ordered by, as a date and a time, the latter perhaps missing; None where nobody
        knows.
    boxes, progressions: see Study.
    """

    row: int
    study_id: str
    patient_id: str
    split: str
    views: dict[str, Path]
    report: str | Path | None
    labels: tuple[str, ...] = ()
    when: tuple | None = None
    boxes: tuple[Box, ...] = field(default=())
    progressions: tuple[tuple[str, str], ...] = field(default=())
    spare: Mapping[str, Sequence[Path]] = field(default_factory=dict)


def with_priors(records: Iterable[Record]) -> list[Record]:
    """Each study with the views of the patient's last earlier one that has any, patient by patient in time order."""
    of_patient: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        of_patient[record.patient_id].append(record)
    found = []
    for studies in of_patient.values():
        studies.sort(key=lambda record: record.when or ())
        for number, record in enumerate(studies):
            prior = next((p for p in reversed(studies[:number]) if p.views and _earlier(p, record)), None)
            if prior is not None:
                views, spare = ({f"prior_{view}": x for view, x in of.items()} for of in (prior.views, prior.spare))
                record = replace(record, views=record.views | views, spare={**record.spare, **spare})
            found.append(record)
    return found


def _earlier(one: Record, other: Record) -> bool:
    """Whether it is known that one came before the other: of one day, by times that both have."""
    a, b = one.when, other.when
    return bool(a and b) and (a[:1] < b[:1] or (len(a) == len(b) and a < b))


def in_splits(records: Iterable[Record], left_out: list[LeftOut]) -> dict[str, list[Record]]:
    """The records that can be used, by split; the others join `left_out`.

    A patient belongs to the first split that one of their studies names; without any, to 80/10/10 by a hash of
    patient_id.
    """
    records = list(records)
    found: dict[str, list[Record]] = {split: [] for split in SPLITS}
    split_of: dict[str, str] = {}
    for record in records:
        if record.split in SPLITS:
            split_of.setdefault(record.patient_id, record.split)
    seen: set[str] = set()
    for record in records:
        split = record.split or split_of.get(record.patient_id) or hashed_split(record.patient_id)
        reason = ""
        if not record.study_id:
            reason = "blank study_id"
        elif not record.patient_id:
            reason = "blank patient_id"
        elif record.study_id in seen:
            reason = "duplicate study_id"
        elif split not in SPLITS:
            reason = "unknown split"
        elif split_of.get(record.patient_id, split) != split:
            reason = "patient in another split"
        elif record.report == "":
            reason = "empty report"
        if reason:
            left_out.append(LeftOut(record.row, "study", reason))
            continue
        seen.add(record.study_id)
        found[split].append(replace(record, split=split))
    return found


def hashed_split(patient_id: str, shares: Sequence[float] = (0.8, 0.1)) -> str:
    """The split of a patient: `shares` for train and validate, the rest for test; always the same."""
    at = int.from_bytes(hashlib.sha256(patient_id.encode("utf-8", "surrogateescape")).digest()[:8], "big") / 2**64
    train, validate = shares
    return "train" if at < train else "validate" if at < train + validate else "test"
