"""A pretraining step of the tiny preset, on batches of its own loader: against the same formulas written plainly, which
embed every patch and pad reports; masked against whole; compiled; and a short real run of it.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean

import pytest
import torch
from torch import Tensor, nn

from bench.measure import peak_memory
from bench.phantoms import TINY, phantoms, repeated, tiny_model
from bench.plain import PlainBatch, PlainClinVLA
from clinvla_fast import ClinVLA, StudyBatch, ops
from clinvla_fast.cost import training_flops
from clinvla_fast.data.loader import StudyLoader
from clinvla_fast.fit import fit
from clinvla_fast.methods import METHODS
from clinvla_fast.modeling.model import parameter_groups
from clinvla_fast.presets import PRESETS
from clinvla_fast.pretraining import Align, compile_tower_blocks, warm_up
from clinvla_fast.run import Run

OPTIMIZATION = PRESETS["tiny"].fit("clinvla", METHODS["clinvla"]).optimization
SEED = 0


def loader(data: Path, model: ClinVLA, checkpoint: str | None = None) -> StudyLoader:
    sizes = {"image_size": model.training_size, "max_tokens": model.max_tokens, "batch_size": OPTIMIZATION.batch_size}
    return StudyLoader(data, "train", model.tokenizer, train=True, checkpoint=checkpoint, **sizes)


@pytest.fixture(scope="module")
def model() -> ClinVLA:
    return tiny_model(phantoms(TINY))


@pytest.fixture(scope="module")
def batch(model: ClinVLA) -> StudyBatch:
    return next(iter(loader(phantoms(TINY), model)))


def step_of(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    """Loss, gradients, their norm clipped, AdamW; weights stay as they are, so that all turns are alike."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0, weight_decay=0, fused=True)

    def step() -> None:
        loss().backward()
        nn.utils.clip_grad_norm_(trained, OPTIMIZATION.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def masked(model: ClinVLA, batch: StudyBatch) -> Tensor:
    return model.objective(model(batch, SEED))["loss"]


def whole(model: ClinVLA, batch: StudyBatch) -> Tensor:
    return model.objective(model(batch))["loss"]


@pytest.fixture(scope="module")
def steps(model: ClinVLA, batch: StudyBatch) -> dict[str, Callable[[], None]]:
    plain = PlainClinVLA(model)
    padded = PlainBatch.of(batch.images, batch.present, batch.tokens, batch.lengths, [])
    patches = model.vision.patches
    kept = ops.draw_kept_patches(batch.present, patches, round(model.recipe.keep * patches), SEED)[0]
    found = []
    for loss, of in (partial(plain.loss, padded, kept), plain.model), (partial(masked, model, batch), model):
        (value := loss()).backward()
        found.append({"loss": value.detach()} | {name: p.grad for name, p in of.trainable().items()})
        of.zero_grad(set_to_none=True)
    right, actual = found
    for name, x in actual.items():
        torch.testing.assert_close(x, right[name], rtol=1e-3, atol=1e-3 * float(right[name].abs().max()))
    return {
        "plain": step_of(plain, partial(plain.loss, padded, kept)),
        "whole": step_of(model, partial(whole, model, batch)),
        "ours": step_of(model, partial(masked, model, batch)),
    }


def test_step(measured, steps):
    taken = measured.turns(steps, rounds=11)
    measured.faster("than the plain formulas", taken["plain"], taken["ours"])
    measured.faster("masked than whole", taken["whole"], taken["ours"])


def test_memory(measured, steps):
    held = {name: peak_memory(step) for name, step in steps.items()}
    measured.figure("bytes_held", held)
    measured.ratio("less than the plain formulas", held["plain"] / held["ours"])
    measured.ratio("masked less than whole", held["whole"] / held["ours"])


def test_compiled(measured, model, batch):
    torch._dynamo.reset()
    compiled = copy.deepcopy(model)
    compile_tower_blocks(compiled.vision, compiled.text)
    warm_up(Align(compiled, OPTIMIZATION, SEED, pytest.fail), batch)
    runs = {"not compiled": step_of(model, partial(masked, model, batch))}
    runs["ours"] = step_of(compiled, partial(masked, compiled, batch))
    taken = measured.turns(runs, rounds=11)
    measured.faster("than not compiled", taken["not compiled"], taken["ours"])


class Watched(Run):
    """Keeps what is shown of a run's speed."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.speeds: list[dict[str, float]] = []

    def show(self, stage: str, step: int, **values: float) -> None:
        super().show(stage, step, **values)
        if "share_of_peak" in values:
            self.speeds.append(values)


def test_epoch(measured, model, tmp_path):
    """The second one, of steps enough to be shown twice: in the first, shards are opened and films decoded."""
    data, stage = repeated(phantoms(TINY), 2), Align(copy.deepcopy(model), OPTIMIZATION, SEED, pytest.fail)
    stage.flops = training_flops(stage.model)
    run, groups = Watched(tmp_path), parameter_groups(stage.model.trainable(), OPTIMIZATION)
    settings = replace(OPTIMIZATION, epochs=2)
    done = fit(run, stage, groups, partial(loader, data, model), settings, dtype=torch.float32)
    run.close()
    assert done["skipped"] == 0
    for name in ("share_of_peak", "data_wait_share"):
        measured.figure(name, round(fmean(speeds[name] for speeds in run.speeds[-2:]), 4))
