import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.library import opcheck
from torch.nn.functional import cross_entropy, logsigmoid, normalize
from torch.utils.flop_counter import FlopCounterMode

from clinvla_fast import backend, ops
from clinvla_fast.kernels import contrastive
from clinvla_fast.kernels.traffic import ByteCounter, nbytes

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, of lanes that are not stored

BOTH = pytest.mark.parametrize("name", ["reference", "triton"])
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCES = {torch.float32: (1e-5, 5e-4), torch.float16: (1e-5, 2e-3), torch.bfloat16: (1e-5, 1e-2)}
FORMS = {
    "symmetric": ops.contrastive,
    "one-way": partial(ops.contrastive, symmetric=False),
    "sigmoid": ops.sigmoid_contrastive,
}


def _plain(image, text, scale):
    """Symmetric InfoNCE, number by number."""
    unit = [[[v / math.sqrt(sum(u * u for u in row)) for v in row] for row in x.tolist()] for x in (image, text)]
    logits = [[scale * sum(a * b for a, b in zip(i, t, strict=True)) for t in unit[1]] for i in unit[0]]
    total = 0.0
    for k in range(len(logits)):
        for line in (logits[k], [row[k] for row in logits]):
            top = max(line)
            total += top + math.log(sum(math.exp(v - top) for v in line)) - logits[k][k]
    return total / (2 * len(logits))


def _plain_sigmoid(image, text, scale, bias):
    total = 0.0
    for i, x in enumerate(image.tolist()):
        for j, y in enumerate(text.tolist()):
            z = scale * sum(a * b for a, b in zip(x, y, strict=True)) / math.hypot(*x) / math.hypot(*y) + bias
            total += math.log1p(math.exp(-z if i == j else z))
    return total / len(image)


def _random(batch, width, seed=0, dtype=torch.float64):
    return torch.randn(2, batch, width, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _arguments(images, texts, width, dtype, form="symmetric", scale=14.0, device="cpu"):
    """Leaves, a third of whose pairs are alike."""
    generator = torch.Generator().manual_seed(images + texts + width)
    image, text = (torch.randn(n, width, generator=generator) for n in (images, texts))
    alike = min(images, texts) // 3
    text[:alike] = image[:alike] + 0.1 * text[:alike]
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    scalars = [scale, -4.0][: 2 if form == "sigmoid" else 1]
    made = [image.to(dtype), text.to(dtype), *(torch.tensor(v, dtype=exact) for v in scalars)]
    return [x.to(device).requires_grad_() for x in made]


def _run(name, form, arguments, offset=0):
    """The loss and every gradient."""
    with backend.use(name):
        loss = FORMS[form](*arguments, offset=offset)
    return loss.detach(), *torch.autograd.grad(1.7 * loss, arguments)


def _doubled(arguments):
    return [x.detach().double().requires_grad_() for x in arguments]


# Formulas and values -------------------------------------------------------------------------------------------------


@BOTH
@given(batch=st.integers(1, 13), width=st.integers(2, 33), scale=st.floats(0.1, 100), seed=st.integers(0, 99))
@settings(max_examples=25)
def test_formula(name, batch, width, scale, seed):
    image, text = _random(batch, width, seed)
    scale = torch.tensor(scale, dtype=torch.float64)
    with backend.use(name):
        loss = ops.contrastive(image, text, scale)
        pairs = ops.sigmoid_contrastive(image, text, scale, scale * 0 - 3)
    assert loss.item() == pytest.approx(_plain(image, text, scale.item()), rel=1e-9, abs=2e-11)
    assert pairs.item() == pytest.approx(_plain_sigmoid(image, text, scale.item(), -3), rel=1e-9, abs=2e-11)


@BOTH
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("images", "texts", "offset"), [(5, 5, 0), (4, 11, 0), (4, 11, 7), (11, 4, -7), (11, 4, 0)])
def test_rectangles(name, images, texts, offset, symmetric):
    image, text, scale = _arguments(images, texts, 6, torch.float64)
    z = scale * normalize(image) @ normalize(text).mT
    rows = torch.arange(max(0, -offset), max(0, -offset) + min(images, texts))
    expected = cross_entropy(z[rows], rows + offset)
    if symmetric:
        expected = (expected + cross_entropy(z.mT[rows + offset], rows)) / 2
    bias = torch.tensor(-2.0, dtype=torch.float64)
    y = -torch.ones_like(z)
    y[rows, rows + offset] = 1
    with backend.use(name):
        torch.testing.assert_close(ops.contrastive(image, text, scale, offset, symmetric), expected)
        pairs = ops.sigmoid_contrastive(image, text, scale, bias, offset)
    torch.testing.assert_close(pairs, -logsigmoid(y * (z + bias)).sum() / images)


