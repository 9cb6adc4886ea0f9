"""Probes of what scores do not show by themselves: embeddings that have collapsed, a modality that decides alone,
adapters without which all stays as it is (METHODS 5)."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..modeling.adapters import TransformerAdapt
from ..modeling.text import TextTower
from ..modeling.vision import VisionTower
from ..objectives import collapse
from .result import NotApplicable, Result
from .score import Score
from .subject import Subject, finite
from .tasks import Options

_DRAWN = 100  # mismatched partners of each study
_CHANCE = 0.5
_ROUNDING = 1e-5  # between similarities of studies with the same report, embedded in different batches
_ONE_SIDED = 0.5  # share of the similarities' variance: above, one modality says more than both together
_NO_VARIANCE = 1e-12
_MOST = 512  # studies that adapters are switched off for: they are embedded anew for each block
_RECALL_AT = 10
_IDLE = 0.999  # cosine to the whole model


def evaluate_collapse(subject: Subject, options: Options) -> Result:
    """How much room the embeddings of a split take.

    The variance is a score: a row is a study's squared distance to the mean of all. The effective rank is shown beside
    it without an interval: drawn with replacement, studies repeat, and the rank of fewer different ones is smaller.

    Raises:
        NotApplicable: if neither side has two studies.
    """
    embedded, scores, shown = subject.embedded, [], {}
    for side, points, has in (
        ("image", embedded.image, embedded.has_image),
        ("text", embedded.text, embedded.has_text),
    ):
        places = np.flatnonzero(has)
        if len(places) < 2:
            continue
        found, points = collapse(points[places]), normalize(points[places].double(), dim=-1)
        distances = (points - points.mean(0)).square().sum(1).numpy()
        scores.append(_mean(subject, f"{side} variance", distances, places))
        shown[side] = {"variance": found.variance, "rank": found.rank, "alarming": found.alarming}
        shown[side] |= {"studies": len(places), "width": points.shape[1]}
    if not scores:
        raise NotApplicable(
            f"{subject.root}: expected two studies with an image, or with a report, in {subject.split}."
        )
    alarms = [
        f"{side} embeddings are alike: variance {x['variance']:.3f}, effective rank {x['rank']:.1f} of {x['width']}"
        for side, x in shown.items()
        if x["alarming"]
    ]
    return Result("collapse", scores, shown=shown | {"alarms": alarms})


def evaluate_modality_bias(subject: Subject, options: Options) -> Result:
    """Whether a similarity comes from image and report together.

    Matching: how often a study's own report is nearer to its image than a report drawn from another patient, and its
    own image nearer to its report; the same against studies with the same findings. A model that was trained on
    mismatched pairs, or that looks at one modality alone, is at chance.
    One side alone: the share of the variance of all similarities that an image's mean over the reports explains, and a
    report's mean over the images. A report that is near to every image is found whatever the image shows.

    Raises:
        NotApplicable: if the model does not align images and text, or the split has no pairs of two patients.
    """
    if not subject.model.aligns:
        raise NotApplicable(f"{subject.run} does not align images with text: expected a method that does.")
    places = subject.embedded.paired
    patients = subject.patients[places]
    if len(set(patients)) < 2:
        raise NotApplicable(f"{subject.root}: expected pairs of image and report of two patients in {subject.split}.")
    image, text = (x[places].double() for x in (subject.embedded.image, subject.embedded.text))
    findings = [frozenset(subject.studies[place].labels) for place in places]
    scores = []
    for words, groups in (("", [frozenset()] * len(places)), (" with the same findings", findings)):
        rows, drawn = _mismatched(groups, patients, options.seed)
        if len(set(patients[rows])) < 2:
            continue
        for side, of, others in (("report", image, text), ("image", text, image)):
            before = _before(of, others, rows, drawn)
            name = f"own {side} before another patient's{words}"
            scores.append(_mean(subject, name, before, places[rows], chance=_CHANCE))
    intervals = {score.name: score.interval() for score in scores}
    alarms = [f"{score.name}: by chance" for score in scores[:2] if not intervals[score.name].low > _CHANCE]
    shares = _alone(image, text)
    if shares is None:
        alarms.append("all similarities are alike")
    for side, share in (shares or {}).items():
        scores.append(_mean(subject, f"similarity by the {side} alone", share, places, lower_is_better=True))
        if share.mean() > _ONE_SIDED:
            alarms.append(f"{scores[-1].name}: {share.mean():.0%} of its variance")
    settings = {"mismatched_partners": _DRAWN, "seed": options.seed}
    return Result("modality-bias", scores, settings, {"alarms": alarms}, intervals=intervals)


def _mismatched(groups: Sequence[frozenset], patients: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """For each study with one of another patient in its group: its number, int64 [m], and partners drawn from these
    with replacement, int64 [m, _DRAWN]."""
    random, members = np.random.default_rng(seed), defaultdict(list)
    for number in np.argsort(patients, kind="stable").tolist():
        members[groups[number]].append(number)
    of_group = {group: np.array(numbers) for group, numbers in members.items()}  # a patient's follow each other
    of_patients = {group: patients[numbers] for group, numbers in of_group.items()}
    rows, drawn = [], []
    for number, group in enumerate(groups):
        first, last = np.searchsorted(of_patients[group], [patients[number], patients[number] + 1])
        if others := len(of_group[group]) - (last - first):
            rows.append(number)
            places = random.integers(others, size=_DRAWN)
            drawn.append(of_group[group][places + (last - first) * (places >= first)])
    return np.array(rows, np.int64), np.array(drawn, np.int64).reshape(-1, _DRAWN)


def _before(of: Tensor, others: Tensor, rows: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """The share of drawn partners that are less similar than a study's own; as similar ones count half: [m]."""
    found = []
    for row, partners in zip(rows, drawn, strict=True):
        nearer = others[row] @ of[row] - others[partners] @ of[row]
        found.append((nearer > _ROUNDING).double().mean() + (nearer.abs() <= _ROUNDING).double().mean() / 2)
    return torch.stack(found).numpy()


