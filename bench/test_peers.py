"""Whole models of other libraries against ours, each at its own size: a peer that is missing is told of. On a CPU one
study in float32, on a GPU many in bfloat16."""

import copy
from collections.abc import Callable
from functools import partial
from statistics import median

import pytest
import timm
import torch
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from bench import peers
from bench.measure import Run
from bench.towers import LENGTHS, PADDED, Batch, our_encoding, our_towers, plain_towers
from clinvla_fast import Recipe
from clinvla_fast.modeling.frozen import freeze
from clinvla_fast.modeling.text import TextTower
from clinvla_fast.twins import accelerate

CONTEXT = 77  # words that open_clip pads a text to
SIDE = 448  # pixels of BioViL-T's images
ON_CPU, ON_GPU = ("cpu", torch.float32), ("cuda", torch.bfloat16)
MANY = pytest.mark.parametrize("studies", [1, 64])


def assert_close(actual: Tensor, right: Tensor) -> None:
    limit = 2e-5 if right.dtype == torch.float32 else 0.03
    assert (actual.double() - right.double()).norm() <= limit * right.double().norm()


def compare(measured, runs: dict[str, Run], rounds: int, pairs: dict[str, tuple[str, str]]) -> None:
    """Keep how much faster the second of each pair is than the first."""
    taken = measured.turns(runs, rounds)
    for name, (theirs, ours) in pairs.items():
        measured.faster(name, taken[theirs], taken[ours])
    if measured.on_gpu:
        measured.figure("seconds", {name: median(times) for name, times in taken.items()})


def open_clip(measured, studies: int, device: str, dtype: torch.dtype) -> None:
    """A frontal view and a report, from uint8 pixels to the embeddings of its ViT-B-16, which pads texts to 77 words,
    and to the tokens of our towers of the same widths and depths: a ViT-B/16, and a BERT that reads words without
    padding. The image tower alone is timm's too, with its weights and after `accelerate`."""
    theirs, plain = peers.open_clip_vit().to(device, dtype), plain_towers()
    width, depth = theirs.positional_embedding.shape[1], len(theirs.transformer.resblocks)
    sizes = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": width // 64}
    plain["bert"] = BertModel(BertConfig(**sizes, intermediate_size=4 * width), add_pooling_layer=False)
    ours = our_towers(plain, dtype, False).to(device)
    in_timm = timm.create_model("vit_base_patch16_clip_224", num_classes=theirs.visual.output_dim).eval()
    in_timm.load_state_dict(checkpoint_filter_fn(theirs.state_dict(), in_timm))
    accelerate(in_timm.requires_grad_(False).to(device, dtype))

    batch = Batch.of(studies, device, lengths=tuple(min(n, CONTEXT) for n in LENGTHS))
    batch.images, batch.present = batch.images[:, :1], batch.present[:, :1]
    words = (batch.words * batch.mask)[:, :CONTEXT]
    words[range(studies), batch.lengths - 1] = theirs.vocab_size - 1  # the end of a text, where it is pooled

    def images(encode: Callable[[Tensor], Tensor]) -> Tensor:
        return encode(batch.pixels.to(dtype))

    runs = {
        "theirs": lambda: (images(theirs.encode_image), theirs.encode_text(words)),
        "ours": partial(our_encoding, ours, batch),
        "their images": partial(images, theirs.encode_image),
        "accelerated images": partial(images, in_timm),
    }
    assert_close(runs["accelerated images"](), runs["their images"]())
    pairs = {
        "a view and a report": ("theirs", "ours"),
        "images, by accelerate": ("their images", "accelerated images"),
    }
    compare(measured, runs, 9 if device == "cpu" else 30, pairs)


@torch.inference_mode()
def test_open_clip(measured, peer):
    peer("open_clip_torch")
    open_clip(measured, 1, *ON_CPU)


@pytest.mark.gpu
@MANY
@torch.inference_mode()
def test_open_clip_on_gpu(measured, peer, studies):
    peer("open_clip_torch")
    open_clip(measured, studies, *ON_GPU)


