"""What every method minimises, trains and saves.

Losses are held to a transcription of the formulas: loops in float64 over studies, views, pairs, patches and words that
share no code with the package's losses. Weights and fixed temperatures are the papers', written out here. The towers'
blocks have tests of their own, so what towers give is taken from them, a view or a report at a time.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from clinvla_fast import ClinVLA, DataError, Recipe, StudyBatch, ops
from clinvla_fast.data.features import FeatureBatch
from clinvla_fast.methods import METHODS
from clinvla_fast.modeling.adaptor import Adaptor
from clinvla_fast.modeling.masked_modeling import draw_masked_words
from clinvla_fast.modeling.packing import Packing
from clinvla_fast.modeling.towers import load_text, load_vision
from clinvla_fast.presets import PRESETS
from clinvla_fast.pretraining import Align, Fuse
from clinvla_fast.recipe import Method, Optimization

MODELS = [name for name, method in METHODS.items() if not method.recipe.fusion]
# The second has no view, the third no word, the fourth no frontal view; one has every view, two a prior one.
PRESENT = [[1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 1], [0, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0], [1, 0, 1, 0]]
LENGTHS = [9, 7, 2, 12, 5, 3, 8]
SEED, ROW = 11, 3  # the batch is a part of one, three studies into it
GRID = 8  # patches a side of the tiny tower's 128 pixels


def small(method: str, **changes) -> Recipe:
    """A method's recipe at the tiny preset's size, and smaller."""
    return replace(PRESETS["tiny"].fit(method, METHODS[method]).recipe, **{"width": 16, "bottleneck": 8} | changes)


@pytest.fixture
def make_model(tiny_towers, shake):
    """A model with random weights in all that is trained."""

    def make(recipe: Recipe, dtype: torch.dtype | None = None) -> ClinVLA:
        torch.manual_seed(1)
        model = ClinVLA(**tiny_towers, recipe=recipe, dtype=dtype)
        shake(model)
        return model

    return make


def batch_of(make_batch, model: ClinVLA):
    return replace(make_batch(PRESENT, LENGTHS, size=model.training_size), row=ROW)


def step(model: ClinVLA, batch, chunk: int | None = None) -> dict[str, Tensor]:
    """The losses of a step, whose gradients are then the parameters'."""
    model.train().zero_grad(set_to_none=True)
    stage = Align(model, Optimization(chunk=chunk), 0, print)
    return stage.backward(stage, batch, SEED, 1.0, nullcontext)


# The formulas


@dataclass(frozen=True)
class Formula:
    """What a method minimises, as printed: not as its recipe has it."""

    slots: tuple[int, ...] = (0, 1, 2, 3)  # views that are seen
    keep: int = 16  # patches of 64
    to_report: float = 0.5  # weights of the global loss: of images looking for reports,
    to_image: float = 0.5  # and of reports looking for images
    local: float = 0.8 / 2  # of each direction
    cosine: bool = False
    scales: tuple[float, ...] | None = None  # where they are fixed
    image: float = 0.0
    word: float = 0.0
    words_see: str = "nothing"
    masked: float = 0.5  # share of words
    missing: bool = False  # tokens in place of missing views

    def losses(self, model: ClinVLA, batch) -> dict[str, Tensor]:
        return _Transcription(self, model, batch).losses()


