"""Where the speed comes from: the techniques one at a time, each added to those before, for encoding studies and for a
pretraining step, from timm and transformers as people run them to what this engine does.

Encoding: whole views and reports, to every token of both towers. Pretraining step: ClinVLA's two losses between images
and reports, their gradients and AdamW.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from bench.operations import LOCAL, TAUS, WIDTH, caption_loop, plain_contrastive
from bench.towers import MEAN, PADDED, STD, VIEWS, Batch, plain_images
from clinvla_fast import Recipe, accelerate, backend, ops
from clinvla_fast.kernels.contrastive import symmetric_cross_entropy
from clinvla_fast.modeling import attention
from clinvla_fast.modeling.fp8 import float8_refusal, to_float8
from clinvla_fast.modeling.frozen import compute_dtype, freeze
from clinvla_fast.modeling.packing import Grid
from clinvla_fast.modeling.text import TextTower
from clinvla_fast.modeling.vision import VisionTower
from clinvla_fast.pretraining import compile_tower_blocks
from clinvla_fast.twins import FastLinear


@dataclass(frozen=True)
class How:
    """Which techniques are in use."""

    training: bool
    studies: int
    masked: bool = False  # a quarter of the patches is kept
    from_pixels: bool = False  # patches that are needed are read from uint8, by weights that normalise too
    frozen: bool = False  # in training, adapters learn instead
    packed: bool = False  # reports lie one after the other
    fused: bool = False  # the kernels where they run; else plain PyTorch
    fast_twins: bool = False
    dtype: torch.dtype = torch.float32
    streaming: bool = False  # losses that hold nothing of all pairs
    compiled: bool = False
    graph: bool = False
    float8: bool = False


Technique = tuple[str, dict[str, object]]
"""What it is called, and what of `How` it changes."""

TWINS: Technique = ("linear layers and attention by accelerate", {"fast_twins": True})
HALF: Technique = ("bfloat16", {"dtype": torch.bfloat16})
COMPILED: Technique = ("compiled blocks", {"compiled": True})
ENCODING: list[Technique] = [
    ("patches from uint8 pixels", {"from_pixels": True}),
    ("no padding", {"packed": True}),
    TWINS,
    HALF,
    COMPILED,
    ("CUDA graph", {"graph": True}),
    ("FP8", {"float8": True}),
]
STEP: list[Technique] = [
    ("a quarter of the patches kept", {"masked": True}),
    ("only those read", {"from_pixels": True}),
    ("frozen towers with adapters", {"frozen": True}),
    ("no padding", {"packed": True}),
    ("fused kernels", {"fused": True}),
    TWINS,
    HALF,
    ("streaming losses", {"streaming": True}),
    COMPILED,
    ("256 studies at once", {"studies": 256}),
]


def waterfall(plain: nn.ModuleDict, studies: int, training: bool) -> Iterator[tuple[str, "Run"]]:
    """A run without any technique, and one for each that there is on the towers' device, in order."""
    device = next(plain.parameters()).device
    torch.manual_seed(0)
    heads = {f"{side} head": nn.Linear(WIDTH, LOCAL, device=device) for side in ("image", "text")}
    plain = nn.ModuleDict({**plain, **heads})
    end_to_end = _optimizer(plain)
    how = How(training, studies, frozen=not training, fused=not training)
    yield "timm and transformers" + ", end to end" * training, Run(how, plain, end_to_end)
    for name, change in STEP if training else ENCODING:
        if _possible(change, device):
            how = replace(how, **change)
            yield name, Run(how, plain, end_to_end)


def _possible(change: dict[str, object], device: torch.device) -> bool:
    """Whether a device has a technique."""
    if "dtype" in change:
        return compute_dtype(device) == change["dtype"]
    if "float8" in change:
        return not float8_refusal(device)
    return device.type == "cuda" or not change.keys() & {"fused", "graph", "studies"}


Tokens = tuple[Tensor, Tensor]
"""Of every view [n, 1 + k, width], CLS first; of the words, without padding [total, width]."""


