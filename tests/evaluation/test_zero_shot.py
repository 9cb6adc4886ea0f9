import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from clinvla_fast import ClinVLA
from clinvla_fast.data.phantom.findings import FINDINGS as PHANTOM
from clinvla_fast.data.shards import Study, read_studies, write_shards
from clinvla_fast.data.sources.chexpert import FINDINGS as CHEXPERT
from clinvla_fast.errors import DataError
from clinvla_fast.evaluation.result import NotApplicable
from clinvla_fast.evaluation.subject import Subject
from clinvla_fast.evaluation.tasks import Options
from clinvla_fast.evaluation.zero_shot import DEFAULT_PROMPTS, evaluate_zero_shot, read_prompts

NIH = (
    *("atelectasis", "cardiomegaly", "consolidation", "edema", "effusion", "emphysema", "fibrosis", "hernia"),
    *("infiltration", "mass", "no finding", "nodule", "pleural_thickening", "pneumonia", "pneumothorax"),
)
RSNA = ("pneumonia", "normal", "no lung opacity / not normal", "no pneumonia")


@pytest.fixture(scope="module")
def model(finished_run: Path) -> ClinVLA:
    return ClinVLA.from_pretrained(finished_run)


@pytest.fixture
def subject(finished_run: Path, model: ClinVLA) -> Subject:
    return Subject(finished_run, model, finished_run / "data", "train")


def _relabelled(subject: Subject, labels: Sequence[Sequence[str]]) -> Subject:
    subject.studies = [replace(study, labels=tuple(x)) for study, x in zip(subject.studies, labels, strict=True)]
    return subject


def _write(out: Path, studies: Sequence[Study], source: str = "csv") -> Path:
    of_split = {split: [s for s in studies if s.split == split] for split in ("train", "validate", "test")}
    write_shards(of_split, lambda study: [study], out, source=source, settings={}, workers=1)
    return out


def _of(result) -> dict[str, float]:
    return {score.name: score.value for score in result.scores}


def _prompts(path: Path, text: str) -> Options:
    path.write_text(text)
    return Options(prompts=path)


# The scores


def _plain_auc(shows, scored):
    pairs = [(a > b) + (a == b) / 2 for a in scored[shows] for b in scored[~shows]]
    return sum(pairs) / len(pairs)


def _plain_average_precision(shows, scored):
    recalls, precisions = [0.0], []
    for bound in sorted(set(scored), reverse=True):
        told = scored >= bound
        recalls.append((told & shows).sum() / shows.sum())
        precisions.append((told & shows).sum() / told.sum())
    return sum(p * (b - a) for p, a, b in zip(precisions, recalls, recalls[1:], strict=False))


def _plain_f1(shows, told):
    return 2 * (shows & told).sum() / (shows.sum() + told.sum())


def test_against_plain_numpy(subject, model):
    """Every score of every finding, from each phrase embedded by itself."""
    result, prompts, validate = evaluate_zero_shot(subject, Options()), read_prompts(DEFAULT_PROMPTS), {}
    found, aucs, nearest = _of(result), [], {}

    def ensemble(phrases):
        mean = sum(model.encode_reports([phrase])[0].double().numpy() for phrase in phrases)
        return mean / np.linalg.norm(mean)

    validate = subject.on("validate")
    for name in PHANTOM:
        positive, negative = (ensemble(side) for side in prompts.of(name))
        nearest[name] = positive
        scored, fitted = ((s.embedded.image.double().numpy() @ (positive - negative)) for s in (subject, validate))
        shows, known = (np.array([name in study.labels for study in s.studies]) for s in (subject, validate))
        aucs.append(_plain_auc(shows, scored))
        assert found.pop(f"{name}: AUC") == pytest.approx(aucs[-1], abs=1e-12)
        expected = _plain_average_precision(shows, scored)
        assert found.pop(f"{name}: average precision") == pytest.approx(expected, abs=1e-12)
        if known.any():
            threshold = max(sorted(fitted), key=lambda bound: _plain_f1(known, fitted >= bound))
            assert result.shown["findings"][name]["threshold"] == pytest.approx(threshold, abs=1e-6)
            told = scored >= result.shown["findings"][name]["threshold"]
            assert found.pop(f"{name}: accuracy") == pytest.approx((told == shows).mean(), abs=1e-12)
            assert found.pop(f"{name}: F1") == pytest.approx(_plain_f1(shows, told), abs=1e-12)
    assert found.pop("macro AUC") == pytest.approx(np.mean(aucs), abs=1e-12)
    hits = [
        (study.labels[0], max(PHANTOM, key=lambda name: nearest[name] @ image) == study.labels[0])
        for study, image in zip(subject.studies, subject.embedded.image.double().numpy(), strict=True)
        if len(study.labels) == 1
    ]
    assert found.pop("multi-class accuracy") == pytest.approx(np.mean([hit for _, hit in hits]), abs=1e-12)
    recalls = [np.mean([hit for label, hit in hits if label == name]) for name in PHANTOM]
    assert found.pop("multi-class macro accuracy") == pytest.approx(np.mean(recalls), abs=1e-12)
    assert not found