def _alone(image: Tensor, text: Tensor) -> dict[str, np.ndarray] | None:
    """What each image, and each report, adds to the share of the similarities' variance that its side explains alone,
    [n] each: a two-way analysis of variance of image @ text.mT, which is not computed. None without a variance."""
    n, mean = len(image), image.mean(0) @ text.mean(0)
    variance = ((image.mT @ image) * (text.mT @ text)).sum() / n**2 - mean**2
    if variance < _NO_VARIANCE:
        return None
    effects = {"image": image @ text.mean(0) - mean, "report": text @ image.mean(0) - mean}
    return {side: (effect.square() / variance).numpy() for side, effect in effects.items()}


def evaluate_adapter_depth(subject: Subject, options: Options) -> Result:
    """What each block's adapters do: those of one block are switched off at a time, and those from a block upward.

    Scores: the recall that is lost without one, of both ways between images and reports. Shown: also how far the
    tower's embeddings stay where they were (cosine to the whole model's).

    Raises:
        NotApplicable: if the model has no adapters, or the split no pairs.
    """
    model = subject.model
    towers = {"image": model.vision, "text": model.text} if model.recipe.adapters and model.aligns else {}
    parts = {side: _adapted(tower) for side, tower in towers.items()}
    if not any(parts.values()):
        raise NotApplicable(f"{subject.run} has no adapters between images and text: expected a method with some.")
    embedded = _embedded_without(subject, towers, parts)
    (image, has_image), (text, has_text) = (embedded[side].pop(()) for side in towers)
    places = np.flatnonzero(has_image & has_text)
    if not len(places):
        raise NotApplicable(f"{subject.root}: expected studies with an image and a report in {subject.split}.")
    image, text = image[places], text[places]
    whole, chance = _recalled(image, text), min(1.0, _RECALL_AT / len(places))
    scores, shown = [_mean(subject, f"recall@{_RECALL_AT}, all adapters", whole, places, chance=chance)], {}
    for side, found in parts.items():
        hits, measured = {}, {}
        for off, (points, _) in embedded[side].items():
            points = points[places]
            hits[off] = _recalled(points, text) if side == "image" else _recalled(image, points)
            cosine = (points * (image if side == "image" else text)).sum(1).mean().item()
            measured[off] = {"recall": float(hits[off].mean()), "cosine": cosine}
        shown[side] = []
        for part, upward in zip(found, _upward(found), strict=True):
            name = "embeddings" if part == _EMBEDDINGS else f"block {part}"
            lost = whole - hits[(part,)]
            scores.append(_mean(subject, f"recall@{_RECALL_AT} lost without those of {side} {name}", lost, places))
            both = {"alone": measured[(part,)], "from_here_up": measured[upward]}
            shown[side].append({"part": name, **both, "idle": measured[(part,)]["cosine"] > _IDLE})
    return Result("adapter-depth", scores, {"studies_at_most": _MOST}, {"towers": shown, "studies": len(places)})


