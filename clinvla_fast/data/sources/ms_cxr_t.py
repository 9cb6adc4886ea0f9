"""MS-CXR-T's temporal image classification: pairs of MIMIC-CXR films with what changed between them.

    ROOT/MS_CXR_T_temporal_image_classification_v1.0.0.csv      dicom_id, previous_dicom_id: p10/p.../s.../<hash>
    ROOT/files/p10/p.../s.../<hash>.jpg, or .dcm                MIMIC-CXR's; or below REPORTS (--reports)

Labels are the findings that have a progression: improving, stable or worsening.
"""

from __future__ import annotations

from pathlib import Path

from ..shards import PROGRESSIONS, LeftOut
from .record import FRONTAL, Record
from .tables import below, need_table, read_rows, there

FINDINGS = ("consolidation", "edema", "pleural_effusion", "pneumonia", "pneumothorax")
_COLUMNS = ("dicom_id", "previous_dicom_id", "subject_id", "study_id", *(f"{f}_progression" for f in FINDINGS))


def find_studies(root: Path, reports: Path | None, left_out: list[LeftOut]) -> list[Record]:
    """MS-CXR-T: pairs of MIMIC-CXR films with what changed between them, without reports."""
    bases = [base / "files" for base in (root, reports) if base] + [root]
    found = []
    table = need_table([root], "MS_CXR_T_temporal_image_classification*.csv")
    for number, cells in read_rows(table, left_out, _COLUMNS):
        views = {
            view: there(*(below(base, f"{cells[column]}.{kind}") for base in bases for kind in ("jpg", "dcm", "png")))
            for view, column in ((FRONTAL, "dicom_id"), (f"prior_{FRONTAL}", "previous_dicom_id"))
            if cells[column]
        }
        progressions = []
        for finding in FINDINGS:
            progression = cells[f"{finding}_progression"].lower()
            if progression in PROGRESSIONS:
                progressions.append((finding.replace("_", " "), progression))
            elif progression:
                left_out.append(LeftOut(number, f"{finding}_progression", "progression unknown"))
        if len(views) < 2 or None in views.values():
            left_out.append(LeftOut(number, "study", "not a pair of films"))
        elif not progressions:
            left_out.append(LeftOut(number, "study", "no progression"))
        else:
            study = f"{cells['study_id']}/{Path(cells['dicom_id']).name}"
            labels = tuple(finding for finding, _ in progressions)
            given = {"labels": labels, "progressions": tuple(progressions)}
            found.append(Record(number, study, cells["subject_id"], "test", views, None, **given))
    return found