def test_shuffled_labels_give_chance(subject):
    labels, random = [study.labels for study in subject.studies], np.random.default_rng(0)
    orders = [random.permutation(len(labels)) for _ in range(20)]
    results = [evaluate_zero_shot(_relabelled(subject, [labels[i] for i in order]), Options()) for order in orders]
    low, high = results[0].score("multi-class accuracy").interval(draws=100)[1:]
    assert low < results[0].score("multi-class accuracy").chance < high
    for name in ("macro AUC", "multi-class macro accuracy"):  # so few studies of a finding give no interval
        score = results[0].score(name)
        found = [result.score(name).value for result in results]
        low, high = np.percentile(found, [5, 95])
        assert low - 1e-9 < score.chance < high + 1e-9


def test_images_that_are_what_is_said_of_them(subject, model):
    """The right side and the right class: an image that is its finding's phrase, one that is how it differs from the
    phrase against it."""
    prompts = read_prompts(DEFAULT_PROMPTS)
    labels = [
        study.labels[:1] for study in _relabelled(subject, [study.labels[:1] for study in subject.studies]).studies
    ]
    positive, negative = (
        torch.stack([model.encode_reports(prompts.of(label)[side]).mean(0) for (label,) in labels]) for side in (0, 1)
    )
    has = subject.embedded
    subject.embedded = has._replace(image=normalize(positive, dim=-1))
    assert evaluate_zero_shot(subject, Options()).score("multi-class accuracy").value == 1
    subject.embedded = has._replace(image=normalize(positive - negative, dim=-1))
    assert evaluate_zero_shot(subject, Options()).score("macro AUC").value > 0.9


def test_chance_of_thresholded_scores_is_that_of_the_same_answers_dealt_anew(subject):
    random = np.random.default_rng(0)
    for score in evaluate_zero_shot(subject, Options()).scores:
        if score.statistic in ("accuracy", "f1") and not score.name.startswith("multi"):
            dealt = [
                replace(score, rows=score.rows | {"predicted": random.permutation(score.rows["predicted"])}).value
                for _ in range(60)
            ]
            assert np.mean(dealt) == pytest.approx(score.chance, abs=4 * np.std(dealt) / 60**0.5)


def test_scores_do_not_depend_on_batches(finished_run, model):
    found = []
    for batch_size in (1, 7, 64):
        subject = Subject(finished_run, model, finished_run / "data", "test", batch_size)
        found.append(evaluate_zero_shot(subject, Options()))
    for other in found[1:]:
        assert _of(other) == pytest.approx(_of(found[0]), abs=1e-12)
        for one, same in zip(found[0].scores, other.scores, strict=True):
            for name, x in one.rows.items():
                np.testing.assert_allclose(same.rows[name], x, atol=1e-5)


# Thresholds


def _thresholds(result):
    return {name: found["threshold"] for name, found in result.shown["findings"].items()}


def test_thresholds_come_from_the_validate_split_alone(subject):
    before = _thresholds(evaluate_zero_shot(subject, Options()))
    turned = _relabelled(subject, [study.labels for study in reversed(subject.studies)])
    assert _thresholds(evaluate_zero_shot(turned, Options())) == before
    assert any(before.values())


