import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.utils.flop_counter import FlopCounterMode

from clinvla_fast import backend, ops
from clinvla_fast.kernels import local_alignment
from clinvla_fast.kernels.traffic import ByteCounter, nbytes

TEMPERATURES = (1 / 0.07,) * 3


_FORMS = {"dense": math.inf, "kept": 0, "blocked": 0}  # of the reference, and up to which size each is dense


@pytest.fixture(scope="module", autouse=True, params=[*_FORMS, "triton"])
def implementation(request):
    with backend.use("reference" if request.param in _FORMS else "triton"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(local_alignment, "_DENSE_ELEMENTS", _FORMS.get(request.param))
        patch.setattr(local_alignment, "_KEPT_ELEMENTS", 0 if request.param == "blocked" else math.inf)
        yield request.param


def _pair(c, w, tau1, tau2):
    """One image [N, D] and one report [T, D], every patch and word real: A, the contexts and s."""
    products = torch.stack([torch.stack([(patch * word).sum() for word in w]) for patch in c])
    share = products.softmax(1)
    attention = (tau1 * share).softmax(0)
    contexts = attention.T @ c
    cosine = (w * contexts).sum(1) / (w.square().sum(1).sqrt() * contexts.square().sum(1).sqrt())
    return attention, contexts, (tau2 * cosine).logsumexp(0)


def _dense(image, image_mask, text, text_mask, tau1, tau2, tau3):
    """Every pair on its own, in float64; what is masked is cut out before anything is computed."""
    image, text, tau1, tau2, tau3 = (x.double() for x in (image, text, tau1, tau2, tau3))
    rows = []
    for i, m in zip(image, image_mask, strict=True):
        rows.append([_pair(i[m], w[n], tau1, tau2)[2] for w, n in zip(text, text_mask, strict=True)])
    return tau3 * torch.stack([torch.stack(row) for row in rows])


def _inputs(images, reports, patches, words, width, seed=0, scale=1.0, dtype=torch.float64, taus=(4.0, 5.0, 10.0)):
    generator = torch.Generator().manual_seed(seed)

    def mask(rows, columns):
        m = torch.rand(rows, columns, generator=generator) < 0.6
        m[torch.arange(rows), torch.randint(0, columns, (rows,), generator=generator)] = True
        return m

    def normal(*shape):
        return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)

    features = (
        normal(images, patches, width),
        mask(images, patches),
        normal(reports, words, width),
        mask(reports, words),
    )
    return [*features, *(torch.tensor(t, dtype=dtype) for t in taus)]


def _leaves(inputs):
    return [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]


def _with_gradients(function, inputs, seed=0):
    """The scores and the gradients of every image feature, word feature and temperature."""
    leaves = _leaves(inputs)
    out = function(*leaves)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    (out.double() * weights.to(out.device)).sum().backward()
    return out.detach(), [leaf.grad for leaf in leaves if leaf.grad is not None]


