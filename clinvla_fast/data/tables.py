"""Studies from a CSV table of image paths and reports."""

import csv
import difflib
import gzip
import hashlib
import multiprocessing
import signal
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from itertools import islice
from os import cpu_count
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import DataError
from .radiographs import UnreadableImage, read_radiograph
from .reports import clean_report
from .shards import VIEWS, Study

_CURRENT = VIEWS[:2]
_REQUIRED = ("study_id", "patient_id", "report")
_SPLITS = {"train": "train", "validate": "validate", "valid": "validate", "val": "validate", "test": "test"}


class LeftOut(NamedTuple):
    """Something of a table that was set aside. Row 1 is the first below the header."""

    row: int
    what: str  # "study", or the view that its study goes without
    reason: str


@dataclass(frozen=True)
class _Row:
    number: int
    paths: dict[str, str]
    study: Study  # its images still to be read


def studies_from_csv(
    path: str | Path,
    *,
    short_side: int = 256,
    dropped: Counter[str],
    left_out: list[LeftOut] | None = None,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Study]:
    """The usable studies of a table, in its order, with images read by `workers` processes and reports cleaned.

    The table is UTF-8 `.csv` or `.csv.gz` with the columns study_id, patient_id, report and frontal or lateral, and, if
    wanted, prior_frontal, prior_lateral, split and labels ("edema|pleural effusion"). Image paths are absolute or
    relative to the table's folder; blank means absent. A study keeps the views that can be read, as long as one of them
    is current. Where split (train, validate or test) is blank, 80/10/10 is assigned by a hash of patient_id. A patient
    belongs to the split of the first row that names them.

    Args:
        dropped: counts the studies set aside, by reason.
        left_out: collects every study and every view set aside.
        workers: all cores by default.
        progress: called with (rows done, rows in the table).

    Raises:
        DataError: if the table is missing, damaged, empty or lacks a column, or a worker process dies.
    """
    path = Path(path)
    left_out = [] if left_out is None else left_out
    workers = workers or cpu_count() or 1
    # Read to the end before any image is: a damaged last line should not cost hours first.
    total = sum(1 for _ in _read_table(path))
    if not total:
        raise DataError(f"{path} has a header but no rows.")

    def set_aside(row: int, reason: str) -> None:
        dropped[reason] += 1
        left_out.append(LeftOut(row, "study", reason))

    rows = enumerate(_read_table(path), start=1)
    known = _Known({}, set())
    pending: deque[tuple[int, _Row | str, Future | None]] = deque()
    # Forked workers start at once; any other kind would import torch first.
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(workers, context, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN))
    try:
        while True:
            # A bounded number in flight keeps memory flat.
            for number, cells in islice(rows, 4 * workers - len(pending)):
                row = _check(number, cells, path.parent, known)
                future = pool.submit(_read_views, row.paths, short_side) if isinstance(row, _Row) else None
                pending.append((number, row, future))
            if not pending:
                break
            number, row, future = pending.popleft()
            if isinstance(row, str):
                set_aside(number, row)
            else:
                images, failures = future.result()
                if any(view in images for view in _CURRENT):
                    left_out += [LeftOut(number, view, reason) for view, reason in failures.items()]
                    yield replace(row.study, images=images)
                else:
                    set_aside(number, next(failures[view] for view in _CURRENT if view in failures))
            if progress:
                progress(number, total)
    except BrokenProcessPool:
        raise DataError(
            f"{path}: a process reading the images of row {number} or one soon after it died, "
            "perhaps for lack of memory: use fewer --workers."
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


@dataclass
class _Known:
    """What earlier rows said."""

    splits: dict[str, str]
    studies: set[str]


def _check(number: int, cells: dict, folder: Path, known: _Known) -> _Row | str:
    """The row with its images still unread, or why it is set aside."""
    if None in cells or None in cells.values():
        return "wrong number of columns"
    cells = {name: cell.strip() for name, cell in cells.items()}
    study_id, patient_id = cells["study_id"], cells["patient_id"]
    if not study_id:
        return "blank study_id"
    if not patient_id:
        return "blank patient_id"
    if study_id in known.studies:
        return "duplicate study_id"
    split = cells.get("split", "").lower()
    if split and split not in _SPLITS:
        return "unknown split"
    split = _SPLITS[split] if split else known.splits.get(patient_id) or _hashed_split(patient_id)
    if known.splits.get(patient_id, split) != split:
        return "patient in another split"
    paths = {view: str(folder / cells[view]) for view in VIEWS if cells.get(view)}
    if not any(view in paths for view in _CURRENT):
        return "no current view"
    report = clean_report(cells["report"])
    if not report:
        return "empty report"
    known.studies.add(study_id)
    known.splits[patient_id] = split
    labels = tuple(label.strip() for label in cells.get("labels", "").split("|") if label.strip())
    return _Row(number, paths, Study(study_id, patient_id, split, report, {}, labels))


def _hashed_split(patient_id: str) -> str:
    share = int.from_bytes(hashlib.sha256(patient_id.encode()).digest()[:8], "big") / 2**64
    return "train" if share < 0.8 else "validate" if share < 0.9 else "test"


def _read_views(paths: dict[str, str], short_side: int) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The images that can be read, and the reasons of those that cannot, by view."""
    images, failures = {}, {}
    for view, path in paths.items():
        try:
            images[view] = read_radiograph(path, short_side)
        except UnreadableImage as error:
            failures[view] = error.reason
    return images, failures


def _read_table(path: Path) -> Iterator[dict]:
    """The rows as csv.DictReader gives them, once the header is known to have the columns."""
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
            _check_columns(path, reader.fieldnames)
            yield from reader
    except FileNotFoundError:
        raise DataError(f"{path}: no such table, expected a .csv or .csv.gz file.") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error.reason}): save it as UTF-8.") from None
    except csv.Error as error:
        raise DataError(f"{path} is not valid CSV after line {reader.line_num} ({error}).") from None
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise DataError(f"{path} is not a whole gzip file.") from None


def _check_columns(path: Path, found: list[str]) -> None:
    if not found:
        raise DataError(f"{path} is empty, expected a header with {', '.join(_REQUIRED)}, {' or '.join(_CURRENT)}.")
    missing = [name for name in _REQUIRED if name not in found]
    if not any(view in found for view in _CURRENT):
        missing.append(_CURRENT[0])
    if missing:
        near = [(name, difflib.get_close_matches(name, found, n=1)) for name in missing]
        hints = "".join(f" Is {match[0]!r} meant to be {name!r}?" for name, match in near if match)
        raise DataError(f"{path} lacks the column {', '.join(missing)}; found {', '.join(found)}.{hints}")
    if len(set(found)) < len(found):
        raise DataError(f"{path} has the column {Counter(found).most_common(1)[0][0]!r} twice.")
