"""Prepare a data set: films and reports as they come, or phantoms, become shards that training reads.

Killed or stopped, the same command goes on where it was.
"""

import dataclasses
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from clinvla_fast.data.phantom.dataset import write_phantoms
from clinvla_fast.data.preparation import CURRENT, Preparation, find, prepare, read_report
from clinvla_fast.data.preview import check_preview, write_preview
from clinvla_fast.data.quality import Quality
from clinvla_fast.data.radiographs import Reading
from clinvla_fast.data.reports import Steps, clean_report
from clinvla_fast.data.shards import Format, LeftOut, check_out, is_finished, read_manifest
from clinvla_fast.data.sources import SOURCES
from clinvla_fast.data.sources.record import Record
from clinvla_fast.errors import DataError

from .console import one_clear_error, progress_bar

console = Console(highlight=False)


@dataclass
class Source:
    """Films and reports of a data set."""

    root: tyro.conf.Positional[Path]
    """The folder that the data set came in, as its own documentation lays it out; of csv: the table."""
    out: Path | None = None
    """Folder to create."""
    reports: Path | None = None
    """Where the reports are (of ms-cxr-t: the films), if not in ROOT."""
    short_side: int = 256
    """Pixels of the short side of every stored film."""
    image_format: Format = "jpg"
    """Of the stored films: jpg (quality 95) or png (exact)."""
    window: tuple[float, float] | None = None
    """Width and level for every DICOM, in place of its own window. The paper's are 1500 -500."""
    crop_borders: bool = False
    """Cut the dark borders of collimated films."""
    fill_text: bool = False
    """Find text burnt into the corners by OCR, and fill it from its neighbourhood: pip install "clinvla-fast[ocr]"."""
    keep_poor_films: bool = False
    """Also those that are over-exposed, blank or blurred by motion."""
    quality: Quality = dataclasses.field(default_factory=Quality)
    """When a film is dropped."""
    clean: Steps = dataclasses.field(default_factory=Steps)
    """What is done to reports."""
    workers: int = os.cpu_count() or 1
    """Processes."""
    dry_run: bool = False
    """Only read the tables, and print how many studies there are and what is set aside."""
    show: int | None = None
    """Only print this many reports, before and after cleaning."""
    preview: Path | None = None
    """Also write a page (.html) or picture (.png) of some studies as the model will see them."""

    source = ""

    def run(self) -> None:
        if min(self.short_side, self.workers) < 1:
            raise DataError("--short-side and --workers must be at least 1.")
        if self.show is not None and self.show < 1:
            raise DataError(f"--show is {self.show}: expected at least 1.")
        if self.preview:
            check_preview(self.preview)
        quality = None if self.keep_poor_films else self.quality
        reading = Reading(self.window, self.crop_borders, self.fill_text, quality)
        looking = self.dry_run or self.show
        if not (self.out or looking):
            raise DataError("pass --out DIR, or --dry-run or --show 20 to look first.")
        if not looking:
            check_out(self.out)  # before tables are read for minutes
        records, left_out = find(self.source, self.root, self.reports)
        if self.show:
            return _show_reports(records, self.show, self.clean)
        if self.dry_run:
            return _print_found(self.root, records, left_out)
        finished = is_finished(self.out)
        preparation = Preparation(self.short_side, self.image_format, reading, self.clean)
        with progress_bar("studies") as progress:
            manifest = prepare(self.source, records, left_out, self.out, preparation, self.workers, progress)
        if finished:
            console.print(f"{self.out} was finished before, and no file was read again: remove it to start anew.")
        return _finish(self.out, manifest, self.preview, trainable=any(map(_reports, records.values())))


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
    preview: Path | None = None
    """Also write a page (.html) or picture (.png) of some studies as the model will see them."""

    def run(self) -> None:
        if self.preview:
            check_preview(self.preview)
        try:
            with progress_bar("patients") as progress:
                sizes = {"patients": self.patients, "seed": self.seed, "size": self.size}
                manifest = write_phantoms(self.out, **sizes, progress=progress)
        except ValueError as error:
            raise DataError(str(error)) from None
        _finish(self.out, manifest, self.preview, trainable=True)


