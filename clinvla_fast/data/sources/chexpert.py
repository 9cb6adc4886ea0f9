"""CheXpert, CheXpert Plus, and the retrieval sets made of CheXpert: 5x200 and 8x200.

    ROOT/train.csv, valid.csv, test.csv                     CheXpert: Path starts with CheXpert-v1.0[-small]/
    ROOT/df_chexpert_plus_240401.csv                        CheXpert Plus: images below ROOT, ROOT/PNG or ROOT/DICOM
    ROOT/*.csv with Path and Report Impression              CheXpert 5x200
    ROOT/{image,text}-retrieval/{query,candidate}.csv       CheXpert 8x200

Images are looked for below ROOT, with and without the first part of their path.
"""

from __future__ import annotations

import re
from collections import defaultdict
from itertools import count
from pathlib import Path

from ...errors import DataError
from ..shards import LeftOut
from .record import FRONTAL, LATERAL, Record, with_priors
from .tables import below, find_table, need_table, positives, read_rows, there

FINDINGS = (
    "No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema", "Consolidation",
    "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture", "Support Devices",
)  # fmt: skip
_OF_5X200 = ("Cardiomegaly", "Edema", "Consolidation", "Atelectasis", "Pleural Effusion")
_OF_8X200 = (
    "No Finding", "Cardiomegaly", "Edema", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Fracture",
)  # fmt: skip
_NO_PATH = "path is none of CheXpert's"
_VIEWS = {"frontal": FRONTAL, "lateral": LATERAL}
_PATH = re.compile(
    r"(?P<patient>patient\d+)/(?P<study>study(?P<number>\d{1,9}))/(?P<film>view\d+_(?P<view>frontal|lateral))\.\w+$"
)


def find_studies(root: Path, reports: Path | None, left_out: list[LeftOut]) -> list[Record]:
    """CheXpert: images and labels, without reports."""
    tables = {split: find_table([root], f"{split}.csv") for split in ("train", "valid", "test")}
    if not any(tables.values()):
        need_table([root], "train.csv", "valid.csv")
    films: dict[tuple[str, str], list[_Film]] = defaultdict(list)
    numbers = count(1)  # rows are numbered through all tables
    for split, table in tables.items():
        columns = ("Path", "Frontal/Lateral", *FINDINGS)
        for row, cells in read_rows(table, left_out, columns, what="image", numbers=numbers) if table else ():
            if film := _film(root, row, cells, cells["Path"], cells["Frontal/Lateral"]):
                films[film.patient, film.study].append(film)
                film.split = {"valid": "validate"}.get(split, split)
            else:
                left_out.append(LeftOut(row, "image", _NO_PATH))
    return with_priors(_record(of_study, None, left_out) for of_study in films.values())


def find_plus_studies(root: Path, reports: Path | None, left_out: list[LeftOut]) -> list[Record]:
    """CheXpert Plus: images and reports, ordered by patient_report_date_order."""
    columns = ("path_to_image", "frontal_lateral", "deid_patient_id", "patient_report_date_order", "split", "report")
    films: dict[tuple[str, str], list[_Film]] = defaultdict(list)
    for row, cells in read_rows(need_table([root], "df_chexpert_plus_*.csv"), left_out, columns, what="image"):
        film = _film(root, row, cells, cells["path_to_image"], cells["frontal_lateral"], cells.get("path_to_dcm"))
        if film is None:
            left_out.append(LeftOut(row, "image", _NO_PATH))
            continue
        film.patient = cells["deid_patient_id"]
        film.split = {"valid": "validate"}.get(cells["split"], cells["split"])
        order = cells["patient_report_date_order"]
        film.when = (float(order),) if order.replace(".", "", 1).isdecimal() and len(order) < 20 else None
        films[film.patient, film.study].append(film)
    return with_priors(_record(of_study, _plus_report(of_study[0].cells), left_out) for of_study in films.values())


