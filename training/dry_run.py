"""What a job would take, from a few steps of it: sizes, FLOPs, memory, time. Nothing is kept."""

import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch
from rich.table import Table

from clinvla_fast.cost import adaptor_cost, saved_bytes, study_and_pair_flops
from clinvla_fast.data.features import encode_features
from clinvla_fast.data.phantom import patient_split, patient_truths, write_report
from clinvla_fast.data.phantom.dataset import write_phantoms
from clinvla_fast.data.shards import read_manifest
from clinvla_fast.data.tokenizer import train_tokenizer
from clinvla_fast.distributed import ranks
from clinvla_fast.errors import DataError
from clinvla_fast.fit import Stage
from clinvla_fast.modeling.masked_modeling import MaskedModeling
from clinvla_fast.modeling.model import ClinVLA
from clinvla_fast.modeling.towers import make_tiny_text, make_tiny_vision, save_text, save_vision
from clinvla_fast.pretraining import Align, Fuse, Towers
from clinvla_fast.study import StudyBatch

if TYPE_CHECKING:
    from .pretrain import Job

_SMALL, _LARGE = 4, 12  # studies in the steps that are measured
_REPEATS = 3
_BY_STUDIES = 1, 0  # work: of a study, and of a pair
_PATIENTS = 40  # phantoms that are drawn to measure with