@BOTH
def test_shards_add_up(name):
    image, text, scale = _arguments(12, 12, 5, torch.float64)
    bias = scale * 0 - 1
    shards = [(image[r : r + 4], text[r : r + 4], r) for r in (0, 4, 8)]
    with backend.use(name):
        parts = [
            ops.contrastive(x, text, scale, r, symmetric=False) + ops.contrastive(y, image, scale, r, symmetric=False)
            for x, y, r in shards
        ]
        torch.testing.assert_close(torch.stack(parts).mean() / 2, ops.contrastive(image, text, scale))
        pairs = torch.stack([ops.sigmoid_contrastive(x, text, scale, bias, r) for x, _, r in shards]).mean()
        torch.testing.assert_close(pairs, ops.sigmoid_contrastive(image, text, scale, bias))


@BOTH
def test_fp32_at_the_largest_scale(name):
    image, text = _random(37, 128, dtype=torch.float32)
    with backend.use(name):
        loss = ops.contrastive(image, text, torch.tensor(100.0))
    assert loss.item() == pytest.approx(_plain(image, text, 100.0), rel=1e-5)


@BOTH
def test_lengths_do_not_matter(name):
    image, text = _random(5, 7)
    scale = torch.tensor(14.0, dtype=torch.float64)
    with backend.use(name):
        longer = ops.contrastive(image * torch.arange(1, 6)[:, None], text * 1e-3, scale)
        torch.testing.assert_close(longer, ops.contrastive(image, text, scale))


@BOTH
def test_known_values(name):
    scale = torch.tensor(3.0)
    same, apart = torch.ones(8, 4), torch.eye(8)
    with backend.use(name):
        assert ops.contrastive(same, same, scale).item() == pytest.approx(math.log(8), rel=1e-6)  # tells nothing apart
        expected = math.log(1 + 7 * math.exp(-3))
        assert ops.contrastive(apart, apart, scale).item() == pytest.approx(expected, abs=1e-6)
        assert ops.contrastive(same[:1], -same[:1], scale).item() == pytest.approx(0, abs=1e-6)  # has no negatives
        nothing = ops.sigmoid_contrastive(same, same, scale * 0, scale * 0)
    assert nothing.item() == pytest.approx(8 * math.log(2), rel=1e-6)


@BOTH
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("images", "texts"), [(0, 0), (0, 4), (4, 0)])
def test_an_empty_batch(name, form, images, texts):
    arguments = _arguments(images, texts, 4, torch.float32, form)
    with backend.use(name):
        loss = FORMS[form](*arguments)
    if form == "sigmoid" and images:
        assert loss == 0
    else:
        assert loss.isnan()
    if name == "triton":
        gradients = torch.autograd.grad(loss, arguments)
        assert all((g == 0).all() for g in gradients)


@BOTH
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale", [60.0, 100.0, 1e4])
@pytest.mark.parametrize("sign", [1, -1])
def test_extreme_logits(name, form, scale, sign):
    """All rows alike, or each image the opposite of every text; lengths up to where their squares nearly overflow."""
    image = torch.ones(70, 8) * torch.logspace(-15, 15, 70)[:, None]
    arguments = [x.requires_grad_() for x in (image, sign * torch.ones(70, 8), torch.tensor(scale))]
    if form == "sigmoid":
        arguments.append(torch.tensor(-10.0, requires_grad=True))
    loss, *gradients = _run(name, form, arguments)
    truth = _run("reference", form, _doubled(arguments))[0]
    assert loss.item() == pytest.approx(truth.item(), rel=1e-5, abs=2e-7 * scale)
    assert all(g.isfinite().all() for g in gradients)


