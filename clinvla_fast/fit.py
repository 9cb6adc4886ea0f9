"""The training loop: every stage of every method runs in it, on one process or many.

A stage is an `nn.Module` whose forward turns a batch into losses; it also says how a batch is split into parts that go
through the towers one after the other. DDP wraps it, and so carries what is trained and nothing else.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .distributed import data_parallel, gathered, ranks, summed, total
from .errors import DataError
from .interrupts import interrupts
from .machine import matrix_rate, peak_memory
from .recipe import Optimization
from .run import Run, random_states, set_random_states
from .study import StudyBatch

_LOG_EVERY = 10
_SAVE_SECONDS = 600


class Loader(Protocol):
    """Batches of this process's part, epoch after epoch; where it stands is a string."""

    batch_size: int

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[StudyBatch]: ...
    def checkpoint(self) -> str: ...


MakeLoader = Callable[[str | None], Loader]


class Progress(Protocol):
    """What a stage tells whoever watches it."""

    def __call__(self, step: int, steps: int, words: str, studies_per_step: int) -> None: ...


class Stage(nn.Module):
    """What is trained.

    Args:
        seed: of all that its steps draw.
    """

    name: str
    flops: Callable[[Any], Tensor | float] = staticmethod(lambda batch: 0.0)
    """Of training on a batch; 0 where they are not counted."""

    def __init__(self, seed: int):
        super().__init__()
        self.seed = seed

    def forward(self, batch: Any, seed: int) -> dict[str, Tensor]:
        """`loss`, which is minimised, and what else there is to see, detached. The mean over ranks is the loss of the
        whole batch."""
        raise NotImplementedError

    def backward(self, run: Callable, batch: Any, seed: int, share: float, quiet: Callable) -> dict[str, Tensor]:
        """Add `share` of the loss's gradients to those there are.

        Args:
            run: calls `forward`, by way of DDP.
            quiet: the context in which gradients are not exchanged: for all backward passes of a step but its last.
        """
        losses = run(batch, seed)
        (share * losses["loss"]).backward()
        return losses

    def watch(self, step: int, steps: int) -> dict[str, float]:
        """More measurements of the last batch, every so many steps."""
        return {}

    def state(self) -> dict:
        """What else a checkpoint has to hold; plain values."""
        return {}

    def load_state(self, state: dict) -> None: ...


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then a cosine to zero, as a factor of the learning rate."""

    steps: int
    warmup: float

    def __call__(self, step: int) -> float:
        rising = max(1, round(self.warmup * self.steps))
        if step < rising:
            return (step + 1) / rising
        return (1 + math.cos(math.pi * (step - rising) / max(1, self.steps - rising))) / 2


def step_seed(seed: int, batch: int) -> int:
    """A seed for what a batch draws, so that a resumed run draws the same."""
    return (seed << 32) + batch


class _Speed:
    """Of the last few steps: studies a second, the share of the machine's peak, and of time spent waiting for data."""

    def __init__(self, flops: Callable[[Any], Tensor | float], device: torch.device, dtype: torch.dtype):
        self._flops, self._peak, self._device = flops, matrix_rate(device, dtype), device
        self.start()

    def start(self) -> None:
        self._since, self._waited, self._studies, self._done = time.perf_counter(), 0.0, 0, 0.0

    def next(self, batches: Iterator) -> Any:
        start = time.perf_counter()
        batch = next(batches)
        self._waited += time.perf_counter() - start
        self._studies += len(batch)
        self._done = self._done + self._flops(batch)
        return batch

    def read(self) -> dict[str, float]:
        seconds = time.perf_counter() - self._since
        return {
            "studies_a_second": self._studies / seconds * ranks(),
            "share_of_peak": float(self._done) / seconds / self._peak,
            "data_wait_share": self._waited / seconds,
            "peak_memory_gb": peak_memory(self._device) / 1e9,
        }


