"""The loader: what must change no batch (caches, threads, interruptions, processes), and what augmentation may do."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from clinvla_fast.data.cache import available_memory, choose_cache, gather
from clinvla_fast.data.loader import StudyLoader
from clinvla_fast.data.shards import Study, read_manifest, write_shards
from clinvla_fast.errors import DataError
from clinvla_fast.study import VIEWS

ROOT = Path(__file__).parents[2]
STUDIES = 37


def film(seed: int, height: int = 64, width: int = 64) -> np.ndarray:
    """Smooth, and the brightest at the top left."""
    rows, columns = np.linspace(1, 0, height)[:, None], np.linspace(1, 0, width)
    return (60 + 10 * (seed % 5) + 70 * rows + 50 * columns).astype(np.uint8)


def some_study(i: int) -> Study:
    """Every combination of views, none included, in different sizes; now and then no report."""
    views = [view for j, view in enumerate(VIEWS) if i >> j & 1]
    images = {view: film(i + j, 64 + i, 64 + 3 * j) for j, view in enumerate(views)}
    report = "" if i % 7 == 3 else ("No pleural effusion. " * (i % 4) + "The lungs are clear.")
    return Study(f"s{i}", f"p{i}", "train", report, images, ("edema",) if i % 2 else ())


def write(out: Path, studies: list[Study], **options) -> Path:
    write_shards({"train": studies}, lambda study: [study], out, source="test", settings={}, **options)
    return out


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("loader") / "data", [some_study(i) for i in range(STUDIES)], items_per_shard=5)


@pytest.fixture
def load(data, tokenizer):
    def make(root: Path = data, **options) -> StudyLoader:
        sizes = {"image_size": 48, "max_tokens": 12, "batch_size": 8}
        return StudyLoader(root, "train", tokenizer, **(sizes | options))

    return make


def assert_same(ours, theirs):
    ours, theirs = list(ours), list(theirs)
    assert [batch.ids for batch in ours] == [batch.ids for batch in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a.labels == b.labels
        for name in ("images", "present", "tokens", "lengths"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name


def ids(batches) -> list[str]:
    return [i for batch in batches for i in batch.ids]


class TestSameBatches:
    @pytest.mark.parametrize("cache", ["auto", "ram", "disk"])
    @pytest.mark.parametrize("train", [True, False])
    def test_with_a_cache(self, load, cache, train):
        plain, cached = load(train=train, cache="off"), load(train=train, cache=cache)
        for _ in range(3):
            assert_same(cached, plain)

    def test_with_a_cache_that_holds_some_of_a_batch(self, load):
        share = {"train": True, "batch_size": 4, "rank": 1, "ranks": 3}  # of each epoch; the cache fills over several
        plain, cached = load(cache="off", **share), load(cache="ram", **share)
        for _ in range(6):
            assert_same(cached, plain)

    @pytest.mark.parametrize("cache", ["off", "ram", "disk"])
    @pytest.mark.parametrize("after", [0, 1, 3, 4, 5, 6, 8])
    def test_after_a_checkpoint(self, load, cache, after):
        plain = load(train=True, cache="off")
        expected = [batch for _ in range(4) for batch in plain]
        loader = load(train=True, cache=cache)
        stream = (batch for _ in range(4) for batch in loader)
        assert_same(islice(stream, after), expected[:after])
        resumed = load(train=True, cache=cache, checkpoint=loader.checkpoint())
        rest = [batch for _ in range(4) for batch in resumed]
        assert_same(rest[: 16 - after], expected[after:])
        assert_same(stream, expected[after:])  # the first goes on as well

    def test_a_checkpoint_after_the_last_batch_leaves_an_empty_rest(self, load):
        loader = load(train=True)
        batches = iter(loader)
        for _ in range(len(loader)):
            next(batches)
        resumed = load(train=True, checkpoint=loader.checkpoint())
        assert list(resumed) == []
        assert list(batches) == []
        assert loader.checkpoint() == resumed.checkpoint()
        assert_same(resumed, loader)

    def test_after_an_iterator_was_left(self, load):
        left = load(train=True, cache="ram")
        first = next(iter(left))
        plain = list(load(train=True))
        assert_same([first], plain[:1])
        assert_same(left, plain[1:])

    def test_evaluation_goes_on(self, load):
        loader = load()
        batches = iter(loader)
        seen = [next(batches), next(batches)]
        assert ids([*seen, *load(checkpoint=loader.checkpoint())]) == [f"s{i}" for i in range(STUDIES)]

    def test_threads(self, load):
        one, three = load(train=True, threads=1), load(train=True, threads=3)
        for _ in range(2):
            assert_same(one, three)

    def test_seeds_and_epochs_differ(self, load):
        loader, other = load(train=True), load(train=True, seed=1)
        epochs = [list(loader), list(loader), list(other)]
        orders = [tuple(ids(epoch)) for epoch in epochs]
        assert len(set(orders)) == 3

    def test_a_checkpoint_of_another_job(self, load):
        loader = load(train=True)
        next(iter(loader))
        with pytest.raises(DataError, match="of another batch size, number of processes or data: after 8 of 37"):
            load(train=True, checkpoint=loader.checkpoint(), batch_size=5)

    def test_a_checkpoint_of_another_number_of_processes(self, load):
        loader = load(train=True)
        first = ids(islice(loader, 1))
        parts = [load(train=True, checkpoint=loader.checkpoint(), rank=rank, ranks=3) for rank in range(3)]
        rest = [i for share in parts for i in ids(share)]
        assert sorted(first + rest) == sorted(ids(load(train=True)))

    def test_not_a_checkpoint(self, load):
        for state in ("opaque", b"\xff\x00", "5"):
            with pytest.raises(DataError, match="checkpoint is of another version"):
                load(checkpoint=state)


class TestOrder:
    def test_an_epoch_is_every_study_once(self, load):
        loader = load(train=True, batch_size=1)
        for _ in range(3):
            assert sorted(ids(loader)) == sorted(f"s{i}" for i in range(STUDIES))

    def test_training_leaves_out_the_last_smaller_batch(self, load):
        loader = load(train=True)
        assert len(loader) == 4 and [len(batch) for batch in loader] == [8] * 4

    def test_shards_are_mixed(self, load):
        of_shard = Counter(int(i[1:]) // 5 for i in next(iter(load(train=True, batch_size=16))).ids)
        assert len(of_shard) >= 5

    def test_evaluation_keeps_the_stored_order_and_the_last_batch(self, load):
        loader = load()
        assert len(loader) == 5
        for _ in range(2):
            assert ids(loader) == [f"s{i}" for i in range(STUDIES)]

    @pytest.mark.parametrize("ranks", [1, 2, 3])
    def test_processes_share_every_training_batch(self, load, ranks):
        whole = load(train=True, batch_size=8)
        parts = [load(train=True, batch_size=8, rank=rank, ranks=ranks) for rank in range(ranks)]
        assert {len(part) for part in parts} == {len(whole)}
        for _ in range(2):
            for batch, *shares in zip(whole, *parts, strict=True):
                assert torch.equal(torch.cat([share.images for share in shares]), batch.images)
                assert tuple(ids(shares)) == batch.ids
                assert [share.row for share in shares] == [len(ids(shares[:rank])) for rank in range(ranks)]
                assert max(map(len, shares)) - min(map(len, shares)) <= 1

    @pytest.mark.parametrize("ranks", [1, 2, 3])
    def test_processes_share_an_evaluation(self, load, ranks):
        parts = [load(batch_size=4, rank=rank, ranks=ranks) for rank in range(ranks)]
        for _ in range(2):
            expected = ids(load())
            shares = [list(part) for part in parts]
            assert [len(share) for share in shares] == [len(part) for part in parts]
            for rank, share in enumerate(shares):
                assert ids(share) == expected[rank::ranks]

    def test_a_batch_smaller_than_the_processes(self, load):
        with pytest.raises(DataError, match="a batch of 2 studies for 3 processes: expected at least one for each"):
            load(train=True, batch_size=2, ranks=3)

    def test_a_share_may_be_empty(self, load, tmp_path):
        two = write(tmp_path / "two", [some_study(1), some_study(2)])
        assert [ids(load(two, rank=rank, ranks=3)) for rank in range(3)] == [["s1"], ["s2"], []]


class TestImages:
    def augmented(self, load, tmp_path, images: dict[str, np.ndarray], count: int = 6, **options):
        studies = [Study(f"s{i}", f"p{i}", "train", "", images) for i in range(count)]
        loader = load(write(tmp_path / "same", studies), train=True, batch_size=count, **options)
        return torch.cat([batch.images for _ in range(3) for batch in loader]).float()

    def test_a_prior_is_augmented_as_its_current_image(self, load, tmp_path):
        frontal, lateral, prior_frontal, prior_lateral = self.augmented(
            load, tmp_path, {view: film(1) for view in VIEWS}
        ).unbind(1)
        assert torch.equal(frontal, prior_frontal) and torch.equal(lateral, prior_lateral)
        assert all((a != b).any() for a, b in zip(frontal, lateral, strict=True))
        assert all((a != b).any() for a, b in zip(frontal, frontal.roll(1, 0), strict=True))

    def test_a_prior_of_another_size_too(self, load, tmp_path):
        images = {"frontal": film(1, 96, 96), "prior_frontal": film(1, 128, 112)}
        frontal, _, prior, _ = self.augmented(load, tmp_path, images).unbind(1)
        inner = slice(6, -6)
        assert (frontal - prior)[:, inner, inner].abs().mean() < 1.5
        assert (frontal - prior.roll(1, 0))[:, inner, inner].abs().mean() > 3

    def test_never_flipped_and_little_changed(self, load, tmp_path):
        images = self.augmented(load, tmp_path, {"frontal": film(2)}, count=32)[:, 0]
        top, bottom = images[:, 4:12].mean((1, 2)), images[:, -12:-4].mean((1, 2))
        left, right = images[..., 4:12].mean((1, 2)), images[..., -12:-4].mean((1, 2))
        assert (top > bottom + 25).all() and (left > right + 15).all()
        middle = film(2)[28:36, 28:36].mean()
        assert (images[:, 20:28, 20:28].mean((1, 2)) / middle).sub(1).abs().max() < 0.25

    def test_a_bright_square_is_turned_shifted_and_zoomed_within_bounds(self, load, tmp_path):
        square = np.zeros((200, 200), np.uint8)
        square[60:140, 60:140] = 200
        images = self.augmented(load, tmp_path, {"frontal": square}, count=64, image_size=200)[:, 0] > 100
        sides = images.any(1).sum(1).float()  # in pixels: 80, by at most 1.1 and a turn of 4 degrees
        assert 78 <= sides.min() < 85 and 85 < sides.max() <= 80 * 1.1 * 1.07 + 1
        at = torch.arange(200.0)
        centres = torch.stack([(images.any(d) * at).sum(1) / images.any(d).sum(1) for d in (1, 2)]) - 99.5
        assert 3 < centres.abs().max() <= 200 * 0.03 + 1

    def test_evaluation_shows_the_whole_image(self, load, tmp_path):
        loader = load(write(tmp_path / "one", [Study("s", "p", "train", "", {"frontal": film(3, 48, 48)})]))
        (batch,) = loader
        assert (batch.images[0, 0].int() - torch.from_numpy(film(3, 48, 48)).int()).abs().max() <= 2  # JPEG's

    @pytest.mark.parametrize("cache", ["off", "ram"])
    def test_absent_views_are_zero(self, load, cache):
        for _ in range(2):
            for batch in load(cache=cache):
                wanted = [[bool(int(i[1:]) >> j & 1) for j in range(len(VIEWS))] for i in batch.ids]
                assert batch.images.shape == (len(batch), 4, 48, 48) and batch.images.dtype == torch.uint8
                assert batch.present.tolist() == wanted and batch.present.dtype == torch.bool
                assert (batch.images.flatten(2).amax(2) > 0).tolist() == wanted

    @pytest.mark.parametrize("cache", ["off", "ram", "disk"])
    def test_no_view_at_all(self, load, tmp_path, cache):
        blind = write(tmp_path / "blind", [Study(f"s{i}", "p", "train", "Clear.", {}) for i in range(4)])
        loader = load(blind, train=True, batch_size=2, cache=cache)
        for _ in range(2):
            assert all(not batch.present.any() and not batch.images.any() for batch in loader)

    def test_png(self, load, tmp_path):
        studies = [some_study(i) for i in range(8)]
        jpg, png = (write(tmp_path / kind, studies, image_format=kind) for kind in ("jpg", "png"))
        for a, b in zip(load(jpg, cache="ram"), load(png, cache="ram"), strict=True):
            assert torch.equal(a.present, b.present) and (a.images.int() - b.images.int()).abs().max() <= 3

    @pytest.mark.gpu
    @pytest.mark.parametrize("train", [True, False])
    def test_pixels_of_a_gpu_are_those_of_a_cpu_within_four_levels(self, load, train):
        pairs = zip(load(train=train), load(train=train, device="gpu"), strict=True)
        for ours, theirs in ((a.images.int(), b.images.int().cpu()) for a, b in pairs):
            assert (ours - theirs).abs().max() <= 4
            assert (ours - theirs).abs().float().mean() <= 0.5

    @pytest.mark.gpu
    @pytest.mark.parametrize("cache", ["auto", "gpu", "ram", "disk"])
    @pytest.mark.parametrize("train", [True, False])
    def test_with_a_cache_on_a_gpu(self, load, cache, train):
        plain, cached = (load(train=train, cache=c, device="gpu") for c in ("off", cache))
        for _ in range(3):
            assert_same(cached, plain)


def test_reports(load, data, tokenizer):
    for batch in load():
        for i, words in zip(batch.ids, batch.tokens.split(batch.lengths.tolist()), strict=True):
            wanted = tokenizer(some_study(int(i[1:])).report.split(". ")[0], add_special_tokens=False)["input_ids"]
            assert words[0] == tokenizer.cls_token_id and words[-1] == tokenizer.sep_token_id
            assert len(words) <= 12 and words[1 : len(wanted)].tolist() == wanted[: len(wanted) - 1]
        assert batch.labels == tuple(some_study(int(i[1:])).labels for i in batch.ids)


class TestDamage:
    """DALI's decoder may end the process when it is given damaged files."""

    @pytest.fixture
    def copy(self, data, tmp_path) -> Path:
        for file in data.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        return tmp_path

    @pytest.mark.parametrize("train", [True, False])
    @pytest.mark.parametrize("seed", range(3))
    def test_a_damaged_shard(self, load, copy, train, seed):
        tar = copy / read_manifest(copy)["shards"][3]["file"]
        content, random = bytearray(tar.read_bytes()), np.random.default_rng(seed)
        at = random.integers(len(content) - 300)
        content[at : at + 300] = random.bytes(300)
        tar.write_bytes(content)
        with pytest.raises(DataError, match=rf"a train shard cannot be read \({tar.name}: its SHA-256 .*\. Prepare"):
            list(load(copy, train=train))

    def test_a_shard_cut_short(self, load, copy):
        tar = copy / read_manifest(copy)["shards"][-1]["file"]
        os.truncate(tar, tar.stat().st_size // 2)
        with pytest.raises(DataError, match=f"a train shard cannot be read .*{tar.name}"):
            list(load(copy))

    def test_a_shard_cut_short_while_it_is_used(self, load, copy):
        loader = load(copy, batch_size=2)
        batches = iter(loader)
        next(batches)
        for shard in read_manifest(copy)["shards"]:
            os.truncate(copy / shard["file"], 1024)
        with pytest.raises(DataError, match="prepare the data again"):
            list(batches)

    def test_other_shards_than_the_manifest_says(self, load, copy):
        manifest = json.loads((copy / "manifest.json").read_text())
        manifest["shards"][0]["studies"] += 1
        (copy / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(DataError, match="holds 5 studies, the manifest says 6"):
            list(load(copy))


class TestCaches:
    def test_chosen_by_room(self, monkeypatch, tmp_path):
        def auto(size: int, ram: int, disk: int, processes: int = 1) -> str:
            monkeypatch.setattr("clinvla_fast.data.cache.available_memory", lambda: ram)
            monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": disk}))
            return choose_cache("auto", size, gpu=False, processes=processes, folder=tmp_path)

        assert auto(10, 20, 0) == "ram"
        assert auto(10, 19, 20) == "disk"
        assert auto(10, 19, 19) == "off"
        assert auto(10, 40, 40, processes=2) == "ram" and auto(10, 39, 40, processes=2) == "disk"

    def test_memory(self):
        meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        assert 0 < available_memory() <= int(meminfo["MemTotal"].split()[0]) * 1024

    def test_refused(self, load, tmp_path, monkeypatch):
        with pytest.raises(DataError, match="cache is 'rum': expected one of auto, gpu, ram, disk, off"):
            load(cache="rum")
        with pytest.raises(DataError, match="cache 'gpu' needs the images to be made on a GPU"):
            load(cache="gpu")
        with pytest.raises(DataError, match="none: no such folder"):
            load(cache="disk", cache_folder=tmp_path / "none")
        monkeypatch.setattr("clinvla_fast.data.cache.available_memory", lambda: 1000)
        loader = load(cache="ram", train=True)
        with pytest.raises(DataError, match=r"cache 'ram' needs .* GB, but 1e-06 GB are free"):
            list(loader)

    def test_a_file_without_a_name(self, load, tmp_path):
        loader = load(train=True, cache="disk", cache_folder=tmp_path)
        for _ in range(2):
            for _ in loader:
                assert not list(tmp_path.iterdir())

    def test_killed_it_leaves_nothing(self, data, tokenizer, tmp_path):
        tokenizer.save_pretrained(tmp_path / "tokenizer")
        (tmp_path / "cache").mkdir()
        script = f"""
            import sys, time
            from pathlib import Path
            from transformers import AutoTokenizer
            from clinvla_fast.data.loader import StudyLoader
            tokenizer = AutoTokenizer.from_pretrained({str(tmp_path / "tokenizer")!r})
            loader = StudyLoader(
                Path({str(data)!r}), "train", tokenizer, image_size=48, max_tokens=12, batch_size=8, train=True,
                cache="disk", cache_folder=Path({str(tmp_path / "cache")!r}),
            )
            next(iter(loader))
            print("filling", flush=True)
            time.sleep(60)
        """
        command = [sys.executable, "-c", textwrap.dedent(script)]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "filling\n"
            process.send_signal(signal.SIGKILL)
        assert not list((tmp_path / "cache").iterdir())

    def test_a_full_disk_is_an_error_before_the_first_batch(self, data, tokenizer, load, tmp_path, monkeypatch):
        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "posix_fallocate", full)
        with pytest.raises(DataError, match=r"cache 'disk' needs .* GB: .*No space left on device"):
            next(iter(load(train=True, cache="disk", cache_folder=tmp_path)))

    def test_gathering_pads_with_zeros(self):
        shapes = np.array([[3, 5], [0, 0], [4, 2], [1, 1]])
        stops = np.cumsum(shapes.prod(1))
        pixels = torch.arange(1, int(stops[-1]) + 1, dtype=torch.uint8)
        chosen = np.array([2, 0])
        batch = gather(pixels, stops[chosen], shapes[chosen])
        assert batch.shape == (2, 4, 5, 1)
        for image, number in zip(batch[..., 0], chosen, strict=True):
            (height, width), stop = shapes[number], stops[number]
            wanted = torch.zeros(4, 5, dtype=torch.uint8)
            wanted[:height, :width] = pixels[stop - height * width : stop].view(height, width)
            assert torch.equal(image, wanted)


def test_fine_detail_is_filtered_alike_in_training_and_evaluation(tmp_path, load):
    """A film much larger than the tower's images: pixels picked from it would be another picture."""
    random = np.random.default_rng(0)
    studies = [
        Study(f"s{i}", f"p{i}", "train", "Clear.", {"frontal": random.integers(0, 256, (200 + 7 * i, 400), np.uint8)})
        for i in range(8)
    ]
    root = write(tmp_path / "data", studies, image_format="png")
    (evaluated,) = load(root)
    trained, again = list(load(root, train=True, cache="off")), load(root, train=True, cache="ram")
    spread = [batch.images[:, 0, 8:-8, 8:-8].double().std().item() for batch in (*trained, evaluated)]
    assert spread[0] < 1.6 * spread[1]
    assert_same(again, trained)
