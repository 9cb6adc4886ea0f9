"""Open-i, Indiana University's chest films: reports as XML, images as PNG.

    ROOT/ecgen-radiology/*.xml     or ROOT/*.xml, or below REPORTS (--reports)
    ROOT/CXR*.png                  in ROOT or any folder below it
    ROOT/indiana_projections.csv   filename, projection, where it is there: which film is which

Without that table, films are told apart by the number that their names end with, as the scanners counted: the lower of
two is the frontal, but of ...-3001 and ...-4001 the higher. A single film is a frontal, but one that ends with ...-2001
or ...-2002, as a second does, may be either: it is set aside, as a third is.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from xml.etree import ElementTree

from ...errors import DataError
from ..files import read_file
from ..shards import LeftOut
from .record import FRONTAL, LATERAL, Record
from .tables import find_table, read_rows

_SECOND = ("2001", "2002")
_SECTIONS = ("FINDINGS", "IMPRESSION")
_MOST = 4 << 20  # bytes of a report's file


def find_studies(root: Path, reports: Path | None, left_out: list[LeftOut]) -> list[Record]:
    """Open-i, Indiana University's chest films: reports as XML, films as PNG."""
    files = next((found for folder in (reports, root) if folder and (found := _xml_files(folder))), [])
    if not files:
        raise DataError(f"{reports or root} holds no report (*.xml): pass the folder with ecgen-radiology in it.")
    where = {
        name[:-4].removesuffix(".dcm"): Path(folder) / name
        for folder, _, names in os.walk(root)
        for name in names
        if name[-4:] == ".png"
    }
    views_of = _projections(root)
    found = []
    for number, path in enumerate(files, start=1):
        try:
            report, labels, images = read_report(path)
        except (OSError, ValueError, LookupError, ElementTree.ParseError):
            left_out.append(LeftOut(number, "study", "report is damaged"))
            continue
        views: dict[str, Path] = {}
        spare: dict[str, list[Path]] = {}
        for image, view in _views(images, views_of).items():
            path_of = next((where[name] for name in _names(image) if name in where), root / f"{image}.png")
            if view is None or view in views:
                reason = "view position unknown" if view is None else f"another {view} film of the study"
                left_out.append(LeftOut(number, "image", reason))
                if view is not None:
                    spare.setdefault(view, []).append(path_of)
            else:
                views[view] = path_of
        if views:
            found.append(Record(number, path.stem, path.stem, "", views, report, labels, spare=spare))
        else:
            left_out.append(LeftOut(number, "study", "no current view"))
    return found


def _xml_files(folder: Path) -> list[Path]:
    found = [*folder.glob("ecgen-radiology/*.xml")] or [*folder.glob("*.xml")]
    return sorted(found, key=lambda path: (len(path.stem), path.stem))


def read_report(path: Path) -> tuple[str, tuple[str, ...], list[str]]:
    """The text, MeSH terms and image names in an XML file of Open-i.

    Raises:
        OSError, ValueError, LookupError (an unknown encoding), ElementTree.ParseError: if it is none.
    """
    content = read_file(path, _MOST)
    if b"<!ENTITY" in content:  # no bombs
        raise ValueError("no report")
    tree = ElementTree.fromstring(content)
    texts = {e.get("Label", "").upper(): "".join(e.itertext()).strip() for e in tree.iter("AbstractText")}
    report = "\n\n".join(f"{name}: {texts[name]}" for name in _SECTIONS if texts.get(name))
    terms = dict.fromkeys((e.text or "").split("/")[0].strip().lower() for e in tree.iter("major"))
    labels = tuple("no finding" if term == "normal" else term for term in terms if term)
    images = [e.get("id", "") for e in tree.iter("parentImage")]
    return report, labels, [image for image in dict.fromkeys(images) if re.fullmatch(r"[\w.-]+", image)]


def _names(image: str) -> tuple[str, ...]:
    """How the film of an image id is called: Open-i's own name, and Kaggle's, which has lost what comes first."""
    return image, image.removeprefix("CXR"), image.partition("_")[2]


def _projections(root: Path) -> dict[str, str]:
    table = find_table([root], "indiana_projections.csv")
    rows = read_rows(table, [], ("filename", "projection")) if table else ()
    return {re.sub(r"(\.dcm)?\.png$", "", cells["filename"]): cells["projection"].lower() for _, cells in rows}


def _views(images: list[str], known: dict[str, str]) -> dict[str, str | None]:
    """frontal, lateral or None for each image."""
    said = {image: next((known[name] for name in _names(image) if name in known), "") for image in images}
    if any(said.values()):
        return {image: {"frontal": FRONTAL, "lateral": LATERAL}.get(view) for image, view in said.items()}
    ends = {image: image.rpartition("-")[2] for image in images}
    if len(images) == 1 and ends[images[0]] in _SECOND:
        return {images[0]: None}
    numbered = sorted(images, key=lambda image: (ends[image].zfill(9), image))
    if [ends[image] for image in numbered] == ["3001", "4001"]:
        numbered.reverse()
    return dict.fromkeys(images) | dict(zip(numbered, (FRONTAL, LATERAL), strict=False))
