import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.library import opcheck
from torch.nn.functional import conv2d
from torch.utils.flop_counter import FlopCounterMode

from clinvla_fast import backend, ops
from clinvla_fast.kernels import draw_patches, masked_patches
from clinvla_fast.kernels.traffic import ByteCounter, nbytes

PIXELS = {
    "rgb": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "gray": ((0.5,), (0.25,)),
}
BACKENDS = pytest.mark.parametrize("name", ["reference", "triton"])
DEPTHS = pytest.mark.parametrize("depth", [torch.uint8, torch.uint16], ids=["8-bit", "16-bit"])
TOLERANCES = {torch.float32: (1e-6, 1e-6), torch.float16: (1e-3, 1e-3), torch.bfloat16: (8e-3, 8e-3)}
"""Of tokens and of gradients; two roundings to the 16-bit types are 1e-3 and 8e-3."""
TRAINED = "weight", "bias", "position", "cls", "slot"


def _inputs(batch, views, rows, columns, patch, width, pixels="rgb", dtype=torch.float64, seed=0, depth=torch.uint8):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    mean, std = (torch.tensor(x, dtype=dtype) for x in PIXELS[pixels])
    size = batch, views, rows * patch, columns * patch
    return {
        "images": torch.randint(0, torch.iinfo(depth).max + 1, size, generator=generator).to(depth),
        "present": torch.rand(batch, views, generator=generator) < 0.6,
        "weight": normal(width, len(mean), patch, patch),
        "bias": normal(width),
        "position": normal(1 + rows * columns, width),
        "cls": normal(width),
        "slot": normal(views, width),
        "mean": mean,
        "std": std,
    }


def _kept(i, keep, seed=0):
    """Different patches of each present view, in any order."""
    views, patches = int(i["present"].sum()), len(i["position"]) - 1
    noise = torch.rand(views, patches, generator=torch.Generator().manual_seed(seed))
    return noise.argsort(1)[:, :keep]


def _plain(i, kept=None):
    """Normalise, replicate, convolve, add positions, gather: one present view after the other, in float64."""
    i = {name: x.double() if x.is_floating_point() else x for name, x in i.items()}
    patch, channels = i["weight"].shape[-1], i["weight"].shape[1]
    views = []
    for study, view in i["present"].nonzero().tolist():
        gray = i["images"][study, view].double() / torch.iinfo(i["images"].dtype).max
        normal = torch.stack([(gray - i["mean"][c]) / i["std"][c] for c in range(channels)])
        tokens = conv2d(normal[None], i["weight"], i["bias"], stride=patch)[0].flatten(1).T + i["position"][1:]
        if kept is not None:
            tokens = torch.stack([tokens[k] for k in kept[len(views)].tolist()])
        views.append(torch.cat([(i["cls"] + i["position"][0])[None], tokens]) + i["slot"][view])
    return torch.stack(views)


def _with_gradients(i, name, kept=None, trained=TRAINED, **draw):
    """Tokens, and gradients of what is trained under random weights of the tokens."""
    leaves = {key: i[key].detach().clone().requires_grad_() for key in trained}
    with backend.use(name):
        out = ops.masked_patch_embed(**{**i, **leaves}, kept=kept, **draw).tokens
    gradient = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out)
    out.backward(gradient)
    return [out.detach(), *(leaf.grad for leaf in leaves.values())]


@BACKENDS
@DEPTHS
@pytest.mark.parametrize("pixels", PIXELS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(3, 4, 2, 3, 5, 7), (1, 1, 1, 1, 3, 1), (2, 1, 14, 14, 16, 20), (5, 3, 3, 1, 4, 9)])
def test_formula(name, shape, pixels, masked, depth):
    i = _inputs(*shape, pixels, depth=depth)
    i["present"][0, 0] = True
    kept = _kept(i, math.ceil(shape[2] * shape[3] / 4)) if masked else None
    with backend.use(name):
        tokens = ops.masked_patch_embed(**i, kept=kept).tokens
    torch.testing.assert_close(tokens, _plain(i, kept), rtol=1e-9, atol=1e-9)


