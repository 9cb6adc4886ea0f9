"""Checkpoints: whatever is cut off or flipped in one is noticed, and the one before is used."""

import json
import random
import resource
import shutil
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

from clinvla_fast.errors import DataError
from clinvla_fast.run import Run, random_states, set_random_states

PLACES = 100


def content(path: Path) -> dict[str, bytes]:
    """Every file under a folder but TensorBoard's, whose names hold the time."""
    files = (file for file in path.rglob("*") if file.is_file() and "tensorboard" not in file.parts)
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def checkpoints(path: Path) -> list[Path]:
    """The oldest first."""
    return sorted((path / "checkpoints").glob("*.pt"))


def weights(step: int) -> dict[str, torch.Tensor]:
    return {"layer.weight": torch.randn(40, 40, generator=torch.Generator().manual_seed(step))}


def train(run: Run, stage: str, steps: range, save_at: tuple[int, ...] = ()) -> None:
    """What `fit` does to a run."""
    for step in steps:
        run.log(stage, step, loss=1 / step, lr=0.1 * step)
        if step in save_at:
            run.save_state(stage, step, model=weights(step), random=random_states(), loader=f"[0, {step}]")


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory) -> Path:
    """The folder of a run that was ended in its eighth step; its checkpoints are of the third and the sixth."""
    path = tmp_path_factory.mktemp("two")
    with closing(Run(path)) as run:
        train(run, "align", range(1, 9), save_at=(3, 6))
    return path


@pytest.fixture
def folder(two_checkpoints, tmp_path) -> Path:
    return shutil.copytree(two_checkpoints, tmp_path / "run")


def flipped(content: bytes, at: int, bit: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :]