@BOTH
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_rows(name, form, dtype):
    arguments = _arguments(9, 9, 6, dtype, form)
    with torch.no_grad():
        arguments[0][3], arguments[1][5] = 0, 0
    loss, *gradients = _run(name, form, arguments)
    assert loss.isfinite() and all(g.isfinite().all() for g in gradients)
    assert (gradients[0][3] == 0).all() and (gradients[1][5] == 0).all() and gradients[0][4].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": torch.ones(3, 5)}, r"\[3, 4\] and \[3, 5\]: expected \[I, D\] and \[J, D\]"),
        ({"image": torch.ones(4)}, r"image and text are \[4\]"),
        ({"text": torch.ones(3, 4, dtype=torch.float16)}, "float32 and torch.float16: expected one floating dtype"),
        ({"scale": torch.ones(1)}, r"scale is torch.float32 \[1\]: expected a floating scalar"),
        ({"bias": torch.tensor(1)}, r"bias is torch.int64 \[\]"),
        ({"scale": torch.ones((), device="meta")}, "different devices"),
        ({"offset": 1}, "offset is 1 with 3 images and 3 texts: .* expected 0 to 0"),
        ({"text": torch.ones(5, 4), "offset": 3}, "expected 0 to 2"),
        ({"text": torch.ones(1, 4), "offset": 1}, "expected -2 to 0"),
    ],
)
def test_check(change, message):
    ones = {"image": torch.ones(3, 4), "text": torch.ones(3, 4), "scale": torch.tensor(1.0), "bias": torch.tensor(0.0)}
    arguments = ones | change
    with pytest.raises(ValueError, match=message):
        ops.sigmoid_contrastive(**arguments)
    if "bias" not in change:
        arguments.pop("bias")
        with pytest.raises(ValueError, match=message):
            ops.contrastive(**arguments)


# The reference's blocks ----------------------------------------------------------------------------------------------


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(contrastive, "_block_rows", lambda y: 2)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale", [14.0, -14.0, 100.0])
@pytest.mark.parametrize(("images", "texts", "offset"), [(9, 9, 0), (3, 40, 21), (40, 3, -21)])
def test_reference_by_blocks(form, images, texts, offset, scale, monkeypatch):
    arguments = _arguments(images, texts, 2, torch.float64, form, scale)
    whole = _run("reference", form, arguments, offset)
    monkeypatch.setattr(contrastive, "_block_rows", lambda y: 2)
    torch.testing.assert_close(_run("reference", form, arguments, offset), whole)


# Gradients -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["reference", "triton"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("images", "texts", "offset"), [(3, 5, 1), (4, 2, -1)])
def test_gradients(name, form, images, texts, offset, monkeypatch):
    monkeypatch.setattr(contrastive, "_block_rows", lambda y: 2)
    arguments = _arguments(images, texts, 2, torch.float64, form, scale=5.0)
    with backend.use(name):
        assert gradcheck(partial(FORMS[form], offset=offset), arguments)


@BOTH
def test_gradients_of_the_two_exponentials(name, monkeypatch):
    monkeypatch.setattr(contrastive, "_block_rows", lambda y: 2)
    image, text, scale = _arguments(3, 3, 2, torch.float64, scale=80.0)
    with backend.use(name):
        assert gradcheck(ops.contrastive, (image, text, scale))


@pytest.mark.parametrize("form", ["symmetric", "sigmoid"])
@pytest.mark.parametrize("wanted", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1)])
def test_only_the_gradients_that_are_asked_for(form, wanted):
    arguments = _arguments(9, 9, 6, torch.float64, form)
    expected = _run("reference", form, arguments)[1:]
    for x, want in zip(arguments, (*wanted, wanted[-1]), strict=False):
        x.requires_grad_(bool(want))
    with backend.use("triton"):
        (1.7 * FORMS[form](*arguments)).backward()
    for x, gradient in zip(arguments, expected, strict=True):
        assert (x.grad is None) != x.requires_grad
        if x.requires_grad:
            torch.testing.assert_close(x.grad, gradient)


# Accuracy ------------------------------------------------------------------------------------------------------------