@BACKENDS
@DEPTHS
@pytest.mark.parametrize("pixels", PIXELS)
def test_folding_is_exact_to_fp32_rounding(name, pixels, depth):
    i = _inputs(2, 2, 3, 3, 16, 64, pixels, torch.float32, depth=depth)
    i["present"][:] = True
    i["images"][0] = torch.iinfo(depth).max  # the largest sums
    i["images"][1, 0] = 0
    expected = _plain(i)
    with backend.use(name):
        worst = (ops.masked_patch_embed(**i).tokens.double() - expected).abs().max() / expected.abs().max()
    assert worst < 1e-6


# Every configuration of the launcher, several blocks of rows and of columns, some of them cut
SHAPES = {
    "weights held": (3, 3, 4, 3, 16, 140),
    "weights held, patches cut": (2, 3, 5, 5, 14, 70),
    "weights read again": (2, 2, 3, 3, 24, 130),
    "weights read again, patches cut": (2, 2, 3, 4, 20, 70),
}


def _check_accuracy(shape, dtype, depth, device, assert_as_accurate):
    i = _inputs(*shape, dtype=dtype, depth=depth)
    i["present"][0] = True
    i["weight"] /= shape[4]
    i = {name: x.to(device) for name, x in i.items()}
    kept = _kept(i, shape[2] * shape[3] // 2).to(device)
    exact = {name: x.double() if x.is_floating_point() else x for name, x in i.items()}
    results = _with_gradients(i, "triton", kept), _with_gradients(i, "reference", kept)
    truths = _with_gradients(exact, "reference", kept)
    forward, backward = TOLERANCES[dtype]
    for name, actual, same, truth in zip(("tokens", *TRAINED), *results, truths, strict=True):
        assert_as_accurate(actual, same, truth, forward if name == "tokens" else backward)


@DEPTHS
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_accuracy(shape, dtype, depth, assert_as_accurate):
    _check_accuracy(shape, dtype, depth, "cpu", assert_as_accurate)


@pytest.mark.gpu
@DEPTHS
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", [(64, 2, 14, 14, 16, 768), (8, 2, 14, 14, 32, 768), (8, 2, 16, 16, 14, 1024)])
def test_accuracy_on_a_gpu(shape, dtype, depth, assert_as_accurate):
    _check_accuracy(shape, dtype, depth, "cuda", assert_as_accurate)


@pytest.mark.gpu
def test_a_gpu_draws_the_same():
    present = torch.rand(64, 4) < 0.6
    for patches, keep in ((196, 49), (1024, 256), (5, 2)):
        here = ops.draw_kept_patches(present, patches, keep, 2**40 + 3)
        there = ops.draw_kept_patches(present.cuda(), patches, keep, 2**40 + 3)
        assert all(torch.equal(a, b.cpu()) for a, b in zip(here, there, strict=True))


@settings(max_examples=25)
@given(
    shape=st.tuples(*(st.integers(low, high) for low, high in ((0, 3), (1, 4), (1, 4), (1, 4), (1, 9), (1, 90)))),
    layout=st.sampled_from(["contiguous", "transposed", "sliced", "expanded"]),
    depth=st.sampled_from([torch.uint8, torch.uint16]),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_odd_shapes_and_layouts(shape, layout, depth, seed, data):
    i = _inputs(*shape, "gray", seed=seed, depth=depth)
    images = i["images"].view(torch.int8 if depth == torch.uint8 else torch.int16)  # torch has few operations on uint16
    if layout == "transposed":
        images = images.transpose(2, 3).contiguous().transpose(2, 3)
    elif layout == "sliced":
        images = images.repeat(2, 1, 1, 2)[: len(images), :, :, : images.shape[3]]
    elif layout == "expanded":
        images = images[:, :1].expand_as(images)
    i["images"] = images.view(depth)
    for name in ("position", "slot"):
        i[name] = i[name].T.contiguous().T
    keep = data.draw(st.sampled_from([None, 0, 1, shape[2] * shape[3]]))
    kept = None if keep is None else _kept(i, keep, seed).T.contiguous().T
    actual, expected = (_with_gradients(i, name, kept) for name in ("triton", "reference"))
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@BACKENDS
def test_an_expanded_gradient(name):
    i = _inputs(2, 2, 2, 2, 4, 5)
    i["slot"].requires_grad_()
    with backend.use(name):
        tokens = ops.masked_patch_embed(**i).tokens
    tokens.sum().backward()
    expected = i["present"].sum(0)[:, None] * torch.full((2, 5), 5.0, dtype=torch.float64)
    torch.testing.assert_close(i["slot"].grad, expected)


@BACKENDS
def test_kept_patches_come_in_the_order_given(name):
    i = _inputs(1, 1, 2, 3, 4, 5)
    i["present"][:] = True
    with backend.use(name):
        every = ops.masked_patch_embed(**i)
        some = ops.masked_patch_embed(**i, kept=torch.tensor([[5, 0, 3]]))
    torch.testing.assert_close(some.tokens, every.tokens[:, [0, 6, 1, 4]])
    assert every.kept.tolist() == every.restore.tolist() == [[0, 1, 2, 3, 4, 5]]
    assert some.restore.tolist() == [[1, 3, 4, 2, 5, 0]]  # of [5, 0, 3] + [1, 2, 4]


@BACKENDS
def test_a_seed_draws_what_draw_kept_patches_does(name):
    i = _inputs(3, 2, 4, 4, 4, 5)
    with backend.use(name):
        kept, restore = ops.draw_kept_patches(i["present"], 16, 4, seed=11)
        given = ops.masked_patch_embed(**i, kept=kept)
        drawn = ops.masked_patch_embed(**i, keep=4, seed=torch.tensor(11))
    assert torch.equal(drawn.kept, kept) and torch.equal(drawn.restore, restore) and torch.equal(given.restore, restore)
    assert torch.equal(drawn.tokens, given.tokens)
    # what a decoder does: mask tokens in the places that were left out
    filled = torch.cat([drawn.tokens[:, 1:], torch.full((len(kept), 12, 5), torch.nan, dtype=torch.float64)], 1)
    image = filled.gather(1, restore[..., None].expand(-1, -1, 5))
    torch.testing.assert_close(image.gather(1, kept[..., None].expand(-1, -1, 5)), drawn.tokens[:, 1:])
    assert image.isnan().sum() == len(kept) * 12 * 5


@BACKENDS
def test_absent_views_are_never_read(name):
    i = _inputs(3, 4, 2, 2, 3, 6)
    with backend.use(name):
        expected = ops.masked_patch_embed(**i).tokens
        i["images"][~i["present"]] = torch.randint(0, 256, i["images"][~i["present"]].shape, dtype=torch.uint8)
        used = i["present"].any(0)
        i["slot"][~used] = torch.nan
        torch.testing.assert_close(ops.masked_patch_embed(**i).tokens, expected, rtol=0, atol=0)


@BACKENDS
@pytest.mark.parametrize("batch", [0, 3])
def test_every_view_present(name, batch):
    i = _inputs(batch, 2, 2, 3, 4, 5)
    i["present"][:] = True
    for chosen in ({}, {"kept": _kept(i, 4)}, {"keep": 3, "seed": 7}):
        with backend.use(name):
            expected = ops.masked_patch_embed(**i, **chosen)
            found = ops.masked_patch_embed(**i | {"present": None}, **chosen)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@BACKENDS
@pytest.mark.parametrize("batch", [0, 3])
def test_no_view_present(name, batch):
    i = _inputs(batch, 2, 2, 3, 4, 5)
    i["present"][:] = False
    for kept, tokens in ((None, 7), (torch.empty(0, 2, dtype=torch.int64), 3)):
        out, *gradients = _with_gradients(i, name, kept)
        assert out.shape == (0, tokens, 5)
        assert all(not g.any() for g in gradients)


@BACKENDS
@pytest.mark.parametrize("pixels", PIXELS)
def test_gradients(name, pixels):
    i = _inputs(2, 2, 2, 2, 2, 3, pixels)
    i["present"] = torch.tensor([[True, False], [True, True]])
    kept = torch.tensor([[3, 1], [0, 2], [2, 3]])
    leaves = [i[key].requires_grad_() for key in TRAINED]

    def function(*p):
        return ops.masked_patch_embed(**{**i, **dict(zip(TRAINED, p, strict=True))}, kept=kept).tokens

    with backend.use(name):
        assert gradcheck(function, leaves)


@pytest.mark.parametrize("trained", [("slot",), ("weight",), ("cls", "slot"), ("position",)])
def test_only_what_trains_has_a_gradient(trained):
    i = _inputs(2, 2, 2, 2, 4, 5)
    every = dict(zip(TRAINED, _with_gradients(i, "triton")[1:], strict=True))
    _, *gradients = _with_gradients(i, "triton", trained=trained)
    for name, gradient in zip(trained, gradients, strict=True):
        torch.testing.assert_close(gradient, every[name])


def _op_inputs(i, kept):
    view, kept, restore = masked_patches._find_patches(
        i["images"], i["present"], len(i["position"]) - 1, kept, None, None, draw_patches.reference
    )
    half = (torch.iinfo(i["images"].dtype).max + 1) // 2
    weights = (
        *masked_patches.fold_normalisation(*(i[x] for x in ("weight", "bias", "mean", "std")), half),
        i["position"],
    )
    return i["images"], view, kept, restore, *weights, i["cls"], i["slot"]


@DEPTHS
def test_registration(depth):
    i = _inputs(2, 2, 2, 3, 4, 5, depth=depth)
    images, *rest = _op_inputs(i, _kept(i, 3))
    for trained in ((), (3, 4, 5, 6, 7), (7,)):
        arguments = [x.clone().requires_grad_() if n in trained else x for n, x in enumerate(rest)]
        opcheck(torch.ops.clinvla_fast.masked_patch_embed, (images, *arguments))
    gradient = torch.randn(len(rest[0]), 4, 5, dtype=torch.float64)
    for flags in ((True, True, True), (False, False, True), (True, False, False)):
        opcheck(torch.ops.clinvla_fast.masked_patch_embed_backward, (gradient, images, *rest[:4], *flags))
    opcheck(torch.ops.clinvla_fast.draw_patches, (rest[0], 6, 3, torch.tensor(5)))


def test_two_runs_are_bitwise_equal():
    i = _inputs(3, 2, 4, 4, 8, 70, dtype=torch.float32)
    first, second = (_with_gradients(i, "triton", keep=8, seed=4) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@BACKENDS
@pytest.mark.parametrize("how", ["kept", "seed", "every"])
def test_compiles_without_breaks_or_recompiles(name, how):
    i = _inputs(2, 2, 2, 2, 4, 6)
    flags = [torch.tensor(x, dtype=torch.bool) for x in ([[1, 0], [1, 1]], [[0, 1], [1, 1]], [[1, 1], [1, 1]])]
    if how == "kept":
        flags.pop()  # another number of rows is another shape
    trained = [i.pop(key).requires_grad_() for key in TRAINED]
    del i["present"]

    def embed(present, kept, seed, *p):
        chosen = {"kept": {"kept": kept}, "seed": {"keep": 2, "seed": seed}, "every": {}}[how]
        out = ops.masked_patch_embed(present=present, **i, **dict(zip(TRAINED, p, strict=True)), **chosen)
        return out.tokens.sin(), out.restore

    def run(function, present, seed):
        kept = torch.tensor([[1, 3], [2, 0], [0, 1], [3, 1]])[: int(present.sum())]
        tokens, restore = function(present, kept, torch.tensor(seed), *trained)
        return tokens, restore, *torch.autograd.grad(tokens.sum(), trained)

    torch._dynamo.reset()
    # compiling the reference to machine code takes long and says nothing about breaks
    compiled = torch.compile(embed, fullgraph=True, backend="inductor" if name == "triton" else "aot_eager")
    with backend.use(name):
        run(compiled, flags[0], 0)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for seed, present in enumerate(flags):
                for actual, expected in zip(run(compiled, present, seed), run(embed, present, seed), strict=True):
                    torch.testing.assert_close(actual, expected)


@DEPTHS
@pytest.mark.parametrize("trained", [TRAINED, ("slot",)])
def test_flops_and_bytes(depth, trained):
    i = _inputs(3, 2, 4, 4, 8, 12, depth=depth)
    kept = _kept(i, 5)
    flops, moved = {}, {}
    for name in ("triton", "reference"):
        with FlopCounterMode(display=False) as counter, ByteCounter() as traffic:
            out = _with_gradients(i, name, kept, trained)
        flops[name], moved[name] = counter.get_total_flops(), traffic.total
    assert flops["triton"] == flops["reference"] > 0
    # What the reference reads and returns, forward and backward
    images, view, kept, restore, *weights = _op_inputs(i, kept)
    pixels = masked_patches._centred_pixels(images, view, kept, 8)
    tokens = out[0]
    gradients = [w.new_empty(w.shape) for w, name in zip(weights, TRAINED, strict=True) if name in trained]
    expected = nbytes(pixels, view, kept, weights, tokens) + nbytes(tokens, gradients, view)
    if "weight" in trained:
        expected += nbytes(pixels, kept, restore)
    assert moved["triton"] == expected and moved["reference"] == 0


@pytest.mark.parametrize(("rows", "columns"), [(17, 16), (16, 15)])
def test_images_that_do_not_divide_into_patches(rows, columns):
    i = _inputs(1, 1, 4, 4, 4, 5)
    i["images"] = torch.zeros(1, 1, rows, columns, dtype=torch.uint8)
    with pytest.raises(ValueError, match=f"{rows}x{columns}.*patch size 4"):
        ops.masked_patch_embed(**i)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(2, 2, 8, 12)}, "images are torch.float32.*uint8 or uint16"),
        ({"present": torch.ones(2, 3, dtype=torch.bool)}, r"present is torch.bool \[2, 3\]: expected bool \[2, 2\]"),
        ({"weight": torch.zeros(5, 1, 4, 3)}, r"weight is \[5, 1, 4, 3\]"),
        ({"position": torch.zeros(6, 5)}, r"position is \[6, 5\]: expected \[7, 5\]"),
        ({"slot": torch.zeros(3, 5)}, r"slot is \[3, 5\]: expected \[2, 5\]"),
        ({"cls": torch.zeros(5, dtype=torch.bfloat16)}, "cls is torch.bfloat16.*expected torch.float32"),
        ({"kept": torch.zeros(2, 7, dtype=torch.int64)}, r"kept is torch.int64 \[2, 7\].*up to 6"),
        ({"kept": torch.zeros(2, 3, dtype=torch.int32)}, "kept is torch.int32"),
        ({"kept": torch.zeros(2, 3, dtype=torch.int64), "seed": 1}, "either kept, or keep and seed"),
        ({"keep": 3}, "both keep and seed"),
        ({"keep": 7, "seed": 1}, "keep is 7: expected 0 to 6"),
        ({"keep": 3, "seed": torch.zeros(1)}, r"seed is torch.float32 \[1\]"),
        ({"keep": 3, "seed": 2**63}, "seed is 9223372036854775808: expected a number of 64 bits"),
    ],
)
def test_arguments_that_do_not_fit(change, message):
    i = _inputs(2, 2, 2, 3, 4, 5, "gray", torch.float32)
    with pytest.raises(ValueError, match=message):
        ops.masked_patch_embed(**{**i, **change})


