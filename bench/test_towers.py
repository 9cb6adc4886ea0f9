"""The towers on a CPU, taking turns with those of timm and transformers: encoding, a pretraining step, and its memory;
and what freezing the towers saves, in plain code and in ours."""

import copy
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.fake_memory import peak_memory_of_fake
from bench.measure import Run, at_matrix_rate, peak_memory, promised, seconds
from bench.towers import (
    LENGTHS,
    Batch,
    compiled,
    our_encoding,
    our_step,
    our_towers,
    plain_encoding,
    plain_step,
    plain_towers,
    with_plain_adapters,
)
from clinvla_fast.modeling.frozen import compute_dtype
from clinvla_fast.twins import accelerate

HALF = compute_dtype(torch.device("cpu")) == torch.bfloat16
DTYPE = torch.bfloat16 if HALF else torch.float32
DTYPES = (torch.float32, torch.bfloat16) if HALF else (torch.float32,)
BATCHES = (1, 256)


@pytest.fixture(scope="module")
def plain() -> nn.ModuleDict:
    return plain_towers()


@pytest.fixture(scope="module")
def fast(plain) -> dict[torch.dtype, nn.ModuleDict]:
    """Ours, frozen, without adapters."""
    return {dtype: our_towers(plain, dtype, False) for dtype in DTYPES}


def named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def autocast(run: Callable, *given: Any, dtype: torch.dtype = DTYPE) -> Any:
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        return run(*given)


def assert_same(found: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor], batch: Batch, dtype: torch.dtype) -> None:
    """Tokens of both towers, but for what the plain text tower makes of padding."""
    for actual, expected in zip(found, right, strict=True):
        if expected.ndim != actual.ndim:
            expected = expected[batch.mask]
        if dtype == torch.float32:
            torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5)
        else:
            assert (actual.float() - expected).norm() <= 0.03 * expected.norm()


def encodings(
    plain: nn.ModuleDict, fast: dict[torch.dtype, nn.ModuleDict], batch: Batch, kept: Tensor | None = None
) -> dict[str, Run]:
    """Plain and ours in each dtype, which find the same, and have begun."""
    plain.eval()
    runs: dict[str, Run] = {}
    for dtype, towers in fast.items():
        theirs = partial(autocast, plain_encoding, plain, batch, kept, dtype=dtype)
        ours = partial(our_encoding, towers, batch, kept)
        assert_same(ours(), theirs(), batch, dtype)
        runs |= {f"plain {named(dtype)}": theirs, f"ours {named(dtype)}": ours}
    return runs


@torch.inference_mode()
def test_encoding_a_study(measured, plain, fast):
    """Two whole views and a report of 64 words."""
    batch = Batch.of(1)
    runs = encodings(plain, fast, batch)
    right = plain_encoding(plain, batch)
    by_inductor, swapped = compiled(plain), accelerate(copy.deepcopy(plain).requires_grad_(False))
    for towers in (by_inductor, swapped):
        assert_same(plain_encoding(towers, batch), right, batch, torch.float32)
    runs["compiled"], runs["accelerated"] = (partial(plain_encoding, x, batch) for x in (by_inductor, swapped))
    taken = measured.turns(runs | {"ours": runs["ours float32"]}, rounds=15, longest=5, begun=True)
    slow = taken["plain float32"]
    floors = {dtype: at_matrix_rate(runs[f"ours {named(dtype)}"], dtype) for dtype in DTYPES}
    measured.faster("float32", slow, taken["ours float32"], promised(2.4, slow, floors[torch.float32]))
    measured.faster("float32 than compiled", taken["compiled"], taken["ours float32"])
    measured.faster("accelerate alone", slow, taken["accelerated"])
    if HALF:
        claims = {"bfloat16": (taken["plain bfloat16"], 1.4), "bfloat16 than float32": (slow, 4.3)}
        for name, (theirs, claim) in claims.items():
            measured.faster(name, theirs, taken["ours bfloat16"], promised(claim, theirs, floors[torch.bfloat16]))


@pytest.mark.parametrize(
    ("masked", "lengths"), [(True, LENGTHS), (False, (128,))], ids=["a quarter of the patches", "a report of 128 words"]
)
@torch.inference_mode()
def test_encoding_less_or_more_of_a_study(measured, plain, fast, masked, lengths):
    """In the dtype that a CPU computes in, here and below."""
    batch = Batch.of(1, lengths=lengths)
    runs = encodings(plain, {DTYPE: fast[DTYPE]}, batch, batch.kept() if masked else None)
    taken = measured.turns(runs, rounds=9, begun=True)
    measured.faster(named(DTYPE), taken[f"plain {named(DTYPE)}"], taken[f"ours {named(DTYPE)}"])


