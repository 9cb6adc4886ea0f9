"""Embedding a collection: any number of studies through the towers, to a folder that can be searched.

    DIR/collection.json             the model's SHA-256 and what its towers compute in, the source, the width D; once
                                    finished, also the counts
    DIR/part-00000.safetensors      of n studies: image and text, float32 [n, D], L2-normalised; has_image and has_text,
                                    bool [n]
    DIR/dropped.csv                 the files that were set aside, with the reason

A part's metadata hold, as JSON, the ids of its rows, the files set aside between them, and where the next part begins:
a part is there whole or not at all, and the last one is all that is needed to go on. An absent side is a zero row.
"""

import csv
import hashlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.data import DataLoader, Dataset

from .data.loader import StudyLoader
from .data.radiographs import UnreadableImage, read_radiograph
from .data.shards import empty_or_absent, read_manifest, shard_paths
from .data.workers import obey_parent
from .errors import DataError
from .modeling.adaptor import WEIGHTS, AdaptorModel
from .modeling.frozen import compute_dtype
from .modeling.model import ClinVLA
from .run import replacing, write_json
from .study import StudyBatch

_FORMAT = 1
_PART = 1024  # studies; what is lost when a run is killed
_SUFFIXES = (".png", ".jpg", ".jpeg", ".dcm", ".dicom")
_READERS = min(os.cpu_count() or 1, 16)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class _Rows:
    """Some studies of a source, in its order: those embedded, and the files set aside."""

    ids: list[str]
    image: Tensor  # float32 [n, D]
    text: Tensor
    has_image: Tensor  # bool [n]
    has_text: Tensor
    dropped: list[tuple[str, str]] = field(default_factory=list)  # file and reason

    def __len__(self) -> int:
        """Studies taken from the source."""
        return len(self.ids) + len(self.dropped)


# Rows, and a function that says how to go on after them. To be called before the next rows are drawn.
_Stream = Generator[tuple[_Rows, Callable[[], str]], None, None]


