import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.utils.flop_counter import FlopCounterMode

from clinvla_fast import backend, ops
from clinvla_fast.kernels import invertible_adapter
from clinvla_fast.kernels.bottleneck import bottleneck
from clinvla_fast.kernels.traffic import ByteCounter, nbytes

both_backends = pytest.mark.parametrize("implementation", ["reference", "triton"])

# Algorithm 1 of ClinVLA in NumPy, a row at a time.


def _mlp(x, p):
    down_weight, down_bias, up_weight, up_bias = (t.double().numpy() for t in p)
    return up_weight @ np.maximum(down_weight @ x + down_bias, 0) + up_bias


def _forward(row, f, g):
    half = len(row) // 2
    first = _mlp(row[half:], f) + row[:half]
    return np.concatenate([first, _mlp(first, g) + row[half:]])


def _inverse(row, f, g):
    half = len(row) // 2
    second = row[half:] - _mlp(row[:half], g)
    return np.concatenate([row[:half] - _mlp(second, f), second])


def _random(random_bottleneck, shape, inner, seed=0, dtype=torch.float64):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    half = shape[-1] // 2
    return x, random_bottleneck(half, inner, seed + 1, dtype), random_bottleneck(half, inner, seed + 2, dtype)


@pytest.mark.parametrize(("shape", "inner"), [((1, 2), 1), ((7, 12), 3), ((3, 5, 44), 11), ((1, 192), 48)])
@pytest.mark.parametrize("inverse", [False, True])
@both_backends
def test_formula(random_bottleneck, shape, inner, inverse, implementation):
    x, f, g = _random(random_bottleneck, shape, inner)
    rows = x.numpy().reshape(-1, shape[-1])
    expected = np.stack([(_inverse if inverse else _forward)(row, f, g) for row in rows]).reshape(shape)
    with backend.use(implementation):
        actual = ops.invertible_adapter(x, f, g, inverse)
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-10, atol=1e-8)


