"""Towers of the published size, seeded, on a CPU: encoding a study, and a pretraining step, against the same towers of
timm and transformers as people run them.

Encoding: two whole views and a report of real length, one study at a time; the plain way normalises pixels and pads
reports to 128 words.
Pretraining step: frozen towers, adapters, kept patches and real lengths, against training both towers end to end,
embedding every patch (then keeping a quarter, or all of them) and padding. All take turns; ratios are of medians. In
bfloat16 the plain way is autocast.
"""

import copy
import platform
from dataclasses import dataclass

import pytest
import timm
import torch
from measure import peak_memory, seconds
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import BertConfig, BertModel

from clinvla_fast import Recipe, ops
from clinvla_fast.modeling.frozen import compute_dtype, freeze
from clinvla_fast.modeling.packing import Packing
from clinvla_fast.modeling.text import TextTower
from clinvla_fast.modeling.vision import VisionTower
from clinvla_fast.twins import accelerate

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
STUDIES, VIEWS, PADDED, PATCHES = 4, 2, 128, 196
HALF = compute_dtype(torch.device("cpu")) == torch.bfloat16


@dataclass
class Batch:
    images: Tensor
    present: Tensor
    words: Tensor
    lengths: Tensor

    @property
    def mask(self) -> Tensor:
        return torch.arange(PADDED) < self.lengths[:, None]

    @property
    def pixels(self) -> Tensor:
        mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (MEAN, STD))
        return (self.images.flatten(0, 1)[:, None] / 255 - mean) / std


@pytest.fixture(scope="module")
def batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    return Batch(
        torch.randint(0, 256, (STUDIES, VIEWS, 224, 224), generator=generator, dtype=torch.uint8),
        torch.ones(STUDIES, VIEWS, dtype=torch.bool),
        torch.randint(1000, 20000, (STUDIES, PADDED), generator=generator),
        torch.tensor([36, 54, 70, 97]),  # word pieces of Open-i's 3,955 reports, cleaned: a mean of 64
    )


@pytest.fixture(scope="module")
def plain() -> nn.ModuleDict:
    torch.manual_seed(0)
    vit = timm.create_model("vit_base_patch16_224", num_classes=0, global_pool="token")
    config = BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return nn.ModuleDict({"vit": vit, "bert": BertModel(config, add_pooling_layer=False)})


def ours(plain: nn.ModuleDict, dtype: torch.dtype, adapters: bool) -> nn.ModuleDict:
    towers = copy.deepcopy(plain)
    vision, text = VisionTower(towers["vit"], MEAN, STD), TextTower(towers["bert"])
    for tower, frozen in ((vision, vision.vit), (text, text.bert)):
        freeze(frozen, dtype)
        if adapters:
            tower.add_adapters(Recipe())
    return accelerate(nn.ModuleDict({"vision": vision, "text": text}))


def plain_encoding(towers: nn.ModuleDict, batch: Batch) -> tuple[Tensor, Tensor]:
    words = towers["bert"](input_ids=batch.words, attention_mask=batch.mask.long()).last_hidden_state
    return towers["vit"].forward_features(batch.pixels), words


