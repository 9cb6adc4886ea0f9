"""What a task found, in a run's folder: figures as JSON, and beside them the rows that they come from.

evaluation/TASK.json            scores with intervals and chance, what a report shows, data, model, versions
evaluation/TASK.safetensors     the rows of each score, and pictures
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from ..errors import DataError
from ..run import replacing, write_json
from .score import Interval, Score

_FORMAT = 1
FOLDER = "evaluation"


class NotApplicable(DataError):
    """The data or the model have nothing that a task needs; where all tasks are asked for, it is left out."""


@dataclass
class Result:
    """What a task found.

    task: its name.
    scores: the figures; names are unique.
    settings: what it was told; JSON values.
    shown: what a report shows beside them; JSON values. Studies go by their place in the split.
    arrays: pictures and maps that `shown` speaks of, by name.
    about: run, data, versions: filled in by `evaluate`.
    intervals: of scores, by name; computed as they are written.
    """

    task: str
    scores: list[Score]
    settings: dict[str, Any] = field(default_factory=dict)
    shown: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    intervals: dict[str, Interval] = field(default_factory=dict)

    @property
    def on(self) -> str:
        """What it was found on: the name of its folder."""
        data = self.about["data"]
        return f"{data['source']}-{data['split']}-{data['manifest_sha256'][:8]}"

    def score(self, name: str) -> Score:
        """Raises KeyError where there is none of that name."""
        return {score.name: score for score in self.scores}[name]


def write_result(result: Result, run: Path, about: Mapping[str, Any]) -> Path:
    """Write what a task found into a run's folder, in place of what it found there before; the JSON's path.

    Args:
        about: the run, the data and the versions; JSON values.

    Raises:
        ValueError: if two scores have one name.
    """
    if len({score.name for score in result.scores}) < len(result.scores):
        raise ValueError(f"{result.task}: two scores have one name.")
    result.about = dict(about)
    folder = Path(run) / FOLDER / result.on
    folder.mkdir(parents=True, exist_ok=True)
    arrays, scores = {f"picture/{name}": x for name, x in result.arrays.items()}, []
    for number, score in enumerate(result.scores):
        result.intervals[score.name] = found = result.intervals.get(score.name) or score.interval()
        scores.append(
            {
                "name": score.name,
                **found._asdict(),
                "chance": score.chance,
                "rows": len(score.units),
                "patients": len(np.unique(score.patients)),
                "statistic": score.statistic,
            }
        )
        scores[-1] |= {"spread": score.spread} if score.spread is not None else {}
        scores[-1] |= {"lower_is_better": True} if score.lower_is_better else {}
        parts = {**{f"row/{name}": x for name, x in score.rows.items()}, "units": score.units}
        arrays |= {f"score/{number}/{name}": x for name, x in (parts | {"patients": score.patients}).items()}
    content = save({name: np.ascontiguousarray(x) for name, x in arrays.items()})
    with replacing(folder / f"{result.task}.safetensors") as partial:
        partial.write_bytes(content)
    path = folder / f"{result.task}.json"
    written = {"format": _FORMAT, "task": result.task, **about, "settings": result.settings}
    written |= {"scores": scores, "shown": result.shown, "rows_sha256": hashlib.sha256(content).hexdigest()}
    write_json(path, written)
    return path


def read_result(run: Path, task: str) -> Result:
    """What a task found in a run, which was evaluated on one split of one data set.

    Raises:
        DataError: if the task was not run, or on several, or its files are damaged.
    """
    paths = sorted((Path(run) / FOLDER).glob(f"*/{task}.json"))
    if len(paths) != 1:
        there = ", ".join(path.parent.name for path in paths) or "none"
        raise DataError(f"{run} has {task} of {there}: expected that of one data set, by python -m training.evaluate.")
    return _read(paths[0])


def _read(path: Path) -> Result:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        content = path.with_suffix(".safetensors").read_bytes()
        if (found["format"], found.pop("rows_sha256")) != (_FORMAT, hashlib.sha256(content).hexdigest()):
            raise ValueError("the files are of two writes, or of another version")
        arrays = load(content)
        pictures = {name.removeprefix("picture/"): x for name, x in arrays.items() if name.startswith("picture/")}
        result = Result(path.stem, [], found.pop("settings"), found.pop("shown"), pictures)
        for number, score in enumerate(found.pop("scores")):
            of = {n.removeprefix(f"score/{number}/"): x for n, x in arrays.items() if n.startswith(f"score/{number}/")}
            rows = {name.removeprefix("row/"): x for name, x in of.items() if name.startswith("row/")}
            given = (score["chance"], score.get("spread"), score.get("lower_is_better", False))
            result.scores.append(Score(score["name"], score["statistic"], rows, of["units"], of["patients"], *given))
            result.intervals[score["name"]] = Interval(score["value"], score["low"], score["high"])
    except (ValueError, KeyError, TypeError, AttributeError, OSError, SafetensorError) as error:
        raise DataError(f"{path} or what lies beside it is damaged ({type(error).__name__}): evaluate again.") from None
    result.about = found
    return result


def results(run: Path) -> list[Result]:
    """All that was found in this run, by the names of data sets and of tasks.

    Raises:
        DataError: if something is damaged.
    """
    return [_read(path) for path in sorted((Path(run) / FOLDER).glob("*/*.json"))]
