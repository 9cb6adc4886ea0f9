"""What is evaluated: a run's model on a split of a prepared data set, embedded once for all tasks."""

import hashlib
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..collection import model_sha256
from ..data.loader import StudyLoader
from ..data.shards import Study, read_manifest, read_studies
from ..errors import DataError
from ..machine import peak_memory
from ..model_card import MAKERS
from ..modeling.model import ClinVLA
from ..study import StudyBatch
from ..versions import versions

Progress = Callable[[int, int], None]
_TIMED = 5


class Embedded(NamedTuple):
    """A split's n studies through a model, in stored order, on the CPU.

    image, text: float32 [n, D], L2-normalised; zero where a study has none.
    has_image, has_text: bool [n]: a view that the model looks at; a word.
    """

    image: Tensor
    text: Tensor
    has_image: np.ndarray
    has_text: np.ndarray

    @property
    def paired(self) -> np.ndarray:
        """The places of studies that have both."""
        return np.flatnonzero(self.has_image & self.has_text)


class Subject:
    """A model and the split that it is evaluated on.

    Args:
        run: the folder of a finished run.
        model: its model.
        root: a folder written by training.prepare.
        split: "train", "validate" or "test".
        progress: called with (studies embedded, studies) as a split goes through the model.

    Attributes:
        manifest: of the data.

    Raises:
        DataError: if the data cannot be read or the split has no studies.
    """

    def __init__(
        self,
        run: Path,
        model: ClinVLA,
        root: Path,
        split: str,
        batch_size: int = 64,
        progress: Progress = lambda done, studies: None,
    ):
        self.run, self.model, self.root, self.split = Path(run), model, Path(root), split
        self.manifest = read_manifest(self.root)
        if split not in self.manifest["counts"]["splits"]:
            there = ", ".join(self.manifest["counts"]["splits"])
            raise DataError(f"{root} has no studies in its {split!r} split: pass --split with one of {there}.")
        self.batch_size, self._progress = batch_size, progress

    @property
    def manifest_sha256(self) -> str:
        return hashlib.sha256((self.root / "manifest.json").read_bytes()).hexdigest()

    def on(self, split: str) -> "Subject | None":
        """The same model on another split of the same data; None where there is none."""
        if split not in self.manifest["counts"]["splits"]:
            return None
        return Subject(self.run, self.model, self.root, split, self.batch_size, self._progress)

    @cached_property
    def studies(self) -> list[Study]:
        """In stored order, without pixels."""
        return list(read_studies(self.root, self.split, images=False))

    @cached_property
    def patients(self) -> np.ndarray:
        """A number for each study's patient, int64 [n]."""
        numbers: dict[str, int] = {}
        return np.array([numbers.setdefault(s.patient_id, len(numbers)) for s in self.studies], np.int64)

    def radiographs(self, places: Iterable[int]) -> dict[int, Study]:
        """The studies at these places, with pixels as they are stored."""
        return radiographs(self.root, self.split, places)

    def batches(self, size: int | None = None) -> Iterator[StudyBatch]:
        """Whole studies as the model takes them, in stored order, on its device.

        Args:
            size: studies a batch.
        """
        loader = StudyLoader(
            self.root,
            self.split,
            self.model.tokenizer,
            image_size=self.model.vision.image_size,
            max_tokens=self.model.max_tokens,
            batch_size=size or self.batch_size,
            device="gpu" if self.model.device.type == "cuda" else "cpu",
        )
        done = 0
        for batch in loader:
            done += len(batch)
            self._progress(done, loader.studies)
            yield batch.to(self.model.device)

    @cached_property
    @torch.inference_mode()
    def embedded(self) -> Embedded:
        """All studies. A study's embeddings do not depend on which batch it is in, but for rounding."""
        parts = []
        for batch in self.batches():
            e = self.model(batch)
            flags = e.image_mask.any(1), e.text_mask.any(1)
            sides = (normalize(x.float(), dim=-1) for x in (e.image_global, e.text_global))
            parts.append([(x * has[:, None]).cpu() for x, has in zip(sides, flags, strict=True)])
            parts[-1] += [has.cpu() for has in flags]
        image, text, has_image, has_text = (torch.cat(column) for column in zip(*parts, strict=True))
        return Embedded(finite(image), finite(text), has_image.numpy(), has_text.numpy())

    @cached_property
    @torch.inference_mode()
    def features(self) -> Tensor:
        """What the image heads see of each study, before any projection: float32 [n, width] on the CPU."""
        return finite(torch.cat([self.model.image_features(batch).float().cpu() for batch in self.batches()]))

    @cached_property
    @torch.inference_mode()
    def encoding(self) -> dict:
        """What encoding whole studies takes on this device, measured on the first batch, the median of a few times;
        and the most memory that this process has held."""
        batch, seconds = next(self.batches()), []
        for _ in range(1 + _TIMED):
            start = time.perf_counter()
            self.model(batch)
            if self.model.device.type == "cuda":
                torch.cuda.synchronize(self.model.device)
            seconds.append(time.perf_counter() - start)
        return {
            "batch_size": len(batch),
            "seconds_per_study": statistics.median(seconds[1:]) / len(batch),
            "peak_memory_bytes": peak_memory(self.model.device),
        }

    def batch_of(self, places: Sequence[int]) -> StudyBatch:
        """The studies at these places as one batch on the model's device, in this order."""
        found: dict[int, StudyBatch] = {}
        wanted, start = set(places), 0
        for batch in self.batches():
            for row, study in enumerate(batch.parts(1)):
                if start + row in wanted:
                    found[start + row] = study
            start += len(batch)
            if len(found) == len(wanted):
                break
        return joined([found[place] for place in places])


def finite(embeddings: Tensor) -> Tensor:
    """The same. Raises DataError if a number among them is not finite: it would have no place in an order."""
    if not embeddings.isfinite().all():
        raise DataError("the model's embeddings are not finite: train it again, or evaluate another one.")
    return embeddings


def read_run_settings(run: Path) -> dict:
    """The settings of a run's job; empty where there is no run.json.

    Raises:
        DataError: if it is damaged.
    """
    path = Path(run) / "run.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))["settings"] if path.is_file() else {}
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path} is damaged: copy the run again, or remove that file.") from None


def radiographs(root: Path, split: str, places: Iterable[int]) -> dict[int, Study]:
    """The studies at these places of a split, with pixels as they are stored."""
    wanted = set(places)
    return dict(zip(sorted(wanted), read_studies(root, split, places=wanted), strict=False))


def about(subject: Subject, seconds: float) -> dict:
    """What a result says of where it comes from. The data's hash is of what was read: the same goes in and out."""
    return {
        "run": subject.run.name,
        "method": read_run_settings(subject.run).get("method"),
        "model_sha256": model_sha256(subject.model),
        "data": {
            "source": subject.manifest["source"],
            "split": subject.split,
            "studies": subject.manifest["counts"]["splits"][subject.split],
            "manifest_sha256": subject.manifest_sha256,
            "root": str(subject.root.resolve()),
        },
        "encoding": subject.encoding,
        "versions": versions(MAKERS),
        "device": str(subject.model.device),
        "seconds": round(seconds, 1),
    }


def joined(parts: Sequence[StudyBatch]) -> StudyBatch:
    """Batches as one, a study after the other; row 0 first."""
    tensors = {
        name: torch.cat([getattr(part, name) for part in parts]) for name in ("images", "present", "tokens", "lengths")
    }
    listed = {name: tuple(x for part in parts for x in getattr(part, name)) for name in ("labels", "ids")}
    return replace(parts[0], **tensors, **listed, row=0)
