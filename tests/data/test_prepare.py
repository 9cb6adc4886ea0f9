import csv
import gzip
import importlib.util
import json
import resource
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clinvla_fast.data.preparation import Preparation, find, prepare
from clinvla_fast.data.shards import VIEWS, read_manifest, read_studies
from clinvla_fast.errors import DataError
from training.prepare import main

ROOT = Path(__file__).parents[2]
POOR = "--keep-poor-films"  # the pictures here are ramps and noise
COLUMNS = ["study_id", "patient_id", *VIEWS, "report", "split", "labels"]


@pytest.fixture
def images(tmp_path):
    """A folder with good.png, other.jpg, deep.png (16 bits), text.png, half.png and blank.png."""
    ramp = np.add.outer(np.arange(300), np.arange(320))
    Image.fromarray((ramp // 3).astype(np.uint8)).save(tmp_path / "good.png")
    Image.fromarray((255 - ramp // 3).astype(np.uint8)).save(tmp_path / "other.jpg")
    Image.fromarray((ramp * 100).astype(np.uint16)).save(tmp_path / "deep.png")
    (tmp_path / "text.png").write_text("Secret^Name")
    (tmp_path / "half.png").write_bytes((tmp_path / "good.png").read_bytes()[:200])
    Image.new("L", (300, 300)).save(tmp_path / "blank.png")
    return tmp_path


def write_table(path, rows, columns=COLUMNS):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows({"report": "FINDINGS: No edema.", "frontal": "good.png"} | row for row in rows)
    return path


def command(*args, **options):
    return subprocess.run(
        [sys.executable, "-m", "training.prepare", *map(str, args)], cwd=ROOT, capture_output=True, text=True, **options
    )


def one_error(capsys, *args):
    """The message of a run that must fail with one line."""
    with pytest.raises(SystemExit) as caught:
        main([str(arg) for arg in args])
    lines = capsys.readouterr().err.strip().splitlines()
    assert caught.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


def read_table(table, **options):
    """(studies in the table's order, manifest's counts, lines of dropped.csv) of a table."""
    out = table.parent / "read"
    counts = prepare("csv", *find("csv", table, None), out, Preparation(short_side=32), workers=1, **options)["counts"]
    studies = [study for split in counts["splits"] for study in read_studies(out, split)]
    left_out = (out / "dropped.csv").read_text().splitlines()[1:]
    return sorted(studies, key=lambda study: int(study.study_id[1:])), counts, left_out


def real_film():
    if not (importlib.util.find_spec("data_store") and importlib.util.find_spec("pydicom")):
        return None
    from pydicom.data import get_testdata_file

    return get_testdata_file("RG1_J2KR.dcm", download=False)


def test_csv_end_to_end(images, capsys):
    film = real_film()
    rows = [
        {"study_id": "s1", "patient_id": "p1", "split": "train", "labels": "edema | pleural effusion"},
        {"study_id": "s2", "patient_id": "p1", "lateral": "other.jpg", "prior_frontal": str(images / "deep.png")},
        {"study_id": "s3", "patient_id": "p1", "split": "test"},
        {
            "study_id": "s4",
            "patient_id": "p2",
            "split": "Validation",
            "report": "IMPRESSION: CHF, XXXX.\nSIGNED: Dr. Secret",
        },
        {"study_id": "s5", "patient_id": "p3", "frontal": "text.png", "split": "test"},
        {"study_id": "s6", "patient_id": "p3", "frontal": "text.png", "lateral": "good.png", "split": "test"},
        {"study_id": "s7", "patient_id": "p3", "frontal": "half.png", "prior_frontal": "good.png"},
        {"study_id": "s8", "patient_id": "p3", "frontal": "none.png"},
        {"study_id": "s9", "patient_id": "p3", "frontal": "blank.png"},
        {"study_id": "s10", "patient_id": "p3", "frontal": ""},
        {"study_id": "s11", "patient_id": "p3", "report": "NO IMPRESSION"},
        {"study_id": "s1", "patient_id": "p1"},
        {"study_id": "", "patient_id": "p1"},
        {"study_id": "s12", "patient_id": " "},
        {"study_id": "s13", "patient_id": "p4", "split": "holdout"},
        {"study_id": "s14", "patient_id": "p5", "frontal": film or "good.png", "split": "train"},
    ]
    table = write_table(images / "table.csv.gz", rows)
    outs = [images / "data", images / "again"]
    run = command("csv", table, "--out", outs[0], "--workers", 2, "--preview", images / "sheet.png", POOR)
    assert run.returncode == 0, run.stderr
    main(["csv", str(table), "--out", str(outs[1]), "--workers", "1", POOR])

    counts = read_manifest(outs[0])["counts"]
    assert counts["splits"] == {"train": 3, "validate": 1, "test": 1}
    assert counts["labels"] == {"edema": 1, "pleural effusion": 1}
    assert counts["dropped"] == {
        "patient in another split": 1,
        "not an image": 1,
        "truncated image": 1,
        "file is missing": 1,
        "blank image": 1,
        "no current view": 1,
        "empty report": 1,
        "duplicate study_id": 1,
        "blank study_id": 1,
        "blank patient_id": 1,
        "unknown split": 1,
    }
    assert counts["kept"] + sum(counts["dropped"].values()) == len(rows)
    with (outs[0] / "dropped.csv").open() as file:
        listed = [(int(line["row"]), line["what"], line["reason"]) for line in csv.DictReader(file)]
    assert sorted(reason for _, what, reason in listed if what == "study") == sorted(counts["dropped"])
    assert (6, "frontal", "not an image") in listed and (15, "study", "unknown split") in listed

    train = list(read_studies(outs[0], "train"))
    assert [study.study_id for study in train] == ["s1", "s2", "s14"]
    assert train[0].labels == ("edema", "pleural effusion") and train[0].report == "No edema."
    assert list(train[1].images) == ["frontal", "lateral", "prior_frontal"]
    assert all(min(image.shape) == 256 for study in train for image in study.images.values())
    assert [study.report for study in read_studies(outs[0], "validate")] == ["Congestive heart failure."]

    for path in outs[0].iterdir():
        assert path.read_bytes() == (outs[1] / path.name).read_bytes()
    printed = run.stdout + run.stderr + "".join(capsys.readouterr())
    assert f"python -m training.pretrain --data {outs[0]}" in run.stdout
    assert all(
        text in run.stdout for text in ("found", "kept: train", "dropped: empty report", "films left out: not an image")
    )
    # RG1's name, birth date, other ID and patient ID; a signature; the table's own ids may not be printed.
    secrets = ["CompressedSamples", "19400305", "26210", "9RG1", "Secret"]
    assert not any(secret in printed for secret in [*secrets, "s14", "p5"])
    written = b"".join(path.read_bytes() for path in [*outs[0].iterdir(), images / "sheet.png"])
    assert not any(secret.encode() in written for secret in secrets)


def test_hashed_splits_are_stable_and_keep_patients_together(images):
    rows = [{"study_id": f"s{i}", "patient_id": f"p{i // 3}"} for i in range(300)]
    table = write_table(images / "table.csv", rows, [*COLUMNS[:3], "report"])
    studies, counts, _ = read_table(table)
    assert [study.study_id for study in studies] == [row["study_id"] for row in rows] and not counts["dropped"]
    splits = {study.patient_id: study.split for study in studies}
    assert all(splits[study.patient_id] == study.split for study in studies)
    counts = Counter(splits.values())
    assert 70 <= counts["train"] <= 90 and counts["validate"] >= 3 and counts["test"] >= 3
    assert [splits[f"p{i}"] for i in range(5)] == ["train", "test", "train", "train", "train"]


def test_lateral_alone_and_progress(images):
    rows = [{"study_id": f"s{i}", "patient_id": "p", "lateral": "good.png"} for i in range(9)]
    seen = []
    studies, _, _ = read_table(
        write_table(images / "table.csv", rows, ["study_id", "patient_id", "lateral", "report"]),
        progress=lambda *numbers: seen.append(numbers),
    )
    assert [list(study.images) for study in studies] == [["lateral"]] * 9
    assert seen[0] == (0, 9) and seen[-1] == (9, 9) and seen == sorted(seen)


def test_ragged_rows_are_set_aside(images):
    table = images / "table.csv"
    table.write_text(
        "study_id,patient_id,frontal,report\ns1,p1,good.png,No edema, or so\ns2,p2\ns3,p3,good.png,Clear.\n"
    )
    studies, counts, left_out = read_table(table)
    assert [study.study_id for study in studies] == ["s3"]
    assert counts["dropped"] == {"wrong number of columns": 2}
    assert left_out == ["1,study,wrong number of columns", "2,study,wrong number of columns"]


def test_a_row_that_is_not_utf8_costs_no_other(images):
    table = images / "table.csv"
    table.write_bytes(b"study_id,patient_id,frontal,report\ns1,p1,good.png,\xff\xfe\ns2,p2,good.png,\xc3\x96dem.\n")
    studies, counts, left_out = read_table(table)
    assert [study.report for study in studies] == ["\u00d6dem."]
    assert counts["dropped"] == {"not UTF-8 text": 1} and left_out == ["1,study,not UTF-8 text"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"study_id,patient,frontal,report\n", "lacks the column patient_id; found study_id, patient, frontal, report. "
         "Is 'patient' meant to be 'patient_id'?"),
        (b"study_id,patient_id,image,report\n", "lacks the column frontal; found study_id, patient_id, image, report."),
        (b"study_id;patient_id;frontal;report\n", "begins with no header: expected columns study_id, patient_id"),
        (b"s1,Secret^Name 1950,good.png,No edema.\n", "begins with no header: expected columns study_id"),
        (b"study_id,patient_id,frontal,report,report\n", "has the column 'report' twice"),
        (b"", "is empty, expected a header"),
        (b"study_id,patient_id,frontal,report\n", "has a header but no rows"),
        ("study_id,patient_id,frontal,report\ns,p,good.png,x\n".encode("utf-16"), "begins with no header"),
        (b'"study_id,patient_id\n', "has no header that is CSV"),
    ],
)  # fmt: skip
def test_tables_that_cannot_be_used(images, capsys, content, reason):
    (images / "table.csv").write_bytes(content)
    message = one_error(capsys, "csv", images / "table.csv", "--out", images / "data")
    assert message.startswith(f"error: {images / 'table.csv'} ") and reason in message and "Secret" not in message
    assert not list(images.glob("*data*"))


def test_broken_gzip(images, capsys):
    table = write_table(images / "table.csv.gz", [{"study_id": f"s{i}", "patient_id": "p"} for i in range(99)])
    table.write_bytes(table.read_bytes()[:-20])
    assert "is not a whole gzip file" in one_error(capsys, "csv", table, "--out", images / "data")
    table.write_text("study_id")
    assert "is not a whole gzip file" in one_error(capsys, "csv", table, "--out", images / "data")


def test_paths_that_cannot_be_used(images, capsys):
    table = write_table(images / "table.csv", [{"study_id": "s", "patient_id": "p"}])
    assert "none.csv: no such table" in one_error(capsys, "csv", images / "none.csv", "--out", images / "data")
    assert f"{images} already exists" in one_error(capsys, "csv", table, "--out", images)
    below_file = one_error(capsys, "csv", table, "--out", table / "data")
    assert str(table / "data") in below_file and "check the path" in below_file
    before = sorted(images.rglob("*"))
    assert "error: /proc/none" in one_error(capsys, "csv", table, "--out", "/proc/none/data")
    assert "no such directory" in one_error(capsys, "preview", images / "none", "--out", images / "sheet.png")
    assert sorted(images.rglob("*")) == before


def test_no_usable_study(images, capsys):
    table = write_table(images / "table.csv", [{"study_id": "s", "patient_id": "p", "frontal": "none.png"}])
    for _ in range(2):
        error = one_error(capsys, "csv", table, "--out", images / "data")
        assert "No study is left" in error and "dropped.csv" in error
        assert sorted(path.name for path in (images / "data").iterdir()) == ["dropped.csv", "manifest.json"]
        counts = json.loads((images / "data" / "manifest.json").read_text())["counts"]
        with pytest.raises(DataError, match="No study is left"):
            read_manifest(images / "data")
        assert counts["kept"] == 0 and sum(counts["dropped"].values()) == 1
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 300), np.uint8)).save(images / "none.png")
    main(["csv", str(table), "--out", str(images / "data"), "--keep-poor-films"])  # its film has turned up
    assert read_manifest(images / "data")["counts"]["kept"] == 1