def _linear(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def _gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def _norm(x: Tensor, weight: Tensor | float = 1.0, bias: Tensor | float = 0.0) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


def _head(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    inner = _norm(_gelu(_linear(w, f"{name}.0", x)), w[f"{name}.2.weight"], w[f"{name}.2.bias"])
    return _linear(w, f"{name}.3", inner)


def _undone(w: dict[str, Tensor], tower: str, out: Tensor) -> Tensor:
    """The inverse of a tower's invertible adapter, if it has one: e2 = o2 - G(o1), e1 = o1 - F(e2)."""
    if f"{tower}.invertible.f.up.weight" not in w:
        return out

    def bottleneck(which: str, x: Tensor) -> Tensor:
        inner = _linear(w, f"{tower}.invertible.{which}.down", x)
        return _linear(w, f"{tower}.invertible.{which}.up", inner * (inner > 0))

    o1, o2 = out[..., : out.shape[-1] // 2], out[..., out.shape[-1] // 2 :]
    e2 = o2 - bottleneck("g", o1)
    return torch.cat([o1 - bottleneck("f", e2), e2], -1)


def _cos(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y) / ((x @ x) * (y @ y)).sqrt()


def _towards(logits: list[list[Tensor]]) -> tuple[Tensor, Tensor]:
    """Mean cross-entropies of each row's own column, and of each column's own row."""
    n, rows, columns = len(logits), 0.0, 0.0
    for i in range(n):
        rows = rows - (logits[i][i].exp() / sum(logits[i][j].exp() for j in range(n))).log() / n
        columns = columns - (logits[i][i].exp() / sum(logits[j][i].exp() for j in range(n))).log() / n
    return rows, columns


def _contexts(patches: Tensor, words: Tensor, tau1: Tensor) -> list[Tensor]:
    """What an image shows of each word: softmax over words, times tau1, softmax over patches, their weighted sum."""
    over_words = []
    for patch in patches:
        scores = torch.stack([(patch @ word).exp() for word in words])
        over_words.append(scores / scores.sum())
    contexts = []
    for t in range(len(words)):
        weights = torch.stack([(tau1 * shares[t]).exp() for shares in over_words])
        contexts.append(sum(a * c for a, c in zip(weights / weights.sum(), patches, strict=True)))
    return contexts


class _Transcription:
    """A batch, study by study, in the words of a formula."""

    def __init__(self, formula: Formula, model: ClinVLA, batch):
        self.formula, self.model, self.batch, self.w = formula, model, batch, dict(model.named_parameters())
        self.reports = batch.tokens.split(LENGTHS)
        self.views = [self._views(i) for i in range(len(PRESENT))]
        self.hidden = [model.text(report, Packing.of(torch.tensor([len(report)]), "cpu")) for report in self.reports]

    def _views(self, i: int) -> dict[int, tuple[Tensor, Tensor]]:
        """Of each view slot that is seen: its tokens, CLS first, and the patches that are kept."""
        slots = [slot for slot in self.formula.slots if PRESENT[i][slot]]
        found = {}
        for slot in slots:
            alone = torch.zeros(ROW + len(PRESENT), 4, dtype=torch.bool)
            alone[ROW + i, slot] = True
            kept = torch.arange(GRID**2)[None]
            if self.formula.keep < GRID**2:
                kept = ops.draw_kept_patches(alone, GRID**2, self.formula.keep, SEED)[0]
            film = self.batch.images[i : i + 1].numpy()
            if film.shape[-1] > 128:  # twice as fine as the tower sees it
                fine = film.astype(np.float64)
                film = sum(fine[..., y::2, x::2] for y in (0, 1) for x in (0, 1)) / 4
                film = np.rint(film).astype(np.uint8)
            tokens = self.model.vision(torch.from_numpy(film), alone[ROW + i : ROW + i + 1], kept)
            found[slot] = tokens[0], kept[0]
        return found

    def losses(self) -> dict[str, Tensor]:
        """Each with its weight but those of reconstruction, which `loss` has too."""
        formula, losses = self.formula, {}
        if formula.to_report:
            losses["global"] = self._cosine_global() if formula.cosine else self._global()
        if formula.local:
            losses["local"] = self._cosine_local() if formula.cosine else self._local()
        whole = sum(losses.values())
        if formula.image:
            losses["image"] = self._image()
            whole = whole + formula.image * losses["image"]
        if formula.word:
            losses["word"] = self._word()
            whole = whole + formula.word * losses["word"]
        return losses | {"loss": whole}

    # Alignment

    def _pairs(self) -> list[int]:
        return [i for i in range(len(PRESENT)) if self.views[i] and LENGTHS[i] > 2]

    def _mean_cls(self, i: int) -> Tensor:
        """Of present views, and of learned tokens for missing ones where the method has them."""
        found = [tokens[0] for tokens, _ in self.views[i].values()]
        if self.formula.missing:
            found += [self.w["missing"][slot] for slot in range(4) if slot not in self.views[i]]
        return sum(found) / len(found) if found else torch.zeros(128, dtype=torch.float64)

    def _mean_patch(self, i: int) -> Tensor:
        found = [tokens[1:].sum(0) / (len(tokens) - 1) for tokens, _ in self.views[i].values()]
        return sum(found) / len(found) if found else torch.zeros(128, dtype=torch.float64)

    def _both(self, i: int) -> tuple[Tensor, Tensor]:
        """Global embeddings of a study's image and report."""
        return _head(self.w, "image_global", self._mean_cls(i)), _head(self.w, "text_global", self.hidden[i][0])

    def _parts(self, i: int) -> tuple[Tensor, Tensor]:
        """Local embeddings: all patches of all views; all words but CLS and SEP."""
        patches = torch.cat([tokens[1:] for tokens, _ in self.views[i].values()])
        return _head(self.w, "image_local", patches), _head(self.w, "text_local", self.hidden[i][1:-1])

    def _scales(self) -> list:
        if self.formula.scales:
            return list(self.formula.scales)
        return [scale.exp() if scale.exp() < 100 else torch.tensor(100.0) for scale in self.w["objective.log_scales"]]

    def _global(self) -> Tensor:
        """InfoNCE of both directions."""
        scale, both = self._scales()[0], [self._both(i) for i in self._pairs()]
        to_report, to_image = _towards([[scale * _cos(image, text) for _, text in both] for image, _ in both])
        return self.formula.to_report * to_report + self.formula.to_image * to_image

    def _local(self) -> Tensor:
        """Cross-entropies of both directions, of tau3 log sum_t exp(tau2 cos(word t, its context))."""
        (_, tau1, tau2, tau3), parts = self._scales(), [self._parts(i) for i in self._pairs()]
        logits = []
        for patches, _ in parts:
            logits.append([])
            for _, words in parts:
                contexts = _contexts(patches, words, tau1)
                matches = [(tau2 * _cos(w, c)).exp() for w, c in zip(words, contexts, strict=True)]
                logits[-1].append(tau3 * sum(matches).log())
        return self.formula.local * sum(_towards(logits))

    def _cosine_global(self) -> Tensor:
        """As ClinVLA prints it: 1 - cos of matched pairs."""
        pairs = self._pairs()
        return sum(1 - _cos(*self._both(i)) for i in pairs) / len(pairs)

    def _cosine_local(self) -> Tensor:
        """As ClinVLA prints it: 1 - cos of words and their contexts, the mean of a study's, the mean over studies."""
        pairs, tau1, total = self._pairs(), self._scales()[1], 0.0
        for patches, words in map(self._parts, pairs):
            contexts = _contexts(patches, words, tau1)
            total = total + sum(1 - _cos(w, c) for w, c in zip(words, contexts, strict=True)) / len(words)
        return 2 * self.formula.local * total / len(pairs)

    # Reconstruction

    def _image(self) -> Tensor:
        """Mean over masked patches of current frontal views, of the squared error of normalised pixels."""
        errors = []
        for i, views in enumerate(self.views):
            if 0 not in views:
                continue
            tokens, kept = views[0]
            x = _linear(self.w, "decoder.embed", _undone(self.w, "vision", tokens))
            grid = []
            for patch in range(GRID**2):
                place = kept.tolist().index(patch) if patch in kept else None
                content = self.w["decoder.mask_token"] + x[0] if place is None else x[1 + place]
                grid.append(content + self.w["decoder.position"][patch])
            out = self.model.decoder.blocks(torch.stack(grid)[None])[0]
            out = _norm(out, self.w["decoder.norm.weight"], self.w["decoder.norm.bias"])
            predicted = _linear(self.w, "decoder.predict", out)
            film = self.batch.images[i, 0].numpy().astype(np.float64)
            side = len(film) // GRID
            for patch in range(GRID**2):
                if patch not in kept:
                    top, left = patch // GRID * side, patch % GRID * side
                    pixels = film[top : top + side, left : left + side].flatten()
                    pixels = (pixels - pixels.mean()) / np.sqrt(pixels.var(ddof=1) + 100)
                    errors.append((predicted[patch] - torch.from_numpy(pixels)).square().mean())
        return sum(errors) / len(errors)

    def _word(self) -> Tensor:
        """Mean over masked words of all reports, of minus the logarithm of the right word's probability."""
        vocabulary, errors = self.model.text.word_embeddings.weight, []
        for i, report in enumerate(self.reports):
            masked = draw_masked_words(torch.tensor([len(report)]), self.formula.masked, SEED, ROW + i)
            seen, added = report.clone(), None
            seen[masked] = self.model.tokenizer.mask_token_id
            if self.formula.words_see != "nothing":
                mean = self._mean_cls(i) if self.formula.words_see == "cls" else self._mean_patch(i)
                added = _linear(self.w, "image_to_words", mean)[None]
            hidden = self.model.text(seen, Packing.of(torch.tensor([len(report)]), "cpu"), added)
            for word in masked.tolist():
                x = _gelu(_linear(self.w, "word_head.transform.0", _undone(self.w, "text", hidden[word])))
                x = _norm(x, self.w["word_head.transform.2.weight"], self.w["word_head.transform.2.bias"])
                logits = vocabulary @ x + self.w["word_head.bias"]
                errors.append(-(logits[report[word]].exp() / logits.exp().sum()).log())
        return sum(errors) / len(errors)


FINE = {"target_scale": 2}
BOTH = {"image_weight": 0.7, "word_weight": 0.3}
ALTA = Formula(local=1 / 2, image=1.0, word=1.0, words_see="cls", missing=True)
MRM = Formula((0,), to_report=0.0, to_image=0.0, local=0.0, image=1.0, word=1.0, words_see="patches")
CASES = {
    "clinvla": ("clinvla", {}, Formula()),
    "clinvla-cosine": ("clinvla", {"objective": "cosine"}, Formula(cosine=True)),
    "clinvla-reconstructing": ("clinvla", BOTH, Formula(image=0.7, word=0.3)),
    "clinvla-fine": (
        "clinvla",
        {"objective": "cosine", "image_in_words": "patches", "masked_words": 0.2} | BOTH | FINE,
        Formula(cosine=True, image=0.7, word=0.3, words_see="patches", masked=0.2),
    ),
    "alta": ("alta", {}, ALTA),
    "alta-fine": ("alta", FINE, ALTA),
    "mrm": ("mrm", {}, MRM),
    "mrm-fine": ("mrm", FINE, MRM),
    "gloria": ("gloria", {}, Formula((0,), 64, 1.0, 1.0, 1.0, scales=(10.0, 4.0, 5.0, 10.0))),
    "convirt": ("convirt", {}, Formula((0,), 64, 0.75, 0.25, 0.0, scales=(10.0, 4.0, 5.0, 10.0))),
}
SCALES = {"clinvla-reconstructing": [130.0, 4.2, 5.5, 1.7]}  # the first beyond its cap


@pytest.fixture(params=CASES)
def case(request, make_model, make_batch):
    """A model in float64, a batch, and what it minimises."""
    method, changes, formula = CASES[request.param]
    model = make_model(small(method, **changes)).double()
    scales = torch.tensor(formula.scales or SCALES.get(request.param, [6.0, 4.2, 5.5, 1.7]), dtype=torch.float64)
    if formula.scales:  # up to what float32 has made of their logarithms
        torch.testing.assert_close(model.objective.scales(), scales, rtol=1e-6, atol=0)
    model.objective.log_scales.data.copy_(scales.log())
    return model, batch_of(make_batch, model), formula


def _weighted(found: dict[str, Tensor], model: ClinVLA) -> dict[str, Tensor]:
    """The losses between embeddings with their weights, which the formulas have in them."""
    weights = {"global": model.recipe.global_weight, "local": model.recipe.local_weight}
    return {name: loss.detach() * weights.get(name, 1.0) for name, loss in found.items()}


def test_losses_and_gradients_against_the_formulas(case):
    model, batch, formula = case
    expected, trained = formula.losses(model, batch), model.trainable()
    gradients = torch.autograd.grad(expected["loss"], trained.values(), allow_unused=True)
    largest = max(g.abs().max() for g in gradients if g is not None)
    for chunk in (None, 3):
        found = _weighted(step(model, batch, chunk), model)
        assert found.keys() == expected.keys()
        for name, loss in expected.items():
            assert loss.item() > 1e-3 and found[name].item() == pytest.approx(loss.item(), rel=1e-10), name
        for (name, p), gradient in zip(trained.items(), gradients, strict=True):
            gradient = torch.zeros_like(p) if gradient is None else gradient
            torch.testing.assert_close(p.grad, gradient, rtol=1e-9, atol=1e-11 * largest.item(), msg=name)


@pytest.mark.parametrize("case", ["clinvla", "clinvla-fine", "alta", "mrm"], indirect=True)
def test_gradients_against_finite_differences(case):
    """Along random directions in the space of all that is trained."""
    model, batch, _ = case
    step(model, batch)
    trained = list(model.trainable().values())
    gradients = [p.grad.clone() for p in trained]
    generator = torch.Generator().manual_seed(0)

    def moved(direction: list[Tensor], by: float) -> float:
        for p, d in zip(trained, direction, strict=True):
            p.data.add_(d, alpha=by)
        loss = step(model, batch)["loss"].item()
        for p, d in zip(trained, direction, strict=True):
            p.data.sub_(d, alpha=by)
        return loss

    for _ in range(3):
        direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in trained]
        slope = sum((g * d).sum().item() for g, d in zip(gradients, direction, strict=True))
        numeric = (moved(direction, 1e-7) - moved(direction, -1e-7)) / 2e-7
        assert abs(slope) > 1e-2 and numeric == pytest.approx(slope, rel=1e-6)


def test_an_adaptor_against_its_formula():
    """Cross-attention and a feed-forward network, post-norm, one block for both modalities; head by head."""
    torch.manual_seed(0)
    width, heads = 12, 3
    adaptor = Adaptor(6, 10, width=width, heads=heads, hidden=20).double()
    for p in adaptor.parameters():
        torch.nn.init.normal_(p, std=0.5)
    torch.nn.init.constant_(adaptor.log_scales, 2.0)
    w, counts = dict(adaptor.named_parameters()), {"image": [4, 7, 0, 1, 5], "text": [3, 1, 2, 0, 6]}
    tokens = {
        side: [torch.randn(n, size, dtype=torch.float64) for n in counts[side]]
        for side, size in (("image", 6), ("text", 10))
    }
    padded = {side: torch.nn.utils.rnn.pad_sequence(found, batch_first=True) for side, found in tokens.items()}
    masks = {f"{side}_mask": torch.arange(max(n)) < torch.tensor(n)[:, None] for side, n in counts.items()}

    def embedding(asking: Tensor, asked: Tensor) -> Tensor:
        (q, k, v), found = _linear(w, "qkv", torch.cat([asking, asked])).chunk(3, -1), []
        q, k, v = q[: len(asking)], k[len(asking) :], v[len(asking) :]
        for head in range(heads):
            at = slice(head * width // heads, (head + 1) * width // heads)
            scores = (q[:, at] @ k[:, at].T / math.sqrt(width / heads)).exp()
            found.append(scores / scores.sum(1, keepdim=True) @ v[:, at])
        x = _norm(asking + _linear(w, "out", torch.cat(found, 1)), w["norm1.weight"], w["norm1.bias"])
        x = x + _linear(w, "ffn.2", _gelu(_linear(w, "ffn.0", x)))
        return _norm(x, w["norm2.weight"], w["norm2.bias"]).sum(0) / len(asking)

    both = {"paired": [], "separate": []}
    for image, text in zip(tokens["image"], tokens["text"], strict=True):
        if len(image) and len(text):
            image, text = _linear(w, "image_in", _norm(image)), _linear(w, "text_in", _norm(text))
            both["paired"].append((embedding(image, text), embedding(text, image)))
            both["separate"].append((embedding(image, image), embedding(text, text)))
    expected = {}
    for name, scale in zip(both, w["log_scales"].exp(), strict=True):
        expected[name] = sum(_towards([[scale * _cos(i, t) for _, t in both[name]] for i, _ in both[name]])) / 2
    expected["loss"] = (expected["paired"] + expected["separate"]) / 2
    found = Fuse(adaptor, torch.float64, 0)(FeatureBatch(**padded, **masks), SEED)
    for name, loss in expected.items():
        assert found[name].item() == pytest.approx(loss.item(), rel=1e-10), name
    ours, plain = (torch.autograd.grad(x["loss"], list(w.values())) for x in (found, expected))
    for name, a, b in zip(w, ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, msg=name)


# What is trained


def _layers(prefix: str, *names: str) -> set[str]:
    return {f"{prefix}.{name}.{kind}" for name in names for kind in ("weight", "bias")}


def _adapters(*names: str) -> set[str]:
    """Of the blocks: three of the image tower, two of the report tower."""
    places = [f"vision.adapts.{i}" for i in range(3)] + [f"text.adapts.{i}" for i in range(2)]
    return {name for place in places for adapter in names for name in _layers(f"{place}.{adapter}", "down", "up")}


INVERTIBLE = {n for t in ("vision", "text") for fg in "fg" for n in _layers(f"{t}.invertible.{fg}", "down", "up")}
HEADS = {reach: _layers(f"image_{reach}", *"023") | _layers(f"text_{reach}", *"023") for reach in ("global", "local")}
SLOTS, SCALE = {"vision.view_embedding", "vision.time_embedding"}, {"objective.log_scales"}
NORMS = _layers("vision.vit", "norm", *(f"blocks.{i}.norm{n}" for i in range(3) for n in (1, 2)))
NORMS |= _layers("text.bert", "embeddings.LayerNorm")
for layer in ("encoder.layer.0", "encoder.layer.1"):
    NORMS |= _layers(f"text.bert.{layer}", "attention.output.LayerNorm", "output.LayerNorm")
WORD_HEAD = _layers("word_head.transform", "0", "2") | {"word_head.bias"}
ENDS = _layers("decoder", "embed", "predict") | {"decoder.mask_token", "decoder.position"}
DECODER = ENDS | _layers("decoder", "norm")
DECODER |= _layers("decoder.blocks.0", "norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
SEEN = {"image_to_words.weight", "image_to_words.bias"}
CLINVLA = INVERTIBLE | _adapters("language", "task") | SLOTS | HEADS["global"] | HEADS["local"] | SCALE
TOWERS = {"all of both towers"}
TRAINED = {
    "clinvla": CLINVLA,
    "clinvla --unfreeze": CLINVLA | TOWERS,
    "alta": _adapters("attention", "mlp")
    | (NORMS | {"vision.vit.cls_token", "missing"})
    | (SLOTS | HEADS["global"] | HEADS["local"] | SCALE | ENDS | WORD_HEAD | SEEN),
    "mrm": TOWERS | SLOTS | DECODER | WORD_HEAD | SEEN,
    "gloria": TOWERS | SLOTS | HEADS["global"] | HEADS["local"],
    "convirt": TOWERS | SLOTS | HEADS["global"],
}


def test_recipes_are_as_published():
    """One engine, six tables of numbers."""
    said = {
        "clinvla": {"bottleneck": 64, "keep": 0.25, "max_tokens": 128, "width": 128, "local_weight": 0.8}
        | {"batch_size": 32, "weight_decay": 1e-4, "language_lr": 5e-5, "task_lr": 1e-4, "epochs": 30, "warmup": 0.05}
        | {"scales": (1 / 0.07,) * 4, "learn_scales": True, "objective": "contrastive", "trained": ()},
        "alta": {"bottleneck": 768 // 4, "keep": 0.25, "masked_words": 0.5, "target_scale": 2, "decoder_blocks": 4}
        | {"batch_size": 96, "betas": (0.9, 0.95), "weight_decay": 0.05, "decay_vectors": False, "epochs": 30}
        | {"schedule_epochs": 100, "warmup": 10 / 100, "tower_lr": 1.5e-4 * 96 / 256, "task_lr": 1.5e-4 * 96 / 256}
        | {"scales": (1 / 0.07,) * 4, "learn_scales": True, "image_in_words": "cls", "missing_views": True}
        | {"train_decoder": False},
        "adaptor": {"fusion": True, "adapters": (), "trained": (), "keep": 1.0, "local_weight": 0.0},
        "mrm": {"scratch": True, "keep": 0.25, "masked_words": 0.5, "image_in_words": "patches", "global_weight": 0.0}
        | {"views": ("frontal",), "target_scale": 2, "local_weight": 0.0},
        "gloria": {"scales": (10.0, 4.0, 5.0, 10.0), "learn_scales": False, "views": ("frontal",), "keep": 1.0},
        "convirt": {"image_share": 0.75, "local_weight": 0.0, "views": ("frontal",), "keep": 1.0, "learn_scales": False}
        | {"scales": (1 / 0.1, 4.0, 5.0, 10.0)},
    }
    assert METHODS.keys() == said.keys()
    for name, numbers in said.items():
        assert type(METHODS[name]) is Method
        found = vars(METHODS[name].recipe) | vars(METHODS[name].optimization)
        assert {field: found[field] for field in numbers} == numbers, name


def recipe_of(name: str) -> Recipe:
    method, _, unfrozen = name.partition(" --")
    return small(method, trained=("towers",)) if unfrozen else small(method)


@pytest.mark.parametrize("name", TRAINED)
def test_what_is_trained(name, make_model, make_batch, tiny_towers):
    """Exactly that, and a step gives each of it a gradient and nothing else."""
    model, expected = make_model(recipe_of(name)), TRAINED[name] - TOWERS
    if TRAINED[name] & TOWERS:
        towers = {"vision.vit": load_vision(str(tiny_towers["vision"])).vit}
        towers["text.bert"] = load_text(str(tiny_towers["text"]))[0].bert
        expected = expected | {f"{at}.{n}" for at, tower in towers.items() for n, _ in tower.named_parameters()}
    assert set(model.trainable()) == expected
    before = {n: x.clone() for n, x in model.named_buffers()}
    step(model, batch_of(make_batch, model))
    for n, p in model.named_parameters():
        assert (p.grad is not None) == (n in expected), n
        assert p.grad is None or p.grad.any(), n
    assert all(x.grad is None and torch.equal(x, before[n]) for n, x in model.named_buffers())


@pytest.mark.parametrize("name", ["clinvla", "clinvla --unfreeze", "alta", "gloria", "mrm"])
def test_bfloat16_towers(name, make_model, make_batch):
    """What is frozen is stored in it; what is trained and its gradients are float32, near those of float32 towers."""
    gradients, losses = [], []
    for dtype in (None, torch.bfloat16):
        model = make_model(recipe_of(name), dtype)
        losses.append(step(model, batch_of(make_batch, model))["loss"].item())
        assert all(p.dtype == torch.float32 for p in model.parameters())
        assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.trainable().values())
        gradients.append(torch.cat([p.grad.flatten() for p in model.trainable().values()]))
    frozen = [x.dtype for n, x in model.named_buffers() if n.startswith(("vision.vit.", "text.bert."))]
    assert {x for x in frozen if x.is_floating_point} <= {torch.bfloat16} and losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    assert torch.cosine_similarity(*gradients, dim=0) > 0.99


# Files


@pytest.mark.parametrize("name", [*MODELS, "clinvla --unfreeze"])
def test_a_saved_model_embeds_the_same(name, make_model, make_batch, tmp_path):
    model = make_model(recipe_of(name))
    model.save_pretrained(tmp_path)
    again, batch = ClinVLA.from_pretrained(tmp_path), make_batch(PRESENT, LENGTHS)
    assert again.recipe == model.recipe and set(again.trainable()) == set(model.trainable())
    with torch.no_grad():
        ours, theirs = model(batch), again(batch)
    assert ours.image_global.any() and ours.text_global.any()
    for field, x in vars(ours).items():
        assert torch.equal(getattr(theirs, field), x), field
    found, expected = (step(m, batch_of(make_batch, m)) for m in (again, model))
    assert all(torch.equal(found[name], loss) for name, loss in expected.items())


def test_a_saved_adaptor_embeds_the_same(tmp_path):
    torch.manual_seed(0)
    adaptor, masks = Adaptor(6, 10, width=16, heads=2, hidden=20), torch.arange(5) < torch.tensor([[5], [2]])
    batch = FeatureBatch(torch.randn(2, 5, 6), masks, torch.randn(2, 5, 10), masks)
    adaptor.save(tmp_path)
    again = Adaptor.load(tmp_path)
    for way in ("separate", "paired"):
        assert all(map(torch.equal, getattr(again, way)(batch), getattr(adaptor, way)(batch)))


@pytest.mark.parametrize("method", [*MODELS])
def test_films_are_embedded_as_batches_are(tiny_towers, make_batch, shake, method):
    model = ClinVLA(**tiny_towers, recipe=small(method))
    shake(model)
    batch = make_batch([[1, 1, 0, 0]], [5])
    film = {"frontal": batch.images[0, 0].numpy(), "lateral": batch.images[0, 1].numpy()}
    expected = normalize(model(batch).image_global, dim=-1)
    torch.testing.assert_close(model.encode_images([film]), expected)
    two_slots = StudyBatch(batch.images[:, :2], batch.present[:, :2], batch.tokens, batch.lengths)
    torch.testing.assert_close(normalize(model(two_slots).image_global, dim=-1), expected)
    assert model.image_features(batch).shape == (1, model.vision.width)
    if "lateral" not in model.recipe.views:
        with pytest.raises(DataError, match="this model looks at frontal alone"):
            model.encode_images([{"lateral": film["lateral"]}])


def test_nothing_is_trained_below_the_lowest_adapters(tiny_towers):
    model = ClinVLA(**tiny_towers, recipe=small("alta", adapter_blocks=(1,)))
    below = ("vision.vit.blocks.0.", "vision.vit.cls_token", "text.bert.embeddings.", "text.bert.encoder.layer.0.")
    assert not [name for name in model.trainable() if name.startswith((*below, "vision.view_embedding"))]
    assert "vision.vit.blocks.1.norm1.weight" in model.trainable()
