"""The training loop on a regression that is small enough to be written down again beside it."""

import itertools
import json
import math
import os
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clinvla_fast.errors import DataError
from clinvla_fast.fit import Schedule, Stage, fit
from clinvla_fast.pretraining import CollapseAlarm
from clinvla_fast.recipe import Optimization
from clinvla_fast.run import Run

ROWS, WIDTH = 40, 4
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(ROWS, WIDTH, generator=GENERATOR, dtype=torch.float64)
Y = X.square().sum(1, keepdim=True)
RATES = {"layer.weight": 3e-2, "layer.bias": 1e-2}
SETTINGS = {"epochs": 4, "warmup": 0.2, "clip": 1.0, "weight_decay": 0.1, "betas": (0.9, 0.95)}


@dataclass(frozen=True)
class Batch:
    rows: Tensor

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(f"study-{row}" for row in self.rows.tolist())

    def __len__(self) -> int:
        return len(self.rows)

    def to(self, device) -> "Batch":
        return self


class Rows:
    """A loader: an order of its own for each epoch. `before` is called before each batch."""

    def __init__(self, checkpoint: str | None, batch_size: int = 8, before: Callable[[], None] = lambda: None):
        self.batch_size, self._before = batch_size, before
        self._epoch, self._batch = json.loads(checkpoint) if checkpoint else (0, 0)

    def __len__(self) -> int:
        return math.ceil(ROWS / self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        order = torch.from_numpy(np.random.default_rng(self._epoch).permutation(ROWS))
        for rows in order.split(self.batch_size)[self._batch :]:
            self._before()
            self._batch += 1
            yield Batch(rows)
        self._epoch, self._batch = self._epoch + 1, 0

    def checkpoint(self) -> str:
        return json.dumps([self._epoch, self._batch])


class Line(Stage):
    """Linear regression.

    Args:
        noisy: whether a step draws from its seed and from every global generator.
        bad: what to add to the loss of a batch, by its number.
    """

    name = "line"

    def __init__(self, noisy: bool = False, bad: dict[int, Callable[[Tensor], Tensor]] | None = None):
        super().__init__(seed=7)
        self.layer, self.unused = nn.Linear(WIDTH, 1, dtype=torch.float64), nn.Linear(2, 2)
        self.unused.requires_grad_(False)
        nn.init.constant_(self.layer.weight, 0.1)
        nn.init.zeros_(self.layer.bias)
        self.noisy, self.bad, self.seen = noisy, bad or {}, 0

    def forward(self, batch: Batch, seed: int) -> dict[str, Tensor]:
        number = seed - (self.seed << 32)
        off = self.layer(X[batch.rows]) - Y[batch.rows]
        if self.noisy:
            own = torch.rand(len(batch), 1, generator=torch.Generator().manual_seed(seed))
            off = off + own + torch.randn(1) + random.gauss(0, 1) + np.random.rand()
        loss = off.square().mean()
        if number in self.bad:
            loss = loss + self.bad[number](self.layer.weight)
        return {"loss": loss, "off": off.detach().abs().mean()}

    def watch(self, step: int, steps: int) -> dict[str, float]:
        self.seen += 1
        return {"seen": self.seen}

    def state(self) -> dict:
        return {"seen": self.seen}

    def load_state(self, state: dict) -> None:
        self.seen = state["seen"]


def groups_of(layer: nn.Linear) -> list[dict]:
    return [{"params": [p], "lr": RATES[f"layer.{name}"], "weight_decay": 0.1} for name, p in layer.named_parameters()]


@dataclass
class Job:
    """A run in a folder, which may be started more than once.

    Attributes:
        scores: of each epoch, by its number; early stopping judges by the mean of two of them.
        at_epochs: the weights that each epoch was measured with.
    """

    folder: Path
    settings: dict = field(default_factory=dict)
    batch_size: int = 8
    scores: Callable[[int], float] | None = None
    at_epochs: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self):
        self.folder.mkdir(exist_ok=True)

    def run(
        self,
        stage: Line | None = None,
        before_batch: Callable[[], None] = lambda: None,
        before_measure: Callable[[], None] = lambda: None,
    ) -> dict:
        self.stage = stage or Line()

        def measure(epoch: int) -> dict[str, float]:
            before_measure()
            self.at_epochs[epoch] = self.weights
            return {"a/score": self.scores(epoch), "b/score": 0.0}

        measuring = {"measure": measure, "score": ("a/score", "b/score")} if self.scores else {}
        with closing(Run(self.folder)) as run:
            return fit(
                run,
                self.stage,
                groups_of(self.stage.layer),
                lambda checkpoint: Rows(checkpoint, self.batch_size, before_batch),
                Optimization(**SETTINGS | self.settings),
                dtype=torch.float32,
                **measuring,
            )

    @property
    def weights(self) -> Tensor:
        return torch.cat([p.detach().flatten().clone() for p in self.stage.layer.parameters()])

    @property
    def metrics(self) -> str:
        return (self.folder / "metrics.jsonl").read_text()

    @property
    def skipped(self) -> list[dict]:
        path = self.folder / "skipped.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def by_hand(
    batch_size: int = 8, accumulate: int = 1, lost: tuple[int, ...] = (), steps_of_schedule: int | None = None
) -> list[Tensor]:
    """The weights after each step, as AdamW alone finds them; `lost`: steps that are left out."""
    stage, found, loader = Line(), [], Rows(None, batch_size)
    batches = [list(loader) for _ in range(SETTINGS["epochs"])]
    grouped = [epoch[i : i + accumulate] for epoch in batches for i in range(0, len(epoch), accumulate)]
    optimizer = torch.optim.AdamW(groups_of(stage.layer), betas=(0.9, 0.95))
    steps = steps_of_schedule or len(grouped)
    rising = round(0.2 * steps)
    for step, group in enumerate(grouped):
        optimizer.zero_grad()
        for batch in group:
            (stage(batch, stage.seed << 32)["loss"] / len(group)).backward()
        nn.utils.clip_grad_norm_(stage.layer.parameters(), 1.0)
        done = (step - rising) / (steps - rising)
        factor = (step + 1) / rising if step < rising else (1 + math.cos(math.pi * done)) / 2
        for settled, rate in zip(optimizer.param_groups, RATES.values(), strict=True):
            settled["lr"] = rate * factor
        if step not in lost:
            optimizer.step()
        found.append(torch.cat([p.detach().flatten().clone() for p in stage.layer.parameters()]))
    return found


