"""An embedded collection: what is in it, that it is the same however it came about, and what a search finds in it."""

import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from clinvla_fast import ClinVLA, Collection, DataError, Recipe, collection, embed
from clinvla_fast.data.loader import StudyLoader
from clinvla_fast.data.phantom.dataset import write_phantoms
from clinvla_fast.data.shards import Study, read_studies, write_shards
from clinvla_fast.pretraining import retrieve

KILLED = """
import os, signal, sys
from clinvla_fast import collection
collection._PART = 8
def progress(done, total):
    if done > 8:
        os.kill(os.getpid(), signal.SIGKILL)
_, model, *places = sys.argv
child = os.fork()
if child:
    os.waitpid(child, 0)
    places = places[2:]
collection.embed(model, *places[:2], batch_size=4, progress=progress)
"""


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(collection, "_PART", 8)


@pytest.fixture
def model(tiny_model, shake):
    shake(tiny_model)
    return tiny_model


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    out = tmp_path_factory.mktemp("phantoms") / "data"
    write_phantoms(out, patients=25, seed=0, size=64)
    return out


@pytest.fixture(scope="module")
def films(tmp_path_factory, shards):
    """A folder of 18 images, in subfolders too; 3 of them cannot be read. And something that is no image."""
    folder = tmp_path_factory.mktemp("films")
    for i, study in zip(range(15), read_studies(shards, "train"), strict=False):
        place = folder / f"ward {i % 3}" if i % 4 else folder
        place.mkdir(exist_ok=True)
        Image.fromarray(study.images["frontal"]).save(place / f"{i:02d}.{('png', 'jpg', 'PNG')[i % 3]}")
    whole = (folder / "00.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "ward 1" / "letter.dcm").write_bytes(b"dear colleague")
    Image.new("L", (64, 64)).save(folder / "black.png")
    (folder / "notes.txt").write_text("no image")
    return folder


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def rows(folder, kind="image"):
    """Ids and embeddings of a whole collection."""
    parts = list(Collection(folder).embeddings(kind))
    return [i for ids, _ in parts for i in ids], torch.from_numpy(np.concatenate([x for _, x in parts]))


# What is in it


def test_shards_are_embedded_as_evaluation_embeds_them(model, shards, tmp_path):
    seen = []
    known = embed(model, shards, tmp_path / "out", progress=lambda *done: seen.append(done))
    studies = [s for split in known["source"]["splits"] for s in read_studies(shards, split, images=False)]
    assert known["counts"] == {
        "kept": {"studies": len(studies), "image": len(studies), "text": len(studies)},
        "dropped": {},
    }
    assert seen[0] == (0, len(studies)) and seen[-1] == (len(studies), len(studies))
    ids, _ = rows(tmp_path / "out")
    assert ids == [s.study_id for s in studies] == rows(tmp_path / "out", "text")[0]
    text = rows(tmp_path / "out", "text")[1]
    torch.testing.assert_close(text, model.encode_reports([s.report for s in studies]), rtol=0, atol=1e-5)
    embed(model, shards, tmp_path / "test", split="test")
    sizes = {"image_size": 128, "max_tokens": model.max_tokens, "batch_size": 64}
    expected = retrieve(model, StudyLoader(shards, "test", model.tokenizer, **sizes))
    held_out, _ = rows(tmp_path / "test")
    hits = [
        [hit.id for hit in found]
        for found in Collection(tmp_path / "test").search(rows(tmp_path / "test", "text")[1], k=10)
    ]
    recall = np.mean([own in found for own, found in zip(held_out, hits, strict=True)])
    assert recall == pytest.approx(expected["text_to_image"]["recall@10"])


def test_rows_are_of_their_ids(model, films, tmp_path):
    random = torch.get_rng_state()
    embed(model, films, tmp_path / "out", batch_size=4)
    assert torch.equal(torch.get_rng_state(), random)  # the caller's are left alone
    ids, image = rows(tmp_path / "out")
    assert len(ids) == 15 and ids[0] == "00.png" and "ward 2/11.PNG" in ids
    expected = model.encode_images([{"frontal": films / name} for name in ids])
    torch.testing.assert_close(image, expected, rtol=0, atol=1e-5)


def test_files_that_cannot_be_read_are_set_aside(model, films, tmp_path):
    known = embed(model, films, tmp_path / "out", batch_size=4)
    assert known["counts"]["dropped"] == {"blank image": 1, "not an image": 1, "truncated image": 1}
    assert known["counts"]["kept"] == {"studies": 15, "image": 15, "text": 0}
    assert (tmp_path / "out" / "dropped.csv").read_text().splitlines() == [
        "file,reason",
        "black.png,blank image",
        "cut.png,truncated image",
        "ward 1/letter.dcm,not an image",
    ]


def test_linked_folders_are_read_and_loops_are_not(model, films, tmp_path):
    source = tmp_path / "source"
    (source / "a").mkdir(parents=True)
    shutil.copy(films / "00.png", source / "a" / "own.png")
    (source / "b.png").symlink_to(source / "a")
    (source / "a" / "again").symlink_to(source)
    embed(model, source, tmp_path / "out")
    assert rows(tmp_path / "out")[0] == ["a/own.png", "b.png/own.png"]


def test_another_folder_with_files_of_the_same_names(model, films, tmp_path):
    embed(model, films, tmp_path / "out")
    shutil.copytree(films, tmp_path / "other")
    with pytest.raises(DataError, match="was started with another source"):
        embed(model, tmp_path / "other", tmp_path / "out")
    embed(model, tmp_path / "other", tmp_path / "next")
    (tmp_path / "other" / "00.png").write_bytes(b"written anew")
    with pytest.raises(DataError, match="was started with another source"):
        embed(model, tmp_path / "other", tmp_path / "next")


def test_one_film(model, films, tmp_path):
    known = embed(model, str(films / "00.png"), tmp_path / "out")
    assert known["counts"] == {"kept": {"studies": 1, "image": 1, "text": 0}, "dropped": {}}
    ids, image = rows(tmp_path / "out")
    assert ids == [str(films / "00.png")]
    expected = model.encode_images([{"frontal": films / "00.png"}])
    torch.testing.assert_close(image, expected, rtol=0, atol=1e-5)


def test_a_list_of_paths(model, films, tmp_path):
    """Any iterable, a path twice, one that is missing; the last part holds nothing but what was dropped."""
    paths = [films / "00.png", str(films / "04.jpg"), films / "00.png", films / "none.png"]
    known = embed(model, iter(paths), tmp_path / "out", batch_size=3)
    ids, image = rows(tmp_path / "out")
    assert ids == [str(path) for path in paths[:3]] and torch.equal(image[0], image[2])
    assert known["counts"]["dropped"] == {"file is missing": 1}
    assert str(films / "none.png") in (tmp_path / "out" / "dropped.csv").read_text()


def test_a_study_without_a_view_or_a_report(model, tmp_path):
    film = np.arange(4096, dtype=np.uint8).reshape(64, 64)
    studies = [
        Study("both", "p", "test", "No edema.", {"frontal": film}),
        Study("mute", "p", "test", "", {"lateral": film}),
        Study("blind", "p", "test", "The heart is enlarged.", {}),
    ]
    write_shards({"test": studies}, lambda study: [study], tmp_path / "data", source="test", settings={})
    known = embed(model, tmp_path / "data", tmp_path / "out")
    assert known["counts"]["kept"] == {"studies": 3, "image": 2, "text": 2}
    assert rows(tmp_path / "out")[0] == ["both", "mute"] and rows(tmp_path / "out", "text")[0] == ["both", "blind"]
    _, tensors = collection.read_part(tmp_path / "out" / "part-00000.safetensors")
    norms = {kind: np.linalg.norm(tensors.get_tensor(kind), axis=1) for kind in ("image", "text")}
    assert norms["image"] == pytest.approx([1, 1, 0]) and norms["text"] == pytest.approx([1, 0, 1])


@pytest.mark.parametrize("source", ["shards", "films"])
def test_results_do_not_depend_on_the_batch_size(model, source, request, tmp_path):
    source = request.getfixturevalue(source)
    for size in (3, 64):
        embed(model, source, tmp_path / f"{size}", batch_size=size)
    ids, image = rows(tmp_path / "3")
    others, expected = rows(tmp_path / "64")
    assert ids == others
    torch.testing.assert_close(image, expected, rtol=0, atol=1e-5)


# Going on


def test_killed_and_resumed_gives_the_same_bytes(model, shards, films, tmp_path):
    model.save_pretrained(tmp_path / "model")
    model = ClinVLA.from_pretrained(tmp_path / "model")
    pairs = [(films, tmp_path / "films"), (shards, tmp_path / "shards")]
    arguments = [str(path) for path in (tmp_path / "model", *pairs[0], *pairs[1])]
    # Ends when the last process that could write to its pipes does: no reader of images is left behind.
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, text=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    for source, out in pairs:
        assert set(content(out)) == {"collection.json", "part-00000.safetensors"}
        with pytest.raises(DataError, match="not finished"):
            Collection(out)
        (out / ".part-00001.safetensors.partial").write_bytes(b"cut off while it was written")
        seen = []
        embed(model, source, out, batch_size=4, progress=lambda done, _, seen=seen: seen.append(done))
        assert seen[0] == 8
        embed(model, source, tmp_path / "whole" / out.name, batch_size=4)
        assert content(out) == content(tmp_path / "whole" / out.name)


@pytest.mark.parametrize("after", [0, 8, 16])
def test_stopped_anywhere_and_resumed_gives_the_same_bytes(model, films, tmp_path, after):
    def stop(done, total):
        if done >= after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed(model, films, tmp_path / "out", batch_size=4, progress=stop)
    embed(model, films, tmp_path / "out", batch_size=4)
    embed(model, films, tmp_path / "whole", batch_size=4)
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    embed(model, films, tmp_path / "out", batch_size=4)  # finished: nothing changes
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_resumed_where_a_split_ends(model, shards, tmp_path, monkeypatch):
    """Every batch a part, so that one ends with the training studies."""
    monkeypatch.setattr(collection, "_PART", 1)
    embed(model, shards, tmp_path / "whole", batch_size=16)
    training = json.loads((shards / "manifest.json").read_text())["counts"]["splits"]["train"]

    def stop(done, total):
        if done == training:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed(model, shards, tmp_path / "out", batch_size=16, progress=stop)
    embed(model, shards, tmp_path / "out", batch_size=16)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_going_on_with_something_else(model, films, shards, tmp_path, tiny_towers):
    embed(model, films, tmp_path / "out", batch_size=4)
    before = content(tmp_path / "out")
    another = ClinVLA(**tiny_towers, recipe=Recipe(width=24, bottleneck=20))
    for changed, arguments in {
        "model": (another, films, 4),
        "source": (model, shards, 4),
        "batch size": (model, films, 5),
        "model, source": (another, [films / "00.png"], 4),
    }.items():
        with pytest.raises(DataError, match=f"was started with another {changed}: "):
            embed(*arguments[:2], tmp_path / "out", batch_size=arguments[2])
    with pytest.raises(DataError, match="was embedded by another model"):
        Collection(tmp_path / "out").check_model(another)
    Collection(tmp_path / "out").check_model(model)
    assert content(tmp_path / "out") == before


# What a search finds


@pytest.fixture
def embedded(model, shards, tmp_path):
    embed(model, shards, tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.parametrize("kind", ["image", "text"])
def test_a_study_finds_itself(embedded, kind):
    ids, queries = rows(embedded, kind)
    found = Collection(embedded).search(queries, kind, k=1)
    for i, (hit,) in enumerate(found):
        assert hit.score == pytest.approx(1, abs=1e-5)
        assert hit.id == ids[i] or torch.allclose(queries[ids.index(hit.id)], queries[i], atol=1e-5)  # an equal report
    assert kind == "text" or [hit.id for (hit,) in found] == ids


@pytest.mark.parametrize("index", ["Flat", "HNSW32", "IVF2,Flat"])
@pytest.mark.parametrize("kind", ["image", "text"])
def test_a_search_is_a_product_and_its_best(model, embedded, kind, index):
    queries = model.encode_reports(["Large right pleural effusion.", "The heart is enlarged."])
    ids, candidates = rows(embedded, kind)
    best = (queries @ candidates.T).topk(7)
    found = Collection(embedded, index).search(queries, kind, k=7)
    if index == "Flat":
        scores = torch.tensor([[hit.score for hit in hits] for hits in found])
        torch.testing.assert_close(scores, best.values, rtol=0, atol=1e-5)
    for query, hits in zip(queries, found, strict=True):
        for hit in hits:
            assert hit.score == pytest.approx(float(candidates[ids.index(hit.id)] @ query), abs=1e-5)


def test_more_is_asked_than_there_is(embedded, model):
    ids, image = rows(embedded)
    (hits,) = Collection(embedded).search(image[:1].numpy(), k=10_000)
    assert sorted(hit.id for hit in hits) == sorted(ids)


# Bad input


def test_bad_sources(model, films, shards, tmp_path):
    (tmp_path / "empty").mkdir()
    for source, split, message in [
        (tmp_path / "none", None, "none: no such folder"),
        (tmp_path / "empty", None, r"empty holds no image: expected files that end in \.png"),
        ([], None, "the source has no image"),
        ([films / "00.png", 7], None, "path 1 of the source is int"),
        (films, "test", "has no splits"),
        (shards / "train-000000.tar", None, r"train-000000\.tar is a shard: pass the folder"),
        ([shards / "train-000000.tar"], None, r"train-000000\.tar is a shard: pass the folder"),
        (shards, "other", "no studies in its 'other' split"),
    ]:
        with pytest.raises(DataError, match=message):
            embed(model, source, tmp_path / "out", split=split)
    with pytest.raises(DataError, match="batch_size is 0"):
        embed(model, films, tmp_path / "out", batch_size=0)
    with pytest.raises(DataError, match="already exists"):
        embed(model, films, films)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_a_damaged_shard(model, shards, tmp_path):
    data = shutil.copytree(shards, tmp_path / "data")
    tar = data / "train-000000.tar"
    damaged = bytearray(tar.read_bytes())
    start = damaged.index(b"\xff\xd8\xff")
    damaged[start : start + 400] = bytes(400)
    tar.write_bytes(damaged)
    with pytest.raises(DataError, match="a train shard cannot be read"):
        embed(model, data, tmp_path / "out", batch_size=4)


def test_a_reader_that_dies_and_one_that_cannot_go_on(model, films, tmp_path, monkeypatch):
    monkeypatch.setattr(collection, "read_radiograph", lambda *_: os._exit(1))
    with pytest.raises(DataError, match="a process that reads images died"):
        embed(model, films, tmp_path / "out", batch_size=4)

    def no_pydicom(path, size):
        raise DataError(f"{path} is a DICOM file")

    monkeypatch.setattr(collection, "read_radiograph", no_pydicom)
    with pytest.raises(DataError, match=r"^.*00\.png is a DICOM file$"):
        embed(model, films, tmp_path / "out", batch_size=4)


def test_a_model_without_frontals(films, tmp_path, tiny_towers):
    model = ClinVLA(**tiny_towers, recipe=Recipe(width=24, bottleneck=20, views=("lateral",)))
    with pytest.raises(DataError, match="image files, frontals, and the model looks at lateral"):
        embed(model, films, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_broken(model, films, tmp_path):
    with torch.no_grad():
        model.image_global[0].bias[0] = torch.nan
    with pytest.raises(DataError, match="not finite"):
        embed(model, films, tmp_path / "out")


def test_bad_collections(model, films, embedded, tmp_path):
    with pytest.raises(DataError, match=r"holds no collection\.json"):
        Collection(films)
    whole = json.loads((embedded / "collection.json").read_text())
    part = embedded / "part-00000.safetensors"
    fewer = whole["counts"]["kept"] | {"image": 1}
    (embedded / "collection.json").write_text(json.dumps(whole | {"counts": whole["counts"] | {"kept": fewer}}))
    with pytest.raises(DataError, match=r"studies with image where collection\.json has 1"):
        Collection(embedded).search(torch.ones(1, 24))
    (embedded / "collection.json").write_text(json.dumps(whole))
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(DataError, match=r"part-00000\.safetensors is damaged"):
        Collection(embedded).search(torch.ones(1, 24))
    part.unlink()
    with pytest.raises(DataError, match=r"part-00000\.safetensors is missing"):
        Collection(embedded).search(torch.ones(1, 24))
    for text, message in [
        (json.dumps(whole | {"format": 0}), "has format 0"),
        ("{", "is not valid JSON"),
        ("[]", "no table of names"),
    ]:
        (embedded / "collection.json").write_text(text)
        with pytest.raises(DataError, match=message):
            Collection(embedded)


def test_bad_searches(model, embedded, films, tmp_path):
    opened = Collection(embedded)
    for queries in (torch.ones(24), torch.ones(2, 23), torch.full((1, 24), torch.nan)):
        with pytest.raises(DataError, match=r"expected finite numbers, \[q, 24\]"):
            opened.search(queries)
    for kind, k in (("report", 1), ("image", 0), ("image", 1.5)):
        with pytest.raises(DataError, match="expected image or text, and at least 1"):
            opened.search(torch.ones(1, 24), kind, k)
    for index in ("flat", "IVF9999,Flat"):
        with pytest.raises(DataError, match=f"cannot build the index '{index}'"):
            Collection(embedded, index).search(torch.ones(1, 24))
    embed(model, films, tmp_path / "films")
    with pytest.raises(DataError, match="has no text to search in"):
        Collection(tmp_path / "films").search(torch.ones(1, 24), "text")
