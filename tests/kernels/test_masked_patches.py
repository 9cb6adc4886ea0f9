import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.nn.functional import conv2d

from clinvla_fast import ops

PIXELS = {
    "rgb": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "gray": ((0.5,), (0.25,)),
}


def _inputs(batch, views, rows, columns, patch, width, pixels="rgb", dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    mean, std = (torch.tensor(x, dtype=dtype) for x in PIXELS[pixels])
    size = batch, views, rows * patch, columns * patch
    return {
        "images": torch.randint(0, 256, size, generator=generator, dtype=torch.uint8),
        "present": torch.rand(batch, views, generator=generator) < 0.6,
        "weight": normal(width, len(mean), patch, patch),
        "bias": normal(width),
        "position": normal(1 + rows * columns, width),
        "cls": normal(width),
        "slot": normal(views, width),
        "mean": mean,
        "std": std,
    }


def _plain(i, kept=None):
    """Normalise, replicate, convolve, add positions, gather: one present view after the other, in float64."""
    i = {name: x.double() if x.is_floating_point() else x for name, x in i.items()}
    patch, channels = i["weight"].shape[-1], i["weight"].shape[1]
    views = []
    for study, view in i["present"].nonzero().tolist():
        gray = i["images"][study, view].double() / 255
        normal = torch.stack([(gray - i["mean"][c]) / i["std"][c] for c in range(channels)])
        tokens = conv2d(normal[None], i["weight"], i["bias"], stride=patch)[0].flatten(1).T + i["position"][1:]
        if kept is not None:
            tokens = torch.stack([tokens[k] for k in kept[len(views)].tolist()])
        views.append(torch.cat([(i["cls"] + i["position"][0])[None], tokens]) + i["slot"][view])
    return torch.stack(views)


@pytest.mark.parametrize("pixels", PIXELS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(3, 4, 2, 3, 5, 7), (1, 1, 1, 1, 3, 1), (2, 2, 14, 14, 16, 20), (5, 3, 3, 1, 4, 9)])
def test_formula(shape, pixels, masked):
    i = _inputs(*shape, pixels)
    i["present"][0, 0] = True
    patches = shape[2] * shape[3]
    kept = None
    if masked:
        kept = ops.draw_kept_patches(int(i["present"].sum()), patches, math.ceil(patches / 4), seed=1)
    torch.testing.assert_close(ops.masked_patch_embed(**i, kept=kept), _plain(i, kept), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("pixels", PIXELS)
def test_folding_is_exact_to_fp32_rounding(pixels):
    i = _inputs(2, 2, 14, 14, 16, 64, pixels, torch.float32)
    i["present"][:] = True
    i["images"][0] = 255  # the largest sums
    i["images"][1, 0] = 0
    expected = _plain(i)
    worst = (ops.masked_patch_embed(**i).double() - expected).abs().max() / expected.abs().max()
    assert worst < 1e-6


def test_kept_patches_come_in_the_order_given():
    i = _inputs(1, 1, 2, 3, 4, 5)
    i["present"][:] = True
    every = ops.masked_patch_embed(**i)
    kept = torch.tensor([[5, 0, 3]])
    torch.testing.assert_close(ops.masked_patch_embed(**i, kept=kept), every[:, [0, 6, 1, 4]])


def test_absent_views_are_never_read():
    i = _inputs(3, 4, 2, 2, 3, 6)
    expected = ops.masked_patch_embed(**i)
    i["images"][~i["present"]] = torch.randint(0, 256, i["images"][~i["present"]].shape, dtype=torch.uint8)
    used = i["present"].any(0)
    i["slot"][~used] = torch.nan
    torch.testing.assert_close(ops.masked_patch_embed(**i), expected, rtol=0, atol=0)


@pytest.mark.parametrize("batch", [0, 3])
def test_no_view_present(batch):
    i = _inputs(batch, 2, 2, 3, 4, 5)
    i["present"][:] = False
    assert ops.masked_patch_embed(**i).shape == (0, 7, 5)
    assert ops.masked_patch_embed(**i, kept=torch.empty(0, 2, dtype=torch.int64)).shape == (0, 3, 5)


@pytest.mark.parametrize(("rows", "columns"), [(17, 16), (16, 15)])
def test_images_that_do_not_divide_into_patches(rows, columns):
    i = _inputs(1, 1, 4, 4, 4, 5)
    i["images"] = torch.zeros(1, 1, rows, columns, dtype=torch.uint8)
    with pytest.raises(ValueError, match=f"{rows}x{columns}.*patch size 4"):
        ops.masked_patch_embed(**i)


@pytest.mark.parametrize("pixels", PIXELS)
def test_gradients(pixels):
    i = _inputs(2, 2, 2, 2, 2, 3, pixels)
    i["present"] = torch.tensor([[True, False], [True, True]])
    kept = ops.draw_kept_patches(3, 4, 2, seed=0)
    names = "weight", "bias", "position", "cls", "slot"
    leaves = [i[name].requires_grad_() for name in names]

    def function(*p):
        return ops.masked_patch_embed(**{**i, **dict(zip(names, p, strict=True))}, kept=kept)

    assert gradcheck(function, leaves)


# The draw


@given(views=st.integers(0, 6), patches=st.integers(1, 50), data=st.data())
def test_draw_keeps_exactly_k_different_patches(views, patches, data):
    keep = data.draw(st.integers(0, patches))
    kept = ops.draw_kept_patches(views, patches, keep, seed=data.draw(st.integers(0, 2**32)))
    assert kept.shape == (views, keep) and kept.dtype == torch.int64
    for row in kept.tolist():
        assert row == sorted(set(row)) and all(0 <= k < patches for k in row)


def test_draw_is_a_function_of_the_seed_alone():
    first = ops.draw_kept_patches(5, 196, 49, seed=7)
    torch.rand(10)
    state = torch.get_rng_state()
    assert torch.equal(ops.draw_kept_patches(5, 196, 49, seed=7), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(ops.draw_kept_patches(5, 196, 49, seed=8), first)


def test_draw_is_uniform_and_independent_a_view():
    draws, patches, keep = 20_000, 12, 3
    kept = ops.draw_kept_patches(draws, patches, keep, seed=0)
    hit = torch.zeros(draws, patches).scatter(1, kept, 1.0).double()
    share = keep / patches
    five_sigma = 5 * math.sqrt(share * (1 - share) / draws)
    assert (hit.mean(0) - share).abs().max() < five_sigma
    # neighbouring views: a patch is in both with the square of its share
    both = (hit[:-1:2] * hit[1::2]).mean(0)
    assert (both - share**2).abs().max() < 5 * math.sqrt(share**2 * (1 - share**2) / (draws / 2))
    # pairs of patches within a view: drawn without replacement
    pairs = hit.T @ hit / draws
    expected = share * (keep - 1) / (patches - 1)
    off_diagonal = pairs[~torch.eye(patches, dtype=torch.bool)]
    assert (off_diagonal - expected).abs().max() < 5 * math.sqrt(expected / draws)
