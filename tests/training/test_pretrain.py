"""The main job end to end, small: what it leaves, that it repeats, that it goes on, and what it says of bad input."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from clinvla_fast import ClinVLA, Collection, DataError, embed
from clinvla_fast.evaluation.retrieval import retrieval_scores
from clinvla_fast.evaluation.subject import Subject
from clinvla_fast.interrupts import interruptible, interrupts
from clinvla_fast.modeling import attention
from training.console import load_model
from training.pretrain import Job, main
from training.settings import parse

SMALL = ["--epochs", "3", "--towers.epochs", "1", "--batch-size", "16", "--towers.batch-size", "16", "--device", "cpu"]
ROOT = Path(__file__).parents[2]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "training.pretrain", *arguments]


def error_of(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    """The one error that a failing command prints."""
    with pytest.raises(SystemExit) as stopped:
        main([*SMALL, *arguments])
    lines = capsys.readouterr().err.strip().splitlines()
    lines = [line for line in lines if not line.startswith("attention on ")]  # where it came to that
    assert stopped.value.code == 2
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize("blocks", ["x", "3-1", "1,,2", "-2"])
def test_adapter_blocks_that_are_none(capsys, tmp_path, blocks):
    error = error_of(capsys, "--out", str(tmp_path / "run"), f"--adapter-blocks={blocks}")
    assert f"--adapter-blocks is '{blocks}': expected numbers and ranges, as 8-11 or 2,5,8-11" in error


@pytest.mark.parametrize("given", [(), ("vision",), ("vision", "text")])
def test_adapter_blocks_that_the_towers_lack(capsys, tmp_path, tiny_towers, given):
    """Said at once: nothing is made before. The report tower has two blocks, the image tower three."""
    towers = [x for kind in given for x in (f"--{kind}-tower", str(tiny_towers[kind]))]
    error = error_of(capsys, "--out", str(tmp_path / "run"), "--adapter-blocks", "1-2", *towers)
    assert "adapter blocks are 1, 2: expected some of 0 to 1, which the towers have" in error
    assert not (tmp_path / "run").exists()


def test_fp8_without_a_gpu(capsys, tmp_path):
    assert "the device is cpu: leave --fp8 out" in error_of(capsys, "--out", str(tmp_path / "run"), "--fp8")


@pytest.mark.parametrize(
    ("sizes", "held_out", "expected"),
    [
        (["--batch-size", "16"], 64, (False, False)),
        (["--batch-size", "16"], 129, (False, True)),
        (["--batch-size", "17", "--chunk", "8"], 1, (True, True)),
        (["--batch-size", "16", "--chunk", "8"], 63, (False, False)),
        (["--batch-size", "4", "--chunk", "1"], 2, (True, False)),
    ],
)
def test_batches_of_one_study_are_foreseen(tmp_path, sizes, held_out, expected):
    job = Job(parse([*sizes, "--out", str(tmp_path / "run")]), torch.device("cpu"))
    assert job.of_one_study({"counts": {"splits": {"train": 100, "test": held_out}}}, {"validate", "test"}) == expected


def test_attention_that_cannot_run_is_refused_at_once(capsys, tmp_path):
    out = ["--out", str(tmp_path / "run")]
    said = "xformers attention was asked for, but it needs a GPU and the tensors are on cpu"
    assert said in error_of(capsys, *out, "--attention", "xformers")
    with attention.use("xformers"):  # as CLINVLA_ATTENTION has it
        assert said in error_of(capsys, *out)
    assert not (tmp_path / "run").exists()


def test_summary(finished_run):
    summary = json.loads((finished_run / "summary.json").read_text())
    model = ClinVLA.from_pretrained(finished_run)
    held_out = json.loads((finished_run / "data" / "manifest.json").read_text())["counts"]["splits"]["test"]
    for way in ("text_to_image", "image_to_text"):
        scores = summary["retrieval"][way]
        assert set(scores) == {"precision@5", "precision@5_chance", "recall@10", "recall@10_chance"}
        assert scores["recall@10_chance"] == pytest.approx(10 / held_out)
        assert all(0 <= score <= 1 for score in scores.values())
    assert summary["params"]["total"] == sum(x.numel() for x in model.state_dict().values())
    assert summary["params"]["trainable"] == sum(
        p.numel() for p in load_file(finished_run / "adapters.safetensors").values()
    )
    assert summary["flops_per_sample"] > summary["flops_per_training_sample"] / 3 > 0
    assert summary["seconds"] > 0


def test_what_a_run_leaves(finished_run):
    names = {path.name for path in finished_run.iterdir()}
    assert {"run.json", "config.json", "metrics.jsonl", "curves.png", "tensorboard", "towers", "data"} <= names
    assert not any(name.startswith(".") or name == "checkpoints" for name in names)
    assert (finished_run / "curves.png").read_bytes().startswith(b"\x89PNG")
    metrics = [json.loads(line) for line in (finished_run / "metrics.jsonl").read_text().splitlines()]
    assert [m["stage"] for m in metrics] == sorted((m["stage"] for m in metrics), reverse=True)  # towers, then align
    assert any("image_rank" in m for m in metrics) and any("text_to_image/recall@10" in m for m in metrics)


def test_the_same_command_gives_the_same_numbers(finished_run, tmp_path):
    main([*SMALL, "--patients", "70", "--out", str(tmp_path / "again")])
    first, again = (json.loads((run / "summary.json").read_text()) for run in (finished_run, tmp_path / "again"))
    assert first["retrieval"] == again["retrieval"]
    ours, theirs = (load_file(run / "adapters.safetensors") for run in (finished_run, tmp_path / "again"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("stage", ["towers", "align"])
def test_interrupted_and_resumed_is_the_same(finished_run, tmp_path, stage):
    out = tmp_path / "run"
    arguments = [*SMALL, "--data", str(finished_run / "data"), "--out", str(out)]
    log = (tmp_path / "log").open("w")
    process = subprocess.Popen(command(*arguments), cwd=ROOT, stdout=log, stderr=log)
    deadline = time.monotonic() + 240
    while not list(out.glob(f"checkpoints/*.{stage}-*.pt")):
        assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    printed = " ".join((tmp_path / "log").read_text().split())
    assert "--resume" in printed and "Traceback" not in printed
    main(["--resume", "--out", str(out)])
    ours, theirs = (load_file(run / "adapters.safetensors") for run in (finished_run, out))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    ours, theirs = ((run / "metrics.jsonl").read_text().splitlines() for run in (finished_run, out))
    assert ours == theirs


def test_an_interrupt_swallowed_between_stages_stops_the_next():
    with interruptible():
        with suppress(KeyboardInterrupt):  # as a library's bare `except:` does
            signal.raise_signal(signal.SIGINT)
        with interrupts() as interrupted:
            assert interrupted()
    with interruptible(), interrupts() as interrupted:
        assert not interrupted()
        signal.raise_signal(signal.SIGTERM)
        assert interrupted()


def test_an_interrupt_in_a_destructor_is_not_printed(capsys):
    class Interrupted:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    class Broken:
        def __del__(self):
            raise ValueError("broken")

    before = sys.unraisablehook
    sys.unraisablehook = sys.__unraisablehook__  # pytest's own collects them
    try:
        with interruptible():
            Interrupted()
            Broken()
            with interrupts() as interrupted:
                assert interrupted()
    finally:
        sys.unraisablehook = before
    printed = capsys.readouterr().err
    assert "KeyboardInterrupt" not in printed and "ValueError: broken" in printed


def test_resuming_a_finished_run_only_reports(finished_run, capsys):
    before = (finished_run / "adapters.safetensors").stat().st_mtime_ns
    main(["--resume", "--out", str(finished_run)])
    assert "is finished" in capsys.readouterr().out
    assert (finished_run / "adapters.safetensors").stat().st_mtime_ns == before


def test_cosine_objective_runs_and_its_collapse_is_told(finished_run, tmp_path, capsys):
    out = tmp_path / "run"
    towers = ["--vision-tower", str(finished_run / "towers/vision"), "--text-tower", str(finished_run / "towers/text")]
    main(
        [
            *SMALL,
            "--epochs",
            "30",
            "--objective",
            "cosine",
            "--data",
            str(finished_run / "data"),
            *towers,
            "--out",
            str(out),
        ]
    )
    assert json.loads((out / "summary.json").read_text())["collapsed"] is True
    assert "collapse" in capsys.readouterr().out
    assert not (out / "towers").exists()  # those given were used


def test_an_adaptor_run_is_evaluated_as_it_was_when_it_ended(finished_run, tmp_path):
    out, data = tmp_path / "run", finished_run / "data"
    towers = ["--vision-tower", str(finished_run / "towers/vision"), "--text-tower", str(finished_run / "towers/text")]
    main([*SMALL, "--method", "adaptor", "--max-tokens", "20", "--data", str(data), *towers, "--out", str(out)])
    model = load_model(out, "cpu")
    assert model.max_tokens == 20  # fewer than the tower reads
    subject = Subject(out, model, data, "test")
    found, labels = subject.embedded, [study.labels for study in subject.studies]
    assert len(found.paired) == len(labels)
    retrieval = json.loads((out / "summary.json").read_text())["retrieval"]
    assert retrieval["text_to_image"] == pytest.approx(retrieval_scores(found.text, found.image, labels), abs=1e-5)
    assert retrieval["image_to_text"] == pytest.approx(retrieval_scores(found.image, found.text, labels), abs=1e-5)
    embed(model, data, tmp_path / "embedded", split="test")
    collection = Collection(tmp_path / "embedded")
    collection.check_model(load_model(out, "cpu"))
    with pytest.raises(DataError, match="embedded by another model"):
        collection.check_model(ClinVLA.from_pretrained(finished_run))
    hits = collection.search(model.encode_reports(["Large pleural effusion."]), k=3)
    assert len(hits[0]) == 3
    half = load_model(out, "cpu", "bfloat16")
    assert half.vision.dtype == half.text.dtype == torch.bfloat16
    texts = ["Large pleural effusion.", "The lungs are clear."]
    torch.testing.assert_close(half.encode_reports(texts), model.encode_reports(texts), rtol=0, atol=5e-2)


@pytest.mark.parametrize(("given", "made", "learned"), [("vision", "text", "word"), ("text", "vision", "image")])
def test_of_two_towers_the_missing_one_alone_is_made(finished_run, tiny_towers, tmp_path, given, made, learned):
    out, tower = tmp_path / "run", ["--epochs", "1", f"--{given}-tower", str(tiny_towers[given])]
    main([*SMALL, *tower, "--data", str(finished_run / "data"), "--out", str(out)])
    assert [path.name for path in (out / "towers").iterdir()] == [made]
    config = json.loads((out / "config.json").read_text())
    assert (config[made], Path(config[given])) == (f"towers/{made}", tiny_towers[given].resolve())
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert all(set(line) == {"stage", "step", "lr", "loss", learned} for line in lines if line["stage"] == "towers")
    assert lines[0]["stage"] == "towers"


class TestBadInput:
    def test_no_such_data(self, tmp_path, capsys):
        assert "no such directory" in error_of(capsys, "--data", str(tmp_path / "none"), "--out", str(tmp_path / "run"))
        assert not (tmp_path / "run").exists()

    def test_a_folder_that_was_not_prepared(self, tmp_path, capsys):
        assert "manifest.json" in error_of(capsys, "--data", str(tmp_path), "--out", str(tmp_path / "run"))

    @pytest.mark.parametrize("size", [0, 10240])
    def test_an_empty_shard(self, finished_run, tmp_path, capsys, size):
        data = shutil.copytree(finished_run / "data", tmp_path / "data")
        (data / "train-000000.tar").write_bytes(bytes(size))
        message = error_of(capsys, "--data", str(data), "--out", str(tmp_path / "run"))
        assert str(data) in message and "train" in message

    def test_a_damaged_image_in_a_shard(self, finished_run, tmp_path, capsys):
        data = shutil.copytree(finished_run / "data", tmp_path / "data")
        tar = data / "train-000000.tar"
        content = bytearray(tar.read_bytes())
        start = content.index(b"\xff\xd8\xff")
        content[start : start + 400] = bytes(400)
        tar.write_bytes(content)
        message = error_of(capsys, "--data", str(data), "--out", str(tmp_path / "run"))
        assert str(data) in message and "phantom-" not in message

    def test_unknown_preset(self):
        done = subprocess.run(command("--preset", "huge"), cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2 and "tiny" in done.stderr and "base" in done.stderr
        assert "Traceback" not in done.stderr

    def test_base_towers_absent_and_offline(self, finished_run, tmp_path):
        arguments = command("--preset", "base", "--data", str(finished_run / "data"), "--out", str(tmp_path / "run"))
        offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
        done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, env=offline)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
        assert "--vision-tower" in done.stderr

    def test_a_text_tower_that_is_none(self, finished_run, tmp_path, capsys):
        towers = ["--vision-tower", str(finished_run / "towers/vision"), "--text-tower", str(tmp_path)]
        arguments = ["--preset", "base", "--data", str(finished_run / "data"), "--out", str(tmp_path / "run"), *towers]
        assert "expected a bert" in error_of(capsys, *arguments)

    def test_an_output_that_is_taken(self, tmp_path, capsys):
        (tmp_path / "letter").write_text("dear")
        assert "not empty" in error_of(capsys, "--out", str(tmp_path))
        assert [p.name for p in tmp_path.iterdir()] == ["letter"]

    def test_an_output_that_cannot_be_written(self, tmp_path, capsys):
        (tmp_path / "file").write_text("")
        assert str(tmp_path / "file") in error_of(capsys, "--out", str(tmp_path / "file" / "run"))

    def test_a_full_disk(self, finished_run, tmp_path):
        def small_files():
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))

        arguments = command(*SMALL, "--data", str(finished_run / "data"), "--out", str(tmp_path / "run"))
        done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, preexec_fn=small_files)
        assert done.returncode == 2, done.stderr
        said, error = done.stderr.splitlines()
        assert said.startswith("attention on cpu") and error.startswith("error: ")
        assert not [p for p in (tmp_path / "run").rglob("*") if p.name.startswith(".")]

    def test_nothing_to_resume(self, tmp_path, capsys):
        assert "no run to resume" in error_of(capsys, "--resume", "--out", str(tmp_path))

    def test_damaged_checkpoints(self, finished_run, tmp_path, capsys):
        run = shutil.copytree(finished_run, tmp_path / "run")
        (run / "summary.json").unlink()
        (run / "checkpoints").mkdir()
        (run / "checkpoints" / f"000001.align-00000004.{'0' * 64}.pt").write_bytes(b"not a checkpoint")
        assert "all checkpoints are damaged" in error_of(capsys, "--resume", "--out", str(run))

    def test_too_few_studies(self, finished_run, tmp_path, capsys):
        data = ["--data", str(finished_run / "data"), "--batch-size", "5000"]
        assert "at least one batch" in error_of(capsys, *data, "--out", str(tmp_path / "run"))
        assert {path.name for path in (tmp_path / "run").iterdir()} == {"run.json"}  # no tower was made before