def damages(content: bytes) -> Iterator[tuple[str, bytes]]:
    """What a file may hold after an accident, with words for it."""
    chance, size = random.Random(0), len(content)
    for length in [0, 1, size - 1, *(chance.randrange(size) for _ in range(PLACES // 2 - 3))]:
        yield f"cut to {length} bytes", content[:length]
    for at in [0, size - 1, *(chance.randrange(size) for _ in range(PLACES // 2 - 2))]:
        bit = chance.randrange(8)
        yield f"bit {bit} of byte {at} flipped", flipped(content, at, bit)


def test_a_checkpoint_damaged_anywhere_is_noticed_and_the_one_before_is_used(two_checkpoints, tmp_path):
    damaged = list(damages(checkpoints(two_checkpoints)[1].read_bytes()))
    assert len(damaged) == PLACES
    for number, (words, content) in enumerate(damaged):
        folder = shutil.copytree(two_checkpoints, tmp_path / str(number))
        newest = checkpoints(folder)[1]
        newest.write_bytes(content)
        with closing(Run(folder)) as run:
            assert run.damaged == [newest], words
            assert run.state["step"] == 3 and torch.equal(run.state["model"]["layer.weight"], *weights(3).values())
            assert [line["step"] for line in run.read_metrics()] == [1, 2, 3], words
        shutil.rmtree(folder)


def test_an_undamaged_checkpoint_is_as_it_was_written(folder):
    with closing(Run(folder)) as run:
        assert run.damaged == [] and run.state["step"] == 6 and run.state["loader"] == "[0, 6]"
        assert torch.equal(run.state["model"]["layer.weight"], *weights(6).values())
        assert [line["step"] for line in run.read_metrics()] == [1, 2, 3, 4, 5, 6]


def test_all_damaged_is_an_error_that_names_the_folder(folder):
    for path in checkpoints(folder):
        path.write_bytes(path.read_bytes()[:-1])
    before = content(folder)
    with pytest.raises(DataError, match="000002, 000001") as error:
        Run(folder)
    assert str(folder / "checkpoints") in str(error.value)
    assert content(folder) == before  # what could perhaps be saved is not touched


def test_a_damaged_checkpoint_does_not_take_a_good_ones_place(folder):
    newest = checkpoints(folder)[1]
    newest.write_bytes(b"")
    with closing(Run(folder)) as run:
        train(run, "align", range(4, 5), save_at=(4,))
    checkpoints(folder)[-1].write_bytes(b"")  # now this one too
    with closing(Run(folder)) as run:
        assert run.state["step"] == 3


def test_two_are_kept(tmp_path):
    with closing(Run(tmp_path)) as run:
        train(run, "towers", range(1, 6), save_at=(1, 2, 3, 4, 5))
        run.save_state("align", 1)  # fewer steps, and a name that comes before: still the newest
    assert [path.name.split(".")[:2] for path in checkpoints(tmp_path)] == [
        ["000005", "towers-00000005"],
        ["000006", "align-00000001"],
    ]
    with closing(Run(tmp_path)) as run:
        assert (run.state["stage"], run.state["step"]) == ("align", 1)
        run.save_state("align", 2)
    assert [path.name[:6] for path in checkpoints(tmp_path)] == ["000006", "000007"]


def test_what_a_killed_process_was_writing_is_neither_read_nor_kept(folder):
    newest = checkpoints(folder)[1]
    for number in (3, 4):
        half = newest.with_name(f".00000{number}.align-00000009.{'0' * 64}.pt.partial")
        half.write_bytes(newest.read_bytes()[:100])
    with closing(Run(folder, write=False)) as run:
        assert run.state["step"] == 6 and not run.damaged
    assert len(list((folder / "checkpoints").iterdir())) == 4  # only the first process cleans up
    with closing(Run(folder)) as run:
        assert run.state["step"] == 6 and not run.damaged
    assert sorted((folder / "checkpoints").iterdir()) == checkpoints(folder)


def test_metrics_after_the_last_checkpoint_are_forgotten(folder):
    with closing(Run(folder)) as run:
        train(run, "align", range(7, 10))
        assert [line["step"] for line in run.read_metrics()] == list(range(1, 10))
        run.save_state("align", 9)
        run.log("align", 10, loss=0.5)
    with closing(Run(folder)) as run:
        assert [line["step"] for line in run.read_metrics()] == list(range(1, 10))


@pytest.mark.parametrize("known", [6, 7])
def test_a_line_that_was_cut_off_does_not_spoil_the_next(folder, known):
    with closing(Run(folder)) as run:
        train(run, "align", range(7, known + 1), save_at=(known,))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "align", "st')
    with closing(Run(folder)) as run:
        train(run, "align", range(known + 1, 9))
        assert [line["step"] for line in run.read_metrics()] == list(range(1, 9))
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 9))


def test_skipped_batches_after_the_last_checkpoint_are_forgotten_too(tmp_path):
    with closing(Run(tmp_path)) as run:
        run.note_skipped("align", 1, ["a"])
        run.save_state("align", 2)
        run.note_skipped("align", 3, ["b"])
    with closing(Run(tmp_path)) as run:
        path = run.note_skipped("align", 3, ["b"])  # as the resumed run comes by again
    assert [json.loads(line)["ids"] for line in path.read_text().splitlines()] == [["a"], ["b"]]


def on_tensorboard(path: Path) -> dict[str, list[int]]:
    """The steps that TensorBoard shows of each curve, by its folder and name."""
    shown = EventMultiplexer()
    shown.AddRunsFromDirectory(str(path / "tensorboard"))
    shown.Reload()
    return {
        f"{run}/{tag}": [event.step for event in shown.Scalars(run, tag)]
        for run, tags in shown.Runs().items()
        for tag in tags["scalars"]
    }


def test_tensorboard_shows_each_step_once(tmp_path):
    for work in (
        lambda run: train(run, "towers", range(1, 4)),  # is ended before its first checkpoint
        lambda run: (train(run, "towers", range(1, 10), save_at=(5, 9)), train(run, "align", range(1, 3))),
        lambda run: train(run, "align", range(1, 7), save_at=(4,)),
        lambda run: train(run, "align", range(5, 8)),
    ):
        time.sleep(1 - time.time() % 1)  # TensorBoard's files are ordered by the second
        with closing(Run(tmp_path)) as run:
            work(run)
    shown = on_tensorboard(tmp_path)
    assert shown["towers/loss"] == list(range(1, 10))
    assert shown["align/loss"] == shown["align/lr"] == list(range(1, 8))


def test_what_a_checkpoint_knows_is_on_tensorboard_however_the_process_ends(tmp_path):
    run = Run(tmp_path)
    train(run, "align", range(1, 3), save_at=(2,))
    shutil.copytree(tmp_path / "tensorboard", tmp_path / "now" / "tensorboard")
    run.close()
    assert on_tensorboard(tmp_path / "now")["align/loss"] == [1, 2]


def drawn() -> list:
    return [torch.rand(3).tolist(), torch.randn(1).item(), random.random(), random.gauss(0, 1), *np.random.rand(3)]


def test_random_states_go_through_a_checkpoint(tmp_path):
    random.gauss(0, 1)  # of two that it draws, one is left in the state
    np.random.standard_normal()
    with closing(Run(tmp_path)) as run:
        run.save_state("align", 1, random=random_states())
    expected = drawn(), np.random.standard_normal()
    drawn()
    with closing(Run(tmp_path, write=False)) as run:
        set_random_states(run.state["random"])
    assert (drawn(), np.random.standard_normal()) == expected


def test_a_full_disk_leaves_the_last_good_ones(folder):
    before = content(folder)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with closing(Run(folder)) as run:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
        try:
            with pytest.raises(OSError):
                run.save_state("align", 7, model={"weight": torch.zeros(100_000)})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    after = content(folder)
    assert {name for name in after if "checkpoints" in name} == {name for name in before if "checkpoints" in name}
    with closing(Run(folder)) as run:
        assert run.state["step"] == 6 and not run.damaged


def test_only_the_first_process_writes(folder):
    before = content(folder)
    with closing(Run(folder, write=False)) as run:
        assert run.state["step"] == 6
        train(run, "align", range(7, 9), save_at=(8,))
        run.show("align", 8, speed=1.0)
        assert run.note_skipped("align", 8, ["a"]) == folder / "skipped.jsonl"
        run.write_card("done")
        run.clear_state()
    assert content(folder) == before
    assert run.state is None


def test_time_goes_on_and_checkpoints_go_in_the_end(folder):
    with closing(Run(folder)) as run:
        assert run.seconds >= run.state["seconds"] > 0
        run.clear_state()
        assert run.state is None and not (folder / "checkpoints").exists()
        assert len(run.read_metrics()) == 6
