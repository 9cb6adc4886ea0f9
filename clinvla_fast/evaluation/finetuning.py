"""Fine-tuning: the task adapters of the image tower and a new head, trained to classify findings."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from ..data.loader import StudyLoader
from ..fit import Loader, Stage, fit
from ..modeling.model import ClinVLA
from ..recipe import Optimization
from ..run import Run
from ..study import StudyBatch
from .downstream import SEEDS, Part, Training, percent, share_of
from .probing import Labelled
from .result import Result
from .subject import Progress, Subject

_PATIENCE = 2  # validations without a better one
_FEWEST_STEPS = 20  # between two validations
_WARMUP = 0.1
Encode = Callable[[ClinVLA, StudyBatch], Tensor]


def evaluate_classification(subject: Subject, told: Training, progress: Progress) -> Result:
    """AUC of each finding after fine-tuning with shares of the training labels.

    Trained are the image tower's task adapters, as ClinVLA has it downstream, and a linear head on the image features;
    of a method without task adapters the head alone; with `unfreeze` all that the run has trained in its image tower.
    Training is stopped by the macro AUC on the validation studies.
    """
    labelled = Labelled(subject)
    made = [(share, seed) for share in told.labels for seed in range(told.seeds or SEEDS)]
    predicted: dict[float, list[np.ndarray]] = {share: [] for share in told.labels}
    shown = {}
    for number, (share, seed) in enumerate(made):
        used = share_of(labelled.train, share, seed)
        logits, about = _classify(labelled, used, told, seed, nth_of(progress, number, len(made)))
        predicted[share].append(logits)
        shown[f"{percent(share)}, seed {seed}"] = about
    scores = [score for share in told.labels for score in labelled.scores(percent(share), predicted[share])]
    return Result("classification", scores, told.settings(), {"trained": shown})


def _classify(
    labelled: Labelled, used: Part, told: Training, seed: int, progress: Progress
) -> tuple[np.ndarray, dict[str, Any]]:
    """Logits of the test studies, as `Labelled.widened`, and what a reader may want to know of the training."""
    model, learned = used.subject.model, labelled.learned(used)
    with tuned(model, told.unfreeze) as weights:
        stage = Tuning(model, _features, _cross_entropy, used, labelled.targets(used)[:, learned], seed)
        about = train(
            stage,
            [*weights, *stage.head.trained()],
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
    """A linear layer on standardised features [n, width], zero at first: a frozen tower's features differ little from
    study to study."""

    def __init__(self, features: Tensor, outputs: int):
        super().__init__()
        self.register_buffer("mean", features.mean(0))
        self.register_buffer("scale", features.std(0, correction=0).clamp(min=1e-6))
        self.linear = nn.Linear(features.shape[1], outputs)
        for p in self.linear.parameters():
            nn.init.zeros_(p)

    def trained(self) -> list[nn.Parameter]:
        return list(self.linear.parameters())

    def forward(self, x: Tensor) -> Tensor:
        return self.linear((x.float() - self.mean) / self.scale)


class Tuning(Stage):
    """A model and a head on what `encode` makes of a batch.

    Args:
        loss: of logits and targets.
        used: the studies that are trained on; their features as they are now scale the head.
        targets: of each of them, [n, any].
        outputs: of the head; None: a target each.
    """

    name = "downstream"

    def __init__(
        self,
        model: ClinVLA,
        encode: Encode,
        loss: Callable[[Tensor, Tensor], Tensor],
        used: Part,
        targets: np.ndarray,
        seed: int,
        outputs: int | None = None,
    ):
        super().__init__(seed)
        self.model, self._encode, self._loss = model, encode, loss
        self._targets = dict(zip(ids_of(used), torch.from_numpy(targets).to(model.device), strict=True))
        self.head: nn.Module = nn.Identity()
        features = torch.from_numpy(self.predict(used)).to(model.device)
        self.head = Head(features, outputs or targets.shape[1]).to(model.device)

    def forward(self, batch: StudyBatch, seed: int) -> dict[str, Tensor]:
        wanted = torch.stack([self._targets[name] for name in batch.ids])
        return {"loss": self._loss(self.head(self._encode(self.model, batch)), wanted)}

    @torch.inference_mode()
    def predict(self, part: Part) -> np.ndarray:
        """Logits of a part's studies: float32 [n, outputs]."""
        self.eval()
        batches = loader_of(part, part.subject.batch_size)
        logits = (self.head(self._encode(self.model, batch.to(self.model.device))) for batch in batches)
        return torch.cat([x.float().cpu() for x in logits]).numpy()


def ids_of(part: Part) -> list[str]:
    return [part.subject.studies[place].study_id for place in part.places]


def training_loader(used: Part, told: Training, seed: int, at: str | None) -> StudyLoader:
    """Epochs of a part's studies, augmented."""
    return loader_of(used, min(told.batch_size, len(used.places)), train=True, seed=seed, checkpoint=at)


def loader_of(part: Part, batch_size: int, **how) -> StudyLoader:
    """A part's studies as the part's model takes them."""
    model = part.subject.model
    return StudyLoader(
        part.subject.root,
        part.subject.split,
        model.tokenizer,
        image_size=model.vision.image_size,
        max_tokens=model.max_tokens,
        batch_size=batch_size,
        device="gpu" if model.device.type == "cuda" else "cpu",
        places=part.places,
        **how,
    )


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
    """The learning rate: that of the run's task adapters, where nothing else was told."""
    if told.lr is not None:
        return told.lr
    path = Path(run) / "run.json"
    settings: Mapping = json.loads(path.read_text())["settings"] if path.is_file() else {}
    return settings.get("optimization", {}).get("task_lr", Optimization.task_lr)


def train(
    stage: Stage,
    weights: list[nn.Parameter],
    make_loader: Callable[[str | None], Loader],
    validate: Callable[[], float],
    told: Training,
    lr: float,
    progress: Progress,
) -> dict[str, float]:
    """Train a stage's weights until what `validate` measures gets no better; the best ones stay.

    An epoch of few studies is short: some together are what lies between two validations.

    Returns:
        validated: the best; steps; skipped: those of them whose loss was not finite, which changed nothing.

    Raises:
        DataError: if too many steps in a row are not finite.
    """
    found: list[float] = []
    batches = len(make_loader(None))
    every = math.ceil(_FEWEST_STEPS / batches)
    settings = Optimization(epochs=told.epochs * every, warmup=_WARMUP, patience=_PATIENCE)

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
    return {"validated": max(found), "steps": told_of["steps"], "skipped": told_of["skipped"]}


def nth_of(progress: Progress, number: int, trainings: int) -> Progress:
    """Progress of one training among several, in thousandths of each."""
    return lambda done, of: progress(round(1000 * (number + done / of)), 1000 * trainings)
