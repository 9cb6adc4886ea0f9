"""The six methods, and ClinVLA without one component at a time (the paper's Table 6), on the same phantoms and seeds.

    python bench/methods.py --out runs/methods                  # about an hour on two cores; goes on where it stopped
    python bench/methods.py --out runs/methods --store          # and writes bench/results/

Data and towers are made once; every method then sees the training studies equally often. Runs are processes of their
own, one thread each, as many at a time as there are cores. Intervals are 95% of Student's t over seeds; those of an
ablation are of the difference to the whole method, seed by seed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
STORED = ROOT / "bench" / "results" / "cpu-2-cores" / "methods.json"
METHODS = ("clinvla", "alta", "adaptor", "mrm", "gloria", "convirt")
BESIDE = {  # what tells whether frozen towers, or how much of an image is seen, make a difference between methods
    "clinvla, end to end": ["--unfreeze"],
    "clinvla, every patch": ["--keep", "1"],
}
ABLATIONS = {
    "no Transformer-Adapt": ["--adapters", "invertible"],
    "no invertible adapter": ["--adapters", "language", "task"],
    "no lateral views": ["--views", "frontal", "prior_frontal"],
    "no prior studies": ["--views", "frontal", "lateral"],
    "no lateral views, no prior studies": ["--views", "frontal"],
    "no local loss": ["--local-weight", "0"],
    "no global loss": ["--global-weight", "0"],
}
SCORES = {
    "text→image P@5": ("text_to_image", "precision@5"),
    "text→image R@10": ("text_to_image", "recall@10"),
    "image→text P@5": ("image_to_text", "precision@5"),
    "image→text R@10": ("image_to_text", "recall@10"),
    "image→image P@5": ("image_to_image", "precision@5"),
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


def run_all(out: Path, seeds: int, epochs: int, workers: int) -> dict[str, list[dict]]:
    """Summaries by what was run, a seed each."""
    out.mkdir(parents=True, exist_ok=True)
    made = out / "made"
    pretrain(made, "--epochs", "1")
    given = ["--data", str(made / "data"), "--epochs", str(epochs)]
    given += ["--vision-tower", str(made / "towers" / "vision"), "--text-tower", str(made / "towers" / "text")]
    jobs = {method: ["--method", method] for method in METHODS} | BESIDE | ABLATIONS
    with ThreadPoolExecutor(workers) as pool:
        running = {}
        for seed in range(seeds):  # so that what is stopped early has every job once
            for name, arguments in jobs.items():
                folder = out / f"{name.replace(' ', '-').replace(',', '')}-{seed}"
                running[name, seed] = pool.submit(pretrain, folder, *given, *arguments, "--seed", str(seed))
        for number, done in enumerate(running.values(), 1):
            done.result()
            print(f"\r{number} of {len(running)} runs", end="", flush=True)
    print()
    return {name: [running[name, seed].result() for seed in range(seeds)] for name in jobs}


def score(summary: dict, name: str) -> float | None:
    way, what = SCORES[name]
    return summary["retrieval"].get(way, {}).get(what)


def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half of its interval."""
    spread = statistics.stdev(values) if len(values) > 1 else float("nan")
    return statistics.mean(values), STUDENT.get(len(values), 2.0) * spread / len(values) ** 0.5


def shown(values: list[float | None], signed: bool = False) -> str:
    if None in values:
        return "-"
    mean, half = interval(values)
    return f"{mean:+.3f} ± {half:.3f}" if signed else f"{mean:.3f} ± {half:.3f}"


def tables(found: dict[str, list[dict]]) -> str:
    """Both tables as Markdown."""
    head = ["method", *SCORES, "trainable", "GFLOP a study", "seconds", "GB"]
    rows = [head, ["---"] * len(head)]
    for name in (*METHODS, *BESIDE):
        runs = found[name]
        params, flops = runs[0]["params"], runs[0]["flops_per_training_sample"]
        rows.append(
            [
                name,
                *(shown([score(run, s) for run in runs]) for s in SCORES),
                f"{params['trainable'] / params['total']:.1%}",
                f"{flops / 1e9:.3f}",
                f"{min(run['wall_seconds'] for run in runs):.0f}",
                f"{max(run['peak_kib'] for run in runs) / 2**20:.2f}",
            ]
        )
    ablations = [["clinvla", *SCORES], ["---"] * (1 + len(SCORES))]
    for name in ABLATIONS:
        cells = []
        for s in SCORES:
            pairs = [(score(run, s), score(whole, s)) for run, whole in zip(found[name], found["clinvla"], strict=True)]
            cells.append("-" if None in pairs[0] else shown([a - b for a, b in pairs], signed=True))
        ablations.append([name, *cells])
    return "\n\n".join("\n".join(f"| {' | '.join(row)} |" for row in table) for table in (rows, ablations))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where the runs go")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--store", action="store_true", help=f"write {STORED.relative_to(ROOT)}")
    settings = parser.parse_args()
    found = run_all(settings.out.resolve(), settings.seeds, settings.epochs, settings.workers)
    print(tables(found))
    if settings.store:
        about = {"command": f"python bench/methods.py --seeds {settings.seeds} --epochs {settings.epochs} --store"}
        about["device"] = f"{os.cpu_count()} CPU cores, no GPU; {settings.workers} runs at a time, one thread each"
        STORED.write_text(json.dumps(about | {"runs": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
