import errno
import faulthandler
import hashlib
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from clinvla_fast.data.shards import SPLITS, Box, LeftOut, Study, read_manifest, read_studies, write_shards
from clinvla_fast.errors import DataError


def some_studies(count=25):
    ramp = np.add.outer(np.arange(64), np.arange(80)).astype(np.uint8)
    for i in range(count):
        split = ("train", "train", "validate", "train", "test")[i % 5]
        images = {"frontal": ramp + np.uint8(i)}
        if i % 2:
            images |= {"lateral": ramp.T.copy(), "prior_frontal": ramp}
        yield Study(f"s{i}", f"p{i}", split, f"Größe {i}. No edema.", images, ("edema",) if i % 3 else ())


def as_they_are(study):
    yield study


def write(out, studies=None, make=as_they_are, **options):
    of_split = {split: [] for split in SPLITS}
    for study in some_studies() if studies is None else studies:
        of_split.setdefault(study.split, []).append(study)
    return write_shards(of_split, make, Path(out), source="test", settings={"a": 1}, items_per_shard=4, **options)


def test_round_trip(tmp_path):
    left_out = [LeftOut(3, "study", "blank"), LeftOut(1, "study", "blank"), LeftOut(2, "lateral", "torn")]
    manifest = write(tmp_path / "data", left_out=left_out)
    assert manifest == read_manifest(tmp_path / "data")
    assert manifest["counts"] == {
        "kept": 25,
        "dropped": {"blank": 2},
        "views_left_out": {"torn": 1},
        "splits": {"train": 15, "validate": 5, "test": 5},
        "labels": {"edema": 16},
    }
    rows = (tmp_path / "data" / "dropped.csv").read_text().splitlines()
    assert rows == ["row,what,reason", "1,study,blank", "2,lateral,torn", "3,study,blank"]
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


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_same_studies_same_bytes_whatever_the_workers(tmp_path):
    write(tmp_path / "a", workers=1)
    write(tmp_path / "b", workers=5)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_png_keeps_every_pixel(tmp_path):
    write(tmp_path / "data", image_format="png")
    wanted = [study for study in some_studies() if study.split == "train"]
    for got, study in zip(read_studies(tmp_path / "data", "train"), wanted, strict=True):
        assert all(np.array_equal(got.images[view], image) for view, image in study.images.items())


def test_boxes_progressions_and_studies_without_a_view(tmp_path):
    boxes = (Box("x", "lateral", 0.1, 0.25, 0.5, 0.75), Box("x", "frontal", 0.0, 0.0, 1.0, 1 / 3))
    studies = [
        Study("a", "p", "test", "", {}, ("x",)),
        Study("b", "q", "test", "", {}, ("x", "y"), boxes, (("x", "stable"), ("y", "worsening"))),
    ]
    write(tmp_path / "data", studies)
    assert list(read_studies(tmp_path / "data", "test")) == studies


def test_boxes_of_an_older_version_are_refused(tmp_path):
    """They were four numbers, without what they are of."""
    write(tmp_path / "data", [Study("a", "p", "test", "", {}, ("x",), (Box("x", "frontal", 0.1, 0.2, 0.5, 0.5),))])
    tar = tmp_path / "data" / "test-000000.tar"
    now = b'"boxes": [{"label": "x", "view": "frontal", "left": 0.1, "top": 0.2, "width": 0.5, "height": 0.5}]'
    old = b'"boxes": [[0.1, 0.2, 0.5, 0.5]]'.ljust(len(now))
    assert now in tar.read_bytes()
    tar.write_bytes(tar.read_bytes().replace(now, old))
    with pytest.raises(DataError, match="damaged or too old"):
        list(read_studies(tmp_path / "data", "test"))


def test_every_process_reads_every_study(tmp_path, monkeypatch):
    write(tmp_path / "data")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert len(list(read_studies(tmp_path / "data", "train"))) == 15


def broken_at(number, error):
    def make(study):
        if number is None or study.study_id == f"s{number}":
            raise error
        yield study

    return make


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), DataError("bad")])
def test_after_a_failure_it_goes_on(tmp_path, error):
    """Nothing is left where no shard was made; else what was made is kept, and the end is as if nothing happened."""
    write(tmp_path / "whole")
    with pytest.raises(type(error)) as caught:
        write(tmp_path / "new" / "data", make=broken_at(None, error), workers=1)
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]
    with pytest.raises(type(error)):
        write(tmp_path / "new" / "data", make=broken_at(23, error), workers=1)
    if isinstance(error, OSError):
        assert caught.value.filename == str(tmp_path / "new" / "data")
    (partial,) = (tmp_path / "new").iterdir()
    kept = {path.name: path.stat().st_mtime_ns for path in partial.glob("*.tar")}
    assert partial.name == ".data.partial" and {"train-000000.tar", "train-000002.tar"} <= set(kept)
    assert "train-000003.tar" not in kept  # which holds what failed
    with pytest.raises(DataError, match=r"\.data\.partial was started with other data or settings"):
        write(tmp_path / "new" / "data", list(some_studies(20)))
    seen = []
    write(tmp_path / "new" / "data", progress=lambda done, total: seen.append((done, total)))
    assert contents(tmp_path / "new" / "data") == contents(tmp_path / "whole")
    assert 12 <= seen[0][0] < 25 and seen[-1] == (25, 25)
    now = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "new" / "data").glob("*.tar")}
    assert kept.items() <= now.items() and not list((tmp_path / "new").glob(".*"))


