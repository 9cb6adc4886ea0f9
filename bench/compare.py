"""Two revisions measured against each other on this machine, in turns:

    python -m bench.compare HEAD~5 HEAD
    python -m bench.compare v0.1 . -k loss      # .: the working tree as it is; -k: the cases with this in their names

Each has a process of its own, which imports `clinvla_fast` from a worktree of it, and both run the cases of the current
checkout (bench/cases.py). Times are of B over A: more than 1 is faster. What a revision cannot run is told with its
reason.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.cases import CASES
from bench.measure import Ratio, faster
from bench.stored import ROOT, table

TURN = 0.05
"""Seconds that a turn takes at least, of as many calls as that needs."""
ALIKE = 0.02
"""What two processes that run the same code can differ by, whatever their turns say of noise."""
KEPT = {"MALLOC_MMAP_THRESHOLD_": str(1 << 25), "MALLOC_TRIM_THRESHOLD_": str((1 << 31) - 1)}
"""Lets a process keep what it frees. Else, whether a call gets its memory from Linux anew depends on what was allocated
before it, and moves the same code by a fifth, in all turns alike."""
WORKER = Path(__file__).with_name("cases.py")


class Unmeasured(Exception):
    """Why a revision has no times."""


@dataclass(frozen=True)
class Result:
    """Of a case: how many times as fast B is as A, or why that is not known."""

    case: str
    ratio: Ratio | None
    reason: str = ""

    @property
    def verdict(self) -> str:
        if self.ratio is None:
            return self.reason
        if abs(self.ratio.value - 1) <= self.ratio.noise + ALIKE:
            return ""
        return "FASTER" if self.ratio.value > 1 else "SLOWER"


def git(*arguments: str, root: Path = ROOT) -> str:
    """What git prints.

    Raises:
        Unmeasured: if it fails, with what it says.
    """
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unmeasured(done.stderr.strip() or f"git {arguments[0]} has failed.")
    return done.stdout.strip()


@contextmanager
def tree_of(revision: str, root: Path) -> Iterator[Path]:
    """A folder that holds a revision; a worktree, which goes afterwards, but for ".", which is there.

    Raises:
        Unmeasured: if there is no such revision.
    """
    if revision == ".":
        yield root
        return
    try:
        commit = git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}", root=root)
    except Unmeasured:
        expected = "a commit, a tag, a branch, or . for the working tree"
        raise Unmeasured(f"there is no revision {revision!r} here: expected {expected}.") from None
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder).resolve() / "tree"
        git("worktree", "add", "--detach", str(tree), commit, root=root)
        try:
            yield tree
        finally:
            git("worktree", "remove", "--force", str(tree), root=root)


class Worker:
    """A process that runs the cases of a tree; a new one after it has died.

    Args:
        scratch: where its temporary files go.
    """

    def __init__(self, tree: Path, device: str, scratch: str):
        self._command = [sys.executable, str(WORKER), str(tree), device]
        self._environment = os.environ | KEPT | {"TMPDIR": scratch}
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (it goes when this object goes)
        self._process: subprocess.Popen | None = None

    def ask(self, **told: Any) -> float:
        """Seconds of a call.

        Raises:
            Unmeasured: if there are none.
        """
        if self._process is None:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._log}
            self._process = subprocess.Popen(self._command, text=True, env=self._environment, **pipes)
        try:
            self._process.stdin.write(json.dumps(told) + "\n")
            self._process.stdin.flush()
            answer = json.loads(self._process.stdout.readline())
        except (BrokenPipeError, ValueError):
            self.close()
            self._log.seek(0)
            said = self._log.read().strip().splitlines()
            raise Unmeasured(f"its process ended: {said[-1] if said else 'no word'}") from None
        if "error" in answer:
            raise Unmeasured(answer["error"])
        return answer["seconds"]

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def compared(
    revisions: tuple[str, str], cases: list[str], *, device: str, rounds: int, root: Path = ROOT,
    show: Callable[[str], None] = lambda words: None,
) -> Iterator[Result]:  # fmt: skip
    """Each case, as it is measured.

    Raises:
        Unmeasured: if there is no such revision.
    """
    with ExitStack() as stack:
        workers = []
        for name, revision in zip("AB", revisions, strict=True):
            scratch = stack.enter_context(tempfile.TemporaryDirectory())
            worker = Worker(stack.enter_context(tree_of(revision, root)), device, scratch)
            stack.callback(worker.close)
            workers.append((f"{name} ({revision})", worker))
        for case in cases:
            try:
                yield Result(case, faster(*_in_turns(case, workers, rounds, show)))
            except Unmeasured as error:
                yield Result(case, None, str(error))


def _in_turns(
    case: str, workers: list[tuple[str, Worker]], rounds: int, show: Callable[[str], None]
) -> tuple[list[float], list[float]]:
    """Seconds of a call, a turn each."""
    times: tuple[list[float], list[float]] = [], []
    slowest = 0.0
    for name, worker in workers:
        show(f"{case}: {name} begins")
        try:
            slowest = max(slowest, worker.ask(make=case))
        except Unmeasured as error:
            raise Unmeasured(f"{name} cannot run it: {error}") from None
    calls = max(1, round(TURN / slowest))
    for turn in range(rounds):
        show(f"{case}: turn {turn + 1} of {rounds}")
        for which in (0, 1) if turn % 2 else (1, 0):  # neither is always the first
            times[which].append(workers[which][1].ask(calls=calls))
    return times


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__.partition(":")[0])
    parser.add_argument("revisions", nargs=2, metavar="REV", help="a commit, a tag, a branch, or . as it is: A, then B")
    parser.add_argument("-k", default="", metavar="NAME", help="only the cases with this in their names")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=15, help="turns of each")
    told = parser.parse_args(arguments)
    cases = [case for case in CASES if told.k.lower() in case.lower()]
    if not cases or told.rounds < 1:
        parser.error(
            f"expected a round or more and some of the cases {', '.join(CASES)}; got {told.rounds}, {told.k!r}."
        )

    done = 0

    def show(words: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\033[K{words and f'{done + 1}/{len(cases)} {words}'}", end="", file=sys.stderr, flush=True)

    a, b = told.revisions
    try:
        for result in compared((a, b), cases, device=told.device, rounds=told.rounds, show=show):
            show("")
            if not done:
                print(table(["case", f"times faster: {b} over {a}", ""], []))
            value = f"{result.ratio.value:.2f} ± {result.ratio.noise:.2f}" if result.ratio else ""
            print(f"| {result.case} | {value} | {result.verdict} |", flush=True)
            done += 1
    except Unmeasured as error:
        sys.exit(f"Error: {error}")
    finally:
        show("")


if __name__ == "__main__":
    main()
