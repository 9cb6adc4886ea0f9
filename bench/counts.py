"""What every configuration costs, counted, and what closed forms say of it; nothing is timed.

    python -m bench.counts      # writes bench/results/counts.json, to which bench/test_counts.py holds every change

A configuration is a method and a size, with random weights. FLOPs are 2 a multiply-add, of one study. Bytes saved for
the backward pass are of a step of four studies, float32, in plain PyTorch. What kernels take (registers, shared memory,
instructions) has tables of its own: tests/kernels/test_resources.py.
"""

import json
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry

from bench.models import VOCABULARY, save_towers
from bench.stored import RESULTS
from bench.towers import LENGTHS, PADDED, PATCHES, VIEWS, Batch, our_towers, plain_encoding, plain_towers
from clinvla_fast import ClinVLA, Recipe, StudyBatch, backend
from clinvla_fast.cost import adaptor_cost, forward_flops, parameters, saved_bytes, step_flops
from clinvla_fast.data.features import FeatureBatch
from clinvla_fast.data.loader import StudyLoader
from clinvla_fast.fit import Stage
from clinvla_fast.methods import METHODS
from clinvla_fast.modeling import attention
from clinvla_fast.modeling.adaptor import Adaptor
from clinvla_fast.modeling.captured import run_tower
from clinvla_fast.modeling.encoders import load_image_encoder, load_text_encoder
from clinvla_fast.modeling.masked_modeling import masked_words
from clinvla_fast.modeling.packing import Grid
from clinvla_fast.presets import PRESETS
from clinvla_fast.pretraining import Align, Fuse, compile_tower_blocks, warm_up
from clinvla_fast.recipe import Method
from clinvla_fast.study import VIEWS as SLOTS
from clinvla_fast.versions import versions

TABLE = RESULTS / "counts.json"
PACKAGES = ("torch", "timm", "transformers")
STUDIES = ((1, 37), (2, 60), (2, 128), (4, 128))
"""Views and tokens of those whose FLOPs are counted."""
BATCH = 4
CONFIGURATIONS = tuple(product(METHODS, PRESETS))
Counts = dict[str, int]


def method_of(name: str, size: str) -> Method:
    return PRESETS[size].fit(name, METHODS[name])


# Closed forms


@dataclass(frozen=True)
class Sizes:
    """Both towers have this width; patches have 16 x 16 pixels."""

    width: int
    channels: int
    patches: int
    vision_blocks: int
    text_blocks: int
    vocabulary: int
    positions: int

    @property
    def block(self) -> int:
        """Parameters of a transformer block: two LayerNorms, attention, MLP."""
        w = self.width
        return 2 * 2 * w + 4 * (w * w + w) + 2 * 4 * w * w + 4 * w + w


SIZES = {
    "tiny": Sizes(128, 1, 64, 3, 2, VOCABULARY["tiny"], 128),
    "base": Sizes(768, 3, 196, 12, 12, VOCABULARY["base"], 512),
}
PIXELS = 16 * 16


def expected(name: str, size: str) -> Counts:
    """Parameters and FLOPs of a configuration, by the names that `counted` has."""
    s, r = SIZES[size], method_of(name, size).recipe
    if r.fusion:
        found = _adaptor_parameters(s, r) | {f"forward, views 2, tokens {s.positions}": _plain_forward(s, s.positions)}
        return found | {f"step, views {v}, tokens {t}": _adaptor_step(s, r, v, t) for v, t in STUDIES}
    found = _parameters(s, r)
    for views, tokens in STUDIES:
        study = f"views {views}, tokens {tokens}"
        found[f"forward, {study}"] = _forward(s, r, views, tokens, s.patches)
        found[f"masked forward, {study}"] = _forward(s, r, views, tokens, round(r.keep * s.patches))
        found[f"step, {study}"] = _step(s, r, views, tokens)
    return found


def _linear(width: int, out: int) -> int:
    return width * out + out


