"""Masked reconstruction before and after training (METHODS 5): what a tower could tell of the patches that it does not
see, it should still tell with adapters in it.

The decoder that a tower was made with is not kept, and that of another tower would not fit. So the same small decoder
is fitted to each tower's tokens, the towers frozen, on the same films and masks, and both are asked for the masked
patches of films that neither has seen. It starts at the mean film, which tells most of a patch, and learns what the
tokens add. Where a tower has an invertible adapter, its inverse comes first (ClinVLA, section 3.1.1).
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR

from .. import ops
from ..data.loader import StudyLoader
from ..modeling.masked_modeling import ImageDecoder, patch_errors, patch_targets
from ..modeling.towers import load_vision
from ..modeling.vision import VisionTower
from ..study import VIEWS
from .result import NotApplicable, Result
from .score import Score
from .subject import Subject
from .tasks import Options

_KEEP = 0.25
_STUDIES = 256  # at most, of each split, spread evenly
_STEPS, _BATCH, _RATE = 800, 8, 3e-3  # of fitting a decoder: studies a step
_SHOWN = 4
_BROKEN = 0.5  # of what a tower told beyond the mean film: training should leave more
_MASKED = 128  # gray level


class _Films(NamedTuple):
    """The current views of some studies that a model looks at: n in all, in row-major order of `present`.

    images: uint8 [B, V, H, W], as fine as the model reconstructs. present: bool [B, V].
    places: int64 [B], of the studies in their split.
    """

    images: Tensor
    present: Tensor
    places: np.ndarray

    def some(self, rows: Tensor) -> "_Films":
        return _Films(self.images[rows], self.present[rows], self.places[rows.cpu().numpy()])

    @property
    def views(self) -> Tensor:
        """Gray levels, float32 [n, H, W]."""
        return self.images[self.present].float()

    @property
    def slots(self) -> Tensor:
        """Which view each is, int64 [n]."""
        return self.present.nonzero()[:, 1]


def evaluate_reconstruction(subject: Subject, options: Options) -> Result:
    """The error of masked patches, their pixels normalised a patch, by the tower as training found it and as it left
    it; a row is a view of which a quarter of the patches is seen. Beside it that of the mean film: of each patch's
    mean over the training films of the same view. A model that has a decoder shows what that one makes of it too.

    Raises:
        NotApplicable: if training has left the image tower alone, or the data have no films to fit a decoder to.
    """
    model = subject.model
    if not (model.recipe.adapters or model.recipe.trained):
        raise NotApplicable(f"{subject.run} has its towers as it found them: expected adapters or trained towers.")
    training = subject.on("train")
    films = training and _films(training)
    asked = _films(subject)
    if films is None or asked is None:
        raise NotApplicable(f"{subject.root}: expected films in its train split, and in {subject.split}.")
    before = load_vision(model.tower_names["vision"]).to(model.device)
    patch, kept = asked.images.shape[-1] // _grid(before), _kept(asked, before, options.seed)
    mean = _mean_film(films, patch)
    predicted = {}
    for name, tower in (("before training", before), ("after training", model.vision)):
        decoder = _fitted(tower, films, mean, options.seed)
        predicted[name] = mean[asked.slots] + _decoded(tower, decoder, asked, kept)
    if model.decoder is not None:
        predicted["after training, its own decoder"] = _decoded(model.vision, model.decoder, asked, kept)
    predicted["the mean film"] = mean[asked.slots]
    errors = {name: _errors(x, asked.views, kept, patch) for name, x in predicted.items()}
    studies = asked.places[asked.present.nonzero()[:, 0].cpu().numpy()]

    def score(name: str, values: np.ndarray) -> Score:
        return Score(name, "mean", {"value": values}, studies, subject.patients[studies], lower_is_better=True)

    scores = [score(f"error of masked patches, {name}", values) for name, values in errors.items()]
    old, new, film = (errors[name] for name in ("before training", "after training", "the mean film"))
    scores.append(score("error added by training", new - old))
    known = (film - old).mean()
    left = float((film - new).mean() / known) if known > 0 else None
    shown = {"left_beyond_the_mean_film": left, "views": len(new), "training_views": len(films.views), "alarms": []}
    if left is not None and left < _BROKEN:
        shown["alarms"].append(f"of what the tower told of masked patches beyond the mean film, {left:.0%} is left")
    shown["examples"], arrays = _pictures(asked, kept, predicted, patch)
    settings = {"keep": _KEEP, "steps": _STEPS, "batch_size": _BATCH, "studies_at_most": _STUDIES, "seed": options.seed}
    return Result("reconstruction", scores, settings, shown, arrays)


def _films(subject: Subject) -> _Films | None:
    """The films of a split, at most of _STUDIES studies; None where it has none."""
    model = subject.model
    wanted = VIEWS[:1] if model.decoder is not None else VIEWS[:2]  # decoders are trained on the frontal view alone
    studies = subject.manifest["counts"]["splits"][subject.split]
    places = np.unique(np.linspace(0, studies - 1, min(_STUDIES, studies)).round().astype(np.int64))
    loader = StudyLoader(
        subject.root,
        subject.split,
        model.tokenizer,
        image_size=model.training_size,
        max_tokens=model.max_tokens,
        batch_size=subject.batch_size,
        device="gpu" if model.device.type == "cuda" else "cpu",
        places=places,
    )
    looked_at = torch.tensor([view in model.recipe.views for view in wanted])
    images, present = zip(*((b.images[:, : len(wanted)], b.present[:, : len(wanted)]) for b in loader), strict=True)
    images, present = torch.cat(images), torch.cat(present) & looked_at.to(present[0].device)
    there = present.any(1)
    films = _Films(images[there].to(model.device), present[there].to(model.device), places[there.cpu().numpy()])
    return films if len(films.places) else None


def _grid(tower: VisionTower) -> int:
    return tower.image_size // tower.patch_size


def _kept(films: _Films, tower: VisionTower, seed: int) -> Tensor:
    return ops.draw_kept_patches(films.present, tower.patches, round(_KEEP * tower.patches), seed)[0]


@torch.no_grad()
def _tokens(tower: VisionTower, films: _Films, kept: Tensor) -> Tensor:
    """What a decoder reads of masked films: [n, 1 + k, width]."""
    images, scale = films.images, films.images.shape[-1] // tower.image_size
    if scale > 1:
        images = avg_pool2d(images.float(), scale).round().to(images.dtype)
    tokens = tower(images, films.present, kept)
    return tokens if tower.invertible is None else tower.invertible.inverse(tokens)


def _fitted(tower: VisionTower, films: _Films, mean: Tensor, seed: int) -> ImageDecoder:
    """A new decoder that tells from this tower's tokens how films differ from the mean one [V, N, pixels]: the same
    start, films and masks for every tower."""
    patch = films.images.shape[-1] // _grid(tower)
    with torch.random.fork_rng([films.images.device] if films.images.is_cuda else []):
        torch.manual_seed(seed)
        decoder = ImageDecoder(tower.width, tower.patches, patch**2, 1, tower.width // 2).to(films.images.device)
        nn.init.zeros_(decoder.predict.weight)
        order = torch.cat([torch.randperm(len(films.places)) for _ in range(1 + _STEPS * _BATCH // len(films.places))])
    optimizer = AdamW(decoder.parameters(), lr=_RATE)
    schedule = OneCycleLR(optimizer, _RATE, total_steps=_STEPS)
    for step, rows in enumerate(order[: _STEPS * _BATCH].split(_BATCH)):
        some = films.some(rows.to(films.images.device))
        kept = _kept(some, tower, seed + step)
        masked = len(kept) * (tower.patches - kept.shape[1])
        predicted = mean[some.slots] + decoder(_tokens(tower, some, kept), kept)
        loss = patch_errors(predicted, some.views, kept, patch) / masked
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return decoder.eval()


@torch.no_grad()
def _decoded(tower: VisionTower, decoder: ImageDecoder, films: _Films, kept: Tensor) -> Tensor:
    """What a decoder makes of every patch: [n, N, pixels]."""
    found, ends = [], [0, *films.present.sum(1).cumsum(0).tolist()]
    for rows in torch.arange(len(films.places), device=films.images.device).split(_BATCH):
        some = kept[ends[rows[0]] : ends[rows[-1] + 1]]
        found.append(decoder(_tokens(tower, films.some(rows), some), some))
    return torch.cat(found)


def _mean_film(films: _Films, patch: int) -> Tensor:
    """The mean of every patch's normalised pixels, by view: [V, N, pixels]; zero for a view that no study has."""
    target, _, _ = patch_targets(films.views, patch)
    sums = target.new_zeros(films.present.shape[1], *target.shape[1:]).index_add(0, films.slots, target)
    return sums / films.present.sum(0).clamp(min=1)[:, None, None]