def enough_rows(images):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (300, 300), np.uint8)).save(images / "noise.png")
    rows = [{"study_id": f"s{i}", "patient_id": "p", "frontal": "noise.png"} for i in range(40)]
    return write_table(images / "table.csv", rows)


def test_file_size_limit(images, capsys):
    table = enough_rows(images)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, before[1]))
    try:
        message = one_error(capsys, "csv", table, "--out", images / "data", "--workers", 1, POOR)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert message.startswith(f"error: {images / 'data'}: File too large: free some space")
    assert not list(images.glob("*data*"))


def test_full_disk(images):
    disk = images / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("may not mount a small tmpfs")
    try:
        run = command("csv", enough_rows(images), "--out", disk / "data", "--workers", 1, POOR)
        left = list(disk.iterdir())
    finally:
        subprocess.run(["umount", disk], check=True)
    assert run.returncode == 2 and left == []
    assert run.stderr.startswith(f"error: {disk / 'data'}: No space left on device: free some space")
    assert run.stderr.count("\n") == 1


def test_phantom(tmp_path, capsys):
    pytest.importorskip("clinvla_fast.data.phantom")
    main(["phantom", "--out", str(tmp_path / "data"), "--patients", "6", "--size", "64"])
    manifest = read_manifest(tmp_path / "data")
    assert manifest["source"] == "phantom" and manifest["counts"]["kept"] >= 6
    assert json.loads(json.dumps(manifest["settings"])) == {"patients": 6, "seed": 0, "size": 64}
    assert all("\n" not in study.report for study in read_studies(tmp_path / "data", "train", images=False))
    assert "training.pretrain --data" in capsys.readouterr().out
    assert "size is 8" in one_error(capsys, "phantom", "--out", tmp_path / "small", "--size", "8")


