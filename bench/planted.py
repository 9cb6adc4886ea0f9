"""That regressions are caught: plants them one at a time in a copy of this checkout, and runs what must turn red.

    python -m bench.planted

What is planted is a substitution in one source file. Everything is green first, without any. Exits with 1 if something
is not caught.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
COUNTS = "bench/test_counts.py::test_"
RESOURCES = "tests/kernels/test_resources.py::test_resources[masked_patches-90]"


@dataclass(frozen=True)
class Plant:
    """A regression: what it is, where, which text becomes which, and the test that must see it."""

    what: str
    file: str
    old: str
    new: str
    caught_by: str


PLANTS = (
    Plant(
        "a kernel with too few warps",
        "kernels/masked_patches.py",
        '{"BM": 64, "BN": 128, "BK": 64, "HELD": True, "num_warps": 4, "num_stages": 3}',
        '{"BM": 64, "BN": 128, "BK": 64, "HELD": True, "num_warps": 1, "num_stages": 3}',
        RESOURCES,
    ),
    Plant(
        "FLOPs: every patch is embedded, then some are kept",
        "clinvla_fast/modeling/vision.py",
        "*others, kept).tokens\n",
        "*others).tokens\n"
        "        if kept is not None:\n"
        "            rows = torch.cat([kept.new_zeros(len(kept), 1), 1 + kept], 1)\n"
        "            x = x.gather(1, rows[..., None].expand(-1, -1, x.shape[-1]))\n",
        COUNTS + "a_configuration_costs_what_it_did[clinvla-tiny]",
    ),
    Plant(
        "parameters: an adapter in every block too many",
        "clinvla_fast/modeling/adapters.py",
        "if name in recipe.adapters:",
        'if name in (*recipe.adapters, "attention"):',
        COUNTS + "a_configuration_costs_what_it_did[clinvla-tiny]",
    ),
    Plant(
        "bytes for backward: frozen layers hold their inputs",
        "kernels/onednn.py",
        "ctx.save_for_backward(x if weight.requires_grad else None, weight)",
        "ctx.save_for_backward(x, weight)",
        COUNTS + "a_backward_pass_holds_what_it_did[clinvla-tiny]",
    ),
    Plant(
        "launches: a copy in front of the last norm",
        "clinvla_fast/modeling/vision.py",
        "return vit.norm(x)",
        "return vit.norm(x.clone())",
        COUNTS + "operators_of_a_forward_pass_are_as_many_as_they_were",
    ),
    Plant(
        "a graph break in a block",
        "clinvla_fast/modeling/vision.py",
        "    source = block.norm2(x)\n",
        "    torch._dynamo.graph_break()\n    source = block.norm2(x)\n",
        COUNTS + "nothing_breaks_a_graph_or_is_compiled_anew_in_an_epoch[clinvla]",
    ),
    Plant(
        "compiled anew for every length of reports",
        "clinvla_fast/pretraining.py",
        "torch.compile(text_block, fullgraph=True, dynamic=True)",
        "torch.compile(text_block, fullgraph=True, dynamic=False)",
        COUNTS + "nothing_breaks_a_graph_or_is_compiled_anew_in_an_epoch[clinvla]",
    ),
    Plant(
        "a ratio: local alignment does its work twice",
        "kernels/local_alignment.py",
        "    return tau3 * scores(image, image_mask, text, text_mask, tau1, tau2)\n\n\n# Triton",
        "    twice = [scores(image, image_mask, text, text_mask, tau1, tau2) for _ in range(2)]\n"
        "    return tau3 * sum(twice) / 2\n\n\n# Triton",
        "bench/test_local_alignment.py::test_speed[8 of variable length]",
    ),
)


def substituted(root: Path, plant: Plant) -> str:
    """The source file with the regression in it.

    Raises:
        SystemExit: if the text is not there exactly once: the source has changed, and this list must follow.
    """
    path = root / plant.file
    source = path.read_text() if path.is_file() else ""
    if (found := source.count(plant.old)) != 1:
        raise SystemExit(f"{plant.what}: expected once in {plant.file}, found {found} times:\n{plant.old}")
    return source.replace(plant.old, plant.new)


@contextmanager
def planted(root: Path, plant: Plant) -> Iterator[None]:
    """A checkout with the regression in it, for a block of code."""
    path, source = root / plant.file, substituted(root, plant)
    original = path.read_text()
    path.write_text(source)
    try:
        yield
    finally:
        path.write_text(original)


def copy_checkout(to: Path) -> None:
    """The files that git knows or would add, as they are now."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if os.path.lexists(ROOT / name):
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name, follow_symlinks=False)


def run(root: Path, *tests: str) -> subprocess.CompletedProcess[str]:
    """pytest in a checkout, whose packages go before installed ones."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    environment = os.environ | {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)


def complaint(output: str) -> str:
    """The first line of what a failed test says."""
    said = re.search(r"^(?:E  +|(?=than the loop))(.+)", output, re.MULTILINE)
    return said[1][:150].replace("|", "/") if said else ""


def main() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        copy_checkout(root)
        for plant in PLANTS:  # before anything takes time
            substituted(root, plant)
        print("nothing planted …", flush=True)
        clean = run(root, *dict.fromkeys(plant.caught_by for plant in PLANTS))
        if clean.returncode:
            raise SystemExit(f"red with nothing planted:\n{clean.stdout[-4000:]}{clean.stderr[-2000:]}")
        for number, plant in enumerate(PLANTS, 1):
            print(f"{number} of {len(PLANTS)}: {plant.what} …", flush=True)
            with planted(root, plant):
                result = run(root, plant.caught_by)
            red = result.returncode == 1  # tests ran, and some failed
            rows.append((plant.what, plant.caught_by, "red" if red else "NOT CAUGHT", complaint(result.stdout)))
    print("\n| planted | caught by | | it says |\n| --- | --- | --- | --- |")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    if any(verdict != "red" for _, _, verdict, _ in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
