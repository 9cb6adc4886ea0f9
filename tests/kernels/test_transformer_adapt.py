import itertools
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.nn.functional import gelu, layer_norm, linear, relu
from torch.utils.flop_counter import FlopCounterMode

from clinvla_fast import backend, ops
from clinvla_fast.kernels import transformer_adapt
from clinvla_fast.kernels.traffic import ByteCounter, nbytes


@pytest.fixture(params=["reference", "triton"])
def each_backend(request):
    with backend.use(request.param):
        yield


both = pytest.mark.usefixtures("each_backend")

# The formulas of ClinVLA, section 3.2, in NumPy, a row at a time.


def _adapter(x, p):
    down_weight, down_bias, up_weight, up_bias = (t.numpy() for t in p)
    return up_weight @ np.maximum(down_weight @ x + down_bias, 0) + up_bias


def _layer_norm(x, weight, bias, eps):
    return (x - x.mean()) / np.sqrt(((x - x.mean()) ** 2).mean() + eps) * weight + bias


def _pre_norm(r, x, language, task):
    la = _adapter(x + r, language) + r
    return x + _adapter(la, task) + r


def _post_norm(r, x, language, task, weight, bias, eps):
    h = _layer_norm(r + x, weight, bias, eps)
    la = _adapter(h, language) + r
    ta = _adapter(la, task) + r
    return _layer_norm(ta + x, weight, bias, eps)


@pytest.fixture
def parts(random_bottleneck):
    def make(shape, inner):
        generator = torch.Generator().manual_seed(3)
        ffn, residual = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
        weight, bias = torch.randn(2, shape[-1], generator=generator, dtype=torch.float64)
        adapters = [random_bottleneck(shape[-1], inner, seed) for seed in (1, 2)]
        return ffn, residual, *adapters, weight, bias

    return make


SHAPES = [((1, 3), 1), ((7, 13), 5), ((2, 5, 36), 7), ((1, 768), 64)]


def _rows(function, ffn, residual, *rest):
    flat = (t.numpy().reshape(-1, t.shape[-1]) for t in (ffn, residual))
    return np.stack([function(r, x, *rest) for r, x in zip(*flat, strict=True)]).reshape(ffn.shape)


@both
@pytest.mark.parametrize(("shape", "inner"), SHAPES)
def test_pre_norm(parts, shape, inner):
    ffn, residual, language, task, *_ = parts(shape, inner)
    expected = _rows(_pre_norm, ffn, residual, language, task)
    out = ops.transformer_adapt(ffn, residual, language, task)
    np.testing.assert_allclose(out.numpy(), expected, rtol=1e-10, atol=1e-10)


@both
@pytest.mark.parametrize(("shape", "inner"), SHAPES)
@pytest.mark.parametrize("eps", [1e-12, 0.25])
def test_post_norm(parts, shape, inner, eps):
    ffn, residual, language, task, weight, bias = parts(shape, inner)
    expected = _rows(_post_norm, ffn, residual, language, task, weight.numpy(), bias.numpy(), eps)
    out = ops.transformer_adapt(ffn, residual, language, task, weight, bias, eps)
    np.testing.assert_allclose(out.numpy(), expected, rtol=1e-10, atol=1e-10)


@both
@pytest.mark.parametrize("post_norm", [False, True])
def test_one_adapter_alone(parts, post_norm):
    ffn, residual, adapter, _, weight, bias = parts((4, 9), 3)
    norm = (weight, bias, 1e-5) if post_norm else ()

    def expected(r, x):
        normed = (lambda y: _layer_norm(y, weight.numpy(), bias.numpy(), 1e-5)) if post_norm else (lambda y: y)
        return normed(_adapter(normed(r + x), adapter) + r + x)

    for pair in ((adapter, None), (None, adapter)):
        out = ops.transformer_adapt(ffn, residual, *pair, *norm)
        np.testing.assert_allclose(out.numpy(), _rows(expected, ffn, residual), rtol=1e-10, atol=1e-10)


@both
@pytest.mark.parametrize("post_norm", [False, True])
def test_without_effect_it_is_the_frozen_block(parts, post_norm):
    ffn, residual, language, task, weight, bias = parts((4, 9), 3)
    norm = (weight, bias, 1e-5) if post_norm else ()
    frozen = ffn + residual
    if post_norm:
        frozen = torch.nn.functional.layer_norm(frozen, (9,), weight, bias, 1e-5)
    zeroed = [a._replace(up_weight=a.up_weight * 0, up_bias=a.up_bias * 0) for a in (language, task)]
    for pair in (zeroed, (None, None)):
        torch.testing.assert_close(ops.transformer_adapt(ffn, residual, *pair, *norm), frozen, rtol=0, atol=1e-12)


