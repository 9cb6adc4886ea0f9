"""A picture of some prepared studies: their views, labels and reports side by side."""

import io
import textwrap
from itertools import islice
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from .shards import VIEWS, Study, read_studies

_SEARCHED = 1000
_MAX_BYTES = 900_000


def contact_sheet(root: str | Path, out: str | Path, studies: int = 12, split: str = "train") -> None:
    """Write a PNG of under 900 kB to `out`: a row a study, a column a view, the labels and the report beside them.

    Among the first 1,000 studies of the split, those with different labels come first.

    Raises:
        DataError: if `root` is no prepared data set or the split is empty.
        OSError: if `out` cannot be written.
    """
    shown = _choose(Path(root), split, studies)
    figure = Figure(figsize=(15, 2 * len(shown) + 0.3), layout="constrained")
    axes = figure.subplots(len(shown), 5, squeeze=False, width_ratios=(1, 1, 1, 1, 3.2))
    for view, top in zip(VIEWS, axes[0], strict=False):
        top.set_title(view.replace("_", " "), fontsize=11)
    for study, row in zip(shown, axes, strict=True):
        for view, axis in zip(VIEWS, row, strict=False):
            axis.set_axis_off()
            if view in study.images:
                axis.imshow(study.images[view], cmap="gray", vmin=0, vmax=255)
        _write(row[4], study)
    for dpi in (100, 85, 70, 55, 40):
        png = _png(figure, dpi)
        if len(png) < _MAX_BYTES:
            break
    Path(out).write_bytes(png)


def _choose(root: Path, split: str, count: int) -> list[Study]:
    """`count` studies in stored order, the label sets taken in turn."""
    by_labels: dict[tuple[str, ...], list[int]] = {}
    for index, study in enumerate(islice(read_studies(root, split, images=False), _SEARCHED)):
        by_labels.setdefault(study.labels, []).append(index)
    turns = sorted((turn, index) for indices in by_labels.values() for turn, index in enumerate(indices))
    chosen = {index for _, index in turns[:count]}
    searched = islice(read_studies(root, split), max(chosen) + 1)
    return [study for index, study in enumerate(searched) if index in chosen]


def _write(axis, study: Study) -> None:
    axis.set_axis_off()
    # Dollar signs would start mathematics.
    labels, report = (text.replace("$", r"\$") for text in (", ".join(study.labels) or "no label", study.report))
    axis.text(0, 1, textwrap.shorten(labels, 80, placeholder=" …"), weight="bold", va="top", fontsize=10)
    lines = textwrap.wrap(report, 90, max_lines=9, placeholder=" …")
    axis.text(0, 0.87, "\n".join(lines), va="top", fontsize=9)


def _png(figure: Figure, dpi: int) -> bytes:
    drawn, gray = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, dpi=dpi, format="png")
    Image.open(drawn).convert("L").save(gray, format="PNG", optimize=True)
    return gray.getvalue()
