"""A table of one's own: a row a study.

Columns: study_id, patient_id, report and frontal or lateral; if wanted prior_frontal, prior_lateral, split (train,
validate, test; blank: by patient) and labels ("edema|pleural effusion"). Image paths are absolute or relative to the
table's folder; blank where there is none.
"""

from __future__ import annotations

from pathlib import Path

from ...study import VIEWS
from ..shards import LeftOut
from .record import Record
from .tables import read_rows

_CURRENT = VIEWS[:2]
_SPLITS = {
    **dict.fromkeys(("valid", "val", "validation", "dev"), "validate"),
    "training": "train",
    "testing": "test",
}


def find_studies(root: Path, reports: Path | None, left_out: list[LeftOut]) -> list[Record]:
    """A table of one's own: a row a study. ROOT is the table."""
    found = []
    for number, cells in read_rows(root, left_out, ("study_id", "patient_id", "report"), _CURRENT):
        views = {view: root.parent / cells[view] for view in VIEWS if cells.get(view)}
        if not any(view in views for view in _CURRENT):
            left_out.append(LeftOut(number, "study", "no current view"))
            continue
        split = cells.get("split", "").lower()
        labels = tuple(label.strip() for label in cells.get("labels", "").split("|") if label.strip())
        found.append(
            Record(
                number,
                cells["study_id"],
                cells["patient_id"],
                _SPLITS.get(split, split),
                views,
                cells["report"],
                labels,
            )
        )
    return found
