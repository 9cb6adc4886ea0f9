from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import clinvla_fast
from clinvla_fast import ClinVLA, Recipe
from clinvla_fast.data.shards import Box, Study, write_shards
from clinvla_fast.errors import DataError
from clinvla_fast.evaluation.grounding import (
    _maps,
    _measured,
    _Query,
    evaluate_grounding,
    explain,
    phrase_heatmap,
    word_heatmaps,
)
from clinvla_fast.evaluation.result import NotApplicable, Result, read_result, write_result
from clinvla_fast.evaluation.subject import Subject, about
from clinvla_fast.evaluation.tasks import Options
from clinvla_fast.study import VIEWS

SENTENCE = "There is pleural effusion."
LEAKS = ("pointing game", "contrast-to-noise ratio", "average precision of pixels")


# Maps


@pytest.mark.parametrize(("views", "grid", "words"), [(1, 1, 1), (1, 1, 3), (2, 8, 5), (4, 3, 1), (4, 7, 30)])
def test_maps_point_at_what_is_like_the_word(views, grid, words):
    """In each view one patch is as the last word is; the others are as no word is."""
    generator = torch.Generator().manual_seed(views + grid)
    pieces = 4 * torch.eye(words + 3)[:words]
    patches = torch.randn(views * grid**2, words + 3, generator=generator) * 0.05
    patches[:, words:] += 3.0
    planted = [view * grid**2 + (3 * view + 1) % grid**2 for view in range(views)]
    patches[planted] = pieces[-1] + 0.01
    maps = word_heatmaps(patches, pieces, [[word] for word in range(words)], 10.0, grid)
    phrase = phrase_heatmap(patches, pieces[-1], grid)
    assert maps.shape == (words, views, grid, grid) and phrase.shape == (views, grid, grid)
    np.testing.assert_allclose(maps.sum((1, 2, 3)), 1, rtol=1e-5)
    for view, place in enumerate(planted):
        assert phrase[view].argmax() == place % grid**2
        assert words == 1 or maps[-1, view].argmax() == place % grid**2
    if words == 1:  # nothing to tell from: see the module
        np.testing.assert_allclose(maps, 1 / len(patches), rtol=1e-5)


def test_a_words_map_is_the_mean_of_its_pieces_attention():
    rng = np.random.default_rng(0)
    patches, pieces, tau1 = rng.normal(size=(2 * 9, 6)), rng.normal(size=(5, 6)), 7.0
    scores = np.exp(patches @ pieces.T)
    weights = np.exp(tau1 * scores / scores.sum(1, keepdims=True))
    attention = weights / weights.sum(0)
    maps = word_heatmaps(torch.from_numpy(patches), torch.from_numpy(pieces), [[0], [1, 2], [4]], tau1, 3)
    expected = np.stack([attention[:, 0], attention[:, [1, 2]].mean(1), attention[:, 4]]).reshape(3, 2, 3, 3)
    np.testing.assert_allclose(maps, expected, rtol=1e-12)


def test_explaining_a_study(tiny_model: ClinVLA, shake: Callable[[nn.Module], None], tmp_path: Path):
    shake(tiny_model)
    rng = np.random.default_rng(0)
    films = {view: rng.integers(0, 256, (90 + 10 * n, 100), np.uint8) for n, view in enumerate(VIEWS)}
    Image.fromarray(films["lateral"]).save(tmp_path / "lateral.png")
    one = explain(tiny_model, {"frontal": films["frontal"]}, "Large RIGHT-sided effusionx, no pneumothorax")
    # As they stand in the cleaned text, in whatever pieces the tokenizer has them, without punctuation.
    assert one.words == ("Large", "RIGHT", "sided", "effusionx", "no", "pneumothorax")
    assert one.views == ("frontal",) and one.maps.shape == (6, 1, 8, 8) and one.phrase.shape == (1, 8, 8)
    views = {"prior_frontal": films["prior_frontal"], "lateral": tmp_path / "lateral.png", "frontal": films["frontal"]}
    several = clinvla_fast.explain(tiny_model, views, SENTENCE)
    assert several.views == ("frontal", "lateral", "prior_frontal") and several.maps.shape == (4, 3, 8, 8)
    for found in (one, several):
        assert found.maps.dtype == found.phrase.dtype == torch.float32
        np.testing.assert_allclose(found.maps.sum((1, 2, 3)), 1, rtol=1e-5)
    alone = explain(tiny_model, {"lateral": films["lateral"]}, SENTENCE)
    np.testing.assert_allclose(alone.phrase[0], several.phrase[1], rtol=1e-3, atol=1e-5)
    assert not np.allclose(alone.phrase[0], several.phrase[0], rtol=0.1)


