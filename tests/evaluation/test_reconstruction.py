from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from clinvla_fast import ClinVLA, Recipe, ops
from clinvla_fast.data.shards import Study, read_studies, write_shards
from clinvla_fast.evaluation import reconstruction
from clinvla_fast.evaluation.reconstruction import evaluate_reconstruction
from clinvla_fast.evaluation.result import NotApplicable
from clinvla_fast.evaluation.subject import Subject
from clinvla_fast.evaluation.tasks import Options
from clinvla_fast.methods import METHODS

BEFORE, AFTER, FILM = (
    f"error of masked patches, {name}" for name in ("before training", "after training", "the mean film")
)


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    """A decoder of a few steps says little, and does all that one of many does."""
    monkeypatch.setattr(reconstruction, "_STEPS", 12)


@pytest.fixture
def subject(finished_run, tiny_model) -> Subject:
    return Subject(finished_run, tiny_model, finished_run / "data", "test")


def _patches(views: np.ndarray, patch: int) -> np.ndarray:
    """Normalised a patch: [n, N, pixels]."""
    n, side = len(views), views.shape[1] // patch
    x = views.astype(np.float64).reshape(n, side, patch, side, patch).transpose(0, 1, 3, 2, 4).reshape(n, side**2, -1)
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, ddof=1, keepdims=True) + 100)


def test_new_adapters_break_nothing(subject):
    """Before and after go the same way, so that where nothing has changed nothing differs, to the last patch."""
    result = evaluate_reconstruction(subject, Options())
    before, after = (result.score(name).rows["value"] for name in (BEFORE, AFTER))
    np.testing.assert_allclose(after, before, atol=1e-5)
    assert result.score("error added by training").value == pytest.approx(0, abs=1e-6)
    assert np.abs(before - result.score(FILM).rows["value"]).max() > 1e-3


def test_changed_adapters_are_seen_and_their_inverse_is_taken(subject, shake):
    """An invertible adapter alone is taken back in a tower without blocks; what the blocks add is not."""
    shake(subject.model)
    changed = evaluate_reconstruction(subject, Options())
    assert np.abs(changed.score("error added by training").rows["value"]).max() > 1e-3
    vit, subject.model.vision.vit.blocks = subject.model.vision.vit, torch.nn.ModuleList()
    subject.model.vision.adapts, vit.norm = torch.nn.ModuleList(), torch.nn.Identity()
    films = reconstruction._films(subject)
    kept = reconstruction._kept(films, subject.model.vision, 0)
    found = reconstruction._tokens(subject.model.vision, films, kept)
    subject.model.vision.invertible = None
    torch.testing.assert_close(found, reconstruction._tokens(subject.model.vision, films, kept), atol=1e-4, rtol=0)


def test_the_mean_film_against_numpy(subject):
    """Masks, normalisation, errors and rows: one a view, of the study at its place."""
    result, views = evaluate_reconstruction(subject, Options(seed=5)), {}
    for split in ("train", "test"):
        batches = list(subject.on(split).batches())
        images = np.concatenate([batch.images[:, :2].numpy() for batch in batches])
        views[split] = images, np.concatenate([batch.present[:, :2].numpy() for batch in batches])
    images, present = views["train"]
    mean = np.stack([_patches(images[present[:, slot], slot], 16).mean(0) for slot in range(2)])
    images, present = views["test"]
    kept, _ = ops.draw_kept_patches(torch.from_numpy(present), 64, 16, 5)
    expected, units = [], []
    for row, (study, slot) in enumerate(np.argwhere(present)):
        masked = np.setdiff1d(np.arange(64), kept[row].numpy())
        errors = (_patches(images[study, slot][None], 16)[0] - mean[slot]) ** 2
        expected.append(errors[masked].mean())
        units.append(study)
    score = result.score(FILM)
    np.testing.assert_allclose(score.rows["value"], expected, rtol=1e-4)
    assert score.units.tolist() == units and score.value == pytest.approx(score.rows["value"].mean(), abs=1e-12)
    np.testing.assert_array_equal(score.patients, subject.patients[units])
    other = evaluate_reconstruction(subject, Options(seed=6)).score(FILM)
    assert np.abs(other.rows["value"] - score.rows["value"]).max() > 1e-3


