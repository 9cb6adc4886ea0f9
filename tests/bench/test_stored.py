"""What is kept of benchmarks, and by what a ratio is judged: in a checkout of its own, where the real code runs."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from bench.measure import Ratio

ROOT = Path(__file__).parents[2]
BENCHMARKS = """
from time import perf_counter

import pytest
from bench.measure import Ratio

RATIOS = {"faster": Ratio(2.5), "within a tenth": Ratio(1.81), "within the noise": Ratio(1.5), "fallen": Ratio(1.79),
    "new": Ratio(1.0), "under its least": Ratio(1.9), "over its least": Ratio(2.0)}


@pytest.mark.parametrize("name", RATIOS)
def test_of(measured, name):
    measured.ratio("speed", RATIOS[name], least=2.0 if name.endswith("its least") else None)
    measured.figure("bytes", 7)


def test_in_turns(measured):
    taken = measured.turns({"peer": lambda: sum(range(200_000)), "ours": lambda: sum(range(20_000))}, 5)
    assert measured.faster("speed", taken["peer"], taken["ours"], least=2).value > 2


def test_that_fails(measured):
    measured.ratio("speed", 1.0)
    assert False
"""


def git(folder: Path, *arguments: str) -> None:
    who = ["-c", "user.name=someone", "-c", "user.email=someone@example.org"]
    subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A repository with what judges benchmarks, and some that find what they are told to."""
    (tmp_path / "bench").mkdir()
    for path in (ROOT / "bench").glob("*.py"):
        if not path.name.startswith("test_"):
            shutil.copy(path, tmp_path / "bench")
    (tmp_path / "bench" / "test_area.py").write_text(BENCHMARKS)
    (tmp_path / "pyproject.toml").write_text(
        '[tool.pytest.ini_options]\npythonpath = ["."]\naddopts = "--import-mode=importlib -p no:cacheprovider"\n'
        'markers = ["gpu: needs a CUDA device"]\n'
    )
    (tmp_path / ".gitignore").write_text("__pycache__\n")
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    return tmp_path