@BACKENDS
def test_a_row_of_kept_for_each_present_view(name):
    i = _inputs(2, 2, 2, 3, 4, 5)
    i["present"] = torch.tensor([[True, False], [True, True]])
    for rows in (2, 4):
        with backend.use(name), pytest.raises(RuntimeError, match="one row for each present view"):
            ops.masked_patch_embed(**i, kept=torch.zeros(rows, 1, dtype=torch.int64))


@BACKENDS
@pytest.mark.parametrize("patch", [-1, 6])
def test_kept_patches_are_those_of_the_images(name, patch):
    i = _inputs(1, 1, 2, 3, 4, 5) | {"present": torch.ones(1, 1, dtype=torch.bool)}
    with backend.use(name), pytest.raises(RuntimeError, match="kept names a patch that the images do not have"):
        ops.masked_patch_embed(**i, kept=torch.tensor([[0, patch]]))


# The draw


def _everyone(views):
    return torch.ones(views, 1, dtype=torch.bool)


def test_the_random_numbers_are_philox():
    # Random123's known answer for philox4x32-10 of nothing but zeros
    zero = torch.zeros((), dtype=torch.int64)
    assert draw_patches._philox(zero, zero, zero).item() == 0x6627E8D5


@BACKENDS
@settings(max_examples=15)
@given(views=st.integers(0, 4), patches=st.integers(1, 50), data=st.data())
def test_draw_keeps_exactly_k_different_patches(name, views, patches, data):
    keep = data.draw(st.integers(0, patches))
    seed = data.draw(st.integers(-(2**63), 2**63 - 1))
    with backend.use(name):
        kept, restore = ops.draw_kept_patches(_everyone(views), patches, keep, seed)
    assert kept.shape == (views, keep) and restore.shape == (views, patches)
    assert kept.dtype == restore.dtype == torch.int64
    for row, places in zip(kept.tolist(), restore.tolist(), strict=True):
        assert row == sorted(set(row)) and all(0 <= k < patches for k in row)
        order = row + [p for p in range(patches) if p not in row]
        assert [order[place] for place in places] == list(range(patches))


