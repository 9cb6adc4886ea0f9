import gc
import subprocess
import sys

import pytest
import torch
from torch.autograd import gradcheck
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from clinvla_fast.kernels import onednn


def _tensors(rows, width, out, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((*rows, width), (out, width), (out,))
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def _run(function, tensors, gelu):
    out = function(*tensors)
    out = functional.gelu(out) if gelu else out
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return out, torch.autograd.grad(out, [x for x in tensors if x.requires_grad], grad)


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("shape", [((7,), 5, 3), ((2, 50), 129, 65), ((1,), 1, 1), ((3, 0), 8, 4), ((4, 33), 768, 96)])
def test_linear(shape, dtype, limit, gelu):
    tensors = _tensors(*shape, dtype)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    out, gradients = _run(lambda *t: onednn.linear(*t, gelu=gelu), tensors, False)
    expected, right = _run(functional.linear, exact, gelu)
    for actual, truth in zip((out, *gradients), (expected, *right), strict=True):
        assert actual.dtype == dtype and actual.shape == truth.shape
        if truth.numel():
            assert ((actual.double() - truth).norm() <= limit * truth.norm()).item()
    with torch.no_grad():
        fused = onednn.linear(*tensors, gelu=gelu)
    torch.testing.assert_close(fused.double(), expected, rtol=limit, atol=limit * max(1, shape[1]) ** 0.5)


@pytest.mark.parametrize("trained", [(0,), (1,), (2,), (0, 1, 2)])
def test_gradients_of_what_is_trained_alone(trained):
    tensors = [x.detach() for x in _tensors((6,), 5, 4)]
    for index in trained:
        tensors[index].requires_grad_()
    _, gradients = _run(onednn.linear, tensors, False)
    _, right = _run(functional.linear, tensors, False)
    for actual, expected in zip(gradients, right, strict=True):
        torch.testing.assert_close(actual, expected)


def test_operands_with_gaps():
    x, weight, _ = (t.detach() for t in _tensors((40,), 64, 48))
    x, weight = x[:, :32], weight[:, 32:]
    torch.testing.assert_close(onednn.linear(x, weight), x @ weight.mT)
    torch.testing.assert_close(onednn.matmul(x.mT, x), x.mT @ x)


def double(weight):
    weight.mul_(2)


def double_past_the_version(weight):
    """As averages of weights are often written."""
    weight.data.mul_(2)


def replace(weight):
    """As an adapter is merged, or a module is moved."""
    weight.data = weight.data * 2


def transpose(weight):
    """The same memory, read in another order."""
    weight.data = weight.data.mT


@torch.no_grad()
@pytest.mark.parametrize("write", [double, double_past_the_version, replace, transpose])
def test_a_frozen_weight_that_is_written_to_is_packed_anew(write):
    x, weight, bias = (t.detach() for t in _tensors((9,), 16, 16))
    onednn.linear(x, weight, bias)
    write(weight)
    torch.testing.assert_close(onednn.linear(x, weight, bias), functional.linear(x, weight, bias))
    with torch.inference_mode():
        torch.testing.assert_close(onednn.linear(x, weight.clone()), x @ weight.mT)


@torch.no_grad()
def test_a_frozen_weight_that_is_moved_to_another_dtype_and_back_is_packed_anew():
    layer, x = torch.nn.Linear(16, 12).requires_grad_(False), torch.ones(3, 16)
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        layer.weight.data.zero_()  # equal in every dtype
        layer.to(dtype)
        out = onednn.linear(x.to(dtype), layer.weight, layer.bias)
        assert out.dtype == dtype and out.equal(layer.bias.expand(3, -1))


@torch.no_grad()
def test_a_packed_weight_goes_with_its_weight():
    gc.collect()
    before = len(onednn._packs)
    weight = torch.randn(12, 16)
    onednn.linear(torch.ones(3, 16), weight)
    assert len(onednn._packs) == before + 1
    del weight
    gc.collect()
    assert len(onednn._packs) == before


def test_double_is_left_to_pytorch_and_autocast_to_autocast():
    tensors = [t.detach().double().requires_grad_() for t in _tensors((3,), 4, 2)]
    assert gradcheck(onednn.linear, tensors)
    x, weight, bias = _tensors((3,), 4, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert onednn.linear(x, weight, bias).dtype == torch.bfloat16


def test_a_bias_with_gaps():
    x, weight, _ = (t.detach() for t in _tensors((40,), 12, 20))
    table = torch.randn(20, 8)
    for bias in (table[:, 2], torch.randn(40)[::2], torch.ones(1).expand(20)):
        torch.testing.assert_close(onednn.linear(x, weight, bias), functional.linear(x, weight, bias))


def test_a_wrong_width_is_told_as_pytorch_tells_it():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        onednn.linear(torch.ones(3, 5), torch.ones(4, 6))


@pytest.mark.parametrize(("rows", "columns"), [(256, 256), (768, 256), (256, 1024), (100, 640)])
def test_a_part_of_a_frozen_weight_that_is_cut_out(rows, columns):
    """Through `.data`, which leaves no trace: of rows or columns as many as a head of attention has."""
    generator = torch.Generator().manual_seed(0)
    x, whole = torch.randn(9, columns, generator=generator), torch.randn(rows, columns, generator=generator)
    heads = [(slice(start, start + 64),) for start in range(0, rows - 63, 64)]
    heads += [(slice(None), slice(start, start + 64)) for start in range(0, columns - 63, 64)]
    for head in heads:
        weight = whole.clone()
        onednn.linear(x, weight)
        weight.data[head] = 0
        torch.testing.assert_close(onednn.linear(x, weight), x @ weight.T, rtol=1e-4, atol=1e-4)


def test_a_weight_without_rows_or_columns():
    for rows, columns in ((0, 5), (5, 0)):
        assert onednn.linear(torch.ones(3, columns), torch.ones(rows, columns)).equal(torch.zeros(3, rows))


@pytest.mark.parametrize("gelu", [False, True])
def test_second_gradients(gelu):
    def second(linear, tensors):
        out = linear(*tensors)
        first = torch.autograd.grad(out.square().sum(), tensors, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), tensors)

    def plain(*tensors):
        out = functional.linear(*tensors)
        return functional.gelu(out) if gelu else out

    tensors = _tensors((2, 50), 129, 65)
    found = second(lambda *t: onednn.linear(*t, gelu=gelu), tensors)
    right = second(plain, [x.detach().double().requires_grad_() for x in tensors])
    for actual, truth in zip(found, right, strict=True):
        assert (actual.double() - truth).norm() <= 1e-5 * truth.norm()


def test_what_looks_into_operators():
    """Forward differentiation loses what an operator without a formula for it makes, and says nothing."""
    x, weight, bias = (t.detach() for t in _tensors((4, 33), 12, 20))

    def ours(x):
        return onednn.linear(x, weight, bias, gelu=True)

    def plain(x):
        return functional.gelu(functional.linear(x, weight, bias))

    def dual(function):
        with torch.autograd.forward_ad.dual_level():
            return torch.autograd.forward_ad.unpack_dual(
                function(torch.autograd.forward_ad.make_dual(x, x.cos()))
            ).tangent

    def traced(function):
        with torch.no_grad():
            return torch.jit.trace(function, x)(2 * x)

    for look in (
        dual,
        traced,
        lambda f: torch.func.jvp(f, (x,), (x.cos(),))[1],
        lambda f: torch.func.grad(lambda x: f(x).square().sum())(x),
        lambda f: torch.vmap(f)(x[:, None]),
        lambda f: torch.func.hessian(lambda x: f(x).square().sum())(x[0, 0]),
    ):
        torch.testing.assert_close(look(ours), look(plain))


def test_operators():
    x, weight, bias = _tensors((3, 5), 8, 6)
    torch.library.opcheck(onednn._linear_op, (x, weight, bias, False))
    torch.library.opcheck(onednn._by_input_op, (torch.rand(3, 5, 6), weight.detach()))


def test_flops():
    tensors = _tensors((3, 5), 8, 6)
    counts = []
    for function in (onednn.linear, functional.linear):
        with FlopCounterMode(display=False) as counter:
            _run(function, tensors, False)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 3 * 2 * 15 * 8 * 6


def test_products():
    a, b = torch.randn(3, 70, 90), torch.randn(3, 90, 600)
    torch.testing.assert_close(onednn.bmm(a, b), a @ b, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(onednn.matmul(a[0], b[0]), a[0] @ b[0], rtol=1e-4, atol=1e-4)
    assert onednn.matmul(a[0, :0], b[0]).shape == (0, 600)


_MANY_SHAPES = """
import torch
from pathlib import Path
from clinvla_fast.kernels import onednn

def resident():
    return 4096 * int(Path("/proc/self/statm").read_text().split()[1])

weight = torch.randn(256, 256)
for rows in range(1, 601):
    onednn.linear(torch.zeros(rows, 256), weight)
    if rows == 200:
        before = resident()
print(resident() - before)
"""


def test_memory_does_not_grow_with_the_shapes_seen():
    """As of packed reports, of which each batch has another; 300 MB where oneDNN keeps what it wants to."""
    grown = subprocess.run([sys.executable, "-c", _MANY_SHAPES], check=True, capture_output=True, text=True).stdout
    assert int(grown) < 100e6