def _worst(actual, expected):
    """The largest error, relative to the largest entry."""
    return ((actual.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


@settings(max_examples=8)
@given(
    shape=st.tuples(*(st.integers(1, high) for high in (4, 4, 7, 6, 9))),
    seed=st.integers(0, 99),
    taus=st.tuples(*(st.floats(0.5, 15) for _ in range(3))),
)
def test_scores_and_gradients(shape, seed, taus):
    inputs = _inputs(*shape, seed=seed, taus=taus)
    out, gradients = _with_gradients(ops.local_alignment, inputs)
    expected, expected_gradients = _with_gradients(_dense, inputs)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    for actual, right in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(actual, right, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (3, 2, 1, 5, 4), (2, 3, 6, 1, 4), (1, 7, 3, 3, 5), (7, 1, 3, 3, 5)])
def test_one_patch_one_word_one_image_one_report(shape):
    inputs = _inputs(*shape)
    torch.testing.assert_close(ops.local_alignment(*inputs), _dense(*inputs), rtol=1e-9, atol=1e-9)


def test_gradcheck():
    image, image_mask, text, text_mask, *taus = _inputs(2, 3, 4, 3, 3, taus=(2.0, 3.0, 1.5))
    leaves = _leaves((image, text, *taus))
    assert gradcheck(lambda c, w, *t: ops.local_alignment(c, image_mask, w, text_mask, *t), leaves)


@pytest.fixture(scope="module")
def large(implementation):
    """More than one block of images, at the temperatures that training starts from."""
    images, reports = (9, 3) if implementation == "triton" else (19, 21)
    inputs = _inputs(images, reports, 98, 60, 16, taus=TEMPERATURES)
    return inputs, _with_gradients(_fast_dense, inputs)


def _fast_dense(image, image_mask, text, text_mask, tau1, tau2, tau3):
    """As `_dense`, its products as one matrix product a pair: checked against it below."""
    image, text, tau1, tau2, tau3 = (x.double() for x in (image, text, tau1, tau2, tau3))
    rows = []
    for i, m in zip(image, image_mask, strict=True):
        c, row = i[m], []
        for j, n in zip(text, text_mask, strict=True):
            w = j[n]
            context = (tau1 * (c @ w.T).softmax(1)).softmax(0).T @ c
            row.append((tau2 * (w * context).sum(1) / (w.norm(dim=1) * context.norm(dim=1))).logsumexp(0))
        rows.append(torch.stack(row))
    return tau3 * torch.stack(rows)


def test_the_fast_dense_reference():
    inputs = _inputs(3, 2, 5, 4, 6)
    torch.testing.assert_close(_fast_dense(*inputs), _dense(*inputs), rtol=1e-12, atol=1e-12)


def test_many_blocks(large):
    inputs, (expected, expected_gradients) = large
    out, gradients = _with_gradients(ops.local_alignment, inputs)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    for actual, right in zip(gradients, expected_gradients, strict=True):
        assert _worst(actual, right) < 1e-9


def test_fp32_precision(large):
    """The limits that METHODS.md sets: two chained softmaxes amplify rounding."""
    inputs = [x.float() if x.is_floating_point() else x for x in large[0]]
    expected, expected_gradients = _with_gradients(_fast_dense, inputs)  # of the rounded inputs, in float64
    out, gradients = _with_gradients(ops.local_alignment, inputs)
    assert out.dtype == torch.float32
    assert _worst(out, expected) < 2e-5
    for actual, right in zip(gradients[:2], expected_gradients[:2], strict=True):
        assert _worst(actual, right) < 1e-4
    for actual, right in zip(gradients[2:], expected_gradients[2:], strict=True):
        assert _worst(actual, right) < 1e-3


def test_order_of_images_and_reports_only_permutes_the_scores(large):
    (image, image_mask, text, text_mask, *taus), (expected, _) = large
    generator = torch.Generator().manual_seed(4)
    p, q = torch.randperm(len(image), generator=generator), torch.randperm(len(text), generator=generator)
    permuted = ops.local_alignment(image[p], image_mask[p], text[q], text_mask[q], *taus)
    torch.testing.assert_close(permuted, expected[p][:, q], rtol=1e-9, atol=1e-9)


def test_a_score_does_not_depend_on_the_rest_of_the_batch(large):
    (image, image_mask, text, text_mask, *taus), (expected, _) = large
    alone = ops.local_alignment(image[3:4], image_mask[3:4], text[1:3], text_mask[1:3], *taus)
    torch.testing.assert_close(alone, expected[3:4, 1:3], rtol=1e-9, atol=1e-9)


def test_what_is_masked_is_never_seen():
    inputs = _inputs(3, 4, 7, 6, 5)
    expected, expected_gradients = _with_gradients(ops.local_alignment, inputs)
    image, image_mask, text, text_mask, *taus = inputs
    image, text = image.clone(), text.clone()
    image[~image_mask], text[~text_mask] = 1e3, -1e3
    out, gradients = _with_gradients(ops.local_alignment, (image, image_mask, text, text_mask, *taus))
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    for actual, right in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(actual, right, rtol=1e-7, atol=1e-9)
    assert not gradients[0][~image_mask].any() and not gradients[1][~text_mask].any()


@pytest.mark.parametrize("scale", [1e-4, 1.0, 30.0])
def test_largest_temperatures_do_not_overflow(scale):
    """Scores in the thousands at tau 100: exp(tau cos) alone would overflow fp32."""
    inputs = _inputs(3, 4, 9, 7, 16, scale=scale, dtype=torch.float32, taus=(100.0, 100.0, 100.0))
    out, gradients = _with_gradients(ops.local_alignment, inputs)
    assert _worst(out, _dense(*inputs)) < 2e-5
    assert all(g.isfinite().all() for g in gradients)


def test_all_equal_features():
    image, image_mask, text, text_mask, *taus = _inputs(2, 3, 4, 5, 6)
    out = ops.local_alignment(torch.ones_like(image), image_mask, torch.ones_like(text), text_mask, *taus)
    expected = taus[2] * (taus[1] + text_mask.sum(1).double().log())  # every cosine is 1
    torch.testing.assert_close(out, expected.expand(2, 3))


# More words than a tile holds, images and reports of more than one window, wide and narrow features


@pytest.mark.parametrize("shape", [(2, 3, 33, 150, 20), (3, 2, 5, 70, 128), (1, 66, 6, 2, 3), (33, 2, 6, 5, 3)])
def test_several_tiles(shape):
    inputs = _inputs(*shape, taus=(3.0, 4.0, 2.0))
    out, gradients = _with_gradients(ops.local_alignment, inputs)
    expected, expected_gradients = _with_gradients(_fast_dense, inputs)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    for actual, right in zip(gradients, expected_gradients, strict=True):
        assert _worst(actual, right) < 1e-9


@pytest.mark.parametrize("major", [8, 9])
def test_tiles_of_full_precision(major, implementation, monkeypatch):
    """Those that a GPU has for float32; interpreted, all features have those of bfloat16."""
    if implementation != "triton":
        pytest.skip("the reference has none")
    monkeypatch.setattr(local_alignment, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (major, 0))
    inputs = _inputs(3, 2, 40, 70, 48, taus=(3.0, 4.0, 2.0))
    scores = local_alignment._scores_op(*inputs[:6])
    gradients = local_alignment._backward_op(torch.ones_like(scores), scores, *inputs[:6])
    leaves = _leaves(inputs)
    expected = _fast_dense(*leaves[:6], torch.ones(()))
    expected.sum().backward()
    torch.testing.assert_close(scores, expected.detach(), rtol=1e-9, atol=1e-9)
    for actual, leaf in zip(gradients, (leaves[0], leaves[2], *leaves[4:6]), strict=True):
        assert _worst(actual, leaf.grad) < 1e-9


def test_many_images_and_long_reports(implementation, monkeypatch):
    """What is kept for every patch and report does not grow with the images: they are taken a window at a time."""
    monkeypatch.setattr(local_alignment, "_PROGRAMS", 4)
    inputs = _inputs(21, 2, 3, 130, 4)
    torch.testing.assert_close(ops.local_alignment(*inputs), _fast_dense(*inputs), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("images", "reports"), [(0, 3), (2, 0), (0, 0)])
def test_no_images_or_no_reports(images, reports):
    image, image_mask, text, text_mask, *taus = _inputs(2, 3, 4, 5, 6)
    out, _ = _with_gradients(
        ops.local_alignment, (image[:images], image_mask[:images], text[:reports], text_mask[:reports], *taus)
    )
    assert out.shape == (images, reports)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features_are_held_to_fp32_limits(dtype, implementation):
    """METHODS.md, section 2; the gradients before they are rounded to the features' dtype."""
    inputs = _inputs(3, 4, 98, 60, 64, seed=3, taus=TEMPERATURES, dtype=dtype)
    inputs[4:] = (t.float() for t in inputs[4:])
    expected, right = _with_gradients(_fast_dense, [x.double() if x.is_floating_point() else x for x in inputs])
    out, gradients = _with_gradients(ops.local_alignment, inputs)
    assert out.dtype == torch.float32 and gradients[0].dtype == gradients[1].dtype == dtype
    assert _worst(out, expected) < 2e-5
    half_a_step = torch.finfo(dtype).eps / 2
    exact = _exact_gradients(inputs) if implementation == "triton" else None
    for k, limit in enumerate((1e-4, 1e-4, 1e-3, 1e-3)):
        rounding = half_a_step if k < 2 else 0
        assert _worst(gradients[k], right[k]) < limit + rounding
        if exact is not None:
            assert _worst(exact[k], right[k]) < limit


def _exact_gradients(inputs, seed=0):
    """What the backward operator returns, in float32, for the loss of `_with_gradients`."""
    *pair, tau3 = inputs
    scores = local_alignment._scores_op(*pair)
    weights = torch.randn(scores.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return local_alignment._backward_op(weights.float() * tau3, scores, *pair)


def test_the_same_bits_every_time():
    inputs = _inputs(9, 2, 40, 70, 20, dtype=torch.float32)
    out, gradients = _with_gradients(ops.local_alignment, inputs)
    again, gradients_again = _with_gradients(ops.local_alignment, inputs)
    assert torch.equal(out, again)
    assert all(torch.equal(a, b) for a, b in zip(gradients, gradients_again, strict=True))


def test_not_contiguous():
    image, image_mask, text, text_mask, *taus = _inputs(4, 3, 7, 6, 10)
    inputs = image.mT.contiguous().mT[::2], image_mask[::2], text[:, :, ::2], text_mask.T.contiguous().T, *taus
    inputs = (inputs[0][..., 1::2], *inputs[1:])
    out, gradients = _with_gradients(ops.local_alignment, inputs)
    expected, expected_gradients = _with_gradients(ops.local_alignment, [x.contiguous() for x in inputs])
    torch.testing.assert_close(out, expected)
    for actual, right in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(actual, right)


def test_bad_shapes():
    image, image_mask, text, text_mask, *taus = _inputs(2, 3, 4, 5, 6)
    with pytest.raises(ValueError, match=r"image_mask is \(2, 3\): expected \(2, 4\)"):
        ops.local_alignment(image, image_mask[:, :3], text, text_mask, *taus)
    with pytest.raises(ValueError, match="6 and 5 wide"):
        ops.local_alignment(image, image_mask, text[..., :5], text_mask, *taus)
    with pytest.raises(ValueError, match="float32"):
        ops.local_alignment(image, image_mask, text.float(), text_mask, *taus)


# The operators


def _pair_inputs(images=2, reports=3, patches=4, words=5, width=6, dtype=torch.float32):
    return _inputs(images, reports, patches, words, width, dtype=dtype)[:6]


_OPERATORS = {
    "triton": (local_alignment._scores_op, local_alignment._backward_op),
    "blocked": (local_alignment._blocked_op, local_alignment._blocked_backward_op),
}


def test_operators(implementation):
    if implementation not in _OPERATORS:
        pytest.skip("not an operator")
    forward, backward = _OPERATORS[implementation]
    pair = _pair_inputs()
    image, image_mask, text, text_mask, *taus = pair
    leaves = [x.requires_grad_(x.is_floating_point()) for x in (image, image_mask, text, text_mask, *taus)]
    torch.library.opcheck(forward, leaves)
    scores = forward(*pair).detach()
    pair = [x.detach() for x in pair]
    torch.library.opcheck(backward, (torch.rand_like(scores), scores, *pair))


def test_compiles_whole_and_once():
    torch._dynamo.reset()
    function = torch.compile(ops.local_alignment, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(2):
            inputs = _inputs(2, 3, 4, 5, 6, seed=seed, dtype=torch.float32)
            out, gradients = _with_gradients(function, inputs)
            expected, expected_gradients = _with_gradients(ops.local_alignment, inputs)
            torch.testing.assert_close(out, expected)
            for actual, right in zip(gradients, expected_gradients, strict=True):
                torch.testing.assert_close(actual, right)


def test_the_backward_pass_can_run_twice():
    leaves = _leaves(_inputs(2, 3, 4, 5, 6))
    scores = ops.local_alignment(*leaves)
    parameters = [x for x in leaves if x.requires_grad]
    first, again = (torch.autograd.grad(scores.sum(), parameters, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_flops_and_bytes(implementation):
    """The FLOPs are as many as are counted where the reference runs block by block, which recomputes as kernels do."""
    if implementation not in _OPERATORS:
        pytest.skip("not an operator")
    forward_op, _ = _OPERATORS[implementation]
    pair = _pair_inputs()
    pair[1], pair[3] = torch.ones_like(pair[1]), torch.ones_like(pair[3])
    with FlopCounterMode(display=False) as counted:
        scores = local_alignment._blocked(*pair)
    forward_flops = counted.get_total_flops()
    with FlopCounterMode(display=False) as counted:
        local_alignment._blocked_backward(torch.ones_like(scores), scores, *pair)
    backward_flops = counted.get_total_flops()
    pair = _leaves(pair)
    with FlopCounterMode(display=False) as flops, ByteCounter() as moved:
        scores = forward_op(*pair)
    assert flops.get_total_flops() == forward_flops
    assert moved.total == nbytes(pair) + 2 * 3 * 4
    with FlopCounterMode(display=False) as flops, ByteCounter() as moved:
        scores.sum().backward()
    assert flops.get_total_flops() == backward_flops
    features_and_taus = nbytes([x for x in pair if x.is_floating_point()])
    assert moved.total == nbytes(pair) + features_and_taus + 2 * 2 * 3 * 4


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(37, 41, 98, 128, 128), (5, 7, 33, 150, 40), (3, 70, 392, 60, 128)])
def test_on_a_gpu(shape, dtype):
    inputs = [x.cuda() for x in _inputs(*shape, dtype=dtype, taus=TEMPERATURES)]
    inputs[4:] = (t.float() for t in inputs[4:])
    out, gradients = _with_gradients(ops.local_alignment, inputs)
    expected, right = _with_gradients(_fast_dense, [x.double() if x.is_floating_point() else x for x in inputs])
    assert _worst(out, expected) < 2e-5
    half_a_step = torch.finfo(dtype).eps / 2
    for k, limit in enumerate((1e-4, 1e-4, 1e-3, 1e-3, 1e-3)):
        assert _worst(gradients[k], right[k]) < limit + (half_a_step if k < 2 else 0)


def test_half_features_have_float32_attention():
    image, image_mask, text, text_mask, *_ = _inputs(3, 3, 98, 60, 128, dtype=torch.bfloat16)
    tau1 = torch.tensor(1 / 0.07)
    exact = ops.word_attention(image.double(), image_mask, text.double(), text_mask, tau1.double())
    found = ops.word_attention(image, image_mask, text, text_mask, tau1)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=1e-6)


def test_autocast_is_left_aside():
    inputs = _inputs(3, 3, 20, 12, 16, dtype=torch.float32)

    def under_autocast(*given):
        with torch.autocast("cpu", torch.bfloat16):
            return ops.local_alignment(*given)

    found, gradients = _with_gradients(under_autocast, inputs)
    expected, right = _with_gradients(ops.local_alignment, inputs)
    assert found.equal(expected) and all(a.equal(b) for a, b in zip(gradients, right, strict=True))


def test_attention_and_contexts_of_matched_pairs():
    image, image_mask, text, text_mask, tau1, tau2, _ = _inputs(4, 4, 6, 5, 7)
    attention = ops.word_attention(image, image_mask, text, text_mask, tau1)
    contexts = ops.word_contexts(image, image_mask, text, text_mask, tau1)
    for i in range(4):
        m, n = image_mask[i], text_mask[i]
        right_attention, right_contexts, _ = _pair(image[i][m], text[i][n], tau1, tau2)
        torch.testing.assert_close(attention[i][m][:, n], right_attention)
        torch.testing.assert_close(contexts[i][n], right_contexts)
        assert not attention[i][~m].any()
