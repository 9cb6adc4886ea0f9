"""Segmentation: a light decoder on frozen patch features of the frontal view outlines one finding. Its targets are the
finding's boxes, filled."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from math import isqrt
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from scipy.ndimage import binary_erosion
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, interpolate

from ..data.epochs import Epochs
from ..data.shards import Box
from ..fit import Stage
from .downstream import SEEDS, Part, Training, loader_of, parts, percent, share_of, spread
from .finetuning import nth_of, train
from .result import NotApplicable, Result
from .score import Score
from .subject import Progress, Subject

_VIEW = "frontal"  # the first of StudyBatch's
_WIDTH, _LR = 32, 1e-3  # of the decoder
_RAREST = 0.01  # of the mean mask: elsewhere few training masks say nothing for sure
_FEWEST_STEPS = 100  # between two validations
_THRESHOLDS = torch.cat([torch.arange(1, 20) / 20, torch.ones(1)])  # at the last, nothing is outlined
_OVERLAYS = 6
_TRUE, _OUTLINED = (0, 255, 255), (255, 160, 0)


def evaluate_segmentation(subject: Subject, told: Training, progress: Progress) -> Result:
    """Dice of a finding's outline in the frontal view, with shares of the training labels: the mean over all test
    studies, and over those that show the finding.

    Where neither the truth nor the outline has a pixel, Dice is 1; where one of them has none, 0. Thresholds are those
    of the best mean Dice on the validation studies. Chance is the best outline that is the same for every study: where
    the mean of the training masks is above a threshold, chosen in the same way. A study that is labelled with the
    finding and has no box of it is left out: nobody has outlined it.

    Raises:
        NotApplicable: if the data have no such boxes to train, validate or test on, or the model does not look there.
    """
    if _VIEW not in subject.model.recipe.views:
        raise NotApplicable(f"{subject.run} looks at {', '.join(subject.model.recipe.views)}: expected {_VIEW} views.")
    label = told.label or _most_boxes(subject)
    made = [(share, seed) for share in told.labels for seed in range(told.seeds or SEEDS)]
    found: dict[float, list[_Found]] = {share: [] for share in told.labels}
    shown: dict[str, Any] = {"label": label, "trained": {}}
    split = parts(subject, partial(_outlined, label=label), f"or without {label!r}, and boxes where it is shown,")
    with TemporaryDirectory() as folder:
        learned, validate, tested = (_Patches(part, label, Path(folder) / f"{n}.npy") for n, part in enumerate(split))
        for number, (share, seed) in enumerate(made):
            used = learned.some(share_of(learned.part, share, seed))
            decoder, about = _train(used, validate, told, seed, nth_of(progress, number, len(made)))
            found[share].append(_Found.of(decoder, used, validate, tested))
            shown["trained"][f"{percent(share)}, seed {seed}"] = about
        arrays = _overlays(decoder, found[made[-1][0]][-1], tested)
    shown["outlines"] = [
        {"study": int(name.split()[-1]), "picture": name, "cyan": "true", "orange": "outlined"} for name in arrays
    ]
    scores = [score for share in told.labels for score in _scores(percent(share), tested, found[share])]
    return Result("segmentation", scores, told.settings() | {"label": label}, shown, arrays)


def _most_boxes(subject: Subject) -> str:
    """Of the labels that each split has, the one with the most boxes to learn from."""
    others = [part for split in ("train", "validate") if split != subject.split and (part := subject.on(split))]
    tested, *learnable = (
        Counter(box.label for study in part.studies for box in study.boxes if box.view == _VIEW)
        for part in (subject, *others)
    )
    if not tested:
        raise NotApplicable(
            f"{subject.root} has no boxes in the {_VIEW} views of its {subject.split} split: expected those of RSNA or "
            "phantoms."
        )
    counts = learnable[0] if learnable else tested
    everywhere = [label for label in tested if all(label in of for of in learnable)]
    return min(everywhere or tested, key=lambda label: (-counts[label], label))


def _outlined(subject: Subject, label: str) -> np.ndarray:
    """Whether it is known where each study shows the label, if it does: bool [n]."""
    return np.array([label not in study.labels or bool(_boxes(study.boxes, label)) for study in subject.studies])


def _boxes(boxes: tuple[Box, ...], label: str) -> list[Box]:
    return [box for box in boxes if box.label == label and box.view == _VIEW]


@dataclass(frozen=True)
class _Batch:
    """patches: [B, patches, width]; masks: bool [B, side, side]."""

    patches: Tensor
    masks: Tensor
    ids: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.patches)

    def to(self, device) -> "_Batch":
        return replace(self, patches=self.patches.to(device), masks=self.masks.to(device))


class _Patches:
    """Patch features of a part's frontal views, kept in a file of 2 bytes a number, and masks of a label.

    Raises:
        NotApplicable: if no study of the part has both a frontal view and the label.
    """

    def __init__(self, part: Part, label: str, path: Path):
        model, self.label = part.subject.model, label
        self.side, there, done = model.vision.image_size, [], 0
        for batch in loader_of(part, part.subject.batch_size):
            with torch.inference_mode():
                patches = model.patch_features(batch.to(model.device)).half().cpu().numpy()
            if not done:
                shape = len(part.places), *patches.shape[1:]
                self._stored = np.lib.format.open_memmap(path, "w+", np.float16, shape)
            self._stored[done : done + len(patches)] = patches
            done += len(patches)
            there.append(batch.present[:, 0].cpu().numpy())
        self.part = Part(part.subject, part.places[np.concatenate(there)])
        self._rows = np.arange(done)
        if not self.shows.any():
            raise NotApplicable(f"{part.subject.root} has no box of {label!r} in its {part.subject.split} split.")

    def some(self, part: Part) -> "_Patches":
        """Those of its studies that are also in another part of the same split."""
        some = object.__new__(_Patches)
        some.label, some.side, some._stored, some.part = self.label, self.side, self._stored, part
        some._rows = self._rows[np.isin(self.part.places, part.places)]
        return some

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def shows(self) -> np.ndarray:
        """Which studies have a box: bool [n]."""
        studies = self.part.subject.studies
        return np.array([bool(_boxes(studies[place].boxes, self.label)) for place in self.part.places], bool)

    def batch(self, numbers: np.ndarray) -> _Batch:
        studies = [self.part.subject.studies[place] for place in self.part.places[numbers]]
        masks = np.stack([_mask(_boxes(study.boxes, self.label), self.side) for study in studies])
        patches = torch.from_numpy(self._stored[self._rows[numbers]]).float()
        return _Batch(patches, torch.from_numpy(masks), tuple(study.study_id for study in studies))

    def mean_mask(self) -> Tensor:
        """How often each pixel is in a mask of the studies that show the label: [side, side]."""
        masks = sum(batch.masks.sum(0) for batch in self.batches(self.part.subject.batch_size))
        return masks / max(1, self.shows.sum())

    def batches(self, size: int) -> Iterator[_Batch]:
        """All, in order."""
        return map(self.batch, np.array_split(np.arange(len(self)), range(size, len(self), size)))


def _mask(boxes: list[Box], side: int) -> np.ndarray:
    """The pixels whose centres lie in a box: bool [side, side]."""
    centres, mask = (np.arange(side) + 0.5) / side, np.zeros((side, side), bool)
    for box in boxes:
        rows = (centres >= box.top) & (centres < box.top + box.height)
        mask |= rows[:, None] & (centres >= box.left) & (centres < box.left + box.width)
    return mask


class _Epochs:
    """Epochs of some patches in random order, in the protocol of StudyLoader."""

    def __init__(self, patches: _Patches, batch_size: int, seed: int, checkpoint: str | None):
        self._patches, self.batch_size = patches, batch_size
        place = {"train": True, "seed": seed, "checkpoint": checkpoint, "rank": 0, "ranks": 1}
        self._epochs = Epochs(patches.part.subject.root, len(patches), batch_size, **place)

    def __len__(self) -> int:
        return len(self._epochs)

    def __iter__(self) -> Iterator[_Batch]:
        for numbers in self._epochs.batches()[0]:
            self._epochs.done()
            yield self._patches.batch(numbers)
        self._epochs.end()

    def checkpoint(self) -> str:
        return self._epochs.checkpoint()


class _Decoder(Stage):
    """Convolutions on the grid of patches, twice made finer, then as large as the image. Their result is added to the
    log-odds of the mean training mask, and is 0 at first."""

    name = "decoder"

    def __init__(self, width: int, mean_mask: Tensor, seed: int):
        super().__init__(seed)

        def finer() -> list[nn.Module]:
            return [nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(_WIDTH, _WIDTH, 3, padding=1), nn.GELU()]

        first = nn.BatchNorm2d(width, affine=False), nn.Conv2d(width, _WIDTH, 1), nn.GELU()
        last = nn.Conv2d(_WIDTH, 1, 1)
        nn.init.zeros_(last.weight), nn.init.zeros_(last.bias)
        self.layers = nn.Sequential(*first, *finer(), *finer(), last)
        self.register_buffer("mean", mean_mask.clamp(_RAREST, 1 - _RAREST).logit())

    def logits(self, batch: _Batch) -> Tensor:
        """[B, side, side]."""
        side = isqrt(batch.patches.shape[1])
        grid = batch.patches.mT.unflatten(2, (side, side))
        return self.mean + interpolate(self.layers(grid), self.mean.shape, mode="bilinear")[:, 0]

    def forward(self, batch: _Batch, seed: int) -> dict[str, Tensor]:
        """Cross-entropy of the pixels, and 1 - Dice of the batch's probabilities."""
        logits, masks = self.logits(batch), batch.masks.float()
        shown = logits.sigmoid()
        dice = (2 * (shown * masks).sum() + 1) / (shown.sum() + masks.sum() + 1)
        return {"loss": binary_cross_entropy_with_logits(logits, masks) + 1 - dice}

    @torch.inference_mode()
    def dice(self, patches: _Patches, size: int) -> np.ndarray:
        """Dice of each study at each threshold."""
        self.eval()
        device = next(self.parameters()).device
        found = (
            dice_at(self.logits(batch.to(device)).sigmoid(), batch.masks.to(device)) for batch in patches.batches(size)
        )
        return torch.cat([x.cpu() for x in found]).numpy()