def test_a_long_text_is_explained_as_far_as_it_is_read(tiny_model: ClinVLA):
    film = np.zeros((64, 64), np.uint8)
    found = explain(tiny_model, {"frontal": film}, "The heart is normal. " * 60)
    assert len(found.words) % 4 == 0 and 0 < len(found.words) < tiny_model.max_tokens
    assert found.words[-4:] == ("The", "heart", "is", "normal")


def test_what_cannot_be_explained(tiny_model: ClinVLA, tiny_towers: dict[str, Path]):
    film = {"frontal": np.zeros((64, 64), np.uint8)}
    for text in ("", " . ,"):
        with pytest.raises(DataError, match="no word is left of the text"):
            explain(tiny_model, film, text)
    with pytest.raises(DataError, match=r"views \['side'\]: expected one or more of frontal"):
        explain(tiny_model, {"side": film["frontal"]}, SENTENCE)
    with pytest.raises(DataError, match="trained without the local loss"):
        explain(ClinVLA(**tiny_towers, recipe=Recipe(width=24, local_weight=0)), film, SENTENCE)


# Scores


@pytest.mark.parametrize("seed", range(5))
def test_measures_are_those_of_plain_code(seed):
    rng = np.random.default_rng(seed)
    maps, size = rng.normal(size=(3, 12, 12)).astype(np.float32), 12
    inside = np.zeros((size, size), bool)
    inside[seed : seed + 5, 2:9] = True
    found = _measured(maps, 1, inside)
    values = [(float(maps[1, y, x]), bool(inside[y, x])) for y in range(size) for x in range(size)]
    ranked = [within for _, within in sorted(values, reverse=True)]
    precisions = [sum(ranked[: n + 1]) / (n + 1) for n in range(len(ranked)) if ranked[n]]
    sides = [[value for value, within in values if within == side] for side in (True, False)]
    means = [sum(side) / len(side) for side in sides]
    noise = sum(sum((v - m) ** 2 for v in side) / len(side) for side, m in zip(sides, means, strict=True)) ** 0.5
    peaks = [np.unravel_index(of.argmax(), of.shape) for of in maps]
    np.testing.assert_allclose(found.precision, sum(precisions) / len(precisions), rtol=1e-12)
    np.testing.assert_allclose(found.contrast, (means[0] - means[1]) / noise, rtol=1e-12)
    assert found.hit == inside[peaks[1]] and found.area == 35 / 144
    assert found.of_others == (float(inside[peaks[0]]) + float(inside[peaks[2]])) / 2
    elsewhere = _measured(maps, 1, inside, [maps[2], -maps[1], maps[2], maps[2]])
    turned, other = _measured(-maps, 1, inside), _measured(maps, 2, inside)
    expected = [(3 * getattr(other, n) + getattr(turned, n)) / 4 for n in ("hit", "contrast", "precision")]
    np.testing.assert_allclose(elsewhere.by_chance, expected, rtol=1e-12)
    np.testing.assert_allclose(turned.contrast, -found.contrast, rtol=1e-12)


def test_a_map_without_a_place_and_a_box_without_an_outside():
    flat, inside = np.zeros((1, 4, 4), np.float32), np.eye(8, dtype=bool)
    found = _measured(flat, 0, inside)
    assert (found.contrast, found.precision, found.area) == (0, 1 / 8, 1 / 8) and np.isnan(found.of_others)
    found = _measured(flat, 0, np.ones((8, 8), bool))
    assert found.hit and np.isnan(found.contrast) and np.isnan(found.precision)


@pytest.fixture(scope="module")
def model(finished_run: Path) -> ClinVLA:
    return ClinVLA.from_pretrained(finished_run)