@dataclass(frozen=True)
class Row:
    """An item as sources have them."""

    row: int
    study: Study


def rows():
    return [Row(i, study) for i, study in enumerate(some_studies(40), start=1) if study.split == "train"]


def test_what_kills_a_worker_is_set_aside(tmp_path):
    """As a decoder that crashes does: nothing else is lost, and the end is the same however often."""

    def make(item):
        if item.row in (4, 7, 22):
            faulthandler.disable()  # pytest's would tell of it
            os.kill(os.getpid(), signal.SIGSEGV)
        yield item.study

    for out in ("a", "b"):
        settings = {"source": "test", "settings": {}, "items_per_shard": 5, "workers": 3}
        counts = write_shards({"train": rows()}, make, tmp_path / out, **settings)["counts"]
        assert counts["kept"] == len(rows()) - 3 and counts["dropped"] == {"crashes its decoder": 3}
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert "22,study,crashes its decoder" in (tmp_path / "a" / "dropped.csv").read_text()


def test_a_worker_that_dies_of_nothing_in_the_data_is_an_error_not_a_hang(tmp_path):
    parent = os.getpid()

    def make(item):
        if os.getppid() == parent and multiprocessing.current_process().name.startswith("ForkProcess"):
            os._exit(1)
        yield item.study

    with pytest.raises(DataError, match="died, perhaps for lack of memory: run the same command again"):
        write_shards({"train": rows()}, make, tmp_path / "data", source="test", settings={}, workers=2)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("last", ["rename", "unlink", "replace"])
def test_stopped_in_its_last_steps(tmp_path, monkeypatch, inside, last):
    """Whichever it was: the same job ends well, another one is refused."""
    write(tmp_path / "whole")
    out = tmp_path / "data"
    if inside:
        out.mkdir()
    real, draw, parent, stops = getattr(Path, last), random.Random(1), os.getpid(), 0

    def stopping(path, *arguments, **options):
        if os.getpid() != parent:
            return real(path, *arguments, **options)
        if {".partial", ".data.partial"} & set(path.parts) and draw.random() < 0.2:
            raise KeyboardInterrupt
        return real(path, *arguments, **options)

    monkeypatch.setattr(Path, last, stopping)
    for _ in range(60):
        try:
            write(out)
            break
        except KeyboardInterrupt:
            stops += 1
            if not (out / "manifest.json").exists():
                with pytest.raises((DataError, KeyboardInterrupt), match=r"other data or settings|^$"):
                    write(out, list(some_studies(20)))
    assert contents(out) == contents(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "whole"]
    assert stops or (last, inside) == ("rename", True)  # there nothing is renamed


def test_another_job_leaves_the_first_alone(tmp_path):
    """Before its first shard, too; and two at once do not mix."""
    fork = multiprocessing.get_context("fork")
    began, go_on = fork.Event(), fork.Event()

    def make(study):
        began.set()
        go_on.wait(30)
        yield study

    first = fork.Process(target=write, args=(tmp_path / "data", None, make))
    first.start()
    assert began.wait(30)
    for other in (None, list(some_studies(20))):
        with pytest.raises(DataError, match="is being written by another process"):
            write(tmp_path / "data", other)
    go_on.set()
    first.join()
    assert first.exitcode == 0 and read_manifest(tmp_path / "data")["counts"]["kept"] == 25


SLOW = """
import sys, time
from pathlib import Path
sys.path.insert(0, {folder!r})
import test_shards
def make(study):
    time.sleep(0.01)
    yield study
test_shards.write(Path({out!r}), list(test_shards.some_studies(60)), make, workers=2)
"""


@pytest.mark.parametrize("seed", range(2))
def test_killed_anywhere_it_ends_with_the_same_bytes(tmp_path, seed):
    write(tmp_path / "whole", list(some_studies(60)))
    script = SLOW.format(folder=str(Path(__file__).parent), out=str(tmp_path / "data"))
    draw = random.Random(seed)
    for attempt in range(50):
        run = subprocess.Popen([sys.executable, "-c", script])
        try:
            # Python and its imports take most of a second before the first shard, of a busy machine many.
            assert run.wait(timeout=draw.uniform(0.4, 2.5) * 1.1**attempt) == 0
            break
        except subprocess.TimeoutExpired:
            run.send_signal(signal.SIGKILL)
            run.wait()
    assert contents(tmp_path / "data") == contents(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "whole"]


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
    with pytest.raises(DataError, match="split is 'valid'"):
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
