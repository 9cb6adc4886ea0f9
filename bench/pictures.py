"""Pictures of a device's stored results: roofline, waterfalls, memory and latency against batch.

A picture is drawn when its results are there. Of a CPU only shares and ratios are kept, and drawn; of a GPU times too.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Results = dict[str, dict[str, Any]]
"""By test: its ratios and figures."""


def draw(device: Path, out: Path) -> Iterator[Path]:
    """PNG files of what is stored of a device."""
    stored = {path.stem: json.loads(path.read_text()).get("results", {}) for path in sorted(device.glob("*.json"))}
    out.mkdir(parents=True, exist_ok=True)
    for name, picture in PICTURES.items():
        if (figure := picture(stored)) is not None:
            path = out / f"{device.name}-{name}.png"
            figure.savefig(path, dpi=130, bbox_inches="tight", metadata={"Software": None})
            plt.close(figure)
            yield path


def roofline(stored: dict[str, Results]) -> Figure | None:
    """Every operation: the share that it reaches of the matrix rate, over its FLOPs a byte, under the roof."""
    points = []
    for results in stored.values():
        for test, of in results.items():
            found = of.get("figures", {})
            if {"flops", "bytes", "of_matrix_rate", "of_bandwidth"} <= found.keys():
                name = test.partition("[")[2].rstrip("]") or test
                points.append((name, found["flops"] / found["bytes"], found["of_matrix_rate"], found["of_bandwidth"]))
    if not points:
        return None
    figure, axes = plt.subplots(figsize=(8, 5))
    balance = max(x * bandwidth / rate for _, x, rate, bandwidth in points)  # FLOPs a byte; all say the same
    every = [balance, *(x for _, x, *_ in points)]
    lowest, highest = min(every) / 2, max(every) * 2
    axes.plot([lowest, balance, highest], [lowest / balance, 1, 1], color="black", lw=1)
    for number, (name, x, rate, _) in enumerate(points, 1):
        axes.plot(x, rate, "o", ms=6, label=f"{number}  {name}")
        axes.annotate(str(number), (x, rate), textcoords="offset points", xytext=(5, 3), fontsize=8)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8, frameon=False)
    axes.set(xscale="log", yscale="log", xlabel="FLOPs a byte", ylabel="share of the machine's matrix rate")
    axes.grid(alpha=0.3, which="both")
    return figure


def waterfall(stored: dict[str, Results]) -> Figure | None:
    """What each technique adds, one after the other: times faster than the plain way."""
    tests = {test: of["ratios"] for test, of in stored.get("waterfall", {}).items()}
    if not tests:
        return None
    figure, panels = plt.subplots(1, len(tests), figsize=(6.5 * len(tests), 4), squeeze=False)
    for axes, (test, ratios) in zip(panels[0], tests.items(), strict=True):
        steps = sorted(ratios.items(), key=lambda step: int(step[0].split()[0]))
        values = [ratio["value"] for _, ratio in steps]
        bars(axes, [name.partition(" ")[2] for name, _ in steps], values, [ratio["noise"] for _, ratio in steps])
        axes.set_title(test.removeprefix("test_").replace("_", " "), fontsize=10)
    figure.tight_layout()
    return figure


def bars(axes: Axes, names: list[str], values: list[float], noise: list[float]) -> None:
    """The gain of each step on top of what was there before it."""
    rows = range(len(values))
    before = [0.0, *values[:-1]]
    starts = [min(a, b) for a, b in zip(before, values, strict=True)]
    lengths = [abs(a - b) for a, b in zip(before, values, strict=True)]
    colours = ["tab:blue" if b >= a else "tab:red" for a, b in zip(before, values, strict=True)]
    axes.barh(rows, lengths, left=starts, color=colours)
    axes.errorbar(values, rows, xerr=noise, fmt="none", color="black", lw=1, capsize=2)
    ends = [value + spread for value, spread in zip(values, noise, strict=True)]
    for row, (value, end) in enumerate(zip(values, ends, strict=True)):
        axes.annotate(f"{value:.2f}", (end, row), textcoords="offset points", xytext=(5, -3), fontsize=8)
    axes.set_yticks(rows, names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, max(ends) * 1.15)
    axes.set_xlabel("times faster than the plain way")


def against_batch(figure_name: str, unit: str, scale: float) -> Callable[[dict[str, Results]], Figure | None]:
    """Draws a figure that has a value for each batch and way of running it."""

    def picture(stored: dict[str, Results]) -> Figure | None:
        tests = (of.get("figures", {}) for results in stored.values() for of in results.values())
        found = next((figures[figure_name] for figures in tests if figure_name in figures), None)
        if found is None:
            return None
        figure, axes = plt.subplots(figsize=(6.5, 4))
        for name in found[max(found, key=int)]:
            points = [(int(batch), scale * of[name]) for batch, of in found.items() if name in of]
            axes.plot(*zip(*points, strict=True), "o-", ms=4, label=name)
        axes.set(xscale="log", yscale="log", xlabel="studies", ylabel=unit)
        axes.legend(fontsize=8, frameon=False)
        axes.grid(alpha=0.3, which="both")
        return figure

    return picture


PICTURES = {
    "roofline": roofline,
    "waterfall": waterfall,
    "memory": against_batch("peak_bytes_by_batch", "GB held at most in a pretraining step", 1e-9),
    "latency": against_batch("seconds_by_batch", "ms", 1e3),
}
