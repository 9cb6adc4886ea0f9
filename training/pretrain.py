"""Pretrain: align radiographs and reports with adapters in frozen towers.

Without --data it makes phantoms first; with the tiny preset it also makes the towers.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from clinvla_fast.cost import forward_flops, parameters, step_flops
from clinvla_fast.data.cache import CacheName
from clinvla_fast.data.loader import StudyLoader
from clinvla_fast.data.phantom.dataset import write_phantoms
from clinvla_fast.data.shards import read_manifest, read_studies
from clinvla_fast.data.tokenizer import train_tokenizer
from clinvla_fast.errors import DataError
from clinvla_fast.evaluation.curves import draw_curves
from clinvla_fast.modeling import attention
from clinvla_fast.modeling.fp8 import float8_refusal, quantise
from clinvla_fast.modeling.frozen import compute_dtype
from clinvla_fast.modeling.masked_modeling import MaskedModeling
from clinvla_fast.modeling.model import ClinVLA
from clinvla_fast.modeling.towers import (
    load_text,
    load_vision,
    make_tiny_text,
    make_tiny_vision,
    save_text,
    save_vision,
)
from clinvla_fast.presets import PRESETS, Precision, Preset, PresetName
from clinvla_fast.pretraining import align, compile_tower_blocks, interruptible, make_towers, retrieve, warm_up
from clinvla_fast.recipe import Objective
from clinvla_fast.run import Run, replacing, write_json
from clinvla_fast.study import StudyBatch

from .console import device_name, one_clear_error, quiet_libraries

console = Console(highlight=False)
_RUNS = Path("runs")
_EVALUATION_BATCH = 64
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class Pretrain:
    """What the main job can be told."""

    data: Path | None = None
    """A folder written by training.prepare. Default: phantoms, made in the run's folder."""
    out: Path | None = None
    """The run's folder. Default: the next free number under runs/."""
    preset: PresetName = "tiny"
    """tiny: small towers, made here. base: ViT-B/16 (MAE) and BioBERT, from their hubs, or those given below."""
    objective: Objective = "contrastive"
    """contrastive: InfoNCE and local alignment. cosine: the paper's formulas as printed, which have no negatives."""
    vision_tower: str | None = None
    """A timm ViT: its name, a folder that timm saved, or a file of ViT-B/16 weights. Overrides the preset's."""
    text_tower: str | None = None
    """A Hugging Face BERT: its name or folder. Overrides the preset's."""
    adapter_blocks: str | None = None
    """Which blocks of both towers carry adapters, from 0, as 8-11 or 2,5,8-11. What lies below the lowest is not
    trained and costs no backward pass. Default: every block."""
    precision: Precision | None = None
    """What the frozen towers compute in. auto: bfloat16 where the machine has matrix instructions for it. What is
    trained is float32. Default: the preset's."""
    fp8: bool = False
    """Frozen linear layers in FP8, where a GPU has it: as many as leave a tower's features close to bfloat16's."""
    attention: Literal["auto", "xformers", "varlen", "sdpa"] = "auto"
    """Which library attends. auto: xformers on a GPU, sdpa on a CPU."""
    cache: CacheName = "auto"
    """Where decoded training images are kept after the first pass: gpu memory, ram, or disk (a file in the run's folder
    that goes with the process). auto: the first of them of whose free space they take at most half. Results are the
    same with any."""
    compile: bool = False
    """Compile the towers' blocks: slower to start, faster to run."""
    resume: bool = False
    """Go on with the run in --out (default: the newest under runs/), with the settings it was started with."""
    device: str = "auto"
    """cpu, cuda, or auto: cuda where there is one."""
    seed: int = 0
    """The same seed, settings and machine give the same numbers."""
    patients: int = 1200
    """Phantoms to make, where --data is not given."""
    epochs: int | None = None
    """Passes over the training studies. Default: the preset's."""
    tower_epochs: int | None = None
    """Passes of masked modelling that make the towers. Default: the preset's."""
    batch_size: int | None = None
    """Studies a step. Default: the preset's."""


def main(args: list[str] | None = None) -> None:
    """Run the command line."""
    settings = tyro.cli(Pretrain, prog="python -m training.pretrain", description=__doc__, args=args)
    quiet_libraries()
    with one_clear_error(), attention.use(settings.attention), interruptible():
        Job(settings).run()


