"""Embedding studies and one training step with the tiny preset: operations counted, time taken by pytest-benchmark.

No time is asserted here; compare the columns of one run. Masked training must beat whole images by what it leaves out.
"""

from pathlib import Path

import pytest
import torch

from clinvla_fast import ClinVLA, StudyBatch
from clinvla_fast.cost import forward_flops, step_flops
from clinvla_fast.data.tokenizer import train_tokenizer
from clinvla_fast.modeling.towers import make_tiny_text, make_tiny_vision, save_text, save_vision
from clinvla_fast.presets import PRESETS

STUDIES, VIEWS, TOKENS = 32, 2, 60


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ClinVLA:
    folder: Path = tmp_path_factory.mktemp("towers")
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["No pleural effusion. The lungs are clear."] * 2)
    save_vision(make_tiny_vision(), folder / "vision")
    save_text(make_tiny_text(2000), tokenizer, folder / "text")
    return ClinVLA(str(folder / "vision"), str(folder / "text"), PRESETS["tiny"].recipe)


@pytest.fixture(scope="module")
def batch() -> StudyBatch:
    generator = torch.Generator().manual_seed(0)
    return StudyBatch(
        images=torch.randint(0, 256, (STUDIES, VIEWS, 128, 128), generator=generator, dtype=torch.uint8),
        present=torch.ones(STUDIES, VIEWS, dtype=torch.bool),
        tokens=torch.randint(5, 2000, (STUDIES * TOKENS,), generator=generator),
        lengths=torch.full((STUDIES,), TOKENS),
    )


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_embed(benchmark, model, batch, masked):
    benchmark.extra_info["flops_per_sample"] = forward_flops(model, VIEWS, TOKENS, masked=masked)
    with torch.no_grad():
        benchmark(model, batch, 0 if masked else None)


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_step(benchmark, model, batch, masked):
    benchmark.extra_info["flops_per_sample"] = step_flops(model, VIEWS, TOKENS) if masked else None

    def step():
        model.objective(model(batch, 0 if masked else None))["loss"].backward()
        model.zero_grad(set_to_none=True)

    benchmark(step)
