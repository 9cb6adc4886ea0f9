from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from clinvla_fast import ClinVLA, Recipe
from clinvla_fast.data.shards import Study, write_shards
from clinvla_fast.data.tokenizer import train_tokenizer
from clinvla_fast.evaluation.probes import evaluate_adapter_depth, evaluate_collapse, evaluate_modality_bias
from clinvla_fast.evaluation.reconstruction import evaluate_reconstruction
from clinvla_fast.evaluation.result import NotApplicable
from clinvla_fast.evaluation.subject import Subject
from clinvla_fast.evaluation.tasks import Options
from clinvla_fast.evaluation.zero_shot import evaluate_zero_shot
from clinvla_fast.methods import METHODS
from clinvla_fast.modeling.adaptor import Adaptor, AdaptorModel
from clinvla_fast.modeling.encoders import load_image_encoder, load_text_encoder
from clinvla_fast.modeling.towers import make_tiny_text, make_tiny_vision, save_text, save_vision
from training.pretrain import main as pretrain

WORDS = ("edema", "effusion", "pneumonia", "nodule", "fracture", "mass", "hernia", "fibrosis")
SIZES = {"train": 64, "test": 48}


def _studies(split: str, mixed: bool) -> list[Study]:
    """Films as gray as their finding; where mixed, with another study's report."""
    random = np.random.default_rng(0)
    kinds = np.arange(SIZES[split]) % len(WORDS)
    said = random.permutation(kinds) if mixed else kinds
    return [
        Study(
            *(f"{split}-{number}",) * 2,
            split,
            f"There is {WORDS[said[number]]}.",
            {"frontal": random.normal(30 + 25 * kind, 8, (128, 128)).clip(0, 255).astype(np.uint8)},
            (WORDS[kind],),
        )
        for number, kind in enumerate(kinds)
    ]


def _write(out: Path, studies: list[Study]) -> Path:
    of_split = {split: [study for study in studies if study.split == split] for split in SIZES}
    write_shards(of_split, lambda study: [study], out, source="csv", settings={}, workers=1)
    return out


@pytest.fixture(scope="module")
def films(tmp_path_factory) -> Path:
    return _write(tmp_path_factory.mktemp("films") / "data", _studies("train", False) + _studies("test", False))


@pytest.fixture(scope="module")
def train(tmp_path_factory) -> Callable[..., ClinVLA]:
    """A model that was trained on such films, from random towers."""
    folder = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    tokenizer = train_tokenizer(f"There is {word}." for word in WORDS for _ in range(2))
    save_vision(make_tiny_vision(), folder / "vision")
    save_text(make_tiny_text(len(tokenizer)), tokenizer, folder / "text")
    sizes = ["--epochs", "6", "--batch-size", "16", "--language-lr", "1e-3", "--task-lr", "1e-3", "--local-weight", "0"]
    towers = ["--vision-tower", str(folder / "vision"), "--text-tower", str(folder / "text")]

    def run(data: Path, *options: str) -> ClinVLA:
        out = folder / f"{data.parent.name}-{'-'.join(options)}"
        if not out.exists():
            pretrain([*sizes, *towers, *options, "--data", str(data), "--device", "cpu", "--out", str(out)])
        return ClinVLA.from_pretrained(out)

    return run


@pytest.fixture
def subject(films, train) -> Subject:
    return Subject(Path("run"), train(films), films, "test")


def _of(result):
    return {score.name: score.value for score in result.scores}


# Collapse


def test_a_trained_model_has_not_collapsed_and_the_cosine_objective_has(subject, films, train):
    assert evaluate_collapse(subject, Options()).shown["alarms"] == []
    result = evaluate_collapse(Subject(Path("run"), train(films, "--objective", "cosine"), films, "test"), Options())
    assert result.shown["image"]["alarming"] and result.shown["text"]["alarming"]
    assert len(result.shown["alarms"]) == 2
    assert result.score("image variance").interval().high < 0.05


def test_variance_and_rank_against_numpy(subject):
    result = evaluate_collapse(subject, Options())
    for side in ("image", "text"):
        points = getattr(subject.embedded, side).double().numpy()
        points /= np.linalg.norm(points, axis=1, keepdims=True)
        values = np.linalg.svd(points - points.mean(0), compute_uv=False)
        shares = values[values > 1e-12] / values.sum()
        assert result.shown[side]["rank"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), abs=1e-9)
        assert _of(result)[f"{side} variance"] == pytest.approx(points.var(0).sum(), abs=1e-12)
        assert result.shown[side]["variance"] == pytest.approx(points.var(0).sum(), abs=1e-12)


