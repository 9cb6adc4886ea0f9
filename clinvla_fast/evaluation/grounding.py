"""Where a study's views show what a text says: maps from the local alignment, scored against boxes.

Of patches C [N, D] and word pieces W [T, D], in the terms of kernels/local_alignment.py:

word map      A[:, t], the attention that the local loss uses: where a word takes what the image shows of it from. It
              sums to 1 over the patches of all views. A word's is the mean of its pieces'.
phrase map    the mean of S[:, t] over the pieces of a phrase, S = C W^T: the products that A is made of. This is what
              is scored.

A is no map of a phrase: of its words it says which one a patch goes with most, whether the patch goes with any of them
or not; that of a single word is the same everywhere. Chosen on the validate split of 1,200 phantoms, the tiny preset
after 24 epochs: the maximum of S lies in the box of the finding for 48% of boxes, that of the cosines for 33%, that of
A's mean for 25%; the boxes cover 18% of the views. In a study's whole report, the finding's own words have A's maximum
there for 17%: at the temperatures that are learned, a word attends to nearly all patches alike.
"""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor
from torch.nn.functional import interpolate

from .. import ops
from ..data.reports import clean_report
from ..data.shards import Box, Study
from ..data.tokenizer import tokenize_reports
from ..errors import DataError
from ..modeling.model import ClinVLA
from ..study import VIEWS
from .result import NotApplicable, Result
from .score import Score
from .subject import Subject, finite
from .tasks import Options
from .zero_shot import DEFAULT_PROMPTS, named, read_prompts

_SHOWN = 2  # examples of a finding in a view
_UNSCORED = 10  # findings that are shown of data without boxes
_DRAWS, _MEASURED = 32, 4  # mismatched maps of each query, and those whose contrast and precision are measured
_KEYS = ("label", "view")


@dataclass(frozen=True)
class Heatmaps:
    """Where a study's views show a text; on the CPU.

    words: of the text as it was cleaned, without punctuation.
    views: those that the model looked at, in the order of VIEWS.
    maps: float32 [words, views, grid, grid], a cell a patch; each word's sums to 1 over all views.
    phrase: float32 [views, grid, grid], of the text as a whole; higher is more alike, 0 has no meaning.
    """

    words: tuple[str, ...]
    views: tuple[str, ...]
    maps: Tensor
    phrase: Tensor


@torch.inference_mode()
def explain(model: ClinVLA, study: Mapping[str, str | Path | np.ndarray], text: str) -> Heatmaps:
    """Where a study's views show each word of a text, and the text as a whole.

    Args:
        study: as one of `ClinVLA.encode_images`.
        text: a phrase or a report; cleaned and cut as reports are.

    Raises:
        DataError: if the model has no local embeddings, the study cannot be read, or no word is left of the text.
    """
    _check(model)
    images, present = model.read_images([study])
    _, patches, mask = model.embed_images(images, present)
    patches, pieces, grid = patches[0][mask[0]].float(), _pieces(model, text), _grid(model)
    words = [(word, of) for word, of in _words(model, text, len(pieces)) if any(map(str.isalnum, word))]
    if not words:
        raise DataError("no word is left of the text once it is cleaned: expected a phrase or a report.")
    tau1 = model.objective.scales()[1]
    return Heatmaps(
        words=tuple(word for word, _ in words),
        views=tuple(_views(model, present[0])),
        maps=word_heatmaps(patches, pieces, [of for _, of in words], tau1, grid).cpu(),
        phrase=phrase_heatmap(patches, pieces.mean(0), grid).cpu(),
    )


def word_heatmaps(
    patches: Tensor, pieces: Tensor, words: Sequence[Sequence[int]], tau1: Tensor | float, grid: int
) -> Tensor:
    """The attention of the local loss by word.

    Args:
        patches: float32 [views * grid * grid, D]; pieces: float32 [T, D], all that the text has.
        words: the pieces of each word.

    Returns:
        float32 [words, views, grid, grid].
    """
    image_mask, text_mask = (torch.ones(len(x), dtype=torch.bool, device=x.device) for x in (patches, pieces))
    attention = ops.word_attention(patches, image_mask, pieces, text_mask, tau1).mT
    return torch.stack([attention[list(of)].mean(0) for of in words]).unflatten(-1, (-1, grid, grid))


def phrase_heatmap(patches: Tensor, phrase: Tensor, grid: int) -> Tensor:
    """Products of patches float32 [views * grid * grid, D] with the mean of a phrase's pieces [D], or of several
    phrases [..., D]: [..., views, grid, grid]."""
    return (phrase @ patches.mT).unflatten(-1, (-1, grid, grid))


