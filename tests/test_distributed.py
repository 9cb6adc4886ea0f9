"""N processes give the loss and the gradients of one, for every method, also where a batch cannot be cut evenly."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from clinvla_fast.methods import METHODS
from clinvla_fast.presets import PRESETS

HERE = Path(__file__).parent
MODELS = [name for name, method in METHODS.items() if not method.recipe.fusion]
# 8 studies: parts of 2, 3 and 3 for three processes. The first has no view, so the first of three processes has one
# study to align; the views and the reports' lengths differ.
PRESENT = [
    [0, 0, 0, 0],
    [1, 1, 0, 0],
    [1, 0, 1, 0],
    [1, 1, 1, 1],
    [1, 0, 0, 0],
    [1, 1, 0, 0],
    [1, 1, 1, 0],
    [1, 0, 0, 1],
]
LENGTHS = [7, 9, 5, 12, 2, 8, 20, 6]  # the fifth has no word
CHUNKED = ("clinvla", "alta", "mrm")
# Adaptor: tokens of each study's image, and words. The first of three processes has one pair, or none.
TOKENS = {
    "adaptor": ([3, 5, 0, 2, 7, 4, 1, 6], [4, 0, 5, 2, 3, 0, 6, 2]),
    "adaptor, none on a rank": ([0, 5, 4, 2, 7, 4, 1, 6], [4, 0, 5, 2, 3, 1, 6, 2]),
}


def of_method(name):
    """A method's recipe at the tiny preset's size, and smaller."""
    return vars(PRESETS["tiny"].fit(name, METHODS[name]).recipe) | {"width": 16, "bottleneck": 8}


def features(image, text):
    """What the towers of Adaptor gave for studies of so many tokens, in float64 and padded."""
    generator, found = torch.Generator().manual_seed(0), {}
    for side, lengths, width in (("image", image, 6), ("text", text, 10)):
        found[side] = torch.randn(len(lengths), max(lengths), width, generator=generator, dtype=torch.float64)
        found[f"{side}_mask"] = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return {"features": found, "widths": (6, 10)}


@pytest.fixture(scope="module")
def found(tmp_path_factory, tiny_towers, make_batch):
    """What one, two and three processes make of every job: by job and number of processes, a result a process."""
    folder = tmp_path_factory.mktemp("jobs")
    towers = {kind: str(path) for kind, path in tiny_towers.items()}
    jobs = {name: {"recipe": of_method(name)} for name in MODELS}
    jobs |= {f"{name} in chunks": {"recipe": of_method(name), "chunk": 2} for name in CHUNKED}
    for name in ("clinvla", "convirt"):  # the first of three processes has nothing to align
        views = [[0, 0, 0, 0], [0, 1, 0, 0] if name == "convirt" else [0, 0, 0, 0], *PRESENT[2:]]
        jobs[f"{name}, none on a rank"] = {"recipe": of_method(name), "present": views}
    jobs["clinvla in chunks, none on a rank"] = jobs["clinvla, none on a rank"] | {"chunk": 2}
    jobs["cosine"] = {"recipe": of_method("clinvla") | {"objective": "cosine"}}
    jobs["towers"] = {"recipe": of_method("clinvla"), "masked_modeling": True}
    bare = {"present": [[0, 0, 0, 0]] * 2 + PRESENT[2:], "lengths": [2, 2, *LENGTHS[2:]]}  # no view, no word on a rank
    jobs["towers, none on a rank"] = jobs["towers"] | bare
    jobs["sent"] = {
        "recipe": of_method("clinvla"),
        "dtype": "float32",
        "present": [[1, 1, 0, 0]] * 6,
        "lengths": [9] * 6,
    }
    for name, job in jobs.items():
        batch = make_batch(job.pop("present", PRESENT), job.pop("lengths", LENGTHS))
        fields = {field: getattr(batch, field) for field in ("images", "present", "tokens", "lengths")}
        defaults = {"batch": fields, "chunk": None, "masked_modeling": False, "dtype": "float64"}
        (folder / name).mkdir()
        torch.save(towers | defaults | job, folder / name / "job.pt")
    for name, lengths in TOKENS.items():
        (folder / name).mkdir()
        torch.save(features(*lengths) | {"dtype": "float64"}, folder / name / "job.pt")
    for processes in (1, 2, 3):
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        arguments = [*(torchrun if processes > 1 else []), str(HERE / "distributed_worker.py"), str(folder)]
        done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=HERE.parent)
        assert done.returncode == 0, done.stderr[-5000:]

    def results(name, processes):
        return [torch.load(folder / name / f"{processes}-{r}.pt", weights_only=True) for r in range(processes)]

    return results


def check_same(alone, several):
    for one in several:
        assert one["loss"] == pytest.approx(alone["loss"], rel=1e-9)
        assert one["gradients"].keys() == alone["gradients"].keys()
        for name, expected in alone["gradients"].items():
            difference = (one["gradients"][name] - expected).abs().max()
            assert difference <= 1e-8 * expected.abs().max() + 1e-12, (name, difference)


@pytest.mark.parametrize(
    "name",
    [
        *MODELS,
        *(f"{name}, none on a rank" for name in ("clinvla", "convirt")),
        "cosine",
        "towers",
        "towers, none on a rank",
        *TOKENS,
    ],
)
def test_processes_are_as_one(found, name):
    (alone,) = found(name, 1)
    assert any(gradient.abs().max() > 1e-6 for gradient in alone["gradients"].values())
    for processes in (2, 3):
        check_same(alone, found(name, processes))


@pytest.mark.parametrize("name", CHUNKED)
def test_chunks_are_as_the_whole_batch(found, name):
    (alone,) = found(name, 1)
    for processes in (1, 2, 3):
        check_same(alone, found(f"{name} in chunks", processes))


def test_chunks_where_a_rank_has_nothing_to_align(found):
    (alone,) = found("clinvla, none on a rank", 1)
    for processes in (2, 3):
        check_same(alone, found("clinvla in chunks, none on a rank", processes))


def test_what_is_sent_is_what_is_printed(found):
    for one in found("sent", 3):
        gradients = 2 * 2 / 3 * sum(g.nbytes for g in one["gradients"].values())
        assert one["sent"] + gradients == pytest.approx(one["expected"], rel=0.02)
