"""Evaluate finished runs: tasks that train nothing, on a prepared data set, and one report of all that was found.

With several runs the report has them side by side, with the intervals of their differences.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import tyro
from rich.console import Console
from rich.table import Table

from clinvla_fast.data.shards import read_manifest
from clinvla_fast.errors import DataError
from clinvla_fast.evaluation.report import check_out, names_of, write_report
from clinvla_fast.evaluation.result import FOLDER, NotApplicable, Result, write_result
from clinvla_fast.evaluation.subject import Subject, about, read_run_settings
from clinvla_fast.evaluation.tasks import Options, TaskName, task
from clinvla_fast.evaluation.zero_shot import read_prompts

from .console import load_model, one_clear_error, progress_bar


@dataclass(frozen=True)
class Evaluate(Options):
    """What evaluating can be told."""

    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Folders of finished runs."""
    task: tuple[TaskName | Literal["all", "none"], ...] = ("all",)
    """What to evaluate: all that the data allow, or some by name. none: write the report of what was found before."""
    data: Path | None = None
    """A folder written by training.prepare. Default: what the run was trained on."""
    split: str | None = None
    """Default: test, or validate where there is no test split. Thresholds are always fitted on validate."""
    batch_size: int = 64
    """Studies at a time; scores do not depend on it."""
    report: Path | None = None
    """Where the report goes. Default: evaluation/report.html in the first run's folder."""
    device: str = "auto"
    """cpu, cuda, or auto: cuda where there is one."""


@one_clear_error()
def main(args: list[str] | None = None) -> None:
    """Run the command line."""
    told = tyro.cli(Evaluate, prog="python -m training.evaluate", description=__doc__, args=args)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    if not told.runs:
        raise DataError("expected the folder of a finished run, or several to compare.")
    if told.batch_size < 1:
        raise DataError(f"--batch-size is {told.batch_size}: expected at least 1.")
    out = told.report or told.runs[0] / FOLDER / "report.html"
    check_out(out)
    names_of(told.runs)
    if told.prompts:
        read_prompts(told.prompts)  # before hours of other tasks
    for run in told.runs:
        if not run.is_dir():
            raise DataError(f"{run}: no such folder, expected that of a finished python -m training.pretrain.")
    for run in told.runs:
        evaluate(run, told, console)
    write_report(told.runs, out)
    console.print(f"Report: {out} (open it in a browser; it needs no network), and the same figures as JSON beside it.")
    if len(told.runs) == 1:
        console.print(f"Next: python -m training.evaluate {told.runs[0]} OTHER_RUN --task none puts another beside it.")


def evaluate(run: Path, told: Evaluate, console: Console) -> None:
    """Run the tasks on one run, and write down what they found."""
    names = [name for name in get_args(TaskName) if name in told.task or "all" in told.task]
    if not names:
        return
    model = load_model(run, told.device)
    root, found = told.data or trained_on(run), False
    with progress_bar("studies embedded") as progress:
        subject = Subject(run, model, root, told.split or split_of(root), told.batch_size, progress)
        for name in names:
            start = time.monotonic()
            try:
                result = task(name)(subject, told)
            except NotApplicable as error:
                if "all" not in told.task:
                    raise
                console.print(f"{name}: left out, as {error}")
                continue
            write_result(result, run, about(subject, time.monotonic() - start))
            show(result, console)
            found = True
    if not found:
        raise DataError(
            f"{root} has nothing that {run} can be evaluated on: the lines above say what each task expects."
        )


def trained_on(run: Path) -> Path:
    """The data of a run.

    Raises:
        DataError: if the run does not say, or says it in no JSON, or they are gone.
    """
    settings = read_run_settings(run)
    if not settings:
        raise DataError(f"{run} holds no run.json: pass --data, a folder written by training.prepare.")
    named = settings.get("data")
    data = Path(named) if named else run / "data"
    if not data.is_dir():
        raise DataError(f"{run} was trained on data that are no longer there: pass --data.")
    return data


def split_of(root: Path) -> str:
    """What of a data set is evaluated: test, or validate where there is no test split, or the one that there is."""
    splits = read_manifest(root)["counts"]["splits"]
    return next((split for split in ("test", "validate") if split in splits), next(iter(splits)))


def show(result: Result, console: Console) -> None:
    """A table of what a task found."""
    if not result.scores:
        console.print(f"{result.task}: nothing to score, what it shows is in the report.")
        return
    table = Table(result.task, "score", "95% interval", "chance", "rows")
    for column in table.columns[1:]:
        column.justify = "right"
    for score in result.scores:
        value, low, high = result.intervals[score.name]
        interval = "" if low is None else f"{low:.3f} to {high:.3f}"
        spread = "" if score.spread is None else f" ± {score.spread:.3f}"
        table.add_row(
            score.name,
            "-" if value is None else f"{value:.3f}{spread}",
            interval,
            "" if score.chance is None else f"{score.chance:.3f}",
            f"{len(score.units):,}",
        )
    console.print(table)


if __name__ == "__main__":
    main()
