"""Every source in its own layout, small, from its files to shards."""

import csv
import gzip
import json
import os
import shutil
from collections import Counter
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clinvla_fast.data.phantom import patient_truths, render
from clinvla_fast.data.preparation import find
from clinvla_fast.data.reports import clean_report
from clinvla_fast.data.shards import SPLITS, Box, read_manifest, read_studies
from clinvla_fast.data.sources.chexpert import FINDINGS
from training.prepare import main


@pytest.fixture(scope="module")
def films():
    """An endless supply of films that pass quality control."""
    return cycle([render(patient_truths(3, patient)[0], 160)["frontal"] for patient in range(5)])


@pytest.fixture
def film(films):
    """Write a film, in the format that the path's suffix says."""

    def write(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = next(films)
        if path.suffix == ".dcm":
            _dicom(path, pixels)
        else:
            Image.fromarray(pixels).save(path)

    return write


def _dicom(path, pixels):
    pydicom = pytest.importorskip("pydicom")
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = "1.2.840.10008.5.1.4.1.1.1"
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = pydicom.uid.generate_uid(entropy_srcs=["a"])
    dataset.Modality, dataset.BodyPartExamined, dataset.PatientName = "CR", "CHEST", "Secret^Name"
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation, dataset.PixelRepresentation = 1, "MONOCHROME2", 0
    dataset.BitsAllocated = dataset.BitsStored = 8
    dataset.HighBit, dataset.PixelData = 7, pixels.tobytes()
    dataset.save_as(path, enforce_file_format=True)


def table(path, rows, columns=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = columns or list(dict.fromkeys(name for row in rows for name in row))
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)


def prepared(tmp_path, source, root, *options):
    """(studies by id, counts, what was left out) of a source."""
    out = tmp_path / "out"
    main([source, str(root), "--out", str(out), "--short-side", "64", "--workers", "2", *map(str, options)])
    manifest = read_manifest(out)
    found = {study.study_id: study for split in manifest["counts"]["splits"] for study in read_studies(out, split)}
    assert manifest["source"] == source and len(found) == manifest["counts"]["kept"]
    with (out / "dropped.csv").open() as file:
        left_out = [(int(row["row"]), row["what"], row["reason"]) for row in csv.DictReader(file)]
    splits = {}
    for study in found.values():
        assert splits.setdefault(study.patient_id, study.split) == study.split and study.split in SPLITS
    return found, manifest["counts"], left_out


# MIMIC-CXR

MIMIC_FILMS = [
    # dicom, subject, study, view, date, time, further columns
    ("a1", "10000032", "50000001", "PA", "21800506", "213014.531", {}),
    ("a2", "10000032", "50000001", "LATERAL", "21800506", "213014.531", {}),
    ("a3", "10000032", "50000001", "AP", "21800506", "213014.531", {}),  # another frontal
    ("b1", "10000032", "50000002", "", "21800626", "90000", {"ViewCodeSequence_CodeMeaning": "antero-posterior"}),
    ("b2", "10000032", "50000002", "LL", "21800626", "90000", {}),
    ("c1", "10000032", "50000003", "AP", "21800626", "165500.312", {}),  # the same day, later
    ("d1", "10000764", "50000004", "", "21321015", "83000.0",
     {"PerformedProcedureStepDescription": "CHEST (PORTABLE AP)"}),
    ("e1", "10000764", "50000005", "", "21321016", "83000.0",
     {"PerformedProcedureStepDescription": "CHEST (PA AND LAT)"}),  # which of the two?
    ("f1", "10000898", "50000006", "SWIMMERS", "21880114", "1", {}),
    ("g1", "10000935", "50000007", "PA", "21870711", "120000", {}),  # no report
    ("h1", "10000936", "50000008", "PA", "21870711", "120000", {}),  # no file
    ("i1", "10000937", "50000009", "LATERAL", "21870711", "120000", {}),
    ("i1", "10000937", "50000010", "LATERAL", "21870712", "120000", {}),  # twice
    ("j1", "../../../x", "50000011", "PA", "21870711", "120000", {}),
]  # fmt: skip


def mimic(root, film, suffix=".jpg", gz=True, version="2.0.0"):
    end = ".csv.gz" if gz else ".csv"
    rows = [
        {"dicom_id": d, "subject_id": p, "study_id": s, "ViewPosition": v, "StudyDate": date, "StudyTime": time} | more
        for d, p, s, v, date, time, more in MIMIC_FILMS
    ]
    columns = [*rows[0], "ViewCodeSequence_CodeMeaning", "PerformedProcedureStepDescription"]
    table(root / f"mimic-cxr-{version}-metadata{end}", rows, columns)
    split = {"10000032": "train", "10000764": "validate"}
    splits = [{k: r[k] for k in ("dicom_id", "study_id", "subject_id")} | {"split": split.get(r["subject_id"], "test")}
              for r in rows]  # fmt: skip
    table(root / f"mimic-cxr-{version}-split{end}", splits)
    table(root / f"mimic-cxr-{version}-chexpert{end}", [
        {"subject_id": "10000032", "study_id": "50000001", "Edema": "1.0", "Pneumonia": "-1.0", "Fracture": "0.0"},
        {"subject_id": "10000032", "study_id": "50000002", "No Finding": "1.0"},
    ], ["subject_id", "study_id", *sorted(FINDINGS)])  # fmt: skip
    for d, p, s, *_ in MIMIC_FILMS:
        if d != "h1" and p.isdecimal():
            film(root / "files" / f"p{p[:2]}" / f"p{p}" / f"s{s}" / f"{d}{suffix}")


def mimic_texts(root):
    for d, p, s, *_ in MIMIC_FILMS:
        if d != "g1" and p.isdecimal():
            path = root / "files" / f"p{p[:2]}" / f"p{p}" / f"s{s}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"FINAL REPORT\n\nINDICATION: ___F.\n\nFINDINGS: CHF in study {s}.\n")


def mimic_sections(root):
    rows = [
        {
            "study": f"s{s}",
            "findings": f"CHF in study {s}.",
            "impression": "",
            "last_paragraph": "",
            "comparison": "___",
        }
        for d, p, s, *_ in MIMIC_FILMS
        if d not in ("g1", "b1", "b2") and p.isdecimal()
    ]
    rows.append({"study": "s50000002", "last_paragraph": "CHF in study 50000002."})
    table(root / "mimic_cxr_sectioned.csv", rows)


@pytest.mark.parametrize(
    ("suffix", "gz", "reports", "roots"),
    [(".jpg", True, mimic_sections, 1), (".dcm", False, mimic_texts, 2), (".jpg", False, mimic_sections, 2)],
)
def test_mimic_cxr(tmp_path, film, suffix, gz, reports, roots):
    root, texts = tmp_path / "jpg", tmp_path / ("jpg" if roots == 1 else "reports")
    mimic(root, film, suffix, gz)
    reports(texts)
    options = ["--reports", texts] if roots == 2 else []
    found, counts, left_out = prepared(tmp_path, "mimic-cxr", root, *options)
    assert {study: list(s.images) for study, s in found.items()} == {
        "50000001": ["frontal", "lateral"],
        "50000002": ["frontal", "lateral", "prior_frontal", "prior_lateral"],
        "50000003": ["frontal", "prior_frontal", "prior_lateral"],
        "50000004": ["frontal"],
        "50000009": ["lateral"],
    }
    assert counts["splits"] == {"train": 3, "validate": 1, "test": 1}
    assert found["50000001"].labels == ("edema",) and found["50000002"].labels == ("no finding",)
    assert found["50000001"].report == "Congestive heart failure in study 50000001."
    assert found["50000002"].report == "Congestive heart failure in study 50000002."
    for later, earlier in (("50000002", "50000001"), ("50000003", "50000002")):
        for view in ("frontal", "lateral"):
            assert np.array_equal(found[later].images[f"prior_{view}"], found[earlier].images[view])
    no_report = "empty report" if reports is mimic_sections else "report is missing"
    dropped = {"no current view": 2, "file is missing": 1, "no usable film": 2}
    assert counts["dropped"] == dropped | {no_report: 1}
    assert sorted(reason for _, what, reason in left_out if what == "image") == [
        "another frontal film of the study", "duplicate dicom_id", "subject_id or study_id is no number",
        "view position unknown", "view position unknown",
    ]  # fmt: skip
    written = b"".join(path.read_bytes() for path in (tmp_path / "out").iterdir())
    assert b"Secret" not in written


def test_mimic_cxr_2_1_and_a_dry_run(tmp_path, film, capsys):
    mimic(tmp_path / "jpg", film, version="2.1.0")
    mimic_sections(tmp_path / "jpg")
    main(["mimic-cxr", str(tmp_path / "jpg"), "--dry-run"])
    printed = capsys.readouterr().out
    for row in ("found │ 11", "kept: train │ 3", "dropped: file is missing │ 1", "dropped: no current view │ 2"):
        assert " ".join(row.replace("│", "").split()) in " ".join(printed.replace("│", "").split())
    assert [path.name for path in tmp_path.iterdir()] == ["jpg"]
    main(["mimic-cxr", str(tmp_path / "jpg"), "--show", "2"])
    printed = capsys.readouterr().out
    assert "CHF in study 50000001." in printed and "Congestive heart failure in study 50000001." in printed


def test_mimic_cxr_without_reports(tmp_path, film, capsys):
    mimic(tmp_path / "jpg", film)
    with pytest.raises(SystemExit):
        main(["mimic-cxr", str(tmp_path / "jpg"), "--out", str(tmp_path / "out")])
    assert "no mimic_cxr_sectioned.csv and no files/p*/p*/s*.txt: pass --reports" in capsys.readouterr().err


# CheXpert and what is made of it


def chexpert_row(path, **labels):
    view = "Lateral" if "lateral" in path else "Frontal"
    row = {
        "Path": path,
        "Sex": "Female",
        "Age": "68",
        "Frontal/Lateral": view,
        "AP/PA": "AP" if view == "Frontal" else "",
    }
    return row | {name: labels.get(name.replace(" ", "_"), "") for name in FINDINGS}


@pytest.mark.parametrize("layout", ["CheXpert-v1.0-small", "inside"])
def test_chexpert(tmp_path, film, layout):
    name = "CheXpert-v1.0-small"
    root = tmp_path / name if layout == "inside" else tmp_path / "data"
    images = tmp_path / name if layout == "inside" else root / name
    train = [
        chexpert_row(f"{name}/train/patient00001/study2/view1_frontal.jpg", Edema="1.0", Pneumonia="-1.0"),
        chexpert_row(f"{name}/train/patient00001/study2/view2_lateral.jpg", Edema="1.0", Pneumonia="-1.0"),
        chexpert_row(f"{name}/train/patient00001/study1/view1_frontal.jpg", No_Finding="1.0"),
        chexpert_row(f"{name}/train/patient00001/study1/view2_frontal.jpg", No_Finding="1.0"),
        chexpert_row(f"{name}/train/patient00002/study1/view1_frontal.jpg"),
        chexpert_row(f"{name}/../../etc/patient00003/study1/view1_frontal.jpg"),
        chexpert_row("somewhere/else.jpg"),
    ]
    valid = [chexpert_row(f"{name}/valid/patient64541/study1/view1_frontal.jpg", Pleural_Effusion="1.0")]
    table(root / "train.csv", train)
    table(root / "valid.csv.gz", valid)
    for row in (*train[:4], *valid):
        film(images / row["Path"].partition("/")[2])
    found, counts, left_out = prepared(tmp_path, "chexpert", root)
    assert {study: (list(s.images), s.labels, s.split, s.report) for study, s in found.items()} == {
        "patient00001/study1": (["frontal"], ("no finding",), "train", ""),
        "patient00001/study2": (["frontal", "lateral", "prior_frontal"], ("edema",), "train", ""),
        "patient64541/study1": (["frontal"], ("pleural effusion",), "validate", ""),
    }
    assert counts["dropped"] == {"file is missing": 1}
    assert counts["views_left_out"]["path is none of CheXpert's"] == 2
    assert (4, "image", "another frontal film of the study") in left_out


@pytest.mark.parametrize("kind", ["png", "dcm"])
def test_chexpert_plus(tmp_path, film, kind):
    def row(patient, study, order, view="Frontal", split="train", **more):
        path = f"train/patient{patient}/study{study}/view1_{view.lower()}.jpg"
        return {
            "path_to_image": path, "path_to_dcm": path.replace(".jpg", ".dcm"), "frontal_lateral": view, "ap_pa": "PA",
            "deid_patient_id": f"patient{patient}", "patient_report_date_order": order, "split": split,
            "report": "NARRATIVE:\nCHF.", "section_findings": "", "section_impression": "",
        } | more  # fmt: skip

    rows = [
        row("42142", 5, 1, section_findings="Old edema.", section_impression="CHF."),
        row("42142", 3, 2),  # the order is the reports', not the folders'
        row("42142", 3, 2, view="Lateral"),
        row("64540", 1, 1, split="valid"),
        row("64541", 1, 1, report=""),
    ]
    table(tmp_path / "data" / "df_chexpert_plus_240401.csv", rows)
    for r in rows:
        if kind == "png":
            film(tmp_path / "data" / "PNG" / r["path_to_image"].replace(".jpg", ".png"))
        else:
            film(tmp_path / "data" / r["path_to_dcm"])
    found, counts, _ = prepared(tmp_path, "chexpert-plus", tmp_path / "data")
    assert {study: (list(s.images), s.split) for study, s in found.items()} == {
        "patient42142/study5": (["frontal"], "train"),
        "patient42142/study3": (["frontal", "lateral", "prior_frontal"], "train"),
        "patient64540/study1": (["frontal"], "validate"),
    }
    assert found["patient42142/study5"].report == "Old edema. Congestive heart failure."
    assert found["patient42142/study3"].report.endswith("Congestive heart failure.")
    assert counts["dropped"] == {"empty report": 1}


def test_chexpert_5x200(tmp_path, film):
    name = "CheXpert-v1.0/train/patient{:05d}/study1/view1_frontal.jpg"
    classes = ["Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion"]
    rows = [
        {"": i} | chexpert_row(name.format(i), **{c.replace(" ", "_"): "1.0"}) | {"Report Impression": f"1. {c} seen."}
        for i, c in enumerate(classes)
    ]
    rows.append(
        rows[3] | {"Path": name.format(3).replace("view1_frontal", "view2_lateral"), "Frontal/Lateral": "Lateral"}
    )
    table(tmp_path / "data" / "chexpert_5x200.csv", rows)
    for row in rows:
        film(tmp_path / "data" / row["Path"])
    found, counts, _ = prepared(tmp_path, "chexpert-5x200", tmp_path / "data")
    assert [s.labels for s in found.values()] == [(c.lower(),) for c in [*classes, "edema"]]
    assert counts["splits"] == {"test": 6}  # a second film of a study is another candidate
    assert list(found["patient00003/study1/view2_lateral"].images) == ["lateral"]
    assert found["patient00003/study1/view1_frontal"].report == "Edema seen."


def test_chexpert_8x200(tmp_path, film):
    root, name = tmp_path / "data", "CheXpert-v1.0/train/patient{:05d}/study1/view1_frontal.jpg"
    queries = [{"Variable": "Edema", "Path": name.format(1)}, {"Variable": "No Finding", "Path": name.format(2)}]
    candidates = [chexpert_row(name.format(i), Fracture="1.0") for i in (3, 4, 5)]
    table(root / "image-retrieval" / "query.csv", queries)
    table(root / "image-retrieval" / "candidate.csv", candidates)
    table(root / "text-retrieval" / "query.csv", [{"Variable": "Pneumothorax", "Text": "Small apical PTX."}])
    table(root / "text-retrieval" / "candidate.csv", candidates)
    for i in range(1, 6):
        film(root / name.format(i))
    found, counts, _ = prepared(tmp_path, "chexpert-8x200", root)
    assert counts["kept"] == 9 and counts["splits"] == {"test": 9}
    assert found["image-retrieval/query/2"].labels == ("no finding",)
    text = found["text-retrieval/query/6"]
    assert (text.report, text.labels, text.images) == ("Small apical pneumothorax.", ("pneumothorax",), {})
    assert [found[f"text-retrieval/candidate/{i}"].labels for i in (7, 8, 9)] == [("fracture",)] * 3


# Others


def _rename(table_path, old, new):
    opener = gzip.open if table_path.suffix == ".gz" else open
    with opener(table_path, "rt") as file:
        header, rest = file.read().split("\n", 1)
    assert old in header
    with opener(table_path, "wt") as file:
        file.write(header.replace(old, new) + "\n" + rest)


@pytest.mark.parametrize(("source", "name"), [("chexpert", "train.csv"), ("chexpert-5x200", "own.csv"),
                                              ("chexpert-8x200", "text-retrieval/candidate.csv"),
                                              ("mimic-cxr", "mimic-cxr-2.0.0-chexpert.csv.gz")])  # fmt: skip
def test_a_finding_without_its_column_is_one_clear_error(tmp_path, film, capsys, source, name):
    root = tmp_path / "data"
    row = chexpert_row("CheXpert-v1.0/train/patient00001/study1/view1_frontal.jpg", Edema="1.0")
    if source == "mimic-cxr":
        mimic(root, film)
    elif source == "chexpert-8x200":
        for kind, query in (("image-retrieval", {"Path": row["Path"]}), ("text-retrieval", {"Text": "Edema."})):
            table(root / kind / "query.csv", [{"Variable": "Edema", **query}])
            table(root / kind / "candidate.csv", [row])
    else:
        table(root / name, [row | {"Report Impression": "Edema."}])
    _rename(root / name, "Edema", "edema")
    with pytest.raises(SystemExit):
        main([source, str(root), "--out", str(tmp_path / "out"), "--dry-run"])
    error = capsys.readouterr().err
    assert f"{name} lacks the column Edema; found" in error and "Is 'edema' meant to be 'Edema'?" in error


def test_rsna(tmp_path, film):
    root = tmp_path / "data"
    box = {"x": "256.0", "y": "128.0", "width": "512.0", "height": "256.0", "Target": "1"}
    rows = [
        {"patientId": "a", "x": "", "y": "", "width": "", "height": "", "Target": "0"},
        {"patientId": "b"} | box,
        {"patientId": "b"} | box | {"x": "0"},
        {"patientId": "c"} | box | {"x": "left"},
        {"patientId": "../d"} | box,
        {"patientId": "../d"} | box,
        {"patientId": "e", "Target": "yes"},
        {"patientId": "f"} | box,
        {"patientId": "f", "x": "", "y": "", "width": "", "height": "", "Target": "0"},
        {"patientId": "f"} | box | {"x": "900.0"},
    ]
    table(root / "stage_2_train_labels.csv", rows)
    classes = [{"patientId": "a", "class": "Normal"}, *({"patientId": "b", "class": "Lung Opacity"} for _ in range(2))]
    table(root / "stage_2_detailed_class_info.csv", classes)
    for name in "abcf":
        film(root / "stage_2_train_images" / f"{name}.dcm")
    found, counts, left_out = prepared(tmp_path, "rsna", root, "--crop-borders")
    assert {study: s.labels for study, s in found.items()} == {"a": ("normal",)} | dict.fromkeys("bcf", ("pneumonia",))
    first, second = (Box("pneumonia", "frontal", left, 0.125, 0.5, 0.25) for left in (0.25, 0.0))
    assert found["b"].boxes == (first, second) and not found["a"].boxes
    assert found["f"].boxes == (first,)
    assert {(4, "box", "box is none within the film"), (10, "box", "box is none within the film")} <= set(left_out)
    assert counts["dropped"] == {"patientId is no file name": 1, "Target is neither 0 nor 1": 1}


@pytest.mark.parametrize("folders", [["images"], ["images_001/images", "images_002/images"]])
def test_nih(tmp_path, film, folders):
    root = tmp_path / "data"
    rows = [
        {"Image Index": f"{p:08d}_{n:03d}.png", "Finding Labels": labels, "Follow-up #": n, "Patient ID": p,
         "Patient Age": 58, "Patient Gender": "M", "View Position": "PA"}
        for p, n, labels in [(1, 1, "Edema|Mass"), (1, 0, "No Finding"), (2, 0, "Mass"), (3, 0, ""), (4, 0, "")]
    ]  # fmt: skip
    table(root / "Data_Entry_2017.csv", rows)
    (root / "test_list.txt").write_text("00000002_000.png\n")
    (root / "train_val_list.txt").write_text("00000001_000.png\n00000001_001.png\n00000003_000.png")
    for row, folder in zip(rows[:4], cycle(folders), strict=False):
        film(root / folder / row["Image Index"])
    found, counts, _ = prepared(tmp_path, "nih", root)
    assert found["00000001_001"].labels == ("edema", "mass") and found["00000001_000"].labels == ("no finding",)
    assert np.array_equal(found["00000001_001"].images["prior_frontal"], found["00000001_000"].images["frontal"])
    assert found["00000002_000"].split == "test" and found["00000003_000"].split != "test"
    assert counts["dropped"] == {"in neither list of the split": 1}


@pytest.mark.parametrize("elsewhere", [False, True])
def test_ms_cxr_t(tmp_path, film, elsewhere):
    def row(now, before, **progressions):
        row = {"dicom_id": now, "previous_dicom_id": before, "subject_id": "10000032", "study_id": "50000002",
               "previous_study_id": "50000001"}  # fmt: skip
        for finding in ("consolidation", "edema", "pleural_effusion", "pneumonia", "pneumothorax"):
            row |= {f"{finding}_progression": progressions.get(finding, ""), f"{finding}_label_quality": ""}
        return row

    stem = "p10/p10000032/s5000000{}/{}"
    rows = [
        row(stem.format(2, "b"), stem.format(1, "a"), edema="worsening", pleural_effusion="stable"),
        row(stem.format(3, "c"), stem.format(2, "b"), pneumonia="improving"),
        row(stem.format(3, "c"), stem.format(2, "b")),
        row(stem.format(3, "d"), "", edema="stable"),
        row(stem.format(3, "e"), "../../../etc/passwd", edema="stable"),
        row(stem.format(3, "f"), stem.format(2, "b"), edema="unclear", pneumonia="stable"),
    ]
    table(tmp_path / "data" / "MS_CXR_T_temporal_image_classification_v1.0.0.csv", rows)
    images = tmp_path / ("mimic" if elsewhere else "data")
    for name in ((1, "a"), (2, "b"), (3, "c")):
        film(images / "files" / f"{stem.format(*name)}.jpg")
    found, counts, left_out = prepared(tmp_path, "ms-cxr-t", tmp_path / "data", "--reports", images)
    first, second = found["50000002/b"], found["50000002/c"]
    assert first.labels == ("edema", "pleural effusion") and second.labels == ("pneumonia",)
    assert first.progressions == (("edema", "worsening"), ("pleural effusion", "stable"))
    assert second.progressions == (("pneumonia", "improving"),)
    assert list(first.images) == ["frontal", "prior_frontal"] and counts["splits"] == {"test": 2}
    assert np.array_equal(second.images["prior_frontal"], first.images["frontal"])
    assert counts["dropped"] == {"no progression": 1, "not a pair of films": 2, "file is missing": 1}
    assert (6, "edema_progression", "progression unknown") in left_out


XML = """<?xml version="1.0" encoding="utf-8"?><eCitation><uId id="CXR{n}"/>
<MedlineCitation><Article><Abstract>
<AbstractText Label="COMPARISON">None.</AbstractText><AbstractText Label="INDICATION">Secret XXXX</AbstractText>
<AbstractText Label="FINDINGS">{findings}</AbstractText><AbstractText Label="IMPRESSION">CHF.</AbstractText>
</Abstract></Article></MedlineCitation><MeSH><major>{mesh}</major></MeSH>{images}</eCitation>"""


def open_i(root, film, projections=False):
    films = {
        1: ["CXR1_1_IM-0001-3001", "CXR1_1_IM-0001-4001"],
        2: ["CXR2_IM-0652-1001", "CXR2_IM-0652-2001"],
        3: ["CXR3_IM-1384-1001"],
        4: [],
        8: ["CXR8_IM-2333-2001"],
        5: ["CXR5_IM-2117-1003002", "CXR5_IM-2117-1004003", "CXR5_IM-2117-1005004"],
    }
    for n, names in films.items():
        images = "".join(f'<parentImage id="{name}"><panel/></parentImage>' for name in names)
        mesh = "normal" if n == 1 else "Pleural Effusion/bilateral"
        path = root / "ecgen-radiology" / f"{n}.xml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(XML.format(n=n, findings=f"Film {n}.", mesh=mesh, images=images))
        for name in names:
            film(root / "images" / (f"{name[5:]}.dcm.png" if projections and n == 1 else f"{name}.png"))
    (root / "ecgen-radiology" / "6.xml").write_text("<eCitation>")
    (root / "ecgen-radiology" / "7.xml").write_text('<!DOCTYPE x [<!ENTITY a "aaaa">]><eCitation>&a;</eCitation>')
    if projections:
        table(root / "indiana_projections.csv", [
            {"uid": 1, "filename": "1_IM-0001-3001.dcm.png", "projection": "Frontal"},
            {"uid": 1, "filename": "1_IM-0001-4001.dcm.png", "projection": "Lateral"},
        ])  # fmt: skip


@pytest.mark.parametrize("projections", [False, True])
def test_open_i(tmp_path, film, projections):
    root = tmp_path / "data"
    open_i(root, film, projections)
    found, counts, left_out = prepared(tmp_path, "open-i", root)
    assert {study: list(s.images) for study, s in found.items()} == {
        "1": ["frontal", "lateral"], "2": ["frontal", "lateral"], "3": ["frontal"], "5": ["frontal", "lateral"],
    }  # fmt: skip
    assert found["2"].report == "Film 2. Congestive heart failure."
    assert found["1"].labels == ("no finding",) and found["3"].labels == ("pleural effusion",)
    assert counts["dropped"] == {"no current view": 2, "report is damaged": 2}
    assert (5, "image", "view position unknown") in left_out
    name = "1_IM-0001-3001.dcm.png" if projections else "CXR1_1_IM-0001-4001.png"
    with Image.open(root / "images" / name) as frontal:
        kept = np.asarray(frontal.resize((64, 64), Image.Resampling.BILINEAR), int)
    assert np.abs(found["1"].images["frontal"].astype(int) - kept).mean() < 4  # up to JPEG's rounding


def test_every_real_open_i_report_yields_text_or_a_reason(tmp_path):
    package = find_spec("torchxrayvision")
    if package is None:
        pytest.skip("needs torchxrayvision, which carries real report texts")
    shutil.unpack_archive(Path(package.origin).parent / "data" / "NLMCXR_reports.tgz", tmp_path)
    (folder,) = {path.parent.parent for path in tmp_path.rglob("*.xml")}
    records, left_out = find("open-i", folder, None)
    found = [record for of_split in records.values() for record in of_split]
    dropped = Counter(one.reason for one in left_out if one.what == "study")
    assert len(found) + dropped.total() == 3955 and set(dropped) <= {"no current view", "empty report"}
    cleaned = {record.study_id: clean_report(record.report) for record in found}
    assert sum(map(bool, cleaned.values())) > 3700
    assert not any("XXXX" in text or "\n" in text for text in cleaned.values())
    views = Counter(tuple(record.views) for record in found)
    assert views["frontal", "lateral"] > 2500  # most studies have both, and the film names tell which is which


@pytest.mark.parametrize("source", ["mimic-cxr", "chexpert", "chexpert-plus", "chexpert-5x200", "chexpert-8x200",
                                    "rsna", "nih", "ms-cxr-t", "open-i"])  # fmt: skip
def test_the_wrong_folder_is_one_clear_error(tmp_path, capsys, source):
    (tmp_path / "empty").mkdir()
    for root in (tmp_path / "empty", tmp_path / "none"):
        with pytest.raises(SystemExit) as caught:
            main([source, str(root), "--out", str(tmp_path / "out")])
        lines = capsys.readouterr().err.strip().splitlines()
        assert caught.value.code == 2 and len(lines) == 1 and str(root) in lines[0] and "pass the folder" in lines[0]
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_settings_are_in_the_manifest(tmp_path, film):
    film(tmp_path / "a.png")
    table(tmp_path / "t.csv", [{"study_id": "s", "patient_id": "p", "frontal": "a.png", "report": "___ may be CHF."}])
    options = ["--image-format", "png", "--clean.no-hedges", "--clean.no-abbreviations", "--keep-poor-films"]
    found, _, _ = prepared(tmp_path, "csv", tmp_path / "t.csv", *options)
    settings = json.loads((tmp_path / "out" / "manifest.json").read_text())["settings"]
    assert settings["image_format"] == "png" and settings["reading"]["quality"] is None
    assert settings["steps"]["marks"] and not settings["steps"]["hedges"]
    assert found["s"].report == "May be CHF."


def change_mimic(root, change):
    """Change the metadata's rows."""
    path = root / "mimic-cxr-2.0.0-metadata.csv.gz"
    with gzip.open(path, "rt") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        change(row)
    table(path, rows)


def test_mimic_cxr_priors_need_a_date_and_a_time_only_within_a_day(tmp_path, film):
    mimic(tmp_path / "jpg", film)
    mimic_sections(tmp_path / "jpg")
    change_mimic(tmp_path / "jpg", lambda row: row.update(StudyTime="") if row["dicom_id"] in ("b1", "b2") else None)
    found, _, _ = prepared(tmp_path, "mimic-cxr", tmp_path / "jpg")
    first = found["50000001"].images["frontal"]
    assert np.array_equal(found["50000002"].images["prior_frontal"], first)  # of an earlier day
    assert np.array_equal(found["50000003"].images["prior_frontal"], first)  # that day's order is unknown


def test_mimic_cxr_without_dates_has_no_priors(tmp_path, film):
    mimic(tmp_path / "jpg", film)
    mimic_sections(tmp_path / "jpg")
    change_mimic(tmp_path / "jpg", lambda row: row.update(StudyDate="") if row["dicom_id"] in ("b1", "b2") else None)
    found, _, _ = prepared(tmp_path, "mimic-cxr", tmp_path / "jpg")
    assert list(found["50000002"].images) == ["frontal", "lateral"]
    assert np.array_equal(found["50000003"].images["prior_frontal"], found["50000001"].images["frontal"])


def test_another_film_takes_the_place_of_one_that_cannot_be_used(tmp_path, film):
    root = tmp_path / "jpg"
    mimic(root, film)
    mimic_sections(root)
    folder = root / "files" / "p10" / "p10000032" / "s50000001"
    (folder / "a1.jpg").unlink()
    (folder / "a2.jpg").write_bytes(b"damaged")
    found, _, left_out = prepared(tmp_path, "mimic-cxr", root)
    assert list(found["50000001"].images) == ["frontal"]  # by the film a3
    assert np.array_equal(found["50000002"].images["prior_frontal"], found["50000001"].images["frontal"])
    assert (1, "image", "file is missing") in left_out and (1, "lateral", "not an image") in left_out


def test_reports_that_are_no_files_are_left_out_without_waiting_for_them(tmp_path, film):
    root = tmp_path / "jpg"
    mimic(root, film)
    mimic_texts(root)
    pipe, endless = (root / "files" / "p10" / "p10000032" / f"s{study}.txt" for study in ("50000001", "50000002"))
    pipe.unlink()
    os.mkfifo(pipe)
    os.truncate(endless, 1 << 40)
    found, _, left_out = prepared(tmp_path, "mimic-cxr", root)
    assert not {"50000001", "50000002"} & found.keys()
    assert {"report cannot be read", "report is too long"} <= {reason for _, _, reason in left_out}


def test_mimic_cxr_study_that_the_split_table_lacks(tmp_path, film):
    """It may be one of the test split: it is never put in another."""
    mimic(tmp_path / "jpg", film, gz=False)
    mimic_sections(tmp_path / "jpg")
    path = tmp_path / "jpg" / "mimic-cxr-2.0.0-split.csv"
    path.write_text(path.read_text().replace("i1,50000009,10000937,test", "i1,50000009,10000937,test,more"))
    found, counts, left_out = prepared(tmp_path, "mimic-cxr", tmp_path / "jpg")
    assert "50000009" not in found and counts["dropped"]["not in the split table"] == 1
    assert any(what == "split" and reason == "wrong number of columns" for _, what, reason in left_out)


def test_a_split_that_is_named_later_holds_for_the_patient(tmp_path, film):
    film(tmp_path / "a.png")
    rows = [
        {
            "study_id": f"s{i}",
            "patient_id": f"p{i // 2}",
            "frontal": "a.png",
            "report": "Clear.",
            "split": "test" * (i % 2),
        }
        for i in range(20)
    ]
    table(tmp_path / "t.csv", rows)
    _, counts, _ = prepared(tmp_path, "csv", tmp_path / "t.csv")
    assert counts["splits"] == {"test": 20}


def test_a_dry_run_counts_what_the_run_does(tmp_path, film, capsys):
    film(tmp_path / "a.png")
    rows = [
        {"study_id": "s1", "patient_id": "p", "frontal": "a.png", "prior_frontal": "none.png", "report": "Clear."},
        {"study_id": "s2", "patient_id": "p", "frontal": "none.png", "prior_frontal": "a.png", "report": "Clear."},
        {"study_id": "s3", "patient_id": "p", "frontal": "a.png", "report": ""},
    ]
    table(tmp_path / "t.csv", rows)
    _, counts, _ = prepared(tmp_path, "csv", tmp_path / "t.csv")
    capsys.readouterr()
    main(["csv", str(tmp_path / "t.csv"), "--dry-run", "--out", str(tmp_path / "out")])
    printed = " ".join(capsys.readouterr().out.replace("│", "").split())
    assert counts["dropped"] == {"empty report": 1, "file is missing": 1}
    assert "found 3" in printed and "dropped: file is missing 1" in printed and "dropped: empty report 1" in printed
