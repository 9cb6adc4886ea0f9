"""Inference at the lowest latency: the whole model as CUDA graphs, its two towers side by side on two streams.

A graph replays the same kernels on the same memory, so nothing may depend on what is in a batch: here every view slot
is computed, present or not, and reports lie in a grid. Batches are padded up to the next size that is captured.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import pad

from ..study import VIEWS, Embeddings, StudyBatch
from .adapters import Bottleneck
from .model import ClinVLA
from .packing import Grid, Packing

_WORDS = 32  # reports are padded up to a multiple of it
_WARM_UPS = 3  # before a capture: what is compiled, tuned or allocated once must be so by then


def run_tower(tower: nn.Module, dtype: torch.dtype | None, *args) -> Tensor:
    """tower(*args), its adapters' weights brought to dtype by one copy: one after the other they are half of all
    kernels. None: they are in it."""
    weights = {
        f"{place}.{name}": weight
        for place, module in tower.named_modules()
        if dtype is not None and isinstance(module, Bottleneck)
        for name, weight in module.named_parameters()
    }
    if not weights:
        return tower(*args)
    cast = [torch.empty_like(weight, dtype=dtype) for weight in weights.values()]
    torch._foreach_copy_(cast, list(weights.values()))
    return functional_call(tower, dict(zip(weights, cast, strict=True)), args)


def embed_images(model: ClinVLA, images: Tensor, present: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `ClinVLA.embed_images` of whole images, with the same operations whatever is present.

    Local embeddings keep the places of absent views, as zeros that the mask leaves out.
    """
    patches = model.vision.patches
    tokens = run_tower(model.vision, model.dtype, images, None).unflatten(0, present.shape)
    seen = present[..., None].to(torch.promote_types(tokens.dtype, torch.float32))
    count = present.sum(1)[:, None]
    pooled = model.image_global((tokens[:, :, 0] * seen).sum(1) / count.clamp(min=1)) * (count > 0)
    local = model.image_local(tokens[:, :, 1:]).to(tokens.dtype) * present[..., None, None]
    return pooled, local.flatten(1, 2), present.repeat_interleave(patches, 1, output_size=present.shape[1] * patches)


