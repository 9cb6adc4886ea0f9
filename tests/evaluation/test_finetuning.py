import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from clinvla_fast import ClinVLA, Recipe
from clinvla_fast.errors import DataError
from clinvla_fast.evaluation.downstream import Training
from clinvla_fast.evaluation.finetuning import evaluate_classification, rate_of
from clinvla_fast.evaluation.subject import Subject
from clinvla_fast.recipe import Optimization

SHORT = Training(labels=(1.0,), seeds=1, epochs=1, batch_size=8, lr=1e-3)


@pytest.fixture
def classified(tmp_path, squares):
    def classify(model, told=SHORT, change=list):
        root = squares.written(
            tmp_path / f"data{len(list(tmp_path.iterdir()))}",
            *map(change, (squares.train, squares.validate, squares.test)),
        )
        return evaluate_classification(Subject(tmp_path, model, root, "test"), told, lambda *_: None)

    return classify


def test_learns_what_there_is_and_no_more(classified, tiny_model, squares):
    found = classified(tiny_model)
    assert found.score("100% of labels, macro AUC").interval().low > 0.9
    leak = classified(tiny_model, change=squares.shuffled)
    interval = leak.score("100% of labels, macro AUC").interval()
    assert interval.low < 0.5 < interval.high


def test_trains_task_adapters_and_leaves_the_model_as_it_was(classified, tiny_model, shake, squares):
    shake(tiny_model)
    before = {name: x.clone() for name, x in tiny_model.state_dict().items()}
    trainable = set(tiny_model.trainable())
    changed: set[str] = set()

    def watch(module, *_):
        for name, x in tiny_model.state_dict().items():
            if not torch.equal(x, before[name]):
                changed.add(name)

    handle = tiny_model.vision.register_forward_hook(watch)
    (about,) = classified(tiny_model).shown["trained"].values()
    handle.remove()
    expected = {name for name in before if name.startswith("vision.") and ".task." in name}
    assert changed == expected and about["weights of the tower"] == sum(before[name].numel() for name in expected)
    assert all(torch.equal(x, before[name]) for name, x in tiny_model.state_dict().items())
    assert set(tiny_model.trainable()) == trainable and not tiny_model.training


@pytest.mark.parametrize(("unfreeze", "trained"), [(False, False), (True, True)])
def test_a_method_without_task_adapters(classified, tiny_towers, squares, unfreeze, trained):
    model = ClinVLA(**tiny_towers, recipe=Recipe(width=24, adapters=(), trained=("towers",), views=("frontal",)))
    found = classified(model, replace(SHORT, unfreeze=unfreeze))
    (about,) = found.shown["trained"].values()
    assert bool(about["weights of the tower"]) == trained and about["steps"]
    assert found.score("100% of labels, macro AUC").interval().low > 0.9


def test_the_same_seed_gives_the_same_bits(classified, tiny_model, squares):
    told = replace(SHORT, labels=(0.5,), seeds=2)
    first, again = (classified(tiny_model, told) for _ in range(2))
    for score, other in zip(first.scores, again.scores, strict=True):
        assert np.array_equal(score.rows["scored"], other.rows["scored"])
        assert not np.array_equal(*score.rows["scored"].T[:2])  # another seed


def test_a_loss_that_is_not_finite_ends_it(classified, tiny_model, squares):
    with pytest.raises(DataError, match="not finite in 10 steps in a row"):
        classified(tiny_model, replace(SHORT, lr=1e38))
    assert all(x.isfinite().all() for x in tiny_model.state_dict().values() if x.is_floating_point())


def test_the_rate_is_the_runs_own(tmp_path):
    card = tmp_path / "run.json"
    assert rate_of(tmp_path, Training()) == Optimization.task_lr
    card.write_text(json.dumps({"settings": {"optimization": {"task_lr": 3e-4}}}))
    assert rate_of(tmp_path, Training()) == 3e-4 and rate_of(tmp_path, Training(lr=0.1)) == 0.1
    card.write_text("{")
    with pytest.raises(DataError, match="is damaged"):
        rate_of(tmp_path, Training())