def dry_run(job: "Job", console) -> None:
    """Print what `job` would take.

    Raises:
        DataError: for a job on several processes.
    """
    if ranks() > 1:
        raise DataError("--dry-run measures one process: leave torchrun out.")
    with TemporaryDirectory() as name:
        folder = Path(name)
        data, studies = _data(job, folder)
        vision, text = _towers(job, folder)
        rows: list[tuple[str, str]] = []
        seconds, work = 0.0, _BY_STUDIES
        if job.makes_towers:
            seconds += _tower_time(job, vision, text, data, studies, rows)
        if job.recipe.fusion:
            stage, sizes, small, large = _fusion(job, vision, text, data, studies, rows)
        else:
            model = ClinVLA(vision, text, job.recipe, job.dtype).to(job.device)
            sizes = job.sizes(model)
            stage = Align(model, job.optimization, job.settings.seed, console.print)
            small, large = (_batch(job, data, model, n) for n in (_SMALL, _LARGE))
            work = study_and_pair_flops(model, 2, round(large.lengths.float().mean().item()))
        job.print_sizes(sizes)
        optimization = job.optimization
        step, held = _measured(stage, small, large, optimization.batch_size, optimization.chunk, work)
        batches = optimization.epochs * (studies // optimization.batch_size)
        if not batches:
            raise DataError(
                f"there are {studies} training studies: expected at least {optimization.batch_size}, a batch."
            )
        steps = optimization.epochs * math.ceil(batches / optimization.epochs / optimization.accumulate)
        trained = sum(p.nbytes for p in stage.parameters() if p.requires_grad)
        weights = sum(x.nbytes for x in stage.state_dict().values())
        rows += [
            ("training studies", f"{studies:,}"),
            ("steps", f"{steps:,}"),
            ("a step", _time(step * optimization.accumulate)),
            ("memory: weights", _size(weights)),
            ("memory: gradients and AdamW's averages", _size(3 * trained)),
            (f"memory: what a backward pass of {_at_once(optimization)} studies needs", _size(held)),
            ("memory: together, but for temporaries", _size(weights + 3 * trained + held)),
            ("training, FLOPs in all", f"{sizes['flops_per_step'] / optimization.accumulate * batches:.3g}"),
        ]
        seconds += batches * step
        rows.append(("time of all training steps", _time(seconds)))
    table = Table("the whole job, measured in a few steps", "", show_header=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print("Beside it: decoding and evaluation. Nothing was trained or written: start without --dry-run.")


def _data(job: "Job", folder: Path) -> tuple[Path, int]:
    """Studies to measure with, and how many the job has to train on."""
    if job.settings.data is not None:
        return job.settings.data, read_manifest(job.settings.data)["counts"]["splits"].get("train", 0)
    patients = [p for p in range(job.settings.patients) if patient_split(p) == "train"]
    studies = sum(len(patient_truths(job.settings.seed, patient)) for patient in patients)
    write_phantoms(folder / "data", patients=_PATIENTS, seed=job.settings.seed, size=job.phantom_size)
    return folder / "data", studies


def _towers(job: "Job", folder: Path) -> tuple[str, str]:
    """Names of the job's towers; new ones of their size where it makes them."""
    vision, text = job.vision or str(folder / "vision"), job.text or str(folder / "text")
    if job.vision is None:
        save_vision(make_tiny_vision(), folder / "vision")
    if job.text is None:
        truths = (truth for patient in range(job.settings.patients) for truth in patient_truths(0, patient))
        tokenizer = train_tokenizer(write_report(truth) for truth in truths)
        save_text(make_tiny_text(len(tokenizer)), tokenizer, folder / "text")
    return vision, text


def _tower_time(job: "Job", vision: str, text: str, data: Path, studies: int, rows: list) -> float:
    model = ClinVLA(vision, text, replace(job.recipe, adapters=(), trained=("towers",))).to(job.device)
    settings = job.settings.towers
    trained = model.vision if job.vision is None else None, model.text if job.text is None else None
    stage = Towers(MaskedModeling(*trained, model.tokenizer.mask_token_id), settings, 0).to(job.device)
    small, large = (_batch(job, data, model, n) for n in (_SMALL, _LARGE))
    step, _ = _measured(stage, small, large, settings.batch_size, None, _BY_STUDIES)
    seconds = step * settings.epochs * (studies // settings.batch_size)
    rows.append(("time of making the towers", _time(seconds)))
    return seconds


def _fusion(job: "Job", vision: str, text: str, data: Path, studies: int, rows: list) -> tuple:
    """An Adaptor's stage, sizes, and two batches of its towers' outputs, which are computed once."""
    towers = job.encoders(vision, text)
    adaptor, batches = job.make_adaptor(*towers), []
    for n in (_SMALL, _LARGE):
        sizes = {"image_size": towers[0].image_size, "max_tokens": min(job.recipe.max_tokens, towers[1].max_tokens)}
        batch = next(iter(job.training_loader(data, towers[1].tokenizer, None, cache="off", batch_size=n, **sizes)))
        batch = batch.to(job.device)
        seconds = _timed(lambda batch=batch: batches.append(encode_features(batch, *towers)))
    rows.append(("time of computing the towers' outputs, once", _time(seconds / n * studies)))
    cost = adaptor_cost(adaptor, *towers, batches[-1], 1, job.optimization.batch_size)
    return Fuse(adaptor, job.dtype, job.settings.seed), cost, *batches


def _batch(job: "Job", data: Path, model: ClinVLA, studies: int) -> StudyBatch:
    sizes = {"image_size": model.training_size, "max_tokens": model.max_tokens, "batch_size": studies}
    return next(iter(job.training_loader(data, model.tokenizer, None, cache="off", **sizes))).to(job.device)


def _measured(
    stage: Stage, small: StudyBatch, large: StudyBatch, batch_size: int, chunk: int | None, work: tuple[float, float]
) -> tuple[float, float]:
    """Seconds and bytes of a step of `batch_size` studies, from two smaller ones; bytes are on the line through them.
    In chunks, one of them is in memory at a time."""
    at_once = min(batch_size, chunk or batch_size)
    stage.train()
    stage.chunk = None
    found = [(len(batch), *_of(stage, batch)) for batch in (small, large)]
    seconds, held = ([(n, x[which]) for n, *x in found] for which in (0, 1))
    return step_seconds(seconds, batch_size, at_once, *work), _line(held, at_once)


def step_seconds(measured: list[tuple[int, float]], batch_size: int, at_once: int, study: float, pair: float) -> float:
    """Seconds of a step of `batch_size` studies, on the line through two smaller ones by the work that they are.

    Args:
        measured: studies and seconds of each of the two.
        at_once: studies in the towers at a time; where these are not all, all go forward twice.
        study, pair: the work that each study is, and each pair of an image and a report: local alignment's grows with
            the square of the batch, in chunks too.
    """
    points = [(n * study + n**2 * pair, seconds) for n, seconds in measured]
    replay = 4 / 3 if at_once < batch_size else 1
    towers = replay * batch_size / at_once * _line(points, at_once * study)
    return towers + _line(points, batch_size**2 * pair) - _line(points, 0)


def _of(stage: Stage, batch: StudyBatch) -> tuple[float, int]:
    def step() -> None:
        losses = stage.backward(stage, batch, 0, 1.0, ExitStack)
        float(losses["loss"].detach())
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        stage.zero_grad(set_to_none=True)

    held = saved_bytes(step, stage)
    return min(_timed(step) for _ in range(_REPEATS)), held


def _timed(step: Callable[[], None]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def _line(points: list[tuple[float, float]], at: float) -> float:
    (x0, y0), (x1, y1) = points
    return max(0.0, y0 + (y1 - y0) / (x1 - x0) * (at - x0))


def _at_once(optimization) -> int:
    return min(optimization.batch_size, optimization.chunk or optimization.batch_size)


def _size(n: float) -> str:
    return f"{n / 1e6:,.1f} MB" if n < 1e9 else f"{n / 1e9:,.2f} GB"


def _time(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes > 60 else f"{minutes} min {seconds} s"