def test_lost_and_stray_quotes_cost_their_lines_alone(images):
    table = images / "table.csv"
    table.write_text(
        'study_id,patient_id,frontal,report\ns1,p1,good.png,"the "left" lung"\ns2,p1,good.png,"Clear.\ns3,p1,good.png,'
        'Clear.\ns4,p1,good.png,"FINDINGS:\nClear."\ns5,p1,good.png,"Edema.\n'
    )
    studies, counts, _ = read_table(table)
    assert [study.study_id for study in studies] == ["s3", "s4"]
    assert counts["dropped"] == {"broken quotes": 3}


def test_a_report_that_is_none_keeps_nobody_waiting(images):
    texts = ["x" * 19_000, "a-" * 9_500, "_" * 19_000, "1. " * 6_000, "x" * 100_000]
    rows = [{"study_id": f"s{i}", "patient_id": "p", "report": text} for i, text in enumerate(texts)]
    start = time.monotonic()
    _, counts, _ = read_table(write_table(images / "table.csv", rows))
    assert time.monotonic() - start < 60 and counts["dropped"]["report is too long"] == 1


def test_in_a_folder_that_is_there_already(images, monkeypatch):
    """As "." and as a volume of its own, whose parent may not be written to."""
    table = write_table(images / "table.csv", [{"study_id": "s", "patient_id": "p"}])
    (images / "here").mkdir()
    monkeypatch.chdir(images / "here")
    main(["csv", str(table), "--out", ".", POOR])
    assert read_manifest(images / "here")["counts"]["kept"] == 1 and not list((images / "here").glob(".*"))


