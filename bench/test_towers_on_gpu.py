"""The towers of the published size on a GPU, over the size of a batch: encoding, a masked pretraining step and its
memory, against the matrix rate of the same run and against timm and transformers, eager and compiled.

    pytest -m gpu bench/test_towers_on_gpu.py
"""

import copy
from collections.abc import Callable
from functools import partial
from statistics import median

import pytest
import torch
from timm.models import save_for_hf
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench.measure import ceilings, peak_memory_on_gpu
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
from clinvla_fast import Captured, ClinVLA, StudyBatch
from clinvla_fast.data.tokenizer import train_tokenizer
from clinvla_fast.modeling import attention
from clinvla_fast.modeling.fp8 import float8_refusal, to_float8
from clinvla_fast.modeling.text import TextTower
from clinvla_fast.modeling.towers import save_text
from clinvla_fast.pretraining import compile_tower_blocks
from clinvla_fast.twins import FastLinear

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
BATCHES = (1, 8, 64, 256)
PUBLISHED = 8.9e-3  # seconds a study, on an A100: Table 7 of the paper
SLOWEST = 0.35e-3  # that ours may take
CLOSE = {"plain": 0.03, "compiled": 0.03, "ours": 0.03, "float8": 0.1}
"""How far from float32 the tokens may be, as a share."""


@pytest.fixture(scope="module")
def plain() -> nn.ModuleDict:
    return plain_towers().to(DEVICE)


def ours_compiled(plain: nn.ModuleDict, adapters: bool, float8: bool = False) -> nn.ModuleDict:
    towers = our_towers(plain, torch.bfloat16, adapters)
    if float8:
        for tower in (towers["vision"].vit, towers["text"].bert):
            for layer in [m for m in tower.modules() if type(m) is FastLinear]:
                to_float8(layer)
    compile_tower_blocks(towers["vision"], towers["text"])
    return towers


@pytest.fixture(scope="module")
def encoders(plain) -> dict[str, Callable]:
    """By name: from a batch and its kept patches to the tokens of both towers, in bfloat16."""
    half = copy.deepcopy(plain).bfloat16().eval()
    towers = {"ours": ours_compiled(plain, False)}
    if not float8_refusal(torch.device(DEVICE)):
        towers["float8"] = ours_compiled(plain, False, float8=True)
    theirs = {"plain": half, "compiled": compiled(half)}
    return {
        **{name: partial(plain_encoding, x) for name, x in theirs.items()},
        **{name: partial(our_encoding, x) for name, x in towers.items()},
    }


def flops(run: Callable[[], object]) -> int:
    """Counted with attention as plain products: the counter knows no formula for every library's."""
    with attention.use("sdpa"), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def share_of_matrix_rate(measured, name: str, work: int, seconds: list[float], least: float | None) -> None:
    floor = work / ceilings()["flops_a_second"]
    measured.faster(name, [floor] * len(seconds), seconds, least)


def assert_close(found: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor], mask: Tensor, limit: float) -> None:
    """Tokens of both towers; a plain text tower's [B, M, width] only where there are words."""
    for actual, expected in zip(found, right, strict=True):
        actual, expected = (x[mask] if x.shape[:2] == mask.shape else x for x in (actual, expected))
        assert (actual.float() - expected).norm() <= limit * expected.norm()


@pytest.mark.parametrize(
    ("masked", "lengths"),
    [(False, LENGTHS), (True, LENGTHS), (False, (128,))],
    ids=["whole", "a quarter of the patches", "reports of 128 words"],
)
@torch.inference_mode()
def test_encoding(measured, plain, encoders, masked, lengths):
    """Two views and reports of these lengths."""
    counted, seconds, peaks = our_towers(plain, torch.bfloat16, False), {}, {}
    for studies in BATCHES:
        batch = Batch.of(studies, DEVICE, lengths)
        kept = batch.kept() if masked else None
        runs = {name: partial(encode, batch, kept) for name, encode in encoders.items()}
        right = plain_encoding(plain.eval(), batch, kept)
        for name, run in runs.items():
            assert_close(run(), right, batch.mask, CLOSE[name])
        taken = measured.turns(runs, rounds=20)
        most = studies == max(BATCHES) and not masked  # enough to fill the machine
        for name in ("plain", "compiled"):
            measured.faster(f"than {name}, {studies} studies", taken[name], taken["ours"])
        if "float8" in taken:
            name = f"float8 than bfloat16, {studies} studies"
            measured.faster(name, taken["ours"], taken["float8"], least=1.5 if most else None)
        work, name = flops(partial(our_encoding, counted, batch, kept)), f"share of the matrix rate, {studies} studies"
        share_of_matrix_rate(measured, name, work, taken["ours"], least=0.6 if most else None)
        seconds[str(studies)] = {name: median(times) for name, times in taken.items()}
        peaks[str(studies)] = {name: peak_memory_on_gpu(run) for name, run in runs.items()}
    measured.figure("seconds_by_batch", seconds)
    measured.figure("peak_bytes_of_encoding", peaks)


