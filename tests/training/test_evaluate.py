"""training.evaluate, from runs and data sets in their own layouts to a report."""

import hashlib
import importlib.util
import json
import shutil
from pathlib import Path
from typing import get_args

import pytest

from clinvla_fast.evaluation import reconstruction
from clinvla_fast.evaluation.result import FOLDER, results
from clinvla_fast.evaluation.tasks import TaskName
from training.evaluate import main

_SPEC = importlib.util.spec_from_file_location("sources", Path(__file__).parents[1] / "data" / "test_sources.py")
sources = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(sources)
films, film = sources.films, sources.film


def chexpert_8x200(path, film):
    """Two queries of either kind, with candidates that show what they look for."""
    root, name = path / "data", "CheXpert-v1.0/train/patient{:05d}/study1/view1_frontal.jpg"
    classes = ("Edema", "Fracture")
    candidates = [sources.chexpert_row(name.format(i), **{classes[i % 2]: "1.0"}) for i in range(6)]
    for kind, column, asked in (
        ("image-retrieval", "Path", [name.format(6), name.format(7)]),
        ("text-retrieval", "Text", ["Mild pulmonary edema.", "Rib fracture."]),
    ):
        queries = [{"Variable": c, column: value} for c, value in zip(classes, asked, strict=True)]
        sources.table(root / kind / "query.csv", queries)
        sources.table(root / kind / "candidate.csv", candidates)
    for i in range(8):
        film(root / name.format(i))
    sources.prepared(path, "chexpert-8x200", root)


# Each writes a data set in its own layout, and prepares it in tmp_path / "out".
MINIATURES = {
    "mimic-cxr": lambda path, film: sources.test_mimic_cxr(path, film, ".jpg", True, sources.mimic_sections, 1),
    "chexpert": lambda path, film: sources.test_chexpert(path, film, "inside"),
    "chexpert-plus": lambda path, film: sources.test_chexpert_plus(path, film, "png"),
    "chexpert-5x200": sources.test_chexpert_5x200,
    "chexpert-8x200": chexpert_8x200,
    "rsna": sources.test_rsna,
    "nih": lambda path, film: sources.test_nih(path, film, ["images"]),
    "ms-cxr-t": lambda path, film: sources.test_ms_cxr_t(path, film, False),
    "open-i": lambda path, film: sources.test_open_i(path, film, False),
    "csv": sources.test_settings_are_in_the_manifest,
}


# What these few studies allow. Of CheXpert and NIH the train split, whose labels differ.
ALONE = {"reconstruction"}
REPORTS = {"retrieval", "adapter-depth"}
TASKS = {
    "mimic-cxr": REPORTS | ALONE,
    "chexpert": ALONE | {"zero-shot", "collapse", "grounding"},
    "chexpert-plus": REPORTS | ALONE,
    "chexpert-5x200": REPORTS | {"zero-shot", "collapse", "modality-bias", "grounding"},
    "chexpert-8x200": {"retrieval", "zero-shot", "collapse", "grounding"},
    "rsna": ALONE | {"zero-shot", "collapse", "grounding"},
    "nih": ALONE | {"zero-shot", "collapse", "grounding"},
    "ms-cxr-t": {"collapse", "grounding"},
    "open-i": REPORTS | ALONE | {"grounding"},
    "csv": REPORTS | ALONE,
}


@pytest.fixture(scope="module")
def run(finished_run, tmp_path_factory):
    """A copy of the run, in which results may be left, without its data."""
    copy = tmp_path_factory.mktemp("evaluated") / "first"
    return shutil.copytree(finished_run, copy, ignore=shutil.ignore_patterns("data", "tensorboard"))


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    """Decoders for pictures of masked films are fitted for a moment: what they are worth has tests of its own."""
    monkeypatch.setattr(reconstruction, "_STEPS", 4)


def evaluate(*arguments):
    main([*map(str, arguments), "--device", "cpu", "--batch-size", "16"])


def error_of(capsys, *arguments):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        evaluate(*arguments)
    lines = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


