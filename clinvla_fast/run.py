"""A run directory: everything that `--resume`, evaluation and a reader need.

config.json, adapters.safetensors    the model, as ClinVLA.from_pretrained reads it
towers/                              the towers, where they were made here
run.json                             the resolved settings of the job and the data's manifest hash
metrics.jsonl, tensorboard/          one line a measurement
state.pt                             where training stands; gone when it is done
summary.json, curves.png             the result
"""

import io
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter

from .errors import DataError


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


class Run:
    """The run directory at `path`, which exists.

    Metrics measured after the last saved state are forgotten when a run is opened: they will be measured again.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self._metrics = self.path / "metrics.jsonl"
        self._state = self.path / "state.pt"
        self.state = self._read_state()
        lines = self.read_metrics()
        known = self.state["metrics"] if self.state else 0
        if len(lines) > known:
            with replacing(self._metrics) as partial:
                partial.write_text("".join(json.dumps(line) + "\n" for line in lines[:known]))
        self._lines = min(known, len(lines))
        self._opened, self._seconds_before = time.monotonic(), self.state["seconds"] if self.state else 0.0
        self._board = SummaryWriter(str(self.path / "tensorboard"))

    @property
    def seconds(self) -> float:
        """Time spent on this run since it was opened, and before its last saved state."""
        return self._seconds_before + time.monotonic() - self._opened

    def log(self, stage: str, step: int, **values: float) -> None:
        """Append one line of measurements, and put them on TensorBoard."""
        with self._metrics.open("a") as f:
            f.write(json.dumps({"stage": stage, "step": step, **values}) + "\n")
        self._lines += 1
        for name, value in values.items():
            self._board.add_scalar(f"{stage}/{name}", value, step)

    def read_metrics(self) -> list[dict]:
        """All lines written so far; one cut off by a crash is left out."""
        lines = []
        if self._metrics.is_file():
            for line in self._metrics.read_text().splitlines():
                try:
                    lines.append(json.loads(line))
                except ValueError:
                    break
        return lines

    def save_state(self, stage: str, step: int, **parts) -> None:
        """Put down where training stands, in place of what was put down before."""
        self.state = {"stage": stage, "step": step, "metrics": self._lines, "seconds": self.seconds, **parts}
        buffer = io.BytesIO()  # so that a full disk is an OSError that says so, not torch's own
        torch.save(self.state, buffer)
        with replacing(self._state) as partial:
            partial.write_bytes(buffer.getbuffer())

    def clear_state(self) -> None:
        self.state = None
        self._state.unlink(missing_ok=True)

    def _read_state(self) -> dict | None:
        if not self._state.is_file():
            return None
        try:
            return torch.load(self._state, weights_only=True)
        except Exception as error:  # a damaged file makes torch and pickle raise anything
            raise DataError(
                f"{self._state} is damaged ({type(error).__name__}): remove it to start this stage again."
            ) from None

    def close(self) -> None:
        self._board.close()
