"""How a run went, as a picture."""

from pathlib import Path

from matplotlib.figure import Figure

_PANELS = (
    ("towers: masked modelling", "towers", ("image", "word")),
    ("alignment: losses", "align", ("global", "local", "image", "word", "paired", "separate")),
    ("alignment: spread of embeddings", "align", ("image_variance", "text_variance")),
    ("validation: recall@10", "align", ("text_to_image/recall@10", "image_to_text/recall@10")),
)


def draw_curves(metrics: list[dict], out: Path) -> None:
    """Draw the lines of a run's metrics.jsonl as PNG."""
    figure = Figure(figsize=(11, 7), layout="constrained")
    for axis, (title, stage, names) in zip(figure.subplots(2, 2).flat, _PANELS, strict=True):
        for name in names:
            points = [(m["step"], m[name]) for m in metrics if m["stage"] == stage and name in m]
            if points:
                axis.plot(*zip(*points, strict=True), label=name)
        axis.set(title=title, xlabel="step")
        if axis.lines:
            axis.legend()
        else:
            axis.text(0.5, 0.5, "not measured in this run", ha="center", transform=axis.transAxes)
    figure.savefig(out, dpi=110, format="png")
