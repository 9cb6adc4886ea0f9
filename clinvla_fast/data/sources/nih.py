"""NIH ChestX-ray14: frontal films with labels and follow-ups, without reports.

ROOT/Data_Entry_2017.csv (or _v2020)              an image a row
ROOT/train_val_list.txt, test_list.txt            the official split
ROOT/images/*.png, or ROOT/images_001/images/*.png and so on
"""

from __future__ import annotations

import os
from pathlib import Path

from ...errors import DataError
from ..shards import LeftOut
from .record import FRONTAL, Record, hashed_split, with_priors
from .tables import below, need_table, read_rows

_COLUMNS = ("Image Index", "Finding Labels", "Follow-up #", "Patient ID")


def find_studies(root: Path, reports: Path | None, left_out: list[LeftOut]) -> list[Record]:
    """NIH ChestX-ray14: labels and follow-ups, without reports."""
    table = need_table([root], "Data_Entry_2017*.csv")
    tested, others = (_names(root / name) for name in ("test_list.txt", "train_val_list.txt"))
    where: dict[str, Path] = {}
    for folder in (root / "images", *sorted(root.glob("images_*/images")), *sorted(root.glob("images_*")), root):
        names = os.listdir(folder) if folder.is_dir() else ()
        where |= {name: folder / name for name in names if name.endswith(".png") and name not in where}
    found, seen = [], set()
    for number, cells in read_rows(table, left_out, _COLUMNS):
        name, patient, order = cells["Image Index"], cells["Patient ID"], cells["Follow-up #"]
        if below(root, name) is None or "/" in name or name in seen:
            reason = "duplicate study_id" if name in seen else "Image Index is no file name"
            left_out.append(LeftOut(number, "study", reason))
            continue
        seen.add(name)
        split = ""
        if name in tested or (others and not tested and name not in others):
            split = "test"
        elif name in others or not others:
            split = hashed_split(patient, (0.9, 0.1) if tested or others else (0.8, 0.1))
        if not split:
            left_out.append(LeftOut(number, "study", "in neither list of the split"))
            continue
        labels = tuple(label.strip().lower() for label in cells["Finding Labels"].split("|") if label.strip())
        when = (int(order),) if order.isdecimal() and len(order) < 10 else None
        views = {FRONTAL: where.get(name, root / "images" / name)}
        found.append(Record(number, name.removesuffix(".png"), patient, split, views, None, labels, when))
    return with_priors(found)


def _names(path: Path) -> set[str]:
    try:
        return set(path.read_text().split())
    except FileNotFoundError:
        return set()
    except ValueError:
        raise DataError(f"{path} is not UTF-8 text: expected one file name a line.") from None