def dice_at(shown: Tensor, masks: Tensor) -> Tensor:
    """Dice of outlines at each of the thresholds; 1 where neither has a pixel.

    Args:
        shown: how sure each pixel is [B or 1, side, side], 0 to 1; what is above a threshold is outlined.
        masks: bool [B, side, side].

    Returns:
        float64 [B, thresholds].
    """
    columns = []
    for threshold in _THRESHOLDS.tolist():
        outlined = shown > threshold
        both = (outlined & masks).sum((1, 2)).double()
        pixels = outlined.sum((1, 2)) + masks.sum((1, 2))
        columns.append(torch.where(pixels > 0, 2 * both / pixels.clamp(min=1), 1.0))
    return torch.stack(columns, 1)


def _train(
    used: _Patches, validate: _Patches, told: Training, seed: int, progress: Progress
) -> tuple[_Decoder, dict[str, Any]]:
    size, shows = used.part.subject.batch_size, validate.shows

    def validated() -> float:
        """The mean of both figures, at their best thresholds."""
        dice = decoder.dice(validate, size)
        return float(dice.mean(0).max() + dice[shows].mean(0).max()) / 2

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        decoder = _Decoder(used.batch(np.arange(1)).patches.shape[-1], used.mean_mask(), seed)
    decoder.to(used.part.subject.model.device)
    about = train(
        decoder,
        list(decoder.parameters()),
        lambda at: _Epochs(used, min(told.batch_size, len(used)), seed, at),
        validated,
        told,
        told.lr or _LR,
        progress,
        _FEWEST_STEPS,
    )
    return decoder, about | {"studies": len(used), "show the finding": int(used.shows.sum())}