def test_scores_do_not_depend_on_batches(finished_run, tiny_model, shake):
    shake(tiny_model)
    found = [
        evaluate_reconstruction(Subject(finished_run, tiny_model, finished_run / "data", "test", size), Options())
        for size in (1, 7, 64)
    ]
    for other in found[1:]:
        for one, same in zip(found[0].scores, other.scores, strict=True):
            np.testing.assert_allclose(same.rows["value"], one.rows["value"], atol=1e-5)


def test_pictures(subject):
    """Each example names its own, and what was seen is as it is in all of them."""
    result = evaluate_reconstruction(subject, Options())
    names = ("original", "masked", "before training", "after training", "the mean film")
    assert len(result.shown["examples"]) == 4
    assert {example[name] for example in result.shown["examples"] for name in names} == result.arrays.keys()
    for example in result.shown["examples"]:
        assert 0 <= example["place"] < len(subject.studies) and example["label"] in ("frontal", "lateral")
        original, masked, *filled = (result.arrays[example[name]] for name in names)
        assert original.dtype == np.uint8 and original.shape == (128, 128)
        hidden = (masked == 128).reshape(8, 16, 8, 16).all((1, 3)).repeat(16, 0).repeat(16, 1)
        assert 0.7 < hidden.mean() < 0.8
        for picture in filled:
            np.testing.assert_array_equal(picture[~hidden], original[~hidden])
            assert np.abs(picture[hidden].astype(int) - original[hidden]).mean() < 60


def test_a_model_with_a_decoder_shows_what_that_one_makes(finished_run, tiny_towers):
    """At its own resolution, of frontal views alone."""
    recipe = replace(METHODS["alta"].recipe, width=24, bottleneck=20, decoder_blocks=1)
    model = ClinVLA(**tiny_towers, recipe=recipe)
    result = evaluate_reconstruction(Subject(finished_run, model, finished_run / "data", "test"), Options())
    assert result.score("error of masked patches, after training, its own decoder").value > 0
    assert {example["label"] for example in result.shown["examples"]} == {"frontal"}
    assert result.arrays["original/0"].shape == (256, 256)


def test_what_a_tower_has_lost_is_an_alarm(tiny_model, tmp_path, monkeypatch):
    """Films that are one pattern or its negative: one patch tells all others, to a tower that tells patches apart."""
    pattern = np.tile(np.random.default_rng(0).choice([-60, 60], (16, 16)), (8, 8))
    studies = [
        Study(f"{split}{i}", f"{split}{i}", split, "", {"frontal": (128 + (-1) ** i * pattern).astype(np.uint8)})
        for split in ("train", "test")
        for i in range(16)
    ]
    of_split = {split: [study for study in studies if study.split == split] for split in ("train", "test")}
    write_shards(of_split, lambda s: [s], tmp_path / "d", source="csv", settings={}, workers=1, image_format="png")
    monkeypatch.setattr(reconstruction, "_STEPS", 100)
    whole = evaluate_reconstruction(Subject(Path("run"), tiny_model, tmp_path / "d", "test"), Options())
    assert whole.score(BEFORE).value < 0.5 < 0.9 < whole.score(FILM).value
    assert whole.shown["left_beyond_the_mean_film"] == pytest.approx(1, abs=0.01) and not whole.shown["alarms"]
    with torch.no_grad():
        for adapt in tiny_model.vision.adapts:  # beside this all tokens are the same
            adapt.task.up.bias[0] = 1e5
    lost = evaluate_reconstruction(Subject(Path("run"), tiny_model, tmp_path / "d", "test"), Options())
    assert lost.score("error added by training").interval().low > 0
    assert lost.shown["left_beyond_the_mean_film"] < 0.5 and len(lost.shown["alarms"]) == 1


def test_models_and_data_without(finished_run, subject, tiny_towers, tmp_path):
    model = ClinVLA(**tiny_towers, recipe=Recipe(adapters=()))
    with pytest.raises(NotApplicable, match="as it found them"):
        evaluate_reconstruction(Subject(finished_run, model, finished_run / "data", "test"), Options())
    studies = [replace(study, split="test") for study in read_studies(finished_run / "data", "test")]
    write_shards({"test": studies}, lambda s: [s], tmp_path / "data", source="csv", settings={}, workers=1)
    with pytest.raises(NotApplicable, match="train split"):
        evaluate_reconstruction(Subject(Path("run"), subject.model, tmp_path / "data", "test"), Options())
