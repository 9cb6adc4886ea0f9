"""Thousands of damaged inputs: nothing crashes, hangs or writes where it should not, and every one is accounted for."""

import csv
import io
import multiprocessing
import os
import random
import shutil
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clinvla_fast.data.phantom import patient_truths, render
from clinvla_fast.data.preparation import Preparation, find, prepare
from clinvla_fast.data.shards import read_manifest, read_studies
from clinvla_fast.errors import DataError
from training.prepare import main

ROOT = Path(__file__).parents[2]
INPUTS = 2000
KILLS = 20


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Good files of every kind, small."""
    folder = tmp_path_factory.mktemp("whole")
    film = render(patient_truths(3, 1)[0], 128)["frontal"]
    Image.fromarray(film).save(folder / "a.png")
    Image.fromarray(film.astype(np.uint16) * 257).save(folder / "b.png")
    Image.fromarray(film).save(folder / "c.jpg")
    Image.fromarray(film).save(folder / "d.jpg", progressive=True)
    pydicom = pytest.importorskip("pydicom")
    for name, compress in (("e", None), ("f", pydicom.uid.RLELossless), ("g", pydicom.uid.JPEG2000Lossless)):
        dataset = pydicom.Dataset()
        dataset.file_meta = pydicom.dataset.FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = "1.2.840.10008.5.1.4.1.1.1"
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = f"1.2.3.{ord(name)}"
        dataset.Modality, dataset.BodyPartExamined = "CR", "CHEST"
        dataset.Rows, dataset.Columns, dataset.SamplesPerPixel, dataset.PixelRepresentation = 128, 128, 1, 0
        dataset.PhotometricInterpretation, dataset.BitsAllocated, dataset.BitsStored = "MONOCHROME2", 16, 12
        dataset.HighBit, dataset.WindowCenter, dataset.WindowWidth = 11, 2048, 4096
        dataset.PixelData = (film.astype(np.uint16) * 16).tobytes()
        if compress:
            dataset.compress(compress, generate_instance_uid=False)
        dataset.save_as(folder / f"{name}.dcm", enforce_file_format=True)
    return sorted(folder.iterdir())


def png_header(width, height):
    """A PNG that promises pixels and has none."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + b"\0" * 40


def damaged(draw, content, suffix):
    """The content of a file as it should not be."""
    kind = draw.randrange(8)
    if kind == 0:
        return content[: draw.randrange(len(content))]
    if kind == 1:  # bits, many of them in the header
        found = bytearray(content)
        for _ in range(draw.choice((1, 1, 2, 8, 64))):
            found[draw.randrange(len(found) if draw.random() < 0.5 else min(len(found), 400))] ^= 1 << draw.randrange(8)
        return bytes(found)
    if kind == 2:
        return draw.randbytes(draw.choice((0, 1, 100, 5000)))
    if kind == 3:
        return draw.choice((b"%PDF-1.4\n", b"<html>", b"PK\3\4", b"GIF89a" + bytes(20), b"\0" * 132 + b"XXXX", b"DICM"))
    if kind == 4:
        return png_header(*draw.choice(((0, 9), (1, 1), (2**31 - 1, 2**31 - 1), (60_000, 60_000), (9, 60_000))))
    if kind == 5:  # a piece of it twice, or gone
        cut = draw.randrange(len(content))
        end = min(cut + draw.randrange(1, 200), len(content))
        return content[:end] + content[cut:] if draw.random() < 0.5 else content[:cut] + content[end:]
    if kind == 6 and suffix == ".dcm":  # other rows, columns or bits than there are pixels
        tag = draw.choice((b"\x28\x00\x10\x00US\x02\x00", b"\x28\x00\x11\x00US\x02\x00", b"\x28\x00\x01\x01US\x02\x00"))
        head, found, rest = content.partition(tag)
        return head + found + struct.pack("<H", draw.choice((0, 1, 7, 65_535))) + rest[2:]
    buffer = io.BytesIO()
    size = draw.choice(((1, 1), (1, 300), (3000, 2), (6000, 6000)))
    Image.new("L", size, draw.randrange(256)).save(buffer, "PNG" if draw.random() < 0.5 else "JPEG")
    return buffer.getvalue()


def tricks(folder):
    """Paths that are none of a film."""
    os.mkfifo(folder / "fifo.png")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "deep").mkdir()
    names = [
        "fifo.png",
        "loop.png",
        "deep",
        "/dev/zero",
        "/dev/stdin",
        "/dev/null",
        "../../../../etc/passwd",
        "/proc/self/mem",
    ]
    return [
        *names,
        "x" * 5000,
        "~",
        "a.png/b.png",
        "$(touch pwned)",
        "http://127.0.0.1/a.png",
        "C:\\a.png",
        "\u202e.png",
    ]