def find_5x200_studies(root: Path, reports: Path | None, left_out: list[LeftOut]) -> list[Record]:
    """CheXpert 5x200: an image, an impression and one of five classes a row."""
    table = root if root.is_file() else need_table([root], "*5x200*.csv", "*.csv")
    folder = root.parent if root.is_file() else root
    found = []
    for row, cells in read_rows(table, left_out, ("Path", "Report Impression", *_OF_5X200)):
        if film := _film(folder, row, cells, cells["Path"], cells.get("Frontal/Lateral", "")):
            report, labels = f"IMPRESSION: {cells['Report Impression']}", positives(cells, FINDINGS)
            found.append(Record(row, film.name, film.patient, "test", {film.view: film.path}, report, labels))
        else:
            left_out.append(LeftOut(row, "study", _NO_PATH))
    return found


def find_8x200_studies(root: Path, reports: Path | None, left_out: list[LeftOut]) -> list[Record]:
    """CheXpert 8x200: queries and candidates, told apart by their study_id (image-retrieval/query/12).

    A textual query is a study without a view.
    """
    found, numbers = [], count(1)
    for kind in ("image-retrieval", "text-retrieval"):
        for role in ("query", "candidate"):
            table = find_table([root / kind], f"{role}.csv")
            if table is None:
                raise DataError(f"{root / kind} holds no {role}.csv: pass the folder with both retrieval sets.")
            columns = (("Variable",), ("Path", "Text")) if role == "query" else (("Path", *_OF_8X200), ())
            for row, cells in read_rows(table, left_out, *columns, numbers=numbers):
                study = f"{kind}/{role}/{row}"
                labels = (cells["Variable"].lower(),) if role == "query" else positives(cells, FINDINGS)
                if "Path" not in cells:
                    found.append(Record(row, study, study, "test", {}, cells["Text"], labels))
                elif film := _film(root, row, cells, cells["Path"], cells.get("Frontal/Lateral", "")):
                    found.append(Record(row, study, film.patient, "test", {film.view: film.path}, None, labels))
                else:
                    left_out.append(LeftOut(row, "study", _NO_PATH))
    return found


class _Film:
    """An image of a table: where it is, and of whom."""

    def __init__(self, row: int, cells: dict[str, str], path: Path, view: str, match: re.Match):
        self.row, self.cells, self.path, self.view = row, cells, path, view
        self.patient, self.study = match["patient"], f"{match['patient']}/{match['study']}"
        self.name = f"{self.study}/{match['film']}"
        self.when, self.split = (int(match["number"]),), ""


def _film(root: Path, row: int, cells: dict, name: str, view: str, dicom: str | None = None) -> _Film | None:
    """The film that a row's path names; `view` is what the row says, else the path does."""
    match = _PATH.search(name)
    if match is None or below(root, name) is None:
        return None
    short = name.partition("/")[2]
    candidates = [below(base, n) for base in (root, root.parent) for n in (name, short)]
    candidates += [below(root / "PNG", str(Path(n).with_suffix(".png"))) for n in (name, short)]
    candidates += [below(root / base, dicom) for base in ("", "DICOM") if dicom]
    return _Film(row, cells, there(*candidates), _VIEWS.get(view.lower()) or match["view"], match)


def _record(films: list[_Film], report: str | None, left_out: list[LeftOut]) -> Record:
    views: dict[str, Path] = {}
    spare: dict[str, list[Path]] = {}
    for film in films:
        if film.view in views:
            left_out.append(LeftOut(film.row, "image", f"another {film.view} film of the study"))
            spare.setdefault(film.view, []).append(film.path)
        views.setdefault(film.view, film.path)
    first = films[0]
    labels = positives(first.cells, FINDINGS)
    return Record(first.row, first.study, first.patient, first.split, views, report, labels, first.when, spare=spare)


def _plus_report(cells: dict[str, str]) -> str:
    parts = [
        f"{name.upper()}: {cells[key]}" for name in ("findings", "impression") if cells.get(key := f"section_{name}")
    ]
    return "\n\n".join(parts) or cells["report"]