def evaluate_grounding(subject: Subject, options: Options) -> Result:
    """Phrase grounding: whether the map of a finding's phrases is high in its box, in every view that has boxes.

    The phrase of a finding is the mean of its positive prompts. A row is a finding in a view of a study; several boxes
    count as one region. Maps are upsampled bilinearly to the image's size: their maxima are centres of patches. Scores:

    pointing game: the map's maximum lies in the box (Zhang et al. 2016).
    the same above other findings' phrases: less how often their maps' maxima lie in this box: 0 is what pointing
        without reading the phrase gives.
    contrast-to-noise ratio: mean inside less mean outside over the root of the sum of their variances (Boecking et al.
        2022, who take its absolute value: here a map that is low in the box counts against it).
    average precision of pixels: those in the box found by the map.

    Chance is what maps of other findings in other studies, drawn by the seed, give in the same boxes (where there is
    one finding, its maps in other studies): maxima and boxes both lie in the chest, so the share of the view that a
    box covers, which is shown too, is easy to beat.

    Of data without any boxes, some maps of findings that studies are labelled with are shown, and nothing is scored.

    Raises:
        NotApplicable: if the model has no local embeddings, the data neither boxes nor labels with phrases in views
            that it looks at, or the prompt file no phrase for what has boxes.
        DataError: if the prompt file cannot be used.
    """
    model = subject.model
    _check(model)
    path = options.prompts or DEFAULT_PROMPTS
    prompts = read_prompts(path)
    boxed = _queries(subject.studies)
    asked = boxed or _unboxed(subject.studies, prompts.leave_out)
    phrases = {
        label: prompts.of(named(label))[0]
        for label in sorted({query.label for query in asked})
        if named(label) in prompts.names or prompts.other
    }
    asked = [query for query in asked if query.view in model.recipe.views]
    if boxed and asked and not any(query.label in phrases for query in asked):
        boxed = ", ".join(sorted({query.label for query in asked}))
        raise NotApplicable(f"{path} has no phrase for what has boxes in {subject.root}: expected one of {boxed}.")
    asked = [query for query in asked if query.label in phrases]
    if not asked:
        raise NotApplicable(
            f"{subject.root} has no boxes in {subject.split}: expected a set with boxes in a view that the model looks "
            "at, as rsna or phantoms prepared by this version, or with labels that have phrases."
        )
    maps, whole = _maps(subject, asked, phrases)
    there = [row for row, found in enumerate(maps) if found.size]  # a box may be of a view that is not
    asked, maps = [asked[row] for row in there], [maps[row] for row in there]
    about = {
        "map": "mean product of patches and the pieces of the finding's phrases",
        "phrases": {label: list(of) for label, of in phrases.items()},
    }
    if not boxed:
        first = {query.name: query for query in reversed(asked)}
        examples = [
            {"place": query.place, "label": query.label, "view": query.view, "heatmap": name}
            for name, query in reversed(first.items())
        ]
        shown = about | {"scored": "nothing, as there are no boxes", "examples": examples}
        return Result("grounding", [], {"prompts": path.name}, shown, whole)
    size = model.vision.image_size
    own = [list(phrases).index(query.label) for query in asked]
    found = [
        _measured(maps[row], own[row], asked[row].inside(size), [maps[n][own[n]] for n in others])
        for row, others in enumerate(_mismatched(asked, options.seed))
    ]
    examples = _examples(asked)
    shown = about | {
        "covered by boxes": float(np.mean([one.area for one in found])),
        "examples": [
            {
                "place": asked[row].place,
                "label": asked[row].label,
                "view": asked[row].view,
                "boxes": [list(box[2:]) for box in asked[row].boxes],
                "points at it": "yes" if found[row].hit else "no",
                "heatmap": asked[row].name,
            }
            for row in examples
        ],
    }
    arrays = {asked[row].name: whole[asked[row].name] for row in examples}
    return Result("grounding", _scores(subject, asked, found), {"prompts": path.name}, shown, arrays)


def _check(model: ClinVLA) -> None:
    if not model.recipe.local_weight:
        raise NotApplicable(
            "the model was trained without the local loss (local_weight is 0): it has no patches and words to compare."
        )


def _grid(model: ClinVLA) -> int:
    return model.vision.image_size // model.vision.patch_size


def _views(model: ClinVLA, present: Tensor) -> list[str]:
    """The present views [V] that the model looks at, in the order of its patches."""
    return [view for view, there in zip(VIEWS, present.tolist(), strict=False) if there and view in model.recipe.views]


