"""What a benchmark finds, held to what was found before: the fixture `measured`, `--store`, the table at the end."""

import ctypes
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from bench import peers, stored
from bench.measure import LONGEST, Ratio, Run, Times, faster, turns

AGAIN = 2
"""Times that a test is run anew while one of its ratios is too low: a busy neighbour leaves, a slower engine stays."""


@dataclass
class Measured:
    """What one test found. A ratio fails the test when it is under `least` by more than its noise or a
    tenth, or fell since it was stored, and does so however often it is measured."""

    module: str
    test: str
    on_gpu: bool
    benchmark: Any
    ratios: dict[str, Ratio] = field(default_factory=dict)
    least: dict[str, float] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)

    def turns(self, runs: dict[str, Run], rounds: int, longest: float = LONGEST, begun: bool = False) -> Times:
        """As `measure.turns`; the one called "ours" is also shown to pytest-benchmark, once."""
        taken = turns(runs, rounds, "cuda" if self.on_gpu else "cpu", longest, begun)
        if self.benchmark.stats is None and "ours" in runs:
            self.benchmark.pedantic(runs["ours"], rounds=1)
        return taken

    def faster(self, name: str, slow: list[float], fast: list[float], least: float | None = None) -> Ratio:
        """Keep how many times as fast `fast` is."""
        return self.ratio(name, faster(slow, fast), least)

    def ratio(self, name: str, ratio: Ratio | float, least: float | None = None) -> Ratio:
        """Keep a ratio, of which more is better; `least`: what is claimed of it wherever it is measured."""
        self.ratios[name] = ratio = ratio if isinstance(ratio, Ratio) else Ratio(ratio)
        if least is not None:
            self.least[name] = least
        return ratio

    def figure(self, name: str, value: Any) -> None:
        """Keep something else: counts, bytes; seconds on a GPU alone, as they say nothing of another CPU."""
        self.figures[name] = value

    def verdicts(self) -> Iterator[tuple[str, Ratio, Ratio | None, str]]:
        """Of each ratio: its name, its value, the stored one, and what is wrong with it."""
        before = stored.baseline(self.module, self.test, self.on_gpu)
        for name, now in self.ratios.items():
            wrong = ""
            least = self.least.get(name, 0)
            if now.value + min(now.noise, 0.1 * least) < least:
                wrong = f"under {least:.2f}"
            elif name in before and stored.fell(now, before[name]):
                wrong = f"fell from {before[name].value:.2f} ± {before[name].noise:.2f}"
            elif name not in before:
                wrong = "NO BASELINE"
            yield name, now, before.get(name), wrong

    def failures(self) -> list[str]:
        """What is wrong with its ratios, a line each."""
        verdicts = [(f"{name} {now.value:.2f} ± {now.noise:.2f}", wrong) for name, now, _, wrong in self.verdicts()]
        return [f"{told}: {wrong}" for told, wrong in verdicts if wrong not in ("", "NO BASELINE")]


WHOLE_TOWERS = ("test_towers", "test_peers", "test_waterfall", "test_pretraining")
FOUND = pytest.StashKey[list[Measured]]()
MISSING = pytest.StashKey[dict[str, str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--store", action="store_true", help="keep what is found in bench/results/DEVICE/")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[FOUND], config.stash[MISSING] = [], {}


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Whole towers give freed memory back as in anybody's process, at what glibc's thresholds grow to. Elsewhere it is
    kept: where new memory happens to lie moves runs of milliseconds by a fifth, and what the system asks for a page of
    it may be four times as much an hour later."""
    if sys.platform == "linux":
        whole = item.path.stem in WHOLE_TOWERS
        trim_threshold, mmap_threshold, mmap_max = -1, -3, -4
        kept, mapped = (64 << 20, 65536) if whole else (2**31 - 1, 0)
        for option, value in ((trim_threshold, kept), (mmap_threshold, 32 << 20), (mmap_max, mapped)):
            ctypes.CDLL(None).mallopt(option, value)


@pytest.fixture
def measured(request: pytest.FixtureRequest, benchmark: Any) -> Measured:
    """Where a benchmark puts what it finds."""
    module = request.node.path.stem.removeprefix("test_")
    found = Measured(module, request.node.name, request.node.get_closest_marker("gpu") is not None, benchmark)
    request.config.stash[FOUND].append(found)
    return found


@pytest.fixture
def peer(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Skips a test whose peer, a package of bench/peers.py, is missing, and tells so at the end."""

    def need(package: str) -> None:
        if why := peers.missing(package):
            request.config.stash[MISSING][package] = why
            pytest.skip(f"missing peer {package}: {why}")

    return need


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """A test that ran through is then judged by its ratios, all of them, and kept."""
    yield
    found = getattr(item, "funcargs", {}).get("measured")
    if found is None:
        return
    for _ in range(AGAIN):
        if found.failures():
            item.runtest()
    found.benchmark.extra_info |= found.figures | {name: ratio.value for name, ratio in found.ratios.items()}
    if item.config.getoption("--store"):
        stored.store(found.module, found.test, found.on_gpu, found.ratios, found.figures)
    if wrong := found.failures():
        pytest.fail("\n".join(wrong), pytrace=False)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Every ratio beside the stored one; what has none, and which peers were missing, in capitals."""
    for found in config.stash[FOUND]:
        if found is config.stash[FOUND][0]:
            terminalreporter.section("ratios: times better than the peer, now and as stored")
        for name, now, before, wrong in found.verdicts():
            was = f"{before.value:8.2f} ± {before.noise:.2f}" if before else " " * 8 + "-     "
            line = f"{now.value:8.2f} ± {now.noise:.2f} {was}  {found.module}: {found.test}, {name}  {wrong.upper()}"
            terminalreporter.write_line(line, red=bool(wrong) and wrong != "NO BASELINE", yellow=wrong == "NO BASELINE")
    unmeasured = sum(not before for found in config.stash[FOUND] for _, _, before, _ in found.verdicts())
    if unmeasured:
        told = f"{unmeasured} RATIOS HAVE NO BASELINE on this device: `pytest bench --store` keeps them"
        terminalreporter.write_line(told, yellow=True, bold=True)
    for name, how in config.stash[MISSING].items():
        terminalreporter.write_line(f"MISSING PEER {name}: {how}", yellow=True, bold=True)
