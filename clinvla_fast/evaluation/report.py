"""What was found about some runs, as one page to look at and one file of the same figures; several runs side by side.

The page needs no network, no server and no script. Studies go by their place in the split. Their films and reports are
read from the data that the results were made on, where these are still there: the page may go where the data may.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined

from ..data.shards import Study, read_manifest
from ..errors import DataError
from ..run import Run, replacing, write_json
from ..study import VIEWS
from . import pictures
from .curves import curve_pictures
from .result import Result, results
from .score import Interval, Score
from .subject import radiographs

_FORMAT = 1
# Tasks in their order on the page, and what tells most of each: scores whose names end so. Of others, the first score.
_HEADLINE: dict[str, tuple[str, ...]] = {
    "retrieval": ("precision@5", "recall@10"),
    "zero-shot": ("macro AUC", "multi-class accuracy"),
    "grounding": (),
    "reconstruction": ("error added by training",),
    "linear-probe": ("macro AUC",),
    "classification": ("macro AUC",),
    "temporal": (),
    "segmentation": (),
    "modality-bias": ("own report before another patient's",),
    "collapse": ("variance",),
    "adapter-depth": (),
}
_BY_SHARE = ("linear-probe", "classification", "segmentation")  # the headline has the largest share of the labels


def write_report(runs: Sequence[Path], out: Path) -> None:
    """Write `out`, an HTML page of all that was found about these runs, and a JSON file of its figures beside it.

    With several runs each figure of the others comes with its difference to the first run that has it, over the same
    draws of the same patients.

    Raises:
        DataError: if a run was not evaluated, results are damaged, a run was evaluated on nothing that the first was
            evaluated on, or `out` is no .html.
        OSError: if `out` cannot be written.
    """
    out = Path(out)
    check_out(out)
    compared = [_Evaluated(Path(run), name) for run, name in zip(runs, names_of(runs), strict=True)]
    sections = _sections(compared)
    figures = _figures(compared, sections)
    page = _page(figures, compared, sections)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out.with_suffix(".json"), figures)
    with replacing(out) as partial:
        partial.write_text(page, encoding="utf-8")


def check_out(out: Path) -> None:
    """Raises DataError if no report can be written to `out`."""
    if out.suffix.lower() != ".html":
        raise DataError(f"{out}: the name of a report ends in .html.")


@dataclass
class _Evaluated:
    """A run and all that was found about it."""

    path: Path
    name: str

    def __post_init__(self):
        if not self.path.is_dir():
            raise DataError(f"{self.path}: no such folder, expected that of a finished python -m training.pretrain.")
        self.results = results(self.path)
        if not self.results:
            raise DataError(
                f"{self.path} was not evaluated, expected results in its folder evaluation/: "
                f"run python -m training.evaluate {self.path}"
            )
        models: dict[str | None, list[str]] = {}
        for result in self.results:
            models.setdefault(result.about.get("model_sha256"), []).append(f"{result.on}/{result.task}")
        if len(models) > 1:
            old = ", ".join(names[0] for names in models.values())
            raise DataError(
                f"{self.path} was evaluated as different models (see {old}): it was trained again in between. Remove "
                "the older results in its folder evaluation/, or evaluate those tasks again."
            )

    def read(self, name: str) -> dict:
        """A JSON file of the run's; empty where there is none."""
        path = self.path / name
        try:
            return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        except ValueError:
            raise DataError(f"{path} is not valid JSON: it was damaged after training.") from None

    @cached_property
    def settings(self) -> dict[str, Any]:
        return dict(_flat(self.read("run.json").get("settings", {})))

    @cached_property
    def curves(self) -> list[tuple[str, str, str]]:
        """Title, and the picture on a light and on a dark page."""
        metrics = Run(self.path, write=False).read_metrics()
        light, dark = (curve_pictures(metrics, dark=dark) for dark in (False, True))
        return [(title, pictures.drawing(light[title]), pictures.drawing(dark[title])) for title in light]

    @cached_property
    def cost(self) -> dict[str, float]:
        """Counted before training, and measured as it was evaluated."""
        summary, measured = self.read("summary.json"), self.results[0].about.get("encoding", {})
        memory = [result.about.get("encoding", {}).get("peak_memory_bytes") for result in self.results]
        sizes = summary.get("params", {})
        found = {
            "parameters": sizes.get("total"),
            "trained parameters": sizes.get("trainable"),
            "trained share": sizes["trainable"] / sizes["total"] if sizes else None,
            "FLOPs to encode a study": summary.get("flops_per_sample"),
            "FLOPs to train on a study": summary.get("flops_per_training_sample"),
            "FLOPs of a training step": summary.get("flops_per_step"),
            "training, seconds": summary.get("seconds"),
            "encoding, seconds a study": measured.get("seconds_per_study"),
            "encoding, studies at a time": measured.get("batch_size"),
            "most memory while evaluating, bytes": max(filter(None, memory), default=None),
        }
        return {name: value for name, value in found.items() if value is not None}


