"""The model in the form that CUDA graphs capture: the same embeddings, from operations that depend on shapes alone."""

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from clinvla_fast import ClinVLA, Recipe, StudyBatch, backend, restore
from clinvla_fast.modeling.captured import Captured, embed_images, embed_reports

BATCHES = {
    "one": ([[1, 1]], [12]),
    "a lateral alone, a report of two tokens": ([[0, 1], [1, 1], [1, 0]], [2, 40, 7]),
    "four views, some none": ([[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]], [3, 33, 5]),
    "more than the largest": ([[1, 0], [0, 1], [1, 1], [1, 0], [1, 1]], [5, 64, 3, 9, 31]),
    "one view slot, the longest report": ([[1], [1]], [128, 4]),
    "none": ([], []),
}


def _check(captured, batch, limit):
    with torch.inference_mode():
        right = captured.model(batch)
    found = captured(batch)
    torch.testing.assert_close(found.image_global, right.image_global, rtol=0, atol=limit)
    torch.testing.assert_close(found.text_global, right.text_global, rtol=0, atol=limit)
    for side in ("image", "text"):
        for row in range(len(batch)):  # what the masks leave, in order: absent views keep their places in one of them
            a, b = (getattr(e, f"{side}_local")[row][getattr(e, f"{side}_mask")[row]] for e in (found, right))
            torch.testing.assert_close(a, b, rtol=0, atol=limit)
        rest = getattr(found, f"{side}_local")[~getattr(found, f"{side}_mask")]
        assert rest.isfinite().all()
    assert not found.image_local[~found.image_mask].any()


def _empty(batch, views=2):
    """What make_batch cannot make of no studies."""
    return batch if len(batch) else StudyBatch(
        torch.zeros(0, views, 128, 128, dtype=torch.uint8), torch.zeros(0, views, dtype=torch.bool),
        torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64),
    )  # fmt: skip


@pytest.mark.parametrize("name", BATCHES)
def test_embeddings_are_those_of_the_model(tiny_model, make_batch, shake, name):
    shake(tiny_model)
    present, lengths = BATCHES[name]
    batch = make_batch(present, lengths) if present else _empty(())
    captured = Captured(tiny_model, batch_sizes=(1, 3, 2))
    _check(captured, batch, 2e-5)
    _check(captured, batch, 2e-5)  # from buffers that hold the last batch
    assert len(captured._graphs) <= 2


class _Casts(TorchDispatchMode):
    """Counts tensors that are brought to another dtype one by one."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        if func in (torch.ops.aten.to.dtype, torch.ops.aten._to_copy.default):
            self.count += out.dtype != args[0].dtype
        return out


def test_adapters_are_brought_to_bfloat16_by_one_copy(tiny_towers, make_batch, shake):
    batch, counts = make_batch([[1, 0], [1, 1]], [9, 40]), {}
    for name, adapters in {"with": ("invertible", "language", "task"), "few": ("task",)}.items():
        torch.manual_seed(1)
        recipe = Recipe(width=24, bottleneck=20, adapters=adapters)
        captured = Captured(ClinVLA(**tiny_towers, recipe=recipe, dtype=torch.bfloat16))
        shake(captured.model)
        _check(captured, batch, 0.1)
        with _Casts() as casts:
            captured(batch)
        counts[name] = casts.count
    assert counts["with"] == counts["few"] > 0


def test_a_padded_batch_holds_nothing_of_the_last(tiny_model, make_batch, shake):
    shake(tiny_model)
    captured = Captured(tiny_model, batch_sizes=(4,))
    captured(make_batch([[1, 1]] * 4, [30, 31, 32, 20], seed=1))
    _check(captured, make_batch([[0, 1], [1, 0]], [3, 9], seed=2), 2e-5)
    assert len(captured._graphs) == 1


def test_new_weights_are_used(tiny_model, make_batch, shake):
    batch = make_batch([[1, 1]], [9])
    captured = Captured(tiny_model)
    before = captured(batch)
    shake(tiny_model)
    assert not torch.equal(captured(batch).image_global, before.image_global)
    _check(captured, batch, 2e-5)


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_nothing_on_the_device_is_waited_for(tiny_model, implementation):
    """Fake tensors hold no values: whatever reads one to decide what to do next raises."""
    model = restore(tiny_model)
    with FakeTensorMode(allow_non_fake_inputs=True), backend.use(implementation), torch.inference_mode():
        images = torch.zeros(2, 3, 128, 128, dtype=torch.uint8)
        pooled, local, mask = embed_images(model, images, torch.ones(2, 3, dtype=torch.bool))
        assert pooled.shape == (2, 24) and local.shape == (2, 192, 24) and mask.shape == (2, 192)
        with pytest.raises(DynamicOutputShapeException):
            model.embed_images(images, torch.ones(2, 3, dtype=torch.bool))  # which does wait
        pooled, local, mask = embed_reports(model, torch.zeros(2, 32, dtype=torch.int64), torch.full((2,), 9))
        assert pooled.shape == (2, 24) and local.shape == (2, 32, 24) and mask.shape == (2, 32)


def test_bad_input(tiny_model, make_batch):
    with pytest.raises(ValueError, match=r"batch_sizes are \[0\]: expected one or more, from 1 up"):
        Captured(tiny_model, batch_sizes=[0])
    batch = make_batch([[1, 1]], [9])
    small, floats = batch.images[..., :64, :64], batch.images / 255
    for images in (small, floats, batch.images[..., :1, :1], batch.images.repeat(1, 3, 1, 1)):
        with pytest.raises(ValueError, match=r"expected uint8 \[B, up to 4, 128, 128\]"):
            Captured(tiny_model)(replace(batch, images=images))
    with pytest.raises(ValueError, match="a report has 129 tokens: this model reads 128 at most"):
        Captured(tiny_model)(make_batch([[1]], [129]))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(tiny_towers, make_batch, shake, dtype):
    model = ClinVLA(**tiny_towers, recipe=Recipe(width=24, bottleneck=20), dtype=dtype).cuda()
    shake(model)
    captured = Captured(model, batch_sizes=(1, 3))
    for present, lengths in BATCHES.values():
        batch = (make_batch(present, lengths) if present else _empty(())).to("cuda")
        _check(captured, batch, 1e-3 if dtype == torch.float32 else 0.1)
    assert all(held.graph is not None for held in captured._graphs.values())