class _Average:
    """An exponential moving average of weights. Its decay grows to what is asked for, as (1 + n) / (10 + n) after n
    updates (TensorFlow's `num_updates`): in a short run the first weights, which are random, would stay in it."""

    def __init__(self, decay: float, trained: dict[str, nn.Parameter]):
        self._decay, self._trained = decay, trained
        self.weights = {name: p.detach().clone() for name, p in trained.items()}

    @torch.no_grad()
    def update(self, before: int) -> None:
        """`before`: how many updates there were."""
        decay = min(self._decay, (1 + before) / (10 + before))
        torch._foreach_lerp_(list(self.weights.values()), [p.data for p in self._trained.values()], 1 - decay)


@torch.no_grad()
def _put(trained: dict[str, Tensor], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Set weights; return those that were there."""
    before = {name: p.detach().clone() for name, p in trained.items()}
    for name, p in trained.items():
        p.copy_(weights[name])
    return before


def fit(
    run: Run,
    stage: Stage,
    groups: list[dict],
    make_loader: MakeLoader,
    settings: Optimization,
    *,
    dtype: torch.dtype,
    measure: Callable[[int], dict[str, float]] | None = None,
    score: str | tuple[str, ...] = (),
    progress: Progress = lambda *args: None,
) -> dict[str, int]:
    """Minimise a stage's loss with AdamW, over epochs of a loader.

    Goes on from the run's checkpoint where that is of this stage. On Ctrl-C the step is finished and a checkpoint
    written before KeyboardInterrupt is raised; one is also written after every epoch and every ten minutes. A step
    whose loss or gradient is not finite changes nothing and is counted.

    Args:
        groups: for AdamW, with a learning rate each.
        dtype: that the share of the machine's peak is of.
        measure: called after each epoch with its number; what it returns is logged.
        score: names of what `measure` returns; by their mean early stopping judges.

    Returns:
        steps: taken; skipped: those that were not finite; stopped_at: the epoch after which training ended.

    Raises:
        DataError: if too many steps in a row are not finite.
    """
    state = run.state if run.state and run.state["stage"] == stage.name else None
    loader = make_loader(state["loader"] if state else None)
    epoch_steps = math.ceil(len(loader) / settings.accumulate)
    steps = settings.epochs * epoch_steps
    schedule = Schedule((settings.schedule_epochs or settings.epochs) * epoch_steps, settings.warmup)
    optimizer = torch.optim.AdamW(groups, betas=settings.betas, fused=True)
    rates = [group["lr"] for group in optimizer.param_groups]
    trained = {name: p for name, p in stage.named_parameters() if p.requires_grad}
    device = next(iter(trained.values())).device
    average = _Average(settings.ema, trained) if settings.ema else None
    place = {"step": 0, "batches": 0, "skipped": 0, "skipped_in_a_row": 0}
    best: dict = {"score": -math.inf, "waited": 0, "weights": {}}
    if state:
        stage.load_state_dict(state["model"], strict=False)
        optimizer.load_state_dict(state["optimizer"])
        stage.load_state(state["of_stage"])
        set_random_states(state["random"])
        place, best = state["place"], state["best"]
        if average:
            _put(average.weights, state["average"])
        run.state = {"stage": stage.name, "step": place["step"]}  # the rest has found its place
        del state

    def save() -> None:
        run.save_state(
            stage.name,
            place["step"],
            loader=loader.checkpoint(),
            model={name: p.detach() for name, p in trained.items()},
            optimizer=optimizer.state_dict(),
            average=average.weights if average else {},
            of_stage=stage.state(),
            random=random_states(),
            place=place,
            best=best,
        )

    def evaluate(epoch: int) -> bool:
        """Whether training goes on."""
        if measure is None:
            return True
        before = _put(trained, average.weights) if average else None
        values = measure(epoch)
        if values and settings.patience:
            reached = sum(values[name] for name in score) / len(score)
            if reached > best["score"]:
                best.update(score=reached, waited=0, weights={name: p.detach().clone() for name, p in trained.items()})
            else:
                best["waited"] += 1
        if before:
            _put(trained, before)
        if values:
            run.log(stage.name, place["step"], **values)
        stage.train()
        return not settings.patience or best["waited"] < settings.patience

    wrapped, quiet = stage, nullcontext
    if ranks() > 1:
        wrapped = data_parallel(stage)
        quiet = wrapped.no_sync
    stage.train()
    saved_at = time.monotonic()
    going_on = not settings.patience or best["waited"] < settings.patience
    with interrupts() as interrupted:
        while place["step"] < steps and going_on:
            batches, speed = iter(loader), _Speed(stage.flops, device, dtype)
            left = len(loader) - place["batches"] % len(loader)
            while left:
                group, ids, finite = min(settings.accumulate, left), [], True
                optimizer.zero_grad(set_to_none=True)
                for number in range(group):
                    batch = speed.next(batches)
                    ids += batch.ids
                    draw = step_seed(stage.seed, place["batches"])
                    with nullcontext() if number == group - 1 else quiet():
                        losses = stage.backward(wrapped, batch.to(device), draw, 1 / group, quiet)
                    finite = losses["loss"].detach().isfinite() & finite
                    place["batches"] += 1
                left -= group
                norm = nn.utils.clip_grad_norm_(trained.values(), settings.clip)
                stop = torch.tensor(float(interrupted()), device=device)
                lost = (~(norm.isfinite() & finite)).to(stop)
                lost, stop = summed(torch.stack([lost, stop])).tolist()
                for settled, rate in zip(optimizer.param_groups, rates, strict=True):
                    settled["lr"] = rate * schedule(place["step"])
                place["skipped_in_a_row"] = place["skipped_in_a_row"] + 1 if lost else 0
                if lost:
                    place["skipped"] += 1
                    _note_skipped(run, stage, place, ids, settings.skip_limit)
                else:
                    optimizer.step()
                    if average:
                        average.update(place["step"] - place["skipped"])
                place["step"] += 1
                if place["step"] % _LOG_EVERY == 0 or place["step"] == steps:
                    values, more = {}, {}
                    if not lost:  # of a skipped step there is nothing to see
                        sums = total(*(float(x.detach()) for x in losses.values()))
                        values = {name: x / ranks() for name, x in zip(losses, sums, strict=True)}
                        more = stage.watch(place["step"], steps)
                    run.log(stage.name, place["step"], lr=optimizer.param_groups[-1]["lr"], **values, **more)
                    speeds = speed.read()
                    run.show(stage.name, place["step"], **speeds)
                    progress(place["step"], steps, _words(values, speeds, place), group * loader.batch_size)
                    speed.start()
                if left and (stop or time.monotonic() - saved_at > _SAVE_SECONDS):
                    save()
                    saved_at = time.monotonic()
                    if stop:
                        raise KeyboardInterrupt
            next(batches, None)  # so that the loader knows that its epoch is over
            going_on = evaluate(place["step"] // epoch_steps)
            save()
            saved_at = time.monotonic()
            if total(float(interrupted()))[0]:
                raise KeyboardInterrupt
    if best["weights"]:
        _put(trained, best["weights"])
    elif average:
        _put(trained, average.weights)
    stage.eval()
    return {"steps": place["step"], "skipped": place["skipped"], "stopped_at": place["step"] // epoch_steps}


def _note_skipped(run: Run, stage: Stage, place: dict, ids: list[str], limit: int) -> None:
    everyone, step = [name for names in gathered(ids) for name in names], place["step"] + 1
    path = run.note_skipped(stage.name, step, everyone)
    if place["skipped_in_a_row"] >= limit:
        raise DataError(
            f"the loss or its gradient was not finite in {limit} steps in a row (stage {stage.name}, up to step "
            f"{step}): the studies of these batches are in {path}. Look at them, or start a run with a lower learning "
            "rate."
        )


def _words(losses: dict[str, float], speeds: dict[str, float], place: dict) -> str:
    shown = [
        *(f"{name} {value:.2f}" for name, value in losses.items()),
        f"{speeds['studies_a_second']:.0f}/s",
        f"{speeds['share_of_peak']:.0%} of peak" if speeds["share_of_peak"] else "",
        f"data {speeds['data_wait_share']:.0%}",
        f"{speeds['peak_memory_gb']:.1f} GB",
        f"{place['skipped']} skipped" if place["skipped"] else "",
    ]
    return " ".join(filter(None, shown))
