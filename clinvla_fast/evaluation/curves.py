"""How a run went, as pictures."""

import io
from pathlib import Path

import matplotlib
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

_PANELS = (
    ("towers: masked modelling", "towers", ("image", "word")),
    ("alignment: losses", "align", ("global", "local", "image", "word", "paired", "separate")),
    ("alignment: spread of embeddings", "align", ("image_variance", "text_variance")),
    ("validation: recall@10", "align", ("text_to_image/recall@10", "image_to_text/recall@10")),
)


def draw_curves(metrics: list[dict], out: Path) -> None:
    """Draw the lines of a run's metrics.jsonl as one PNG."""
    figure = Figure(figsize=(11, 7), layout="constrained")
    for axis, panel in zip(figure.subplots(2, 2).flat, _PANELS, strict=True):
        if not _draw(axis, metrics, *panel):
            axis.text(0.5, 0.5, "not measured in this run", ha="center", transform=axis.transAxes)
    figure.savefig(out, dpi=110, format="png")


def curve_pictures(metrics: list[dict], *, dark: bool) -> dict[str, bytes]:
    """The same as an SVG a panel, by their titles; panels that a run did not measure are left out.

    Args:
        dark: light lines on a dark page instead of dark ones on a light one.
    """
    found = {}
    for title, stage, names in _PANELS:
        with style.context("dark_background" if dark else "default"), matplotlib.rc_context({"svg.hashsalt": title}):
            figure, drawn = Figure(figsize=(4.6, 3), layout="constrained"), io.BytesIO()
            if _draw(figure.subplots(), metrics, title, stage, names):
                figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
                found[title] = drawn.getvalue()
    return found


def _draw(axis: Axes, metrics: list[dict], title: str, stage: str, names: tuple[str, ...]) -> bool:
    """Whether there was anything to draw."""
    for name in names:
        points = [(m["step"], m[name]) for m in metrics if m["stage"] == stage and name in m]
        if points:
            axis.plot(*zip(*points, strict=True), label=name)
    axis.set(title=title, xlabel="step")
    if axis.lines:
        axis.legend()
    return bool(axis.lines)
