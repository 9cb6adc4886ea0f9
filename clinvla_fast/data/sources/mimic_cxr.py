"""MIMIC-CXR (DICOM) and MIMIC-CXR-JPG, 2.0.0 and 2.1.0, with the reports of MIMIC-CXR.

ROOT/mimic-cxr-2.0.0-metadata.csv.gz    views and times; -split and -chexpert beside it
ROOT/files/p10/p10000032/s50414267/<dicom_id>.jpg, or .dcm
REPORTS/mimic_cxr_sectioned.csv         or REPORTS/files/p10/p10000032/s50414267.txt; by default in ROOT
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from ...errors import DataError
from ..shards import LeftOut
from .chexpert import FINDINGS
from .record import FRONTAL, LATERAL, Record, with_priors
from .tables import find_table, need_table, positives, read_rows, there

_VIEWS = {"PA": FRONTAL, "AP": FRONTAL, "LATERAL": LATERAL, "LL": LATERAL}
_FIRST = ("PA", "LATERAL", "AP", "LL")  # of several films of one view
_COLUMNS = ("dicom_id", "subject_id", "study_id", "ViewPosition", "StudyDate", "StudyTime")


def find_studies(root: Path, reports: Path | None, left_out: list[LeftOut]) -> list[Record]:
    """MIMIC-CXR-JPG or MIMIC-CXR (DICOM), with the sectioned reports or the texts, in one root or two."""
    folders = [root, *([reports] if reports else [])]
    metadata = need_table(folders, "mimic-cxr-*-metadata.csv")  # MIMIC-CXR-JPG's; DICOM lie in the same folders
    splits = _splits(folders, left_out)
    labels = _labels(folders, left_out)
    report_of = _report_finder([*folders[1:], root], left_out)
    films: dict[tuple[str, str], list[_Film]] = defaultdict(list)
    dicom_ids: set[str] = set()
    lost: dict[tuple[str, str], int] = {}
    for number, cells in read_rows(metadata, left_out, _COLUMNS, what="image"):
        key = cells["subject_id"], cells["study_id"]
        if reason := _unusable(cells, dicom_ids):
            left_out.append(LeftOut(number, "image", reason))
            lost.setdefault(key, number)
            continue
        dicom_ids.add(cells["dicom_id"])
        films[key].append(_Film(_preference(cells), cells["dicom_id"], number, _view(cells), _when(cells)))
    left_out += [LeftOut(number, "study", "no usable film") for key, number in lost.items() if key not in films]
    records = []
    for (subject, study), of_study in films.items():
        views: dict[str, Path] = {}
        spare: dict[str, list[Path]] = {}
        folder = root / "files" / f"p{subject[:2]}" / f"p{subject}" / f"s{study}"
        row = of_study[0].row
        for film in sorted(of_study):
            if film.view is None:
                left_out.append(LeftOut(film.row, "image", "view position unknown"))
                continue
            path = there(*(folder / f"{film.dicom_id}.{suffix}" for suffix in ("jpg", "dcm", "png")))
            if film.view in views:
                left_out.append(LeftOut(film.row, "image", f"another {film.view} film of the study"))
                spare.setdefault(film.view, []).append(path)
            else:
                views[film.view] = path
        if not views:
            left_out.append(LeftOut(row, "study", "no current view"))
            continue
        if splits is not None and study not in splits:
            left_out.append(LeftOut(row, "study", "not in the split table"))
            continue
        split, report = splits[study] if splits else "", report_of(subject, study)
        records.append(
            Record(row, study, subject, split, views, report, labels.get(study, ()), _first(of_study), spare=spare)
        )
    return with_priors(records)


class _Film(NamedTuple):
    """A row of the metadata. The first of several films of one view is the one that sorts first."""

    preference: int
    dicom_id: str
    row: int
    view: str | None
    when: tuple[str] | tuple[str, float] | None


def _first(films: list[_Film]) -> tuple[str] | tuple[str, float] | None:
    """When the first film of a study was taken, to the second where that is known of one."""
    known = [film.when for film in films if film.when]
    return min(known, key=lambda when: (when[0], len(when) == 1, when), default=None)


def _unusable(cells: dict[str, str], known: set[str]) -> str:
    """Why a film cannot be looked for."""
    if cells["dicom_id"] in known:
        return "duplicate dicom_id"
    if not (cells["subject_id"].isdecimal() and cells["study_id"].isdecimal()):
        return "subject_id or study_id is no number"
    plain = cells["dicom_id"].replace("-", "").replace(".", "").replace("_", "").isalnum()
    return "" if plain else "dicom_id is no file name"


def _view(cells: dict[str, str]) -> str | None:
    """frontal or lateral: by ViewPosition; where it is blank, by the codes of the view, then of the procedure."""
    position = cells["ViewPosition"].upper()
    if position:
        return _VIEWS.get(position)
    code = cells.get("ViewCodeSequence_CodeMeaning", "").lower()
    if "antero-posterior" in code or "postero-anterior" in code:
        return FRONTAL
    if code in ("lateral", "left lateral", "right lateral"):
        return LATERAL
    if code:
        return None
    names = ("PerformedProcedureStepDescription", "ProcedureCodeSequence_CodeMeaning")
    procedure = next((cells[name].upper() for name in names if cells.get(name)), "")
    if "CHEST" not in procedure and "CXR" not in procedure:
        return None
    one_view = not any(word in procedure for word in ("LAT", "TWO", "2 VIEW", "&", "AND "))
    return FRONTAL if one_view and any(word in procedure for word in ("PORTABLE AP", "AP PORT", "(AP)")) else None


def _preference(cells: dict[str, str]) -> int:
    position = cells["ViewPosition"].upper()
    return _FIRST.index(position) if position in _FIRST else len(_FIRST)


def _when(cells: dict[str, str]) -> tuple[str] | tuple[str, float] | None:
    """StudyDate, and where there is one the seconds of StudyTime: HHMMSS.frac, its leading zeros perhaps lost with the
    quotes."""
    whole, _, fraction = cells["StudyTime"].partition(".")
    if not cells["StudyDate"].isdecimal():
        return None
    if not (whole.isdecimal() and len(whole) <= 6):
        return (cells["StudyDate"],)
    hours, minutes, seconds = (int(whole.zfill(6)[i : i + 2]) for i in (0, 2, 4))
    return cells["StudyDate"], 3600 * hours + 60 * minutes + seconds + (
        float(f"0.{fraction}") if fraction.isdecimal() else 0
    )


def _splits(folders: list[Path], left_out: list[LeftOut]) -> dict[str, str] | None:
    table = find_table(folders, "mimic-cxr-*-split.csv")
    rows = read_rows(table, left_out, ("study_id", "split"), what="split") if table else ()
    return {cells["study_id"]: cells["split"] for _, cells in rows} if table else None


def _labels(folders: list[Path], left_out: list[LeftOut]) -> dict[str, tuple[str, ...]]:
    table = find_table(folders, "mimic-cxr-*-chexpert.csv")
    rows = read_rows(table, left_out, ("study_id", *FINDINGS), what="labels") if table else ()
    return {cells["study_id"]: positives(cells, FINDINGS) for _, cells in rows}


def _report_finder(folders: list[Path], left_out: list[LeftOut]):
    """A function of subject and study: the report's text or file; "" where the sectioned table has none.

    Raises:
        DataError: if there are neither a sectioned table nor text files.
    """
    table = find_table(folders, "mimic_cxr_sectioned.csv", "mimic-cxr-*-sectioned.csv")
    if table:
        columns = ("study", "impression", "findings", "last_paragraph")
        texts = {
            cells["study"].removeprefix("s"): cells for _, cells in read_rows(table, left_out, columns, what="report")
        }
        return lambda subject, study: _sectioned(texts.get(study, {}))
    for folder in folders:
        texts = folder / "files"
        if next(texts.glob("p*/p*/s*.txt"), None):
            return lambda subject, study: texts / f"p{subject[:2]}" / f"p{subject}" / f"s{study}.txt"
    raise DataError(
        f"{folders[0]} holds no mimic_cxr_sectioned.csv and no files/p*/p*/s*.txt: pass --reports with MIMIC-CXR's "
        "folder of reports."
    )


def _sectioned(cells: dict[str, str]) -> str:
    parts = [f"{name.upper()}: {cells[name]}" for name in ("findings", "impression") if cells.get(name)]
    return "\n\n".join(parts) or cells.get("last_paragraph", "")