def open_run(settings: Pretrain) -> tuple[Path, Pretrain]:
    """The run's folder and the settings in force.

    Raises:
        DataError: if there is no run to resume, or a run that must not be written over.
    """
    if not settings.resume:
        out = settings.out or next(p for i in range(1, 10**6) if not (p := _RUNS / f"{i:03d}").exists())
        if out.is_dir() and any(out.iterdir()):
            raise DataError(f"{out} is not empty: pass --resume to go on with that run, or another --out.")
        if settings.data is not None:
            read_manifest(settings.data)
        out.mkdir(parents=True, exist_ok=True)
        return out, settings
    out = settings.out or max(_RUNS.glob("*/run.json"), default=_RUNS / "none", key=os.path.getmtime).parent
    if not (out / "run.json").is_file():
        raise DataError(f"{out} holds no run to resume (no run.json): start one without --resume.")
    saved = json.loads((out / "run.json").read_text())["settings"]
    paths = {name: saved[name] and Path(saved[name]) for name in ("data", "out")}
    again = {name: getattr(settings, name) for name in ("compile", "device", "cache")}
    return out, replace(Pretrain(**{**saved, **paths}), resume=True, **again)


class Job:
    """The stages of the main job, each skipped where the run already has its result."""

    def __init__(self, settings: Pretrain):
        self.device = torch.device(device_name(settings.device))
        if settings.compile and self.device.type == "cpu" and not any(map(shutil.which, _compilers())):
            raise DataError("--compile needs a C++ compiler on a CPU: apt-get install g++, or leave --compile out.")
        if settings.fp8 and (reason := float8_refusal(self.device)):
            raise DataError(f"{reason}: leave --fp8 out.")
        self.out, self.settings = open_run(settings)
        self.preset = _preset(self.settings)
        torch.use_deterministic_algorithms(True, warn_only=True)

    def run(self) -> None:
        if (self.out / "summary.json").is_file():
            console.print(f"{self.out} is finished.")
            return self.report(json.loads((self.out / "summary.json").read_text()))
        console.print(f"Run folder: {self.out}")
        try:
            self.record(None)
            data = self.settings.data or self.phantoms()
            manifest = read_manifest(data)
            self.record(data)
            held_out = next((s for s in ("test", "validate") if s in manifest["counts"]["splits"]), None)
            if held_out is None:
                raise DataError(f"{data} has no validate or test studies to evaluate on: give some rows another split.")
            with closing(Run(self.out)) as run:
                names = self.towers(run, data)
                model = self.align(run, data, manifest, *names)
                summary = {
                    "retrieval": retrieve(model, self.loader(data, held_out, model)),
                    "evaluated_on": {"split": held_out, "studies": manifest["counts"]["splits"][held_out]},
                    "params": parameters(model),
                    **self.flops,
                    "collapsed": self.collapsed,
                    "seconds": round(run.seconds, 1),
                }
                model.save_pretrained(self.out)
                draw_curves(run.read_metrics(), self.out / "curves.png")
                write_json(self.out / "summary.json", summary)
                run.clear_state()
        except KeyboardInterrupt:
            console.print(f"Go on with: python -m training.pretrain --resume --out {self.out}", soft_wrap=True)
            raise
        self.report(summary)

    # Stages

    def phantoms(self) -> Path:
        out = self.out / "data"
        if not (out / "manifest.json").is_file():
            size = 144 if self.preset.vision is None else 252  # room to crop towers' 128 and 224 from
            with _bar("phantoms") as show:
                write_phantoms(
                    out,
                    patients=self.settings.patients,
                    seed=self.settings.seed,
                    size=size,
                    progress=lambda done, of: show(done, of, "patients"),
                )
        return out

    def record(self, data: Path | None) -> None:
        """Write run.json; or, in a resumed run, make sure that the data are still the same."""
        digest = data and hashlib.sha256((data / "manifest.json").read_bytes()).hexdigest()
        path = self.out / "run.json"
        if self.settings.resume:
            known = json.loads(path.read_text())["manifest_sha256"]
            if digest is None:
                return
            if known not in (None, digest):
                raise DataError(f"{data} is not the data that {self.out} was started with (its manifest differs).")
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self.settings).items()}
        write_json(path, {"settings": settings, "preset": asdict(self.preset), "manifest_sha256": digest})

    def towers(self, run: Run, data: Path) -> tuple[str, str]:
        """Names or paths of both towers; made here by masked modelling where the preset has none."""
        made = self.out / "towers"
        names = self.preset.vision or str(made / "vision"), self.preset.text or str(made / "text")
        if made.is_dir() or not (self.preset.vision is None or self.preset.text is None):
            return names
        torch.manual_seed(self.settings.seed)
        if self.preset.text is None:
            tokenizer = train_tokenizer(s.report for s in read_studies(data, "train", images=False))
            text = make_tiny_text(len(tokenizer))
        else:
            text, tokenizer = load_text(self.preset.text)
        vision = make_tiny_vision() if self.preset.vision is None else load_vision(self.preset.vision)
        model = MaskedModeling(vision, text, tokenizer.mask_token_id).to(self.device)
        if self.settings.compile:
            compile_tower_blocks(vision, text)
        settings = self.preset.towers

        def make_loader(checkpoint: str | None) -> StudyLoader:
            sizes = {"image_size": vision.image_size, "max_tokens": min(self.preset.recipe.max_tokens, text.max_tokens)}
            return self.training_loader(data, tokenizer, settings.batch_size, checkpoint, **sizes)

        with _bar("towers") as show:
            make_towers(run, model, make_loader, settings, self.settings.seed, show)
        with replacing(made) as partial:
            save_vision(vision.cpu(), partial / "vision")
            save_text(text.cpu(), tokenizer, partial / "text")
        return names

    def align(self, run: Run, data: Path, manifest: dict, vision: str, text: str) -> ClinVLA:
        torch.manual_seed(self.settings.seed)
        precision = self.settings.precision or self.preset.precision
        dtype = compute_dtype(self.device) if precision == "auto" else _DTYPES[precision]
        try:
            model = ClinVLA(vision, text, self.preset.recipe, dtype).to(self.device)
        except ValueError as error:
            raise DataError(str(error)) from error
        tokens = model.max_tokens
        self.flops = {
            "flops_per_sample": forward_flops(model, views=2, tokens=tokens),
            "flops_per_training_sample": step_flops(model, views=2, tokens=tokens),
        }
        self.print_sizes(parameters(model), tokens)
        recipe = model.recipe

        def make_loader(checkpoint: str | None) -> StudyLoader:
            sizes = {"image_size": model.vision.image_size, "max_tokens": tokens}
            return self.training_loader(data, model.tokenizer, recipe.batch_size, checkpoint, **sizes)

        new = run.state is None or run.state["stage"] != "align"
        if new or self.settings.compile or self.settings.fp8:
            sizes = {"image_size": model.vision.image_size, "max_tokens": tokens, "cache": "off"}
            loader = self.training_loader(data, model.tokenizer, recipe.batch_size, None, **sizes)
            first = next(iter(loader)).to(self.device)
        if self.settings.fp8:
            self.quantise(model, first)
        if new:
            model.standardise_heads(first)
        if self.settings.compile:
            compile_tower_blocks(model.vision, model.text)
            console.print(f"compiled in {warm_up(model, first):.0f} s; the speeds below are without it.")
        validation = "validate" in manifest["counts"]["splits"]
        validation = self.loader(data, "validate", model) if validation else None
        with _bar("alignment") as show:
            alarm = align(run, model, make_loader, validation, self.settings.seed, show, _warn)
        self.collapsed = alarm.raised
        return model

    # Parts

    def quantise(self, model: ClinVLA, batch: StudyBatch) -> None:
        """By the towers and the first batch alone, so that a resumed run puts the same layers in FP8."""
        if model.vision.vit.pos_embed.dtype != torch.bfloat16:
            raise DataError("--fp8 needs towers in bfloat16: leave --precision out.")
        for kind, tower, features in (
            ("image", model.vision.vit, lambda: model.image_features(batch)),
            ("report", model.text.bert, lambda: model.text_features(batch)),
        ):
            console.print("{} tower: {} of {} linear layers in FP8".format(kind, *quantise(tower, features)))

    def training_loader(self, data: Path, tokenizer, batch_size: int, checkpoint: str | None, **sizes) -> StudyLoader:
        return StudyLoader(
            data,
            "train",
            tokenizer,
            batch_size=batch_size,
            train=True,
            device="gpu" if self.device.type == "cuda" else "cpu",
            seed=self.settings.seed,
            checkpoint=checkpoint,
            cache_folder=self.out,
            **{"cache": self.settings.cache} | sizes,
        )

    def loader(self, data: Path, split: str, model: ClinVLA) -> StudyLoader:
        return StudyLoader(
            data,
            split,
            model.tokenizer,
            image_size=model.vision.image_size,
            max_tokens=model.max_tokens,
            batch_size=_EVALUATION_BATCH,
            device="gpu" if self.device.type == "cuda" else "cpu",
        )

    def print_sizes(self, params: dict[str, int], tokens: int) -> None:
        table = Table("size, counted", "", title=f"ClinVLA, {self.settings.preset}", show_header=False)
        table.add_row("parameters", f"{params['total']:,}")
        table.add_row("trainable", f"{params['trainable']:,} ({params['trainable'] / params['total']:.1%})")
        table.add_row(f"forward, 2 whole views + {tokens} tokens", f"{self.flops['flops_per_sample'] / 1e9:.3f} GFLOP")
        table.add_row(
            f"training step, masked + {tokens} tokens", f"{self.flops['flops_per_training_sample'] / 1e9:.3f} GFLOP"
        )
        console.print(table)

    def report(self, summary: dict) -> None:
        split, studies = summary["evaluated_on"].values()
        table = Table("retrieval", "score", "chance", "x chance", title=f"{studies} held-out studies ({split})")
        for way, scores in summary["retrieval"].items():
            for name in ("precision@5", "recall@10"):
                score, chance = scores[name], scores[f"{name}_chance"]
                cells = (
                    ("no labels", "", "")
                    if score is None
                    else (f"{score:.3f}", f"{chance:.3f}", f"{score / chance:.1f}")
                )
                table.add_row(f"{way.replace('_', ' ')} {name}", *cells)
        console.print(table)
        files = "summary.json, metrics.jsonl, curves.png, tensorboard/ and the model"
        console.print(f"{summary['seconds']:.0f} s. In {self.out}: {files}:", soft_wrap=True)
        console.print(f'    from clinvla_fast import ClinVLA; ClinVLA.from_pretrained("{self.out}")', soft_wrap=True)


