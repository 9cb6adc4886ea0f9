"""Shards to batches: DALI decodes and augments, on the CPU or on a GPU; the report is tokenised beside it.

What is random, the order of an epoch and each study's augmentation, is drawn here, from the seed and the epoch alone.
DALI is handed files and numbers and keeps no state, so where a loader stands is two numbers, and it is the same whether
an image was decoded just now or comes from a cache.
"""

import hashlib
import json
import math
import mmap
import os
import struct
import tempfile
from bisect import bisect
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, pipeline_def, types
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from ..errors import DataError
from ..study import VIEWS, StudyBatch
from .cache import CacheName, PixelCache, choose_cache
from .epochs import Epochs
from .shards import read_manifest, shard_paths
from .tokenizer import tokenize_reports

_FILES = {"json": 0} | {f"{view}.{kind}": 1 + i for i, view in enumerate(VIEWS) for kind in ("jpg", "png")}
_BLOCK = 512  # bytes; a tar file is made of them
_DRAWS = 7  # of an augmentation: turn, zoom and shift in x and y, brightness, contrast
_ALIASED, _ROOM = 1.25, 1.1  # times the tower's size: sides above are made smaller first, and to which size
_SAME_DRAWS = np.array([0, 1, 0, 1])  # by view: a prior is augmented as the current image of the same projection is


@pipeline_def
def _decoding(device: str, smaller: bool):
    """Files to images [H, W, 1]; `smaller`: each to the shape that is handed in with it."""
    file = fn.external_source(name="file", ndim=1, dtype=types.UINT8, no_copy=True)
    # All by the hardware decoder where there is one: shared out by DALI, the same file may come out a grey level apart.
    mixed = {"device": "mixed", "hw_decoder_load": 1.0} if device == "gpu" else {"device": "cpu"}
    image = fn.decoders.image(file, output_type=types.GRAY, adjust_orientation=False, **mixed)
    if not smaller:
        return image
    shape = fn.external_source(name="shape", ndim=1, dtype=types.FLOAT)
    return fn.resize(image, size=shape, interp_type=types.INTERP_LINEAR, antialias=True)


@pipeline_def
def _sizing(size: int, train: bool, device: str, source: str, padded: bool):
    """Images [H, W, 1] of any size to [size, size, 1], augmented in training. `source`: where they come from."""
    image = fn.external_source(
        name="image", device=source, ndim=3, dtype=types.UINT8, layout="HWC", no_copy=source == "cpu"
    )
    if device != source:
        image = image.gpu()
    if padded:
        shape = fn.external_source(name="shape", ndim=1, dtype=types.INT32)
        image = fn.slice(image, start=(0, 0), shape=shape, axes=(0, 1))
    if not train:  # the whole image at the tower's size, its aspect ratio given up as the paper does
        return fn.resize(image, size=(size, size), interp_type=types.INTERP_LINEAR, antialias=True)
    matrix = fn.external_source(name="matrix", ndim=2, dtype=types.FLOAT)
    where = {"size": (size, size), "inverse_map": False, "fill_value": 0}
    if device == "gpu":
        image = fn.warp_affine(image, matrix=matrix[:2], **where)
    else:  # nine times as fast as warp_affine on a CPU, and within a grey level of it
        image = fn.experimental.warp_perspective(image, matrix=matrix, pixel_origin="corner", **where)
    brightness, contrast = (fn.external_source(name=n, ndim=0, dtype=types.FLOAT) for n in ("brightness", "contrast"))
    return fn.brightness_contrast(image, brightness=brightness, contrast=contrast)


def _augmentation(draws: np.ndarray, shapes: np.ndarray, size: int) -> dict[str, np.ndarray]:
    """What a film may do by itself: a small turn, shift, zoom, another exposure. Never a flip: it moves the heart.

    Args:
        draws: uniform in [0, 1), [n, _DRAWS].
        shapes: stored height and width, [n, 2].

    Returns:
        matrix, float32 [n, 3, 3]: from stored pixels to the unit square, turned, zoomed and shifted there, and on to
        the tower's size, so that there is one resampling. brightness and contrast, float32 [n].
    """
    angle = np.radians(8 * draws[:, 0] - 4)
    zoom, shift = 1 + 0.1 * draws[:, 1:3], 0.06 * draws[:, 3:5] - 0.03
    turn = np.stack([np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)], 1).reshape(-1, 2, 2)
    linear = zoom[:, :, None] * turn
    offset = 0.5 + shift - linear.sum(2) / 2  # the middle stays where it is but for the shift
    matrix = np.tile(np.eye(3), (len(draws), 1, 1))
    matrix[:, :2, :2] = size * linear / shapes[:, None, ::-1]
    matrix[:, :2, 2] = size * offset
    exposure = {"brightness": 0.9 + 0.2 * draws[:, 5], "contrast": 0.9 + 0.2 * draws[:, 6]}
    return {name: value.astype(np.float32) for name, value in ({"matrix": matrix} | exposure).items()}


