"""The techniques one at a time: times faster than timm and transformers, each with all that come before it."""

from statistics import median

import pytest
import torch

from bench.towers import plain_towers
from bench.waterfall import Run, waterfall


def closeness(run: Run) -> float:
    """How far from another's a run's tokens, or its loss, may be, as a share."""
    if run.how.float8:
        return 0.1
    return 0.03 if run.how.dtype == torch.bfloat16 else 1e-3


def measure(measured, steps: dict[str, Run], rounds: int) -> None:
    """All in turns; the time is that of a study."""
    before, expected = None, ()
    for name, run in steps.items():
        found = [x.double().clone() for x in run()]
        if before is not None and (run.how.masked, run.how.studies) == (before.how.masked, before.how.studies):
            for actual, right in zip(found, expected, strict=True):
                far = (actual - right).norm() / right.norm()
                assert far <= closeness(run), f"{name}: {far:.1e} from the step before"
        before, expected = run, found
    taken = measured.turns(steps, rounds, begun=not measured.on_gpu)
    of_a_study = {name: [t / run.how.studies for t in taken[name]] for name, run in steps.items()}
    first, *others = of_a_study
    for number, name in enumerate(others, 1):
        measured.faster(f"{number} {name}", of_a_study[first], of_a_study[name])
    measured.figure("order", list(steps))
    if measured.on_gpu:
        measured.figure("seconds_a_study", {name: median(t) for name, t in of_a_study.items()})


def test_encoding(measured):
    measure(measured, dict(waterfall(plain_towers(), studies=1, training=False)), rounds=5)


def test_pretraining_step(measured):
    measure(measured, dict(waterfall(plain_towers(), studies=2, training=True)), rounds=1)


@pytest.mark.gpu
@pytest.mark.parametrize("studies", [1, 64])
def test_encoding_on_a_gpu(measured, studies):
    torch._dynamo.reset()
    measure(measured, dict(waterfall(plain_towers().cuda(), studies, training=False)), rounds=20)


@pytest.mark.gpu
def test_pretraining_step_on_a_gpu(measured):
    torch._dynamo.reset()
    measure(measured, dict(waterfall(plain_towers().cuda(), studies=64, training=True)), rounds=8)
