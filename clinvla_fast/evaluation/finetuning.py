"""Fine-tuning: the task adapters of the image tower and a new head, trained to classify findings."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, linear

from ..data.loader import StudyLoader
from ..fit import Loader, Stage, fit
from ..modeling.model import ClinVLA
from ..recipe import Optimization
from ..run import Run
from ..study import StudyBatch
from .downstream import SEEDS, Part, Training, loader_of, percent, share_of
from .probing import Labelled, Probe, fit_probe
from .result import Result
from .subject import Progress, Subject, read_run_settings

_WARMUP = 0.1
Encode = Callable[[ClinVLA, StudyBatch], Tensor]


def evaluate_classification(subject: Subject, told: Training, progress: Progress) -> Result:
    """AUC of each finding after fine-tuning with shares of the training labels.

    Trained are the image tower's task adapters, as ClinVLA has it downstream, and a linear head on the image features;
    of a method without task adapters the head alone; with `unfreeze` all that the run has trained in its image tower.
    The head starts as the linear probe (Kumar et al. 2022): from zero it would not get there in so few steps. Training
    is stopped by the macro AUC on the validation studies.
    """
    labelled = Labelled(subject)
    shares, too_small = labelled.shares(told)
    made = [(share, seed) for share in shares for seed in range(told.seeds or SEEDS)]
    predicted: dict[float, list[np.ndarray]] = {share: [] for share in shares}
    shown = {}
    for number, (share, seed) in enumerate(made):
        used = share_of(labelled.train, share, seed)
        logits, about = _classify(labelled, used, told, seed, nth_of(progress, number, len(made)))
        predicted[share].append(logits)
        shown[f"{percent(share)}, seed {seed}"] = about
    scores = [score for share in shares for score in labelled.scores(percent(share), predicted[share])]
    return Result("classification", scores, told.settings(), {"trained": shown, "shares left out": too_small})


def _classify(
    labelled: Labelled, used: Part, told: Training, seed: int, progress: Progress
) -> tuple[np.ndarray, dict[str, Any]]:
    """Logits of the test studies, as `Labelled.widened`, and what a reader may want to know of the training."""
    model, learned = used.subject.model, labelled.learned(used)
    with tuned(model, told.unfreeze) as weights:
        head = Head(fit_probe(labelled, used)[0])
        stage = Tuning(model, _features, head, _cross_entropy, used, labelled.targets(used)[:, learned], seed)
        about = train(
            stage,
            [*weights, *head.parameters()],
            lambda at: training_loader(used, told, seed, at),
            lambda: labelled.validated(stage.predict(labelled.validate), learned),
            told,
            rate_of(used.subject.run, told),
            progress,
        )
        about |= {"studies": len(used.places), "weights of the tower": sum(p.numel() for p in weights)}
        logits = labelled.widened(stage.predict(labelled.test), learned)
    return logits, about | {"left out": labelled.left_out(learned)}


def _features(model: ClinVLA, batch: StudyBatch) -> Tensor:
    return model.image_features(batch)


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return binary_cross_entropy_with_logits(logits, target.float())


class Head(nn.Module):
    """A linear layer on standardised features [n, width]: a frozen tower's differ little from study to study."""

    def __init__(self, start: Probe):
        super().__init__()
        mean, scale, weight, bias = (torch.from_numpy(x).float() for x in start)
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        return linear((x.float() - self.mean) / self.scale, self.weight, self.bias)


class Tuning(Stage):
    """A model and a head on what `encode` makes of a batch.

    Args:
        loss: of logits and targets.
        used: the studies that are trained on.
        targets: of each of them, [n, any].
    """

    name = "downstream"

    def __init__(
        self,
        model: ClinVLA,
        encode: Encode,
        head: Head,
        loss: Callable[[Tensor, Tensor], Tensor],
        used: Part,
        targets: np.ndarray,
        seed: int,
    ):
        super().__init__(seed)
        self.model, self.head = model, head.to(model.device)
        self._encode, self._loss = encode, loss
        ids = (used.subject.studies[place].study_id for place in used.places)
        self._targets = dict(zip(ids, torch.from_numpy(targets).to(model.device), strict=True))

    def forward(self, batch: StudyBatch, seed: int) -> dict[str, Tensor]:
        wanted = torch.stack([self._targets[name] for name in batch.ids])
        return {"loss": self._loss(self.head(self._encode(self.model, batch)), wanted)}

    def predict(self, part: Part) -> np.ndarray:
        """Logits of a part's studies: float32 [n, outputs]."""
        with torch.inference_mode():
            return self.head(encoded(part, self._encode).to(self.model.device)).cpu().numpy()


