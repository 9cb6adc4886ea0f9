"""What several tests share: small random parts, and one pair of tiny towers on disk."""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

if "gpu" not in sys.argv:  # `-m gpu` runs what is marked so; nothing else needs one
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
if "PYTEST_XDIST_WORKER" in os.environ:  # else each worker, and each process of its tests, takes every core
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, so before anything of ours is imported

import pytest
from hypothesis import settings
from torch import nn
from transformers import PreTrainedTokenizerFast

from clinvla_fast import ClinVLA, Recipe, StudyBatch, ops
from clinvla_fast.data.tokenizer import train_tokenizer
from clinvla_fast.modeling.towers import make_tiny_text, make_tiny_vision, save_text, save_vision

settings.register_profile("shared machine", deadline=None)
settings.load_profile("shared machine")

REPORTS = (
    "The lungs are clear. No pleural effusion or pneumothorax.",
    "Large right pleural effusion. The heart is enlarged.",
    "Left lower lobe pneumonia has improved. The heart is normal.",
    "Small left apical pneumothorax. No pleural effusion.",
    "The heart is normal. The lungs are clear.",
)


@pytest.fixture
def random_bottleneck() -> Callable[..., ops.Bottleneck]:
    def make(width: int, inner: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> ops.Bottleneck:
        generator = torch.Generator().manual_seed(seed)
        shapes = (inner, width), (inner,), (width, inner), (width,)
        return ops.Bottleneck(*(torch.randn(s, generator=generator, dtype=dtype) / 2 for s in shapes))

    return make


@pytest.fixture
def shake() -> Callable[[nn.Module], None]:
    """Give every trainable parameter of a module a random value: new adapters are zero and do nothing."""

    def randomise(module: nn.Module) -> None:
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for name, p in module.named_parameters():
                if p.requires_grad and "log_scales" not in name:
                    p.add_(torch.randn(p.shape, generator=generator) * 0.1)

    return randomise


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(REPORTS, 120)


@pytest.fixture(scope="session")
def tiny_towers(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> dict[str, Path]:
    """Folders of a small ViT and a small BERT with random weights."""
    folder = tmp_path_factory.mktemp("towers")
    towers = {"vision": folder / "vision", "text": folder / "text"}
    torch.manual_seed(0)
    save_vision(make_tiny_vision(), towers["vision"])
    save_text(make_tiny_text(len(tokenizer)), tokenizer, towers["text"])
    return towers


@pytest.fixture
def tiny_model(tiny_towers: dict[str, Path]) -> ClinVLA:
    """A new model: its adapters do nothing yet."""
    torch.manual_seed(1)
    return ClinVLA(**tiny_towers, recipe=Recipe(width=24, bottleneck=20))


@pytest.fixture(scope="session")
def make_batch() -> Callable[..., StudyBatch]:
    """Studies with random pixels and words: their views present (a row of flags each) and report lengths."""

    def make(present: Sequence[Sequence[int]], lengths: Sequence[int], size: int = 128, seed: int = 0) -> StudyBatch:
        generator = torch.Generator().manual_seed(seed)
        flags = torch.tensor(present, dtype=torch.bool)
        return StudyBatch(
            images=torch.randint(0, 256, (*flags.shape, size, size), generator=generator, dtype=torch.uint8),
            present=flags,
            tokens=torch.randint(5, 60, (sum(lengths),), generator=generator),
            lengths=torch.tensor(lengths),
        )

    return make


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small finished run of the main job, as tests/training/test_pretrain.py repeats it."""
    from training.pretrain import main as pretrain  # needs DALI, which not every machine with a GPU has

    out = tmp_path_factory.mktemp("run") / "first"
    sizes = [
        "--patients",
        "70",
        "--epochs",
        "3",
        "--towers.epochs",
        "1",
        "--batch-size",
        "16",
        "--towers.batch-size",
        "16",
    ]
    pretrain([*sizes, "--device", "cpu", "--out", str(out)])
    return out
