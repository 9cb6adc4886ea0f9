"""The loader on a CPU, against a plain PyTorch DataLoader with Pillow and against training steps, from the same shards.

Both make the same batches: four view slots of 224 pixels, turned, zoomed, shifted and exposed at random, and packed
tokens. The plain loader's processes and ours are running already, but for "first": a new loader's first pass, which
opens the shards, decodes, tokenises and fills the cache. "off" decodes in every pass.
"""

import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from bench.phantoms import phantoms, tiny_model
from bench.plain import PlainBatch, plain_loader
from clinvla_fast.data.loader import StudyLoader

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # silences a warning about forked processes
SIZES = {"image_size": 224, "max_tokens": 128, "batch_size": 32}


@pytest.fixture(scope="module")
def data() -> Path:
    return phantoms(256)


@pytest.fixture(scope="module")
def tokenizer(data: Path) -> PreTrainedTokenizerFast:
    return tiny_model(data).tokenizer


def a_pass(loader: Iterable) -> None:
    for _ in loader:
        pass


def test_against_a_plain_data_loader(measured, data, tokenizer):
    def ours(cache: str) -> StudyLoader:
        return StudyLoader(data, "train", tokenizer, train=True, cache=cache, **SIZES)

    whole = StudyLoader(data, "test", tokenizer, **SIZES), plain_loader(data, "test", tokenizer, **SIZES)
    for batch, plain in zip(*whole, strict=True):
        right = PlainBatch.of(batch.images, batch.present, batch.tokens, batch.lengths, [])
        assert (plain.present == right.present).all() and (plain.words == right.words).all()
        difference = plain.images[right.present].short() - right.images[right.present]
        assert difference.abs().float().mean() < 1
    loaders = {"plain": plain_loader(data, "train", tokenizer, train=True, **SIZES)}
    loaders |= {name: ours(name) for name in ("off", "ram", "disk")}
    runs = {name: partial(a_pass, loader) for name, loader in loaders.items()} | {"first": lambda: a_pass(ours("ram"))}
    taken = measured.turns(runs, rounds=21)
    for name, least in {"first": 1.5, "off": 1.5, "ram": 3, "disk": 3}.items():
        measured.faster(f"{name} than plain", taken["plain"], taken[name], least)


def test_against_training(measured, data, tokenizer):
    """The tiny preset's steps are the fastest that a CPU trains: they take over three times what the loader takes."""
    model = tiny_model(data)
    sizes = SIZES | {"image_size": model.vision.image_size, "max_tokens": model.max_tokens}
    off, ram = (StudyLoader(data, "train", tokenizer, train=True, cache=cache, **sizes) for cache in ("off", "ram"))
    batches = list(off)

    def train() -> None:
        for batch in batches:
            model.objective(model(batch, mask_seed=0))["loss"].backward()
            model.zero_grad(set_to_none=True)

    taken = measured.turns({"training": train, "off": partial(a_pass, off), "ours": partial(a_pass, ram)}, rounds=9)
    measured.faster("off than training", taken["training"], taken["off"], least=3)
    measured.faster("ram than training", taken["training"], taken["ours"], least=3)