def _scaled(half, inner, seed, dtype, scale=1.0, device="cpu"):
    """Two bottlenecks whose outputs are about as large as their inputs, times `scale`."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (inner, half), (inner,), (half, inner), (half,)

    def part(shape):
        size = scale * (2 / shape[-1]) ** 0.5
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * size).to(device, dtype)

    return [ops.Bottleneck(*map(part, shapes)) for _ in range(2)]


@settings(max_examples=10)
@given(
    rows=st.integers(1, 9),
    half=st.integers(1, 40),
    inner=st.integers(1, 30),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 99),
)
@both_backends
def test_round_trip(rows, half, inner, dtype, seed, implementation):
    f, g = _scaled(half, inner, seed, dtype, scale=0.5)
    x = torch.randn(rows, 2 * half, generator=torch.Generator().manual_seed(seed)).to(dtype)
    with backend.use(implementation):
        for inverse in (False, True):
            y = ops.invertible_adapter(x, f, g, inverse)
            back = ops.invertible_adapter(y, f, g, not inverse)
            roundings = 6 if implementation == "triton" else 12  # the reference rounds its hidden layers too
            scale = torch.finfo(dtype).eps * max(1.0, x.abs().max().item(), y.abs().max().item())
            torch.testing.assert_close(back, x, rtol=0, atol=roundings * scale)


@both_backends
def test_what_is_not_a_number_stays_in_its_row_and_is_seen_there(random_bottleneck, implementation):
    """Everything that depends on it is none either: ReLU does not make zeros of it."""
    x, f, g = _random(random_bottleneck, (5, 12), 3, dtype=torch.float32)
    x[2, 8] = torch.nan
    with backend.use(implementation):
        out = ops.invertible_adapter(x, f, g)
    assert out[2].isnan().all() and out[[0, 1, 3, 4]].isfinite().all()


def test_order_of_the_halves_matters(random_bottleneck):
    x, f, g = _random(random_bottleneck, (3, 8), 2)
    swapped = ops.invertible_adapter(x, g, f)
    assert not torch.allclose(swapped, ops.invertible_adapter(x, f, g))


@both_backends
def test_no_rows(random_bottleneck, implementation):
    x, f, g = _random(random_bottleneck, (0, 3, 12), 3)
    leaves = [t.requires_grad_() for t in (x, *f, *g)]
    for inverse in (False, True):
        with backend.use(implementation):
            out = ops.invertible_adapter(x, f, g, inverse)
        assert out.shape == (0, 3, 12)
        for leaf, gradient in zip(leaves, torch.autograd.grad(out.sum(), leaves), strict=True):
            assert gradient.shape == leaf.shape and not gradient.any()


def _call(x, *parts, inverse=False):
    return ops.invertible_adapter(x, ops.Bottleneck(*parts[:4]), ops.Bottleneck(*parts[4:]), inverse)


@pytest.mark.parametrize("inverse", [False, True])
@both_backends
def test_gradcheck(random_bottleneck, inverse, implementation):
    x, f, g = _random(random_bottleneck, (2, 4), 2)
    leaves = [t.requires_grad_() for t in (x, *f, *g)]
    with backend.use(implementation):
        assert gradcheck(lambda *t: _call(*t, inverse=inverse), leaves)


def _with_gradients(implementation, inverse, leaves, grad):
    leaves = [t.detach().requires_grad_() for t in leaves]
    with backend.use(implementation):
        out = _call(*leaves, inverse=inverse)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


TOLERANCE = {torch.float32: (1e-5, 5e-4), torch.float16: (1e-3, 4e-3), torch.bfloat16: (1e-2, 3e-2)}


def _three(rows, width, inner, dtype, inverse, scale, device="cpu"):
    """Output and every gradient of the kernels, of the reference in their dtype, and of the reference in float64.

    The rounded inputs are what all three see.
    """
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(rows, width, generator=generator).to(device, dtype) for _ in range(2))
    f, g = _scaled(width // 2, inner, 0, dtype, scale, device)
    leaves = x, *f, *g
    return zip(
        _with_gradients("triton", inverse, leaves, grad),
        _with_gradients("reference", inverse, leaves, grad),
        _with_gradients("reference", inverse, [t.double() for t in leaves], grad.double()),
        strict=True,
    )


# The input is recomputed from a rounded output. Where the adapter adds a fraction of what is there, that gives nearly
# every input to the bit; where it adds as much, one ReLU in 1,000 recomputes to the other side of 0, and the gradient
# of a row may be far off, as it is in the reference where rounding flips a ReLU of the second bottleneck.
def _assert_accurate(assert_as_accurate, rows, width, inner, dtype, inverse, device="cpu"):
    scale = 1.0 if dtype == torch.float32 else 0.1
    for i, found in enumerate(_three(rows, width, inner, dtype, inverse, scale, device)):
        assert_as_accurate(*found, TOLERANCE[dtype][i > 0])


SIZES = [(150, 44, 11), (70, 192, 48)]  # rows, width, inner width


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(
    ("dtype", "size"),
    [(dtype, size) for dtype in TOLERANCE for size in SIZES] + [(torch.bfloat16, (7, 768, 192))],
)
def test_as_accurate_as_the_reference(assert_as_accurate, dtype, size, inverse):
    _assert_accurate(assert_as_accurate, *size, dtype, inverse)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_accurate_as_a_whole_where_the_adapter_adds_much(dtype):
    for actual, same_dtype, truth in _three(150, 44, 11, dtype, False, scale=1.0):
        error, usual = ((t.double() - truth).norm() / truth.norm() for t in (actual, same_dtype))
        assert error <= 4 * usual + TOLERANCE[dtype][0]


@pytest.mark.gpu
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("width", "inner"), [(768, 192), (1024, 256), (44, 11)])
def test_as_accurate_on_a_gpu(assert_as_accurate, width, inner, dtype, inverse):
    _assert_accurate(assert_as_accurate, 10000, width, inner, dtype, inverse, device="cuda")


@settings(max_examples=8)
@given(
    rows=st.integers(0, 70),
    half=st.integers(1, 140),
    inner=st.integers(1, 140),
    inverse=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_shape(rows, half, inner, inverse, seed):
    generator = torch.Generator().manual_seed(seed)
    x, grad = (torch.randn(rows, 2 * half, generator=generator, dtype=torch.float64) for _ in range(2))
    f, g = _scaled(half, inner, seed, torch.float64)
    for actual, expected in zip(
        *(_with_gradients(i, inverse, (x, *f, *g), grad) for i in ("triton", "reference")), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("inner", [3, 9, 200])
@pytest.mark.parametrize("inverse", [False, True])
def test_gradients_asked_for(inner, inverse, monkeypatch):
    """Of x alone, of weights alone, of both, over several slices of rows; a hidden layer wider than a half, too."""
    monkeypatch.setattr(invertible_adapter, "_SLICE", 130)
    monkeypatch.setattr(invertible_adapter, "_MANY_ROWS", 100)
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(150, 12, generator=generator, dtype=torch.float64) for _ in range(2))
    f, g = _scaled(6, inner, 0, torch.float64)
    expected = _with_gradients("reference", inverse, (x, *f, *g), grad)[1:]
    for chosen in ([0], [1, 8], list(range(1, 9)), [0, 3], list(range(9))):
        leaves = [t.detach().requires_grad_(i in chosen) for i, t in enumerate((x, *f, *g))]
        with backend.use("triton"):
            _call(*leaves, inverse=inverse).backward(grad)
        for i, leaf in enumerate(leaves):
            assert (leaf.grad is not None) == (i in chosen)
            if i in chosen:
                torch.testing.assert_close(leaf.grad, expected[i], rtol=1e-9, atol=1e-9)


def test_strided_inputs():
    x = torch.randn(2, 12, 5, 7, dtype=torch.float64)
    grad = torch.randn(7, 5, 1, 12, dtype=torch.float64).expand(7, 5, 2, 12)
    f, g = ([t.T.contiguous().T if t.dim() == 2 else t for t in p] for p in _scaled(6, 3, 0, torch.float64))
    leaves = x.permute(3, 2, 0, 1), *f, *g
    for inverse in (False, True):
        for actual, expected in zip(
            *(_with_gradients(i, inverse, leaves, grad) for i in ("triton", "reference")), strict=True
        ):
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_inputs(dtype):
    """Hidden layers and sums that leave a half's range do not where they are summed in fp32."""
    f, g = _scaled(32, 8, 0, dtype, scale=0.1)
    x = torch.full((3, 64), 3e4, dtype=dtype)
    with backend.use("triton"):
        out = ops.invertible_adapter(x, f, g)
    assert out.isfinite().all()


