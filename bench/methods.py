"""The six methods, and ClinVLA without one component at a time (the paper's Table 6), on the same phantoms and seeds.

    python -m bench.methods --out runs/methods            # hours on two cores; goes on where it stopped
    python -m bench.methods --out runs/methods --store    # and writes bench/results/

Data and towers are made once; every method then sees the training studies equally often. Runs are processes of their
own, one thread each, as many at a time as there are cores. Intervals are 95% of Student's t over seeds; those of an
ablation are of the difference to the whole method, seed by seed, also on the studies that ask for what is left out.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np

from bench.stored import table
from clinvla_fast.data.phantom import patient_truths
from clinvla_fast.data.shards import read_manifest, read_studies
from clinvla_fast.evaluation.result import NotApplicable
from clinvla_fast.evaluation.subject import Subject
from clinvla_fast.evaluation.tasks import Options
from clinvla_fast.evaluation.tasks import task as task_named
from training.console import load_model

ROOT = Path(__file__).parents[1]
STORED = ROOT / "bench" / "results" / "methods.json"
METHODS = ("clinvla", "alta", "adaptor", "mrm", "gloria", "convirt")
BESIDE = {  # what tells whether frozen towers, or how much of an image is seen, make a difference between methods
    "clinvla, end to end": ["--unfreeze"],
    "clinvla, every patch": ["--keep", "1"],
}
LONGER = {  # one seed each: whether the order of methods is one of short training
    "clinvla": [],
    "clinvla, half of the patches": ["--keep", "0.5"],
    "clinvla, every patch": ["--keep", "1"],
    "gloria": ["--method", "gloria"],
}
ABLATIONS = {
    "no Transformer-Adapt": ["--adapters", "invertible"],
    "no invertible adapter": ["--adapters", "language", "task"],
    "no lateral views": ["--views", "frontal", "prior_frontal"],
    "no prior studies": ["--views", "frontal", "lateral"],
    "no local loss": ["--local-weight", "0"],
    "no global loss": ["--global-weight", "0"],
}
# A column is a score of a task, over all its rows or those of studies of a kind.
SCORES = {
    "text→image P@5": ("retrieval", "text to image, precision@5", "any"),
    "text→image R@10": ("retrieval", "text to image, recall@10", "any"),
    "image→text P@5": ("retrieval", "image to text, precision@5", "any"),
    "image→text R@10": ("retrieval", "image to text, recall@10", "any"),
    "image→image P@5": ("retrieval", "image to image, precision@5", "any"),
}
JUDGED = {  # what asks for a component
    "text→image P@5": SCORES["text→image P@5"],
    "text→image R@10": SCORES["text→image R@10"],
    "R@10, follow-ups": ("retrieval", "text to image, recall@10", "follow-up"),
    "R@10, seen from the side alone": ("retrieval", "text to image, recall@10", "lateral"),
    "pointing game": ("grounding", "pointing game", "any"),
}
STUDENT = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776}  # 97.5% quantile of t, by the number of seeds
ONE_THREAD = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def pretrain(out: Path, *arguments: str) -> dict:
    """The summary of a run, made now or before, with its seconds and peak memory as the system counts them."""
    measured = out.with_suffix(".json")
    if not measured.is_file():
        go_on = ["--resume"] if (out / "run.json").is_file() else list(arguments)
        command = [sys.executable, "-m", "training.pretrain", "--out", str(out), "--device", "cpu", *go_on]
        start = time.monotonic()
        with out.with_suffix(".log").open("a") as log:
            process = subprocess.Popen(command, cwd=ROOT, env=os.environ | ONE_THREAD, stdout=log, stderr=log)
            _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"{' '.join(command)} failed: see {out.with_suffix('.log')}")
        summary = json.loads((out / "summary.json").read_text())
        summary |= {"wall_seconds": time.monotonic() - start, "peak_kib": usage.ru_maxrss}
        measured.write_text(json.dumps(summary, indent=1))
    return json.loads(measured.read_text())


def run_all(out: Path, jobs: dict[str, list[str]], seeds: int, epochs: int, workers: int) -> dict[str, list[dict]]:
    """Summaries by what was run, a seed each."""
    given = ["--data", str(out / "made" / "data"), "--epochs", str(epochs)]
    given += ["--vision-tower", str(out / "made/towers/vision"), "--text-tower", str(out / "made/towers/text")]
    with ThreadPoolExecutor(workers) as pool:
        running = {}
        for seed in range(seeds):  # so that what is stopped early has every job once
            for name, arguments in jobs.items():
                folder = folder_of(out, name, seed, epochs)
                running[name, seed] = pool.submit(pretrain, folder, *given, *arguments, "--seed", str(seed))
        for number, done in enumerate(running.values(), 1):
            done.result()
            print(f"\r{number} of {len(running)} runs", end="", flush=True)
    print()
    return {name: [running[name, seed].result() for seed in range(seeds)] for name in jobs}


def folder_of(out: Path, name: str, seed: int, epochs: int) -> Path:
    return out / f"{name.replace(' ', '-').replace(',', '')}-{epochs}-{seed}"


def evaluate_all(out: Path, found: dict[str, list[dict]], epochs: int) -> None:
    """Put what the columns of all tables ask for into the summaries of runs."""
    data = out / "made" / "data"
    kinds = kinds_of(data)
    for name, summaries in found.items():
        for seed, summary in enumerate(summaries):
            summary["scores"] = evaluate(folder_of(out, name, seed, epochs), data, kinds)


def kept(found: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """What of the summaries is stored. No seconds, which say nothing of another machine, but those of a run over those
    of the whole method of the same seed."""
    names = "scores", "params", "flops_per_training_sample", "steps", "peak_kib"
    whole = [run["seconds"] for run in found["clinvla"]]
    return {
        name: [
            {key: run[key] for key in names if key in run} | {"times_as_long": round(run["seconds"] / of, 3)}
            for run, of in zip(runs, whole, strict=False)
        ]
        for name, runs in found.items()
    }


def kinds_of(data: Path) -> dict[str, np.ndarray]:
    """Which studies of the test split are of a kind, bool [n]: what the report says asks for the prior study, or for
    the lateral view."""
    patients, seed = (read_manifest(data)["settings"][name] for name in ("patients", "seed"))
    truths = {truth.study_id: truth for patient in range(patients) for truth in patient_truths(seed, patient)}
    studies = [truths[study.study_id] for study in read_studies(data, "test", images=False)]
    lateral = [bool(study.findings) and study.findings[0].lateral_only for study in studies]
    follow_up = [study.followup for study in studies]
    return {"follow-up": np.array(follow_up), "lateral": np.array(lateral)}


def evaluate(run: Path, data: Path, kinds: dict[str, np.ndarray]) -> dict[str, float | None]:
    """The scores of a finished run by column; None of those that it cannot have."""
    subject = Subject(run, load_model(run, "cpu"), data, "test")
    scores, columns = {}, SCORES | JUDGED
    for task in {task for task, _, _ in columns.values()}:
        with suppress(NotApplicable):
            scores |= {(task, score.name): score for score in task_named(task)(subject, Options()).scores}
    found = {}
    for column, (task, of, kind) in columns.items():
        score = scores.get((task, of))
        if score is not None and kind != "any":
            score = score.taking(np.flatnonzero(kinds[kind][score.units]))
        found[column] = score and score.value
    return found


def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half of its interval."""
    spread = statistics.stdev(values) if len(values) > 1 else float("nan")
    return statistics.mean(values), STUDENT.get(len(values), 2.0) * spread / len(values) ** 0.5


