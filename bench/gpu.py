"""Everything that needs a GPU, in one command and under nine minutes: correctness first, then every GPU benchmark.

    python -m bench.gpu --out DIR [--quick]

Needs no network, and no DALI, tyro or xformers: what does is left out by name where they are missing. Results are kept
in bench/results/DEVICE/, as `pytest -m gpu bench --store` does, and in DIR, with summary.md, summary.json and what
pytest writes. A test that there was no time for is named. Where compute-sanitizer is on the PATH, it looks at the
kernels in what time is left.

A copy without git's history is told its commit by CLINVLA_COMMIT. Exit code: 0; 1 when something failed, and after
wrong results nothing is timed; 2 without a GPU.
"""

import argparse
import importlib.util
import json
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import stored
from clinvla_fast.versions import versions

SECONDS, GRACE = 490, 30
"""After the first no test starts; after the second beyond it, none goes on: under nine minutes."""
NEEDS = {
    "tests/data/test_loader.py": ("nvidia.dali",),
    "tests/training/test_pretrain_on_gpu.py": ("nvidia.dali", "tyro"),
}
NO_TIME = "no time left"


@dataclass(frozen=True)
class Plan:
    """A run of pytest; it has `share` of the time, and of what those before it have left."""

    name: str
    arguments: list[str]
    share: float = 1.0
    prefix: tuple[str, ...] = ()


@dataclass
class Part:
    """What came of a plan: tests that passed, and why others failed or were left out; ratios, with their noise."""

    name: str
    passed: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    ratios: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)
    seconds: float = 0.0


# Hooks: to the pytest that it starts, this module is a plugin. What is found is written as tests end, so that nothing
# is lost when time is up.


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--log-to", type=Path, help="a line of JSON for each test that ends")
    parser.addoption("--until", type=float, help="seconds since the epoch, after which no test starts")


def pytest_collection_finish(session: pytest.Session) -> None:
    session.config.getoption("--log-to").write_text(json.dumps([item.nodeid for item in session.items]) + "\n")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if time.time() > item.config.getoption("--until"):
        pytest.skip(NO_TIME)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    report = yield
    if report.when == "call" or not report.passed:
        told = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
        found = getattr(item, "funcargs", {}).get("measured")
        ratios = {name: (ratio.value, ratio.noise) for name, ratio in found.ratios.items()} if found else {}
        with item.config.getoption("--log-to").open("a") as log:
            log.write(json.dumps([item.nodeid, report.outcome, told.removeprefix("Skipped: "), ratios]) + "\n")
    return report


def run(plan: Plan, out: Path, until: float) -> Part:
    """Run a plan; beside its log, what pytest says goes to DIR/NAME.txt and NAME.xml."""
    part, start, log = Part(plan.name), time.time(), out / f"{plan.name}.jsonl"
    log.unlink(missing_ok=True)
    command = [*plan.prefix, sys.executable, "-m", "pytest", "-p", "bench.gpu", f"--log-to={log}", f"--until={until}"]
    command += [f"--junit-xml={out / plan.name}.xml", "--tb=short", "--color=no", *plan.arguments]
    with (out / f"{plan.name}.txt").open("w") as told:
        try:
            limit = max(until - start, 0) + GRACE
            code = subprocess.run(command, cwd=stored.ROOT, stdout=told, stderr=told, timeout=limit).returncode
        except subprocess.TimeoutExpired:
            code = None
    collected, *ended = map(json.loads, log.read_text().splitlines()) if log.exists() else [[]]
    for test, outcome, told, ratios in ended:
        if outcome == "failed":
            part.failed[test] = told
        elif outcome == "skipped":
            part.left_out[test] = told
        else:
            part.passed.append(test)
        part.ratios |= {test: ratios} if ratios else {}
    part.passed = [test for test in part.passed if test not in part.failed]  # nor by its teardown
    known = {*part.passed, *part.failed, *part.left_out}
    part.left_out |= {test: NO_TIME for test in collected if test not in known}
    if code not in (0, None) and not part.failed:
        part.failed[plan.name] = f"exit code {code}: see {plan.name}.txt"
    part.seconds = round(time.time() - start, 1)
    return part


def run_all(plans: list[Plan], out: Path, seconds: float = SECONDS) -> Iterator[Part]:
    """Plans in order; none of the others when the first, which is correctness, fails."""
    end, wrong = time.time() + seconds, ""
    for plan in plans:
        left = end - time.time()
        if wrong or left < GRACE:
            yield Part(plan.name, left_out={plan.name: wrong or NO_TIME})
            continue
        part = run(plan, out, time.time() + plan.share * left)
        if plan is plans[0] and part.failed:
            wrong = f"{plan.name} failed"
        yield part


