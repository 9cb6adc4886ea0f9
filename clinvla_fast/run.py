"""A run directory: everything that `--resume`, evaluation and a reader need.

config.json, adapters.safetensors    the model, as ClinVLA.from_pretrained reads it
README.md                            the model card: data, sizes, scores, versions
towers/, towers.json                 the towers, where they were made here; what became of every key of their files
run.json                             the resolved settings of the job and the data's manifest hash
metrics.jsonl, tensorboard/          one line a measurement
checkpoints/                         where training stands, the last two; gone when it is done
skipped.jsonl                        batches whose loss or gradient was not finite, by the ids of their studies
summary.json, curves.png             the result
"""

import hashlib
import io
import json
import os
import random
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter

from .errors import DataError
from .model_card import model_card

_KEPT = 2  # checkpoints: the last, and the one before should the last be damaged


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` for a new file or folder; it takes `path`'s place at the end, or vanishes on an error."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        shutil.rmtree(partial) if partial.is_dir() else partial.unlink(missing_ok=True)


def write_json(path: Path, value: dict) -> None:
    with replacing(path) as partial:
        partial.write_text(json.dumps(value, indent=2) + "\n")


class _Lines:
    """A file of JSON, a value a line."""

    def __init__(self, path: Path):
        self.path = path

    def read(self) -> list[dict]:
        """All lines written so far; one cut off by a crash is left out."""
        lines = []
        if self.path.is_file():
            for line in self.path.read_text().splitlines():
                try:
                    lines.append(json.loads(line))
                except ValueError:
                    break
        return lines

    def keep(self, known: int) -> None:
        """Cut off all but the first `known` lines."""
        kept = "".join(json.dumps(line) + "\n" for line in self.read()[:known])
        if self.path.is_file() and self.path.read_text() != kept:
            with replacing(self.path) as partial:
                partial.write_text(kept)

    def append(self, line: dict) -> None:
        with self.path.open("a") as f:
            f.write(json.dumps(line) + "\n")


class Run:
    """The run directory at `path`, which exists.

    What was measured after the last checkpoint is forgotten when a run is opened: it will be measured again.

    Args:
        write: False in all processes but the first: they read, and write nothing.

    Attributes:
        about, use: tables for the model card, by their titles, and the lines that load the model; each checkpoint
            writes the card anew.
        state: the last checkpoint, or None.
        damaged: checkpoints that were passed over, as their content is not what was written.

    Raises:
        DataError: if there are checkpoints and all are damaged.
    """

    def __init__(self, path: Path, write: bool = True):
        self.path = Path(path)
        self._write = write
        self._checkpoints = self.path / "checkpoints"
        self._metrics, self._skipped = _Lines(self.path / "metrics.jsonl"), _Lines(self.path / "skipped.jsonl")
        self.about: dict[str, dict] = {}
        self.use: dict[str, str] = {}
        self.damaged: list[Path] = []
        self._saved = 0
        self.state = self._read_checkpoint()
        if write:
            for killed in self._checkpoints.glob(".*.partial"):
                killed.unlink()
            self._metrics.keep(self.state["metrics"] if self.state else 0)
            self._skipped.keep(self.state["skipped"] if self.state else 0)
        self._opened, self._seconds_before = time.monotonic(), self.state["seconds"] if self.state else 0.0
        self._known_steps = {self.state["stage"]: self.state["step"]} if self.state else {}
        self._boards: dict[str, SummaryWriter] = {}

    @property
    def seconds(self) -> float:
        """Time spent on this run since it was opened, and before its last checkpoint."""
        return self._seconds_before + time.monotonic() - self._opened

    def log(self, stage: str, step: int, **values: float) -> None:
        """Append one line of measurements, and put them on TensorBoard."""
        if not self._write:
            return
        self._metrics.append({"stage": stage, "step": step, **values})
        self.show(stage, step, **values)

    def show(self, stage: str, step: int, **values: float) -> None:
        """Put on TensorBoard alone what is not the same in every run of the same settings, as speeds are."""
        if not self._write:
            return
        if stage not in self._boards:  # a folder each: TensorBoard forgets steps of all curves of a folder
            start = self._known_steps.get(stage, 0) + 1
            self._boards[stage] = SummaryWriter(str(self.path / "tensorboard" / stage), purge_step=start)
        for name, value in values.items():
            self._boards[stage].add_scalar(name, value, step)

    def read_metrics(self) -> list[dict]:
        """All measurements so far."""
        return self._metrics.read()

    def note_skipped(self, stage: str, step: int, ids: list[str]) -> Path:
        """Write down the studies of a batch that was skipped; the file's path."""
        if self._write:
            self._skipped.append({"stage": stage, "step": step, "ids": ids})
        return self._skipped.path

    def save_state(self, stage: str, step: int, **parts) -> None:
        """Write a checkpoint beside the last one, its hash in its name; older and damaged ones go."""
        if not self._write:
            return
        lines = {"metrics": len(self._metrics.read()), "skipped": len(self._skipped.read())}
        self.state = {"stage": stage, "step": step, "seconds": self.seconds, **lines, **parts}
        buffer = io.BytesIO()  # so that a full disk is an OSError that says so, not torch's own
        torch.save(self.state, buffer)
        content = buffer.getbuffer()
        self._checkpoints.mkdir(exist_ok=True)
        self._saved += 1
        name = f"{self._saved:06d}.{stage}-{step:08d}.{hashlib.sha256(content).hexdigest()}.pt"
        with replacing(self._checkpoints / name) as partial, partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        good = [path for path in self._found() if path not in self.damaged]
        for old in (*self.damaged, *good[_KEPT:]):
            old.unlink(missing_ok=True)
        for board in self._boards.values():
            board.flush()
        self.write_card(f"In training: stage {stage}, step {step:,}.")

    def write_card(self, step: str, scores: dict | None = None) -> None:
        """Write the model card: where training stands, in words, and scores; by default the last that were logged."""
        if not self._write:
            return
        if scores is None:
            scored = [line for line in self.read_metrics() if any("/" in name for name in line)]
            scores = {name: value for name, value in scored[-1].items() if "/" in name} if scored else {}
        with replacing(self.path / "README.md") as partial:
            partial.write_text(model_card(self.about, step, scores, **self.use))

    def clear_state(self) -> None:
        self.state = None
        if self._write:
            shutil.rmtree(self._checkpoints, ignore_errors=True)

    def _found(self) -> list[Path]:
        """Checkpoints, the newest first."""
        return sorted(self._checkpoints.glob("[0-9]*.pt"), reverse=True)

    def _read_checkpoint(self) -> dict | None:
        found = self._found()
        for path in found:
            self._saved = max(self._saved, int(path.name.partition(".")[0]))
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest() == path.name.split(".")[-2]:
                return torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
            self.damaged.append(path)
        if found:
            names = ", ".join(path.name.partition(".")[0] for path in found)
            raise DataError(
                f"{self._checkpoints}: all checkpoints are damaged ({names}: their content is not what was written). "
                "Remove them to start this stage again."
            )
        return None

    def close(self) -> None:
        for board in self._boards.values():
            board.close()


def random_states() -> dict:
    """The state of every generator of random numbers that this process has."""
    numpy = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": (numpy[0], torch.from_numpy(numpy[1].copy()), *numpy[2:]),
    }


def set_random_states(states: dict) -> None:
    """The opposite of `random_states`. On another number of GPUs theirs stay as they are."""
    torch.set_rng_state(states["torch"])
    if len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
    version, inner, gauss = states["python"]
    random.setstate((version, tuple(inner), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy(), *rest))