def _errors(predicted: Tensor, views: Tensor, kept: Tensor, patch: int) -> np.ndarray:
    """The mean over each view's masked patches: float64 [n]."""
    masked = predicted.shape[1] - kept.shape[1]
    rows = (x.split(1) for x in (predicted, views, kept))
    return np.array([patch_errors(*row, patch).item() / masked for row in zip(*rows, strict=True)])


def _pictures(
    films: _Films, kept: Tensor, predicted: dict[str, Tensor], patch: int
) -> tuple[list[dict], dict[str, np.ndarray]]:
    """Some films as they are, as the tower sees them, and with the masked patches filled in; a filled patch has its own
    mean and contrast, which nothing predicts (MAE, He et al. 2022)."""
    examples, arrays = [], {}
    shown = torch.linspace(0, len(kept) - 1, min(_SHOWN, len(kept))).round().long().unique().tolist()
    targets, mean, deviation = patch_targets(films.views[shown], patch)
    rows, slots = films.present.nonzero()[shown].T.tolist()
    for i, view in enumerate(shown):
        seen = torch.zeros(len(mean[i]), 1, dtype=torch.bool, device=kept.device).index_fill(0, kept[view], True)
        film = targets[i] * deviation[i] + mean[i]
        filled = {"original": film, "masked": torch.where(seen, film, _MASKED)}
        for name, x in predicted.items():
            filled[name] = torch.where(seen, film, x[view] * deviation[i] + mean[i])
        example = {"place": int(films.places[rows[i]]), "label": VIEWS[slots[i]]}
        for name, patches in filled.items():
            example[name] = f"{name}/{i}"
            arrays[example[name]] = _image(patches, patch)
        examples.append(example)
    return examples, arrays


def _image(patches: Tensor, patch: int) -> np.ndarray:
    """A picture of its patches [N, patch^2]: uint8 [H, W]."""
    side = round(len(patches) ** 0.5)
    pixels = patches.clamp(0, 255).round().to(torch.uint8).unflatten(0, (side, side)).unflatten(-1, (patch, patch))
    return np.ascontiguousarray(pixels.transpose(1, 2).flatten(2, 3).flatten(0, 1).cpu().numpy())
