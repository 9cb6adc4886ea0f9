"""Embedding a collection against the loop that one would write, a DataLoader with Pillow and the same towers in plain
timm and transformers; and searching a large one against a product of all with all.
"""

import json
import multiprocessing
import re
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from bench.phantoms import TINY, phantoms, repeated, tiny_model
from bench.plain import PlainClinVLA, plain_loader
from clinvla_fast import Collection, embed
from clinvla_fast.evaluation.retrieval import evaluate_collection

BATCH = 32
CANDIDATES, QUERIES, WIDTH = 100_000, 250, 128
RECALL_AT = (1, 5, 10)


def status(name: str) -> int:
    """Bytes, of what Linux says of this process."""
    return 1024 * int(re.search(rf"{name}:\s*(\d+)", Path("/proc/self/status").read_text())[1])


def peak_resident(run: Callable[[], object]) -> int:
    """Bytes that this process holds at most while `run` does, with its libraries."""
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    run()
    return status("VmHWM")


def alone(function: Callable, *arguments):
    """What a function returns in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


# Embedding


@torch.inference_mode()
def plain_embed(model: PlainClinVLA, tokenizer, data: Path, sizes: dict[str, int]) -> list[Tensor]:
    """Of all test, train and validate studies: images and reports, L2-normalised."""
    found = []
    for split in json.loads((data / "manifest.json").read_text())["counts"]["splits"]:
        for batch in plain_loader(data, split, tokenizer, batch_size=BATCH, **sizes):
            found.append([normalize(x, dim=-1) for x in model.embed(batch)])
    return [torch.cat(side) for side in zip(*found, strict=True)]


def test_embedding(measured, tmp_path):
    model, data = tiny_model(phantoms(TINY)), phantoms(TINY)
    plain = PlainClinVLA(model).eval()
    sizes = {"image_size": model.vision.image_size, "max_tokens": model.max_tokens}

    def ours() -> Path:
        embed(model, data, out := Path(tempfile.mkdtemp(dir=tmp_path)) / "out", batch_size=BATCH)
        return out

    collection = Collection(ours())
    for kind, right in zip(("image", "text"), plain_embed(plain, model.tokenizer, data, sizes), strict=True):
        actual = torch.from_numpy(np.concatenate([rows for _, rows in collection.embeddings(kind)]))
        assert (actual * right).sum(1).min() > 0.999  # films are resized by another library
    runs = {"plain": lambda: plain_embed(plain, model.tokenizer, data, sizes), "ours": ours}
    taken = measured.turns(runs, rounds=5, begun=True)
    measured.faster("than a plain loop", taken["plain"], taken["ours"])


def peaks_of_embedding(sources: list[Path], out: Path) -> list[int]:
    model = tiny_model(sources[0])
    return [peak_resident(partial(embed, model, source, out / source.name, batch_size=BATCH)) for source in sources]


def test_memory_of_embedding_is_flat(measured, tmp_path, monkeypatch):
    """Of what is ours. oneDNN also keeps what it made for the last 256 shapes, and of reports of real lengths each
    batch has another: that fills up over the first thousands of studies, and is kept smaller here."""
    for cache in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        monkeypatch.setenv(cache, "8")
    some, more = alone(
        peaks_of_embedding, [repeated(phantoms(TINY), times) for times in (1, 4)], Path(tempfile.mkdtemp(dir=tmp_path))
    )
    measured.figure("bytes_with_libraries", [some, more])
    measured.ratio("a collection against one four times as large", some / more, least=0.95)


# Search


def reports_and_images() -> dict[str, np.ndarray]:
    """Embeddings of CANDIDATES studies, the two of a study near each other."""
    random = np.random.default_rng(0)
    image, noise = (random.standard_normal((CANDIDATES, WIDTH), np.float32) for _ in range(2))
    return {
        name: x / np.linalg.norm(x, axis=1, keepdims=True)
        for name, x in (("image", image), ("text", image + 3 * noise))
    }


def recall_by_torch(arrays: dict[str, np.ndarray]) -> dict[str, float]:
    own = torch.arange(QUERIES) * len(arrays["text"]) // QUERIES
    images, texts = (torch.from_numpy(arrays[kind]) for kind in ("image", "text"))
    found = (texts[own] @ images.T).topk(max(RECALL_AT)).indices == own[:, None]
    return {f"text to image, recall@{k}": found[:, :k].any(1).double().mean().item() for k in RECALL_AT}


def recall_by_us(arrays: dict[str, np.ndarray]) -> dict[str, float]:
    scores = evaluate_collection(arrays, queries=QUERIES, recall_at=RECALL_AT)
    return {score.name: score.value for score in scores}


def held_by(recalls: list[Callable[[dict[str, np.ndarray]], dict[str, float]]]) -> list[int]:
    """Bytes at most of each, beyond libraries and embeddings."""
    arrays, held = reports_and_images(), []
    for recall in recalls:
        recall({kind: rows[: 2 * QUERIES] for kind, rows in arrays.items()})
        before = status("VmRSS")
        held.append(peak_resident(partial(recall, arrays)) - before)
    return held


def test_search(measured):
    """Ours holds nothing of all pairs, and orders the best by their products in float64."""
    arrays = reports_and_images()
    right = recall_by_torch(arrays)
    assert (
        recall_by_us(arrays) == pytest.approx(right, abs=1 / QUERIES) and 0.1 < right["text to image, recall@10"] < 0.9
    )
    taken = measured.turns({"torch": lambda: recall_by_torch(arrays), "ours": lambda: recall_by_us(arrays)}, rounds=5)
    measured.faster("than a product of all with all", taken["torch"], taken["ours"])


def test_memory_of_search(measured):
    ours, dense = alone(held_by, [recall_by_us, recall_by_torch])
    measured.figure("bytes_of_a_product_of_all_with_all", dense)
    measured.figure("bytes_held", ours)
    measured.ratio("less than a product of all with all", dense / ours)