def biovil_t(measured, studies: int, device: str, dtype: torch.dtype) -> None:
    """hi-ml's BioViL-T reads a view and its prior one at 448 x 448 pixels and a report padded to the longest; ours two
    views at the size of its own ViT and the same report. Two networks: neither gives the other's result."""
    theirs, ours = peers.BioViLT().to(device, dtype), our_towers(plain_towers(), dtype, False).to(device)
    batch = Batch.of(studies, device)
    longest = int(batch.lengths.max())
    words, mask = batch.words[:, :longest], batch.mask[:, :longest]
    views = torch.randint(0, 256, (2, studies, 1, SIDE, SIDE), dtype=torch.uint8, device=device)

    def encode() -> tuple[Tensor, Tensor]:
        current, prior = (views / 255).to(dtype).expand(-1, -1, 3, -1, -1)
        return theirs(current, prior, words, mask)

    assert all(x.shape == (studies, 128) and x.isfinite().all() for x in encode())
    runs = {"theirs": encode, "ours": partial(our_encoding, ours, batch)}
    compare(measured, runs, 9 if device == "cpu" else 30, {"two images and a report": ("theirs", "ours")})


@torch.inference_mode()
def test_biovil_t(measured, peer):
    peer("hi-ml-multimodal")
    biovil_t(measured, 1, *ON_CPU)


@pytest.mark.gpu
@MANY
@torch.inference_mode()
def test_biovil_t_on_gpu(measured, peer, studies):
    peer("hi-ml-multimodal")
    biovil_t(measured, studies, *ON_GPU)


def mad_x(measured, studies: int, device: str, dtype: torch.dtype) -> None:
    """AdapterHub's language and task adapters with an invertible one in a BERT-base, as they are, after `accelerate`,
    and in our tower: reports of 128 words, so that nothing is won by leaving out padding. In bfloat16 theirs is
    autocast, as adapters are trained in float32."""
    theirs, batch = peers.mad_x_bert().to(device), Batch.of(studies, device, lengths=(PADDED,))
    accelerated = accelerate(copy.deepcopy(theirs))
    bert = BertModel(theirs.config, add_pooling_layer=False)
    bert.load_state_dict({name: theirs.state_dict()[name] for name in bert.state_dict()})
    ours = TextTower(bert)
    freeze(bert, dtype)
    ours.add_adapters(Recipe())
    accelerate(ours.to(device))

    def hidden(model: nn.Module) -> Tensor:
        if model is ours:
            return model(batch.tokens, batch.packing)
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            return model(input_ids=batch.words, attention_mask=batch.mask.long()).last_hidden_state.flatten(0, 1)

    def forward(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return hidden(model)

    def step(model: nn.Module) -> None:
        hidden(model).float().square().mean().backward()
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6).step()
        model.zero_grad(set_to_none=True)

    assert_close(forward(accelerated), forward(theirs))
    active, theirs.active_adapters = theirs.active_adapters, None  # ours are new and change nothing
    assert_close(forward(ours), forward(theirs))
    theirs.active_adapters = active
    models, runs, pairs = {"theirs": theirs, "accelerated": accelerated, "ours": ours}, {}, {}
    for what, run in (("forward", forward), ("training step", step)):
        runs |= {f"{name}, {what}": partial(run, model) for name, model in models.items()}
        pairs |= {f"{name}, {what}": (f"theirs, {what}", f"{name}, {what}") for name in ("ours", "accelerated")}
    compare(measured, runs, 7 if device == "cpu" else 30, pairs)


def test_mad_x(measured, peer):
    peer("adapters")
    mad_x(measured, 2, *ON_CPU)


@pytest.mark.gpu
@MANY
def test_mad_x_on_gpu(measured, peer, studies):
    peer("adapters")
    mad_x(measured, studies, *ON_GPU)


def test_every_pinned_peer_is_measured():
    assert peers.pins().keys() == peers.MODULES.keys()