class _Shard(NamedTuple):
    """Where a shard holds what. A file that a study lacks has no bytes, a view that it lacks has no pixels."""

    path: Path
    spans: np.ndarray  # int64 [studies, 1 + VIEWS, 2]: first byte of the JSON and of each view, and the byte after it
    shapes: np.ndarray  # int32 [studies, VIEWS, 2]: height and width

    def read(self, study: int) -> list[bytes]:
        """The JSON and the views of a study; empty where it lacks one."""
        spans = self.spans[study]
        first, stop = int(spans[spans[:, 1] > 0, 0].min()), int(spans.max())
        try:
            with self.path.open("rb", buffering=0) as tar:
                content = os.pread(tar.fileno(), stop - first, first)
        except OSError as error:
            raise DataError(f"{self.path} cannot be read any more: {error}") from None
        if len(content) < stop - first:
            raise DataError(f"{self.path} has become shorter: prepare the data again.")
        return [content[start - first : stop - first] if stop else b"" for start, stop in spans.tolist()]


@lru_cache(maxsize=4096)
def _open_shard(path: Path, studies: int, sha256: str, changed: int) -> _Shard:
    """A shard, its SHA-256 checked first: DALI's decoder may end the process when it is given a damaged file.

    Args:
        changed: when it was written, so that one that takes its place is checked again.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as tar:
        if hashlib.sha256(tar).hexdigest() != sha256:
            raise ValueError("its SHA-256 is not the manifest's")
        places: dict[str, list[tuple[int, int]]] = {}
        at = 0
        while at < len(tar) and tar[at]:
            key, _, kind = tar[at : at + 100].rstrip(b"\0").decode().partition(".")
            start, length = at + _BLOCK, int(tar[at + 124 : at + 135], 8)
            if kind in _FILES:
                places.setdefault(key, [(0, 0)] * (1 + len(VIEWS)))[_FILES[kind]] = start, start + length
            at = start + -(-length // _BLOCK) * _BLOCK
        if len(places) != studies:
            raise ValueError(f"it holds {len(places)} studies, the manifest says {studies}")
        shapes = [[_shape(tar, *span) if span[1] else (0, 0) for span in spans[1:]] for spans in places.values()]
    return _Shard(path, np.array(list(places.values())), np.array(shapes, np.int32))


def _shape(tar: mmap.mmap, at: int, stop: int) -> tuple[int, int]:
    """Height and width, from the header of the JPEG or PNG file that lies from `at` to `stop`."""
    if tar[at : at + 4] == b"\x89PNG":
        return struct.unpack_from(">II", tar, at + 16)[::-1]
    at += 2
    while at < stop:
        marker, length = struct.unpack_from(">HH", tar, at)
        if 0xFFC0 <= marker <= 0xFFCF and marker not in (0xFFC4, 0xFFC8, 0xFFCC):  # a frame's; these mean other things
            return struct.unpack_from(">HH", tar, at + 5)
        at += 2 + length
    raise ValueError("an image has no size")


class _Stage:
    """A DALI pipeline that is handed one batch at a time, perhaps an empty one, which DALI itself does not take."""

    def __init__(self, pipeline: Pipeline, stream: torch.cuda.Stream | None):
        self._pipeline, self._stream = pipeline, stream
        self._inputs: dict[str, Sequence] = {}  # held until they are used, as DALI makes no copy

    def ahead(self, jobs: Iterable, inputs: Callable[[Any], dict[str, Sequence]]) -> Iterator[tuple[Any, Sequence]]:
        """Each job with the TensorList made of its inputs, while DALI is at work on those of the next job."""
        before = None
        for job in jobs:
            made = self._take()  # first of all what an iterator that was left early did not take
            self._put(inputs(job))
            if before is not None:
                yield before, made
            before = job
        if before is not None:
            yield before, self._take()

    def _put(self, inputs: dict[str, Sequence]) -> None:
        if len(next(iter(inputs.values()))):
            with torch.cuda.stream(self._stream):  # which DALI copies a GPU's tensors on
                for name, values in inputs.items():
                    self._pipeline.feed_input(name, values)
            self._pipeline.schedule_run()
            self._inputs = inputs

    def _take(self) -> Sequence:
        if not self._inputs:
            return []
        made = self._pipeline.outputs()[0]
        self._inputs = {}
        return made


class _Text(NamedTuple):
    study_id: str
    labels: tuple[str, ...]
    tokens: np.ndarray  # int64


@dataclass
class _Job:
    """A batch on its way: B studies with n views in all."""

    studies: np.ndarray  # int64 [B]
    shapes: np.ndarray  # int32 [B, VIEWS, 2], zero where a view is absent
    texts: list[_Text]
    new: np.ndarray  # bool [B]: not cached
    files: list[np.ndarray]  # uint8: the views of the new ones, encoded

    @property
    def present(self) -> np.ndarray:
        return self.shapes[..., 0] > 0


class StudyLoader:
    """Batches of one split of a prepared data set.

    In training every epoch has its own random order of all studies, wherever their shards are, the images are augmented
    and the last, smaller batch is left out; otherwise the stored order is kept and every study comes once. A prior is
    augmented as the current image of the same projection is: a difference between them is the patient's. The same seed
    gives the same batches, on every number of threads and with every cache.

    A shard's SHA-256 is checked before it is first used in a process; in training all shards are, as the first epoch
    begins: that reads them once, from end to end. The studies are then read one by one in random order, which is slow
    where a slow disk's page cache cannot hold the shards; from the second epoch on, the cache serves them.

    Args:
        root: a folder written by training.prepare.
        split: "train", "validate" or "test".
        batch_size: studies a batch: in training of all processes together, else of one.
        device: "cpu", or "gpu" to decode and augment there.
        threads: of DALI.
        checkpoint: what `checkpoint` returned.
        cache: where decoded images are kept for later epochs, with the report's tokens. In training a side much longer
            than the tower's is made smaller before, as augmentation samples it without a filter. "auto": the first
            of GPU memory (with device "gpu"), host memory and disk of which they take at most half of what is free;
            "off" where there is none, and in evaluation, which mostly reads a split once.
        cache_folder: where the file of a cache on disk is; by default where temporary files go.
        rank, ranks: this process's number among those that share the work. In training each takes its part of every
            batch, as even as can be, so that the batches are those of one process; else every `ranks`-th study.
            A cache is a process's own, and will come to hold all studies.
        places: of the split's studies, those that there are; None for all.

    Raises:
        DataError: if the data set or the split cannot be read, has fewer studies than one training batch, or the cache
            cannot be had. What needs the shards themselves is found out as the first epoch begins.
    """

    def __init__(
        self,
        root: Path,
        split: str,
        tokenizer: PreTrainedTokenizerFast,
        *,
        image_size: int,
        max_tokens: int,
        batch_size: int,
        train: bool = False,
        device: str = "cpu",
        seed: int = 0,
        threads: int = 2,
        checkpoint: str | None = None,
        cache: CacheName = "auto",
        cache_folder: Path | None = None,
        rank: int = 0,
        ranks: int = 1,
        places: Sequence[int] | None = None,
    ):
        known = {shard["file"]: shard for shard in read_manifest(root)["shards"]}
        self._paths = shard_paths(root, split)
        self._known = [known[path.name] for path in self._paths]
        self._shards: dict[int, _Shard] = {}
        *starts, self._stored = accumulate((shard["studies"] for shard in self._known), initial=0)
        self._starts = starts
        self._places = np.arange(self._stored) if places is None else np.asarray(places, np.int64)
        self.studies = len(self._places)
        place = {"train": train, "seed": seed, "checkpoint": checkpoint, "rank": rank, "ranks": ranks}
        self._epochs = Epochs(Path(root), self.studies, batch_size, **place)
        self.tokenizer, self.max_tokens, self.batch_size, self.train = tokenizer, max_tokens, batch_size, train
        self._gpu, self._threads = device == "gpu", threads
        self._size, self._ranks = image_size, ranks
        self._cache_wanted: CacheName = "off" if cache == "auto" and not train else cache
        self._cache_folder = Path(cache_folder or tempfile.gettempdir())
        self._choose_cache(0)
        self._cache: PixelCache | None = None
        self._kept = np.zeros(self._stored, bool)
        self._texts: dict[int, _Text] = {}
        self._keep_texts = train or self._cache_wanted != "off"
        self._decoder: _Stage | None = None
        self.root, self.split = Path(root), split

    def __len__(self) -> int:
        """Batches an epoch, of this process."""
        return len(self._epochs)

    def __iter__(self) -> Iterator[StudyBatch]:
        """One epoch; or, in the first call after a checkpoint taken within one, what is left of it."""
        self._open()
        batches, random = self._epochs.batches()
        draws = random.random((self._stored, len(VIEWS) // 2, _DRAWS), np.float32) if self.train else None
        decoded = self._decoded(map(self._read, batches))
        for (job, _), images in self._sizer.ahead(decoded, lambda made: self._inputs(*made, draws)):
            self._epochs.done()
            yield self._assembled(job, images)
        self._epochs.end()

    def checkpoint(self) -> str:
        """Where the loader stands, for `checkpoint=`: the batches that follow, and their augmentation, are the same."""
        return self._epochs.checkpoint()

    def _open(self) -> None:
        """What needs the shards: once, as the first epoch begins."""
        if self._decoder is not None:
            return
        place = self._cache_wanted
        if self.train or place != "off":
            with ThreadPoolExecutor(self._threads) as pool:
                shards = list(pool.map(self._shard, range(len(self._paths))))
        self._smaller = self.train and any((shard.shapes > _ALIASED * self._size).any() for shard in shards)
        if place != "off":
            shapes = self._held(np.concatenate([shard.shapes for shard in shards])).reshape(-1, 2)
            place = self._choose_cache(int(shapes.astype(np.int64).prod(1).sum()))
            self._cache = None if place == "off" else PixelCache(shapes, place, self._cache_folder)
        device = "gpu" if self._gpu else "cpu"
        self._on_gpu = self._gpu and place in ("gpu", "off")  # decoded images, that is
        self._padded = place == "gpu"
        self._stream = torch.cuda.Stream() if self._gpu else None
        common = {
            "batch_size": self.batch_size * len(VIEWS),
            "num_threads": self._threads,
            "device_id": torch.cuda.current_device() if self._gpu else None,
            "prefetch_queue_depth": 1,
        }
        source = "gpu" if self._on_gpu else "cpu"
        sizing = _sizing(self._size, self.train, device, source, self._padded, **common)
        self._sizer = _Stage(sizing, self._stream)
        self._decoder = _Stage(_decoding(device, self._smaller, **common), self._stream)

    def _held(self, shapes: np.ndarray) -> np.ndarray:
        """Heights and widths that images of `shapes` are decoded to."""
        return np.where(shapes > _ALIASED * self._size, math.ceil(_ROOM * self._size), shapes) if self.train else shapes

    def _choose_cache(self, size: int) -> CacheName:
        room = {"gpu": self._gpu, "processes": self._ranks, "folder": self._cache_folder}
        return choose_cache(self._cache_wanted, size, **room)

    def _shard(self, number: int) -> _Shard:
        if number not in self._shards:
            path, known = self._paths[number], self._known[number]
            try:
                self._shards[number] = _open_shard(path, known["studies"], known["sha256"], path.stat().st_mtime_ns)
            except (OSError, ValueError, struct.error) as error:
                raise self._unreadable(f"{path.name}: {error}") from None
        return self._shards[number]

    def _read(self, studies: np.ndarray) -> _Job:
        """Looks up a batch, and reads from the shards what is not cached."""
        studies = self._places[studies]
        numbers = studies.tolist()
        new, shapes, files, metas = ~self._kept[studies], [], [], {}
        for study, missing in zip(numbers, new.tolist(), strict=True):
            number = bisect(self._starts, study) - 1
            shard, row = self._shard(number), study - self._starts[number]
            shapes.append(shard.shapes[row])
            if missing:
                meta, *views = shard.read(row)
                files += [np.frombuffer(view, np.uint8) for view in views if view]
                if study not in self._texts:
                    metas[study] = _meta(shard.path, meta)
        texts = self._texts if self._keep_texts else {}
        if metas:
            reports = [report for *_, report in metas.values()]
            tokens, lengths = tokenize_reports(self.tokenizer, reports, self.max_tokens)
            for (study, (name, labels, _)), words in zip(metas.items(), tokens.split(lengths.tolist()), strict=True):
                texts[study] = _Text(name, labels, words.numpy())
        return _Job(studies, self._held(np.stack(shapes)), [texts[study] for study in numbers], new, files)

    def _decoded(self, jobs: Iterable[_Job]) -> Iterator[tuple[_Job, Sequence]]:
        try:
            yield from self._decoder.ahead(jobs, self._files)
        except RuntimeError as error:
            lines = (line.strip() for line in str(error).splitlines())
            reason = next((line for line in lines if "rror" not in line and len(line) > 20), "damaged")
            raise self._unreadable(reason[:200]) from None

    def _files(self, job: _Job) -> dict[str, Sequence]:
        """What DALI decodes of a batch."""
        if not self._smaller:
            return {"file": job.files}
        return {"file": job.files, "shape": job.shapes[job.new][job.present[job.new]].astype(np.float32)}

    def _inputs(self, job: _Job, decoded: Sequence, draws: np.ndarray | None) -> dict[str, Sequence]:
        """What DALI makes a batch of. New images go into the cache, and all come out of it again."""
        present = job.present
        shapes = job.shapes[present]
        images = decoded
        if self._cache is not None:
            numbers = (job.studies[:, None] * len(VIEWS) + np.arange(len(VIEWS)))[present]
            with self._streaming():
                new = numbers[np.broadcast_to(job.new[:, None], present.shape)[present]]
                self._cache.put(new, self._arrays(decoded))
                images = self._cache.get(numbers)
            self._kept[job.studies] = True
        inputs: dict[str, Sequence] = {"image": images}
        if self._padded:
            inputs["shape"] = shapes
        if draws is not None:
            inputs |= _augmentation(draws[job.studies][:, _SAME_DRAWS][present], shapes, self._size)
        return inputs

    def _arrays(self, decoded: Sequence) -> Iterator[np.ndarray | Tensor]:
        """The images of a TensorList, where the cache is."""
        if self._gpu and not self._on_gpu and len(decoded):
            decoded = decoded.as_cpu()
        convert = torch.from_dlpack if self._on_gpu else np.asarray
        return (convert(decoded[i]) for i in range(len(decoded)))

    def _assembled(self, job: _Job, images: Sequence) -> StudyBatch:
        present = torch.from_numpy(job.present)
        tokens = torch.from_numpy(np.concatenate([text.tokens for text in job.texts]))
        at = np.flatnonzero(job.present)
        shape = present.numel(), self._size, self._size
        if self._gpu:
            with self._streaming():
                slots = torch.zeros(shape, dtype=torch.uint8, device="cuda")
                if len(at):
                    made = torch.from_dlpack(images.as_tensor())[..., 0]
                    slots.index_copy_(0, torch.from_numpy(at).cuda(), made)
                present, tokens = present.cuda(), tokens.cuda()
            for tensor in (slots, present, tokens):
                tensor.record_stream(torch.cuda.current_stream())
        else:  # NumPy's zeros cost nothing where they are not written over, and their pages are large
            zeros = np.zeros(shape, np.uint8)
            if len(at):
                zeros[at] = np.asarray(images.as_tensor())[..., 0]
            slots = torch.from_numpy(zeros)
        return StudyBatch(
            images=slots.unflatten(0, present.shape),
            present=present,
            tokens=tokens,
            lengths=torch.tensor([len(text.tokens) for text in job.texts]),
            labels=tuple(text.labels for text in job.texts),
            ids=tuple(text.study_id for text in job.texts),
            row=self._epochs.row,
        )

    def _unreadable(self, reason: str) -> DataError:
        root, split = self.root, self.split
        return DataError(f"{root}: a {split} shard cannot be read ({reason}). Prepare the data again.")

    @contextmanager
    def _streaming(self) -> Iterator[None]:
        """On a GPU: within, work does not wait for the training step's, and it is done when this is left, as DALI may
        then write over its memory."""
        with torch.cuda.stream(self._stream):
            yield
        if self._stream is not None:
            self._stream.synchronize()


def _meta(path: Path, content: bytes) -> tuple[str, tuple[str, ...], str]:
    """Identifier, labels and report."""
    try:
        meta = json.loads(content)
        return meta["study_id"], tuple(meta["labels"]), meta["report"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: a study cannot be read ({type(error).__name__}): prepare the data again.") from None