def names_of(runs: Sequence[Path]) -> list[str]:
    """What each run is called: its folder's name, with as many folders above it as tell them apart."""
    if not runs:
        raise DataError("expected the folder of an evaluated run, or several to compare.")
    paths = [Path(run).resolve() for run in runs]
    if len(set(paths)) != len(paths):
        raise DataError("the same run is named twice: expected different ones to compare.")
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def _sections(compared: Sequence[_Evaluated]) -> dict[str, dict[str, Result]]:
    """By title the results of a task on one split of one data set, of each run that has one.

    Raises:
        DataError: if a run has nothing in common with the first.
    """
    found: dict[tuple[str, str], dict[str, Result]] = {}
    for one in compared:
        for result in one.results:
            found.setdefault((result.task, result.on), {})[one.name] = result
    first, *others = compared
    for one in others:
        if not any(first.name in of and one.name in of for of in found.values()):
            on = [", ".join(sorted({result.on for result in run.results})) for run in (one, first)]
            raise DataError(
                f"{one.name} and {first.name} were evaluated on different data, or by different tasks ({on[0]} and "
                f"{on[1]}): evaluate both by the same --task, with the same --data and --split, to compare them."
            )
    known, times = list(_HEADLINE), Counter(task for task, _ in found)
    order = sorted(found, key=lambda key: (known.index(key[0]) if key[0] in known else len(known), key))
    return {task if times[task] == 1 else f"{task}, {on}": found[task, on] for task, on in order}


def _figures(compared: Sequence[_Evaluated], sections: dict[str, dict[str, Result]]) -> dict[str, Any]:
    """All that the JSON file says, which is all figures that the page shows."""
    found = {title: _task_figures(of) for title, of in sections.items()}
    headline = [
        {"task": title, "score": score["name"]}
        for title, of in found.items()
        for score in _telling(next(iter(sections[title].values())).task, of["scores"])
    ]
    return {
        "format": _FORMAT,
        "runs": {
            one.name: {
                "method": one.results[0].about.get("method"),
                "trained_on_manifest_sha256": one.read("run.json").get("manifest_sha256"),
                "device": one.results[0].about.get("device"),
                "cost": one.cost,
                "versions": one.results[0].about.get("versions", {}),
            }
            for one in compared
        },
        "headline": headline,
        "tasks": found,
    }


def _telling(task: str, scores: list[dict]) -> list[dict]:
    named = [score for score in scores if score["name"].endswith(_HEADLINE.get(task, ()))]
    if task in _BY_SHARE:
        share = max(scores, key=lambda score: float(score["name"].partition("%")[0]))["name"].partition(",")[0]
        return [score for score in named or scores if score["name"].startswith(f"{share},")]
    return named or scores[:1]


