"""The commands that embed a collection and search it, from a folder of films to a table."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

import clinvla_fast
from clinvla_fast import ClinVLA, Collection, DataError
from clinvla_fast.data.phantom.dataset import write_phantoms
from clinvla_fast.data.shards import read_studies
from clinvla_fast.modeling import attention
from training.embed import main as embed
from training.search import main as search

ROOT = Path(__file__).parents[2]
CPU = ["--device", "cpu"]


@pytest.fixture
def model(tiny_model, shake, tmp_path):
    shake(tiny_model)
    tiny_model.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    out = tmp_path_factory.mktemp("phantoms") / "data"
    write_phantoms(out, patients=12, seed=0, size=64)
    return out


def printed(capsys: pytest.CaptureFixture) -> str:
    return " ".join(capsys.readouterr().out.split())


def error_of(capsys: pytest.CaptureFixture, command, *arguments: str) -> str:
    """The one line that a failing command prints."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        command([*arguments, *CPU])
    lines = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


def test_shards_and_what_is_found_in_them(model, shards, tmp_path, capsys):
    out = str(tmp_path / "out")
    embed([model, str(shards), "--out", out, "--split", "train", *CPU])
    studies = [study.study_id for study in read_studies(shards, "train", images=False)]
    said = printed(capsys)
    assert f"embedded │ {len(studies)}" in said
    assert f'Next: python -m training.search {out} {model} --text "pleural effusion"' in said
    search([out, model, "--text", "pleural effusion", "--for", "reports", "-k", "3", *CPU])
    found = [line for line in printed(capsys).split() if line in studies]
    assert len(found) == len(set(found)) == 3


def test_films_and_their_like(model, shards, tmp_path, capsys):
    """The search in a process of its own, as people run it: FAISS and PyTorch bring an OpenMP each."""
    subprocess.run(["tar", "xf", str(shards / "train-000000.tar"), "-C", str(tmp_path)], check=True)
    films = tmp_path / "films"
    films.mkdir()
    for film in tmp_path.glob("*.frontal.jpg"):
        film.rename(films / film.name)
    (films / "damaged.png").write_bytes(b"no film")
    query = sorted(films.glob("*.jpg"))[3]
    embed([model, str(films), "--out", str(tmp_path / "out"), *CPU])
    assert "dropped: not an image │ 1" in printed(capsys)
    command = ["-m", "training.search", str(tmp_path / "out"), model, "--image", str(query), "-k", "2", *CPU]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"1 │ {query.name} │" in " ".join(done.stdout.split())


def test_the_attention_taken_is_said_once(model, shards, tmp_path, capsys, caplog):
    attention._choose.cache_clear()
    embed([model, str(shards), "--out", str(tmp_path / "out"), *CPU])
    search([str(tmp_path / "out"), model, "--text", "pleural effusion", *CPU])
    logging.getLogger("clinvla_fast").info("outside a command")
    said = capsys.readouterr().err
    assert said.count("attention on cpu in torch.float32: sdpa; not xformers: it needs a GPU") == 1
    assert "outside a command" not in said


def test_queries_are_embedded_in_the_precision_of_the_collection(model, shards, tmp_path, capsys):
    """By default that of the run."""
    Path(model, "run.json").write_text(json.dumps({"settings": {"precision": "bfloat16"}}))
    for out, options in {"as trained": [], "float32": ["--precision", "float32"]}.items():
        embed([model, str(shards), "--out", str(tmp_path / out), *options, *CPU])
        search([str(tmp_path / out), model, "--text", "pleural effusion", *CPU])
        assert "images nearest to the text" in printed(capsys)
    assert Collection(tmp_path / "as trained").precision == "bfloat16"
    assert Collection(tmp_path / "float32").precision == "float32"
    with pytest.raises(DataError, match=r"another model \(its towers in bfloat16\): search it with that one"):
        Collection(tmp_path / "as trained").check_model(ClinVLA.from_pretrained(model))
    clinvla_fast.embed(model, shards, tmp_path / "in Python")
    assert Collection(tmp_path / "in Python").precision == "bfloat16"


def test_bad_input(model, shards, tmp_path, capsys):
    out, none = str(tmp_path / "out"), str(tmp_path / "none")
    assert "none: no such folder" in error_of(capsys, embed, none, str(shards), "--out", out)
    assert "none: no such folder" in error_of(capsys, embed, model, none, "--out", out)
    assert "'other' split" in error_of(capsys, embed, model, str(shards), "--out", out, "--split", "other")
    assert "expected one of --text and --image" in error_of(capsys, search, out, model)
    assert "holds no collection.json" in error_of(capsys, search, none, model, "--text", "edema")
    assert "cleaning leaves nothing of --text" in error_of(capsys, search, out, model, "--text", " ... ")
    (tmp_path / "films").mkdir()
    (tmp_path / "films" / "empty.png").touch()
    nothing = error_of(capsys, embed, model, str(tmp_path / "films"), "--out", str(tmp_path / "nothing"))
    assert "no study could be read: see" in nothing
    embed([model, str(shards), "--out", out, *CPU])
    assert "file is missing" in error_of(capsys, search, out, model, "--image", none)
