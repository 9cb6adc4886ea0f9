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
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from selectors import EVENT_READ, DefaultSelector

import pytest

ROOT = Path(__file__).parents[2]
KILLS = int(os.environ.get("CLINVLA_KILLS", 8))
SMALL = ["--patients", "24", "--towers.epochs", "1", "--epochs", "2", "--batch-size", "8", "--towers.batch-size", "8"]
SMALL += ["--ema", "0.9", "--patience", "3", "--device", "cpu"]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def serve() -> None:
    """For each line, a `Job` in JSON: fork its processes, print the first one's number, then how the worst ended."""
    import clinvla_fast.fit
    from training.pretrain import main

    clinvla_fast.fit._SAVE_SECONDS = -1  # a checkpoint after every step
    assert len(os.listdir("/proc/self/task")) == 1, "threads do not survive a fork"
    print("ready", flush=True)
    for line in sys.stdin:
        job = Job(**json.loads(line))
        processes = [fork(main, job, variables) for variables in job.processes]
        print(processes[0], flush=True)
        print(max(os.waitpid(process, 0)[1] for process in processes), flush=True)


@dataclass(frozen=True)
class Job:
    """A start of the main job.

    log: a file for what it prints.
    die_at: when and at which file it is killed, as `die_at` takes it.
    processes: environment variables for each.
    """

    arguments: Sequence[str]
    log: str
    die_at: tuple[str, str] | None = None
    processes: Sequence[dict[str, str]] = ({},)


def fork(main: Callable, job: Job, variables: dict[str, str]) -> int:
    """Start a process of a job; its number."""
    if process := os.fork():
        return process
    os.environ.update(variables)
    log = os.open(job.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for output in (1, 2):
        os.dup2(log, output)
    if job.die_at:
        die_at(*job.die_at)
    try:
        main(job.arguments)
    except SystemExit as end:
        os._exit(end.code)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(1)
    os._exit(0)


def die_at(when: str, name: str) -> None:
    """Have this process killed before (or soon after) something takes its place under this name."""
    process, over = os.getpid(), False

    def watch(event: str, arguments: tuple) -> None:
        nonlocal over
        reached = event == "os.rename" and fnmatch(os.path.basename(arguments[1]), name)
        if over or (reached and when == "before"):
            over = False  # killing is an event too
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

    def run(self, *arguments: str, log: Path, seconds: float | None = None, **options) -> bool:
        """Run the main job, for so long at most: whether it was killed."""
        self._server.stdin.write(json.dumps(asdict(Job(arguments, str(log), **options))) + "\n")
        self._server.stdin.flush()
        process = int(self._server.stdout.readline())
        if seconds is not None and not self._answers.select(seconds):
            os.kill(process, signal.SIGKILL)
        status = int(self._server.stdout.readline())
        may_die = seconds is not None or "die_at" in options
        assert status == 0 or (status == signal.SIGKILL and may_die), log.read_text()
        return status != 0


@pytest.fixture(scope="module")
def jobs() -> Iterator[Jobs]:
    server = [sys.executable, __file__]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    with subprocess.Popen(server, cwd=ROOT, env=ONE_THREAD, **pipes) as process:
        yield Jobs(process)
        process.kill()


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
    (whole, seconds), chance, kills, found = undisturbed, random.Random(1), 0, Counter()
    while kills < KILLS:
        out = tmp_path / f"run-after-{kills}"
        log = out.with_suffix(".log")
        # Half a job at most: its second half is where those that go on are killed.
        while jobs.run(*go_on(out), log=log, seconds=chance.uniform(0, seconds / 2) if kills < KILLS else None):
            kills += 1
            found[where(out)] += 1
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


class Pair:
    """The main job as two processes, their output in a file beside its folder."""

    def __init__(self, *arguments: str, out: Path):
        self._log, self._checkpoints = out.with_suffix(".log"), out / "checkpoints"
        self._before = set(self._checkpoints.glob("*"))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command += ["-m", "training.pretrain", *arguments, "--out", str(out)]
        with self._log.open("a") as log:
            self.torchrun = subprocess.Popen(command, cwd=ROOT, env=ONE_THREAD, stdout=log, stderr=log)

    @property
    def printed(self) -> str:
        return self._log.read_text()

    def wait(self, seconds: float) -> int:
        try:
            return self.torchrun.wait(seconds)
        except subprocess.TimeoutExpired:
            self.torchrun.terminate()
            self.torchrun.wait()
            raise AssertionError(f"it has not ended in {seconds} s: {self.printed}") from None

    def wait_for_checkpoint(self, stage: str) -> None:
        deadline = time.monotonic() + 120
        while not set(self._checkpoints.glob(f"[0-9]*.{stage}-*.pt")) - self._before:
            assert self.torchrun.poll() is None and time.monotonic() < deadline, self.printed
            time.sleep(0.01)

    def processes(self) -> dict[str, int]:
        """Of each rank."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it may have ended just now
                variables = dict(v.split("=", 1) for v in (folder / "environ").read_text().split("\0") if "=" in v)
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                if parent == self.torchrun.pid:
                    found[variables["RANK"]] = int(folder.name)
        return found


def as_torchrun_has_it(processes: int) -> list[dict[str, str]]:
    """Environment variables for each process."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        meeting = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    return [{"RANK": str(rank), "WORLD_SIZE": str(processes), **meeting} for rank in range(processes)]


def test_two_processes_that_are_interrupted_and_then_lose_one_end_as_if_they_had_not(jobs, undisturbed, tmp_path):
    arguments = [*SMALL, "--epochs", "10", "--data", str(undisturbed[0] / "data")]
    whole, out = tmp_path / "whole", tmp_path / "run"
    jobs.run(*arguments, "--out", str(whole), log=tmp_path / "whole.log", processes=as_torchrun_has_it(2))
    assert result(whole)["summary"]["bytes_sent_per_step"] > 0

    interrupted = Pair(*arguments, out=out)
    interrupted.wait_for_checkpoint("align")
    interrupted.torchrun.send_signal(signal.SIGINT)
    assert interrupted.wait(60) != 0
    assert "--resume" in interrupted.printed

    bereft = Pair("--resume", out=out)
    bereft.wait_for_checkpoint("align")
    ranks = bereft.processes()
    os.kill(ranks["1"], signal.SIGKILL)
    assert bereft.wait(60) != 0
    assert "SIGKILL" in bereft.printed and not (out / "summary.json").exists()
    assert not Path(f"/proc/{ranks['0']}").exists()

    last = Pair("--resume", out=out)
    assert last.wait(240) == 0, last.printed
    assert result(out) == result(whole)


if __name__ == "__main__":
    serve()