def same(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_a_schedule_rises_to_one_and_falls_to_zero():
    schedule = Schedule(100, 0.1)
    assert [schedule(step) for step in range(10)] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert schedule(10) == 1 and schedule(55) == pytest.approx(0.5) and schedule(100) == pytest.approx(0, abs=1e-12)
    assert all(a > b for a, b in itertools.pairwise(schedule(step) for step in range(10, 101)))
    assert Schedule(1, 0.05)(0) == 1


def test_steps_are_those_of_adamw(tmp_path):
    job = Job(tmp_path, scores=float)
    assert job.run() == {"steps": 20, "skipped": 0, "stopped_at": 4}
    expected = by_hand()
    same(job.weights, expected[-1])
    for epoch, weights in job.at_epochs.items():
        same(weights, expected[5 * epoch - 1])
    assert not job.stage.training and job.skipped == []
    lines = [json.loads(line) for line in job.metrics.splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [10, 20]
    assert [line["step"] for line in lines if "a/score" in line] == [5, 10, 15, 20]


@pytest.mark.parametrize(("batch_size", "accumulate"), [(8, 2), (4, 4), (10, 4)])
def test_accumulated_batches_are_one_large_batch(tmp_path, batch_size, accumulate):
    job = Job(tmp_path, {"accumulate": accumulate}, batch_size, scores=float)
    groups = math.ceil(ROWS / batch_size / accumulate)
    assert job.run() == {"steps": 4 * groups, "skipped": 0, "stopped_at": 4}
    expected = by_hand(batch_size * accumulate)  # the last of an epoch is smaller, as the last group is
    same(job.weights, expected[-1])
    for epoch, weights in job.at_epochs.items():
        same(weights, expected[groups * epoch - 1])


def test_a_schedule_may_end_later_than_training(tmp_path):
    job = Job(tmp_path, {"schedule_epochs": 10})
    job.run()
    same(job.weights, by_hand(steps_of_schedule=50)[-1])
    rates = [line["lr"] for line in map(json.loads, job.metrics.splitlines())]
    assert rates == pytest.approx([RATES["layer.bias"] * Schedule(50, 0.2)(step) for step in (9, 19)])


@pytest.mark.parametrize("lost", [(), (2, 11)])
def test_the_average_is_what_is_measured_and_what_is_left(tmp_path, lost):
    """Its decay is (1 + n) / (10 + n), after n updates, until that is what is asked for; a lost step is no update."""
    job = Job(tmp_path, {"ema": 0.5}, scores=float)
    job.run(Line(bad=dict.fromkeys(lost, NOT_FINITE["the loss is NaN"])))
    average, averages, updates = torch.tensor([0.1] * WIDTH + [0.0], dtype=torch.float64), [], 0
    for step, weights in enumerate(by_hand(lost=lost)):  # training itself is not moved by it
        if step not in lost:
            decay = (1 + updates) / (10 + updates) if updates < 8 else 0.5
            average, updates = decay * average + (1 - decay) * weights, updates + 1
        averages.append(average)
    same(job.weights, averages[-1])
    for epoch, weights in job.at_epochs.items():
        same(weights, averages[5 * epoch - 1])


@pytest.mark.parametrize("ema", [0.0, 0.8])
def test_patience_ends_training_with_the_best_weights(tmp_path, ema):
    scores = {1: 0.1, 2: 0.5, 3: 0.2, 4: 0.4, 5: 0.9}
    job = Job(tmp_path, {"epochs": 9, "patience": 2, "ema": ema}, scores=scores.get)
    assert job.run() == {"steps": 20, "skipped": 0, "stopped_at": 4}
    assert sorted(job.at_epochs) == [1, 2, 3, 4]
    assert torch.equal(job.weights, job.at_epochs[2])
    again = Job(tmp_path, job.settings, scores=scores.get)  # killed before its result was written
    assert again.run() == {"steps": 20, "skipped": 0, "stopped_at": 4}
    assert again.at_epochs == {} and torch.equal(again.weights, job.weights)


def test_the_best_weights_are_left_where_patience_lasts(tmp_path):
    scores = {1: 0.1, 2: 0.5, 3: 0.2, 4: 0.4}
    job = Job(tmp_path, {"patience": 3}, scores=scores.get)
    assert job.run()["stopped_at"] == 4
    assert torch.equal(job.weights, job.at_epochs[2])


# All that a checkpoint holds matters here: accumulation, an average, early stopping, what the stage keeps, and noise.
ALL = {"epochs": 7, "accumulate": 2, "ema": 0.8, "patience": 3}
BAD = {4: lambda weight: weight.sum() * math.nan, 13: lambda weight: weight.sum() * math.inf}


def all_of_it(folder: Path) -> Job:
    return Job(folder, ALL, scores=lambda epoch: {1: 0.1, 2: 0.5, 3: 0.3, 4: 0.6}.get(epoch, 0.0))


def scramble() -> None:
    """Another process would have other random states."""
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(int(np.random.default_rng().integers(2**31)))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> tuple[Job, dict]:
    job = all_of_it(tmp_path_factory.mktemp("fit") / "undisturbed")
    seed_all()
    done = job.run(Line(noisy=True, bad=BAD))
    assert done == {"steps": 21, "skipped": 2, "stopped_at": 7} and len(job.skipped) == 2
    return job, done


def seed_all() -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)


def interrupt_at(call: int, number: int = signal.SIGINT) -> Callable[[], None]:
    """Sends a signal in that call, counted from 0."""
    calls = itertools.count()

    def count() -> None:
        if next(calls) == call:
            os.kill(os.getpid(), number)

    return count


def check(job: Job, done: dict, undisturbed: tuple[Job, dict]) -> None:
    expected, expected_done = undisturbed
    assert done == expected_done
    assert torch.equal(job.weights, expected.weights)
    assert job.stage.seen == expected.stage.seen
    assert job.metrics == expected.metrics and job.skipped == expected.skipped


BATCHES = 7 * 5


@pytest.mark.parametrize("batch", range(BATCHES))
def test_interrupted_in_any_batch_and_resumed_is_the_same(tmp_path, undisturbed, batch):
    job = all_of_it(tmp_path)
    seed_all()
    with pytest.raises(KeyboardInterrupt):
        job.run(Line(noisy=True, bad=BAD), before_batch=interrupt_at(batch))
    steps = 3 * (batch // 5) + (batch % 5) // 2 + 1  # groups of 2, 2 and 1: the one that it fell into is finished
    with closing(Run(tmp_path, write=False)) as run:
        assert run.state["step"] == steps
    scramble()
    check(job, job.run(Line(noisy=True, bad=BAD)), undisturbed)


def test_interrupted_in_every_step_and_resumed_is_the_same(tmp_path, undisturbed):
    job, interruptions = all_of_it(tmp_path), 0
    seed_all()
    while True:
        try:
            done = job.run(Line(noisy=True, bad=BAD), before_batch=interrupt_at(0, signal.SIGTERM))
            break
        except KeyboardInterrupt:
            interruptions += 1
            scramble()
    assert interruptions == 21
    check(job, done, undisturbed)


@pytest.mark.parametrize("epoch", range(7))
def test_interrupted_while_measuring_and_resumed_is_the_same(tmp_path, undisturbed, epoch):
    job = all_of_it(tmp_path)
    seed_all()
    with pytest.raises(KeyboardInterrupt):
        job.run(Line(noisy=True, bad=BAD), before_measure=interrupt_at(epoch))
    with closing(Run(tmp_path, write=False)) as run:
        assert run.state["step"] == 3 * (epoch + 1)
    scramble()
    check(job, job.run(Line(noisy=True, bad=BAD)), undisturbed)


@pytest.mark.parametrize("kept", [1, 2])
def test_an_error_costs_what_came_after_the_last_checkpoint_alone(tmp_path, undisturbed, kept):
    """As a process that is killed: no checkpoint is written on the way out."""

    def fail() -> None:
        if next(calls) == 5 * kept + 3:
            raise OSError("the disk went away")

    calls, job = itertools.count(), all_of_it(tmp_path)
    seed_all()
    with pytest.raises(OSError):
        job.run(Line(noisy=True, bad=BAD), before_batch=fail)
    with closing(Run(tmp_path, write=False)) as run:
        assert run.state["step"] == 3 * kept
    scramble()
    check(job, job.run(Line(noisy=True, bad=BAD)), undisturbed)


NOT_FINITE = {
    "the loss is NaN": lambda weight: weight.sum() * math.nan,
    "the loss is infinite, its gradient finite": lambda weight: weight.sum() * 0 + math.inf,
    "the loss is finite, its gradient is not": lambda weight: (weight * 0).abs().sqrt().sum(),
}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("words", NOT_FINITE)
def test_a_step_that_is_not_finite_is_left_out(tmp_path, words, accumulate):
    batches = (0, 7, 8, 18) if accumulate == 1 else (2, 5, 19)  # the first or the last batch of a group, or both of one
    steps = batches if accumulate == 1 else (1, 3, 11)
    job = Job(tmp_path, {"accumulate": accumulate}, scores=float)
    done = job.run(Line(bad=dict.fromkeys(batches, NOT_FINITE[words])))
    assert done == {"steps": 20 if accumulate == 1 else 12, "skipped": len(steps), "stopped_at": 4}
    same(job.weights, by_hand(accumulate=accumulate, lost=steps)[-1])  # and so are AdamW's moments and its count
    loader = Rows(None)
    seen = [batch for _ in range(4) for batch in loader]
    groups = [epoch[i : i + accumulate] for epoch in np.arange(20).reshape(4, 5) for i in range(0, 5, accumulate)]
    assert [line["step"] for line in job.skipped] == [step + 1 for step in steps]
    assert [line["ids"] for line in job.skipped] == [
        [name for number in groups[step] for name in seen[number].ids] for step in steps
    ]


def test_measurements_of_a_step_that_is_not_finite_are_left_out(tmp_path):
    job = Job(tmp_path)
    job.run(Line(bad={9: NOT_FINITE["the loss is NaN"]}))
    lines = [json.loads(line) for line in job.metrics.splitlines()]
    assert lines[0].keys() == {"stage", "step", "lr"}  # the tenth: there is nothing to see of it, nor to watch
    assert {"loss", "off", "seen"} < lines[1].keys() and lines[1]["seen"] == 1
    assert "NaN" not in job.metrics


def test_too_many_in_a_row_end_the_run(tmp_path):
    job = Job(tmp_path, {"skip_limit": 3})
    bad = dict.fromkeys((1, 2, 4, 5, 7, 8, 9), NOT_FINITE["the loss is NaN"])
    with pytest.raises(DataError, match="3 steps in a row") as error:
        job.run(Line(bad=bad))
    assert str(tmp_path / "skipped.jsonl") in str(error.value) and "study-" not in str(error.value)
    assert [line["step"] for line in job.skipped] == [2, 3, 5, 6, 8, 9, 10]
    same(job.weights, by_hand(lost=tuple(bad))[6])
    done = job.run(Line(bad=dict.fromkeys((1, 2, 4), NOT_FINITE["the loss is NaN"])))  # goes on, once it is mended
    assert done == {"steps": 20, "skipped": 3, "stopped_at": 4}
    same(job.weights, by_hand(lost=(1, 2, 4))[-1])
    assert [line["step"] for line in job.skipped] == [2, 3, 5]


def test_the_limit_counts_through_a_resume(tmp_path):
    job = Job(tmp_path, {"skip_limit": 4})
    bad = dict.fromkeys(range(6, 20), NOT_FINITE["the loss is NaN"])
    with pytest.raises(KeyboardInterrupt):
        job.run(Line(bad=bad), before_batch=interrupt_at(7))
    with pytest.raises(DataError):
        job.run(Line(bad=bad))
    assert [line["step"] for line in job.skipped] == [7, 8, 9, 10]


def alike(n: int = 8) -> Tensor:
    return torch.ones(n, 6) + 1e-3 * torch.randn(n, 6, generator=torch.Generator().manual_seed(0))


def spread(n: int = 8) -> Tensor:
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(0))


def test_the_alarm_speaks_once_when_embeddings_stay_alike():
    warnings = []
    alarm = CollapseAlarm(warnings.append)
    for _ in range(9):
        alarm({"image": alike(), "text": spread()}, watching=False)
    for _ in range(4):
        alarm({"image": alike(), "text": spread()}, watching=True)
    alarm({"image": spread(), "text": spread()}, watching=True)
    assert not alarm.raised and not warnings
    for _ in range(9):
        found = alarm({"image": alike(), "text": spread()}, watching=True)
    assert alarm.raised and len(warnings) == 1 and "image variance 0.00" in warnings[0]
    assert found.keys() == {"image_variance", "image_rank", "text_variance", "text_rank"}


def test_the_alarm_can_end_the_run():
    alarm = CollapseAlarm(pytest.fail, stop=True)
    for _ in range(4):
        alarm({"image": alike()}, watching=True)
    with pytest.raises(DataError, match="collapse"):
        alarm({"image": alike()}, watching=True)


@pytest.mark.parametrize("heard", range(10))
def test_the_alarm_goes_on_where_it_was(heard):
    straight, resumed = [], []
    alarm = CollapseAlarm(straight.append)
    for _ in range(9):
        alarm({"image": alike()}, watching=True)
    before, after = (CollapseAlarm(resumed.append) for _ in range(2))
    for _ in range(heard):
        before({"image": alike()}, watching=True)
    after.load_state(json.loads(json.dumps(before.state())))
    for _ in range(9 - heard):
        after({"image": alike()}, watching=True)
    assert resumed == straight and after.state() == alarm.state()


class Alarmed(Line):
    """Its embeddings are alike from the start."""

    def __init__(self):
        super().__init__()
        self.alarm = CollapseAlarm(pytest.fail, stop=True)

    def watch(self, step: int, steps: int) -> dict[str, float]:
        return self.alarm({"image": alike()}, watching=True)

    def state(self) -> dict:
        return self.alarm.state()

    def load_state(self, state: dict) -> None:
        self.alarm.load_state(state)


def test_a_run_that_the_alarm_ends_keeps_its_checkpoint(tmp_path):
    job = Job(tmp_path, {"epochs": 12})
    with pytest.raises(DataError, match="collapse"):
        job.run(Alarmed())
    with closing(Run(tmp_path, write=False)) as run:
        assert run.state["step"] == 45  # of step 50, the fifth that was watched