def embed_reports(model: ClinVLA, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `ClinVLA.embed_reports`, of reports in a grid.

    Args:
        tokens: int64 [B, L], anything where a report has ended.
        lengths: int64 [B], on the same device, from 1 to L.
    """
    dtype = model.text.word_embeddings.weight.dtype
    grid = Grid.of(lengths, tokens.shape[1], dtype)
    hidden = run_tower(model.text, model.dtype, tokens.flatten(), grid)
    columns = torch.arange(tokens.shape[1], device=tokens.device)
    words = (columns > 0) & (columns < lengths[:, None] - 1)
    local = grid.pad(model.text_local(hidden).to(hidden.dtype)) * grid.mask[..., None]
    return model.text_global(hidden[grid.first]), local, words


@dataclass
class _Graph:
    """What a graph reads and writes, at addresses that stay."""

    images: Tensor
    present: Tensor
    tokens: Tensor
    lengths: Tensor
    out: Embeddings | None = None  # of the last run
    graph: torch.cuda.CUDAGraph | None = None  # on a GPU


class Captured:
    """A model whose batches run as CUDA graphs: `captured(batch)` is `model(batch)`.

    A graph is captured when a shape first comes: for each batch size, number of view slots, and 32 words. On other
    devices the same operations run one by one. The model's weights may change in place (training, load_state_dict), but
    neither move nor change their dtype. One thread at a time.

    Args:
        model: a ClinVLA, on its device; put in evaluation mode.
        batch_sizes: a batch is padded up to the next of these; one larger than all of them goes in parts.

    Raises:
        ValueError: if there is no batch size, or one below 1, or the model's recipe leaves out views, an embedding or
            frozen towers.
    """

    def __init__(self, model: ClinVLA, batch_sizes: Sequence[int] = (1, 8, 32, 128)):
        if not batch_sizes or min(batch_sizes) < 1:
            raise ValueError(f"batch_sizes are {list(batch_sizes)}: expected one or more, from 1 up.")
        recipe = model.recipe
        whole = recipe.views == VIEWS and recipe.global_weight and recipe.local_weight and not recipe.missing_views
        if not whole or (recipe.trained and model.dtype is not None):
            raise ValueError("expected a model of all views, with both embeddings and towers that are frozen.")
        self.model = model.eval()
        self.batch_sizes = sorted(set(batch_sizes))
        self._graphs: dict[tuple[int, int, int], _Graph] = {}
        self._on_gpu = model.device.type == "cuda"
        if self._on_gpu:  # one pool and one pair of streams: a graph's memory is free for the next one's
            self._pool = torch.cuda.graph_pool_handle()
            self._main, self._beside = (torch.cuda.Stream(model.device) for _ in range(2))

    @torch.inference_mode()
    def __call__(self, batch: StudyBatch) -> Embeddings:
        """Embeddings of a batch, as ClinVLA.forward, in new memory.

        Views keep their slots in image_local, as zeros that image_mask leaves out where a view is absent; local
        embeddings are padded further than there.

        Raises:
            ValueError: if a report is longer than the model reads, or the images are not uint8 of its size.
        """
        size, views = self.model.vision.image_size, batch.images.shape[1]
        if batch.images.dtype != torch.uint8 or batch.images.shape[2:] != (size, size) or views > len(VIEWS):
            found = f"{batch.images.dtype} {list(batch.images.shape)}"
            raise ValueError(f"images are {found}: expected uint8 [B, up to {len(VIEWS)}, {size}, {size}].")
        lengths, largest = batch.lengths, self.batch_sizes[-1]
        longest = max(lengths.tolist(), default=0)
        if longest > self.model.text.max_tokens:
            raise ValueError(f"a report has {longest} tokens: this model reads {self.model.text.max_tokens} at most.")
        words = min(max(-(-longest // _WORDS), 1) * _WORDS, self.model.text.max_tokens)
        tokens = Packing.of(lengths, batch.tokens.device).pad(batch.tokens)
        tokens = pad(tokens, (0, words - tokens.shape[1]))
        on_its_device = torch.cuda.device(self.model.device) if self._on_gpu else nullcontext()
        with on_its_device:
            parts = [
                self._part(*(x[start : start + largest] for x in (batch.images, batch.present, tokens, lengths)))
                for start in range(0, max(len(batch), 1), largest)
            ]
        return Embeddings(**{f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Embeddings)})

    def _part(self, images: Tensor, present: Tensor, tokens: Tensor, lengths: Tensor) -> Embeddings:
        """At most as many studies as the largest graph takes."""
        studies = len(images)
        size = next(size for size in self.batch_sizes if size >= studies)
        shape = (size, images.shape[1], tokens.shape[1])
        if shape not in self._graphs:
            self._graphs[shape] = self._capture(*shape)
        held = self._graphs[shape]
        for to, x in ((held.images, images), (held.tokens, tokens), (held.present, present), (held.lengths, lengths)):
            to[:studies].copy_(x, non_blocking=True)
        held.present[studies:] = False
        held.lengths[studies:] = 1
        held.lengths.clamp_(min=1)
        if held.graph is None:
            held.out = self._run(held)
        else:
            held.graph.replay()
        return Embeddings(**{f.name: getattr(held.out, f.name)[:studies].clone() for f in fields(Embeddings)})

    def _run(self, held: _Graph, beside: torch.cuda.Stream | None = None) -> Embeddings:
        """The model on what `held` holds, its report tower on the stream `beside`."""
        if beside is None:
            image = embed_images(self.model, held.images, held.present)
            return Embeddings(*image, *embed_reports(self.model, held.tokens, held.lengths))
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            text = embed_reports(self.model, held.tokens, held.lengths)
        image = embed_images(self.model, held.images, held.present)
        torch.cuda.current_stream().wait_stream(beside)
        return Embeddings(*image, *text)

    def _capture(self, studies: int, views: int, words: int) -> _Graph:
        model = self.model
        size, on = model.vision.image_size, {"device": model.device}
        held = _Graph(
            images=torch.zeros(studies, views, size, size, dtype=torch.uint8, **on),
            present=torch.ones(studies, views, dtype=torch.bool, **on),
            tokens=torch.zeros(studies, words, dtype=torch.int64, **on),
            lengths=torch.full((studies,), words, **on),
        )
        if not self._on_gpu:
            return held
        main, beside = self._main, self._beside
        main.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(main):
            for _ in range(_WARM_UPS):
                self._run(held, beside)
        torch.cuda.current_stream().wait_stream(main)
        held.graph = torch.cuda.CUDAGraph()
        # thread_local: a loader that allocates in another thread does not end the capture
        with torch.cuda.graph(held.graph, self._pool, main, capture_error_mode="thread_local"):
            held.out = self._run(held, beside)
        return held