def _task_figures(of: Mapping[str, Result]) -> dict[str, Any]:
    names = list(dict.fromkeys(score.name for result in of.values() for score in result.scores))
    return {
        "data": _data(next(iter(of.values()))),
        "settings": _side_by_side({run: dict(_flat(result.settings)) for run, result in of.items()}),
        "seconds": {run: result.about.get("seconds") for run, result in of.items()},
        "scores": [_score_figures(name, of) for name in names],
        "alarms": {run: alarms for run, result in of.items() if (alarms := result.shown.get("alarms"))},
        "shown": {run: result.shown for run, result in of.items()},
    }


def _data(result: Result) -> dict[str, Any]:
    """What a task was evaluated on, and whether it is still the same."""
    data = dict(result.about["data"])
    root = Path(data.pop("root", ""))
    now = root / "manifest.json"
    data["manifest_sha256_now"] = hashlib.sha256(now.read_bytes()).hexdigest() if now.is_file() else None
    if data["manifest_sha256_now"] == data["manifest_sha256"]:
        data["counts"] = read_manifest(root)["counts"]
    return data


def _score_figures(name: str, of: Mapping[str, Result]) -> dict[str, Any]:
    having = {run: (score, result) for run, result in of.items() for score in result.scores if score.name == name}
    (first, (base, _)), *_ = having.items()
    found: dict[str, Any] = {}
    for run, (score, result) in having.items():
        found[run] = {
            **result.intervals[name]._asdict(),
            "chance": score.chance,
            "spread": score.spread,
            "rows": len(score.units),
            "patients": len(np.unique(score.patients)),
        }
        found[run]["beyond_chance"] = _better(score, _shifted(result.intervals[name], score.chance))
        found[run]["difference"] = _difference(score, base) | {"to": first} if run != first else None
    return {"name": name, "statistic": base.statistic, "lower_is_better": base.lower_is_better, "runs": found}


def _shifted(interval: Interval, by: float | None) -> Interval:
    return Interval(*(None if x is None or by is None else x - by for x in interval))


def _better(score: Score, gain: Interval) -> bool | None:
    """Whether an interval of gains lies on the good side of 0; None where it holds 0 or there is none, False where it
    lies on the bad side."""
    if gain.low is None or gain.low <= 0 <= gain.high:
        return None
    return (gain.low > 0) != score.lower_is_better


def _difference(score: Score, base: Score) -> dict[str, Any]:
    try:
        found = score.difference(base)
    except ValueError:  # nothing in common, or another statistic
        found = Interval(None, None, None)
    return found._asdict() | {"better": _better(score, found)}