@pytest.fixture
def stored(checkout) -> ModuleType:
    """`bench.stored` of that checkout."""
    spec = importlib.util.spec_from_file_location("stored_in_a_checkout", checkout / "bench" / "stored.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(checkout: Path, *arguments: str) -> tuple[int, str]:
    """The exit status of pytest and what it prints."""
    command = [sys.executable, "-m", "pytest", "bench", "-q", *arguments]
    environment = os.environ | {"PYTHONPATH": f"{checkout}{os.pathsep}{ROOT}"}
    result = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    return result.returncode, result.stdout + result.stderr


def failed(output: str) -> set[str]:
    return set(re.findall(r"^FAILED bench/test_area\.py::test_(.+?)(?: - .*)?$", output, re.MULTILINE))


def test_ratios_are_judged(checkout, stored):
    """One that is under what is claimed, or fell by more than a tenth beyond the noise, fails its test."""
    for name in ("faster", "within a tenth", "fallen", "under its least", "over its least"):
        stored.store("area", f"test_of[{name}]", False, {"speed": Ratio(2.0)}, {})
    stored.store("area", "test_of[within the noise]", False, {"speed": Ratio(2.0, 0.31)}, {})
    code, output = run(checkout)
    assert code == 1
    assert failed(output) == {"of[fallen]", "of[under its least]", "that_fails"}
    assert re.search(r"speed 1\.79 ± 0\.00: fell from 2\.00 ± 0\.00", output)
    assert re.search(r"speed 1\.90 ± 0\.00: under 2\.0", output)
    assert re.search(r"1\.00 ± 0\.00 +- +area: test_of\[new\], speed  NO BASELINE", output)
    assert "3 RATIOS HAVE NO BASELINE" in output


def test_what_is_stored_is_what_the_next_run_is_held_to(checkout):
    code, output = run(checkout, "--store", "-k", "new or fallen or turns or fails")
    assert code == 1 and failed(output) == {"that_fails"}
    (path,) = (checkout / "bench" / "results").glob("*/area.json")
    kept = json.loads(path.read_text())
    assert kept["results"].keys() == {"test_in_turns", "test_of[fallen]", "test_of[new]"}  # not of a test that failed
    found = kept["results"]["test_of[fallen]"]
    assert found["ratios"] == {"speed": {"value": 1.79, "noise": 0.0, "runs": [1.79]}}
    assert found["figures"] == {"bytes": 7} and found["command"] == "pytest bench/test_area.py --store"
    assert re.fullmatch("[0-9a-f]{40}", found["commit"])
    assert kept["device"]["cores"] == len(os.sched_getaffinity(0)) and "torch" in kept["versions"]
    code, output = run(checkout, "-k", "new or fallen")
    assert code == 0 and "NO BASELINE" not in output


def test_runs_of_one_commit_are_kept_together(checkout, stored):
    """The last five; their median is the ratio, and what they differ by is noise. Another commit starts anew."""

    def store(value: float, noise: float = 0.0) -> dict:
        stored.store("area", "test_of[new]", False, {"speed": Ratio(value, noise)}, {})
        (path,) = (checkout / "bench" / "results").glob("*/area.json")
        return json.loads(path.read_text())["results"]["test_of[new]"]["ratios"]["speed"]

    assert store(2.0, 0.05) == {"value": 2.0, "noise": 0.05, "runs": [2.0]}
    alone = Ratio(2.0, 0.2)  # one run cannot know what the next one will be
    assert stored.baseline("area", "test_of[new]", False) == {"speed": alone}
    for value in (2.2, 2.1, 2.4, 2.3):
        last = store(value)
    assert last == {"value": 2.2, "noise": 0.4, "runs": [2.0, 2.2, 2.1, 2.4, 2.3]}
    assert store(2.5)["runs"] == [2.2, 2.1, 2.4, 2.3, 2.5]
    assert stored.baseline("area", "test_of[new]", False) == {"speed": Ratio(2.3, 0.4)}
    (checkout / "another.py").write_text("")
    git(checkout, "add", ".")
    git(checkout, "commit", "-m", "second")
    stored.commit.cache_clear()
    assert store(3.0) == {"value": 3.0, "noise": 0.0, "runs": [3.0]}


def test_a_commit_that_files_differ_from_is_another(checkout, stored):
    clean = stored.commit()
    (checkout / "bench" / "results").mkdir()
    (checkout / "bench" / "results" / "counts.json").write_text("{}")  # results are not what is measured
    stored.commit.cache_clear()
    assert stored.commit() == clean
    (checkout / "bench" / "stored.py").write_text("")
    stored.commit.cache_clear()
    assert stored.commit() == f"{clean}+"


def test_another_processor_is_no_baseline(checkout, stored):
    stored.store("area", "test_of[new]", False, {"speed": Ratio(2.0)}, {})
    assert stored.baseline("area", "test_of[new]", False)
    (path,) = (checkout / "bench" / "results").glob("*/area.json")
    kept = json.loads(path.read_text())
    kept["device"]["name"] = "another processor"
    path.write_text(json.dumps(kept))
    assert stored.baseline("area", "test_of[new]", False) == {}
    stored.store("area", "test_of[fallen]", False, {"speed": Ratio(2.0)}, {})
    assert json.loads(path.read_text())["results"].keys() == {"test_of[fallen]"}  # and does not stay beside ours


@pytest.mark.parametrize(
    ("now", "before", "worse"),
    [
        (Ratio(1.81), Ratio(2.0), False),
        (Ratio(1.79), Ratio(2.0), True),
        (Ratio(1.51, 0.3), Ratio(2.0), False),
        (Ratio(1.51, 0.1), Ratio(2.0, 0.2), True),
        (Ratio(1.51, 0.2), Ratio(2.0, 0.3), False),
        (Ratio(9.0), Ratio(2.0), False),
    ],
)
def test_worse_is_a_tenth_and_the_noise_of_both(stored, now, before, worse):
    assert stored.fell(now, before) is worse