@both
def test_no_rows(parts):
    ffn, residual, language, task, weight, bias = parts((0, 9), 3)
    assert ops.transformer_adapt(ffn, residual, language, task, weight, bias).shape == (0, 9)
    assert ops.transformer_adapt(ffn, residual, language, task).shape == (0, 9)


@both
@pytest.mark.parametrize("post_norm", [False, True])
def test_gradients(parts, post_norm):
    ffn, residual, language, task, weight, bias = parts((3, 7), 2)
    leaves = [t.requires_grad_() for t in (ffn, residual, *language, *task, *((weight, bias) if post_norm else ()))]

    def function(ffn, residual, *p):
        return ops.transformer_adapt(ffn, residual, ops.Bottleneck(*p[:4]), ops.Bottleneck(*p[4:8]), *p[8:])

    assert gradcheck(function, leaves, fast_mode=True)


# The same operation with other arguments: ALTA's adapters and MAD-X's, from their formulas.


def _alta(z, p):
    """ALTA's adapter without its skip, W2 GELU(W1 z)."""
    return linear(gelu(linear(z, p.down_weight, p.down_bias)), p.up_weight, p.up_bias)


@both
def test_alta_vision(parts):
    attention, x, adapter, *_ = parts((4, 9), 3)
    expected = x + (attention + _alta(attention, adapter))
    out = ops.transformer_adapt(attention, x, None, adapter, activation="gelu", source=attention)
    torch.testing.assert_close(out, expected)

    u = layer_norm(x, (9,))  # any output of the block's second LayerNorm
    mlp = attention
    expected = x + mlp + 0.5 * (u + _alta(u, adapter))
    out = ops.transformer_adapt(mlp, x, None, adapter, activation="gelu", scaling=0.5, inner_skip=True, source=u)
    torch.testing.assert_close(out, expected)


@both
def test_alta_text(parts):
    ffn, x, adapter, _, weight, bias = parts((4, 9), 3)
    norm = weight, bias, 1e-12
    expected = layer_norm(ffn + x, (9,), *norm) + 0.5 * _alta(x, adapter)
    options = {"activation": "gelu", "after_norm": True}
    out = ops.transformer_adapt(ffn, x, None, adapter, *norm, scaling=0.5, source=x, **options)
    torch.testing.assert_close(out, expected)

    h = layer_norm(ffn + x, (9,), *norm)
    out = ops.transformer_adapt(ffn, x, None, adapter, *norm, **options)
    torch.testing.assert_close(out, h + _alta(h, adapter))


@both
def test_mad_x_single_adapter(parts):
    ffn, x, adapter, _, weight, bias = parts((4, 9), 3)
    h = layer_norm(ffn + x, (9,), weight, bias, 1e-12)
    adapted = linear(relu(linear(h, adapter.down_weight, adapter.down_bias)), adapter.up_weight, adapter.up_bias) + ffn
    expected = layer_norm(adapted + x, (9,), weight, bias, 1e-12)
    torch.testing.assert_close(ops.transformer_adapt(ffn, x, None, adapter, weight, bias), expected)


# The kernels against the reference.


@dataclass(frozen=True)
class Case:
    shape: tuple[int, ...] = (5, 70)
    inner: tuple[int, ...] = (7, 20)
    normed: bool = False
    activation: str = "relu"
    scaling: float = 1.0
    inner_skip: bool = False
    sourced: bool = False
    after_norm: bool = False

    def tensors(self, dtype=torch.float64, device="cpu", seed=0, mean=0.0):
        """ffn, residual, source, each adapter's four, the norm's two: those that there are."""
        generator = torch.Generator().manual_seed(seed)
        width = self.shape[-1]
        shapes = [self.shape] * (2 + self.sourced)
        shapes += [s for d in self.inner for s in ((d, width), (d,), (width, d), (width,))]
        shapes += [(width,)] * (2 * self.normed)
        made = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
        for weight in made[2 + self.sourced :]:
            if weight.dim() == 2:
                weight /= weight.shape[1] ** 0.5
        made[1] += mean
        return [t.to(device, dtype).requires_grad_() for t in made]

    def __call__(self, *tensors):
        streams, rest = tensors[: 2 + self.sourced], tensors[2 + self.sourced :]
        adapters = [ops.Bottleneck(*rest[4 * i : 4 * i + 4]) for i in range(len(self.inner))]
        if len(adapters) == 1:
            adapters = [None, *adapters]
        norm = (*rest[-2:], 1e-6) if self.normed else ()
        return ops.transformer_adapt(
            *streams[:2],
            *adapters,
            *norm,
            activation=self.activation,
            scaling=self.scaling,
            inner_skip=self.inner_skip,
            source=streams[2] if self.sourced else None,
            after_norm=self.after_norm,
        )

    def name(self):
        flags = [n for n in ("normed", "inner_skip", "sourced", "after_norm") if getattr(self, n)]
        return "-".join([*map(str, self.inner), self.activation, *flags])