def test_all_tasks_then_two_runs_side_by_side(run, finished_run, tmp_path, capsys):
    data = finished_run / "data"
    before = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in data.iterdir()}
    evaluate(run, "--data", data)
    said = " ".join(capsys.readouterr().out.split())
    assert "left out" not in said and f"Report: {run}/evaluation/report.html" in said
    found = {result.task: result for result in results(run)}
    assert set(found) == set(get_args(TaskName))
    for result in found.values():
        about = result.about["data"]
        assert about["source"] == "phantom" and about["split"] == "test" and about["studies"] == 22
        assert about["manifest_sha256"] == before["manifest.json"]
        assert any(score.name in said or score.name.split(",")[0] in said for score in result.scores)
    assert before == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in data.iterdir()}
    # Another model, and both in one report without evaluating again.
    other = shutil.copytree(run, tmp_path / "other", ignore=shutil.ignore_patterns("evaluation"))
    evaluate(other, "--data", data, "--task", "retrieval", "collapse")
    report = tmp_path / "compared" / "both.html"
    evaluate(run, other, "--task", "none", "--report", report)
    figures = json.loads(report.with_suffix(".json").read_text())
    assert list(figures["runs"]) == ["first", "other"] and set(figures["tasks"]) == set(found)
    for one in figures["tasks"]["retrieval"]["scores"]:
        gain = one["runs"]["other"]["difference"]
        assert gain["value"] == pytest.approx(0) and gain["better"] is None  # it is the same model
    assert list(figures["tasks"]["grounding"]["scores"][0]["runs"]) == ["first"]
    # Of other data nothing can be compared.
    shutil.rmtree(other / FOLDER)
    evaluate(other, "--data", data, "--task", "collapse", "--split", "validate")
    error = error_of(capsys, run, other, "--task", "none")
    assert "other and first were evaluated on different data" in error and "--split" in error


@pytest.mark.parametrize("source", MINIATURES)
def test_every_real_data_set(run, film, tmp_path, capsys, source):
    MINIATURES[source](tmp_path, film)
    copy = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("evaluation"))
    capsys.readouterr()
    evaluate(copy, "--data", tmp_path / "out", *(["--split", "train"] if source in ("chexpert", "nih") else []))
    said = capsys.readouterr().out
    found = {result.task: result for result in results(copy)}
    left_out = {line.partition(":")[0] for line in said.splitlines() if ": left out, as " in line}
    assert set(found) == TASKS[source] and left_out == set(get_args(TaskName)) - TASKS[source], said
    manifest = hashlib.sha256((tmp_path / "out" / "manifest.json").read_bytes()).hexdigest()
    for result in found.values():
        assert result.about["data"]["source"] == source and result.about["data"]["manifest_sha256"] == manifest
        assert all(score.value is None or score.value == score.value for score in result.scores)
    page = (copy / FOLDER / "report.html").read_text(encoding="utf-8")
    assert "✓ the same" in page and not any(name in page for name in ("10000032", "patient0", "Secret"))


def test_what_cannot_be_evaluated(run, finished_run, tmp_path, capsys):
    data = finished_run / "data"
    (tmp_path / "empty").mkdir()
    bare = shutil.copytree(run, tmp_path / "bare", ignore=shutil.ignore_patterns("evaluation", "run.json"))
    broken = shutil.copytree(run, tmp_path / "broken", ignore=shutil.ignore_patterns("evaluation"))
    (broken / "run.json").write_text("{")
    for arguments, message in [
        ([], "expected the folder of a finished run"),
        ([tmp_path / "none"], "none: no such folder, expected that of a finished python -m training.pretrain"),
        ([tmp_path / "empty"], "empty"),
        ([bare], "holds no run.json: pass --data"),
        ([broken], "run.json is damaged: copy the run again"),
        ([bare, "--data", tmp_path / "empty"], "holds no manifest.json: pass a folder written by"),
        ([bare, "--data", data, "--split", "tests"], "no studies in its 'tests' split: pass --split with one of train"),
        ([bare, "--task", "none"], "bare was not evaluated"),
        ([run, run], "named twice"),
        ([run, "--prompts", tmp_path / "none.toml"], "none.toml: no such file, expected prompts in TOML"),
        ([bare, "--data", data, "--task", "collapse", "--report", tmp_path / "out.pdf"], "ends in .html"),
    ]:
        assert message in error_of(capsys, *arguments)
    with pytest.raises(SystemExit):
        main([str(run), "--batch-size", "0"])
    assert "--batch-size is 0: expected at least 1" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        evaluate(bare, "--task", "retreival")
    assert stopped.value.code == 2 and "retrieval" in capsys.readouterr().err
