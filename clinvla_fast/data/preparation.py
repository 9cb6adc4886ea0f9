"""From a source's records to shards: reports cleaned, films read, what cannot be used set aside."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from ..errors import DataError
from .files import FileTooLarge, read_file
from .radiographs import Reading, UnreadableImage, read_radiograph
from .reports import Steps, clean_report
from .shards import VIEWS, Format, LeftOut, Study, write_shards
from .sources import SOURCES
from .sources.record import Record, in_splits

CURRENT = VIEWS[:2]
_LONGEST = 20_000  # characters of a report; some steps of cleaning take the square of it
_REMEMBERED = 8  # films: a study's are the next one's priors


@dataclass(frozen=True)
class Preparation:
    """How studies are prepared.

    short_side: pixels of the short side of every stored film; image_format: of the stored files; steps: of reports.
    """

    short_side: int = 256
    image_format: Format = "jpg"
    reading: Reading = field(default_factory=Reading)
    steps: Steps = field(default_factory=Steps)


def find(source: str, root: Path, reports: Path | None) -> tuple[dict[str, list[Record]], list[LeftOut]]:
    """The records of a source by split, nothing of them read, and what was set aside.

    Raises:
        DataError: if the source's tables cannot be used.
    """
    left_out: list[LeftOut] = []
    found = SOURCES[source](root.absolute(), reports and reports.absolute(), left_out)
    return in_splits(found, left_out), left_out


def prepare(
    source: str,
    records: dict[str, list[Record]],
    left_out: list[LeftOut],
    out: Path,
    preparation: Preparation,
    workers: int | None = None,
    progress: Callable[[int, int], None] = lambda done, studies: None,
) -> dict:
    """Write what `find` found as shards under `out`; return the manifest. Arguments and errors as `write_shards`."""
    return write_shards(
        records,
        partial(make_study, preparation),
        out,
        source=source,
        settings=asdict(preparation),
        left_out=left_out,
        image_format=preparation.image_format,
        workers=workers,
        progress=progress,
    )


def make_study(preparation: Preparation, record: Record) -> Iterator[Study | LeftOut]:
    """The study of a record, and the views that it goes without; or why there is none."""
    report, reason = read_report(record.report)
    if not reason and record.report is not None:
        report = clean_report(report, preparation.steps)
        reason = "" if report else "empty report"
    if reason:
        yield LeftOut(record.row, "study", reason)
        return
    # A box is a place in the whole film.
    reading = replace(preparation.reading, crop_borders=False) if record.boxes else preparation.reading
    found: dict[str, np.ndarray | str] = {}
    for view, path in record.views.items():
        paths = (path, *record.spare.get(view, ()))
        found[view], passed_over = _first_usable(paths, preparation.short_side, reading)
        yield from (LeftOut(record.row, "image", reason) for reason in passed_over)
    images = {view: film for view, film in found.items() if isinstance(film, np.ndarray)}
    missing = [LeftOut(record.row, view, film) for view, film in found.items() if view not in images]
    if any(view in found for view in CURRENT) and not any(view in images for view in CURRENT):
        yield LeftOut(record.row, "study", next(one.reason for one in missing if one.what in CURRENT))
        return
    yield from missing
    labelled = (record.labels, record.boxes, record.progressions)
    yield Study(record.study_id, record.patient_id, record.split, report, images, *labelled)


def read_report(report: str | Path | None) -> tuple[str, str]:
    """A record's report, and why it cannot be read."""
    try:
        if isinstance(report, Path):
            report = read_file(report, 4 * _LONGEST).decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except FileNotFoundError:
        return "", "report is missing"
    except FileTooLarge:
        return "", "report is too long"
    except (OSError, ValueError):
        return "", "report cannot be read"
    report = report or ""
    return (report, "") if len(report) <= _LONGEST else ("", "report is too long")


def _first_usable(paths: Iterable[Path], short_side: int, reading: Reading) -> tuple[np.ndarray | str, list[str]]:
    """The first film that can be used, and why those before it cannot; or why the first cannot."""
    reasons: list[str] = []
    for path in paths:
        if isinstance(film := _film(path, short_side, reading), np.ndarray):
            return film, reasons
        reasons.append(film)
    return reasons[0], []


@lru_cache(_REMEMBERED)
def _film(path: Path, short_side: int, reading: Reading) -> np.ndarray | str:
    """The film, or why it cannot be used."""
    try:
        return read_radiograph(path, short_side, reading)
    except UnreadableImage as error:
        return error.reason
    except DataError:  # of the machine: a package that is missing
        raise
    except Exception as error:  # of one film among 300,000: a library's own, or too little memory for it
        return f"file cannot be used ({type(error).__name__})"