def _cases(**more):
    for inner, normed, skip, sourced, after in itertools.product(((7, 20), (7,)), *[(False, True)] * 4):
        if not (after and (len(inner) == 2 or not normed)):
            activation = "gelu" if skip or after else "relu"
            yield Case(
                inner=inner,
                normed=normed,
                activation=activation,
                scaling=0.5 if skip else 1.0,
                inner_skip=skip,
                sourced=sourced,
                after_norm=after,
                **more,
            )


CASES = list(_cases())
SOME = [
    Case(),
    Case(normed=True),
    Case(inner=(7,), normed=True),
    Case(inner=(7,), activation="gelu", scaling=0.5, inner_skip=True, sourced=True),
    Case(inner=(7,), normed=True, activation="gelu", scaling=0.5, sourced=True, after_norm=True),
]
WIDE = [replace(SOME[1], inner=(70, 130)), replace(SOME[3], inner=(70,)), replace(SOME[1], inner=(70, 3))]


def _run(case, name, tensors, d_out):
    with backend.use(name):
        out = case(*tensors)
    return [out, *torch.autograd.grad(out, tensors, d_out)]


def _compare(case, dtype, assert_as_accurate, device="cpu", mean=0.0):
    tensors = case.tensors(dtype, device, mean=mean)
    d_out = torch.randn(case.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9)).to(device, dtype)
    actual, same_dtype = (_run(case, name, tensors, d_out) for name in ("triton", "reference"))
    double = [t.detach().double().requires_grad_() for t in tensors]
    truth = _run(case, "reference", double, d_out.double())
    forward, backward = {torch.float32: (1e-5, 2e-5), torch.float16: (1e-3, 4e-3), torch.bfloat16: (1e-2, 3e-2)}[dtype]
    for i, (a, s, t) in enumerate(zip(actual, same_dtype, truth, strict=True)):
        if i and case.activation == "relu" and dtype != torch.float32:
            break  # see test_accuracy
        assert_as_accurate(a, s, t, backward if i else forward)


TILES = {torch.float32: (65, 24), torch.float16: (129, 40), torch.bfloat16: (129, 40)}
"""One row more than a block has, and a chunk and a half."""


@pytest.mark.parametrize("dtype", TILES, ids=str)
@pytest.mark.parametrize("case", SOME, ids=Case.name)
def test_accuracy(case, dtype, assert_as_accurate):
    """Rounding to 8 or 11 bits moves inputs of a ReLU across its kink, where the gradient jumps, in the reference as
    in the kernel: there the gradients are compared with GELU in its place.
    """
    _compare(replace(case, shape=TILES[dtype], activation="gelu"), dtype, assert_as_accurate)
    if case.activation == "relu":
        _compare(replace(case, shape=TILES[dtype]), dtype, assert_as_accurate)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", WIDE, ids=Case.name)
def test_accuracy_of_wide_bottlenecks(case, dtype, assert_as_accurate):
    _compare(replace(case, shape=(65, TILES[dtype][1]), activation="gelu"), dtype, assert_as_accurate)


@pytest.mark.parametrize("case", [SOME[1], SOME[4]], ids=Case.name)
def test_accuracy_with_a_large_row_mean(case, assert_as_accurate):
    _compare(replace(case, shape=(9, 200)), torch.float32, assert_as_accurate, mean=100.0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [*SOME, replace(SOME[1], inner=(192, 192))], ids=Case.name)