def test_without_a_validate_split_nothing_is_thresholded(finished_run, model, tmp_path):
    root = shutil.copytree(finished_run / "data", tmp_path / "data")
    manifest = json.loads((root / "manifest.json").read_text())
    manifest["shards"] = [shard for shard in manifest["shards"] if not shard["file"].startswith("validate")]
    del manifest["counts"]["splits"]["validate"]
    (root / "manifest.json").write_text(json.dumps(manifest))
    for subject in (
        Subject(tmp_path, model, root, "train"),
        Subject(tmp_path, model, finished_run / "data", "validate"),
    ):
        result = evaluate_zero_shot(subject, Options())
        assert not any("F1" in name or name.endswith(": accuracy") for name in _of(result))
        assert "validate split" in result.shown["thresholds"]
        assert set(_thresholds(result).values()) == {None}


# Labels


def test_default_prompts_know_the_labels_of_the_data_sets():
    prompts = read_prompts(DEFAULT_PROMPTS)
    for label in (*PHANTOM, *(name.lower() for name in CHEXPERT), *(name.replace("_", " ") for name in NIH), RSNA[0]):
        assert label in prompts.names
    assert prompts.of("effusion") == prompts.of("pleural effusion")
    assert (
        "There is pneumonia." in prompts.of("pneumonia")[0] and "There is no pneumonia." in prompts.of("pneumonia")[1]
    )


def test_no_finding_is_never_negated():
    """Its negative phrases say that something is there."""
    positive, negative = read_prompts(DEFAULT_PROMPTS).of("no finding")
    assert not any(phrase.lower().startswith(("no ", "there is no ")) for phrase in negative)
    assert all(phrase.lower().startswith(("no ", "normal", "the lungs are clear")) for phrase in positive)


def test_rsna_is_pneumonia_or_not(finished_run, model, tmp_path):
    """Without reports, and with a study that has no film."""
    studies = [
        replace(study, labels=(RSNA[number % 4],), report="", split="test" if number % 2 else "validate")
        for number, study in enumerate(read_studies(finished_run / "data", "train"))
    ][:41]
    studies = [replace(study, patient_id=study.study_id) for study in studies]
    studies = [*studies, replace(studies[-1], study_id="text", patient_id="text", images={}, split="validate")]
    subject = Subject(tmp_path, model, _write(tmp_path / "data", studies, "rsna"), "validate")
    result = evaluate_zero_shot(subject, Options())
    assert list(_of(result)) == ["pneumonia: AUC", "pneumonia: average precision"]
    assert "left_out" in result.shown["multi_class"] and result.shown["without_labels"] == 10
    assert len(result.score("pneumonia: AUC").units) == 21


def test_a_finding_without_prompts_gets_general_ones(subject):
    labels = [
        (*study.labels, "Hiatus_x") if number % 3 else study.labels for number, study in enumerate(subject.studies)
    ]
    result = evaluate_zero_shot(_relabelled(subject, [*labels[:-1], ("seldom",)]), Options())
    assert result.shown["prompts"]["hiatus x"]["general"] and not result.shown["prompts"]["edema"]["general"]
    assert "There is no hiatus x." in result.shown["prompts"]["hiatus x"]["negative"]
    assert result.score("hiatus x: AUC").value is not None
    assert result.shown["left_out"] == {"seldom": "no prompts, and 1 studies"}


def test_classes_that_all_or_none_show(subject):
    labels = [("edema", "nodule") if number % 2 else ("edema",) for number in range(len(subject.studies))]
    result = evaluate_zero_shot(_relabelled(subject, labels), Options())
    assert "edema: AUC" not in _of(result) and "edema" in result.shown["left_out"]
    assert "nodule: AUC" in _of(result) and "macro AUC" not in _of(result)


@pytest.mark.parametrize("labels", [("edema",), (), ("normal",)])
def test_nothing_to_tell_apart(subject, labels):
    with pytest.raises(NotApplicable, match="train"):
        evaluate_zero_shot(_relabelled(subject, [labels] * len(subject.studies)), Options())


def test_only_findings_too_rare_to_evaluate(subject):
    labels = [("zebra",) if number < 8 else () for number in range(len(subject.studies))]
    with pytest.raises(NotApplicable, match=r"no finding in train to evaluate .zebra: "):
        evaluate_zero_shot(_relabelled(subject, labels), Options())


