"""Studies on disk: webdataset tar shards, one folder a data set, with DALI indexes and a manifest.

    DIR/manifest.json              counts, settings, versions, a SHA-256 per shard
    DIR/dropped.csv                what was set aside, with the reason
    DIR/{split}-000000.tar         one sample a study: KEY.json and KEY.{view}.jpg (or .png) for each present view
    DIR/{split}-000000.idx         byte offsets of the samples, for DALI's webdataset reader

The JSON holds study_id, patient_id, report, labels, and where a study has them boxes (a list of objects with the fields
of Box) and progressions (a list of [finding, course]). A view that a study lacks has no file.
"""

import csv
import errno
import fcntl
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import tarfile
from collections import Counter, deque
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.context import ForkContext
from multiprocessing.sharedctypes import Synchronized, SynchronizedArray
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import numpy as np
import webdataset
from PIL import Image
from wds2idx import IndexCreator

from ..errors import DataError
from ..study import VIEWS
from ..versions import versions
from .workers import obey_parent

SPLITS = ("train", "validate", "test")
PROGRESSIONS = ("improving", "stable", "worsening")
_FORMAT = 1
_FEW, _MANY = (
    64,
    1024,
)  # items of a source that make a shard: enough shards for every core, large ones for object stores
_SUFFIXES = (".jpg", ".png")
# Packages that decide the bytes of a shard; some may be missing.
_MAKERS = (
    *("clinvla-fast", "numpy", "pillow", "webdataset", "pydicom", "imagecodecs", "pylibjpeg"),
    *("pylibjpeg-openjpeg", "pylibjpeg-rle", "rapidocr-onnxruntime", "onnxruntime", "opencv-python"),
)


class Box(NamedTuple):
    """Where one view shows what a label names: shares of the image's sides."""

    label: str
    view: str
    left: float
    top: float
    width: float
    height: float


@dataclass(frozen=True)
class Study:
    """One study: up to four radiographs (uint8 [H, W], keyed by a name of VIEWS) with its report, which may be "".

    boxes: of some of the labels; several of one label in one view are parts of it.
    progressions: findings and the course that each took since the prior study, of PROGRESSIONS.
    """

    study_id: str
    patient_id: str
    split: str
    report: str
    images: dict[str, np.ndarray]
    labels: tuple[str, ...] = field(default=())
    boxes: tuple[Box, ...] = field(default=())
    progressions: tuple[tuple[str, str], ...] = field(default=())


class LeftOut(NamedTuple):
    """Something of a source that was set aside. Row 1 is the first of its table."""

    row: int
    what: str  # "study", or the view that its study goes without
    reason: str


Item = TypeVar("Item")
Make = Callable[[Item], Iterable[Study | LeftOut]]
Format = Literal["jpg", "png"]


def empty_or_absent(out: Path) -> Path:
    """`out`, once it is sure that writing there destroys nothing.

    Raises:
        DataError: if `out` exists and is anything but an empty folder.
    """
    if out.exists() and (not out.is_dir() or any(path.name != ".partial" for path in out.iterdir())):
        raise DataError(f"{out} already exists and is not an empty folder: pass another --out, or remove it first.")
    return out


def check_out(out: Path) -> None:
    """Raises DataError unless `out` is free, finished, or was being finished when its process died."""
    if not any((out / folder / "manifest.json").is_file() for folder in ("", ".partial")):
        empty_or_absent(out)