def test_accuracy_on_a_gpu(case, dtype, assert_as_accurate, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    inner = tuple(64 if d < 64 else d for d in case.inner)
    for activation in ("relu", "gelu"):
        real = replace(case, shape=(4100, 768), inner=inner, activation=activation)
        _compare(real, dtype, assert_as_accurate, "cuda")


@pytest.mark.parametrize("case", [*CASES, *(replace(w, shape=(2, 40)) for w in WIDE)], ids=Case.name)
def test_results_and_gradients_in_double(case):
    tensors = case.tensors()
    d_out = torch.randn(case.shape, dtype=torch.float64)
    for actual, expected in zip(*(_run(case, name, tensors, d_out) for name in ("triton", "reference")), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("case", SOME, ids=Case.name)
def test_gradcheck(case):
    case = replace(case, shape=(2, 10))
    with backend.use("triton"):
        assert gradcheck(case, case.tensors(), fast_mode=True)


@settings(max_examples=10)
@given(
    shape=st.tuples(st.integers(0, 2), st.integers(1, 70), st.integers(1, 50)),
    inner=st.lists(st.integers(1, 66), min_size=1, max_size=2).map(tuple),
    normed=st.booleans(),
    inner_skip=st.booleans(),
    sourced=st.booleans(),
)
def test_odd_shapes(shape, inner, normed, inner_skip, sourced):
    case = Case(shape, inner, normed and shape[-1] > 2, inner_skip=inner_skip, sourced=sourced)
    tensors = case.tensors()
    d_out = torch.randn(case.shape, dtype=torch.float64)
    for actual, expected in zip(*(_run(case, name, tensors, d_out) for name in ("triton", "reference")), strict=True):
        scale = expected.abs().max().item() if expected.numel() else 1.0
        torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-9 * max(scale, 1.0))


def test_tensors_that_are_not_contiguous():
    case = Case(shape=(6, 4, 18), normed=True, sourced=True)
    tensors = [t.detach() for t in case.tensors()]
    strided = [tensors[0].transpose(0, 1), tensors[1][:, :1].expand(6, 4, 18).transpose(0, 1)]
    strided += [tensors[2].transpose(0, 1), *(t.t().contiguous().t() if t.dim() == 2 else t for t in tensors[3:])]
    leaves = [t.requires_grad_() for t in strided]
    d_out = torch.randn(18, 6, 4, dtype=torch.float64).permute(2, 1, 0)
    results = [_run(replace(case, shape=(4, 6, 18)), name, leaves, d_out) for name in ("triton", "reference")]
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("case", [SOME[1], WIDE[2]], ids=Case.name)
def test_two_runs_are_equal_bit_for_bit(case):
    case = replace(case, shape=(130, 34))
    tensors = case.tensors(torch.float16)
    d_out = torch.randn(case.shape).half()
    for first, second in zip(*(_run(case, "triton", tensors, d_out) for _ in range(2)), strict=True):
        assert torch.equal(first, second)


def _freeze(tensors, trained, groups):
    needs = itertools.chain(*([n] * g for n, g in zip(trained, groups, strict=True)))
    for t, needed in zip(tensors, needs, strict=True):
        t.requires_grad_(needed)


@pytest.mark.parametrize("trained", list(itertools.product((False, True), repeat=4)), ids=str)
@pytest.mark.parametrize("case", [replace(SOME[1], inner_skip=True), SOME[4]], ids=Case.name)
def test_only_the_gradients_that_are_needed(case, trained):
    """Streams, first adapter, second adapter, norm: each frozen or not."""
    tensors = case.tensors()
    groups = [2 + case.sourced, 4, 4 * (len(case.inner) - 1), 2 * case.normed]
    _freeze(tensors, trained, groups)
    needing = [t for t in tensors if t.requires_grad]
    if not needing:
        pytest.skip("nothing trains")
    gradients = []
    for name in ("triton", "reference"):
        with backend.use(name):
            gradients.append(torch.autograd.grad(case(*tensors).square().sum(), needing))
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-7)


def _arguments(case, tensors):
    rest = tensors[2 + case.sourced :]
    adapters, norm = rest[: 4 * len(case.inner)], rest[4 * len(case.inner) :]
    source = tensors[2] if case.sourced else None
    options = case.activation, case.scaling, case.inner_skip, case.after_norm
    return (*tensors[:2], source, adapters, norm), options


