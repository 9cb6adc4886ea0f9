"""Pretraining: make towers by masked modelling where a preset has none, then align images and reports."""

import math
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from . import ops
from .data.loader import StudyLoader
from .evaluation.retrieval import retrieval_scores
from .modeling.masked_modeling import MaskedModeling, draw_masked_words
from .modeling.model import ClinVLA, parameter_groups
from .modeling.packing import Packing
from .modeling.text import TextTower, text_block
from .modeling.vision import VisionTower, vision_block
from .objectives import collapse
from .presets import TowerTraining
from .run import Run
from .study import StudyBatch

MakeLoader = Callable[[str | None], StudyLoader]
_LOG_EVERY = 10
_GRADIENT_NORM = 1.0
_ALARM_PATIENCE = 5


class Progress(Protocol):
    """What a stage tells whoever watches it."""

    def __call__(self, step: int, steps: int, words: str, studies: int) -> None: ...


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


_SIGNALS = signal.SIGINT, signal.SIGTERM
_raised = False  # by `interruptible`


@contextmanager
def _handled(handler: Callable) -> Iterator[None]:
    previous = {s: signal.signal(s, handler) for s in _SIGNALS}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


@contextmanager
def interruptible() -> Iterator[None]:
    """Around a job's stages: Ctrl-C and SIGTERM raise KeyboardInterrupt. Should a library that runs between stages
    swallow it, the next stage stops after its first step."""
    global _raised
    _raised = False

    def note_and_raise(signum, frame):
        global _raised
        _raised = True
        raise KeyboardInterrupt

    with _handled(note_and_raise):
        yield


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Within: Ctrl-C and SIGTERM are noted instead of raised, so that a step is never cut in two."""
    seen = _raised

    def note(signum, frame):
        nonlocal seen
        if seen:
            raise KeyboardInterrupt
        seen = True

    with _handled(note):
        yield lambda: seen


def fit(
    run: Run,
    stage: str,
    module: nn.Module,
    groups: list[dict],
    losses: Callable[[StudyBatch, int], dict[str, Tensor]],
    make_loader: MakeLoader,
    *,
    epochs: int,
    warmup: float,
    measure: Callable[[int], dict[str, float]] | None = None,
    progress: Progress = lambda *args: None,
) -> None:
    """Minimise `losses(batch, step)["loss"]` over `epochs` of the loader with AdamW.

    Goes on from the run's saved state where that is of this stage. On Ctrl-C the step is finished and the state saved
    before KeyboardInterrupt is raised; it is also saved after every epoch.

    Args:
        groups: for AdamW, with a learning rate each.
        measure: called after each epoch with the step; what it returns is logged.
    """
    state = run.state if run.state and run.state["stage"] == stage else None
    loader = make_loader(state["loader"] if state else None)
    device = next(module.parameters()).device
    schedule = Schedule(epochs * len(loader), warmup)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    step = 0
    if state:
        module.load_state_dict(state["model"], strict=False)
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        step = state["step"]

    def save() -> None:
        model = {name: p.detach() for name, p in trained.items()}
        parts = {"model": model, "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
        run.save_state(stage, step, loader=loader.checkpoint(), **parts)

    module.train()
    with _interrupts() as interrupted:
        while step < schedule.steps:
            for batch in loader:
                parts = losses(batch.to(device), step)
                optimizer.zero_grad(set_to_none=True)
                parts["loss"].backward()
                nn.utils.clip_grad_norm_(trained.values(), _GRADIENT_NORM)
                optimizer.step()
                rate = scheduler.get_last_lr()[-1]
                scheduler.step()
                step += 1
                if step % _LOG_EVERY == 0 or step == schedule.steps:
                    values = {
                        name: float(part.detach()) if isinstance(part, Tensor) else part for name, part in parts.items()
                    }
                    run.log(stage, step, lr=rate, **values)
                    words = " ".join(f"{name} {value:.2f}" for name, value in list(values.items())[:3])
                    progress(step, schedule.steps, words, loader.batch_size)
                if interrupted():
                    save()
                    raise KeyboardInterrupt
            if measure is not None and (values := measure(step)):
                run.log(stage, step, **values)
            save()
    module.eval()


def make_towers(
    run: Run, model: MaskedModeling, make_loader: MakeLoader, settings: TowerTraining, seed: int, progress: Progress
) -> None:
    """Train both towers by masked modelling: patches of every present view, and words."""

    def losses(batch: StudyBatch, step: int) -> dict[str, Tensor]:
        draw = _step_seed(seed, step)
        patches = model.vision.patches
        kept, _ = ops.draw_kept_patches(batch.present, patches, round(settings.keep * patches), draw)
        image = model.image_loss(batch.images, batch.present, kept)
        packing = Packing.of(batch.lengths, batch.tokens.device)
        word = model.word_loss(batch.tokens, packing, draw_masked_words(packing, settings.masked_words, draw))
        return {"loss": image + word, "image": image.detach(), "word": word.detach()}

    groups = [{"params": list(model.parameters()), "lr": settings.lr, "weight_decay": settings.weight_decay}]
    fit(
        run, "towers", model, groups, losses, make_loader,
        epochs=settings.epochs, warmup=settings.warmup, progress=progress,
    )  # fmt: skip


class CollapseAlarm:
    """Watches the embeddings of training batches; speaks when they have been collapsed for a while."""

    def __init__(self, warn: Callable[[str], None]):
        self.raised = False
        self._warn, self._recent = warn, deque(maxlen=_ALARM_PATIENCE)

    def __call__(self, embeddings: dict[str, Tensor], watching: bool) -> dict[str, float]:
        """Measure, and warn once. `watching` is false while a new model has not yet had time to spread out."""
        found = {kind: collapse(e) for kind, e in embeddings.items() if len(e) > 1}
        self._recent.append(watching and any(c.alarming for c in found.values()))
        if len(self._recent) == _ALARM_PATIENCE and all(self._recent) and not self.raised:
            self.raised = True
            self._warn(
                "collapse: the embeddings of different studies have become alike "
                f"({', '.join(f'{kind} variance {c.variance:.3f}, rank {c.rank:.1f}' for kind, c in found.items())}). "
                "Retrieval will be at chance. The cosine objective has no negatives: try --objective contrastive."
            )
        return {f"{kind}_{name}": getattr(c, name) for kind, c in found.items() for name in ("variance", "rank")}


def align(
    run: Run,
    model: ClinVLA,
    make_loader: MakeLoader,
    validation: StudyLoader | None,
    seed: int,
    progress: Progress,
    warn: Callable[[str], None],
) -> CollapseAlarm:
    """Train the adapters, heads and scales to align images and reports; return what the collapse alarm saw."""
    recipe = model.recipe
    alarm = CollapseAlarm(warn)
    steps = recipe.epochs * len(make_loader(None))

    def losses(batch: StudyBatch, step: int) -> dict[str, Tensor]:
        embeddings = model(batch, mask_seed=_step_seed(seed, step))
        parts = model.objective(embeddings)
        if (step + 1) % _LOG_EVERY == 0:
            e = embeddings.paired()
            watched = {"image": e.image_global, "text": e.text_global}
            parts |= alarm(watched, watching=step > recipe.warmup * steps)
        return parts

    def measure(step: int) -> dict[str, float]:
        epoch = step // (steps // recipe.epochs)
        if validation is None or (epoch % max(1, recipe.epochs // 6) and epoch != recipe.epochs):
            return {}
        scores = retrieve(model, validation)
        model.train()
        return {f"{way}/{name}": score for way, found in scores.items() for name, score in found.items() if score}

    fit(
        run, "align", model, parameter_groups(model), losses, make_loader,
        epochs=recipe.epochs, warmup=recipe.warmup, measure=measure, progress=progress,
    )  # fmt: skip
    return alarm


def retrieve(model: ClinVLA, loader: StudyLoader) -> dict[str, dict[str, float | None]]:
    """Retrieval among a loader's studies that have both a view and a report, both ways, on whole images."""
    model.eval()
    images, texts, labels = [], [], []
    with torch.inference_mode():
        for batch in loader:
            batch = batch.to(model.device)
            embeddings = model(batch)
            paired = embeddings.image_mask.any(1) & embeddings.text_mask.any(1)
            images.append(normalize(embeddings.image_global[paired], dim=-1))
            texts.append(normalize(embeddings.text_global[paired], dim=-1))
            labels += [found for found, keep in zip(batch.labels, paired.tolist(), strict=True) if keep]
    image, text = torch.cat(images), torch.cat(texts)
    return {
        "text_to_image": retrieval_scores(text, image, labels),
        "image_to_text": retrieval_scores(image, text, labels),
    }


def compile_tower_blocks(vision: VisionTower, text: TextTower) -> None:
    """Compile the towers' blocks, each kind once for all depths, any number of views and any lengths of reports."""
    vision.run_block = torch.compile(vision_block, fullgraph=True, dynamic=True)
    text.run_block = torch.compile(text_block, fullgraph=True, dynamic=True)


def warm_up(model: ClinVLA, batch: StudyBatch) -> float:
    """Run a batch once as training and once as evaluation does, so that all is compiled: the seconds it took."""
    start = time.perf_counter()
    model.train()
    model.objective(model(batch, mask_seed=0))["loss"].backward()
    model.zero_grad(set_to_none=True)
    model.eval()
    with torch.inference_mode():
        model(batch)
    return time.perf_counter() - start


def _step_seed(seed: int, step: int) -> int:
    """A seed for what a step draws, so that a resumed run draws the same."""
    return (seed << 32) + step