def embed(
    model: ClinVLA | AdaptorModel | str | Path,
    source: str | Path | Iterable[str | Path],
    out: str | Path,
    *,
    split: str | None = None,
    batch_size: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> dict:
    """Embed every study of `source` into the folder `out`, and return its collection.json. `Collection` searches it.

    Memory does not grow with the source, but for what oneDNN keeps on a CPU of the last 256 shapes of products (1,024
    where a product went through it before clinvla_fast was imported): about a megabyte each. Killed at any time and
    called again with the same arguments, it goes on after the last whole part and ends with the same bytes.

    Args:
        model: a ClinVLA or AdaptorModel, on the device to use (it is put in evaluation mode); or the folder of a run,
            or what else `ClinVLA.from_pretrained` takes: on a GPU where there is one, its frozen towers in what the
            run's --precision means there.
        source: a folder written by training.prepare: images and reports, as evaluation sees them, under their study_id.
            Or a folder of PNG, JPEG and DICOM files, searched through and sorted; or such a file, or paths of such
            files: each file is the frontal of a study without a report, under its path (in a folder: relative to the
            folder). Files that cannot be read are set aside and listed in dropped.csv.
        split: of a folder written by training.prepare: "train", "validate" or "test"; all of them by default.
        batch_size: studies at a time; results depend on it by rounding only.
        progress: called with (studies done, studies in the source).

    Raises:
        DataError: if the source cannot be read or is empty, a shard is damaged, `out` is taken, or `out` was started
            with another model, source, batch size or device.
        OSError: if `out` cannot be written, or a folder of the source cannot be read.
    """
    if batch_size < 1:
        raise DataError(f"batch_size is {batch_size}: expected at least 1.")
    if isinstance(model, str | Path):
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = load_model(model, device, trained_precision(model))
    model.eval()
    out = Path(out).resolve()
    chosen: _Shards | _Files
    if isinstance(source, str | Path) and (Path(source) / "manifest.json").is_file():
        chosen = _Shards(Path(source), split)
    elif split is not None:
        raise DataError(f"split is {split!r}, but {source} was not written by training.prepare and has no splits.")
    elif "frontal" not in model.recipe.views:
        raise DataError(f"{source} is image files, frontals, and the model looks at {', '.join(model.recipe.views)}.")
    else:
        out.parent.mkdir(parents=True, exist_ok=True)
        chosen = _Files(source, out.parent)
    settings = {
        "format": _FORMAT,
        "width": model.width,
        "model_sha256": model_sha256(model),
        "precision": str(_dtype(model)).removeprefix("torch."),
        "source": chosen.identity,
        "batch_size": batch_size,
        "device": model.device.type,
    }
    _open(out, settings)
    parts, done, position = 0, 0, ""
    while part_path(out, parts).is_file():
        parts += 1
    if parts:
        last, _ = read_part(part_path(out, parts - 1))
        done, position = last["done"], last["position"]
    show = progress or (lambda *_: None)
    show(done, chosen.studies)
    pending: list[_Rows] = []
    with closing(chosen.stream(model, batch_size, done, position)) as stream:
        for rows, where in stream:
            pending.append(rows)
            done += len(rows)
            if sum(map(len, pending)) >= _PART or done == chosen.studies:
                _write_part(part_path(out, parts), pending, done, where())
                pending, parts = [], parts + 1
            show(done, chosen.studies)
    if done < chosen.studies:
        raise DataError(f"{source} gave {done} of its {chosen.studies} studies: prepare the data again.")
    return _finish(out, settings, parts)


def tower_dtype(precision: str | None, device: torch.device) -> torch.dtype | None:
    """What frozen towers compute in there; None, as they were saved, for what is no `presets.Precision`."""
    return compute_dtype(device) if precision == "auto" else _DTYPES.get(precision)


def trained_precision(model: str | Path) -> str | None:
    """The --precision that the run in a folder was trained with; None where no run is."""
    from .evaluation.subject import read_run_settings  # which imports this module

    return read_run_settings(Path(model)).get("precision")


def load_model(model: str | Path, device: torch.device, precision: str | None = None) -> ClinVLA | AdaptorModel:
    """A saved model.

    Args:
        model: the folder of a run, or what else `ClinVLA.from_pretrained` takes.
        precision: of its frozen towers, as `tower_dtype`.
    """
    dtype = tower_dtype(precision, device)
    if not (Path(model) / WEIGHTS).is_file():
        return ClinVLA.from_pretrained(model, dtype=dtype).to(device)
    adaptor = AdaptorModel.load(Path(model))
    for encoder in (adaptor.vision, adaptor.text):
        encoder.model.to(dtype)
    return adaptor.to(device)


def _dtype(model: ClinVLA | AdaptorModel) -> torch.dtype:
    """What its towers compute in."""
    if isinstance(model, AdaptorModel):
        return model.vision.dtype
    return model.dtype or model.vision.vit.patch_embed.proj.weight.dtype


def model_sha256(model: ClinVLA | AdaptorModel) -> str:
    """What tells a model from any other: its recipe, vocabulary and every weight, the towers' included."""
    words = sorted(model.tokenizer.get_vocab().items())
    digest = hashlib.sha256(json.dumps([asdict(model.recipe), words]).encode())
    pixels = {"vision.mean": model.vision.mean, "vision.std": model.vision.std}
    for name, value in sorted((model.state_dict() | pixels).items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def part_path(folder: Path, number: int) -> Path:
    return folder / f"part-{number:05d}.safetensors"


def read_part(path: Path) -> tuple[dict, safe_open]:
    """What a part says of itself (ids, dropped, done, position), and its tensors, as arrays, still to be read.

    Raises:
        DataError: if it is missing or damaged.
    """
    try:
        tensors = safe_open(path, "np")
        part = json.loads(tensors.metadata()["part"])
        if not {"ids", "dropped", "done", "position"} <= part.keys():
            raise ValueError("it is a file of something else")
        return part, tensors
    except (FileNotFoundError, SafetensorError, TypeError, KeyError, AttributeError, ValueError) as error:
        reason = "missing" if isinstance(error, FileNotFoundError) else f"damaged ({type(error).__name__})"
        raise DataError(f"{path} is {reason}: remove it where it is there, and embed the collection again.") from None


def read_collection(folder: Path) -> dict:
    """The collection.json in `folder`, finished or not.

    Raises:
        DataError: if there is none, or it cannot be read.
    """
    path = folder / "collection.json"
    if not path.is_file():
        raise DataError(f"{folder} holds no collection.json: pass a folder written by python -m training.embed.")
    try:
        known = json.loads(path.read_text())
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON ({error}): embed the collection again.") from None
    if not isinstance(known, dict):
        raise DataError(f"{path} is no table of names: embed the collection again.")
    if known.get("format") != _FORMAT:
        raise DataError(f"{path} has format {known.get('format')!r}, expected {_FORMAT}: embed the collection again.")
    return known


def _open(out: Path, settings: dict) -> None:
    """Make `out`, or make sure that it was started with the same settings."""
    if not (out / "collection.json").is_file():
        with replacing(empty_or_absent(out)) as partial:  # a kill leaves no folder, or one that says what it is
            partial.mkdir(parents=True, exist_ok=True)
            write_json(partial / "collection.json", settings)
        return
    known = read_collection(out)
    other = [
        name.removesuffix("_sha256").replace("_", " ")
        for name in settings
        if known.get(name, settings[name]) != settings[name]
    ]
    if other:
        raise DataError(
            f"{out} was started with another {', '.join(other)}: pass what it was started with, or another out."
        )


def _write_part(path: Path, pending: list[_Rows], done: int, position: str) -> None:
    tensors = {
        name: torch.cat([getattr(rows, name) for rows in pending])
        for name in ("image", "text", "has_image", "has_text")
    }
    if not (tensors["image"].isfinite().all() and tensors["text"].isfinite().all()):
        raise DataError("the model's embeddings are not finite: train it again, or load another one.")
    part = {
        "ids": [i for rows in pending for i in rows.ids],
        "dropped": [d for rows in pending for d in rows.dropped],
        "done": done,
        "position": position,
    }
    content = save(tensors, {"part": json.dumps(part)})  # one key: safetensors writes several in any order
    with replacing(path) as partial:
        partial.write_bytes(content)


def _finish(out: Path, settings: dict, parts: int) -> dict:
    """Write dropped.csv, and then collection.json with the counts, from the parts."""
    kept: Counter[str] = Counter({"studies": 0, "image": 0, "text": 0})
    reasons: Counter[str] = Counter()
    as_named = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}  # a file name need not be UTF-8
    with replacing(out / "dropped.csv") as partial, partial.open("w", **as_named) as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(("file", "reason"))
        for number in range(parts):
            part, tensors = read_part(part_path(out, number))
            kept["studies"] += len(part["ids"])
            for kind in ("image", "text"):
                kept[kind] += int(tensors.get_tensor(f"has_{kind}").sum())
            table.writerows(part["dropped"])
            reasons.update(reason for _, reason in part["dropped"])
    finished = settings | {"parts": parts, "counts": {"kept": kept, "dropped": dict(sorted(reasons.items()))}}
    write_json(out / "collection.json", finished)
    return finished


class _Shards:
    """The studies of a folder written by training.prepare. A position is a loader's checkpoint."""

    def __init__(self, root: Path, split: str | None):
        sizes = read_manifest(root)["counts"]["splits"]
        if split is not None:
            shard_paths(root, split)
            sizes = {split: sizes[split]}
        self._root, self._sizes, self.studies = root, sizes, sum(sizes.values())
        digest = hashlib.sha256((root / "manifest.json").read_bytes()).hexdigest()
        self.identity = {"kind": "shards", "manifest_sha256": digest, "splits": list(sizes)}

    def stream(self, model: ClinVLA | AdaptorModel, batch_size: int, done: int, position: str) -> _Stream:
        for split, studies in self._sizes.items():
            if done >= studies:
                done -= studies
                continue
            loader = StudyLoader(
                self._root,
                split,
                model.tokenizer,
                image_size=model.vision.image_size,
                max_tokens=model.max_tokens,
                batch_size=batch_size,
                device="gpu" if model.device.type == "cuda" else "cpu",
                checkpoint=position if done else None,
            )
            done = 0
            for batch in loader:
                yield _embed_batch(model, batch), loader.checkpoint


@torch.inference_mode()
def _embed_batch(model: ClinVLA | AdaptorModel, batch: StudyBatch) -> _Rows:
    found = model(batch.to(model.device))
    has_image, has_text = found.image_mask.any(1), found.text_mask.any(1)
    image = normalize(found.image_global.float(), dim=-1) * has_image[:, None]
    text = normalize(found.text_global.float(), dim=-1) * has_text[:, None]
    return _Rows(list(batch.ids), *(x.cpu() for x in (image, text, has_image, has_text)))


class _Files:
    """Image files. Their names wait on disk: there may be more than memory should hold. `done` is the position."""

    def __init__(self, source: str | Path | Iterable[str | Path], scratch: Path):
        self._root, names = "", source
        if isinstance(source, str | Path):
            if Path(source).is_dir():
                self._root, names = str(source), _image_files(str(source))
            elif Path(source).is_file():
                names = [source]
            else:
                raise DataError(
                    f"{source}: no such folder or file, expected shards by training.prepare or image files."
                )
        self._names = tempfile.TemporaryFile(dir=scratch)  # noqa: SIM115 (it goes when this object goes)
        self.studies, digest = 0, hashlib.sha256()
        for name in names:
            if not isinstance(name, str | Path):
                raise DataError(f"path {self.studies} of the source is {type(name).__name__}: expected str or Path.")
            if str(name).lower().endswith(".tar"):
                raise DataError(f"{name} is a shard: pass the folder that training.prepare wrote it in.")
            self._names.write(json.dumps(str(name)).encode() + b"\n")
            digest.update(json.dumps(_where_and_size(os.path.join(self._root, name))).encode())
            self.studies += 1
        if not self.studies:
            where = f"{source} holds" if self._root else "the source has"
            raise DataError(f"{where} no image: expected files that end in {', '.join(_SUFFIXES)}.")
        self.identity = {"kind": "images", "files_sha256": digest.hexdigest(), "files": self.studies}

    def stream(self, model: ClinVLA | AdaptorModel, batch_size: int, done: int, position: str) -> _Stream:
        self._names.seek(0)
        names = (json.loads(line) for line in islice(self._names, done, None))
        # Processes, as many warnings of pydicom must be silenced and that is not safe between threads; forked, as in
        # shards.py. Pixels return through pipes: /dev/shm may be small. A generator of its own leaves the caller's.
        parent = os.getpid()
        loader = DataLoader(
            _Radiographs(self._root, model.vision.image_size),
            batch_sampler=iter(lambda: list(islice(names, batch_size)), []),
            num_workers=_READERS,
            multiprocessing_context="fork",
            collate_fn=list,
            worker_init_fn=lambda _: obey_parent(parent),
            generator=torch.Generator(),
        )
        batches = iter(loader)
        try:
            while batch := _next(batches):
                for _, error in batch:
                    if isinstance(error, DataError) and not isinstance(error, UnreadableImage):
                        raise error
                ids = [name for name, pixels in batch if isinstance(pixels, np.ndarray)]
                dropped = [(name, error.reason) for name, error in batch if isinstance(error, UnreadableImage)]
                studies = [{"frontal": pixels} for _, pixels in batch if isinstance(pixels, np.ndarray)]
                image = model.encode_images(studies, batch_size).float().cpu()
                there = torch.ones(len(ids), dtype=torch.bool)
                yield _Rows(ids, image, torch.zeros_like(image), there, ~there, dropped), lambda: ""
        finally:
            del batches  # its processes end now; ten seconds later where the garbage collector has to find it


def _next(batches: Iterator[list]) -> list | None:
    try:
        return next(batches, None)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise DataError("a process that reads images died, perhaps for lack of memory: run it again.") from None


class _Radiographs(Dataset):
    """Reads a file for its name; what is wrong with it is returned, as a raised error would lose its kind."""

    def __init__(self, root: str, size: int):
        self._root, self._size = root, size

    def __getitem__(self, name: str) -> tuple[str, np.ndarray | DataError]:
        try:
            return name, read_radiograph(os.path.join(self._root, name), self._size)
        except DataError as error:
            return name, error


def _where_and_size(path: str) -> tuple[str, int]:
    """What tells a file from others of its name; its size is -1 where there is none."""
    try:
        return os.path.abspath(path), os.path.getsize(path)
    except OSError:
        return os.path.abspath(path), -1


def _image_files(root: str, place: str = "", above: tuple[str, ...] = ()) -> Iterator[str]:
    """The image files below `root`, by their path from there, always in the same order. Links are followed, but for
    those to a folder `above`."""
    folder = os.path.realpath(os.path.join(root, place))
    if folder in above:
        return
    entries = sorted(os.scandir(os.path.join(root, place)), key=lambda entry: entry.name)
    for entry in entries:
        if not entry.is_dir() and entry.name.lower().endswith(_SUFFIXES):
            yield os.path.join(place, entry.name)
    for entry in entries:
        if entry.is_dir():
            yield from _image_files(root, os.path.join(place, entry.name), (*above, folder))