def _check_accuracy(check, arguments, form, offset=0):
    truth = _run("reference", form, _doubled(arguments), offset)
    same_dtype = _run("reference", form, arguments, offset)
    actual = _run("triton", form, arguments, offset)
    forward, backward = TOLERANCES[arguments[0].dtype]
    for one, other, exact, tolerance in zip(actual, same_dtype, truth, (forward, *[backward] * 4), strict=False):
        check(one, other, exact, tolerance)


@pytest.mark.parametrize("scale", [14.0, 69.9, 70.1, 100.0])
def test_accuracy_by_blocks(scale, monkeypatch, assert_as_accurate):
    arguments = _arguments(150, 90, 24, torch.float32, scale=scale)
    truth, whole = (_run("reference", "symmetric", given, -20) for given in (_doubled(arguments), arguments))
    monkeypatch.setattr(contrastive, "_block_rows", lambda y: 24)
    actual = _run("reference", "symmetric", arguments, -20)
    for one, other, exact, tolerance in zip(actual, whole, truth, (1e-6, 1e-4, 1e-4, 1e-4), strict=True):
        assert_as_accurate(one, other, exact, tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("images", "texts", "width", "offset", "scale"),
    [
        (150, 150, 24, 0, 14.0),  # several blocks and splits
        (70, 90, 130, 20, 14.0),  # chunks of the width
        (200, 70, 33, -3, 100.0),
    ],
)
def test_accuracy(dtype, form, images, texts, width, offset, scale, assert_as_accurate):
    _check_accuracy(assert_as_accurate, _arguments(images, texts, width, dtype, form, scale), form, offset)


@given(
    images=st.integers(1, 70),
    more=st.integers(-70, 70),
    width=st.integers(1, 40),
    scale=st.sampled_from([0.0, 1.0, 14.0, 70.0, 70.1, 100.0]),
    form=st.sampled_from(sorted(FORMS)),
    data=st.data(),
)
@settings(max_examples=10)
def test_any_shape(images, more, width, scale, form, data):
    texts = max(1, images + more)
    offset = data.draw(st.integers(min(0, texts - images), max(0, texts - images)))
    arguments = _arguments(images, texts, width, torch.float64, form, scale)
    expected, actual = (_run(name, form, arguments, offset) for name in ("reference", "triton"))
    torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-9)


def test_one_program_streams_several_tiles(monkeypatch):
    monkeypatch.setattr(contrastive, "_PROGRAMS", 1)
    for form in FORMS:
        for scale in (14.0, 100.0):
            arguments = _arguments(70, 150, 8, torch.float64, form, scale)
            torch.testing.assert_close(_run("triton", form, arguments, 80), _run("reference", form, arguments, 80))


def test_not_contiguous():
    scale = torch.tensor(7.0, dtype=torch.float64)
    wide = _random(6, 10)[0]
    text = torch.randn(10, generator=torch.Generator().manual_seed(3), dtype=torch.float64).expand(10, 10)[:, :6]
    for image in (wide.mT, _random(20, 6)[0][::2]):
        expected, actual = (_run(name, "symmetric", _leaves(image, text, scale)) for name in ("reference", "triton"))
        torch.testing.assert_close(actual, expected)


def _leaves(*tensors):
    return [x.detach().requires_grad_() for x in tensors]


def test_small_fp16_probabilities_are_not_lost():
    """Uniform over 300 texts whose lengths are 100: G / |text| is about 3e-5, subnormal in fp16 if left alone."""
    image, text, scale = _arguments(10, 300, 16, torch.float16, scale=0.5)
    with torch.no_grad():
        text *= 100
    truth = _run("reference", "symmetric", _doubled((image, text, scale)))[1]
    actual = _run("triton", "symmetric", (image, text, scale))[1]
    assert (actual - truth).abs().max() < 2e-3 * truth.abs().max()