def our_encoding(towers: nn.ModuleDict, batch: Batch, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
    packing = Packing.of(batch.lengths, "cpu")
    return towers["vision"](batch.images, batch.present, kept), towers["text"](batch.words[batch.mask], packing)


def plain_step(towers: nn.ModuleDict, batch: Batch, kept: Tensor | None) -> None:
    vit = towers["vit"]
    x = vit.patch_embed(batch.pixels) + vit.pos_embed[:, 1:]
    if kept is not None:
        x = x.gather(1, kept[..., None].expand(-1, -1, x.shape[-1]))
    x = torch.cat([(vit.cls_token + vit.pos_embed[:, :1]).expand(len(x), -1, -1), x], 1)
    words = towers["bert"](input_ids=batch.words, attention_mask=batch.mask.long()).last_hidden_state
    finish(towers, vit.norm(vit.blocks(x))[:, 0], words[:, 0])


def our_step(towers: nn.ModuleDict, batch: Batch, kept: Tensor) -> None:
    image, words = our_encoding(towers, batch, kept)
    finish(towers, image[:, 0], words[Packing.of(batch.lengths, "cpu").first])


def finish(towers: nn.ModuleDict, image: Tensor, text: Tensor) -> None:
    """A contrastive loss, its gradients and AdamW; the same for all."""
    image = normalize(image.float().unflatten(0, (-1, VIEWS)).mean(1), dim=-1)
    ops.contrastive(image, normalize(text.float(), dim=-1), torch.tensor(10.0)).backward()
    parameters = [p for p in towers.parameters() if p.grad is not None]
    torch.optim.AdamW(parameters, lr=1e-6).step()
    towers.zero_grad(set_to_none=True)


def record(benchmark, ratios: dict[str, float], **figures) -> None:
    about = {"device": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    versions = {"torch": torch.__version__, "timm": timm.__version__}
    benchmark.extra_info |= about | versions | figures | {k: round(v, 2) for k, v in ratios.items()}


@torch.inference_mode()
def test_encoding(benchmark, plain, batch):
    plain.eval()
    batch = Batch(batch.images[:1], batch.present[:1], batch.words[:1], torch.tensor([64]))
    fast, half = ours(plain, torch.float32, False), ours(plain, torch.bfloat16, False)

    def autocast():
        with torch.autocast("cpu", torch.bfloat16):
            return plain_encoding(plain, batch)

    for actual, right in zip(our_encoding(fast, batch), plain_encoding(plain, batch), strict=True):
        right = right if actual.ndim == right.ndim else right[batch.mask]  # the padded words' hidden states
        torch.testing.assert_close(actual, right, rtol=0, atol=2e-5)
    swapped = accelerate(copy.deepcopy(plain).requires_grad_(False))
    runs = {
        "plain": lambda: plain_encoding(plain, batch),
        "accelerated": lambda: plain_encoding(swapped, batch),
        "ours": lambda: our_encoding(fast, batch),
    }
    if HALF:
        runs |= {"plain_bf16": autocast, "ours_bf16": lambda: our_encoding(half, batch)}
    taken = seconds(runs, rounds=25)
    ratios = {
        name: taken["plain"] / taken[run] for name, run in (("float32", "ours"), ("accelerate_alone", "accelerated"))
    }
    if HALF:
        ratios["bfloat16"] = taken["plain_bf16"] / taken["ours_bf16"]
        ratios["bfloat16_against_float32"] = taken["plain"] / taken["ours_bf16"]
    record(benchmark, ratios)
    benchmark.pedantic(runs["ours"], rounds=1)
    assert ratios["float32"] >= 2.4
    assert not HALF or (ratios["bfloat16"] >= 1.4 and ratios["bfloat16_against_float32"] >= 4.3)


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
def test_pretraining_step(benchmark, plain, batch, dtype, than_masked, than_whole):
    plain.train()
    fast = ours(plain, dtype, True)
    kept = ops.draw_kept_patches(batch.present, PATCHES, PATCHES // 4, seed=0)[0]

    def theirs(kept: Tensor | None) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            plain_step(plain, batch, kept)

    runs = {
        "masked": lambda: theirs(kept),
        "whole": lambda: theirs(None),
        "ours": lambda: our_step(fast, batch, kept),
    }
    taken = seconds(runs, rounds=4)
    ratios = {f"than_{name}": taken[name] / taken["ours"] for name in ("masked", "whole")}
    record(benchmark, ratios)
    benchmark.pedantic(runs["ours"], rounds=1)
    assert ratios["than_masked"] >= than_masked and ratios["than_whole"] >= than_whole


def test_memory_of_a_pretraining_step(benchmark, plain, batch):
    """Activations, gradients and optimizer states, in float32: at most a third of the plain unmasked step's."""
    plain.train()
    fast = ours(plain, torch.float32, True)
    kept = ops.draw_kept_patches(batch.present, PATCHES, PATCHES // 4, seed=0)[0]
    theirs, held = peak_memory(lambda: plain_step(plain, batch, None)), peak_memory(lambda: our_step(fast, batch, kept))
    record(benchmark, {"less_memory": theirs / held}, bytes_of_the_plain_step=theirs, bytes_held=held)
    benchmark.pedantic(lambda: our_step(fast, batch, kept), rounds=1)
    assert held <= theirs / 3