@pytest.mark.parametrize("case", [SOME[1], SOME[3]], ids=Case.name)
def test_registration(case):
    case = replace(case, shape=(2, 10))
    given, options = _arguments(case, case.tensors(torch.float32))
    torch.library.opcheck(transformer_adapt._op, (*given, 1e-6, *options))
    given, options = _arguments(case, [t.detach() for t in case.tensors(torch.float32)])
    out, *statistics = transformer_adapt._op(*given, 1e-6, *options)
    needs = [True, True, len(case.inner) == 2, case.normed]
    torch.library.opcheck(transformer_adapt._backward_op, (torch.ones_like(out), *statistics, *given, *options, needs))


@pytest.mark.parametrize("case", [SOME[1], SOME[3]], ids=Case.name)
def test_compiles_whole_and_once(case):
    torch._dynamo.reset()
    case = replace(case, shape=(3, 10))
    compiled = torch.compile(case, fullgraph=True)
    with backend.use("triton"), torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(3):
            tensors = case.tensors(torch.float32, seed=seed)
            for actual, expected in zip(
                *(torch.autograd.grad(f(*tensors).square().sum(), tensors) for f in (compiled, case)), strict=True
            ):
                torch.testing.assert_close(actual, expected)


# FLOPs and bytes, counted on the reference.


def _counted(function):
    with FlopCounterMode(display=False) as flops, ByteCounter() as traffic:
        out = function()
    return out, flops.get_total_flops(), traffic.total


TRAINED = [(True,) * 4, (True, False, True, False), (False, False, True, False), (False, True, True, False)]


@pytest.mark.parametrize("trained", TRAINED, ids=str)
@pytest.mark.parametrize("case", SOME, ids=Case.name)
def test_flops_and_bytes(case, trained):
    tensors = case.tensors(torch.float32)
    groups = [2 + case.sourced, 4, 4 * (len(case.inner) - 1), 2 * case.normed]
    _freeze(tensors, trained, groups)
    needing = [t for t in tensors if t.requires_grad]
    counts = {}
    for name in ("reference", "triton"):
        with backend.use(name):
            out, *forward = _counted(lambda: case(*tensors))
            counts[name] = forward
            if needing:
                gradients, *backward = _counted(lambda out=out: torch.autograd.grad(out.sum(), needing))
                counts[name] += backward
    flops, _, *backward = counts["triton"]
    assert flops == counts["reference"][0]
    assert counts["triton"][1] == nbytes(tensors, out)
    if not needing:
        return
    # Recomputed: every down-projection, and the up-projection between two adapters, which makes LA.
    rows, width = tensors[0].shape
    again = 2 * rows * width * (sum(case.inner) + (case.inner[0] if len(case.inner) == 2 else 0))
    assert backward[0] == counts["reference"][2] + again
    # One adapter: the gradients of ffn and residual are the same tensor.
    shared = nbytes(tensors[0]) if trained[0] and len(case.inner) == 1 else 0
    assert backward[1] == nbytes(out, tensors, gradients) - shared


# Arguments that do not fit.


def test_errors(parts):
    ffn, x, language, task, weight, bias = parts((4, 9), 3)
    for message, arguments, options in (
        ("activation is 'tanh'", (ffn, x, language, task), {"activation": "tanh"}),
        ("language and task were both given", (ffn, x, language, task, weight, bias), {"after_norm": True}),
        ("only one of them", (ffn, x, language, task, weight), {}),
        (r"residual is \[4, 8\]: expected \[4, 9\]", (ffn, x[:, :8], language, task), {}),
        (r"source is \[9\]: expected \[4, 9\]", (ffn, x, language, task), {"source": weight}),
        (r"norm_bias is \[8\]: expected \[9\]", (ffn, x, language, task, weight, bias[:8]), {}),
        (r"ffn is \[\]", (ffn[0, 0], x, language, task), {}),
        (r"ffn is \[4, 0\]", (ffn[:, :0], x, language, task), {}),
        (
            r"task.up_weight is \[3, 9\]: expected \[9, 3\]",
            (ffn, x, language, task._replace(up_weight=task.up_weight.T)),
            {},
        ),
        (r"task.down_bias is \[0\]", (ffn, x, language, task._replace(down_bias=bias[:0])), {}),
        ("float32 on cpu: expected torch.float64", (ffn, x.float(), language, task), {}),
    ):
        with pytest.raises(ValueError, match=message):
            ops.transformer_adapt(*arguments, **options)
