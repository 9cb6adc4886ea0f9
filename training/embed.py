"""Embed a collection: any number of studies become a folder of embeddings that training.search searches."""

from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from clinvla_fast import DataError, embed
from clinvla_fast.collection import trained_precision
from clinvla_fast.presets import Precision

from .console import load_model, one_clear_error, progress_bar


@dataclass
class Embed:
    """What embedding can be told."""

    model: tyro.conf.Positional[Path]
    """The folder of a finished run."""
    source: tyro.conf.Positional[Path]
    """A folder written by training.prepare, or a folder of PNG, JPEG and DICOM files, or one such file; each is a
    study's frontal."""
    out: Path
    """Folder to create, or to go on with after a run with the same arguments was stopped."""
    split: str | None = None
    """train, validate or test, of a folder written by training.prepare. Default: all of them."""
    batch_size: int = 64
    """Studies at a time."""
    precision: Precision | None = None
    """What the frozen towers compute in. auto: bfloat16 where the machine has matrix instructions for it. Default: what
    the run was trained with."""
    device: str = "auto"
    """cpu, cuda, or auto: cuda where there is one."""


@one_clear_error()
def main(args: list[str] | None = None) -> None:
    """Run the command line."""
    told = tyro.cli(Embed, prog="python -m training.embed", description=__doc__, args=args)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    model = load_model(told.model, told.device, told.precision or trained_precision(told.model))
    try:
        with progress_bar("studies embedded") as progress:
            counts = embed(
                model, told.source, told.out, split=told.split, batch_size=told.batch_size, progress=progress
            )["counts"]
    except KeyboardInterrupt:
        console.print("The same command goes on from here.")
        raise
    table = Table("studies", "count", title=str(told.out))
    table.columns[1].justify = "right"
    table.add_row("embedded", str(counts["kept"]["studies"]))
    table.add_row("with an image", str(counts["kept"]["image"]))
    table.add_row("with a report", str(counts["kept"]["text"]))
    for reason, count in counts["dropped"].items():
        table.add_row(f"dropped: {reason}", str(count))
    console.print(table)
    if counts["dropped"]:
        console.print(f"What was dropped: {told.out / 'dropped.csv'}")
    if not counts["kept"]["studies"]:
        raise DataError(f"no study could be read: see {told.out / 'dropped.csv'}, and embed into another folder.")
    console.print(f'Next: python -m training.search {told.out} {told.model} --text "pleural effusion"')


if __name__ == "__main__":
    main()