@torch.inference_mode()
def test_encoding_eight_studies(measured, plain, fast):
    """Reports of real lengths."""
    taken = measured.turns(encodings(plain, {DTYPE: fast[DTYPE]}, Batch.of(8)), rounds=5, begun=True)
    measured.faster(named(DTYPE), taken[f"plain {named(DTYPE)}"], taken[f"ours {named(DTYPE)}"])


Step = tuple[Callable, nn.ModuleDict]
"""What is run of towers, a batch and its kept patches."""


def training_ways(plain: nn.ModuleDict, dtype: torch.dtype = DTYPE) -> dict[str, Step]:
    """Frozen with adapters, and end to end; plain code and ours."""
    end_to_end = our_towers(plain, torch.float32, False, ("towers",))
    theirs = partial(autocast, plain_step, dtype=dtype)
    return {
        "plain end to end": (theirs, plain.train()),
        "ours": (our_step, our_towers(plain, dtype, True)),
        "plain frozen": (theirs, with_plain_adapters(plain)),
        "ours end to end": (partial(our_step, dtype=dtype), end_to_end),
    }


@pytest.mark.parametrize(
    ("dtype", "than_masked", "than_whole"),
    [
        (torch.float32, 3.0, 6.0),
        pytest.param(
            torch.bfloat16, 2.0, 4.0, marks=pytest.mark.skipif(not HALF, reason="no bf16 instructions on this CPU")
        ),
    ],
    ids=["float32", "bfloat16"],
)
def test_pretraining_step(measured, plain, dtype, than_masked, than_whole):
    """Of a quarter of the patches of 4 studies, against end-to-end training, of all patches too; and the experiment of
    surveys of adapters: what freezing alone gives."""
    batch = Batch.of(4)
    kept = batch.kept()
    ways = training_ways(plain, dtype)
    if dtype != DTYPE:
        ways = {name: ways[name] for name in ("plain end to end", "ours")}
    runs = {name: partial(step, towers, batch, kept) for name, (step, towers) in ways.items()}
    for step, towers in ways.values():  # what is made once, on less than a turn's work
        step(towers, small := Batch.of(1), small.kept())
    taken = measured.turns(runs, rounds=5, begun=True)
    whole = [seconds(partial(autocast, plain_step, plain, batch, None, dtype=dtype))]
    slow, floor = taken["plain end to end"], at_matrix_rate(runs["ours"], dtype)
    measured.faster("than masked", slow, taken["ours"], promised(than_masked, slow, floor))
    measured.faster("than whole", whole, [median(taken["ours"])], promised(than_whole, whole, floor))
    if dtype == DTYPE:
        measured.faster("by freezing, plain", taken["plain end to end"], taken["plain frozen"])
        measured.faster("by freezing, ours", taken["ours end to end"], taken["ours"])
        measured.faster("than plain, both frozen", taken["plain frozen"], taken["ours"])


def test_memory_of_a_pretraining_step(measured, plain):
    """Activations, gradients and optimizer states, in bfloat16 where a CPU has it; counted, as a batch of 256 is too
    large for a test. Of small towers they are measured too, and are as counted."""
    small, batch = training_ways(plain_towers("vit_tiny_patch16_224", width=192, depth=4)), Batch.of(16)
    whole = (*small["plain end to end"], batch, None)
    for step, *given in (*((*way, batch, batch.kept()) for way in small.values()), whole):
        assert peak_memory_of_fake(step, *given) == pytest.approx(peak_memory(partial(step, *given)), rel=0.01)

    ways, held = training_ways(plain), {}
    for studies in BATCHES:
        batch = Batch.of(studies)
        kept, end_to_end = batch.kept(), ways["plain end to end"]
        curves = ways if studies == max(BATCHES) else {name: ways[name] for name in ("ours", "plain end to end")}
        peaks = {name: peak_memory_of_fake(*way, batch, kept) for name, way in curves.items()}
        held[str(studies)] = peaks | {"plain whole": peak_memory_of_fake(*end_to_end, batch, None)}
    of = held[str(max(BATCHES))]
    measured.ratio("less than whole", of["plain whole"] / of["ours"], least=3)
    measured.ratio("less than masked", of["plain end to end"] / of["ours"])
    measured.ratio("frozen, plain", of["plain end to end"] / of["plain frozen"])
    measured.ratio("frozen, ours", of["ours end to end"] / of["ours"])
    measured.figure("peak_bytes_by_batch", held)
