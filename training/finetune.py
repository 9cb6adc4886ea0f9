"""Train something small on a finished run's model, with 1, 10 and 100% of the labels: a linear probe, the task adapters
and a head that classifies findings or what became of them, a decoder that outlines one. The run itself stays as it is.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import tyro
from rich.console import Console

from clinvla_fast.errors import DataError
from clinvla_fast.evaluation.downstream import TaskName, Training, task
from clinvla_fast.evaluation.result import FOLDER, NotApplicable, write_result
from clinvla_fast.evaluation.subject import Subject, about

from .console import load_model, one_clear_error, progress_bar
from .evaluate import show, split_of, trained_on


@dataclass(frozen=True)
class Finetune(Training):
    """What fine-tuning can be told."""

    run: tyro.conf.Positional[Path | None] = None
    """The folder of a finished run."""
    task: tuple[TaskName | Literal["all"], ...] = ("all",)
    """What to train: all that the data allow, or some by name."""
    data: Path | None = None
    """A folder written by training.prepare. Default: what the run was trained on."""
    split: str | None = None
    """To test on. Default: test, or validate where there is no test split."""
    report: Path | None = None
    """Where the report goes. Default: evaluation/report.html in the run's folder."""
    device: str = "auto"
    """cpu, cuda, or auto: cuda where there is one."""


@one_clear_error()
def main(args: list[str] | None = None) -> None:
    """Run the command line."""
    told = tyro.cli(Finetune, prog="python -m training.finetune", description=__doc__, args=args)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    if told.run is None:
        raise DataError("expected the folder of a finished run.")
    from clinvla_fast.evaluation.report import check_out, write_report

    out = told.report or told.run / FOLDER / "report.html"
    check_out(out)
    model = load_model(told.run, told.device)
    root, found = told.data or trained_on(told.run), False
    for name in get_args(TaskName):
        if name not in told.task and "all" not in told.task:
            continue
        start = time.monotonic()
        try:
            with progress_bar(name) as progress:
                subject = Subject(told.run, model, root, told.split or split_of(root), told.batch_size, progress)
                result = task(name)(subject, told, progress)
        except NotApplicable as error:
            if "all" not in told.task:
                raise
            console.print(f"{name}: left out, as {error}")
            continue
        write_result(result, told.run, about(subject, time.monotonic() - start))
        show(result, console)
        for share, reason in result.shown.get("shares left out", {}).items():
            console.print(f"{name}, {share}: left out, as {reason}")
        found = True
    if not found:
        raise DataError(
            f"{root} has nothing that can be trained on {told.run}: the lines above say what each task expects."
        )
    write_report((told.run,), out)
    console.print(f"Report: {out} (open it in a browser; it needs no network), and the same figures as JSON beside it.")


if __name__ == "__main__":
    main()