def _towers(s: Sizes) -> tuple[int, int]:
    """Parameters of the ViT and of the BERT, without pooler."""
    w = s.width
    vit = s.channels * PIXELS * w + w + w + (1 + s.patches) * w + s.vision_blocks * s.block + 2 * w
    return vit, (s.vocabulary + s.positions + 2) * w + 2 * w + s.text_blocks * s.block


def _parameters(s: Sizes, r: Recipe) -> Counts:
    w, d, depth = s.width, r.width, s.vision_blocks + s.text_blocks
    norms = (2 * depth + 2) * 2 * w
    vit, bert = _towers(s)
    view_slots, scales = 4 * w, 4
    total = vit + bert + view_slots + scales
    total += depth * _in_blocks(r) * (_linear(w, r.bottleneck) + _linear(r.bottleneck, w))
    if "invertible" in r.adapters:
        total += 2 * 2 * (_linear(w // 2, w // 4) + _linear(w // 4, w // 2))
    total += 2 * _aligned(r) * (_linear(w, d) + 2 * d + _linear(d, d))
    total += len(SLOTS) * w * r.missing_views
    decoder_blocks = r.decoder_blocks * s.block + 2 * w
    if r.image_weight:
        mask_token, position = w, s.patches * w
        total += _linear(w, w) + mask_token + position + decoder_blocks + _linear(w, PIXELS * r.target_scale**2)
    if r.word_weight:
        total += _linear(w, w) + 2 * w + s.vocabulary + _linear(w, w) * (r.image_in_words != "none")
    frozen = 0 if "towers" in r.trained else vit + bert
    frozen -= norms * ("norms" in r.trained) + w * ("tokens" in r.trained)
    frozen += scales * (not r.learn_scales or not _aligned(r)) + decoder_blocks * (not r.train_decoder)
    return {"parameters": total, "trained parameters": total - frozen}


def _in_blocks(r: Recipe) -> int:
    """Adapters that a block carries."""
    return len(set(r.adapters) - {"invertible"})


def _aligned(r: Recipe) -> int:
    """Losses between images and reports, each with a head a side."""
    return bool(r.global_weight) + bool(r.local_weight)


def _seen(r: Recipe, views: int) -> int:
    return sum(view in r.views for view in SLOTS[:views])


def _blocks(
    s: Sizes, depth: int, sequences: int, tokens: int, adapters: int = 0, weights: int = 1, others: int = 1
) -> int:
    """Queries, keys, values, projection and MLP; two attention products; adapters, of this inner width together.

    Args:
        weights: passes through the products with weights: forward 1; 1 more for what comes in, 1 for what is trained.
        others: through all else.
    """
    products = 2 * 4 * s.width**2 + 2 * 2 * 4 * s.width**2
    return sequences * tokens * depth * (weights * products + others * 2 * 2 * (tokens * s.width + s.width * adapters))


def _forward(s: Sizes, r: Recipe, views: int, tokens: int, patches: int) -> int:
    views, w, adapters = _seen(r, views), s.width, _in_blocks(r) * r.bottleneck
    flops = 2 * views * patches * PIXELS * w  # normalisation, and gray to RGB, are folded into the weights
    flops += _blocks(s, s.vision_blocks, views, 1 + patches, adapters) + _blocks(s, s.text_blocks, 1, tokens, adapters)
    if "invertible" in r.adapters:  # two bottlenecks, each from w / 2 through w / 4
        flops += (views * (1 + patches) + tokens) * w**2
    return flops + _heads(r, w, views * patches, tokens) + 2 * len(r.views) * w * r.missing_views


def _heads(r: Recipe, w: int, patches: int, tokens: int) -> int:
    rows = 2 * bool(r.global_weight) + (patches + tokens) * bool(r.local_weight)
    return 2 * rows * (w * r.width + r.width**2)


def _step(s: Sizes, r: Recipe, views: int, tokens: int) -> int:
    """Three passes through what is trained and what lies between; two through frozen weights."""
    views, w, adapters, kept = _seen(r, views), s.width, _in_blocks(r) * r.bottleneck, round(r.keep * s.patches)
    end_to_end = "towers" in r.trained
    passes = {"adapters": adapters, "weights": 3 if end_to_end else 2, "others": 3}
    text = _blocks(s, s.text_blocks, 1, tokens, **passes)
    flops = (2 if end_to_end else 1) * 2 * views * kept * PIXELS * w  # nothing goes back to pixels
    flops += _blocks(s, s.vision_blocks, views, 1 + kept, **passes)
    if "invertible" in r.adapters:
        flops += 3 * (views * (1 + kept) + tokens) * w**2
        if not end_to_end:  # nothing goes back to word embeddings
            flops -= tokens * w**2 // 4
    missing = 2 * 2 * len(r.views) * w * r.missing_views
    if _aligned(r):
        flops += text + 3 * _heads(r, w, views * kept, tokens) + missing
    flops += losses(r, views * kept, tokens)
    if r.image_weight:
        flops += 3 * 2 * ((1 + kept) * w**2 + s.patches * w * PIXELS * r.target_scale**2)
        weights = 3 if r.train_decoder else 2
        flops += _blocks(s, r.decoder_blocks, 1, s.patches, weights=weights, others=3)
    if r.word_weight:
        masked = masked_words(tokens, r.masked_words)
        flops += text + 3 * 2 * w**2 * (masked + (r.image_in_words != "none"))
        flops += (3 if end_to_end else 2) * 2 * masked * w * s.vocabulary + missing * (r.image_in_words == "cls")
    return flops


def losses(r: Recipe, patches: int, tokens: int) -> int:
    """Between the image and the report of one study, in a step."""
    directions = 1 if r.image_share == 0.5 else 2  # unequal shares: each has its product
    of_words = 2 * patches * tokens * r.width * bool(r.local_weight)
    return 3 * 2 * r.width * directions * bool(r.global_weight) + 3 * of_words * 2


def recomputed_attention(s: Sizes, views: int, tokens: int, patches: int) -> int:
    """One product more a block, for scores that a fused backward pass computes again."""
    scores = views * (1 + patches) ** 2 * s.vision_blocks + tokens**2 * s.text_blocks
    return 2 * scores * s.width


def three_channels(s: Sizes, views: int, patches: int) -> int:
    """What a pass through patches of three equal channels takes beyond one through gray ones."""
    return 2 * 2 * views * patches * PIXELS * s.width


def _adaptor_parameters(s: Sizes, r: Recipe) -> Counts:
    w, d = s.width, r.width
    block = _linear(d, 3 * d) + _linear(d, d) + _linear(d, 4 * d) + _linear(4 * d, d) + 2 * 2 * d
    trained = 2 * _linear(w, d) + block + 2
    return {"parameters": sum(_towers(s)) + trained, "trained parameters": trained}


def _plain_forward(s: Sizes, tokens: int) -> int:
    """Of towers as they are, by timm and transformers, of two views."""
    embed = 2 * 2 * s.patches * s.channels * PIXELS * s.width
    return embed + _blocks(s, s.vision_blocks, 2, 1 + s.patches) + _blocks(s, s.text_blocks, 1, tokens)


def _adaptor_step(s: Sizes, r: Recipe, views: int, tokens: int) -> int:
    """Each modality asks both, in one block; nothing goes back to the stored tokens, and CLS and SEP are not there."""
    d, rows = r.width, views * (1 + s.patches) + tokens - 2
    attention = 2 * rows * 3 * d**2 + 2 * 2 * rows**2 * d
    rest = 2 * rows * (2 * d**2 + 2 * 2 * 4 * d**2)
    both_losses = 2 * 2 * d
    return 2 * 2 * rows * s.width * d + 3 * (attention + rest + both_losses)


# Counting


class Uncomputed(TorchDispatchMode):
    """Products give zeros: counting needs their shapes alone, and the published size takes seconds instead of
    minutes."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._overloadpacket not in flop_registry:
            return func(*args, **kwargs or {})
        shapes = tree_map_only(Tensor, lambda x: torch.empty(x.shape, dtype=x.dtype, device="meta"), (args, kwargs))
        out = func(*shapes[0], **shapes[1] or {})
        return tree_map_only(Tensor, lambda x: torch.zeros_like(x, device="cpu"), out)


def counted(name: str, size: str, towers: tuple[str, str]) -> Counts:
    """All that is counted of a configuration."""
    method = method_of(name, size)
    count = _count_adaptor if method.recipe.fusion else _count_model
    with Uncomputed(), backend.use("reference"):
        return count(towers, method)


def flops(model: ClinVLA) -> Counts:
    """Of studies seen whole, masked, and trained on."""
    found = {}
    for views, tokens in STUDIES:
        study = f"views {views}, tokens {tokens}"
        found[f"forward, {study}"] = forward_flops(model, views, tokens)
        found[f"masked forward, {study}"] = forward_flops(model, views, tokens, masked=True)
        found[f"step, {study}"] = step_flops(model, views, tokens)
    return found


def _count_model(towers: tuple[str, str], method: Method) -> Counts:
    model, lengths = ClinVLA(*towers, method.recipe), torch.tensor(LENGTHS)
    studies, side = len(lengths), model.training_size
    batch = StudyBatch(
        images=torch.zeros(studies, VIEWS, side, side, dtype=torch.uint8),
        present=torch.ones(studies, VIEWS, dtype=torch.bool),
        tokens=torch.full((int(lengths.sum()),), 5),
        lengths=lengths,
    )
    saved = _saved(Align(model, method.optimization, 0, print), batch)
    return _named(parameters(model)) | flops(model) | saved


def _count_adaptor(towers: tuple[str, str], method: Method) -> Counts:
    image, text = load_image_encoder(towers[0]), load_text_encoder(towers[1])
    width = method.recipe.width
    adaptor = Adaptor(image.width, text.width, width=width, heads=max(1, width // 64), hidden=4 * width)

    def batch(views: int, lengths: tuple[int, ...]) -> FeatureBatch:
        words = torch.tensor(lengths) - 2  # neither CLS nor SEP
        shape = len(lengths), views * image.patches
        return FeatureBatch(
            image=torch.zeros(*shape, image.width),
            image_mask=torch.ones(shape, dtype=torch.bool),
            text=torch.zeros(len(lengths), int(words.max()), text.width),
            text_mask=torch.arange(int(words.max())) < words[:, None],
        )

    found = {}
    for views, tokens in STUDIES:
        cost = adaptor_cost(adaptor, image, text, batch(views, (tokens,)), 1, 1)
        found[f"step, views {views}, tokens {tokens}"] = cost["flops_per_training_sample"]
    found[f"forward, views 2, tokens {text.max_tokens}"] = cost["flops_per_sample"]
    return _named(cost["params"]) | found | _saved(Fuse(adaptor, torch.float32, 0), batch(VIEWS, LENGTHS))


def _named(params: Counts) -> Counts:
    return {"parameters": params["total"], "trained parameters": params["trainable"]}


def _saved(stage: Stage, batch: Any) -> Counts:
    stage.train()
    return {SAVED: saved_bytes(lambda: stage.backward(stage, batch, 0, 1.0, ExitStack), stage)}


SAVED = "bytes saved for backward, four studies"


class _Operators(TorchDispatchMode):
    """Counts operators that may start a kernel: neither views nor what only allocates or looks at types."""

    without_kernel = frozenset(("_unsafe_view", "empty", "empty_like", "new_empty", "empty_strided", "promote_types"))

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != "prim" and not func.is_view and func._overloadpacket.__name__ not in self.without_kernel:
            self.count += 1
        return func(*args, **kwargs or {})


class _FusedAttention(TorchFunctionMode):
    """Attention as one operator, as it is on a GPU: where there is none PyTorch takes it apart."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is scaled_dot_product_attention:
            return args[0].clone()
        return func(*args, **kwargs or {})


def operators() -> Counts:
    """Of a forward pass of the published towers on a GPU that need not be there, two views and a report, from uint8
    pixels and words. Ours embed a quarter of the patches, or all of them as CUDA graphs do, and hold reports in a
    grid."""
    with torch.device("meta"):
        plain = plain_towers().eval()
        ours = {
            f"ours, {kind}, {str(dtype).removeprefix('torch.')}": our_towers(plain, dtype, kind == "with adapters")
            for kind, dtype in product(("frozen", "with adapters"), (torch.float32, torch.bfloat16))
        }
    found = {}
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"), torch.no_grad(), _FusedAttention():
        plain.to_empty(device="cuda")
        views, kept = torch.ones(1, VIEWS, dtype=torch.bool), torch.zeros(VIEWS, PATCHES // 4, dtype=torch.int64)
        words, lengths = torch.zeros(1, PADDED, dtype=torch.int64), torch.full((1,), PADDED)
        batch = Batch(torch.zeros(1, VIEWS, 224, 224, dtype=torch.uint8), views, words, lengths)
        with _Operators() as counter:
            plain_encoding(plain, batch)
        found["timm and transformers"] = counter.count
        for name, towers in ours.items():
            towers.to_empty(device="cuda")
            with _Operators() as counter, attention.use("sdpa"):
                towers["vision"](batch.images, views, kept)
                grid = Grid.of(lengths, PADDED, towers["text"].word_embeddings.weight.dtype)
                towers["text"](words.flatten(), grid)
            found[name] = counter.count
            with _Operators() as counter, attention.use("sdpa"):
                run_tower(towers["vision"], grid.masked.dtype, batch.images, None)
                run_tower(towers["text"], grid.masked.dtype, words.flatten(), grid)
            found[f"{name}, captured"] = counter.count
    return found


def compilations(name: str, data: Path, towers: tuple[str, str]) -> Counts:
    """Graph breaks, and recompilations over an epoch of training on a prepared data set and one pass of evaluation,
    after the warm-up of the main job; and how many lengths of a batch's reports there were. Graphs are captured as in
    the job and then run as they are: what Inductor would make of them is tests/modeling/test_model.py's."""
    method = method_of(name, "tiny")
    model = ClinVLA(*towers, method.recipe)
    sizes = {"max_tokens": model.max_tokens, "cache": "off"}
    training = StudyLoader(
        data, "train", model.tokenizer, image_size=model.training_size, batch_size=BATCH, train=True, **sizes
    )
    held_out = StudyLoader(
        data, "train", model.tokenizer, image_size=model.vision.image_size, batch_size=BATCH, **sizes
    )
    stage = Align(model, method.optimization, 0, print)
    torch._dynamo.reset()
    counters.clear()
    compile_tower_blocks(model.vision, model.text)
    with torch.compiler.set_stance("default", force_backend="aot_eager"):
        warm_up(stage, next(iter(training)))
        warm = counters["stats"]["unique_graphs"]
        stage.train()
        lengths = set()
        for seed, batch in enumerate(training):
            lengths.add(len(batch.tokens))
            stage.backward(stage, batch, seed, 1.0, ExitStack)
        stage.eval()
        with torch.inference_mode():
            for batch in held_out:
                model(batch)
    compiled = counters["stats"]["unique_graphs"]
    torch._dynamo.reset()
    return {
        "graphs": warm,
        "graph breaks": sum(counters["graph_break"].values()),
        "recompilations": compiled - warm,
        "lengths": len(lengths),
    }


def table() -> dict[str, Any]:
    """All that is committed."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for size in PRESETS:
            towers = save_towers(size, Path(folder) / size)
            for name in METHODS:
                print(f"{name}, {size}", flush=True)
                found[f"{name}, {size}"] = counted(name, size, towers)
    return {"versions": versions(PACKAGES), "configurations": found, "operators": operators()}


if __name__ == "__main__":
    TABLE.write_text(json.dumps(table(), indent=1) + "\n")