_EMBEDDINGS = -1  # the invertible adapter's place, below block 0


def _upward(parts: Sequence[int]) -> list[tuple[int, ...]]:
    return [tuple(parts[i:]) for i in range(len(parts))]


def _adapted(tower: VisionTower | TextTower) -> list[int]:
    """Where a tower has adapters, from below."""
    blocks = [number for number, adapt in enumerate(tower.adapts) if any(True for _ in adapt.parameters())]
    return [_EMBEDDINGS, *blocks] if tower.invertible is not None else blocks


@contextmanager
def _without(tower: VisionTower | TextTower, parts: Sequence[int]) -> Iterator[None]:
    """Within: a tower whose adapters at these places do nothing."""
    invertible, adapts = tower.invertible, list(tower.adapts)
    try:
        for part in parts:
            if part == _EMBEDDINGS:
                tower.invertible = None
            else:
                tower.adapts[part] = TransformerAdapt(tower.width)
        yield
    finally:
        tower.invertible = invertible
        for number, adapt in enumerate(adapts):
            tower.adapts[number] = adapt


@torch.inference_mode()
def _embedded_without(
    subject: Subject, towers: dict[str, VisionTower | TextTower], parts: dict[str, list[int]]
) -> dict[str, dict[tuple[int, ...], tuple[Tensor, np.ndarray]]]:
    """The first studies' embeddings, float64 [n, D], and which studies have any, bool [n]: of each side, by what is
    switched off."""
    model, seen = subject.model, 0
    found = {
        side: {off: ([], []) for off in ((), *((part,) for part in of), *_upward(of))} for side, of in parts.items()
    }
    for batch in subject.batches():
        batch = batch.parts(min(len(batch), _MOST - seen))[0]
        for side, of in found.items():
            for off, (points, has) in of.items():
                with _without(towers[side], off):
                    if side == "image":
                        pooled, _, mask = model.embed_images(batch.images, batch.present)
                    else:
                        pooled, _, mask = model.embed_reports(batch.tokens, batch.lengths)
                points.append(finite(normalize(pooled.double(), dim=-1)).cpu())
                has.append(mask.any(1).cpu().numpy())
        seen += len(batch)
        if seen >= _MOST:
            break
    return {
        side: {off: (torch.cat(points), np.concatenate(has)) for off, (points, has) in of.items()}
        for side, of in found.items()
    }


def _recalled(image: Tensor, text: Tensor) -> np.ndarray:
    """Whether a study's own is among the nearest, the mean of both ways: [n]. Equal ones come in a random order."""
    similarity, hits = image @ text.mT, []
    for table in (similarity, similarity.mT):
        own = table.diagonal()[:, None]
        nearer, equal = (table > own + _ROUNDING).sum(1), ((table - own).abs() <= _ROUNDING).sum(1)
        hits.append(((_RECALL_AT - nearer).double() / equal).clamp(0, 1))
    return torch.stack(hits).mean(0).numpy()


def _mean(subject: Subject, name: str, values: np.ndarray, places: np.ndarray, **about: Any) -> Score:
    """The mean over studies as a score."""
    return Score(name, "mean", {"value": values}, places, subject.patients[places], **about)
