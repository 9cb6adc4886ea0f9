"""The figures that are kept: a JSON file a module of benchmarks, in a folder a device.

    bench/results/DEVICE/MODULE.json
    {"device": {...}, "versions": {...}, "results": {TEST: {"commit": ..., "command": ...,
        "ratios": {NAME: {"value": ..., "noise": ..., "runs": [...]}}, "figures": {NAME: ...}}}}

A ratio is the median of the runs of one commit; its noise the largest of what those differ by and of what one of them
says of itself. Figures are what else was found: counts, bytes, and on GPUs seconds.
"""

import json
import os
import platform
import re
import subprocess
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench.measure import Ratio
from clinvla_fast.versions import versions

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
PACKAGES = (
    *("torch", "triton", "timm", "transformers", "xformers", "nvidia-dali-cuda120", "faiss-cpu"),
    *("adapters", "open_clip_torch", "hi-ml-multimodal"),
)
KEPT_RUNS, ENOUGH_RUNS = 5, 3
BETWEEN_RUNS = 0.1
"""Share by which two processes on a shared machine can differ in what they time, whatever their turns say."""
WORSE = 0.9
"""A ratio may fall to this share of what is stored, and by the noise of both beyond that."""


@cache
def device(on_gpu: bool) -> dict[str, Any]:
    """What a result is of."""
    if on_gpu:
        index = torch.cuda.current_device()
        command = ["nvidia-smi", f"--id={index}", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
        return {"name": torch.cuda.get_device_name(index), "driver": driver, "cuda": torch.version.cuda}
    told = dict(re.findall(r"^([\w ]+?)\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE))
    which = [told[key] for key in ("cpu family", "model", "CPU implementer", "CPU part") if key in told]
    # a name alone may say no more than whose it is, and ratios of two families differ by half
    name = ", ".join([told.get("model name", platform.machine()), "-".join(which)][: 1 + bool(which)])
    return {"name": name, "cores": len(os.sched_getaffinity(0))}


def folder(on_gpu: bool) -> Path:
    """Of a device's results."""
    of = device(on_gpu)
    name = of["name"] if on_gpu else f"{of['name']} {of['cores']} cores"
    return RESULTS / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@cache
def commit() -> str:
    """The one that is checked out; "+" when files that are not results differ from it. In a copy without git's history,
    what CLINVLA_COMMIT says, or "unknown"."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    if not (ROOT / ".git").exists():
        return os.environ.get("CLINVLA_COMMIT", "unknown")
    return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--", ".", ":!bench/results") else "")


def baseline(module: str, test: str, on_gpu: bool) -> dict[str, Ratio]:
    """The stored ratios of a test by name; none when there are none of this device."""
    content = _read(folder(on_gpu) / f"{module}.json")
    if content.get("device", {}).get("name") != device(on_gpu)["name"]:
        return {}
    ratios = content["results"].get(test, {}).get("ratios", {})
    return {name: stated(of) for name, of in ratios.items()}


def stated(stored: dict[str, Any]) -> Ratio:
    """A stored ratio with its noise: what is timed, and in fewer runs than show what they differ by, has at least
    BETWEEN_RUNS of its value."""
    value, noise = stored["value"], stored["noise"]
    few = noise and len(stored["runs"]) < ENOUGH_RUNS
    return Ratio(value, max(noise, BETWEEN_RUNS * value) if few else noise)


def fell(now: Ratio, before: Ratio) -> bool:
    """Whether a ratio is worse by more than a tenth beyond the noise."""
    return now.value < WORSE * before.value - (now.noise**2 + before.noise**2) ** 0.5


def store(module: str, test: str, on_gpu: bool, ratios: dict[str, Ratio], figures: dict[str, Any]) -> None:
    """Add a run of a test to those of the same commit, or put it in the place of another commit's."""
    path = folder(on_gpu) / f"{module}.json"
    content = _read(path)
    if content.get("device") != device(on_gpu):
        content = {"device": device(on_gpu), "results": {}}
    old = content["results"].get(test, {})
    earlier = old.get("ratios", {}) if old.get("commit") == commit() else {}
    result = {"commit": commit(), "command": f"pytest {'-m gpu ' * on_gpu}bench/test_{module}.py --store"}
    if ratios:
        result["ratios"] = {name: _joined(ratio, earlier.get(name, {})) for name, ratio in ratios.items()}
    if figures:
        result["figures"] = figures
    content |= {"versions": {"python": platform.python_version(), **versions(PACKAGES)}}
    content["results"][test] = result
    content["results"] = dict(sorted(content["results"].items()))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def table(head: list[str], rows: list[list[str]]) -> str:
    """As Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def _joined(now: Ratio, earlier: dict[str, Any]) -> dict[str, Any]:
    runs = [*earlier.get("runs", []), now.value][-KEPT_RUNS:]
    noise = max(now.noise, earlier.get("noise", 0.0), max(runs) - min(runs))
    return {"value": round(median(runs), 4), "noise": round(noise, 4), "runs": [round(x, 4) for x in runs]}


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}
