from dataclasses import replace

import numpy as np
import pytest
import torch
from torchmetrics.functional.segmentation import dice_score

from clinvla_fast.data.shards import Box
from clinvla_fast.evaluation.downstream import Training
from clinvla_fast.evaluation.result import NotApplicable
from clinvla_fast.evaluation.segmentation import dice_at, evaluate_segmentation
from clinvla_fast.evaluation.subject import Subject

TOLD = Training(labels=(1.0,), seeds=1, epochs=2, batch_size=4, lr=5e-3)
EVERY, SHOWN = "100% of labels, Dice of square", "100% of labels, Dice of square where it is shown"


@pytest.fixture
def outlined(tmp_path, tiny_model, squares):
    def outline(train, validate, test, told=TOLD, batch_size=64):
        root = squares.written(tmp_path / f"data{len(list(tmp_path.iterdir()))}", train, validate, test)
        return evaluate_segmentation(Subject(tmp_path, tiny_model, root, "test", batch_size), told, lambda *_: None)

    return outline


def test_dice():
    generator = torch.Generator().manual_seed(0)
    shown = torch.rand(6, 16, 16, generator=generator)
    masks = torch.rand(6, 16, 16, generator=generator) < 0.2
    masks[0] = False
    found = dice_at(shown, masks)
    for column, threshold in ((0, 0.05), (9, 0.5), (18, 0.95)):
        predicted = (shown > threshold)[:, None].long()
        expected = dice_score(predicted, masks[:, None].long(), 1, input_format="one-hot").squeeze()
        torch.testing.assert_close(found[1:, column], expected[1:].double(), atol=1e-6, rtol=0)
        sets = [(set(np.flatnonzero(p)), set(np.flatnonzero(m))) for p, m in zip(predicted[:, 0], masks, strict=True)]
        exact = [2 * len(p & m) / (len(p) + len(m)) for p, m in sets]
        np.testing.assert_allclose(found[:, column], exact, atol=1e-12)
    assert found[0, -1] == 1 and (found[1:, -1] == 0).all()  # nothing outlined


def test_outlines_what_there_is_and_no_more(outlined, squares):
    found = outlined(squares.train, squares.validate, squares.test)
    assert found.settings["label"] == squares.label
    for name in (EVERY, SHOWN):
        assert found.score(name).interval().low > found.score(name).chance
    assert len(found.score(EVERY).units) == len(squares.test)
    assert set(found.score(SHOWN).units) == {n for n, study in enumerate(squares.test) if study.boxes}
    for shown in found.shown["outlines"]:
        picture = found.arrays[shown["picture"]]
        assert picture.dtype == np.uint8 and picture.shape == (128, 128, 3) and squares.test[shown["study"]].boxes
        assert (picture == (0, 255, 255)).all(-1).any()
    leak = outlined(*map(squares.shuffled, (squares.train, squares.validate, squares.test)))
    for name in (EVERY, SHOWN):
        interval, chance = leak.score(name).interval(), leak.score(name).chance
        assert interval.low < chance + 1e-9 and chance - 0.05 < interval.high  # it starts as the constant outline


def test_the_constant_outline_is_the_best_of_training_masks(outlined, squares):
    box = Box(squares.label, "frontal", 0.25, 0.25, 0.5, 0.5)
    always = [[replace(s, boxes=(box,) if s.boxes else ()) for s in of]
              for of in (squares.train, squares.validate, squares.test)]  # fmt: skip
    found = outlined(*always, told=replace(TOLD, epochs=1), batch_size=7)
    assert found.score(SHOWN).chance == 1
    first = found.shown["trained"]["100% of labels, seed 0"]["validated first"]
    assert first == 0.75  # where a decoder starts
    assert found.score(EVERY).chance == 0.5  # outlined in all studies or in none


def test_shown_but_not_outlined_is_left_out(outlined, squares):
    other = [replace(study, boxes=()) if n < 4 else study for n, study in enumerate(squares.test)]
    found = outlined(squares.train, squares.validate, other, replace(TOLD, epochs=1))
    expected = [n for n, study in enumerate(other) if study.boxes or squares.label not in study.labels]
    assert sorted(found.score(EVERY).units) == expected and len(expected) < len(other)


def test_data_without_boxes(outlined, squares):
    bare = [replace(study, boxes=()) for study in squares.test]
    with pytest.raises(NotApplicable, match="no boxes in the frontal views of its test split: expected those of RSNA"):
        outlined(squares.train, squares.validate, bare)
    with pytest.raises(NotApplicable, match="no box of 'edema' in its train split"):
        outlined(squares.train, squares.validate, squares.test, replace(TOLD, label="edema"))


def test_what_is_outlined_is_chosen_by_training_boxes(outlined, squares):
    others = tuple(Box("other", "frontal", 0.25, 0.05 * n, 0.25, 0.25) for n in range(9))
    test = [replace(study, boxes=(*study.boxes, *others)) for study in squares.test]
    found = outlined(squares.train, squares.validate, test, replace(TOLD, epochs=1))
    assert found.settings["label"] == squares.label
