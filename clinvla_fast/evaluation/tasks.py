"""The tasks of `training.evaluate`, by name: each takes a Subject and gives a Result. To add one, add a line here."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Literal

from .result import Result
from .subject import Subject

TaskName = Literal[
    "retrieval", "zero-shot", "grounding", "reconstruction", "collapse", "modality-bias", "adapter-depth"
]
_HOME = {
    "retrieval": "retrieval",
    "zero-shot": "zero_shot",
    "grounding": "grounding",
    "reconstruction": "reconstruction",
    "collapse": "probes",
    "modality-bias": "probes",
    "adapter-depth": "probes",
}


@dataclass(frozen=True)
class Options:
    """What tasks can be told."""

    prompts: Path | None = None
    """Of zero-shot and grounding: a TOML file of what stands for each class. None: those that come with the package."""
    rerank: int = 0
    """Of retrieval: this many of each query's best candidates are ordered anew by local alignment; 0 leaves it out."""
    queries: int | None = None
    """Of retrieval: at most this many queries, spread evenly over the split. None: all."""
    seed: int = 0
    """Of what is drawn: masks, mismatched pairs."""


def task(name: str) -> Callable[[Subject, Options], Result]:
    """The function that runs a task: `evaluate_NAME` of its module."""
    module = import_module(f".{_HOME[name]}", __package__)
    return getattr(module, f"evaluate_{name.replace('-', '_')}")