def marked(folder: str) -> tuple[list[str], dict[str, str]]:
    """Files with tests for a GPU; and those that cannot run for want of a package."""
    files, without = [], {}
    for path in sorted((stored.ROOT / folder).rglob("test_*.py")):
        name = path.relative_to(stored.ROOT).as_posix()
        if "mark.gpu" in path.read_text():
            absent = [package for package in NEEDS.get(name, ()) if not installed(package)]
            files += [name] * (not absent)
            without |= {name: f"not installed: {', '.join(absent)}"} if absent else {}
    return files, without


def installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ModuleNotFoundError, ValueError):  # its parent is missing; it is blocked
        return False


def plans_for_a_gpu(out: Path, quick: bool) -> tuple[list[Plan], dict[str, str]]:
    """What to run, and what is left out from the start; quick: the kernels alone."""
    (tests, without), (benchmarks, more) = (marked(folder) for folder in ("tests", "bench"))
    if quick:
        tests, benchmarks = ([name for name in files if "kernels" in name] for files in (tests, benchmarks))
    kernels = [name for name in tests if "kernels" in name]
    tests = kernels + [name for name in tests if name not in kernels]  # first what all else rests on
    plans = [
        Plan("correctness", ["-m", "gpu", *tests], share=0.5),
        Plan("benchmarks", ["-m", "gpu", "--store", f"--benchmark-json={out / 'benchmarks.json'}", *benchmarks]),
    ]
    if sanitizer := shutil.which("compute-sanitizer"):
        plans.append(Plan("sanitizer", ["-m", "gpu", *kernels], prefix=(sanitizer, "--error-exitcode=86")))
    else:
        without["compute-sanitizer"] = "not on the PATH"
    return plans, without | more


def summary(parts: list[Part], without: dict[str, str], on_gpu: bool) -> dict[str, Any]:
    return {
        "device": stored.device(on_gpu),
        "versions": {"python": platform.python_version(), **versions(stored.PACKAGES)},
        "commit": stored.commit(),
        "seconds": round(sum(part.seconds for part in parts), 1),
        "without": without,
        "parts": [asdict(part) for part in parts],
    }


def written(found: dict[str, Any]) -> str:
    """A summary to read."""
    device, parts = found["device"], found["parts"]
    lines = [f"# {device['name']}: {found['seconds']:.0f} s", "", f"commit {found['commit']}; "]
    lines[-1] += ", ".join(f"{name} {what}" for name, what in (device | found["versions"]).items() if name != "name")
    counts = [[p["name"], *(str(len(p[key])) for key in ("passed", "failed", "left_out")), f"{p['seconds']:.0f}"]
              for p in parts]  # fmt: skip
    lines += ["", stored.table(["part", "passed", "failed", "left out", "seconds"], counts), ""]
    rows = [
        [test.rpartition("/")[2], name, f"{value:.2f} ± {noise:.2f}"]
        for part in parts
        for test, ratios in part["ratios"].items()
        for name, (value, noise) in ratios.items()
    ]
    lines += [stored.table(["benchmark", "", "times better"], rows), ""] if rows else []
    lines += [f"FAILED {t}: {why.strip().splitlines()[-1]}" for p in parts for t, why in p["failed"].items() if why]
    left_out = {test: why for part in parts for test, why in part["left_out"].items()} | found["without"]
    lines += [f"left out: {test}: {why}" for test, why in left_out.items()]
    return "\n".join(lines) + "\n"


def write(out: Path, found: dict[str, Any]) -> None:
    (out / "summary.json").write_text(json.dumps(found, indent=1) + "\n")
    (out / "summary.md").write_text(written(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a folder for results and logs")
    parser.add_argument("--quick", action="store_true", help="the kernels alone")
    told = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench.gpu needs a CUDA device and PyTorch sees none: see torch.cuda.is_available().", file=sys.stderr)
        sys.exit(2)
    out = told.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    plans, without = plans_for_a_gpu(out, told.quick)
    parts = []
    for part in run_all(plans, out):
        parts.append(part)
        print(f"{part.name}: {len(part.passed)} passed, {len(part.failed)} failed in {part.seconds:.0f} s", flush=True)
        write(out, summary(parts, without, on_gpu=True))
    results = stored.folder(on_gpu=True)
    if results.is_dir():
        shutil.copytree(results, out / "results" / results.name, dirs_exist_ok=True)
    print(written(summary(parts, without, on_gpu=True)))
    sys.exit(any(part.failed for part in parts))


if __name__ == "__main__":
    main()