def test_a_side_that_the_data_have_not(subject, tmp_path):
    """Without reports there are images; without either, nothing."""
    silent = [replace(study, report="") for study in _studies("test", False)]
    result = evaluate_collapse(Subject(Path("run"), subject.model, _write(tmp_path / "a", silent), "test"), Options())
    assert list(_of(result)) == ["image variance"] and "text" not in result.shown
    nothing = Subject(Path("run"), subject.model, _write(tmp_path / "b", silent[:1]), "test")
    with pytest.raises(NotApplicable, match="two studies"):
        evaluate_collapse(nothing, Options())


# Modality bias


def test_a_model_trained_on_mismatched_pairs_is_caught(subject, films, train, tmp_path_factory):
    """Evaluated on the same matched pairs as one that was trained on matched ones, which raises no alarm."""
    mixed = _write(tmp_path_factory.mktemp("mixed") / "data", _studies("train", True) + _studies("test", False))
    told, fooled = (
        evaluate_modality_bias(Subject(Path("run"), train(data), films, "test"), Options()) for data in (films, mixed)
    )
    assert told.shown["alarms"] == []
    assert any("by chance" in alarm for alarm in fooled.shown["alarms"])
    name = "own report before another patient's"
    assert told.score(name).interval().low > 0.7 > fooled.score(name).interval().high


def test_reports_of_other_studies_are_matched_by_chance(subject):
    order = torch.from_numpy(np.random.default_rng(3).permutation(SIZES["test"]))
    subject.embedded = subject.embedded._replace(text=subject.embedded.text[order])
    result = evaluate_modality_bias(subject, Options())
    assert len([alarm for alarm in result.shown["alarms"] if "by chance" in alarm]) == 2


@pytest.mark.parametrize("side, of", [("text", "report"), ("image", "image")])
def test_one_modality_alone_is_caught(subject, side, of):
    """The other side's embeddings are the same for every study, but for a trace."""
    other = {"text": "image", "image": "text"}[side]
    points = getattr(subject.embedded, other)
    same = normalize(points.mean(0) + 1e-3 * points, dim=-1)
    subject.embedded = subject.embedded._replace(**{other: same})
    result = evaluate_modality_bias(subject, Options())
    assert any(f"by the {of} alone" in alarm for alarm in result.shown["alarms"])
    assert _of(result)[f"similarity by the {of} alone"] > 0.9


def test_embeddings_that_are_all_the_same(subject):
    ones = torch.ones_like(subject.embedded.image) / 8
    subject.embedded = subject.embedded._replace(image=ones, text=ones)
    result = evaluate_modality_bias(subject, Options())
    assert "all similarities are alike" in result.shown["alarms"]
    assert _of(result)["own report before another patient's"] == 0.5


def test_against_all_pairs(subject):
    """The shares of an analysis of variance, by the whole matrix; matching, against every other patient's study."""
    random = torch.Generator().manual_seed(0)
    image, text = (normalize(torch.randn(SIZES["test"], 6, generator=random), dim=-1) for _ in range(2))
    text = normalize(text + image, dim=-1)
    subject.embedded = subject.embedded._replace(image=image, text=text)
    subject.patients = np.arange(SIZES["test"]) // 2
    found, labels = _of(evaluate_modality_bias(subject, Options())), [s.labels for s in subject.studies]
    table = image.double().numpy() @ text.double().numpy().T
    by_image, by_report = table.mean(1).var() / table.var(), table.mean(0).var() / table.var()
    assert found["similarity by the image alone"] == pytest.approx(by_image, abs=1e-12)
    assert found["similarity by the report alone"] == pytest.approx(by_report, abs=1e-12)
    for side, pairs in (("report", table), ("image", table.T)):
        for words in ("", " with the same findings"):
            before = [
                np.mean(
                    [
                        pairs[i, i] > pairs[i, j]
                        for j in range(len(pairs))
                        if i // 2 != j // 2 and (not words or labels[i] == labels[j])
                    ]
                )
                for i in range(len(pairs))
            ]
            assert found[f"own {side} before another patient's{words}"] == pytest.approx(np.mean(before), abs=0.03)


def test_scores_do_not_depend_on_batches(films, train):
    for task, sizes in (
        (evaluate_collapse, (1, 7, 64)),
        (evaluate_modality_bias, (1, 7, 64)),
        (evaluate_adapter_depth, (7, 64)),
    ):
        one, *others = (_of(task(Subject(Path("run"), train(films), films, "test", n), Options())) for n in sizes)
        for other in others:
            assert other == pytest.approx(one, abs=1e-4)


def test_nothing_to_mismatch(subject, tmp_path, tiny_towers):
    one = [replace(study, patient_id="one") for study in _studies("test", False)]
    with pytest.raises(NotApplicable, match="two patients"):
        evaluate_modality_bias(Subject(Path("run"), subject.model, _write(tmp_path / "a", one), "test"), Options())
    subject.model = ClinVLA(**tiny_towers, recipe=replace(METHODS["mrm"].recipe, scratch=False, target_scale=1))
    with pytest.raises(NotApplicable, match="align"):
        evaluate_modality_bias(subject, Options())