def test_latency_of_one_study(measured, tmp_path):
    """Two whole views and a report of 128 words to both embeddings, from inputs on the device, as a CUDA graph."""
    tokenizer, plain = train_tokenizer(["No pleural effusion. The lungs are clear."] * 2), plain_towers()
    save_for_hf(plain["vit"], str(tmp_path / "vision"), model_args={"num_classes": 0})
    save_text(TextTower(plain["bert"]), tokenizer, tmp_path / "text")
    model = ClinVLA(tmp_path / "vision", tmp_path / "text", dtype=torch.bfloat16).to(DEVICE)
    compile_tower_blocks(model.vision, model.text)
    given, captured = Batch.of(1, DEVICE, (128,)), Captured(model, batch_sizes=[1])
    batch = StudyBatch(given.images, given.present, given.tokens, given.lengths)
    with torch.inference_mode():
        right, found = model(batch), captured(batch)
    torch.testing.assert_close(found.text_global, right.text_global, rtol=0, atol=0.05)
    torch.testing.assert_close(found.image_global, right.image_global, rtol=0, atol=0.05)
    (held,) = captured._graphs.values()
    with torch.inference_mode():
        runs = {"ours": held.graph.replay, "call": lambda: captured(batch), "without a graph": lambda: model(batch)}
        taken = measured.turns(runs, rounds=50)
    measured.faster("than published", [PUBLISHED] * len(taken["ours"]), taken["ours"], least=PUBLISHED / SLOWEST)
    measured.faster("than without a graph", taken["without a graph"], taken["ours"])
    measured.figure("seconds", {name: median(times) for name, times in taken.items()})


def theirs(towers: nn.ModuleDict, batch: Batch, kept: Tensor | None) -> None:
    with torch.autocast(DEVICE, torch.bfloat16):
        plain_step(towers, batch, kept)


def test_masked_pretraining(measured, plain):
    """Ours, frozen with adapters, against end-to-end training of both towers."""
    ours, eager = ours_compiled(plain, True), plain.train()
    ways = {"ours": (our_step, ours), "eager": (theirs, eager), "compiled": (theirs, compiled(eager))}
    batch = Batch.of(max(BATCHES), DEVICE)
    kept = batch.kept()
    runs = {name: partial(step, towers, batch, kept) for name, (step, towers) in ways.items()}
    taken = measured.turns(runs, rounds=8)
    measured.faster("than eager", taken["eager"], taken["ours"], least=3)
    measured.faster("than compiled", taken["compiled"], taken["ours"], least=1.5)
    work = flops(partial(our_step, our_towers(plain, torch.bfloat16, True), batch, kept))
    share_of_matrix_rate(measured, "share of the matrix rate", work, taken["ours"], least=0.5)
    measured.figure("seconds", {name: median(times) for name, times in taken.items()})

    peaks = {}
    for studies in BATCHES:
        batch = Batch.of(studies, DEVICE)
        kept = batch.kept()
        of = {name: peak_memory_on_gpu(partial(step, towers, batch, kept)) for name, (step, towers) in ways.items()}
        peaks[str(studies)] = of | {"whole": peak_memory_on_gpu(partial(theirs, eager, batch, None))}
    measured.ratio("memory, less than masked", of["eager"] / of["ours"])
    measured.ratio("memory, less than whole", peaks[str(max(BATCHES))]["whole"] / of["ours"], least=3)
    measured.figure("peak_bytes_by_batch", peaks)


def test_frozen_against_end_to_end(measured, plain):
    """The experiment of surveys of adapters: what freezing alone gives, of a quarter of the patches; nothing compiled,
    so that only the code differs."""
    end_to_end = our_towers(plain, torch.float32, False, ("towers",))
    ways = {
        "plain frozen": (theirs, with_plain_adapters(plain)),
        "plain end to end": (theirs, plain.train()),
        "ours": (our_step, our_towers(plain, torch.bfloat16, True)),
        "ours end to end": (partial(our_step, dtype=torch.bfloat16), end_to_end),
    }
    batch = Batch.of(max(BATCHES), DEVICE)
    kept = batch.kept()
    runs = {name: partial(step, towers, batch, kept) for name, (step, towers) in ways.items()}
    taken = measured.turns(runs, rounds=8)
    peaks = {name: peak_memory_on_gpu(run) for name, run in runs.items()}
    for code, frozen in (("plain", "plain frozen"), ("ours", "ours")):
        measured.faster(f"{code}: time", taken[f"{code} end to end"], taken[frozen])
        measured.ratio(f"{code}: memory", peaks[f"{code} end to end"] / peaks[frozen])
    measured.figure("seconds", {name: median(times) for name, times in taken.items()})
    measured.figure("peak_bytes", peaks)