def _pieces(model: ClinVLA, text: str) -> Tensor:
    """What the local loss compares of a text: float32 [T, D]."""
    tokens, lengths = tokenize_reports(model.tokenizer, [clean_report(text)], model.max_tokens)
    _, local, mask = model.embed_reports(tokens.to(model.device), lengths)
    return local[0][mask[0]].float()


def _words(model: ClinVLA, text: str, pieces: int) -> list[tuple[str, list[int]]]:
    """Each word of the first pieces of a text as it stands there, and which pieces it has."""
    cleaned = clean_report(text)
    found = model.tokenizer(cleaned, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    of_word: dict[int, list[int]] = defaultdict(list)
    for piece, word in enumerate(found.word_ids()[:pieces]):
        of_word[word].append(piece)
    spans = found["offset_mapping"]
    return [(cleaned[spans[of[0]][0] : spans[of[-1]][1]], of) for of in of_word.values()]


@dataclass(frozen=True)
class _Query:
    """A finding in a view of a study, at its place in the split; number: among all that the split asks."""

    number: int
    place: int
    label: str
    view: str
    boxes: tuple[Box, ...]

    @property
    def name(self) -> str:
        """Of the study's map."""
        return f"{self.label}, study {self.place}"

    def inside(self, size: int) -> np.ndarray:
        """The pixels whose centres lie in a box, at least one a box: bool [size, size]."""
        pixels = np.zeros((size, size), bool)
        for box in self.boxes:
            top, left = (min(round(start * size), size - 1) for start in (box.top, box.left))
            bottom, right = (round(end * size) for end in (box.top + box.height, box.left + box.width))
            pixels[top : max(bottom, top + 1), left : max(right, left + 1)] = True
        return pixels


def _queries(studies: Sequence[Study]) -> list[_Query]:
    found: dict[tuple[int, str, str], list[Box]] = defaultdict(list)
    for place, study in enumerate(studies):
        for box in study.boxes:
            found[place, box.label, box.view].append(box)
    return [_Query(number, *key, tuple(boxes)) for number, (key, boxes) in enumerate(found.items())]


def _unboxed(studies: Sequence[Study], leave_out: Collection[str]) -> list[_Query]:
    """The commonest findings in a few studies each, in both current views."""
    of_label: dict[str, list[int]] = defaultdict(list)
    for place, study in enumerate(studies):
        for label in study.labels:
            of_label[label].append(place)
    findings = [label for label in of_label if named(label) not in {"no finding", *leave_out}]
    commonest = sorted(findings, key=lambda label: (-len(of_label[label]), label))[:_UNSCORED]
    asked = [(place, label) for label in commonest for place in of_label[label][:_SHOWN]]
    return [_Query(row, place, label, view, ()) for row, (place, label) in enumerate(asked) for view in VIEWS[:2]]


@torch.inference_mode()
def _maps(
    subject: Subject, asked: Sequence[_Query], phrases: Mapping[str, Sequence[str]]
) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
    """Of each query the maps of all findings' phrases in its view, float32 [findings, grid, grid]; and by its name the
    map of its own over all views, [4, grid, grid], NaN where there is none."""
    model, grid = subject.model, _grid(subject.model)
    means = [torch.stack([_pieces(model, phrase).mean(0) for phrase in of]).mean(0) for of in phrases.values()]
    phrase, labels = torch.stack(means), list(phrases)
    rows: dict[int, list[int]] = defaultdict(list)
    for row, query in enumerate(asked):
        rows[query.place].append(row)
    maps: list[np.ndarray] = [np.empty(0)] * len(asked)
    whole: dict[str, np.ndarray] = {}
    first = 0
    for batch in subject.batches():
        _, patches, mask = model.embed_images(batch.images, batch.present)
        for column in range(len(batch)):
            views = _views(model, batch.present[column])
            for row in rows.get(first + column, ()):
                query = asked[row]
                if query.view not in views:
                    continue
                seen = finite(patches[column][mask[column]].float())
                all_views = phrase_heatmap(seen, phrase, grid).cpu().numpy()
                maps[row] = all_views[:, views.index(query.view)]
                own = np.full((len(VIEWS), grid, grid), np.nan, np.float32)
                own[[VIEWS.index(view) for view in views]] = all_views[labels.index(query.label)]
                whole[query.name] = own
        first += len(batch)
    return maps, whole


def _mismatched(asked: Sequence[_Query], seed: int) -> list[list[int]]:
    """For each query others for another finding in the same view of other studies, drawn with replacement; where there
    is one finding, for that one. None where there is no other."""
    labels, views = (np.unique([getattr(query, name) for query in asked], return_inverse=True)[1] for name in _KEYS)
    places, random, found = np.array([query.place for query in asked]), np.random.default_rng(seed), []
    for row in range(len(asked)):
        there = (views == views[row]) & (places != places[row])
        others = np.flatnonzero(there & (labels != labels[row]))
        others = others if len(others) else np.flatnonzero(there)
        found.append(random.choice(others, _DRAWS).tolist() if len(others) else [])
    return found


class _Measured(NamedTuple):
    """Of one query, NaN where a measure has no meaning.

    hit: whether the map's maximum lies in the box; of_others: the share of other phrases' maps of which it does.
    contrast, precision: NaN where the box covers all. area: the share of the view that it covers. by_chance: hit,
    contrast and precision of mismatched queries' maps.
    """

    hit: bool
    of_others: float
    contrast: float
    precision: float
    area: float
    by_chance: tuple[float, float, float]


def _measured(maps: np.ndarray, own: int, inside: np.ndarray, others: Sequence[np.ndarray] = ()) -> _Measured:
    """Maps float32 [findings, grid, grid] of which number `own` is the query's, against bool [size, size]; others:
    mismatched queries' own maps."""
    hits = [_points_into(of, inside) for of in maps]
    of_others = float(np.mean(hits[:own] + hits[own + 1 :])) if len(hits) > 1 else np.nan
    by_chance = (np.nan,) * 3
    if others:
        apart = np.mean([_apart(of, inside) for of in others[:_MEASURED]], 0)
        by_chance = float(np.mean([_points_into(of, inside) for of in others])), *apart
    return _Measured(hits[own], of_others, *_apart(maps[own], inside), float(inside.mean()), by_chance)


def _points_into(coarse: np.ndarray, inside: np.ndarray) -> bool:
    """Whether the centre of the highest patch [grid, grid] lies in a box, bool [size, size]."""
    patch = np.unravel_index(coarse.argmax(), coarse.shape)
    return bool(inside[tuple(int((place + 0.5) * len(inside) / len(coarse)) for place in patch)])


def _apart(coarse: np.ndarray, inside: np.ndarray) -> tuple[float, float]:
    """Contrast-to-noise ratio and average precision of a map [grid, grid] against a box, bool [size, size]."""
    if inside.all():
        return np.nan, np.nan
    fine = interpolate(torch.from_numpy(coarse)[None, None], inside.shape, mode="bilinear")[0, 0].double().numpy()
    within, beyond = fine[inside], fine[~inside]
    noise = np.sqrt(within.var() + beyond.var())
    contrast = float((within.mean() - beyond.mean()) / noise) if noise else 0.0
    return contrast, float(average_precision_score(inside.reshape(-1), fine.reshape(-1)))


def _scores(subject: Subject, asked: Sequence[_Query], found: Sequence[_Measured]) -> list[Score]:
    places = np.array([query.place for query in asked])
    units = np.array([query.number for query in asked])

    def mean(name: str, values: np.ndarray, chance: np.ndarray, of: np.ndarray | None = None) -> Score:
        kept = np.flatnonzero(~np.isnan(values) & (True if of is None else of))
        known = chance[kept][~np.isnan(chance[kept])]
        expected = float(known.mean()) if len(known) else None
        return Score(name, "mean", {"value": values[kept]}, units[kept], subject.patients[places[kept]], expected)

    names = ("hit", "of_others", "contrast", "precision")
    hit, of_others, contrast, precision = (np.array([getattr(one, name) for one in found], float) for name in names)
    by_chance = np.array([one.by_chance for one in found]).T
    labels, views = (np.array([getattr(query, name) for query in asked]) for name in _KEYS)
    scores = [mean("pointing game", hit, by_chance[0])]
    if len(set(views)) > 1:
        scores += [mean(f"pointing game, {view}", hit, by_chance[0], views == view) for view in VIEWS if view in views]
    scores += [
        mean("pointing game above other findings' phrases", hit - of_others, np.zeros(len(asked))),
        mean("contrast-to-noise ratio", contrast, by_chance[1]),
        mean("average precision of pixels", precision, by_chance[2]),
    ]
    scores += [mean(f"{label}: pointing game", hit, by_chance[0], labels == label) for label in sorted(set(labels))]
    return [score for score in scores if len(score.units)]


def _examples(asked: Sequence[_Query]) -> list[int]:
    """The first queries of each finding in each view, by finding."""
    of: dict[tuple[str, str], list[int]] = defaultdict(list)
    for row, query in enumerate(asked):
        of[query.label, query.view].append(row)
    return [row for key in sorted(of) for row in of[key][:_SHOWN]]
