"""training.finetune on the data that users have, from their own files to a report."""

import csv
import json
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clinvla_fast.data.phantom import patient_truths, render
from clinvla_fast.evaluation.result import read_result
from training.finetune import main
from training.prepare import main as prepare

QUICK = ["--labels", "1", "--seeds", "1", "--epochs", "1", "--batch-size", "8", "--device", "cpu"]
FINDINGS = ("consolidation", "edema", "pleural_effusion", "pneumonia", "pneumothorax")


@pytest.fixture(scope="module")
def films():
    return [render(patient_truths(3, patient)[0], 160)["frontal"] for patient in range(6)]


@pytest.fixture
def run(finished_run, tmp_path) -> Path:
    """The finished run, with a folder for results of its own."""
    own = tmp_path / "run"
    own.mkdir()
    for path in finished_run.iterdir():
        (own / path.name).symlink_to(path)
    return own


def _write(path: Path, films, names):
    path.mkdir(parents=True)
    for film, name in zip(cycle(films), names, strict=False):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(film).save(path / name)


def _table(path: Path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def _nih(root: Path, films) -> Path:
    rows = [
        {"Image Index": f"{p:08d}_{n:03d}.png", "Finding Labels": ("Edema|Mass", "No Finding", "Mass")[(p + n) % 3],
         "Follow-up #": n, "Patient ID": p, "Patient Age": 58, "Patient Gender": "M", "View Position": "PA"}
        for p in range(60) for n in range(2)
    ]  # fmt: skip
    names = [row["Image Index"] for row in rows]
    _write(root / "images", films, names)
    _table(root / "Data_Entry_2017.csv", rows)
    (root / "test_list.txt").write_text("\n".join(names[80:]))
    (root / "train_val_list.txt").write_text("\n".join(names[:80]))
    return root


def _ms_cxr_t(root: Path, films) -> Path:
    rows = []
    for n in range(18):
        folder = f"p10/p1000{n:04d}"
        row = {"dicom_id": f"{folder}/s5{n:07d}/b{n}", "previous_dicom_id": f"{folder}/s4{n:07d}/a{n}",
               "subject_id": f"1000{n:04d}", "study_id": f"5{n:07d}", "previous_study_id": f"4{n:07d}"}  # fmt: skip
        for place, finding in enumerate(FINDINGS):
            course = ("improving", "stable", "worsening", "")[(n + place) % 4] if place != 3 else ""
            row |= {f"{finding}_progression": course, f"{finding}_label_quality": ""}
        rows.append(row)
    _write(root / "files", films, [f"{row[c]}.jpg" for row in rows for c in ("dicom_id", "previous_dicom_id")])
    _table(root / "MS_CXR_T_temporal_image_classification_v1.0.0.csv", rows)
    return root


def _prepared(source: str, root: Path, out: Path) -> Path:
    prepare([source, str(root), "--out", str(out), "--short-side", "128", "--workers", "2"])
    return out


def test_nih_from_its_own_files(run, films, tmp_path, capsys):
    data = _prepared("nih", _nih(tmp_path / "nih", films), tmp_path / "data")
    main([str(run), "--data", str(data), *QUICK])
    printed = capsys.readouterr().out
    assert "temporal: left out, as" in printed and "segmentation: left out, as" in printed
    for task in ("linear-probe", "classification"):
        found = read_result(run, task)
        names = {score.name for score in found.scores}
        assert {"100% of labels, macro AUC", "100% of labels, AUC mass", "100% of labels, AUC edema"} <= names
        assert len(found.scores[0].units) == 40 and found.about["data"]["source"] == "nih"


def test_ms_cxr_t_from_its_own_files(run, films, tmp_path):
    data = _prepared("ms-cxr-t", _ms_cxr_t(tmp_path / "msc", films), tmp_path / "data")
    main([str(run), "--task", "temporal", "--data", str(data), "--folds", "3", *QUICK])
    found = read_result(run, "temporal")
    assert [score.name for score in found.scores] == ["macro accuracy"] + [
        f"macro accuracy {finding}" for finding in ("consolidation", "edema", "pleural effusion", "pneumothorax")
    ]
    assert set(found.scores[0].units) == set(range(18)) and len(np.unique(found.scores[0].patients)) == 18


def test_phantoms_and_the_report(run, capsys):
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    manifest = (run / "data" / "manifest.json").read_bytes()
    main([str(run), *QUICK])
    printed = capsys.readouterr().out
    assert "Report: " in printed and "temporal: left out, as" in printed  # so few patients have nothing to validate on
    page, figures = ((run / "evaluation" / f"report.{kind}").read_text() for kind in ("html", "json"))
    json.loads(figures)
    for task in ("linear-probe", "classification", "segmentation"):
        found = read_result(run, task)
        assert task in figures and found.scores[0].name in page.replace("&#39;", "'")
        assert found.settings["labels"] == [1.0]
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before
    assert (run / "data" / "manifest.json").read_bytes() == manifest


def test_data_that_nothing_can_be_trained_on(run, films, tmp_path, capsys):
    (tmp_path / "films").mkdir()
    names = [f"{n}.png" for n in range(4)]
    _write(tmp_path / "films" / "images", films, names)
    rows = [{"study_id": n, "patient_id": n, "report": "No edema.", "frontal": f"images/{n}.png", "split": "test"}
            for n in range(4)]  # fmt: skip
    _table(tmp_path / "films" / "own.csv", rows)
    prepare(["csv", str(tmp_path / "films" / "own.csv"), "--out", str(tmp_path / "data"), "--workers", "1"])
    with pytest.raises(SystemExit) as end:
        main([str(run), "--data", str(tmp_path / "data"), *QUICK])
    assert end.value.code == 2 and not (run / "evaluation").exists()
    assert "has nothing that can be trained on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "expected the folder of a finished run"),
        (["nowhere"], "nowhere: no such folder"),
        (["RUN", "--labels", "2"], "--labels are (2.0,): expected shares above 0, at most 1"),
        (["RUN", "--labels", "1", "1"], "--labels are (1.0, 1.0): expected each share once"),
        (["RUN", "--report", "report.txt", *QUICK], "report.txt: the name of a report ends in .html"),
        (["RUN", "--task", "segmentation", "--label", "rash", *QUICK], "no box of 'rash' in its train split"),
        (["RUN", "--task", "linear-probe", "--split", "train"], "no train split beside 'train'"),
    ],
)
def test_one_clear_error(run, args, words, capsys):
    with pytest.raises(SystemExit) as end:
        main([str(run) if arg == "RUN" else arg for arg in args])
    assert end.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and words in error
    assert not (run / "evaluation").exists()
