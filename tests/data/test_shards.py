import errno
import hashlib
import json
from collections import Counter

import numpy as np
import pytest

from clinvla_fast.data import shards
from clinvla_fast.data.contact_sheet import contact_sheet
from clinvla_fast.data.shards import Study, read_manifest, read_studies, write_shards
from clinvla_fast.errors import DataError


def some_studies(count=25):
    ramp = np.add.outer(np.arange(64), np.arange(80)).astype(np.uint8)
    for i in range(count):
        split = ("train", "train", "validate", "train", "test")[i % 5]
        images = {"frontal": ramp + np.uint8(i)}
        if i % 2:
            images |= {"lateral": ramp.T.copy(), "prior_frontal": ramp}
        yield Study(f"s{i}", f"p{i}", split, f"Größe {i}. No edema.", images, ("edema",) if i % 3 else ())


def write(out, studies=None, **options):
    studies = some_studies() if studies is None else studies
    return write_shards(studies, out, source="test", settings={"a": 1}, studies_per_shard=4, **options)


def test_round_trip(tmp_path):
    manifest = write(tmp_path / "data", dropped=Counter(blank=2))
    assert manifest == read_manifest(tmp_path / "data")
    assert manifest["counts"] == {
        "kept": 25,
        "dropped": {"blank": 2},
        "splits": {"train": 15, "validate": 5, "test": 5},
        "labels": {"edema": 16},
    }
    assert sum(shard["studies"] for shard in manifest["shards"]) == 25
    assert [shard["studies"] for shard in manifest["shards"] if shard["file"].startswith("train")] == [4, 4, 4, 3]
    for shard in manifest["shards"]:
        assert hashlib.sha256((tmp_path / "data" / shard["file"]).read_bytes()).hexdigest() == shard["sha256"]
        index = (tmp_path / "data" / shard["file"]).with_suffix(".idx").read_text().splitlines()
        assert index[0] == f"v1.2 {shard['studies']}" and len(index) == shard["studies"] + 1
    for split in ("train", "validate", "test"):
        wanted = [study for study in some_studies() if study.split == split]
        for got, study in zip(read_studies(tmp_path / "data", split), wanted, strict=True):
            assert (got.study_id, got.patient_id, got.report, got.labels, got.split) == (
                study.study_id,
                study.patient_id,
                study.report,
                study.labels,
                split,
            )
            assert list(got.images) == list(study.images)
            for view, image in got.images.items():
                assert image.dtype == np.uint8 and image.shape == study.images[view].shape
    assert all(not study.images for study in read_studies(tmp_path / "data", "test", images=False))


def test_same_studies_same_bytes(tmp_path):
    write(tmp_path / "a")
    write(tmp_path / "b")
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "b").iterdir())
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)


def test_every_process_reads_every_study(tmp_path, monkeypatch):
    write(tmp_path / "data")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert len(list(read_studies(tmp_path / "data", "train"))) == 15


def broken_after(count, error):
    yield from some_studies(count)
    raise error


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), DataError("bad"), KeyboardInterrupt()])
def test_a_failure_leaves_nothing(tmp_path, error):
    with pytest.raises(type(error)) as caught:
        write(tmp_path / "new" / "data", broken_after(7, error))
    assert list(tmp_path.iterdir()) == []
    if isinstance(error, OSError):
        assert caught.value.filename == str(tmp_path / "new" / "data")


def test_a_full_disk_while_indexing_leaves_nothing(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shards, "IndexCreator", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "data")
    assert list(tmp_path.iterdir()) == []


def test_out_must_be_empty_or_absent(tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for out in (tmp_path / "full", tmp_path / "full" / "file"):
        with pytest.raises(DataError, match=f"{out} already exists"):
            write(out)
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "file"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    write(tmp_path / "link")
    assert read_manifest(tmp_path / "empty")["counts"]["kept"] == 25


def test_out_may_be_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    write(".")
    assert read_manifest(tmp_path / "here")["counts"]["kept"] == 25


def test_refused_studies(tmp_path):
    with pytest.raises(DataError, match="No study is left"):
        write(tmp_path / "data", [])
    with pytest.raises(DataError, match="split 'valid'"):
        write(tmp_path / "data", [Study("s", "p", "valid", "Normal.", {})])
    assert list(tmp_path.iterdir()) == []


def test_refused_folders(tmp_path):
    with pytest.raises(DataError, match="no such directory"):
        read_manifest(tmp_path / "none")
    with pytest.raises(DataError, match=r"holds no manifest\.json"):
        read_manifest(tmp_path)
    manifest = write(tmp_path / "data")
    with pytest.raises(DataError, match="no studies in its 'other' split"):
        list(read_studies(tmp_path / "data", "other"))
    (tmp_path / "data" / manifest["shards"][0]["file"]).unlink()
    with pytest.raises(DataError, match=r"test-000000\.tar is missing or empty"):
        read_manifest(tmp_path / "data")
    for text, reason in [(json.dumps(manifest | {"format": 0}), "has format 0"), ("{", "is not valid JSON")]:
        (tmp_path / "data" / "manifest.json").write_text(text)
        with pytest.raises(DataError, match=reason):
            read_manifest(tmp_path / "data")


def test_contact_sheet(tmp_path):
    write(tmp_path / "data")
    contact_sheet(tmp_path / "data", tmp_path / "sheet.png", studies=5)
    content = (tmp_path / "sheet.png").read_bytes()
    assert content.startswith(b"\x89PNG") and 10_000 < len(content) < 900_000
