"""The towers of the published size on a GPU: one study's latency, throughput, and a masked pretraining step, against
the matrix rate of the same run and against timm and transformers under autocast, eager and compiled.

    pytest -m gpu bench --benchmark-json=gpu.json
"""

import pytest
import timm
import torch
from measure_on_gpu import machine, peak, seconds
from timm.models import save_for_hf
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from towers import Batch, our_encoding, our_step, our_towers, plain_step, plain_towers

from clinvla_fast import Captured, ClinVLA, StudyBatch
from clinvla_fast.data.tokenizer import train_tokenizer
from clinvla_fast.modeling import attention
from clinvla_fast.modeling.fp8 import float8_refusal, to_float8
from clinvla_fast.modeling.text import TextTower
from clinvla_fast.modeling.towers import save_text
from clinvla_fast.pretraining import compile_tower_blocks
from clinvla_fast.twins import FastLinear

pytestmark = pytest.mark.gpu
STUDIES = 256


@pytest.fixture(scope="module")
def plain() -> nn.ModuleDict:
    return plain_towers().cuda()


@pytest.fixture
def fast(plain) -> nn.ModuleDict:
    """Ours, compiled, with adapters."""
    torch._dynamo.reset()
    towers = our_towers(plain, torch.bfloat16, True).cuda()
    compile_tower_blocks(towers["vision"], towers["text"])
    return towers


def flops(step) -> int:
    """Counted with attention as plain products: the counter knows no formula for every library's."""
    with attention.use("sdpa"), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def record(benchmark, **figures) -> None:
    about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "timm": timm.__version__}
    benchmark.extra_info |= about | machine() | figures


def test_latency_of_one_study(benchmark, plain, tmp_path):
    """Two whole views and a report of 128 tokens to both embeddings, from inputs on the device."""
    tokenizer = train_tokenizer(["No pleural effusion. The lungs are clear."] * 2)
    save_for_hf(plain["vit"].cpu(), str(tmp_path / "vision"), model_args={"num_classes": 0})
    save_text(TextTower(plain["bert"].cpu()), tokenizer, tmp_path / "text")
    plain.cuda()
    model = ClinVLA(tmp_path / "vision", tmp_path / "text", dtype=torch.bfloat16).cuda()
    torch._dynamo.reset()
    compile_tower_blocks(model.vision, model.text)
    given, captured = Batch.of(1, "cuda"), Captured(model, batch_sizes=[1])
    batch = StudyBatch(given.images, given.present, given.words[0], torch.tensor([128]))
    with torch.inference_mode():
        right = model(batch)
    torch.testing.assert_close(captured(batch).text_global, right.text_global, rtol=0, atol=0.05)
    torch.testing.assert_close(captured(batch).image_global, right.image_global, rtol=0, atol=0.05)
    (held,) = captured._graphs.values()
    taken = seconds({"graph": held.graph.replay, "call": lambda: captured(batch), "eager": lambda: model(batch)}, 50)
    record(benchmark, **taken)
    benchmark.pedantic(lambda: (captured(batch), torch.cuda.synchronize()), rounds=10)
    assert taken["graph"] <= 0.35e-3


@torch.inference_mode()
def test_throughput(benchmark, plain, fast):
    """Whole views and reports of real lengths."""
    batch = Batch.of(STUDIES, "cuda")
    work = flops(lambda: our_encoding(our_towers(plain, torch.bfloat16, True).cuda(), batch))
    runs = {"bfloat16": lambda: our_encoding(fast, batch)}
    if not float8_refusal(torch.device("cuda")):
        eighth = our_towers(plain, torch.bfloat16, True).cuda()
        for tower in (eighth["vision"].vit, eighth["text"].bert):
            for layer in [m for m in tower.modules() if type(m) is FastLinear]:
                to_float8(layer)
        compile_tower_blocks(eighth["vision"], eighth["text"])
        runs["float8"] = lambda: our_encoding(eighth, batch)
    taken = seconds(runs)
    share = work / taken["bfloat16"] / machine()["flops_a_second"]
    faster = taken["bfloat16"] / taken["float8"] if "float8" in taken else None
    record(benchmark, flops=work, of_the_matrix_rate=share, times_faster_in_float8=faster, **taken)
    benchmark.pedantic(lambda: (our_encoding(fast, batch), torch.cuda.synchronize()), rounds=3)
    assert share >= 0.6
    assert faster is None or faster >= 1.5


def test_masked_pretraining(benchmark, plain, fast):
    batch = Batch.of(STUDIES, "cuda")
    kept = batch.kept()
    plain.train()

    def theirs(towers: nn.ModuleDict) -> None:
        with torch.autocast("cuda", torch.bfloat16):
            plain_step(towers, batch, kept)

    compiled = nn.ModuleDict({"vit": plain["vit"], "bert": torch.compile(plain["bert"], dynamic=True)})
    compiled["vit"].blocks = nn.Sequential(*(torch.compile(block, dynamic=True) for block in plain["vit"].blocks))
    work = flops(lambda: our_step(our_towers(plain_towers(), torch.bfloat16, True).cuda(), batch, kept))
    eager = plain_towers().cuda().train()
    runs = {
        "eager": lambda: theirs(eager),
        "compiled": lambda: theirs(compiled),
        "ours": lambda: our_step(fast, batch, kept),
    }
    taken = seconds(runs, 8)
    share = work / taken["ours"] / machine()["flops_a_second"]
    memory = {f"peak_bytes_{name}": peak(run) for name, run in runs.items()}
    record(benchmark, flops=work, of_the_matrix_rate=share, **taken, **memory)
    benchmark.pedantic(lambda: (our_step(fast, batch, kept), torch.cuda.synchronize()), rounds=3)
    assert share >= 0.5
    assert taken["eager"] >= 3 * taken["ours"] and taken["compiled"] >= 1.5 * taken["ours"]
    assert memory["peak_bytes_ours"] <= memory["peak_bytes_eager"] / 3