def test_a_broken_model_gets_no_figure(finished_run, subject):
    broken = ClinVLA.from_pretrained(finished_run)
    torch.nn.init.constant_(broken.image_global[0].weight, torch.nan)
    with pytest.raises(DataError, match="not finite"):
        evaluate_zero_shot(Subject(finished_run, broken, subject.root, "train"), Options())


def test_a_model_that_aligns_nothing(subject, tiny_towers):
    recipe = replace(subject.model.recipe, global_weight=0.0, local_weight=0.0, image_weight=1.0)
    subject.model = ClinVLA(**tiny_towers, recipe=recipe)
    with pytest.raises(NotApplicable, match="align"):
        evaluate_zero_shot(subject, Options())


# Prompt files

EDEMA = '[findings.edema]\npositive = ["There is edema."]\nnegative = ["No edema."]\n'


def test_prompts_of_ones_own(subject, tmp_path):
    """Only what the file has is evaluated; what no study has is said."""
    entries = EDEMA + EDEMA.replace("edema", "Nodule") + EDEMA.replace("edema", "oedma")
    result = evaluate_zero_shot(subject, _prompts(tmp_path / "mine.toml", entries))
    assert {name.split(":")[0] for name in _of(result) if ":" in name} == {"edema", "nodule"}
    assert result.shown["not_in_data"] == ["oedma"] and result.settings["prompts"] == "mine.toml"
    assert result.shown["left_out"]["fracture"] == "no prompts"
    assert result.shown["prompts"]["edema"]["positive"] == ["There is edema."]


@pytest.mark.parametrize(
    "text, message",
    [
        ("findings = 3", "findings is wrong"),
        ("", "findings is wrong"),
        ("[findings.edema", "not valid TOML"),
        (EDEMA + 'negativ = ["No edema."]', r"findings\.edema\.negativ is wrong"),
        ('[findings.edema]\npositive = ["There is edema."]', r"findings\.edema\.negative is wrong"),
        (EDEMA.replace('["No edema."]', "[]"), r"findings\.edema\.negative is wrong"),
        (EDEMA.replace('["No edema."]', '"No edema."'), r"findings\.edema\.negative is wrong"),
        (EDEMA.replace("No edema.", " "), r"findings\.edema\.negative\.0 is wrong"),
        (EDEMA.replace("No edema.", "No findings."), r"findings\.edema: cleaning leaves nothing of 'No findings\.'"),
        (EDEMA + EDEMA.replace("edema]", "Edema]"), r"findings\.Edema is also 'edema', as findings\.edema is"),
        (EDEMA + '[other]\npositive = ["It."]\nnegative = ["No {finding}."]', r"other: 'It\.' has no \{finding\}"),
        (EDEMA.replace("edema", "oedma"), "none of its findings is a label in train, which has cardiomegaly"),
    ],
)
def test_unusable_prompts_are_one_clear_error(subject, tmp_path, text, message):
    with pytest.raises(DataError, match=message) as error:
        evaluate_zero_shot(subject, _prompts(tmp_path / "mine.toml", text))
    assert str(error.value).startswith(str(tmp_path / "mine.toml")) and "\n" not in str(error.value)


def test_no_prompt_file(subject, tmp_path):
    with pytest.raises(DataError, match="no such file"):
        evaluate_zero_shot(subject, Options(prompts=tmp_path / "none.toml"))


@torch.inference_mode()
def test_an_ensemble_is_the_direction_of_the_mean(subject, tmp_path):
    """Phrases given twice count twice; their order does not."""
    once, twice, turned = (
        evaluate_zero_shot(subject, _prompts(tmp_path / "mine.toml", EDEMA.replace('["There is edema."]', phrases)))
        for phrases in ('["A.", "Edema is seen."]', '["A.", "A.", "Edema is seen."]', '["Edema is seen.", "A."]')
    )
    rows = [result.score("edema: AUC").rows["scored"] for result in (once, twice, turned)]
    np.testing.assert_allclose(rows[0], rows[2], atol=1e-6)
    assert np.abs(rows[0] - rows[1]).max() > 1e-3