def test_damaged_files_are_all_accounted_for(tmp_path, whole):
    draw = random.Random(0)
    data = tmp_path / "data"
    data.mkdir()
    names = tricks(data)
    for number in range(INPUTS - len(names) - 20):
        path = draw.choice(whole)
        names.append(f"{number}{path.suffix}")
        (data / names[-1]).write_bytes(damaged(draw, path.read_bytes(), path.suffix))
    for path in whole * 4:
        names.append(f"good-{len(names)}{path.suffix}")
        shutil.copy(path, data / names[-1])
    with (data / "table.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["study_id", "patient_id", "frontal", "lateral", "report"])
        table.writerows(
            [f"s{i}", f"p{i}", name, "" if i % 3 else names[-1], "No edema."] for i, name in enumerate(names)
        )
    before = {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")}
    run = [sys.executable, "-m", "training.prepare", "csv", data / "table.csv", "--out", tmp_path / "out"]
    done = subprocess.run(
        [*run, "--short-side", "64"], cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-2000:]
    counts = read_manifest(tmp_path / "out")["counts"]
    assert counts["kept"] + sum(counts["dropped"].values()) == len(names) >= INPUTS
    kept = {study.study_id for split in counts["splits"] for study in read_studies(tmp_path / "out", split)}
    good = {f"s{i}" for i, name in enumerate(names) if name.startswith("good") or i % 3 == 0}
    assert good <= kept and len(kept) == counts["kept"]
    assert "Traceback" not in done.stderr
    after = {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*") if path != tmp_path / "out"}
    assert {p: t for p, t in after.items() if not p.is_relative_to(tmp_path / "out")} == before


TABLE = (
    'study_id,patient_id,frontal,lateral,report,split,labels\ns1,p1,a.png,,"FINDINGS: No edema, ""or"" so.\n\nClear.",'
    "train,edema\ns2,p1,b.png,a.png,Größe normal.,,\ns3,p2,c.jpg,,CHF.,test,edema|mass\n"
).encode()


def test_damaged_tables_are_one_clear_error_or_rows_set_aside(tmp_path, whole):
    """Whatever happens to the bytes of a table, studies + dropped rows = rows, or DataError says why not."""
    for path in whole:
        shutil.copy(path, tmp_path)
    used = 0
    for seed in range(300):
        draw = random.Random(seed)
        content = bytearray(TABLE * 3)
        for _ in range(draw.choice((1, 3, 20))):
            at = draw.randrange(len(content))
            match draw.randrange(4):
                case 0:
                    content[at] = draw.randrange(256)
                case 1:
                    content[at:at] = draw.choice(
                        (b'"', b"\0", b"\r", b"\n", b",", b"\xff\xfe", b"\xc3", b"../", b"\x1a")
                    )
                case 2:
                    del content[at : at + draw.randrange(30)]
                case 3:
                    content[at:at] = content[max(0, at - draw.randrange(200)) : at]
        (tmp_path / "t.csv").write_bytes(content)
        try:
            records, left_out = find("csv", tmp_path / "t.csv", None)
        except DataError as error:
            assert "t.csv" in str(error) and "Größe" not in str(error)
            continue
        used += 1
        ids = [record.study_id for of_split in records.values() for record in of_split]
        assert len(ids) == len(set(ids)) and all(ids)
        if seed % 10 == 0 and ids:
            counts = prepare("csv", records, left_out, tmp_path / f"{seed}", Preparation(short_side=32), 1)["counts"]
            assert counts["kept"] + sum(counts["dropped"].values()) == len(ids) + sum(
                x.what == "study" for x in left_out
            )
    assert used > 100


def test_tricks_in_a_shard(tmp_path, whole):
    """A shard that someone made up: its names are never paths."""
    shutil.copy(whole[0], tmp_path)
    (tmp_path / "t.csv").write_text("study_id,patient_id,frontal,report,split\ns,p,a.png,Clear.,test\n")
    manifest = prepare("csv", *find("csv", tmp_path / "t.csv", None), tmp_path / "out", Preparation(short_side=32))
    with tarfile.open(tmp_path / "out" / manifest["shards"][0]["file"], "w") as tar:
        for name in ("../evil.json", str(tmp_path / "evil.json"), "../../00000000.json"):
            content = b'{"study_id": "s", "patient_id": "p", "report": "", "labels": []}'
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError):
        list(read_studies(tmp_path / "out", "train"))
    with suppress(DataError):
        list(read_studies(tmp_path / "out", "test"))
    assert sorted(tmp_path.rglob("*")) == before


def test_killed_at_random_it_ends_with_the_same_bytes(tmp_path, whole):
    for path in whole:
        shutil.copy(path, tmp_path)
    with (tmp_path / "t.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["study_id", "patient_id", "frontal", "lateral", "report"])
        table.writerows(
            [f"s{i}", f"p{i}", whole[i % 7].name, "none.png" if i % 5 else "", "FINDINGS: CHF."] for i in range(700)
        )
    fork = multiprocessing.get_context("fork")  # at once: Python and its imports take longer than the job

    def job(out):
        run = fork.Process(target=main, args=(["csv", str(tmp_path / "t.csv"), "--out", str(out)],))
        run.start()
        return run

    start = time.monotonic()
    job(tmp_path / "whole").join()
    whole_time, draw, kills = time.monotonic() - start, random.Random(0), 0
    while kills < KILLS:
        out = tmp_path / f"out{kills}"
        while True:
            run = job(out)
            run.join(draw.uniform(0, 1.2 * whole_time))
            if run.exitcode == 0:
                break
            assert run.exitcode is None
            run.kill()
            run.join()
            kills += 1
        assert {p.name: p.read_bytes() for p in out.iterdir()} == {
            p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir()
        }
    assert not list(tmp_path.glob(".*"))
