"""One attention function: which library it takes, what it says, and that it is attention."""

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clinvla_fast.backend import BackendUnavailable
from clinvla_fast.modeling import attention as module
from clinvla_fast.modeling.attention import attention, use
from clinvla_fast.modeling.packing import Packing

LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}


def _plain(query, key, value):
    """One sequence [L, heads, d], in float64."""
    query, key, value = (x.double().transpose(0, 1) for x in (query, key, value))
    return ((query @ key.mT / query.shape[-1] ** 0.5).softmax(-1) @ value).transpose(0, 1)


@pytest.mark.parametrize("dtype", LIMITS)
@settings(max_examples=15)
@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=5).filter(sum), seed=st.integers(0, 99))
def test_packed_sequences_attend_to_themselves(dtype, lengths, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(3, sum(lengths), 2, 8, generator=generator, dtype=torch.float64).to(dtype).unbind()
    rows = [x.requires_grad_() for x in rows]
    out = attention(*rows, Packing.of(torch.tensor(lengths), "cpu"))
    expected = torch.cat([_plain(*parts) for parts in zip(*(x.split(lengths) for x in rows), strict=True)])
    grad = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    assert out.dtype == dtype
    pairs = [(out, expected)]
    pairs += zip(torch.autograd.grad(out, rows, grad.to(dtype)), torch.autograd.grad(expected, rows, grad), strict=True)
    for actual, right in pairs:
        torch.testing.assert_close(
            actual.double(), right.double(), rtol=0, atol=LIMITS[dtype] * max(1, right.abs().max().item())
        )


@pytest.mark.parametrize("dtype", LIMITS)
def test_sequences_of_one_length(dtype):
    rows = torch.randn(3, 4, 9, 2, 8, generator=torch.Generator().manual_seed(0)).to(dtype).unbind()
    expected = torch.stack([_plain(*parts) for parts in zip(*rows, strict=True)])
    torch.testing.assert_close(attention(*rows).double(), expected, rtol=0, atol=LIMITS[dtype])


def test_says_once_what_it_took_and_why_not_others(caplog):
    module._choose.cache_clear()
    rows = torch.randn(3, 1, 2, 1, 4).unbind()
    with caplog.at_level(logging.INFO, "clinvla_fast"):
        attention(*rows)
        attention(*rows)
    assert len(caplog.messages) == 1
    said = caplog.messages[0]
    assert "sdpa" in said and "not xformers: it needs a GPU" in said and "not varlen: it needs a GPU" in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine where they are installed and cannot run")
def test_libraries_that_do_not_run_are_refused(caplog):
    for cached in (module._choose, module._refusal):
        cached.cache_clear()
    with caplog.at_level(logging.INFO, "clinvla_fast"):
        assert module._choose("auto", "cuda", torch.bfloat16) == "sdpa"
    assert "not xformers: it does not run here (" in caplog.text and "not varlen: it does not run here (" in caplog.text
    with pytest.raises(BackendUnavailable, match=r"varlen attention was asked for, but it does not run here \("):
        module._choose("varlen", "cuda", torch.bfloat16)


@pytest.mark.parametrize("name", ["xformers", "varlen"])
def test_an_explicit_choice_never_falls_back(name):
    rows = torch.randn(3, 1, 2, 1, 4).unbind()
    with use(name), pytest.raises(BackendUnavailable, match=f"{name} attention was asked for, but it needs a GPU"):
        attention(*rows)


def test_an_unknown_choice():
    with pytest.raises(ValueError, match="'flash': expected one of xformers, varlen, sdpa, auto"), use("flash"):
        pass


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["xformers", "varlen", "sdpa"])
def test_on_a_gpu(name, dtype):
    if name == "varlen" and dtype == torch.float32:
        pytest.skip("varlen attends in half precision")
    if name == "xformers":
        pytest.importorskip("xformers.ops")
    lengths = [3, 128, 1, 60]
    packing = Packing.of(torch.tensor(lengths), "cuda")
    rows = [x.requires_grad_() for x in torch.randn(3, sum(lengths), 12, 64, device="cuda", dtype=dtype).unbind()]
    expected = torch.cat([_plain(*parts) for parts in zip(*(x.split(lengths) for x in rows), strict=True)])
    function = torch.compile(attention, fullgraph=True)
    with use(name):
        for out in (attention(*rows, packing), function(*rows, packing)):
            torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-2)
            actual = torch.autograd.grad(out.double().square().sum(), rows)
            right = torch.autograd.grad(expected.square().sum(), rows, retain_graph=True)
            for a, b in zip(actual, right, strict=True):
                torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=5e-2 * b.abs().max().item())


def test_xformers_mask_is_of_the_same_sequences():
    """The mask that xformers is given, as a matrix: its kernels run on a GPU alone."""
    attn_bias = pytest.importorskip("xformers.ops.fmha.attn_bias")
    lengths = [3, 1, 4]
    mask = attn_bias.BlockDiagonalMask.from_seqlens(lengths).materialize((8, 8))
    row = Packing.of(torch.tensor(lengths), "cpu").row
    assert torch.equal(mask == 0, row[:, None] == row)