def _preset(settings: Pretrain) -> Preset:
    """The preset with what the command line overrides."""
    preset = PRESETS[settings.preset]
    given = {"epochs": settings.epochs, "batch_size": settings.batch_size}
    recipe = replace(preset.recipe, objective=settings.objective, **{k: v for k, v in given.items() if v is not None})
    if settings.adapter_blocks is not None:
        recipe = replace(recipe, adapter_blocks=_blocks(settings.adapter_blocks))
    for name, value in (*given.items(), ("tower_epochs", settings.tower_epochs), ("patients", settings.patients)):
        if value is not None and value < 1:
            raise DataError(f"--{name.replace('_', '-')} is {value}: expected at least 1.")
    towers = preset.towers
    if towers is not None:
        given = {"epochs": settings.tower_epochs, "batch_size": settings.batch_size}
        towers = replace(towers, **{k: v for k, v in given.items() if v is not None})
    vision, text = settings.vision_tower or preset.vision, settings.text_tower or preset.text
    return replace(preset, recipe=recipe, vision=vision, text=text, towers=towers)


def _blocks(text: str) -> tuple[int, ...]:
    """The numbers in "2,5,8-11", ascending."""
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not (last.isdecimal() and int(first) <= int(last))):
            raise DataError(f"--adapter-blocks is {text!r}: expected numbers and ranges, as 8-11 or 2,5,8-11.")
        found.update(range(int(first), int(last if dash else first) + 1))
    return tuple(sorted(found))


def _compilers() -> tuple[str, ...]:
    return (os.environ.get("CXX", "g++"), "g++", "clang++")


def _warn(message: str) -> None:
    console.print(f"[bold red]Warning[/] {message}")


@contextmanager
def _bar(stage: str) -> Iterator[Callable]:
    """A progress bar; its function takes the step, the steps in all, and words about where things stand."""
    columns = (
        TextColumn(f"{stage:<9}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[words]}"),
    )
    # No refreshing thread: phantoms are drawn by forked processes.
    with Progress(*columns, console=console, auto_refresh=False) as bar:
        task = bar.add_task(stage, total=None, rate="", words="")
        first: tuple[float, int] | None = None

        def show(done: int, total: int, words: str, per_step: int = 1) -> None:
            nonlocal first
            now = time.monotonic()
            first = first or (now, done)
            speed = (done - first[1]) * per_step / (now - first[0]) if done > first[1] else 0
            bar.update(
                task, completed=done, total=total, words=words, rate=f"{speed:.0f}/s" if speed else "", refresh=True
            )

        yield show


if __name__ == "__main__":
    main()