@pytest.fixture
def subject(finished_run: Path, model: ClinVLA) -> Subject:
    return Subject(finished_run, model, finished_run / "data", "train")


@pytest.fixture(scope="module")
def result(finished_run: Path, model: ClinVLA) -> Result:
    return evaluate_grounding(Subject(finished_run, model, finished_run / "data", "train"), Options())


def test_every_box_of_every_view_is_asked_for(result: Result, subject: Subject, tmp_path: Path):
    asked = [(place, box) for place, study in enumerate(subject.studies) for box in study.boxes]
    whole = result.score("pointing game")
    assert len(whole.units) == len(asked) == len(set(whole.units.tolist()))
    assert set(whole.patients) == {subject.patients[place] for place, _ in asked}
    covered = np.mean([box.width * box.height for _, box in asked])
    np.testing.assert_allclose(result.shown["covered by boxes"], covered, rtol=5e-3)  # edges lie within pixels
    for view in ("frontal", "lateral"):
        assert len(result.score(f"pointing game, {view}").units) == sum(box.view == view for _, box in asked)
    labels = {box.label for _, box in asked}
    hits = {label: result.score(f"{label}: pointing game").rows["value"].sum() for label in labels}
    assert sum(hits.values()) == whole.rows["value"].sum()
    write_result(result, tmp_path, about(subject, seconds=0))
    assert read_result(tmp_path, "grounding").shown == result.shown


def test_examples_have_their_maps(result: Result, subject: Subject, model: ClinVLA, tmp_path: Path):
    """As a user sees them of the stored films."""
    examples = result.shown["examples"]
    assert {one["label"] for one in examples} == {box.label for study in subject.studies for box in study.boxes}
    assert {one["view"] for one in examples} == {"frontal", "lateral"}
    films = subject.radiographs({one["place"] for one in examples})
    checked = set()
    for one in examples:
        study, heat = films[one["place"]], result.arrays[one["heatmap"]]
        assert heat.dtype == np.float32 and heat.shape == (4, 8, 8)
        assert [not np.isnan(of).any() for of in heat] == [view in study.images for view in VIEWS]
        assert one["boxes"] == [
            list(box[2:]) for box in study.boxes if (box.label, box.view) == (one["label"], one["view"])
        ]
        phrases = [explain(model, study.images, phrase) for phrase in result.shown["phrases"][one["label"]]]
        expected = torch.stack([found.phrase for found in phrases]).mean(0).numpy()
        found = heat[~np.isnan(heat).any((1, 2))]
        # JPEGs are decoded by another library.
        np.testing.assert_allclose(found, expected, atol=0.05 * np.ptp(expected))
        checked |= set(study.images)
    assert checked == set(VIEWS)


def test_scores_do_not_depend_on_batches(result: Result, finished_run: Path, model: ClinVLA):
    other = evaluate_grounding(Subject(finished_run, model, finished_run / "data", "train", batch_size=7), Options())
    for one, again in zip(result.scores, other.scores, strict=True):
        assert one.name == again.name
        np.testing.assert_allclose(one.value, again.value, atol=1e-4)


def test_it_sees_a_model_that_points_and_no_leak(result: Result, subject: Subject):
    """With boxes where this model points, whatever is there, all is found; with those of other findings instead, as
    much as by chance."""
    phrases, asked = result.shown["phrases"], []
    for place, study in enumerate(subject.studies):
        keys = dict.fromkeys((box.label, box.view) for box in study.boxes)
        asked += [_Query(len(asked) + n, place, *key, ()) for n, key in enumerate(keys)]
    maps, _ = _maps(subject, asked, phrases)
    boxes = []
    for query, of in zip(asked, maps, strict=True):
        row, column = divmod(int(of[list(phrases).index(query.label)].argmax()), 8)
        boxes.append(Box(query.label, query.view, column / 8, row / 8, 1 / 8, 1 / 8))
    pointing = evaluate_grounding(_boxed(subject, asked, boxes), Options())
    assert pointing.score("pointing game").value == 1
    for name in LEAKS:
        assert pointing.score(name).interval().low > pointing.score(name).chance
    rng, shuffled = np.random.default_rng(0), []
    for query in asked:
        others = [n for n, o in enumerate(asked) if o.view == query.view and o.label != query.label]
        shuffled.append(boxes[rng.choice(others)]._replace(label=query.label))
    leak = evaluate_grounding(_boxed(subject, asked, shuffled), Options())
    for name in LEAKS:
        _, low, high = leak.score(name).interval()
        assert low < leak.score(name).chance < high


