"""Studies on disk: webdataset tar shards, one folder a data set, with DALI indexes and a manifest.

    DIR/manifest.json              counts, settings, versions, a SHA-256 per shard
    DIR/{split}-000000.tar         one sample a study: KEY.json and KEY.{view}.jpg for each present view
    DIR/{split}-000000.idx         byte offsets of the samples, for DALI's webdataset reader

The JSON holds study_id, patient_id, report and labels. A view that a study lacks has no file.
"""

import hashlib
import io
import json
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image
from wds2idx import IndexCreator

from ..errors import DataError
from ..study import VIEWS

SPLITS = ("train", "validate", "test")
_FORMAT = 1


@dataclass(frozen=True)
class Study:
    """One study: up to four radiographs (uint8 [H, W], keyed by a name of VIEWS) with its report."""

    study_id: str
    patient_id: str
    split: str
    report: str
    images: dict[str, np.ndarray]
    labels: tuple[str, ...] = field(default=())


def _jpeg(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=95)
    return buffer.getvalue()


def _sample(index: int, study: Study) -> dict:
    meta = {
        "study_id": study.study_id,
        "patient_id": study.patient_id,
        "report": study.report,
        "labels": list(study.labels),
    }
    images = {f"{view}.jpg": _jpeg(study.images[view]) for view in VIEWS if view in study.images}
    return {"__key__": f"{index:08d}", "json": json.dumps(meta, ensure_ascii=False).encode(), **images}


def empty_or_absent(out: Path) -> Path:
    """`out`, once it is sure that writing there destroys nothing.

    Raises:
        DataError: if `out` exists and is anything but an empty folder.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} already exists and is not an empty folder: pass another --out, or remove it first.")
    return out


def write_shards(
    studies: Iterable[Study],
    out: Path,
    *,
    source: str,
    settings: dict,
    dropped: Counter[str] | None = None,
    extra_files: Callable[[], dict[str, str]] | None = None,
    studies_per_shard: int = 512,
) -> dict:
    """Write `studies` under `out` and return the manifest. The same studies give the same bytes.

    The folder appears whole or not at all: everything is written beside it and renamed at the end.

    Args:
        studies: consumed once; memory stays flat.
        source: where the studies come from ("phantom", "csv").
        settings: what a reader needs to make the same shards again; JSON values.
        dropped: studies set aside by reason. It may fill while `studies` is consumed.
        extra_files: called once `studies` is consumed; the text of further files by name.

    Raises:
        DataError: if `out` is taken, a study's split is unknown, or no study is left.
        OSError: if the disk is full or `out` cannot be written; its filename is `out`, and nothing is left behind.
    """
    named = Path(out)
    out = empty_or_absent(named).resolve()  # "." has no name to write beside, and a link cannot be replaced by a folder
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    new_parents = [folder for folder in out.parents if not folder.exists()]
    kept: Counter[str] = Counter()
    labels: Counter[str] = Counter()
    try:
        partial.mkdir(parents=True)
        with ExitStack() as stack:
            writers: dict[str, webdataset.TarWriter] = {}
            for study in studies:
                if study.split not in SPLITS:
                    raise DataError(f"Study {kept.total()} has split {study.split!r}, expected one of {SPLITS}.")
                if kept[study.split] % studies_per_shard == 0:
                    if study.split in writers:
                        writers[study.split].close()
                    name = f"{study.split}-{kept[study.split] // studies_per_shard:06d}.tar"
                    writer = webdataset.TarWriter(str(partial / name), encoder=False, mtime=0.0)
                    writers[study.split] = stack.enter_context(writer)
                writers[study.split].write(_sample(kept[study.split], study))
                kept[study.split] += 1
                labels.update(study.labels)
        dropped = dropped or Counter()
        if not kept:
            raise DataError(f"No study is left to write ({dict(dropped) or 'the source is empty'}).")
        manifest = {
            "format": _FORMAT,
            "source": source,
            "settings": settings,
            "counts": {
                "kept": kept.total(),
                "dropped": dict(dropped),
                "splits": {split: kept[split] for split in SPLITS if kept[split]},
                "labels": dict(sorted(labels.items())),
            },
            "shards": [_index(tar) for tar in sorted(partial.glob("*.tar"))],
            "versions": {name: version(name) for name in ("numpy", "pillow", "webdataset")},
        }
        texts = extra_files() if extra_files else {}
        texts["manifest.json"] = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
        for name, text in texts.items():
            (partial / name).write_text(text, encoding="utf-8", newline="")
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        with suppress(OSError):
            for folder in new_parents:
                folder.rmdir()
        if isinstance(error, OSError) and (error.filename is None or str(partial) in str(error.filename)):
            error.filename, error.filename2 = str(named), None  # a full disk names no file by itself
        raise
    return manifest


def _index(tar: Path) -> dict:
    """Write DALI's index beside `tar` and describe the shard for the manifest."""
    with IndexCreator(str(tar), str(tar.with_suffix(".idx")), verbose=False) as creator:
        creator.create_index()
    with tarfile.open(tar) as members:
        studies = sum(name.endswith(".json") for name in members.getnames())
    with tar.open("rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
    return {"file": tar.name, "studies": studies, "sha256": digest}


def read_manifest(root: Path) -> dict:
    """The manifest of the prepared data set at `root`, once its shards are known to be there.

    Raises:
        DataError: if `root` is missing, is not a prepared data set, or lacks a shard it lists.
    """
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
    for shard in manifest["shards"]:
        tar = root / shard["file"]
        if not tar.is_file() or tar.stat().st_size == 0:
            raise DataError(f"{tar} is missing or empty, expected {shard['studies']} studies: prepare the data again.")
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


def read_studies(root: Path, split: str, *, images: bool = True) -> Iterator[Study]:
    """The studies of one split in their stored order; without their pixels where `images` is false.

    Raises:
        DataError: as `shard_paths`, or once a shard turns out to be damaged or to lack studies.
    """
    paths = shard_paths(root, split)
    missing = sum(shard["studies"] for shard in read_manifest(root)["shards"] if Path(root) / shard["file"] in paths)
    # Every process reads every study: webdataset's defaults refuse to under torchrun, split them between a DataLoader's
    # workers, and draw a seed from Python's global generator.
    here = {"nodesplitter": None, "workersplitter": None, "seed": 0, "empty_check": False}
    try:
        for sample in webdataset.WebDataset([str(path) for path in paths], shardshuffle=False, **here):
            yield _study(sample, split, images)
            missing -= 1
    except (OSError, ValueError, KeyError, tarfile.TarError) as error:
        raise DataError(
            f"{root}: a {split} shard is damaged ({type(error).__name__}): prepare the data again."
        ) from None
    if missing:
        raise DataError(
            f"{root}: the {split} shards lack {missing} of the studies in the manifest: prepare them again."
        )


def _study(sample: dict, split: str, images: bool) -> Study:
    meta = json.loads(sample["json"])
    views = [view for view in VIEWS if images and f"{view}.jpg" in sample]
    return Study(
        study_id=meta["study_id"],
        patient_id=meta["patient_id"],
        split=split,
        report=meta["report"],
        labels=tuple(meta["labels"]),
        images={view: np.asarray(Image.open(io.BytesIO(sample[f"{view}.jpg"]))) for view in views},
    )