@pytest.mark.parametrize(("patches", "keep"), [(1, 0), (1, 1), (196, 49), (300, 299), (1025, 256), (2048, 1)])
def test_both_backends_draw_the_same(patches, keep):
    present = torch.tensor([[True, False], [False, False], [True, True]])
    seed = torch.tensor(-(2**62) + 12345)
    with backend.use("reference"):
        expected = ops.draw_kept_patches(present, patches, keep, seed)
    with backend.use("triton"):
        actual = ops.draw_kept_patches(present, patches, keep, seed)
        assert torch.equal(ops.draw_kept_patches(present, patches, keep, seed.item())[0], actual[0])
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_ties_go_to_the_first_patches(monkeypatch):
    monkeypatch.setattr(draw_patches, "_philox", lambda seed, patch, view: (patch + 0 * view) // 3)
    assert draw_patches.reference(_everyone(1), 9, 4, 0)[0].tolist() == [[0, 1, 2, 3]]


@BACKENDS
def test_a_mask_is_a_function_of_the_seed_and_the_view(name):
    everyone = torch.ones(5, 4, dtype=torch.bool)
    some = torch.rand(5, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    with backend.use(name):
        masks = ops.draw_kept_patches(everyone, 196, 49, seed=7)[0]
        state = torch.get_rng_state()
        assert torch.equal(ops.draw_kept_patches(some, 196, 49, seed=7)[0], masks[some.flatten()])
        assert torch.equal(torch.get_rng_state(), state)
        assert not torch.equal(ops.draw_kept_patches(everyone, 196, 49, seed=8)[0], masks)
        assert not torch.equal(ops.draw_kept_patches(everyone, 196, 49, seed=7 + 2**32)[0], masks)
    assert len(set(map(tuple, masks.tolist()))) == 20


def test_draw_is_uniform_and_independent_a_view():
    draws, patches, keep = 20_000, 12, 3
    kept, _ = ops.draw_kept_patches(_everyone(draws), patches, keep, seed=0)
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


def test_steps_of_a_run_are_independent():
    # seeds that differ in one low number, as those of successive steps
    hit = torch.stack(
        [torch.zeros(12).scatter(0, draw_patches.reference(_everyone(1), 12, 3, s)[0][0], 1.0) for s in range(2000)]
    )
    both = (hit[:-1] * hit[1:]).mean(0)
    assert (both - 1 / 16).abs().max() < 5 * math.sqrt(1 / 16 * (15 / 16) / 1999 * 2)
