"""A page or a picture of some prepared studies, as a model will see them: a person spots a mistake in ten seconds."""

from __future__ import annotations

import base64
import html
import io
import textwrap
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

from ..errors import DataError
from ..study import VIEWS

if TYPE_CHECKING:
    from .shards import Study

_SEARCHED = 1000
_MAX_BYTES = 900_000
_SIDE, _GRID = 224, 14  # what the towers take: 224 pixels a side in 14 by 14 patches (ClinVLA, section 3.3)

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --line: light-dark(#ccc, #444); --quiet: light-dark(#555, #aaa); }}
body {{ font: 16px/1.45 system-ui, sans-serif; max-width: 1100px; margin: 0 auto; padding: 1rem;
  background: light-dark(#fff, #16181b); color: light-dark(#111, #e6e6e6); }}
h1 {{ font-size: 1.3rem; margin: 0; }}
h2 {{ font-size: 1rem; margin: 0 0 .5rem; }}
p {{ margin: .4rem 0; overflow-wrap: anywhere; }}
section {{ border-top: 1px solid var(--line); padding: 1rem 0; }}
h2 span, figcaption, header p {{ color: var(--quiet); font-weight: normal; font-size: .85rem; }}
.views {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: .5rem; }}
figure {{ margin: 0; }}
img {{ width: 100%; height: auto; display: block; background: #000; border-radius: 3px; }}
</style>
</head>
<body>
<header><h1>{title}</h1><p>{note}</p></header>
<main>
{studies}
</main>
</body>
</html>
"""


def write_preview(root: Path, out: Path, *, split: str, count: int = 20, keep: float = 0.25, seed: int = 0) -> None:
    """Show `count` studies of a split in `out`: their views, what a model sees of the current ones, labels and report.

    `.html` is one page with everything in it, `.png` a picture of under 900 kB. Among the first 1,000 studies of the
    split those with different labels come first. Boxes are outlined in the stored views. A study goes by its place in
    the split, never by an identifier; its pixels and its report are shown, so a preview may go where the data may.

    Args:
        keep: share of the patches that is kept in training; the others are dimmed.
        seed: draws the patches.

    Raises:
        DataError: if `root` is no prepared data set, the split is empty, `out` ends in neither .html nor .png, `count`
            is no positive number or `keep` no share.
        OSError: if `out` cannot be written.
    """
    root, out = Path(root), Path(out)
    check_preview(out)
    if count < 1 or not 0 <= keep <= 1:
        raise DataError(f"A preview of {count} studies that keep {keep} of their patches: expected at least 1, 0 to 1.")
    shown = [(index, study, _as_seen(index, study, keep, seed)) for index, study in _choose(root, split, count)]
    if out.suffix.lower() == ".png":
        out.write_bytes(_picture(shown))
    else:
        out.write_text(_page(shown, split, keep), encoding="utf-8")


def check_preview(out: Path) -> None:
    """Raises DataError if no preview can be written to `out`."""
    if out.suffix.lower() not in (".html", ".png"):
        raise DataError(f"{out}: the name of a preview ends in .html or .png.")
    if not out.absolute().parent.is_dir():
        raise DataError(f"{out}: there is no folder {out.parent} to write it to.")


def _choose(root: Path, split: str, count: int) -> list[tuple[int, Study]]:
    """`count` studies with their places, in stored order, the label sets taken in turn."""
    from .shards import read_studies  # here: webdataset imports torch

    by_labels: dict[tuple[str, ...], list[int]] = {}
    for index, study in enumerate(islice(read_studies(root, split, images=False), _SEARCHED)):
        by_labels.setdefault(study.labels, []).append(index)
    turns = sorted((turn, index) for indices in by_labels.values() for turn, index in enumerate(indices))
    chosen = {index for _, index in turns[:count]}
    searched = islice(read_studies(root, split), max(chosen) + 1)
    return [(index, study) for index, study in enumerate(searched) if index in chosen]


def _as_seen(index: int, study: Study, keep: float, seed: int) -> dict[str, np.ndarray]:
    """The current views as the image tower takes them (uint8 [224, 224]), the patches that are masked dimmed."""
    seen = {}
    for slot, view in enumerate(VIEWS[:2]):
        if view in study.images:
            square = np.asarray(Image.fromarray(study.images[view]).resize((_SIDE, _SIDE), Image.Resampling.BILINEAR))
            # Uniform and independent a view, as clinvla_fast.ops.draw_kept_patches draws them.
            kept = np.random.default_rng((seed, index, slot)).permutation(_GRID**2) < round(keep * _GRID**2)
            kept = kept.reshape(_GRID, _GRID).repeat(_SIDE // _GRID, 0).repeat(_SIDE // _GRID, 1)
            seen[view] = np.where(kept, square, square // 5)
    return seen


def _page(shown: list[tuple[int, Study, dict[str, np.ndarray]]], split: str, keep: float) -> str:
    note = (
        f"{len(shown)} studies of this split. Beside the views as stored: a current view as the image tower takes it, "
        f"the {1 - keep:.0%} of its patches that one training step masks dimmed."
    )
    studies = "\n".join(_section(*parts) for parts in shown)
    return _PAGE.format(title=html.escape(f"Prepared studies: {split}"), note=html.escape(note), studies=studies)


def _section(index: int, study: Study, seen: dict[str, np.ndarray]) -> str:
    figures = []
    for view in VIEWS:
        name = view.replace("_", " ")
        if view in study.images:
            height, width = study.images[view].shape
            figures.append(_figure(_outlined(study, view), f"{name}, {width} x {height}"))
        if view in seen:
            figures.append(_figure(seen[view], f"{name}, as seen in training"))
    labels = html.escape(_labels(study))
    return (
        f'<section>\n<h2>{labels} <span>study {index}</span></h2>\n<div class="views">\n'
        + "\n".join(figures)
        + f"\n</div>\n<p>{html.escape(study.report) or 'no report'}</p>\n</section>"
    )


def _labels(study: Study) -> str:
    """The labels, with the course of those that have one."""
    courses = dict(study.progressions)
    named = (f"{label}: {courses[label]}" if label in courses else label for label in study.labels)
    return ", ".join(named) or "no label"


def _outlined(study: Study, view: str) -> np.ndarray:
    """The stored image with the boxes of this view drawn in white."""
    image = Image.fromarray(study.images[view])
    for box in study.boxes:
        if box.view != view:
            continue
        corners = (box.left, box.top, box.left + box.width, box.top + box.height)
        ImageDraw.Draw(image).rectangle(
            [round(share * side) for share, side in zip(corners, image.size * 2, strict=True)], outline=255
        )
    return np.asarray(image)


def _figure(image: np.ndarray, caption: str) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=88)
    data = base64.b64encode(buffer.getvalue()).decode()
    size = f'width="{image.shape[1]}" height="{image.shape[0]}"'
    text = html.escape(caption)
    return (
        f'<figure><img {size} alt="{text}" src="data:image/jpeg;base64,{data}"><figcaption>{text}</figcaption></figure>'
    )


def _picture(shown: list[tuple[int, Study, dict[str, np.ndarray]]]) -> bytes:
    """PNG, a row a study."""
    from matplotlib.figure import Figure

    columns = [*VIEWS, "frontal, masked", "lateral, masked"]
    figure = Figure(figsize=(17, 2 * len(shown) + 0.3), layout="constrained")
    axes = figure.subplots(len(shown), 7, squeeze=False, width_ratios=(*[1] * 6, 3.2))
    for name, top in zip(columns, axes[0], strict=False):
        top.set_title(name.replace("_", " "), fontsize=11)
    for (index, study, seen), row in zip(shown, axes, strict=True):
        images = {view: _outlined(study, view) for view in study.images}
        images |= {f"{view}, masked": image for view, image in seen.items()}
        for name, axis in zip(columns, row, strict=False):
            axis.set_axis_off()
            if name in images:
                axis.imshow(images[name], cmap="gray", vmin=0, vmax=255)
        _write(row[-1], index, study)
    for dpi in (100, 85, 70, 55, 40):
        drawn, gray = io.BytesIO(), io.BytesIO()
        figure.savefig(drawn, dpi=dpi, format="png")
        Image.open(drawn).convert("L").save(gray, format="PNG", optimize=True)
        if gray.tell() < _MAX_BYTES:
            break
    return gray.getvalue()


def _write(axis, index: int, study: Study) -> None:
    axis.set_axis_off()
    # Dollar signs would start mathematics.
    labels, report = (text.replace("$", r"\$") for text in (_labels(study), study.report))
    axis.text(0, 1, textwrap.shorten(f"{index}: {labels}", 80, placeholder=" …"), weight="bold", va="top", fontsize=10)
    lines = textwrap.wrap(report, 90, max_lines=9, placeholder=" …")
    axis.text(0, 0.87, "\n".join(lines), va="top", fontsize=9)