def _flat(value: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings under their names in one, with dots between."""
    for name, inner in value.items():
        if isinstance(inner, Mapping):
            yield from _flat(inner, f"{above}{name}.")
        else:
            yield f"{above}{name}", inner


def _side_by_side(of: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """By name what each run has under it."""
    names = dict.fromkeys(name for values in of.values() for name in values)
    return {name: {run: values.get(name) for run, values in of.items()} for name in names}


class _Films:
    """Studies of the data that results were made on, while these are there."""

    def __init__(self):
        self.missing: set[str] = set()

    def of(self, result: Result, places: Sequence[int]) -> dict[int, Study]:
        """The studies at these places; none where the data are gone or are no longer the same."""
        data = result.about["data"]
        manifest = Path(data.get("root", "")) / "manifest.json"
        try:
            if hashlib.sha256(manifest.read_bytes()).hexdigest() == data["manifest_sha256"]:
                return radiographs(manifest.parent, data["split"], places)
        except (OSError, DataError):
            pass
        self.missing.add(result.task)
        return {}


def _blocks(of: Mapping[str, Result], films: _Films) -> Iterator[dict[str, Any]]:
    """What the page shows beside a task's figures: galleries of all runs together, the rest a run after the other."""
    if galleries := {run: result.shown["galleries"] for run, result in of.items() if result.shown.get("galleries")}:
        yield {"kind": "gallery", "ways": _gallery(of, galleries, films)}
    for run, result in of.items():
        of_run, others = f" ({run})" if len(of) > 1 else "", {}
        for name, value in result.shown.items():
            title = _words(name) + of_run
            if examples := _examples(result, value, films):
                heated = any(_is_map(array) for array in result.arrays.values())
                yield {"kind": "pictures", "title": title, "examples": examples, "heated": heated}
            elif curves := _roc(value):
                yield {"kind": "roc", "title": f"ROC curves of {title}", "curves": curves}
                others[name] = {key: {k: v for k, v in of.items() if k != "roc"} for key, of in value.items()}
            elif name not in ("galleries", "alarms"):
                others[name] = value
        yield from _tables(others, of_run)


def _gallery(of: Mapping[str, Result], galleries: Mapping[str, list], films: _Films) -> dict[str, list[dict[str, Any]]]:
    """By way the queries, one of each label first, each with the best results of every run, as in figures 3 and 4 of
    the ClinVLA paper."""
    asked = [one for gallery in galleries.values() for one in gallery]
    places = {place for one in asked for place in (one["query"], *(hit["place"] for hit in one["results"]))}
    studies = films.of(next(iter(of.values())), {place for place in places if isinstance(place, int)})
    ways: dict[str, dict[tuple, dict[str, Any]]] = {}
    for run, gallery in galleries.items():
        for one in gallery:
            given, _, wanted = one["way"].partition(" to ")
            query = {"label": one.get("label"), "card": _card(one["query"], studies, given), "rows": {}}
            query = ways.setdefault(one["way"], {}).setdefault((str(one["query"]), one.get("label")), query)
            query["rows"][run] = [_card(hit["place"], studies, wanted) | hit for hit in one["results"]]
    return {way: _in_turns(list(queries.values())) for way, queries in ways.items()}


def _in_turns(labelled: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first of each label, then the second of each."""
    turns, seen = [], Counter()
    for one in labelled:
        turns.append(seen[one["label"]])
        seen[one["label"]] += 1
    return [labelled[i] for i in sorted(range(len(labelled)), key=turns.__getitem__)]


def _card(place: int | str, studies: Mapping[int, Study], side: str) -> dict[str, Any]:
    """A study as a query or a result: its film or its words.

    Args:
        place: in its split; or words that are of no study.
        side: "image" or "text".
    """
    card: dict[str, Any] = {"place": place, "labels": "", "words": "", "picture": None, "alt": ""}
    if not isinstance(place, int):
        return card | {"place": None, "words": place}
    if study := studies.get(place):
        card["labels"] = _labels(study)
        view = next((view for view in VIEWS if view in study.images), None)
        if side == "text" or not view:
            card["words"] = study.report or "no report"
        else:
            card |= {"picture": pictures.film(study.images[view]), "alt": _alt(view, place, study)}
    return card


def _labels(study: Study) -> str:
    return ", ".join(study.labels) or "no label"


def _alt(view: str, place: int, study: Study) -> str:
    return f"{_words(view)} view of study {place}, {_labels(study)}"


def _examples(result: Result, value: Any, films: _Films) -> list[dict[str, Any]]:
    """Examples that name arrays of the result: each with their pictures, and what else is said of it in words; the
    first of each label first.

    uint8 [height, width] or [height, width, 3] is a picture. float32 [views, rows, columns] is a map over each view, in
    the order of VIEWS, of the study at "place"; "boxes", [left, top, width, height] each, are of its "view".
    """
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        return []
    known = result.arrays
    arrays = [{k: known[v] for k, v in one.items() if isinstance(v, str) and v in known} for one in value]
    if not any(arrays):
        return []
    mapped = [one["place"] for one, named in zip(value, arrays, strict=True) if _is_map(*named.values())]
    studies = films.of(result, mapped) if mapped else {}
    found = []
    for one, named in zip(value, arrays, strict=True):
        place, label = one.get("place", one.get("study")), one.get("label")
        shown = []
        for name, array in named.items():
            if not _is_map(array):
                alt = f"{_words(name)}, {_of_study(label, place)}"
                shown.append({"picture": pictures.film(array), "alt": alt, "caption": _words(name)})
            elif place in studies:
                shown += _maps(studies[place], one, array)
        known_keys = (*named, "place", "study", "label", "boxes")
        marks = {"yes": "✓ yes", "no": "✗ no", True: "✓ yes", False: "✗ no"}
        said = {key: marks.get(x, x) if isinstance(x, str | bool) else x for key, x in one.items()}
        words = ", ".join(f"{_words(key)}: {_figure(x)}" for key, x in said.items() if key not in known_keys)
        found.append({"title": _of_study(label, place), "label": label, "pictures": shown, "words": words})
    return _in_turns(found)


def _is_map(*arrays: np.ndarray) -> bool:
    return any(array.dtype == np.float32 and array.ndim == 3 for array in arrays)


def _of_study(label: str | None, place: int | None) -> str:
    return ", ".join(filter(None, (label, None if place is None else f"study {place}")))


def _maps(study: Study, example: Mapping[str, Any], heat: np.ndarray) -> Iterator[dict[str, Any]]:
    """A map over the current views and the one that has boxes, which are outlined."""
    scale = float(np.nanmin(heat)), float(np.nanmax(heat))
    for view, of_view in zip(VIEWS, heat, strict=False):
        boxes = example.get("boxes", ()) if example.get("view") == view else ()
        if view in study.images and not np.isnan(of_view).any() and (boxes or not view.startswith("prior")):
            alt = f"{_alt(view, example['place'], study)}, under a map of {example.get('label')}"
            picture = pictures.heated(study.images[view], of_view, scale, boxes)
            yield {"picture": picture, "alt": alt + (", outlined" if boxes else ""), "caption": _words(view)}


def _roc(value: Any) -> dict[str, str]:
    """By finding the points of an SVG polyline, 100 units a side: false positives to the right, true ones up."""
    if not isinstance(value, dict):
        return {}
    return {
        name: " ".join(f"{100 * x:.1f},{100 - 100 * y:.1f}" for x, y in of["roc"])
        for name, of in value.items()
        if isinstance(of, dict) and of.get("roc")
    }


def _tables(shown: Mapping[str, Any], of_run: str) -> Iterator[dict[str, Any]]:
    """Whatever a task shows, as tables: single values, things with the same said of each, confusion matrices."""
    there = {name: value for name, value in shown.items() if value not in ([], {})}
    plain = [(name, {"": value}) for name, value in there.items() if not _nested(value)]
    flat = [(name, value) for name, value in there.items() if isinstance(value, dict) and _plain(value)]
    if len(flat) < 2 or len({tuple(value) for _, value in flat}) > 1:  # else the same is said of each
        flat = []
    yield from (_grid(f"Further{of_run}", rows) for rows in (plain, flat) if rows)
    for name in (name for name in there if name not in dict(plain + flat)):
        title, value = _words(name) + of_run, there[name]
        if isinstance(value, dict) and {"classes", "confusion"} <= value.keys():
            rows = list(zip(value["classes"], value["confusion"], strict=True))
            columns = ["true, down; told, across", *value["classes"]]
            yield {"kind": "table", "title": title, "columns": columns, "rows": rows}
        elif isinstance(value, list) and all(isinstance(one, dict) for one in value):
            yield _grid(title, [(str(number), one) for number, one in enumerate(value, start=1)])
        elif isinstance(value, dict) and _plain(value):
            yield _grid(title, [(key, {"": one}) for key, one in value.items()])
        elif isinstance(value, dict) and all(isinstance(one, dict) for one in value.values()):
            yield _grid(title, list(value.items()))
        elif isinstance(value, dict):
            yield from _tables({f"{name}, {key}": one for key, one in value.items()}, of_run)
        else:
            yield {"kind": "values", "title": title, "value": value}


def _plain(value: Mapping[str, Any]) -> bool:
    return not any(map(_nested, value.values()))


def _nested(value: Any) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and any(isinstance(x, dict | list) for x in value))


def _grid(title: str, rows: Sequence[tuple[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """A table with a row for each of some things and a column for each of what is said of them."""
    flat = [(name, dict(_flat(of))) for name, of in rows]
    columns = list(dict.fromkeys(key for _, of in flat for key in of))
    cells = [(name, [of.get(key) for key in columns]) for name, of in flat]
    return {"kind": "table", "title": title, "columns": ["", *(c.replace(".", " ") for c in columns)], "rows": cells}


def _page(figures: dict[str, Any], compared: Sequence[_Evaluated], sections: dict[str, dict[str, Result]]) -> str:
    films, names = _Films(), list(figures["runs"])
    blocks = {title: list(_blocks(of, films)) for title, of in sections.items()}
    told = {(task, score["name"]): score for task, of in figures["tasks"].items() for score in of["scores"]}
    settings = _side_by_side({one.name: one.settings for one in compared})
    text = files(__package__).joinpath("report.html.jinja").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"figure": _figure, "signed": _signed, "words": _words}
    return environment.from_string(text).render(
        title=f"Evaluation of {', '.join(names)}",
        runs=figures["runs"],
        tasks=figures["tasks"],
        headline=[told[one["task"], one["score"]] | {"task": one["task"]} for one in figures["headline"]],
        blocks=blocks,
        films_missing=sorted(films.missing),
        curves={one.name: one.curves for one in compared if one.curves},
        cost=_rows(_side_by_side({one.name: one.cost for one in compared}), names),
        # Those that differ come first.
        settings=sorted(_rows(settings, names), key=lambda row: all(x == row[1][0] for x in row[1])),
        versions=_rows(_side_by_side({name: of["versions"] for name, of in figures["runs"].items()}), names),
        as_rows=_rows,
        across=_across,
        scale=_scale,
    )


def _rows(side_by_side: Mapping[str, Mapping[str, Any]], runs: Iterable[str]) -> list[tuple[str, list[Any]]]:
    return [(name, [of.get(run) for run in runs]) for name, of in side_by_side.items()]


def _scale(of: Iterable[Mapping[str, Any]], around: float | None = None) -> tuple[float, float]:
    """The ends of an axis that holds these intervals: 0 and 1 where all lie between, or as far to both sides of
    `around`."""
    known = [one[key] for one in of for key in ("value", "low", "high", "chance") if one.get(key) is not None]
    if around is not None:
        reach = max((abs(x - around) for x in known), default=0) or 1
        return around - reach, around + reach
    low, high = min(known, default=0.0), max(known, default=1.0)
    return (0.0, 1.0) if low >= 0 and high <= 1 else (low, high if high > low else low + 1)


def _across(x: float, ends: tuple[float, float]) -> str:
    """Where a value lies on an axis of 200 units."""
    low, high = ends
    return f"{6 + 188 * (x - low) / (high - low):.1f}"


def _words(name: str) -> str:
    return name.replace("_", " ")


def _signed(x: float) -> str:
    return f"{x:+.3f}".replace("-", "\N{MINUS SIGN}")


def _figure(x: Any) -> str:
    """A value as people read it."""
    if isinstance(x, bool) or x is None:
        return {None: "", True: "yes", False: "no"}[x]
    if isinstance(x, list | tuple):
        return "; ".join(map(_figure, x))
    if isinstance(x, int) or (isinstance(x, float) and abs(x) >= 1000):
        return f"{x:,.0f}"
    if isinstance(x, float):
        return f"{x:.3f}" if x == 0 or abs(x) >= 0.001 else f"{x:.2g}"
    return str(x)