def _boxed(subject: Subject, asked: Sequence[_Query], boxes: Sequence[Box]) -> Subject:
    """The same studies with other boxes."""
    of: dict[int, list[Box]] = {}
    for query, box in zip(asked, boxes, strict=True):
        of.setdefault(query.place, []).append(box)
    other = Subject(subject.run, subject.model, subject.root, subject.split)
    other.studies = [replace(study, boxes=tuple(of.get(place, ()))) for place, study in enumerate(subject.studies)]
    return other


# Other data


@pytest.fixture
def written(tmp_path: Path, finished_run: Path, model: ClinVLA) -> Callable[..., Subject]:
    """A test split of studies with these boxes, a frontal view each."""

    def make(*boxes: Sequence[Box], model: ClinVLA = model) -> Subject:
        rng = np.random.default_rng(0)
        studies = [
            Study(f"s{n}", f"p{n}", "test", "", {"frontal": rng.integers(0, 256, (80, 64), np.uint8)}, (), tuple(of))
            for n, of in enumerate(boxes)
        ]
        write_shards({"test": studies}, lambda s: [s], tmp_path / "data", source="rsna", settings={}, workers=1)
        return Subject(finished_run, model, tmp_path / "data", "test")

    return make


def test_one_finding_with_several_boxes(written: Callable[..., Subject]):
    """As RSNA has them: one region; other findings there are none to compare with."""
    boxes = [Box("Pneumonia", "frontal", left, 0.0, 0.25, 0.5) for left in (0.0, 0.5, 0.625)]
    result = evaluate_grounding(written(boxes, (), boxes[:1]), Options())
    names = ["pointing game", "contrast-to-noise ratio", "average precision of pixels", "Pneumonia: pointing game"]
    assert [score.name for score in result.scores] == names
    assert result.shown["covered by boxes"] == np.mean([0.25 * 0.5 + 0.375 * 0.5, 0.25 * 0.5])
    hits = result.score("pointing game").rows["value"]
    assert len(hits) == 2 and result.score("pointing game").chance is not None
    assert result.shown["phrases"]["Pneumonia"][0] == "There is pneumonia."


def test_data_without_boxes_are_shown_and_not_scored(subject: Subject):
    bare = Subject(subject.run, subject.model, subject.root, subject.split)
    bare.studies = [replace(study, boxes=()) for study in bare.studies]
    result = evaluate_grounding(bare, Options())
    assert not result.scores and result.shown["examples"]
    for example in result.shown["examples"]:
        assert example["label"] in bare.studies[example["place"]].labels and example["label"] != "no finding"
        assert np.isfinite(result.arrays[example["heatmap"]]).any()


def test_refused(written: Callable[..., Subject], tiny_towers: dict[str, Path], tmp_path: Path):
    subject = written([Box("odd", "frontal", 0, 0, 0.5, 0.5)])
    own = tmp_path / "own.toml"
    own.write_text('[findings.edema]\npositive = ["Edema."]\nnegative = ["No edema."]\n')
    with pytest.raises(NotApplicable, match=r"own\.toml has no phrase for what has boxes in .*: expected one of odd"):
        evaluate_grounding(subject, Options(prompts=own))
    for recipe, message in (
        (Recipe(width=24, local_weight=0), "trained without the local loss"),
        (Recipe(width=24, views=("lateral",)), "has no boxes in test: expected .* in a view that the model looks at"),
    ):
        subject.model = ClinVLA(**tiny_towers, recipe=recipe)
        with pytest.raises(NotApplicable, match=message):
            evaluate_grounding(subject, Options())
    subject.studies = [replace(study, boxes=()) for study in subject.studies]
    with pytest.raises(NotApplicable, match="has no boxes in test"):
        evaluate_grounding(subject, Options())