def write_shards(
    items: Mapping[str, Sequence[Item]],
    make: Make,
    out: Path,
    *,
    source: str,
    settings: dict,
    left_out: Sequence[LeftOut] = (),
    image_format: Format = "jpg",
    workers: int | None = None,
    progress: Callable[[int, int], None] = lambda done, items: None,
    items_per_shard: int | None = None,
) -> dict:
    """Write the studies that `make` makes of `items` under `out` and return the manifest.

    The same items give the same bytes, however many workers there are. The folder appears whole or not at all:
    everything is written beside it, in .NAME.partial, and renamed at the end; in a folder that is there already, in
    .partial, and moved up, the manifest last. A shard is there whole or not at all too: killed at any time and called
    again with the same arguments, it goes on after the last whole shards; finished, it does nothing.

    Args:
        items: of each split, in the order in which their studies are stored. A shard is made of some that follow each
            other, by one process; memory stays flat. An item's `row` names it where it has to be set aside.
        make: an item's studies, and what of it is set aside. Runs in forked processes.
        source: where the studies come from ("phantom", "csv").
        settings: what a reader needs to make the same shards again; JSON values.
        left_out: what was set aside before.
        workers: processes; all cores by default.
        progress: called with (items done, items).
        items_per_shard: by default what makes about 64 shards, from 64 to 1,024.

    Raises:
        DataError: if `out` is taken, or being written by another process, or was started with other items or settings;
            a study's split is not its item's; a worker dies; no study is left: then `out` has the manifest and
            dropped.csv alone, and the next call makes it anew.
        OSError: if the disk is full or `out` cannot be written; its filename is `out`.
    """
    named, out = Path(out), Path(out).resolve()
    inside = out.is_dir()  # perhaps a volume of its own, or all that may be written to
    partial = out / ".partial" if inside else out.with_name(f".{out.name}.partial")
    total = sum(map(len, items.values()))
    size = items_per_shard or min(max(-(-total // _FEW), _FEW), _MANY)
    jobs = [
        _Job(f"{split}-{number:06d}", split, of[start : start + size])
        for split, of in items.items()
        for number, start in enumerate(range(0, len(of), size))
    ]
    about = {"format": _FORMAT, "source": source, "settings": settings, "versions": versions(_MAKERS)}
    about["job_sha256"] = _identity(about, jobs, left_out, image_format)
    _forget_what_kept_nothing(out, partial)
    if (out / "manifest.json").is_file() and _manifest(out).get("job_sha256") == about["job_sha256"]:
        shutil.rmtree(out / ".partial", ignore_errors=True)
        return read_manifest(out)  # killed after its last step, perhaps
    if not (partial / "manifest.json").is_file():
        empty_or_absent(named)
    new_parents = [folder for folder in out.parents if not folder.exists()]
    try:
        with _claimed(partial, about["job_sha256"], named):
            try:
                if not (partial / "manifest.json").is_file():
                    _write_all(partial, jobs, make, image_format, workers or os.cpu_count() or 1, progress)
                    _finish(partial, about, jobs, left_out)
                for job in jobs:
                    (partial / f"{job.name}.json").unlink(missing_ok=True)
                _reveal(partial, out, inside)
            except BaseException as error:
                nothing_made = not any((partial / f"{job.name}.json").is_file() for job in jobs)
                if (nothing_made and not (partial / "manifest.json").is_file()) or isinstance(error, _NothingLeft):
                    shutil.rmtree(partial, ignore_errors=True)
                    with suppress(OSError):
                        for folder in new_parents:
                            folder.rmdir()
                raise
    except OSError as error:
        if error.filename is None or str(partial) in str(error.filename):
            error.filename, error.filename2 = str(named), None  # a full disk names no file by itself
        raise
    return read_manifest(out)


def _forget_what_kept_nothing(out: Path, partial: Path) -> None:
    """Remove what is left of a job whose studies were all set aside: there is nothing to lose, and files may have
    turned up. The manifest goes last, so that a call that is killed here can be repeated."""
    if (partial / "manifest.json").is_file() and not _manifest(partial)["counts"]["kept"]:
        if partial.parent == out:  # it was being moved up
            (out / "dropped.csv").unlink(missing_ok=True)
        shutil.rmtree(partial)
    alone = out.is_dir() and {path.name for path in out.iterdir()} <= {*_REASONS, ".partial"}
    if alone and (out / "manifest.json").is_file() and not is_finished(out):
        shutil.rmtree(out / ".partial", ignore_errors=True)
        for name in _REASONS:
            (out / name).unlink(missing_ok=True)


def is_finished(out: Path) -> bool:
    """Whether `out` holds a whole data set, of at least one study.

    Raises:
        DataError: if its manifest cannot be read.
    """
    return (out / "manifest.json").is_file() and bool(_manifest(out)["counts"]["kept"])


_REASONS = "dropped.csv", "manifest.json"


class _NothingLeft(DataError):
    """To go on would end here again."""


@dataclass(frozen=True)
class _Job:
    """A shard to be made."""

    name: str
    split: str
    items: Sequence


_IDENTITY = "job.sha256"


def _identity(about: dict, jobs: list[_Job], left_out: Sequence[LeftOut], image_format: Format) -> str:
    digest = hashlib.sha256(json.dumps([about, image_format, list(left_out)], sort_keys=True).encode())
    for job in jobs:
        digest.update(job.name.encode())
        for item in job.items:
            digest.update(repr(item).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


@contextmanager
def _claimed(partial: Path, identity: str, out: Path) -> Iterator[None]:
    """Within: `partial` is there, is this job's, and no other process writes to it.

    Raises:
        DataError: if another process does, or it was started as another job.
    """
    partial.mkdir(parents=True, exist_ok=True)
    path = partial / _IDENTITY
    with path.open("a+b") as file:
        try:
            # A lock of the process alone: workers that outlive it for a moment do not hold it.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):  # else the file system knows no locks
                raise DataError(f"{out} is being written by another process: wait for it, or stop it.") from None
        file.seek(0)
        known = file.read().decode()
        if (partial / "manifest.json").is_file():
            known = json.loads((partial / "manifest.json").read_text())["job_sha256"]
        if len(known) == len(identity) and known != identity:
            raise DataError(
                f"{partial} was started with other data or settings and cut short: go on with those, or remove it."
            )
        if known != identity:  # new, or killed before it could say what it is
            file.truncate(0)
            file.write(identity.encode())
            file.flush()
        for stale in partial.glob(".*"):
            stale.unlink()
        yield


def _reveal(partial: Path, out: Path, inside: bool) -> None:
    """Make `partial` to `out`, whose manifest comes last."""
    for stale in partial.glob(".*"):
        stale.unlink()
    if inside:
        last = ("manifest.json", _IDENTITY)
        for path in sorted(partial.iterdir(), key=lambda path: path.name in last):
            if path.name != _IDENTITY:
                path.replace(out / path.name)
        shutil.rmtree(partial)
    else:
        (partial / _IDENTITY).unlink()
        partial.rename(out)


def _write(path: Path, content: bytes) -> None:
    """A whole file or none."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_bytes(content)
    beside.replace(path)


class _Stopped(Exception):
    """Another worker failed, or the user gave up."""


@dataclass(frozen=True)
class _Work:
    """What workers are forked with.

    done: items done, shared; at: of each job the item that is being made, or -1, shared; deadly: (job, item) whose
    reading ends the process; stop: whether to give up.
    """

    partial: Path
    jobs: list[_Job]
    make: Make
    image_format: Format
    done: Synchronized
    at: SynchronizedArray
    deadly: set[tuple[int, int]]
    stop: Event


_work: _Work  # in a worker


def _start(parent: int, work: _Work) -> None:
    global _work
    _work = work
    obey_parent(parent)


def _write_all(
    partial: Path, jobs: list[_Job], make: Make, image_format: Format, workers: int, progress: Callable
) -> None:
    """Every shard that is not there yet. What crashes a decoder, and with it a worker, is found and set aside."""
    context = multiprocessing.get_context("fork")  # workers start at once, and find items and `make` in their memory
    at = context.Array("q", len(jobs), lock=False)
    work = _Work(partial, jobs, make, image_format, context.Value("q", 0), at, set(), context.Event())
    total = sum(len(job.items) for job in jobs)
    while missing := [n for n, job in enumerate(jobs) if not (partial / f"{job.name}.json").is_file()]:
        work.done.value = total - sum(len(jobs[n].items) for n in missing)
        at[:] = [-1] * len(jobs)
        work.stop.clear()
        try:
            _run(context, work, missing, min(workers, len(missing)), lambda: progress(work.done.value, total))
        except BrokenProcessPool:
            suspects = [(job, item) for job, item in enumerate(at) if item >= 0]
            found = {(job, item) for job, item in suspects if _is_deadly(context, make, jobs[job].items[item])}
            if not found:
                raise DataError(
                    "a process that makes shards died, perhaps for lack of memory: run the same command again, with "
                    "fewer --workers."
                ) from None
            work.deadly.update(found)
    progress(total, total)


def _run(context: ForkContext, work: _Work, missing: list[int], workers: int, show: Callable[[], None]) -> None:
    show()
    pool = ProcessPoolExecutor(workers, context, _start, (os.getpid(), work))
    try:
        pending = {pool.submit(_write_shard, n) for n in missing}
        while pending:
            finished, pending = wait(pending, timeout=0.2, return_when=FIRST_EXCEPTION)
            show()
            for future in finished:
                future.result()
    except BaseException:
        work.stop.set()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _is_deadly(context: ForkContext, make: Make, item: object) -> bool:
    """Whether making an item's studies ends a process."""
    parent = os.getpid()
    process = context.Process(target=lambda: (obey_parent(parent), deque(make(item), maxlen=0)))
    process.start()
    process.join()
    return process.exitcode < 0


def _write_shard(number: int) -> None:
    partial, job = _work.partial, _work.jobs[number]
    tar = partial / f".{job.name}.{os.getpid()}.tar"
    left_out: list[LeftOut] = []
    labels: Counter[str] = Counter()
    kept = 0
    try:
        with webdataset.TarWriter(str(tar), encoder=False, mtime=0.0) as writer:
            for index, item in enumerate(job.items):
                if _work.stop.is_set():
                    raise _Stopped
                _work.at[number] = index
                deadly = (number, index) in _work.deadly
                for found in [LeftOut(item.row, "study", "crashes its decoder")] if deadly else _work.make(item):
                    if isinstance(found, LeftOut):
                        left_out.append(found)
                        continue
                    if found.split != job.split or found.split not in SPLITS:
                        raise DataError(f"a study's split is {found.split!r}: expected {job.split!r}, of {SPLITS}.")
                    writer.write(_sample(kept, found, _work.image_format))
                    kept += 1
                    labels.update(found.labels)
                with _work.done.get_lock():
                    _work.done.value += 1
        _work.at[number] = -1
        shard = None
        if kept:
            index = tar.with_suffix(".idx")
            with IndexCreator(str(tar), str(index), verbose=False) as creator:
                creator.create_index()
            with tar.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            shard = {"file": f"{job.name}.tar", "studies": kept, "sha256": digest}
            index.replace(partial / f"{job.name}.idx")
            with tar.open("rb") as file:
                os.fsync(file)
            tar.replace(partial / f"{job.name}.tar")
        # Last: with it the shard counts as made.
        record = {"shard": shard, "labels": labels, "left_out": left_out}
        _write(partial / f"{job.name}.json", json.dumps(record).encode())
    finally:
        for path in (tar, tar.with_suffix(".idx")):
            path.unlink(missing_ok=True)


def _finish(partial: Path, about: dict, jobs: list[_Job], left_out: Sequence[LeftOut]) -> None:
    """Write dropped.csv and, last, manifest.json."""
    records = [json.loads((partial / f"{job.name}.json").read_text()) for job in jobs]
    aside = sorted([*left_out, *(LeftOut(*one) for record in records for one in record["left_out"])])
    dropped = Counter(one.reason for one in aside if one.what == "study")
    without = Counter(one.reason for one in aside if one.what != "study")
    splits: Counter[str] = Counter()
    labels: Counter[str] = Counter()
    for job, record in zip(jobs, records, strict=True):
        splits[job.split] += record["shard"]["studies"] if record["shard"] else 0
        labels.update(record["labels"])
    if not splits.total() and not aside:
        raise _NothingLeft("No study is left to write (the source is empty).")
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(LeftOut._fields)  # row numbers, not identifiers: it may be shared where the source may not
    writer.writerows(aside)
    _write(partial / "dropped.csv", table.getvalue().encode())
    manifest = about | {
        "counts": {
            "kept": splits.total(),
            "dropped": dict(sorted(dropped.items())),
            "views_left_out": dict(sorted(without.items())),
            "splits": {split: splits[split] for split in SPLITS if splits[split]},
            "labels": dict(sorted(labels.items())),
        },
        "shards": sorted((record["shard"] for record in records if record["shard"]), key=lambda shard: shard["file"]),
    }
    _write(partial / "manifest.json", (json.dumps(manifest, indent=2, ensure_ascii=False) + "\n").encode())


def _encoded(image: np.ndarray, image_format: Format) -> bytes:
    buffer = io.BytesIO()
    options = {"format": "JPEG", "quality": 95} if image_format == "jpg" else {"format": "PNG"}
    Image.fromarray(image).save(buffer, **options)
    return buffer.getvalue()


def _sample(index: int, study: Study, image_format: Format) -> dict:
    meta = {
        "study_id": study.study_id,
        "patient_id": study.patient_id,
        "report": study.report,
        "labels": list(study.labels),
    }
    if study.boxes:
        meta["boxes"] = [box._asdict() for box in study.boxes]
    if study.progressions:
        meta["progressions"] = study.progressions
    images = {
        f"{view}.{image_format}": _encoded(study.images[view], image_format) for view in VIEWS if view in study.images
    }
    return {"__key__": f"{index:08d}", "json": json.dumps(meta, ensure_ascii=False).encode(), **images}


def read_manifest(root: Path) -> dict:
    """The manifest of the prepared data set at `root`, once its shards are known to be there.

    Raises:
        DataError: if `root` is missing, is not a prepared data set, lacks a shard it lists, or has no study.
    """
    manifest, root = _manifest(root), Path(root)
    if not manifest["counts"]["kept"]:
        dropped = manifest["counts"]["dropped"]
        raise DataError(f"No study is left in {root} ({dropped}): {root / 'dropped.csv'} has each and its reason.")
    for shard in manifest["shards"]:
        tar = root / shard["file"]
        if not tar.is_file() or tar.stat().st_size == 0:
            raise DataError(f"{tar} is missing or empty, expected {shard['studies']} studies: prepare the data again.")
    return manifest


def _manifest(root: Path) -> dict:
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root}: no such directory. Make it with: python -m training.prepare csv TABLE --out {root}")
    path = root / "manifest.json"
    if not path.is_file():
        raise DataError(f"{root} holds no manifest.json: pass a folder written by python -m training.prepare.")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON ({error}): prepare the data again.") from None
    if manifest.get("format") != _FORMAT:
        raise DataError(f"{path} has format {manifest.get('format')!r}, expected {_FORMAT}: prepare the data again.")
    return manifest


def shard_paths(root: Path, split: str) -> list[Path]:
    """The tar files of one split, in order.

    Raises:
        DataError: as `read_manifest`, or if the split has no studies.
    """
    shards = [Path(root) / s["file"] for s in read_manifest(root)["shards"] if s["file"].startswith(f"{split}-")]
    if not shards:
        raise DataError(f"{root} has no studies in its {split!r} split.")
    return shards


def read_studies(
    root: Path, split: str, *, images: bool = True, places: Container[int] | None = None
) -> Iterator[Study]:
    """The studies of one split in their stored order; without their pixels where `images` is false.

    Args:
        places: leave out those that stand at no such place, and do not decode them. None: all.

    Raises:
        DataError: as `shard_paths`, or once a shard turns out to be damaged or to lack studies.
    """
    paths = shard_paths(root, split)
    missing = sum(shard["studies"] for shard in read_manifest(root)["shards"] if Path(root) / shard["file"] in paths)
    # Every process reads every study: webdataset's defaults refuse to under torchrun, split them between a DataLoader's
    # workers, and draw a seed from Python's global generator.
    here = {"nodesplitter": None, "workersplitter": None, "seed": 0, "empty_check": False}
    try:
        stored = webdataset.WebDataset([str(path) for path in paths], shardshuffle=False, **here)
        for place, sample in enumerate(stored):
            if places is None or place in places:
                yield _study(sample, split, images)
            missing -= 1
    except (OSError, ValueError, KeyError, TypeError, tarfile.TarError) as error:
        raise DataError(
            f"{root}: a {split} shard is damaged or too old ({type(error).__name__}): prepare the data again."
        ) from None
    if missing:
        raise DataError(
            f"{root}: the {split} shards lack {missing} of the studies in the manifest: prepare them again."
        )


def _study(sample: dict, split: str, images: bool) -> Study:
    meta = json.loads(sample["json"])
    files = {view: f"{view}{suffix}" for view in VIEWS for suffix in _SUFFIXES if f"{view}{suffix}" in sample}
    return Study(
        study_id=meta["study_id"],
        patient_id=meta["patient_id"],
        split=split,
        report=meta["report"],
        labels=tuple(meta["labels"]),
        boxes=tuple(Box(**box) for box in meta.get("boxes", ())),
        progressions=tuple(map(tuple, meta.get("progressions", ()))),
        images={view: np.asarray(Image.open(io.BytesIO(sample[name]))) for view, name in files.items() if images},
    )