@torch.inference_mode()
def encoded(part: Part, encode: Encode) -> Tensor:
    """What `encode` makes of a part's studies, as its model is now: float32 [n, width] on the CPU."""
    model = part.subject.model.eval()
    batches = loader_of(part, part.subject.batch_size)
    return torch.cat([encode(model, batch.to(model.device)).float().cpu() for batch in batches])


def training_loader(used: Part, told: Training, seed: int, at: str | None) -> StudyLoader:
    """Epochs of a part's studies, augmented."""
    return loader_of(used, min(told.batch_size, len(used.places)), train=True, seed=seed, checkpoint=at)


@contextmanager
def tuned(model: nn.Module, unfreeze: bool) -> Iterator[list[nn.Parameter]]:
    """The parameters of a model's image tower that are trained within; after, it is as it was before."""
    flags = {p: p.requires_grad for p in model.parameters()}
    kept = [
        p
        for name, p in model.named_parameters()
        if name.startswith("vision.") and p.requires_grad and (unfreeze or ".task." in name)
    ]
    before = [p.detach().clone() for p in kept]
    for p in flags:
        p.requires_grad_(any(p is one for one in kept))
    try:
        yield kept
    finally:
        with torch.no_grad():
            for p, was in zip(kept, before, strict=True):
                p.copy_(was)
        for p, flag in flags.items():
            p.requires_grad_(flag)
        model.eval()


def rate_of(run: Path, told: Training) -> float:
    """The learning rate: that of the run's task adapters, where nothing else was told.

    Raises:
        DataError: if the run's settings cannot be read.
    """
    if told.lr is not None:
        return told.lr
    return read_run_settings(run).get("optimization", {}).get("task_lr", Optimization.task_lr)


def train(
    stage: Stage,
    weights: list[nn.Parameter],
    make_loader: Callable[[str | None], Loader],
    validate: Callable[[], float],
    told: Training,
    lr: float,
    progress: Progress,
    fewest_steps: int = 20,
) -> dict[str, float]:
    """Train a stage's weights until what `validate` measures gets no better; the best ones stay, perhaps the first.

    Args:
        fewest_steps: between two validations: of few studies, several epochs.

    Returns:
        validated first: before training; validated: the best; steps; skipped: those of them whose loss was not finite,
        which changed nothing.

    Raises:
        DataError: if too many steps in a row are not finite.
    """
    found, start = [validate()], [p.detach().clone() for p in weights]
    batches = len(make_loader(None))
    every = math.ceil(fewest_steps / batches)
    settings = Optimization(epochs=told.epochs * every, warmup=_WARMUP, patience=max(2, told.epochs // 2))

    def measure(epoch: int) -> dict[str, float]:
        if epoch % every:
            return {}
        stage.eval()
        found.append(validate())
        return {"validated": found[-1]}

    with TemporaryDirectory() as folder:
        run = Run(Path(folder))
        try:
            told_of = fit(
                run,
                stage,
                [{"params": weights, "lr": lr, "weight_decay": settings.weight_decay}],
                make_loader,
                settings,
                dtype=torch.float32,
                measure=measure,
                score=("validated",),
                progress=lambda step, steps, *_: progress(step, steps),
            )
        finally:
            run.close()
    if max(found) == found[0]:
        with torch.no_grad():
            for p, was in zip(weights, start, strict=True):
                p.copy_(was)
    return {
        "validated first": found[0],
        "validated": max(found),
        "steps": told_of["steps"],
        "skipped": told_of["skipped"],
    }


def nth_of(progress: Progress, number: int, trainings: int) -> Progress:
    """Progress of one training among several, in thousandths of each."""
    return lambda done, of: progress(round(1000 * (number + done / of)), 1000 * trainings)
