"""RSNA Pneumonia Detection Challenge (stage 2): labelled DICOM films with boxes, without reports.

ROOT/stage_2_train_labels.csv            a row a box; Target
ROOT/stage_2_detailed_class_info.csv     class, where it is there
ROOT/stage_2_train_images/<patientId>.dcm
"""

from __future__ import annotations

from pathlib import Path

from ..shards import Box, LeftOut
from .record import FRONTAL, Record
from .tables import below, find_table, need_table, read_rows

_SIDE = 1024  # pixels of every film's side
_ILL = ("pneumonia",)


def find_studies(root: Path, reports: Path | None, left_out: list[LeftOut]) -> list[Record]:
    """RSNA Pneumonia Detection Challenge: labels and boxes, without reports."""
    table = find_table([root], "stage_2_detailed_class_info.csv")
    rows = read_rows(table, [], ("patientId", "class")) if table else ()
    classes = {cells["patientId"]: cells["class"].lower() for _, cells in rows}
    found: dict[str, Record] = {}
    refused: set[str] = set()
    columns = ("patientId", "x", "y", "width", "height", "Target")
    for row, cells in read_rows(need_table([root], "stage_2_train_labels.csv"), left_out, columns, what="box"):
        patient, path = cells["patientId"], below(root / "stage_2_train_images", f"{cells['patientId']}.dcm")
        if path is None or not patient or cells["Target"] not in ("0", "1"):
            reason = "patientId is no file name" if path is None or not patient else "Target is neither 0 nor 1"
            left_out.append(LeftOut(row, "box" if patient in refused else "study", reason))
            refused.add(patient)
            continue
        ill, known = cells["Target"] == "1", found.get(patient)
        box = _box(cells) if ill else None
        if ill and box is None:
            left_out.append(LeftOut(row, "box", "box is none within the film"))
        boxes = (known.boxes if known else ()) + ((box,) if box else ())
        ill = ill or (known is not None and known.labels == _ILL)
        labels = _ILL if ill else (classes.get(patient, "no pneumonia"),)
        row = known.row if known else row
        found[patient] = Record(row, patient, patient, "", {FRONTAL: path}, None, labels, boxes=boxes)
    return [record for patient, record in found.items() if patient not in refused]


def _box(cells: dict[str, str]) -> Box | None:
    try:
        left, top, width, height = (float(cells[name]) / _SIDE for name in ("x", "y", "width", "height"))
    except ValueError:
        return None
    inside = left >= 0 and top >= 0 and width > 0 and height > 0 and left + width <= 1 and top + height <= 1  # not NaN
    return Box(*_ILL, FRONTAL, left, top, width, height) if inside else None
