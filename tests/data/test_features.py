"""The feature cache: what it holds is what the encoders give, whole or not at all, and its loader goes on exactly."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from clinvla_fast.data.features import FeatureLoader, check_features, encode_features, read_features, write_features
from clinvla_fast.data.loader import StudyLoader
from clinvla_fast.data.shards import Study, write_shards
from clinvla_fast.errors import DataError
from clinvla_fast.modeling.encoders import ImageEncoder, TextEncoder, load_image_encoder, load_text_encoder
from clinvla_fast.study import VIEWS

ROOT = Path(__file__).parents[2]
STUDIES = 13


def some_study(i: int) -> Study:
    """From no view to all four; now and then no report."""
    films = np.random.default_rng(i).integers(0, 256, (len(VIEWS), 64, 64), np.uint8)
    images = {view: film for j, (view, film) in enumerate(zip(VIEWS, films, strict=True)) if i >> j & 1}
    report = "" if i % 5 == 3 else "The heart is normal. " * (i % 3) + "The lungs are clear."
    return Study(f"s{i}", f"p{i}", "train", report, images, ("edema",) if i % 2 else ())


def write(out: Path, studies: int = STUDIES) -> Path:
    write_shards(
        {"train": [some_study(i) for i in range(studies)]}, lambda study: [study], out, source="test", settings={}
    )
    return out


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("features") / "data")


@pytest.fixture(scope="module")
def encoders(tiny_towers) -> tuple[ImageEncoder, TextEncoder]:
    return load_image_encoder(tiny_towers["vision"]), load_text_encoder(tiny_towers["text"])


@pytest.fixture
def load(data, encoders):
    def make(root: Path = data, **options) -> StudyLoader:
        sizes = {"image_size": encoders[0].image_size, "max_tokens": 12, "batch_size": 4}
        return StudyLoader(root, "train", encoders[1].tokenizer, **(sizes | options))

    return make


@pytest.fixture(scope="module")
def cached(data, encoders, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("features") / "cache"
    sizes = {"image_size": encoders[0].image_size, "max_tokens": 12, "batch_size": 4}
    write_features(StudyLoader(data, "train", encoders[1].tokenizer, **sizes), *encoders, out)
    return out


def assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert (a.ids, a.labels) == (b.ids, b.labels)
        for name in ("image", "image_mask", "text", "text_mask"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name


class TestWriting:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_the_cache_holds_what_the_encoders_give(self, load, encoders, tmp_path, dtype):
        seen = []
        write_features(load(), *encoders, tmp_path / "f", dtype, lambda *numbers: seen.append(numbers))
        assert seen == [(4, 13), (8, 13), (12, 13), (13, 13)]
        loader = FeatureLoader(tmp_path / "f", 4)
        assert loader.studies == STUDIES and len(loader) == 4
        for ours, batch in zip(loader, load(), strict=True):
            direct = encode_features(batch, *encoders)
            assert (ours.ids, ours.labels) == (batch.ids, batch.labels)
            for side in ("image", "text"):
                mask = getattr(ours, f"{side}_mask")
                assert getattr(ours, side).dtype == dtype and torch.equal(mask, getattr(direct, f"{side}_mask"))
                assert torch.equal(getattr(ours, side)[mask], getattr(direct, side)[mask].to(dtype))
            views = torch.tensor([int(i[1:]).bit_count() for i in ours.ids])
            assert torch.equal(ours.image_mask.sum(1), views * encoders[0].patches)
            assert torch.equal(ours.text_mask.sum(1), batch.lengths - 2)

    def test_a_study_has_the_same_tokens_in_any_company(self, load, encoders, cached):
        alone = [encode_features(batch, *encoders) for batch in load(batch_size=1)]
        for one, batch in zip(alone, FeatureLoader(cached, 1), strict=True):
            for side in ("image", "text"):
                torch.testing.assert_close(getattr(batch, side), getattr(one, side).half(), rtol=2e-3, atol=2e-3)

    def test_plain_numpy_files(self, cached):
        about = read_features(cached)
        image = np.load(cached / "image.npy", mmap_mode="r")
        assert image.dtype == np.float16 and image.shape[1] == about["widths"]["image"] == 128
        assert {path.name for path in cached.iterdir()} == {*about["files"], "features.json"}

    def test_finished_it_does_nothing(self, load, encoders, cached):
        before = {path: path.stat().st_mtime_ns for path in cached.iterdir()}
        write_features(load(), *encoders, cached)
        assert {path: path.stat().st_mtime_ns for path in cached.iterdir()} == before

    def test_an_error_leaves_nothing(self, load, encoders, tmp_path):
        def give_up(done, studies):
            if done > 4:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            write_features(load(), *encoders, tmp_path / "f", progress=give_up)
        assert not list(tmp_path.iterdir())

    def test_killed_it_leaves_no_cache_and_can_be_run_again(self, load, data, encoders, tiny_towers, tmp_path):
        script = f"""
            import time
            from pathlib import Path
            from clinvla_fast.data.features import write_features
            from clinvla_fast.data.loader import StudyLoader
            from clinvla_fast.modeling.encoders import load_image_encoder, load_text_encoder
            image = load_image_encoder({str(tiny_towers["vision"])!r})
            text = load_text_encoder({str(tiny_towers["text"])!r})
            loader = StudyLoader(
                Path({str(data)!r}), "train", text.tokenizer, image_size=128, max_tokens=12, batch_size=4
            )
            def wait(done, studies):
                print("writing", flush=True)
                time.sleep(60)
            write_features(loader, image, text, Path({str(tmp_path / "f")!r}), progress=wait)
        """
        command = [sys.executable, "-c", textwrap.dedent(script)]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            assert process.stdout.readline() == b"writing\n"
            process.send_signal(signal.SIGKILL)
        assert not (tmp_path / "f").exists()
        write_features(load(), *encoders, tmp_path / "f")
        assert [path.name for path in tmp_path.iterdir()] == ["f"] and FeatureLoader(tmp_path / "f", 4).studies == 13

    def test_a_taken_folder(self, load, encoders, tmp_path):
        (tmp_path / "mine").touch()
        with pytest.raises(DataError, match="already exists and is not an empty folder"):
            write_features(load(), *encoders, tmp_path)

    def test_too_large_for_the_dtype(self, load, tiny_towers, encoders, tmp_path):
        image = load_image_encoder(tiny_towers["vision"])
        with torch.no_grad():
            image.model.norm.weight.mul_(1e6)
        with pytest.raises(DataError, match=r"image tower gives tokens that are not finite in torch.float16: pass"):
            write_features(load(), image, encoders[1], tmp_path / "f")
        assert not list(tmp_path.iterdir())

    def test_only_films_as_they_are_and_all_studies(self, load, encoders, tmp_path):
        with pytest.raises(ValueError, match="expected a loader with train=False"):
            write_features(load(train=True), *encoders, tmp_path / "f")
        with pytest.raises(ValueError, match="the loader gave 6 of 13 studies"):
            write_features(load(rank=1, ranks=2), *encoders, tmp_path / "f")


class TestIdentity:
    def test_other_data(self, load, encoders, cached, tmp_path):
        other = load(write(tmp_path / "other", 12))
        with pytest.raises(DataError, match=r"was made with another data .*: remove it"):
            check_features(cached, other, *encoders)
        with pytest.raises(DataError, match="was made with another data"):
            write_features(other, *encoders, cached)

    @pytest.mark.parametrize("kind", ["image", "text"])
    def test_another_tower(self, load, tiny_towers, cached, kind):
        image, text = load_image_encoder(tiny_towers["vision"]), load_text_encoder(tiny_towers["text"])
        check_features(cached, load(), image, text)
        with torch.no_grad():
            next((image if kind == "image" else text).model.parameters()).add_(1e-3)
        with pytest.raises(DataError, match=f"was made with another {kind} tower"):
            check_features(cached, load(), image, text)

    def test_other_settings(self, load, encoders, cached):
        with pytest.raises(DataError, match=r"another max tokens \(12, here 10\)"):
            check_features(cached, load(max_tokens=10), *encoders)
        with pytest.raises(DataError, match=r"another dtype \(float16, here bfloat16\)"):
            check_features(cached, load(), *encoders, torch.bfloat16)


class TestDamage:
    @pytest.fixture
    def copy(self, cached, tmp_path) -> Path:
        for file in cached.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        return tmp_path

    @pytest.mark.parametrize("name", ["image.npy", "text.npy", "studies.json", "features.json"])
    def test_a_file_cut_short_or_lost(self, copy, name):
        os.truncate(copy / name, (copy / name).stat().st_size - 2)
        with pytest.raises(DataError, match="features cannot be read"):
            FeatureLoader(copy, 4)
        (copy / name).unlink()
        with pytest.raises(DataError, match=r"features cannot be read|holds no features\.json"):
            FeatureLoader(copy, 4)

    def test_another_version(self, copy):
        about = json.loads((copy / "features.json").read_text())
        (copy / "features.json").write_text(json.dumps(about | {"format": 0}))
        with pytest.raises(DataError, match="format 0, expected 1"):
            FeatureLoader(copy, 4)


class TestLoader:
    @pytest.mark.parametrize("after", [0, 1, 2, 3, 4, 5, 7])
    def test_after_a_checkpoint(self, cached, after):
        expected = [batch for loader in [FeatureLoader(cached, 4, True, 7)] for _ in range(3) for batch in loader]
        loader = FeatureLoader(cached, 4, True, 7)
        stream = (batch for _ in range(3) for batch in loader)
        assert_same(islice(stream, after), expected[:after])
        resumed = FeatureLoader(cached, 4, True, 7, checkpoint=loader.checkpoint())
        rest = [batch for _ in range(3) for batch in resumed]
        assert_same(rest[: 9 - after], expected[after:])
        assert_same(stream, expected[after:])  # the first goes on as well

    def test_the_order_is_the_study_loaders(self, cached, load):
        ours, theirs = FeatureLoader(cached, 4, True, 3), load(train=True, seed=3, cache="off")
        for _ in range(2):
            assert [batch.ids for batch in ours] == [batch.ids for batch in theirs]
        assert ours.checkpoint() == theirs.checkpoint() and len(ours) == len(theirs) == 3

    def test_seeds_and_epochs_differ(self, cached):
        loader, other = FeatureLoader(cached, 4, True), FeatureLoader(cached, 4, True, 1)
        orders = [tuple(i for batch in epoch for i in batch.ids) for epoch in (loader, loader, other)]
        assert len(set(orders)) == 3

    @pytest.mark.parametrize("train", [True, False])
    def test_processes_share_an_epoch(self, cached, train):
        whole = [i for batch in FeatureLoader(cached, 4, train) for i in batch.ids]
        parts = [[i for batch in FeatureLoader(cached, 2, train, rank=r, ranks=2) for i in batch.ids] for r in (0, 1)]
        assert sorted(parts[0] + parts[1]) == sorted(whole)

    def test_no_view_in_a_batch(self, cached):
        first = next(iter(FeatureLoader(cached, 1)))
        assert first.image.shape == (1, 0, 128) and not len(first.paired())

    def test_paired(self, cached):
        for batch in FeatureLoader(cached, 4):
            paired = batch.paired()
            keep = [n for n, i in enumerate(batch.ids) if int(i[1:]) and int(i[1:]) % 5 != 3]
            assert paired.ids == tuple(batch.ids[n] for n in keep) and torch.equal(paired.text, batch.text[keep])
            assert paired.labels == tuple(batch.labels[n] for n in keep) and len(paired.image) == len(keep)

    def test_refused(self, cached, tmp_path):
        loader = FeatureLoader(cached, 4, True)
        next(iter(loader))
        with pytest.raises(DataError, match="of another batch size, number of processes or data: after 4 of 13"):
            FeatureLoader(cached, 3, True, checkpoint=loader.checkpoint())
        with pytest.raises(DataError, match="checkpoint is of another version"):
            FeatureLoader(cached, 4, True, checkpoint="opaque")
        with pytest.raises(DataError, match="has 13 training studies: expected at least one batch of 14"):
            FeatureLoader(cached, 14, True)
        with pytest.raises(DataError, match=r"holds no features\.json"):
            FeatureLoader(tmp_path, 4)
