"""Search an embedded collection: by a text or an image, for images or reports.

The model embeds what is looked for in the precision in which it embedded the collection.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from clinvla_fast import Collection, DataError
from clinvla_fast.data.reports import clean_report

from .console import load_model, one_clear_error


@dataclass
class Search:
    """What searching can be told."""

    collection: tyro.conf.Positional[Path]
    """A folder written by training.embed."""
    model: tyro.conf.Positional[Path]
    """The folder of the run whose model embedded the collection."""
    text: str | None = None
    """Look for this: a finding, or a report."""
    image: Path | None = None
    """Look for this: a frontal radiograph, PNG, JPEG or DICOM."""
    wanted: Annotated[Literal["images", "reports"], tyro.conf.arg(name="for")] = "images"
    """What to find."""
    k: Annotated[int, tyro.conf.arg(aliases=["-k"])] = 10
    """How many studies to find."""
    device: str = "auto"
    """cpu, cuda, or auto: cuda where there is one."""


@one_clear_error()
def main(args: list[str] | None = None) -> None:
    """Run the command line."""
    told = tyro.cli(Search, prog="python -m training.search", description=__doc__, args=args)
    if (told.text is None) == (told.image is None):
        raise DataError("expected one of --text and --image.")
    if told.text is not None and not clean_report(told.text):
        raise DataError("cleaning leaves nothing of --text: expected a finding or a report.")
    collection = Collection(told.collection)
    model = load_model(told.model, told.device, collection.precision)
    collection.check_model(model)
    query = model.encode_reports([told.text]) if told.image is None else model.encode_images([{"frontal": told.image}])
    hits = collection.search(query, "image" if told.wanted == "images" else "text", told.k)[0]
    table = Table("rank", "id", "score", title=f"{told.wanted} nearest to the {'text' if told.text else 'image'}")
    table.columns[1].overflow = "fold"
    for rank, hit in enumerate(hits, start=1):
        name = os.fsencode(hit.id).decode(errors="replace")  # a file name need not be UTF-8
        table.add_row(str(rank), Text(name), f"{hit.score:.3f}")
    Console(highlight=False).print(table)


if __name__ == "__main__":
    main()