@dataclass
class Preview:
    """A page (.html) or picture (.png) of some studies of a prepared folder, as the model will see them."""

    data: tyro.conf.Positional[Path]
    """A prepared folder."""
    out: Path
    """File to write."""
    split: str | None = None
    """train, validate or test. Default: the first there is."""
    count: int = 20
    """Studies to show; those with different labels first."""

    def run(self) -> None:
        splits = read_manifest(self.data)["counts"]["splits"]
        write_preview(self.data, self.out, split=self.split or next(iter(splits)), count=self.count)


def _reports(records: list[Record]) -> list[Record]:
    return [record for record in records if record.report is not None]


def _show_reports(records: dict[str, list[Record]], most: int, steps: Steps) -> None:
    shown = [record for of_split in records.values() for record in _reports(of_split)][:most]
    if not shown:
        raise DataError("this source has no reports to show.")
    for record in shown:
        text, reason = read_report(record.report)
        console.rule(f"row {record.row}")
        console.print(text.strip() or f"[{reason}]", markup=False, style="dim")
        console.print("\n" + (clean_report(text, steps) or "(nothing is left)"), markup=False)


def _print_found(root: Path, records: dict[str, list[Record]], left_out: list[LeftOut]) -> None:
    """What would be kept if every file that is there could be used."""
    dropped = Counter(one.reason for one in left_out if one.what == "study")
    without = Counter(one.reason for one in left_out if one.what != "study")
    splits: Counter[str] = Counter()
    for split, of_split in records.items():
        for record in of_split:
            current = [path for view, path in record.views.items() if view in CURRENT]
            if isinstance(record.report, Path) and not os.path.isfile(record.report):
                dropped["report is missing"] += 1
            elif current and not any(map(os.path.isfile, current)):
                dropped["file is missing"] += 1
            else:
                splits[split] += 1
    _print_counts(f"{root}, no file read yet", splits, dropped, without)


def _print_counts(title: str, splits: dict[str, int], dropped: dict[str, int], without: dict[str, int]) -> None:
    table = Table("studies", "count", title=title)
    table.columns[1].justify = "right"
    table.add_row("found", str(sum(splits.values()) + sum(dropped.values())))
    for split, count in splits.items():
        table.add_row(f"kept: {split}", str(count))
    for reason, count in sorted(dropped.items()):
        table.add_row(f"dropped: {reason}", str(count))
    for reason, count in sorted(without.items()):
        table.add_row(f"films left out: {reason}", str(count))
    console.print(table)


def _finish(out: Path, manifest: dict, preview: Path | None, trainable: bool) -> None:
    counts = manifest["counts"]
    _print_counts(str(out), counts["splits"], counts["dropped"], counts["views_left_out"])
    if preview:
        write_preview(out, preview, split=next(iter(counts["splits"])))
    if trainable and "train" in counts["splits"]:
        console.print(f"Next: python -m training.pretrain --data {out}", soft_wrap=True, markup=False)
    else:
        console.print("These are for evaluation: there is nothing to train on, without reports or a train split.")


def _of(name: str) -> type[Source]:
    """The command of one source, described by its function; the layout of its folder by the function's module."""
    find_studies = SOURCES[name]
    layout = find_studies.__globals__["__doc__"].partition("\n\n")[2]
    root = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(help=f"The folder that it came in.\n\n{layout}")]
    command = type(name.replace("-", "_"), (Source,), {"source": name, "__annotations__": {"root": root}})
    return Annotated[dataclass(command), tyro.conf.subcommand(name, description=find_studies.__doc__)]


Command = Annotated[Phantom, tyro.conf.subcommand("phantom")] | Annotated[Preview, tyro.conf.subcommand("preview")]
for _name in SOURCES:
    Command |= _of(_name)


@one_clear_error()
def main(args: list[str] | None = None) -> None:
    """Run the command line."""
    tyro.cli(Command, prog="python -m training.prepare", description=__doc__, args=args).run()


if __name__ == "__main__":
    main()
