"""The stored results as tables and pictures, and every document's figures from them.

    python -m bench.report            # fills in README.md, ARCHITECTURE.md and docs/, draws pictures there
    python -m bench.report --check    # changes nothing; says which figure is not the stored one

In a document, what follows a figure says where it is stored, and the figure is written anew with as many digits as
stand there: `2.46<!--=DEVICE/towers::test_encoding::float32-->`. Keys lead through the file (a test's ratios and
figures are its own keys, "noise" is a ratio's), `*1e-9` scales. Between `<!-- table NAME -->` and `<!-- end -->` is a
table of `TABLES`.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator
from difflib import unified_diff
from pathlib import Path
from typing import Any

from bench import methods, pictures, scaling
from bench.stored import RESULTS, ROOT, stated, table

FIGURE = re.compile(
    r"(?P<number>[+-]?\d[\d,]*(?:\.\d+)?)(?P<mark><!--=(?P<path>[^*>]+?)(?:\*(?P<scale>[\de.+-]+))?-->)"
)
BLOCK = re.compile(r"(?P<head><!-- table (?P<name>[^>]+?) -->\n).*?(?P<end><!-- end -->)", re.DOTALL)
PUBLISHED = {  # Table 7 of the ClinVLA paper: FLOPs a sample, million parameters, ms a sample on an A100
    "ClinVLA": (2.8e12, 112.3, 8.9),
    "CheXRelNet": (7.2e12, 121.3, 10.2),
    "GLoRIA": (3.6e12, 111.8, 17.5),
    "LiverNet": (9.5e12, 354.7, 17.8),
    "BioViL": (6.8e12, 289.5, 15.6),
}

EPOCHS = {"alta": 30, "mrm": 200}
"""As published."""


def read(name: str) -> dict[str, Any]:
    """A stored result, such as counts."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def look_up(path: str) -> Any:
    """What is stored under a document's path; `KeyError` when nothing is."""
    name, *keys = path.split("::")
    found = read(name)
    if "results" in found and keys:
        test = found["results"][keys.pop(0)]
        found = test.get("figures", {}) | test.get("ratios", {})
    for key in keys:
        found = found[int(key) if isinstance(found, list) else key]
    return found["value"] if isinstance(found, dict) and "value" in found else found


def written(value: float, like: str) -> str:
    """A number with the digits, sign and thousands separators of another."""
    decimals = len(like.partition(".")[2])
    sign = "+" if like.startswith("+") else ""
    separator = "," if "," in like or abs(value) >= 10_000 else ""
    return f"{value:{sign}{separator}.{decimals}f}"


def filled(text: str) -> str:
    """A document with its figures and tables as they are stored."""

    def figure(match: re.Match) -> str:
        value = look_up(match["path"]) * float(match["scale"] or 1)
        return written(value, match["number"]) + match["mark"]

    def block(match: re.Match) -> str:
        name, *arguments = match["name"].split(" ")
        return f"{match['head']}{TABLES[name](*arguments)}\n{match['end']}"

    return FIGURE.sub(figure, BLOCK.sub(block, text))


def documents() -> list[Path]:
    """Those that quote figures."""
    return [ROOT / "README.md", ROOT / "ARCHITECTURE.md", *sorted((ROOT / "docs").glob("*.md"))]


def devices() -> Iterator[Path]:
    """Folders of results."""
    return (folder for folder in sorted(RESULTS.iterdir()) if folder.is_dir())


def ratios_table(device: str) -> str:
    """Every ratio that was stored of a device, a line each."""
    rows = []
    for path in sorted((RESULTS / device).glob("*.json")):
        for test, of in json.loads(path.read_text()).get("results", {}).items():
            for name, ratio in of.get("ratios", {}).items():
                told = f"{ratio['value']:.2f} ± {stated(ratio).noise:.2f}"
                rows.append([path.stem, test.removeprefix("test_"), name, told, str(len(ratio["runs"]))])
    return table(["area", "benchmark", "against, or what", "times better", "runs"], rows)


def table_7() -> str:
    """The paper's Table 7, and what this engine's methods are at the published size: two whole views and 128 words."""
    rows = [
        [name, f"{flops:.1e}", f"{millions:.1f}", f"{ms:.1f}, A100", "published"]
        for name, (flops, millions, ms) in PUBLISHED.items()
    ]
    latencies = dict(latency_of_one_study())
    for name in ("clinvla", "gloria", "convirt", "alta"):
        of = read("counts")["configurations"][f"{name}, base"]
        ms = ", ".join(f"{of_one:.2f}, {device}" for device, of_one in latencies.items() if name == "clinvla")
        flops, millions = of["forward, views 2, tokens 128"], of["parameters"] / 1e6
        rows.append([f"`--method {name}`", f"{flops:.1e}", f"{millions:.1f}", ms or "not measured", "counted"])
    return table(["model", "FLOPs a sample", "parameters, M", "ms a sample", ""], rows)


def latency_of_one_study() -> Iterator[tuple[str, float]]:
    """Of every GPU that it was measured on: its name and milliseconds."""
    for folder in devices():
        path = folder / "towers_on_gpu.json"
        if path.is_file():
            content = json.loads(path.read_text())
            yield content["device"]["name"], 1e3 * content["results"]["test_latency_of_one_study"]["figures"]["graph"]


def alta_and_mrm() -> str:
    """What training takes, by the epochs that the papers train for."""
    counts, rows = read("counts")["configurations"], []
    steps = {name: counts[f"{name}, base"]["step, views 2, tokens 128"] for name in EPOCHS}
    for name, epochs in EPOCHS.items():
        of_mrm = epochs * steps[name] / (EPOCHS["mrm"] * steps["mrm"])
        rows.append([name, f"{steps[name] / 1e9:.1f}", str(epochs), f"{of_mrm:.0%}"])
    return table(["", "GFLOP a study", "epochs", "of MRM's compute"], rows)


TABLES: dict[str, Callable[..., str]] = {
    "ratios": ratios_table,
    "table-7": table_7,
    "alta-and-mrm": alta_and_mrm,
    "scaling": lambda: scaling.scaling_table(read("scaling")),
    **{name: lambda name=name: methods.TABLES[name](read("methods")[name]) for name in methods.TABLES},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; fail where a document is not up to date")
    check = parser.parse_args().check
    differs = []
    for path in documents():
        before = path.read_text()
        after = filled(before)
        if after != before:
            differs += unified_diff(before.splitlines(), after.splitlines(), str(path.relative_to(ROOT)), "stored", n=0)
            if not check:
                path.write_text(after)
    print(*differs, sep="\n")
    if check:
        sys.exit(bool(differs))
    for device in devices():
        for picture in pictures.draw(device, ROOT / "docs"):
            print(picture.relative_to(ROOT))


if __name__ == "__main__":
    main()