@dataclass(frozen=True)
class _Found:
    """Of one decoder: the Dice of each test study, of all and of those that show the finding, at thresholds from the
    validation studies; that of the constant outline, the mean; and the second threshold."""

    all: np.ndarray
    shown: np.ndarray
    constant_all: float
    constant_shown: float
    threshold: float

    @classmethod
    def of(cls, decoder: _Decoder, used: _Patches, validate: _Patches, tested: _Patches) -> "_Found":
        size = used.part.subject.batch_size
        mean = used.mean_mask()[None]
        constant = [
            torch.cat([dice_at(mean, batch.masks) for batch in patches.batches(size)]).numpy()
            for patches in (validate, tested)
        ]
        own = [decoder.dice(patches, size) for patches in (validate, tested)]
        values = []
        for of_validate, of_test in (own, constant):
            for on_validate, on_test in ((slice(None), slice(None)), (validate.shows, tested.shows)):
                best = int(of_validate[on_validate].mean(0).argmax())
                values.append((of_test[on_test, best], float(_THRESHOLDS[best])))
        (every, _), (shown, threshold), (constant_all, _), (constant_shown, _) = values
        return cls(every, shown, float(constant_all.mean()), float(constant_shown.mean()), threshold)


def _scores(title: str, tested: _Patches, found: list[_Found]) -> list[Score]:
    """Rows of all seeds follow each other: the mean over them is the mean of the seeds' own."""
    scores = []
    for name, kept in (("all", np.ones(len(tested), bool)), ("shown", tested.shows)):
        values = [getattr(of, name) for of in found]
        rows, where = {"value": np.concatenate(values)}, (tested.part.places[kept], tested.part.patients[kept])
        chance = float(np.mean([getattr(of, f"constant_{name}") for of in found]))
        deviation = spread([float(x.mean()) for x in values])
        words = f"Dice of {tested.label}" + {"all": "", "shown": " where it is shown"}[name]
        several = (np.tile(x, len(found)) for x in where)
        scores.append(Score(f"{title}, {words}", "mean", rows, *several, chance=chance, spread=deviation))
    return scores


@torch.inference_mode()
def _overlays(decoder: _Decoder, found: _Found, tested: _Patches) -> dict[str, np.ndarray]:
    """Some test studies that show the finding, uint8 [side, side, 3], with what is true and what was outlined."""
    numbers = np.flatnonzero(tested.shows)
    numbers = numbers[np.linspace(0, len(numbers) - 1, min(_OVERLAYS, len(numbers))).astype(int)]
    part, device = Part(tested.part.subject, tested.part.places[numbers]), next(decoder.parameters()).device
    (films,) = (batch.images[:, 0].cpu().numpy() for batch in loader_of(part, len(numbers)))
    batch = tested.batch(numbers)
    outlined = (decoder.logits(batch.to(device)).sigmoid() > found.threshold).cpu().numpy()
    pictures = np.repeat(films[..., None], 3, -1)
    for picture, *masks in zip(pictures, batch.masks.numpy(), outlined, strict=True):
        for mask, colour in zip(masks, (_TRUE, _OUTLINED), strict=True):
            picture[mask & ~binary_erosion(mask)] = colour
    return {f"study {place}": picture for place, picture in zip(part.places, pictures, strict=True)}
