"""The main job, killed at any moment: it goes on by the same command with --resume, and ends as if nothing had been.

CLINVLA_KILLS: how many times it is killed; 8 by default.

Run as a program this file is what starts the jobs: a process that has imported everything and forks one for each line
it reads, so that a start costs no imports.
"""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from selectors import EVENT_READ, DefaultSelector

import pytest

ROOT = Path(__file__).parents[2]
KILLS = int(os.environ.get("CLINVLA_KILLS", 8))
SMALL = ["--patients", "24", "--towers.epochs", "1", "--epochs", "2", "--batch-size", "8", "--towers.batch-size", "8"]
SMALL += ["--device", "cpu"]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def serve() -> None:
    """For each line, a JSON object of `arguments`, a `log` and a file to `die_at`: fork a job, print its process, then
    how it ended."""
    import clinvla_fast.fit
    from training.pretrain import main

    clinvla_fast.fit._SAVE_SECONDS = -1  # a checkpoint after every step
    assert len(os.listdir("/proc/self/task")) == 1, "threads do not survive a fork"
    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        process = os.fork()
        if process == 0:
            log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            for output in (1, 2):
                os.dup2(log, output)
            if job["die_at"]:
                die_at(*job["die_at"])
            try:
                main(job["arguments"])
            except SystemExit as end:
                os._exit(end.code)
            except BaseException:
                sys.excepthook(*sys.exc_info())
                os._exit(1)
            os._exit(0)
        print(process, flush=True)
        print(os.waitpid(process, 0)[1], flush=True)


def die_at(when: str, name: str) -> None:
    """Have this process killed before (or soon after) something takes its place under this name."""
    process, over = os.getpid(), False

    def watch(event: str, arguments: tuple) -> None:
        nonlocal over
        reached = event == "os.rename" and fnmatch(os.path.basename(arguments[1]), name)
        if over or (reached and when == "before"):
            os.kill(process, signal.SIGKILL)
            time.sleep(60)  # in a worker of it, which ends with it
        over = reached

    sys.addaudithook(watch)


class Jobs:
    """Starts jobs, and kills them."""

    def __init__(self, server: subprocess.Popen):
        self._server = server
        assert server.stdout.readline() == "ready\n"
        self._answers = DefaultSelector()
        self._answers.register(server.stdout, EVENT_READ)

    def run(
        self, *arguments: str, log: Path, seconds: float | None = None, die_at: tuple[str, str] | None = None
    ) -> bool:
        """Run the main job, for so long at most: whether it was killed."""
        self._server.stdin.write(json.dumps({"arguments": arguments, "log": str(log), "die_at": die_at}) + "\n")
        self._server.stdin.flush()
        process = int(self._server.stdout.readline())
        if seconds is not None and not self._answers.select(seconds):
            os.kill(process, signal.SIGKILL)
        status = int(self._server.stdout.readline())
        may_die = seconds is not None or die_at is not None
        assert status == 0 or (status == signal.SIGKILL and may_die), log.read_text()
        return status != 0


@pytest.fixture(scope="module")
def jobs() -> Iterator[Jobs]:
    server = [sys.executable, __file__]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    with subprocess.Popen(server, cwd=ROOT, env=ONE_THREAD, **pipes) as process:
        yield Jobs(process)
        process.stdin.close()


def result(run: Path) -> dict[str, str | dict]:
    """What a finished run leaves, but for the time it took and pictures of it."""
    summary = json.loads((run / "summary.json").read_text())
    del summary["seconds"]
    card = (run / "README.md").read_text()
    files = [*run.glob("data/*"), *run.glob("towers/*/*"), run / "adapters.safetensors", run / "metrics.jsonl"]
    digests = {str(file.relative_to(run)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    names = {path.name for path in run.iterdir()}
    return {"summary": summary, "card": card, "names": sorted(names), **digests}


def where(run: Path) -> str:
    """What a job was doing when it was killed, by what it has left."""
    partial = sorted(path.name for path in run.rglob(".*partial") if path.name != ".data.partial")
    newest = max(run.glob("checkpoints/[0-9]*.pt"), default=None)
    writing = "a checkpoint, " if any(name.endswith(".pt.partial") for name in partial) else ""
    if not (run / "run.json").is_file():
        return "start"
    if not (run / "data" / "manifest.json").is_file():
        return "shards"
    if (run / "summary.json").is_file():
        return "end"
    if not (run / "towers").is_dir():
        return writing + ("before the towers' first checkpoint" if newest is None else "towers")
    if newest is None or "align" not in newest.name:
        return writing + "before the alignment's first checkpoint"
    return writing + ("saving the model" if (run / "config.json").is_file() else "alignment")


@pytest.fixture(scope="module")
def undisturbed(jobs, tmp_path_factory) -> tuple[Path, float]:
    """The folder of a run that nothing happened to, and the seconds it took."""
    out, start = tmp_path_factory.mktemp("killed") / "undisturbed", time.monotonic()
    jobs.run(*SMALL, "--out", str(out), log=out.with_suffix(".log"))
    return out, time.monotonic() - start


def go_on(out: Path) -> list[str]:
    """What one types after a run has ended before its time: --resume, or the same again if it had not begun."""
    return [*(["--resume"] if (out / "run.json").is_file() else SMALL), "--out", str(out)]


def test_killed_at_random_moments_it_ends_as_if_it_had_not_been(jobs, undisturbed, tmp_path):
    (whole, seconds), chance, kills, found = undisturbed, random.Random(0), 0, Counter()
    while kills < KILLS:
        out = tmp_path / f"run-after-{kills}"
        log, moment = out.with_suffix(".log"), chance.uniform(0, seconds)
        while jobs.run(*go_on(out), log=log, seconds=moment):
            kills += 1
            found[where(out)] += 1
            moment = chance.uniform(0, seconds / 2) if kills < KILLS else None  # less is left to do
        assert result(out) == result(whole), log.read_text()
    print(f"\nkilled {kills} times over jobs of {seconds:.1f} s:", dict(found.most_common()))


DEATHS = [
    *(("before", name) for name in ("run.json", "train-000000.tar", "data", "*.towers-*.pt", "README.md", "towers")),
    *(("before", name) for name in ("*.align-*.pt", "adapters.safetensors", "summary.json")),
    ("after", "summary.json"),
]


def test_killed_at_every_kind_of_file_it_ends_as_if_it_had_not_been(jobs, undisturbed, tmp_path):
    out, log = tmp_path / "run", tmp_path / "log"
    for death in DEATHS:
        assert jobs.run(*go_on(out), log=log, die_at=death), death
    jobs.run(*go_on(out), log=log)
    assert result(out) == result(undisturbed[0])


if __name__ == "__main__":
    serve()