def test_the_same_bits_every_time():
    leaves = torch.randn(150, 44), *sum(_scaled(22, 11, 0, torch.float32), ())
    grad = torch.randn(150, 44)
    first, second = (_with_gradients("triton", False, leaves, grad) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_opcheck():
    x, grad = torch.randn(9, 12), torch.randn(9, 12)
    f, g = ([t.requires_grad_() for t in p] for p in _scaled(6, 3, 0, torch.float32))
    torch.library.opcheck(torch.ops.clinvla_fast.invertible_adapter.default, (x.requires_grad_(), f, g, False))
    f, g = ([t.detach() for t in p] for p in (f, g))
    for flags in ((True, True), (False, True), (True, False)):
        torch.library.opcheck(
            torch.ops.clinvla_fast.invertible_adapter_backward.default, (grad, x.detach(), f, g, False, *flags)
        )


def test_compiles_whole_and_once():
    torch._dynamo.reset()
    compiled = torch.compile(_call, fullgraph=True)
    parts = sum(_scaled(6, 3, 0, torch.float32), ())
    grad = torch.randn(9, 12)
    with torch._dynamo.config.patch(error_on_recompile=True), backend.use("triton"):
        for seed in range(2):
            x = torch.randn(9, 12, generator=torch.Generator().manual_seed(seed))
            leaves = [t.detach().clone().requires_grad_() for t in (x, *parts)]
            out = compiled(*leaves)
            gradients = torch.autograd.grad(out, leaves, grad)
            expected = _with_gradients("triton", False, leaves, grad)
            for a, b in zip((out, *gradients), expected, strict=True):
                torch.testing.assert_close(a, b)
    torch._dynamo.reset()


def _flops(function):
    with FlopCounterMode(display=False) as counter:
        result = function()
    return counter.get_total_flops(), result


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(("for_x", "for_weights"), [(True, True), (False, True), (True, False)])
def test_flops_and_bytes(inverse, for_x, for_weights):
    x = torch.randn(2, 5, 24).requires_grad_(for_x)
    f, g = (ops.Bottleneck(*(t.requires_grad_(for_weights) for t in p)) for p in _scaled(12, 7, 0, torch.float32))
    leaves = [t for t in (x, *f, *g) if t.requires_grad]
    with ByteCounter() as moved:
        counts = {}
        for implementation in ("reference", "triton"):
            with backend.use(implementation):
                forward, out = _flops(lambda: ops.invertible_adapter(x, f, g, inverse))
                backward, gradients = _flops(lambda out=out: torch.autograd.grad(out.sum(), leaves))
            counts[implementation] = forward, backward
    p, q = (g, f) if inverse else (f, g)
    a = out.chunk(2, -1)[inverse].detach()  # recomputed are b, by all of Q, and the hidden layer of P
    recomputed, _ = _flops(lambda: (bottleneck(a, q), torch.nn.functional.linear(a, p.down_weight, p.down_bias)))
    forward, backward = counts["reference"]
    assert counts["triton"] == (forward, backward + recomputed)
    read_again = nbytes(f, g) - nbytes(p.up_bias)
    assert moved.total == nbytes(x, f, g, out) + nbytes(out, out, gradients) + read_again


def test_check():
    x = torch.randn(3, 12)
    f, g = _scaled(6, 3, 0, torch.float32)
    wrong = {
        r"x is \(3, 11\)": (x[:, :11], f, g),
        r"x is \(\)": (x.sum(), f, g),
        r"f.down_weight is \(3, 5\): expected \[d, 6\]": (x, f._replace(down_weight=f.down_weight[:, :5]), g),
        r"g.up_bias is \(5,\): expected \(6,\)": (x, f, g._replace(up_bias=g.up_bias[:5])),
        r"g.up_weight is \(6, 2\)": (x, f, g._replace(up_weight=g.up_weight[:, :2])),
        r"f.up_bias is torch.float16": (x, f._replace(up_bias=f.up_bias.half()), g),
        r"inner widths 3 and 4": (x, f, _scaled(6, 4, 0, torch.float32)[0]),
    }
    for message, arguments in wrong.items():
        for implementation in ("reference", "triton"):
            with backend.use(implementation), pytest.raises(ValueError, match=message):
                ops.invertible_adapter(*arguments)
    with backend.use("triton"), pytest.raises(ValueError, match="int64"):
        ops.invertible_adapter(
            *(t.long() if isinstance(t, torch.Tensor) else ops.Bottleneck(*(u.long() for u in t)) for t in (x, f, g))
        )