def shown(values: list[float | None], signed: bool = False) -> str:
    if None in values:
        return "-"
    mean, half = interval(values)
    return f"{mean:+.3f} ± {half:.3f}" if signed else f"{mean:.3f} ± {half:.3f}"


def methods_table(found: dict[str, list[dict]]) -> str:
    rows = []
    for name, runs in found.items():
        params, flops = runs[0]["params"], runs[0]["flops_per_training_sample"]
        rows.append(
            [
                name,
                *(shown([run["scores"][column] for run in runs]) for column in SCORES),
                f"{params['trainable'] / params['total']:.1%}",
                f"{flops / 1e9:.3f}",
                f"{statistics.median(run['times_as_long'] for run in runs):.2f}",
                f"{max(run['peak_kib'] for run in runs) / 2**20:.2f}",
            ]
        )
    return table(["method", *SCORES, "trainable", "GFLOP a study", "time", "GB"], rows)


def ablations_table(found: dict[str, list[dict]]) -> str:
    whole = found["clinvla"]
    rows = [["clinvla", *(shown([run["scores"][name] for run in whole]) for name in JUDGED)]]
    for ablation in ABLATIONS:
        cells = []
        for name in JUDGED:
            pairs = [(run["scores"][name], of["scores"][name]) for run, of in zip(found[ablation], whole, strict=True)]
            cells.append("-" if None in pairs[0] else shown([a - b for a, b in pairs], signed=True))
        rows.append([ablation, *cells])
    return table(["", *JUDGED], rows)


def long_table(found: dict[str, list[dict]]) -> str:
    columns = {**SCORES, **JUDGED}
    values = {name: [runs[0]["scores"][column] for column in columns] for name, runs in found.items()}
    return table(
        ["one seed", *columns], [[name, *("-" if x is None else f"{x:.3f}" for x in of)] for name, of in values.items()]
    )


TABLES = {"methods": methods_table, "longer": long_table, "ablations": ablations_table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where the runs go")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=8, help="of the methods")
    parser.add_argument("--long-epochs", type=int, default=24, help="of a few of them once more, and of the ablations")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--store", action="store_true", help=f"write {STORED.relative_to(ROOT)}")
    settings = parser.parse_args()
    out, seeds = settings.out.resolve(), settings.seeds
    out.mkdir(parents=True, exist_ok=True)
    pretrain(out / "made", "--epochs", "1")
    short, long = settings.epochs, settings.long_epochs
    given = {  # what was trained, the seeds, the epochs
        "methods": ({method: ["--method", method] for method in METHODS} | BESIDE, seeds, short),
        "longer": (LONGER, 1, long),
        "ablations": ({"clinvla": []} | ABLATIONS, seeds, long),
    }
    found = {}
    for name, (jobs, of_seeds, epochs) in given.items():
        runs = run_all(out, jobs, of_seeds, epochs, settings.workers)
        evaluate_all(out, runs, epochs)
        found[name] = kept(runs)
    print(*(table(found[name]) for name, table in TABLES.items()), sep="\n\n")
    if settings.store:
        about = {"command": f"python -m bench.methods --seeds {seeds} --epochs {short} --long-epochs {long} --store"}
        about["device"] = f"{os.cpu_count()} CPU cores, no GPU; {settings.workers} runs at a time, one thread each"
        STORED.write_text(json.dumps(about | found, indent=1) + "\n")


if __name__ == "__main__":
    main()