def test_stopped_while_it_moves_into_a_folder_that_is_there(images, monkeypatch):
    table = write_table(images / "table.csv", [{"study_id": f"s{i}", "patient_id": f"p{i}"} for i in range(9)])
    main(["csv", str(table), "--out", str(images / "whole"), POOR])
    (images / "here").mkdir()
    real = Path.replace

    def stopping(path, target):
        if Path(target).parent == images / "here" and Path(target).suffix == ".tar":
            raise KeyboardInterrupt
        return real(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", stopping)
        with pytest.raises(SystemExit) as caught:
            main(["csv", str(table), "--out", str(images / "here"), POOR])
        assert caught.value.code == 130
    for _ in range(2):  # to go on, and once more when it is finished
        main(["csv", str(table), "--out", str(images / "here"), POOR])
    assert {p.name: p.read_bytes() for p in (images / "here").iterdir()} == {
        p.name: p.read_bytes() for p in (images / "whole").iterdir()
    }


def test_what_cannot_be_is_said_before_the_work(images, capsys):
    table = write_table(images / "table.csv", [{"study_id": "s", "patient_id": "p"}])
    for options, reason in (
        (["--preview", images / "a.pdf"], "ends in .html or .png"),
        (["--preview", images / "none" / "a.png"], "there is no folder"),
        (["--window", 0, 5], "expected a width above 0"),
        (["--show", -1], "--show is -1"),
        ([], "pass --out DIR"),
    ):
        out = ["--out", images / "data"] if options else []
        assert reason in one_error(capsys, "csv", table, *out, *options)
    assert not (images / "data").exists()


def test_a_dry_run_survives_any_path(images, capsys):
    table = write_table(images / "table.csv", [{"study_id": "s", "patient_id": "p", "frontal": "x" * 300}])
    main(["csv", str(table), "--dry-run"])
    assert "file is missing" in capsys.readouterr().out
