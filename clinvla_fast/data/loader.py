"""Shards to batches: DALI reads, decodes and augments, on the CPU or on a GPU; the report is tokenised beside it."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.plugin.pytorch import DALIGenericIterator, LastBatchPolicy
from transformers import PreTrainedTokenizerFast

from ..errors import DataError
from ..study import VIEWS, StudyBatch
from .shards import read_manifest, shard_paths
from .tokenizer import tokenize_reports

_NAMES = ["meta", *VIEWS, *(f"{view}_present" for view in VIEWS)]
_SHUFFLE_BUFFER = 1024


@pipeline_def(enable_conditionals=True, enable_checkpointing=True)
def _pipeline(shards: list[str], image_size: int, train: bool, device: str):
    meta, *files = fn.readers.webdataset(
        paths=shards,
        index_paths=[str(Path(path).with_suffix(".idx")) for path in shards],
        ext=["json", *(f"{view}.jpg" for view in VIEWS)],
        missing_component_behavior="empty",
        random_shuffle=train,
        initial_fill=_SHUFFLE_BUFFER,
        name="reader",
    )
    images, present = [], []
    for file in files:
        has = file.shape()[0] > 0
        if has:
            image = (
                _augmented(_decoded(file, device), image_size) if train else _plain(_decoded(file, device), image_size)
            )
        else:
            image = types.Constant(np.zeros((image_size, image_size, 1), np.uint8), layout="HWC", device=device)
        images.append(image)
        present.append(has)
    return (fn.pad(meta, fill_value=ord(" ")), *images, *present)


def _decoded(file, device: str):
    return fn.decoders.image(file, device="mixed" if device == "gpu" else "cpu", output_type=types.GRAY)


def _plain(image, size: int):
    """The whole image at the tower's size, its aspect ratio given up as the paper does."""
    return fn.resize(image, size=(size, size), interp_type=types.INTERP_LINEAR, antialias=True)


def _augmented(image, size: int):
    """What a film may do by itself: a small turn, shift, zoom, another exposure. Never a flip: it moves the heart."""
    uniform = fn.random.uniform
    stored = image.shape()
    height, width = fn.cast(stored[0], dtype=types.FLOAT), fn.cast(stored[1], dtype=types.FLOAT)
    # From stored pixels to the unit square, turned and shifted there, and on to the tower's size: one resampling.
    matrix = fn.transforms.scale(scale=fn.stack(1.0 / width, 1.0 / height))
    matrix = fn.transforms.rotation(matrix, angle=uniform(range=(-4.0, 4.0)), center=(0.5, 0.5))
    matrix = fn.transforms.scale(matrix, scale=uniform(range=(1.0, 1.1), shape=2), center=(0.5, 0.5))
    matrix = fn.transforms.translation(matrix, offset=uniform(range=(-0.03, 0.03), shape=2))
    matrix = fn.transforms.scale(matrix, scale=(float(size), float(size)))
    image = fn.warp_affine(image, matrix=matrix, size=(size, size), inverse_map=False, fill_value=0)
    return fn.brightness_contrast(image, brightness=uniform(range=(0.9, 1.1)), contrast=uniform(range=(0.9, 1.1)))


class StudyLoader:
    """Batches of one split of a prepared data set.

    In training the order is shuffled anew each epoch, the images are augmented and the last, smaller batch is left
    out; otherwise the stored order is kept and every study comes once. The same seed gives the same batches.

    Args:
        root: a folder written by training.prepare.
        split: "train", "validate" or "test".
        device: "cpu", or "gpu" to decode and augment there.

    Raises:
        DataError: if the data set or the split cannot be read, or has fewer studies than one training batch.
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
    ):
        shards = shard_paths(root, split)
        sizes = {shard["file"]: shard["studies"] for shard in read_manifest(root)["shards"]}
        self.studies = sum(sizes[path.name] for path in shards)
        if train and self.studies < batch_size:
            raise DataError(f"{root} has {self.studies} training studies: expected at least one batch of {batch_size}.")
        self.tokenizer, self.max_tokens, self.batch_size, self.train = tokenizer, max_tokens, batch_size, train
        pipeline = _pipeline(
            shards=[str(path) for path in shards],
            image_size=image_size,
            train=train,
            device=device,
            batch_size=batch_size,
            num_threads=threads,
            device_id=torch.cuda.current_device() if device == "gpu" else None,
            seed=seed,
            checkpoint=checkpoint,
        )
        policy = LastBatchPolicy.DROP if train else LastBatchPolicy.PARTIAL
        try:
            self._batches = DALIGenericIterator(
                [pipeline], _NAMES, reader_name="reader", last_batch_policy=policy, auto_reset=True
            )
        except RuntimeError as error:
            raise _unreadable(root, split, error) from None
        self._where = root, split

    def __len__(self) -> int:
        """Batches an epoch."""
        return self.studies // self.batch_size if self.train else math.ceil(self.studies / self.batch_size)

    def __iter__(self) -> Iterator[StudyBatch]:
        """One epoch; or, in the first call after a checkpoint taken within one, what is left of it."""
        while True:
            try:
                outputs = next(self._batches)[0]
            except StopIteration:
                return
            except RuntimeError as error:
                raise _unreadable(*self._where, error) from None
            yield self._batch(outputs)

    def _batch(self, outputs: dict[str, torch.Tensor]) -> StudyBatch:
        meta = [json.loads(bytes(row)) for row in outputs["meta"].numpy()]
        tokens, lengths = tokenize_reports(self.tokenizer, [m["report"] for m in meta], self.max_tokens)
        images = torch.stack([outputs[view][..., 0] for view in VIEWS], 1)
        return StudyBatch(
            images=images,
            present=torch.stack([outputs[f"{view}_present"].bool().view(-1) for view in VIEWS], 1).to(images.device),
            tokens=tokens.to(images.device),
            lengths=lengths,
            labels=tuple(tuple(m["labels"]) for m in meta),
            ids=tuple(m["study_id"] for m in meta),
        )

    def checkpoint(self) -> str:
        """Where the loader stands, for `checkpoint=`: the batches that follow, and their augmentation, are the same."""
        return self._batches.checkpoints()[0]


def _unreadable(root: Path, split: str, error: RuntimeError) -> DataError:
    reason = next(
        (line.strip() for line in str(error).splitlines() if "rror" not in line and len(line) > 20), "damaged"
    )
    return DataError(f"{root}: a {split} shard cannot be read ({reason[:200]}). Prepare the data again.")