# Adapter depth


def _model(tiny_towers, shake, **recipe) -> ClinVLA:
    torch.manual_seed(1)
    model = ClinVLA(**tiny_towers, recipe=Recipe(width=24, bottleneck=20, **recipe))
    shake(model)
    return model


def test_switched_off_is_zeroed(films, tiny_towers, shake):
    """What is shown is what a model gives whose adapters there have been set to zero by hand, and the model is left as
    it was."""
    model = _model(tiny_towers, shake)
    subject = Subject(Path("run"), model, films, "test")
    result, before = evaluate_adapter_depth(subject, Options()), subject.embedded
    del subject.embedded
    torch.testing.assert_close(subject.embedded.image, before.image, rtol=0, atol=0)
    whole = result.score("recall@10, all adapters")
    assert whole.value == pytest.approx(_recall(before.image, before.text), abs=1e-12) and whole.chance == 10 / 48
    for side, tower in (("image", model.vision), ("text", model.text)):
        places = [tower.invertible, *tower.adapts]
        shown = result.shown["towers"][side]
        assert [x["part"] for x in shown] == ["embeddings", *(f"block {n}" for n in range(len(places) - 1))]
        for number, found in enumerate(shown):
            for which, off in (("alone", places[number : number + 1]), ("from_here_up", places[number:])):
                again = _zeroed(tiny_towers, model, off, subject)
                pair = (again.image, before.text) if side == "image" else (before.image, again.text)
                assert found[which]["recall"] == pytest.approx(_recall(*pair), abs=1e-12)
                cosine = (getattr(again, side) * getattr(before, side)).sum(1).mean().item()
                assert found[which]["cosine"] == pytest.approx(cosine, abs=1e-5)
            lost = result.score(f"recall@10 lost without those of {side} {found['part']}")
            assert lost.value == pytest.approx(whole.value - found["alone"]["recall"], abs=1e-12)
        assert min(x["alone"]["cosine"] for x in shown) < 0.99


def _zeroed(tiny_towers, model, off, subject):
    kept = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for part in off:
            for name, p in part.named_parameters():
                p.mul_(".up." not in f".{name}")
    del subject.embedded
    found = subject.embedded
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(kept[name])
    return found


def _recall(image, text):
    """At 10, both ways; of reports that are the same, and so equally near but for rounding, any may come first."""
    table = image.double().numpy() @ text.double().numpy().T
    hits = []
    for pairs in (table, table.T):
        for i, row in enumerate(pairs):
            equal = np.isclose(row, row[i], rtol=0, atol=1e-5)
            hits.append(min(1.0, max(0.0, (10 - (row[~equal] > row[i]).sum()) / equal.sum())))
    return np.mean(hits)


def test_adapters_that_do_nothing_are_idle(films, tiny_model):
    result = evaluate_adapter_depth(Subject(Path("run"), tiny_model, films, "test"), Options())
    for shown in result.shown["towers"].values():
        assert all(x["idle"] for x in shown)
    assert all(x == 0 for name, x in _of(result).items() if "lost" in name)


@pytest.mark.parametrize("adapters", [("language", "task"), ("attention", "mlp")])
def test_only_blocks_that_carry_adapters(films, tiny_towers, shake, adapters):
    model = _model(tiny_towers, shake, adapters=adapters, adapter_blocks=(1,))
    result = evaluate_adapter_depth(Subject(Path("run"), model, films, "test"), Options())
    assert {side: [x["part"] for x in shown] for side, shown in result.shown["towers"].items()} == {
        "image": ["block 1"],
        "text": ["block 1"],
    }


def test_models_and_data_without(films, tiny_towers, tiny_model, tmp_path):
    model = ClinVLA(**tiny_towers, recipe=METHODS["gloria"].recipe)
    with pytest.raises(NotApplicable, match="adapters"):
        evaluate_adapter_depth(Subject(Path("run"), model, films, "test"), Options())
    silent = _write(tmp_path / "data", [replace(study, report="") for study in _studies("test", False)])
    with pytest.raises(NotApplicable, match="image and a report"):
        evaluate_adapter_depth(Subject(Path("run"), tiny_model, silent, "test"), Options())


# Adaptor


def test_an_adaptor_is_probed_where_it_can_be(films, tiny_towers):
    encoders = load_image_encoder(str(tiny_towers["vision"])), load_text_encoder(str(tiny_towers["text"]))
    model = AdaptorModel(Adaptor(128, 128, width=64, heads=2, hidden=64), *encoders)
    subject = Subject(Path("run"), model, films, "test")
    for task in (evaluate_collapse, evaluate_modality_bias, evaluate_zero_shot):
        assert task(subject, Options()).scores
    for task in (evaluate_adapter_depth, evaluate_reconstruction):
        with pytest.raises(NotApplicable):
            task(subject, Options())