class Run:
    """Encoding, or a pretraining step, in one way. Runs that train end to end share weights and the optimizer."""

    def __init__(self, how: How, plain: nn.ModuleDict, end_to_end: torch.optim.Optimizer):
        self.how, device = how, next(plain.parameters()).device
        self.batch = batch = Batch.of(how.studies, device.type)
        self.grid = Grid.of(batch.lengths.to(device), PADDED, how.dtype)
        self.kept = batch.kept() if how.masked else None
        plain = copy.deepcopy(plain) if how.frozen else plain.train()
        self.towers = self._towers(plain).to(device)
        self.heads = plain["image head"], plain["text head"]
        self.optimizer = _optimizer(nn.ModuleList([self.towers, *self.heads])) if how.frozen else end_to_end
        self.taus = [torch.tensor(tau, device=device) for tau in TAUS]
        self._replay: Callable[[], Tokens] | None = None

    def _towers(self, plain: nn.ModuleDict) -> nn.ModuleDict:
        how, adapted = self.how, self.how.frozen and self.how.training
        if how.frozen:
            freeze(plain["vit"], how.dtype)
            freeze(plain["bert"], how.dtype)
        image = VisionTower(plain["vit"], MEAN, STD) if how.from_pixels else plain["vit"]
        text = TextTower(plain["bert"]) if how.packed or adapted else plain["bert"]
        towers = nn.ModuleDict({"image": image, "text": text})
        if adapted:
            for tower in towers.values():
                tower.add_adapters(Recipe())
        if how.fast_twins:
            accelerate(towers)
        if how.float8:
            for layer in [m for m in plain.modules() if type(m) is FastLinear]:
                to_float8(layer)
        if how.compiled:
            compile_tower_blocks(image, text)
        return towers

    def __call__(self) -> tuple[Tensor, ...]:
        """What every way agrees on, up to rounding: the tokens, or the loss of what was to be learnt."""
        if not self.how.training:
            return self.encode()
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        self.towers.zero_grad()
        self.optimizer.zero_grad()
        return (loss.detach(),)

    def encode(self) -> Tokens:
        # varlen is the attention without padding that a graph can hold: xformers copies lengths to the GPU
        held = self.how.compiled and not self.how.training and self.batch.images.is_cuda
        library = attention.use("varlen") if held else nullcontext()
        with library, self._backend(), torch.inference_mode(not self.how.training):
            if self.how.graph and self._replay is None:
                self._replay = _captured(self._encode)
            return (self._replay or self._encode)()

    def _encode(self) -> Tokens:
        image, text, batch = self.towers["image"], self.towers["text"], self.batch
        if self.how.from_pixels:
            # a graph cannot wait to see which views there are
            views = image(batch.images, None if self.how.graph else batch.present, self.kept)
        else:
            views = plain_images(image, batch.pixels, self.kept)
        if self.how.packed:
            return views, text(batch.tokens, batch.packing)
        if isinstance(text, TextTower):
            return views, text(batch.words.flatten(), self.grid)[batch.mask.flatten()]
        words = text(input_ids=batch.words, attention_mask=batch.mask.long()).last_hidden_state
        return views, words[batch.mask]

    def _backend(self):
        return backend.use("auto" if self.how.fused else "reference")

    def loss(self) -> Tensor:
        views, words = self.encode()
        image = normalize(views[:, 0].float().unflatten(0, (-1, VIEWS)).mean(1), dim=-1)
        text = normalize(words[self.batch.packing.first].float(), dim=-1)
        patches = self.heads[0](views[:, 1:].float()).unflatten(0, (-1, VIEWS)).flatten(1, 2)
        pieces = self.batch.packing.pad(self.heads[1](words.float()))
        seen = torch.ones_like(patches[..., 0], dtype=torch.bool)
        contrastive, align = plain_contrastive, caption_loop
        if self.how.streaming:
            contrastive, align = ops.contrastive, ops.local_alignment
            patches, pieces = (x.to(self.how.dtype) for x in (patches, pieces))
        with self._backend():
            logits = align(patches, seen, pieces, self.batch.packing.mask, *self.taus)
            return contrastive(image, text, self.taus[-1]) + symmetric_cross_entropy(logits)


def _optimizer(learning: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(learning.parameters(), lr=0)  # so that all turns, and all ways, are of the same weights


def _captured(run: Callable[[], Tokens]) -> Callable[[], Tokens]:
    """A run as a CUDA graph."""
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(3):  # what is compiled or tuned once is so by then
            run()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()

    def replay() -> Tokens:
        graph.replay()
        return out

    return replay
