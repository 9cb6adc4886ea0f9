"""The loader on a CPU, against a plain PyTorch DataLoader with Pillow and against training steps, from the same shards.

The plain one is what one would write: two worker processes; each file read from its place in the tar file; Pillow to
decode, resize, transform and adjust; reports tokenised. Both make the same batches: four view slots of 224 pixels,
turned, zoomed, shifted and exposed at random, and packed tokens. Times are medians of turns; the plain loader's
processes and ours are running already, but for "first": a new loader's first pass, which opens the shards, decodes,
tokenises and fills the cache. "off" decodes in every pass.
"""

import io
import json
import math
import os
import platform
import random
import tarfile
from pathlib import Path

import nvidia.dali
import PIL
import pytest
import torch
from measure import seconds
from PIL import Image, ImageEnhance
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerFast

from clinvla_fast import ClinVLA
from clinvla_fast.data.loader import StudyLoader
from clinvla_fast.data.phantom.dataset import write_phantoms
from clinvla_fast.data.shards import read_studies, shard_paths
from clinvla_fast.data.tokenizer import tokenize_reports, train_tokenizer
from clinvla_fast.modeling.towers import make_tiny_text, make_tiny_vision, save_text, save_vision
from clinvla_fast.presets import PRESETS
from clinvla_fast.study import VIEWS

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # silences a warning about forked processes
SIZE, BATCH, TOKENS = 224, 32, 128


class PlainStudies(Dataset):
    def __init__(self, root: Path):
        self.studies: list[dict[str, tuple[Path, int, int]]] = []
        for path in shard_paths(root, "train"):
            of_key: dict[str, dict] = {}
            with tarfile.open(path) as tar:
                for member in tar:
                    key, _, kind = member.name.partition(".")
                    of_key.setdefault(key, {})[kind] = path, member.offset_data, member.size
            self.studies += of_key.values()

    def __len__(self) -> int:
        return len(self.studies)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, torch.Tensor, dict]:
        files = self.studies[number]
        images = torch.zeros(len(VIEWS), SIZE, SIZE, dtype=torch.uint8)
        draws = [self.draw(), self.draw()]
        for slot, view in enumerate(VIEWS):
            if f"{view}.jpg" in files:
                images[slot] = self.augmented(self.read(*files[f"{view}.jpg"]), *draws[slot % 2])
        present = torch.tensor([f"{view}.jpg" in files for view in VIEWS])
        return images, present, json.loads(self.read(*files["json"]))

    @staticmethod
    def read(path: Path, offset: int, size: int) -> bytes:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(size)

    @staticmethod
    def draw() -> tuple[tuple[float, ...], float, float]:
        angle, zoom = math.radians(random.uniform(-4, 4)), random.uniform(1, 1.1)
        cos, sin = math.cos(angle) / zoom, math.sin(angle) / zoom
        x, y = (SIZE / 2 + SIZE * random.uniform(-0.03, 0.03) for _ in range(2))
        matrix = cos, sin, SIZE / 2 - cos * x - sin * y, -sin, cos, SIZE / 2 + sin * x - cos * y
        return matrix, random.uniform(0.9, 1.1), random.uniform(0.9, 1.1)

    @staticmethod
    def augmented(content: bytes, matrix: tuple[float, ...], brightness: float, contrast: float) -> torch.Tensor:
        image = Image.open(io.BytesIO(content)).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
        image = image.transform((SIZE, SIZE), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
        image = ImageEnhance.Contrast(ImageEnhance.Brightness(image).enhance(brightness)).enhance(contrast)
        return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(SIZE, SIZE)


def plain_loader(root: Path, tokenizer: PreTrainedTokenizerFast) -> DataLoader:
    def collate(studies: list[tuple]) -> tuple:
        images, present, metas = zip(*studies, strict=True)
        words = tokenize_reports(tokenizer, [meta["report"] for meta in metas], TOKENS)
        return torch.stack(images), torch.stack(present), *words, [meta["labels"] for meta in metas]

    return DataLoader(
        PlainStudies(root), BATCH, shuffle=True, drop_last=True, collate_fn=collate, num_workers=2,
        persistent_workers=True, multiprocessing_context="fork",
    )  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("loader") / "data"
    write_phantoms(out, patients=150, seed=0, size=256)
    return out


@pytest.fixture(scope="module")
def tokenizer(data: Path) -> PreTrainedTokenizerFast:
    return train_tokenizer(study.report for study in read_studies(data, "train", images=False))


def a_pass(loader) -> None:
    for _ in loader:
        pass


def record(benchmark, **figures) -> None:
    benchmark.extra_info |= {name: round(value, 2) for name, value in figures.items()}
    benchmark.extra_info |= {
        "device": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "versions": {"torch": torch.__version__, "pillow": PIL.__version__, "dali": nvidia.dali.__version__},
    }


def test_against_a_plain_data_loader(benchmark, data, tokenizer):
    def loader(cache: str) -> StudyLoader:
        sizes = {"image_size": SIZE, "max_tokens": TOKENS, "batch_size": BATCH}
        return StudyLoader(data, "train", tokenizer, train=True, cache=cache, **sizes)

    loaders = {"plain": plain_loader(data, tokenizer)} | {name: loader(name) for name in ("off", "ram", "disk")}
    runs = {name: lambda it=it: a_pass(it) for name, it in loaders.items()}
    runs["first"] = lambda: a_pass(loader("ram"))
    taken = seconds(runs, rounds=9)
    studies = len(loaders["off"]) * BATCH
    rates = {f"{name}_per_second": studies / time for name, time in taken.items()}
    ratios = {f"{name}_than_plain": taken["plain"] / time for name, time in taken.items() if name != "plain"}
    record(benchmark, **rates, **ratios)
    benchmark.pedantic(runs["ram"], rounds=1)
    assert ratios["off_than_plain"] >= 1.5 and ratios["first_than_plain"] >= 1.5
    assert min(ratios["ram_than_plain"], ratios["disk_than_plain"]) >= 3


def test_against_training(benchmark, data, tokenizer, tmp_path):
    """The tiny preset's steps are the fastest that a CPU trains: they take over three times what the loader takes."""
    torch.manual_seed(0)
    save_vision(make_tiny_vision(), tmp_path / "vision")
    save_text(make_tiny_text(len(tokenizer)), tokenizer, tmp_path / "text")
    model = ClinVLA(str(tmp_path / "vision"), str(tmp_path / "text"), PRESETS["tiny"].recipe)
    sizes = {"image_size": model.vision.image_size, "max_tokens": model.max_tokens, "batch_size": BATCH}
    off, ram = (StudyLoader(data, "train", tokenizer, train=True, cache=cache, **sizes) for cache in ("off", "ram"))
    batches = list(off)

    def train() -> None:
        for batch in batches:
            model.objective(model(batch, mask_seed=0))["loss"].backward()
            model.zero_grad(set_to_none=True)

    taken = seconds({"training": train, "off": lambda: a_pass(off), "ram": lambda: a_pass(ram)}, rounds=7)
    rates = {f"{name}_per_second": len(batches) * BATCH / time for name, time in taken.items()}
    record(benchmark, **rates)
    benchmark.pedantic(lambda: a_pass(ram), rounds=1)
    assert taken["training"] >= 3 * max(taken["off"], taken["ram"])