@pytest.mark.parametrize("form", FORMS)
def test_two_runs_are_equal(form):
    arguments = _arguments(140, 140, 20, torch.float32, form)
    first, second = (_run("triton", form, arguments) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# Registration --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["symmetric", "sigmoid"])
def test_opcheck(form):
    image, text, scale, *bias = _arguments(5, 7, 4, torch.float32, form)
    bias = bias[0] if bias else None
    opcheck(torch.ops.clinvla_fast.contrastive, (image, text, scale, bias, 1, form == "symmetric"))
    with torch.no_grad():
        outputs = torch.ops.clinvla_fast.contrastive(image, text, scale, bias, 1, form == "symmetric")
        inputs = [None if x is None else x.detach() for x in (image, text, scale, bias)]
    for sides in ((True, True), (False, True), (True, False)):
        arguments = torch.tensor(1.0), *inputs, *outputs[1:], 1, *sides
        opcheck(torch.ops.clinvla_fast.contrastive_backward, arguments)


@pytest.mark.parametrize(("name", "compiler"), [("reference", "aot_eager"), ("triton", "inductor")])
@pytest.mark.parametrize("form", ["symmetric", "sigmoid"])
def test_compile(name, compiler, form, small_blocks):
    torch._dynamo.reset()
    compiled = torch.compile(FORMS[form], fullgraph=True, backend=compiler)
    with backend.use(name), torch._dynamo.config.patch(error_on_recompile=True):
        for scale in (14.0, 20.0):
            arguments = _arguments(9, 9, 6, torch.float32, form, scale)
            loss = compiled(*arguments)
            actual = loss.detach(), *torch.autograd.grad(1.7 * loss, arguments)
            torch.testing.assert_close(actual, _run(name, form, arguments))


@pytest.mark.parametrize("form", FORMS)
def test_flops(form, small_blocks):
    counts = []
    for name in ("reference", "triton"):
        arguments = _arguments(9, 11, 6, torch.float32, form)
        with FlopCounterMode(display=False) as forward, backend.use(name):
            loss = FORMS[form](*arguments)
        with FlopCounterMode(display=False) as backward:
            loss.backward()
        counts.append((forward.get_total_flops(), backward.get_total_flops()))
    assert counts[0] == counts[1] == (2 * 9 * 11 * 6, 3 * 2 * 9 * 11 * 6)


def test_flops_of_one_side(small_blocks):
    for name in ("reference", "triton"):
        image, text, scale = _arguments(9, 11, 6, torch.float32)
        with backend.use(name):
            loss = ops.contrastive(image, text.detach(), scale)
        with FlopCounterMode(display=False) as backward:
            loss.backward()
        assert backward.get_total_flops() == 2 * 2 * 9 * 11 * 6


@pytest.mark.parametrize("form", FORMS)
def test_bytes(form):
    arguments = _arguments(9, 11, 6, torch.float16, form)
    with ByteCounter() as forward, backend.use("triton"):
        loss = FORMS[form](*arguments)
    with ByteCounter() as backward:
        gradients = torch.autograd.grad(loss, arguments)
    reference = _run("reference", form, arguments)
    assert forward.total == nbytes(arguments, reference[0])
    assert backward.total == nbytes(arguments, reference[0], reference[1:]) == nbytes(arguments, loss, gradients)


def test_scratch_at_65536(monkeypatch):
    """What the launcher allocates beyond inputs and outputs of the largest batch, by its shapes: under 0.5 GB."""
    allocated = []
    monkeypatch.setattr(contrastive, "launch", lambda kernel, grid, *args, **_: allocated.append(args))
    image, text = torch.empty(2, 65_536, 128, dtype=torch.bfloat16)
    scale = torch.tensor(1.0)
    outputs = torch.ops.clinvla_fast.contrastive(image, text, scale, None, 0, True)
    torch.ops.clinvla_fast.contrastive_backward(scale, image, text, scale, None, *outputs[1:], 0, True, True)
    tensors = {x.data_ptr(): x for args in allocated for x in args if isinstance(x, torch.Tensor)}
    scratch = nbytes(list(tensors.values())) - nbytes(image, text)
    assert scratch < 500_000_000


# On a GPU ------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("width", "scale"), [(128, 14.0), (128, 100.0), (512, 14.0)])
def test_accuracy_on_a_gpu(dtype, form, width, scale, assert_as_accurate):
    arguments = _arguments(2_000, 3_000, width, dtype, form, scale, "cuda")
    _check_accuracy(assert_as_accurate, arguments, form, 700)


@pytest.mark.gpu
def test_memory_on_a_gpu():
    arguments = _arguments(65_536, 65_536, 128, torch.bfloat16, device="cuda")
    _run("triton", "symmetric", arguments)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    _run("triton", "symmetric", arguments)
    assert torch.cuda.max_memory_allocated() - before < 500_000_000
