"""Where studies come from: a file a data set, each with one function that finds its studies.

    find_studies(root, reports, left_out) -> list[Record]

root: the folder that the data set came in (for `csv` the table itself); reports: where its reports are, if elsewhere;
left_out: what is set aside joins it. Only tables and names are read: images and report files are read later, by many
processes. Raises DataError if a table cannot be used.
"""

from collections.abc import Callable
from pathlib import Path

from ..shards import LeftOut
from . import chexpert, mimic_cxr, ms_cxr_t, nih, open_i, rsna, table
from .record import Record

SOURCES: dict[str, Callable[[Path, Path | None, list[LeftOut]], list[Record]]] = {
    "mimic-cxr": mimic_cxr.find_studies,
    "chexpert": chexpert.find_studies,
    "chexpert-plus": chexpert.find_plus_studies,
    "chexpert-5x200": chexpert.find_5x200_studies,
    "chexpert-8x200": chexpert.find_8x200_studies,
    "rsna": rsna.find_studies,
    "nih": nih.find_studies,
    "ms-cxr-t": ms_cxr_t.find_studies,
    "open-i": open_i.find_studies,
    "csv": table.find_studies,
}
