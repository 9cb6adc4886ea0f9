"""Prepare a data set: image files and reports, or phantoms, become shards that training reads."""

import csv
import hashlib
import io
import os
from collections import Counter
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from clinvla_fast.data.contact_sheet import contact_sheet
from clinvla_fast.data.phantom.dataset import write_phantoms
from clinvla_fast.data.shards import empty_or_absent, write_shards
from clinvla_fast.data.tables import LeftOut, studies_from_csv
from clinvla_fast.errors import DataError

from .console import one_clear_error, progress_bar


@dataclass
class Csv:
    """Studies listed in a table.

    Its columns are study_id, patient_id, frontal, lateral, prior_frontal, prior_lateral, report, split and labels.
    """

    table: tyro.conf.Positional[Path]
    """A .csv or .csv.gz file. Image paths are absolute or relative to its folder; blank if missing."""
    out: Path
    """Folder to create."""
    short_side: int = 256
    """Pixels of the short side of every stored image."""
    workers: int = os.cpu_count() or 1
    """Processes that read images."""
    contact_sheet: Path | None = None
    """Also write a picture of some studies, as PNG."""

    def run(self) -> None:
        if min(self.short_side, self.workers) < 1:
            raise DataError("--short-side and --workers must be at least 1.")
        empty_or_absent(self.out)
        dropped: Counter[str] = Counter()
        left_out: list[LeftOut] = []
        with (
            progress_bar("rows read") as progress,
            closing(
                studies_from_csv(
                    self.table,
                    short_side=self.short_side,
                    dropped=dropped,
                    left_out=left_out,
                    workers=self.workers,
                    progress=progress,
                )
            ) as studies,
        ):
            manifest = write_shards(
                studies,
                self.out,
                source="csv",
                settings={"table_sha256": _sha256(self.table), "short_side": self.short_side},
                dropped=dropped,
                extra_files=lambda: {"dropped.csv": _dropped_csv(left_out)},
            )
        views_left_out = Counter(item.reason for item in left_out if item.what != "study")
        _finish(self.out, manifest, self.contact_sheet, views_left_out)


@dataclass
class Phantom:
    """Simulated chests with findings, follow-up studies and reports: no download, no licence."""

    out: Path
    """Folder to create."""
    patients: int = 1200
    """Patients to simulate; some have several studies."""
    seed: int = 0
    """The same seed gives the same bytes."""
    size: int = 128
    """Pixels of each side of every image."""
    contact_sheet: Path | None = None
    """Also write a picture of some studies, as PNG."""

    def run(self) -> None:
        try:
            with progress_bar("patients read") as progress:
                manifest = write_phantoms(
                    self.out, patients=self.patients, seed=self.seed, size=self.size, progress=progress
                )
        except ValueError as error:
            raise DataError(str(error)) from None
        _finish(self.out, manifest, self.contact_sheet)


@dataclass
class Sheet:
    """A picture of some studies of a prepared folder: views, labels and reports."""

    data: tyro.conf.Positional[Path]
    """A prepared folder."""
    out: Path
    """PNG file to write."""

    def run(self) -> None:
        contact_sheet(self.data, self.out)


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise DataError(f"{path}: no such table, expected a .csv or .csv.gz file.") from None


def _dropped_csv(left_out: list[LeftOut]) -> str:
    """Row numbers, not identifiers: this file may be shared where the table may not."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(LeftOut._fields)
    writer.writerows(left_out)
    return text.getvalue()


def _finish(out: Path, manifest: dict, sheet: Path | None, views_left_out: Counter[str] | None = None) -> None:
    counts = manifest["counts"]
    table = Table("studies", "count", title=str(out))
    table.columns[1].justify = "right"
    table.add_row("found", str(counts["kept"] + sum(counts["dropped"].values())))
    for split, count in counts["splits"].items():
        table.add_row(f"kept: {split}", str(count))
    for reason, count in sorted(counts["dropped"].items()):
        table.add_row(f"dropped: {reason}", str(count))
    for reason, count in sorted((views_left_out or {}).items()):
        table.add_row(f"kept without a view: {reason}", str(count))
    console = Console()
    console.print(table)
    if sheet:
        contact_sheet(out, sheet, split=next(iter(counts["splits"])))
    console.print(f"Next: python -m training.pretrain --data {out}", soft_wrap=True, highlight=False, markup=False)


Command = (
    Annotated[Csv, tyro.conf.subcommand("csv")]
    | Annotated[Phantom, tyro.conf.subcommand("phantom")]
    | Annotated[Sheet, tyro.conf.subcommand("sheet")]
)


@one_clear_error()
def main(args: list[str] | None = None) -> None:
    tyro.cli(Command, prog="python -m training.prepare", description=__doc__, args=args).run()


if __name__ == "__main__":
    main()
