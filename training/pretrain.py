"""Pretrain: align radiographs and reports, by one of six methods.

Without --data it makes phantoms first; with the tiny preset it also makes the towers.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from clinvla_fast.cost import (
    adaptor_cost,
    batch_flops,
    bytes_sent,
    forward_flops,
    parameters,
    step_flops,
    tower_flops,
    training_flops,
)
from clinvla_fast.data.epochs import check_batch
from clinvla_fast.data.features import FeatureLoader, stored_dtype, write_features
from clinvla_fast.data.loader import StudyLoader
from clinvla_fast.data.phantom.dataset import write_phantoms
from clinvla_fast.data.shards import read_manifest, read_studies
from clinvla_fast.data.tokenizer import train_tokenizer
from clinvla_fast.distributed import from_first, own_device, part, process_group, rank, ranks
from clinvla_fast.errors import DataError
from clinvla_fast.evaluation.curves import draw_curves
from clinvla_fast.fit import fit
from clinvla_fast.interrupts import interruptible
from clinvla_fast.modeling import attention
from clinvla_fast.modeling.adapters import adapted_blocks
from clinvla_fast.modeling.adaptor import Adaptor, retrieve_features
from clinvla_fast.modeling.checkpoints import KeyReport
from clinvla_fast.modeling.encoders import ImageEncoder, TextEncoder, load_image_encoder, load_text_encoder
from clinvla_fast.modeling.fp8 import float8_refusal, quantise
from clinvla_fast.modeling.frozen import compute_dtype
from clinvla_fast.modeling.masked_modeling import MaskedModeling
from clinvla_fast.modeling.model import ClinVLA, parameter_groups
from clinvla_fast.modeling.towers import (
    load_text,
    load_vision,
    make_tiny_text,
    make_tiny_vision,
    new_text,
    new_vision,
    save_text,
    save_vision,
    tower_depths,
)
from clinvla_fast.presets import PRESETS
from clinvla_fast.pretraining import Align, Fuse, Towers, compile_tower_blocks, retrieve, warm_up
from clinvla_fast.recipe import Optimization
from clinvla_fast.run import Run, replacing, write_json
from clinvla_fast.study import StudyBatch

from .console import check_attention, device_name, one_clear_error, quiet_libraries
from .dry_run import dry_run
from .settings import RUNS, Pretrain, parse, store

console = Console(highlight=False)
_EVALUATION_BATCH = 64
_FEW = 64  # studies that new heads are fitted to, and that compile the model
_EVALUATIONS = 6  # on the validation split, in a run
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_SCORES = ("text_to_image/recall@10", "image_to_text/recall@10")


def main(args: list[str] | None = None) -> None:
    """Run the command line."""
    with one_clear_error(), interruptible():
        settings = parse(args)
        quiet_libraries()
        device = own_device(device_name(settings.device))
        attending = nullcontext() if settings.attention == "auto" else attention.use(settings.attention)
        with attending, process_group(device):
            console.quiet = rank() > 0
            Job(settings, device).run()


def open_run(settings: Pretrain) -> Path:
    """The run's folder.

    Raises:
        DataError: if there is a run that must not be written over.
    """
    if settings.resume:
        return settings.out
    out = settings.out or next(p for i in range(1, 10**6) if not (p := RUNS / f"{i:03d}").exists())
    begun = {".run.json.partial"}  # by a run that was killed before it could be resumed
    if out.is_dir() and {path.name for path in out.iterdir()} - begun:
        raise DataError(f"{out} is not empty: pass --resume to go on with that run, or another --out.")
    if settings.data is not None:
        read_manifest(settings.data)
    out.mkdir(parents=True, exist_ok=True)
    return out


class Job:
    """The stages of the main job, each skipped where the run already has its result."""

    def __init__(self, settings: Pretrain, device: torch.device):
        self.device, self.settings = device, settings
        self.out: Path | None = None
        if settings.compile and device.type == "cpu" and not any(map(shutil.which, _compilers())):
            raise DataError("--compile needs a C++ compiler on a CPU: apt-get install g++, or leave --compile out.")
        if settings.fp8 and (reason := float8_refusal(device)):
            raise DataError(f"{reason}: leave --fp8 out.")
        preset = PRESETS[settings.preset]
        self.vision, self.text = settings.vision_tower or preset.vision, settings.text_tower or preset.text
        self.recipe, self.optimization = settings.recipe, settings.optimization
        precision = _DTYPES.get(settings.precision)
        self.dtype = precision or compute_dtype(device)
        check_attention(device.type, self.dtype)
        if self.makes_towers:
            check_attention(device.type, torch.float32)
        if settings.fp8 and self.dtype != torch.bfloat16:
            raise DataError("--fp8 needs towers in bfloat16: pass --precision bfloat16.")
        if settings.fp8 and "towers" in self.recipe.trained:
            raise DataError("--fp8 is for frozen towers, and these are trained: leave it out.")
        torch.use_deterministic_algorithms(True, warn_only=True)

    def run(self) -> None:
        self.check_blocks()
        if self.settings.dry_run:
            return dry_run(self, console)
        self.out = from_first(lambda: open_run(self.settings))
        if (self.out / "summary.json").is_file():
            console.print(f"{self.out} is finished.")
            if rank() == 0:  # a killed run may not have come to it
                shutil.rmtree(self.out / "checkpoints", ignore_errors=True)
            return self.report(json.loads((self.out / "summary.json").read_text()))
        console.print(f"Run folder: {self.out}")
        try:
            from_first(lambda: self.record(None))
            data = self.settings.data or from_first(self.phantoms)
            manifest = read_manifest(data)
            from_first(lambda: self.record(data))
            held_out = next((s for s in ("test", "validate") if s in manifest["counts"]["splits"]), None)
            if self.optimization.patience and "validate" not in manifest["counts"]["splits"]:
                raise DataError(f"{data} has no validate studies: --patience needs them.")
            if held_out is None:
                raise DataError(f"{data} has no validate or test studies to evaluate on: give some rows another split.")
            sizes = [self.settings.towers.batch_size] if self.makes_towers else []
            for size in (*sizes, self.optimization.batch_size):
                check_batch(data, manifest["counts"]["splits"].get("train", 0), size, ranks())
            with _on_wandb(self.settings, self.out), closing(Run(self.out, write=rank() == 0)) as run:
                for path in run.damaged:
                    _warn(f"{path} is damaged and was passed over: the run goes on from the checkpoint before it.")
                vision, text = self.towers(run, data)
                if self.recipe.fusion:
                    done = self.fuse(run, data, manifest, held_out, vision, text)
                else:
                    done = self.align(run, data, manifest, held_out, vision, text)
                summary = {
                    **done,
                    "method": self.settings.method,
                    "evaluated_on": {"split": held_out, "studies": manifest["counts"]["splits"][held_out]},
                    "seconds": round(run.seconds, 1),
                }
                if rank() == 0:
                    draw_curves(run.read_metrics(), self.out / "curves.png")
                    stands = f"Trained: {done['steps']:,} steps. Evaluated on {held_out}."
                    run.write_card(stands, _flat(done["retrieval"]))
                    write_json(self.out / "summary.json", summary)
                run.clear_state()
        except KeyboardInterrupt:
            start = "python" if ranks() == 1 else f"torchrun --nproc-per-node {ranks()}"
            console.print(f"Go on with: {start} -m training.pretrain --resume --out {self.out}", soft_wrap=True)
            raise
        self.report(summary)

    def check_blocks(self) -> None:
        """Make sure that both towers have the blocks that are to carry adapters, before anything is made."""
        if self.recipe.adapter_blocks is None:
            return
        try:
            adapted_blocks(self.recipe, min(tower_depths(self.vision, self.text)))
        except ValueError as error:
            raise DataError(str(error)) from error

    @property
    def makes_towers(self) -> bool:
        """Whether a tower is made here by masked modelling."""
        return None in (self.vision, self.text) and not self.recipe.scratch

    # Stages

    def phantoms(self) -> Path:
        out = self.out / "data"
        if not (out / "manifest.json").is_file():
            with _bar("phantoms") as show:
                write_phantoms(
                    out,
                    patients=self.settings.patients,
                    seed=self.settings.seed,
                    size=self.phantom_size,
                    progress=lambda done, of: show(done, of, "patients"),
                )
        return out

    @property
    def phantom_size(self) -> int:
        """With room to crop the towers' 128 or 224 pixels from."""
        return 144 if self.vision is None else 252

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
        settings = store(replace(self.settings, resume=False, out=self.out))
        write_json(path, {"settings": settings, "manifest_sha256": digest})

    def towers(self, run: Run, data: Path) -> tuple[str, str]:
        """Names or paths of both towers. One that neither the preset nor the settings name is made here, by masked
        modelling; a method that starts from scratch has both made, and left random."""
        made = self.out / "towers"
        names = str(made / "vision"), str(made / "text")
        if not self.recipe.scratch:
            names = self.vision or names[0], self.text or names[1]
        if from_first(made.is_dir) or not (self.vision is None or self.text is None or self.recipe.scratch):
            return names
        torch.manual_seed(self.settings.seed)
        if self.text is None:
            tokenizer = train_tokenizer(s.report for s in read_studies(data, "train", images=False))
            text = make_tiny_text(len(tokenizer))
        else:
            text, tokenizer = load_text(self.text)
        vision = make_tiny_vision() if self.vision is None else load_vision(self.vision)
        if self.recipe.scratch:
            vision, text = new_vision(vision), new_text(text)
        else:  # of those that are given nothing is trained
            vision, text = vision if self.vision is None else None, text if self.text is None else None
            self.make_towers(run, data, MaskedModeling(vision, text, tokenizer.mask_token_id), tokenizer)
        if rank() == 0:
            with replacing(made) as folder:
                if vision is not None:
                    save_vision(vision.cpu(), folder / "vision")
                if text is not None:
                    save_text(text.cpu(), tokenizer, folder / "text")
        from_first(lambda: None)
        return names

    def make_towers(self, run: Run, data: Path, model: MaskedModeling, tokenizer) -> None:
        settings = self.settings.towers
        stage = Towers(model, settings, self.settings.seed).to(self.device)
        stage.flops = tower_flops(stage)
        if self.settings.compile:
            compile_tower_blocks(model.vision, model.text)
        longest = self.recipe.max_tokens
        sizes = {
            "image_size": stage.image_size,
            "max_tokens": longest if model.text is None else min(longest, model.text.max_tokens),
            "batch_size": settings.batch_size,
        }
        groups = [{"params": list(stage.parameters()), "lr": settings.lr, "weight_decay": settings.weight_decay}]
        with _bar("towers") as show:
            fit(
                run,
                stage,
                groups,
                lambda checkpoint: self.training_loader(data, tokenizer, checkpoint, **sizes),
                Optimization(epochs=settings.epochs, warmup=settings.warmup),
                dtype=torch.float32,
                progress=show,
            )

    def align(self, run: Run, data: Path, manifest: dict, held_out: str, vision: str, text: str) -> dict:
        """Train a model; what there is to say of it."""
        torch.manual_seed(self.settings.seed)
        try:
            model = ClinVLA(vision, text, self.recipe, self.dtype).to(self.device)
        except ValueError as error:
            raise DataError(str(error)) from error
        self.report_keys(vision=model.vision.key_report, text=model.text.key_report)
        stage = Align(model, self.optimization, self.settings.seed, _warn)
        stage.flops = training_flops(model)
        sizes = self.sizes(model)
        self.describe(run, manifest, sizes)
        self.print_sizes(sizes)

        def make_loader(checkpoint: str | None, **options) -> StudyLoader:
            sizes = {"image_size": model.training_size, "max_tokens": model.max_tokens}
            sizes |= {"batch_size": self.optimization.batch_size}
            return self.training_loader(data, model.tokenizer, checkpoint, **sizes | options)

        new = run.state is None or run.state["stage"] != "align"
        if new or self.settings.compile or self.settings.fp8:
            few = min(max(2, self.optimization.batch_size), _FEW)
            first = next(iter(make_loader(None, cache="off", rank=0, ranks=1, batch_size=few))).to(self.device)
        if self.settings.fp8:
            self.quantise(model, first)
        if new:
            model.standardise_heads(first)
        if self.settings.compile:
            compile_tower_blocks(model.vision, model.text)
            seconds = warm_up(stage, first, *self.of_one_study(manifest, {"validate", held_out}))
            console.print(f"compiled in {seconds:.0f} s; the speeds below are without it.")
        validation = "validate" in manifest["counts"]["splits"]
        validation = self.loader(data, "validate", model) if validation else None
        measure, score = self.measure(lambda: {} if validation is None else retrieve(model, validation))
        with _bar("alignment") as show:
            done = fit(
                run, stage, parameter_groups(model.trainable(), self.optimization), make_loader, self.optimization,
                dtype=self.dtype, measure=measure, score=score, progress=show,
            )  # fmt: skip
        retrieval = retrieve(model, self.loader(data, held_out, model))
        if rank() == 0:
            model.save_pretrained(self.out)
        return {"retrieval": retrieval, **sizes, **done, "collapsed": stage.alarm.raised}

    def fuse(self, run: Run, data: Path, manifest: dict, held_out: str, vision: str, text: str) -> dict:
        """Train an Adaptor on the towers' outputs, which are computed once; what there is to say of it."""
        towers = self.encoders(vision, text)
        self.report_keys(vision=towers[0].key_report, text=towers[1].key_report)
        folder = self.settings.features or self.out / "features"
        splits = [split for split in ("train", "validate", held_out) if split in manifest["counts"]["splits"]]
        for split in dict.fromkeys(splits):
            from_first(partial(self.write_features, data, split, folder / split, *towers))
        adaptor = self.make_adaptor(*towers)
        stage = Fuse(adaptor, self.dtype, self.settings.seed)

        def make_loader(checkpoint: str | None = None, split: str = "train") -> FeatureLoader:
            size = self.optimization.batch_size if split == "train" else _EVALUATION_BATCH
            options = {"checkpoint": checkpoint, "seed": self.settings.seed, "rank": rank(), "ranks": ranks()}
            return FeatureLoader(folder / split, size, train=split == "train", **options)

        sizes = adaptor_cost(adaptor, *towers, next(iter(make_loader())), ranks(), self.optimization.batch_size)
        stage.flops = lambda batch: len(batch) * sizes["flops_per_training_sample"]
        del towers  # their outputs are on disk
        self.describe(run, manifest, sizes)
        lines = 'from clinvla_fast import AdaptorModel\n\nmodel = AdaptorModel.load("this folder")'
        run.use = {"use": lines}
        self.print_sizes(sizes)
        validation = make_loader(split="validate") if "validate" in splits else None
        measure, score = self.measure(lambda: {} if validation is None else retrieve_features(adaptor, validation))
        groups = parameter_groups(dict(adaptor.named_parameters()), self.optimization)
        with _bar("alignment") as show:
            done = fit(
                run, stage, groups, make_loader, self.optimization,
                dtype=self.dtype, measure=measure, score=score, progress=show,
            )  # fmt: skip
        retrieval = retrieve_features(adaptor, make_loader(split=held_out))
        if rank() == 0:
            adaptor.save(self.out)
        return {"retrieval": retrieval, **sizes, **done}

    # Parts

    def encoders(self, vision: str, text: str) -> tuple[ImageEncoder, TextEncoder]:
        return (
            load_image_encoder(vision, self.dtype).to(self.device),
            load_text_encoder(text, self.dtype).to(self.device),
        )

    def make_adaptor(self, image: ImageEncoder, text: TextEncoder) -> Adaptor:
        torch.manual_seed(self.settings.seed)
        width = self.recipe.width
        sizes = {
            "width": width,
            "heads": next(n for n in range(max(1, width // 64), 0, -1) if width % n == 0),
            "hidden": 4 * width,
        }
        names = {"image_encoder": image.name, "text_encoder": text.name}
        return Adaptor(image.width, text.width, **sizes, **names, max_tokens=self.recipe.max_tokens).to(self.device)

    def write_features(self, data: Path, split: str, out: Path, image: ImageEncoder, text: TextEncoder) -> None:
        loader = StudyLoader(
            data,
            split,
            text.tokenizer,
            image_size=image.image_size,
            max_tokens=min(self.recipe.max_tokens, text.max_tokens),
            batch_size=_EVALUATION_BATCH,
            device="gpu" if self.device.type == "cuda" else "cpu",
        )
        dtype = stored_dtype(self.dtype)
        with _bar(f"features, {split}") as show:
            write_features(loader, image, text, out, dtype, lambda done, of: show(done, of, "studies"))

    def measure(self, scores: Callable[[], dict]) -> tuple[Callable[[int], dict[str, float]], tuple[str, ...]]:
        """What is measured after an epoch, some of them; by which scores training may end early."""
        every = 1 if self.optimization.patience else max(1, self.optimization.epochs // _EVALUATIONS)

        def measure(epoch: int) -> dict[str, float]:
            if epoch % every and epoch != self.optimization.epochs:
                return {}
            return _flat(scores())

        aligned = self.recipe.global_weight or self.recipe.local_weight
        return measure, _SCORES if aligned else ("image_to_image/precision@5",)

    def sizes(self, model: ClinVLA) -> dict:
        return {
            "params": parameters(model),
            "flops_per_sample": forward_flops(model, views=2, tokens=model.max_tokens),
            "flops_per_training_sample": step_flops(model, views=2, tokens=model.max_tokens),
            "flops_per_step": self.optimization.accumulate
            * batch_flops(model, 2, model.max_tokens, self.optimization.batch_size),
            "bytes_sent_per_step": bytes_sent(model, self.optimization.batch_size, ranks()),
        }

    def describe(self, run: Run, manifest: dict, sizes: dict) -> None:
        """What the model card says beside scores and versions."""
        counts = ", ".join(f"{n:,} {split}" for split, n in manifest["counts"]["splits"].items())
        digest = json.loads((self.out / "run.json").read_text())["manifest_sha256"]
        run.about = {
            "Method": {"method": self.settings.method, "preset": self.settings.preset, "seed": self.settings.seed},
            "Data": {"source": manifest["source"], "studies": counts, "SHA-256 of manifest.json": digest},
            "Sizes": sizes["params"] | {name: n for name, n in sizes.items() if name != "params"},
        }

    def report_keys(self, **reports: KeyReport | None) -> None:
        """What became of every key of the files that towers came from, in words, and by name in towers.json."""
        found = {kind: report for kind, report in reports.items() if report is not None}
        for kind, report in found.items():
            console.print(f"{kind} tower: {report.summary()}")
        if found and rank() == 0:
            write_json(self.out / "towers.json", {kind: asdict(report) for kind, report in found.items()})

    def quantise(self, model: ClinVLA, batch: StudyBatch) -> None:
        """By the towers and the first batch alone, so that a resumed run puts the same layers in FP8."""
        for kind, tower, features in (
            ("image", model.vision.vit, lambda: model.image_features(batch)),
            ("report", model.text.bert, lambda: model.text_features(batch)),
        ):
            console.print("{} tower: {} of {} linear layers in FP8".format(kind, *quantise(tower, features)))

    def of_one_study(self, manifest: dict, evaluated: set[str]) -> tuple[bool, bool]:
        """Whether any process trains on, and evaluates, a batch or a part of one that has a single study."""
        size, chunk = self.optimization.batch_size, self.optimization.chunk
        trained = [len(range(size)[part(size, ranks(), r)]) for r in range(ranks())]
        splits = manifest["counts"]["splits"]
        evaluated = [len(range(r, splits.get(split, 0), ranks())) for split in evaluated for r in range(ranks())]
        return any(1 in (n, chunk, n % (chunk or n)) for n in trained), any(
            n % _EVALUATION_BATCH == 1 for n in evaluated
        )

    def training_loader(self, data: Path, tokenizer, checkpoint: str | None, **sizes) -> StudyLoader:
        defaults = {"cache": self.settings.cache, "cache_folder": self.out, "rank": rank(), "ranks": ranks()}
        return StudyLoader(
            data,
            "train",
            tokenizer,
            train=True,
            device="gpu" if self.device.type == "cuda" else "cpu",
            seed=self.settings.seed,
            checkpoint=checkpoint,
            **defaults | sizes,
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
            rank=rank(),
            ranks=ranks(),
        )

    def print_sizes(self, sizes: dict) -> None:
        params, tokens = sizes["params"], self.recipe.max_tokens
        table = Table("size, counted", "", title=f"{self.settings.method}, {self.settings.preset}", show_header=False)
        table.add_row("parameters", f"{params['total']:,}")
        table.add_row("trainable", f"{params['trainable']:,} ({params['trainable'] / params['total']:.1%})")
        table.add_row(f"forward, 2 whole views + {tokens} tokens", _flops(sizes["flops_per_sample"]))
        batch = self.optimization.batch_size * self.optimization.accumulate
        table.add_row(f"training, a study of 2 views + {tokens} tokens", _flops(sizes["flops_per_training_sample"]))
        table.add_row(f"training, a step of {batch} studies", _flops(sizes["flops_per_step"]))
        if ranks() > 1:
            table.add_row(f"sent a step by each of {ranks()} processes", f"{sizes['bytes_sent_per_step'] / 1e6:.2f} MB")
        console.print(table)

    def report(self, summary: dict) -> None:
        split, studies = summary["evaluated_on"].values()
        table = Table("retrieval", "score", "chance", "x chance", title=f"{studies} held-out studies ({split})")
        for way, scores in summary["retrieval"].items():
            for name in (n for n in scores if not n.endswith("_chance")):
                score, chance = scores[name], scores.get(f"{name}_chance")
                if score is None:
                    cells = ("no labels", "", "")
                else:
                    cells = f"{score:.3f}", *((f"{chance:.3f}", f"{score / chance:.1f}") if chance else ("", ""))
                table.add_row(f"{way.replace('_', ' ')} {name}", *cells)
        console.print(table)
        files = "summary.json, README.md, metrics.jsonl, curves.png, tensorboard/ and the model"
        console.print(f"{summary['seconds']:.0f} s. In {self.out}: {files}:", soft_wrap=True)
        if self.recipe.fusion:
            use = f'from clinvla_fast import AdaptorModel; AdaptorModel.load("{self.out}")'
        else:
            use = f'from clinvla_fast import ClinVLA; ClinVLA.from_pretrained("{self.out}")'
        console.print(f"    {use}", soft_wrap=True)


def _flat(scores: dict[str, dict]) -> dict[str, float]:
    return {f"{way}/{name}": x for way, found in scores.items() for name, x in found.items() if x is not None}


def _flops(n: float) -> str:
    return f"{n / 1e9:,.3f} GFLOP"


def _compilers() -> tuple[str, ...]:
    return (os.environ.get("CXX", "g++"), "g++", "clang++")


def _warn(message: str) -> None:
    console.print(f"[bold red]Warning[/] {message}")


@contextmanager
def _on_wandb(settings: Pretrain, out: Path) -> Iterator[None]:
    """Within: what goes to TensorBoard goes to Weights & Biases too, where a project is named."""
    if settings.wandb is None or rank():
        yield
        return
    try:
        import wandb
    except ImportError:
        raise DataError("--wandb needs its package: pip install wandb, or leave --wandb out.") from None
    wandb.tensorboard.patch(root_logdir=str(out / "tensorboard"))  # below it: a curve's stage and name
    try:
        with wandb.init(project=settings.wandb, name=out.name, dir=out, config=store(settings)):
            yield
    finally:
        wandb.tensorboard.unpatch()


@contextmanager
def _bar(stage: str) -> Iterator[Callable]:
    """A progress bar; its function takes the step, the steps in all, and words about where things stand."""
    columns = (
        TextColumn(f"{stage:<9}"),
        BarColumn(bar_width=20),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[words]}"),
    )
    # No refreshing thread: phantoms are drawn by forked processes.
    with Progress(*columns, console=console, auto_refresh=False) as bar:
        task = bar.add_task(stage, total=None, words="")

        def show(done: int, total: int, words: str, per_step: int = 1) -> None:
            bar.update(task, completed=done, total=total, words=words, refresh=True)

        yield show


if __name__ == "__main__":
    main()
