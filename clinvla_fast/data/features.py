"""The tokens of frozen encoders, computed once and read in every epoch: Adaptor's feature cache.

    DIR/image.npy, text.npy    the tokens of all studies, one after the other: [tokens, width]; bfloat16 as uint16
    DIR/studies.json           of each study, in stored order: its id, labels, image tokens and words
    DIR/features.json          what they were made of, their dtype, the files' sizes

The folder appears whole or not at all. It takes views x patches x width x 2 bytes a study: 0.6 MB of ViT-B/16's tokens
of two views.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from ..modeling.encoders import ImageEncoder, TextEncoder
from ..modeling.packing import Packing
from ..run import replacing, write_json
from ..study import StudyBatch
from .epochs import Epochs
from .shards import empty_or_absent

if TYPE_CHECKING:  # which needs DALI
    from .loader import StudyLoader

_FORMAT = 1
_SIDES = "image", "text"
_TENSORS, _LISTS = ("image", "image_mask", "text", "text_mask"), ("labels", "ids")
_STORED = {"float16": np.float16, "bfloat16": np.uint16, "float32": np.float32}  # NumPy knows no bfloat16


@dataclass(frozen=True)
class FeatureBatch:
    """B studies as tokens of frozen encoders, float in whatever dtype they are stored.

    image: [B, N, image width], of all present views, one after the other; image_mask: bool [B, N].
    text: [B, T, text width], of words, without CLS and SEP; text_mask: bool [B, T].
    labels: the findings of each study, the primary one first.
    ids: the study identifiers.

    Where a mask is False there is no token: the value means nothing.
    """

    image: Tensor
    image_mask: Tensor
    text: Tensor
    text_mask: Tensor
    labels: tuple[tuple[str, ...], ...] = ()
    ids: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.image)

    def to(self, device) -> FeatureBatch:
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in _TENSORS})

    def paired(self) -> FeatureBatch:
        """The studies that have both a view and a word: the others have nothing to align."""
        keep = self.image_mask.any(1) & self.text_mask.any(1)
        kept = keep.nonzero().flatten().tolist()
        if len(kept) == len(self):
            return self
        tensors = {name: getattr(self, name)[keep] for name in _TENSORS}
        lists = {name: tuple(found[i] for i in kept) for name in _LISTS if (found := getattr(self, name))}
        return FeatureBatch(**tensors, **lists)


def stored_dtype(computed: torch.dtype) -> torch.dtype:
    """What tokens that were computed in a dtype are stored in."""
    return torch.float16 if computed == torch.float32 else computed


def view_tokens(images: Tensor, present: Tensor, image_encoder: ImageEncoder) -> tuple[Tensor, Tensor]:
    """The tokens of each study's present views, one after the other, and where there is one: as in FeatureBatch.

    Args: images and present as in StudyBatch.
    """
    tokens = image_encoder(images[present])
    packing = Packing.of(present.sum(1).cpu() * image_encoder.patches, tokens.device)
    return packing.pad(tokens.flatten(0, 1)), packing.mask


def encode_features(batch: StudyBatch, image_encoder: ImageEncoder, text_encoder: TextEncoder) -> FeatureBatch:
    """What the cache holds of a batch, computed now and in the encoders' dtypes.

    Args:
        batch: where the encoders are; images of the size, reports of at most the length that they read.

    Raises:
        ValueError: if an encoder does not read such images or reports.
    """
    image = view_tokens(batch.images, batch.present, image_encoder)
    return FeatureBatch(*image, *text_encoder(batch.tokens, batch.lengths), batch.labels, batch.ids)


def write_features(
    loader: StudyLoader,
    image_encoder: ImageEncoder,
    text_encoder: TextEncoder,
    out: Path,
    dtype: torch.dtype = torch.float16,
    progress: Callable[[int, int], None] = lambda done, studies: None,
) -> None:
    """Encode every study of a loader, batch by batch, into the folder `out`; memory stays flat.

    Killed at any time, it leaves no folder that could be opened; finished, it does nothing. One process writes at a
    time.

    Args:
        loader: a new one, of one process, with train=False: films as they are, in stored order. Its image size and
            tokens are the encoders'.
        dtype: float16, bfloat16 or float32.
        progress: called with (studies done, studies).

    Raises:
        DataError: if `out` is taken or was made of something else (see `check_features`), or a token is not finite in
            `dtype`.
        ValueError: if the loader augments or does not give every study.
        OSError: if the disk is full or `out` cannot be written.
    """
    out = Path(out)
    about = _identity(loader, image_encoder, text_encoder, dtype)
    if (out / "features.json").is_file():
        return check_features(out, loader, image_encoder, text_encoder, dtype)
    if loader.train:
        raise ValueError("features are made of films as they are: expected a loader with train=False.")
    empty_or_absent(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    widths = {"image": image_encoder.width, "text": text_encoder.width}
    studies: dict[str, list] = {"ids": [], "labels": [], "image": [], "text": []}
    with replacing(out) as partial:
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
        partial.mkdir()
        with (partial / "image.npy").open("wb") as image, (partial / "text.npy").open("wb") as text:
            files = {"image": image, "text": text}
            for side in _SIDES:
                _write_header(files[side], 0, widths[side], dtype)
            for batch in loader:
                features = encode_features(batch.to(image_encoder.device), image_encoder, text_encoder)
                for side in _SIDES:
                    mask = getattr(features, f"{side}_mask")
                    rows = getattr(features, side)[mask].to(dtype)
                    if not rows.isfinite().all():
                        raise DataError(f"the {side} tower gives tokens that are not finite in {dtype}: pass another.")
                    files[side].write(rows.cpu().contiguous().view(torch.uint8).numpy())
                    studies[side] += mask.sum(1).tolist()
                studies["ids"] += batch.ids
                studies["labels"] += batch.labels
                progress(len(studies["ids"]), loader.studies)
            if len(studies["ids"]) != loader.studies:
                raise ValueError(f"the loader gave {len(studies['ids'])} of {loader.studies} studies: expected all.")
            for side in _SIDES:
                _write_header(files[side], sum(studies[side]), widths[side], dtype)
        (partial / "studies.json").write_text(json.dumps(studies), encoding="utf-8")
        sizes = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
        towers = {"image_encoder": image_encoder.name, "text_encoder": text_encoder.name}
        write_json(partial / "features.json", about | towers | {"widths": widths, "files": sizes})


def check_features(
    folder: Path,
    loader: StudyLoader,
    image_encoder: ImageEncoder,
    text_encoder: TextEncoder,
    dtype: torch.dtype = torch.float16,
) -> None:
    """Make sure that the features in `folder` are what `write_features` would write there.

    Raises:
        DataError: if they are of other data, another split, tower, length of reports or dtype, or are damaged.
    """
    found = read_features(folder)
    for name, expected in _identity(loader, image_encoder, text_encoder, dtype).items():
        if found.get(name) != expected:
            what = name.removesuffix("_sha256").replace("_", " ")
            raise DataError(
                f"{folder} was made with another {what} ({str(found.get(name))[:12]}, here {str(expected)[:12]}): "
                "remove it, or pass another folder."
            )


def read_features(folder: Path) -> dict:
    """What a feature cache says of itself: features.json, once its files are known to be whole.

    Raises:
        DataError: if it is not there, of another version, or a file has another size than it was written with.
    """
    path = Path(folder) / "features.json"
    if not path.is_file():
        raise DataError(f"{folder} holds no features.json: pass a folder that features were written to.")
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        if about["format"] != _FORMAT:
            raise ValueError(f"format {about['format']!r}, expected {_FORMAT}")
        for name, size in about["files"].items():
            if (path.parent / name).stat().st_size != size:
                raise ValueError(f"{name} is not of the {size} bytes that were written")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder}: features cannot be read ({error}): remove it and write them again.") from None
    return about


class FeatureLoader:
    """Batches of a feature cache, in the protocol of StudyLoader.

    In training every epoch has its own random order, from the seed and the epoch alone, and the last, smaller batch is
    left out; otherwise the stored order is kept and every study comes once.

    Args:
        folder: written by `write_features`.
        batch_size, checkpoint, rank, ranks: as of StudyLoader.

    about is what features.json says; studies, how many there are.

    Raises:
        DataError: if the cache cannot be read, has fewer studies than one training batch, or the checkpoint is of
            another job.
    """

    def __init__(
        self,
        folder: Path,
        batch_size: int,
        train: bool = False,
        seed: int = 0,
        checkpoint: str | None = None,
        rank: int = 0,
        ranks: int = 1,
    ):
        folder = Path(folder)
        self.about = read_features(folder)
        self.batch_size, self.train = batch_size, train
        try:
            index = json.loads((folder / "studies.json").read_text(encoding="utf-8"))
            self._ids, self._labels = index["ids"], [tuple(found) for found in index["labels"]]
            self._stops = {side: np.cumsum(index[side], dtype=np.int64) for side in _SIDES}
            self._rows = {side: np.load(folder / f"{side}.npy", mmap_mode="r") for side in _SIDES}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{folder}: features cannot be read ({error}): remove it and write them again.") from None
        self._dtype = getattr(torch, self.about["dtype"])
        self.studies = len(self._ids)
        place = {"train": train, "seed": seed, "checkpoint": checkpoint, "rank": rank, "ranks": ranks}
        self._epochs = Epochs(folder, self.studies, batch_size, **place)

    def __len__(self) -> int:
        """Batches an epoch, of this process."""
        return len(self._epochs)

    def __iter__(self) -> Iterator[FeatureBatch]:
        """One epoch; or, in the first call after a checkpoint taken within one, what is left of it."""
        with ThreadPoolExecutor(1) as pool:  # reads a batch while the one before is used
            ahead = None
            for studies in chain(self._epochs.batches()[0], [None]):
                made, ahead = ahead, None if studies is None else pool.submit(self._read, studies)
                if made is not None:
                    self._epochs.done()
                    yield made.result()
        self._epochs.end()

    def checkpoint(self) -> str:
        """Where the loader stands, for `checkpoint=`: the batches that follow are the same."""
        return self._epochs.checkpoint()

    def _read(self, studies: np.ndarray) -> FeatureBatch:
        tensors = {}
        for side in _SIDES:
            rows, stops = self._rows[side], self._stops[side]
            starts = np.where(studies > 0, stops[studies - 1], 0)
            lengths = stops[studies] - starts
            grid = np.zeros((len(studies), lengths.max(initial=0), rows.shape[1]), rows.dtype)
            for row, start, length in zip(grid, starts, lengths, strict=True):
                row[:length] = rows[start : start + length]
            tensors[side] = torch.from_numpy(grid).view(self._dtype)
            tensors[f"{side}_mask"] = torch.from_numpy(np.arange(grid.shape[1]) < lengths[:, None])
        labels, ids = (tuple(of[i] for i in studies.tolist()) for of in (self._labels, self._ids))
        return FeatureBatch(**tensors, labels=labels, ids=ids)


def _identity(loader: StudyLoader, image: ImageEncoder, text: TextEncoder, dtype: torch.dtype) -> dict:
    """All that decides what is in the files."""
    return {
        "format": _FORMAT,
        "data_sha256": hashlib.sha256((loader.root / "manifest.json").read_bytes()).hexdigest(),
        "split": loader.split,
        "image_tower_sha256": image.sha256,
        "text_tower_sha256": text.sha256,
        "max_tokens": loader.max_tokens,
        "dtype": str(dtype).removeprefix("torch."),
    }


def _write_header(file: BinaryIO, rows: int, width: int, dtype: torch.dtype) -> None:
    """A .npy file's, which is as long whatever `rows` is: NumPy leaves room for them to grow."""
    stored = np.dtype(_STORED[str(dtype).removeprefix("torch.")])
    about = {"descr": np.lib.format.dtype_to_descr(stored), "fortran_order": False, "shape": (rows, width)}
    file.seek(0)
    np.lib.format.write_array_header_1_0(file, about)
