"""What every method minimises, trains and saves.

Losses are held to a transcription of the formulas: loops in float64 over studies, views, pairs, patches and words, which
share no code with the package's losses. Weights and temperatures are the papers', written out here. The blocks of the
towers have tests of their own, so their outputs are taken from them, a study at a time.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from clinvla_fast import ClinVLA, Recipe, ops
from clinvla_fast.data.features import FeatureBatch
from clinvla_fast.methods import METHODS
from clinvla_fast.modeling.adaptor import Adaptor
from clinvla_fast.modeling.masked_modeling import draw_masked_words
from clinvla_fast.modeling.packing import Packing
from clinvla_fast.modeling.towers import load_text, load_vision
from clinvla_fast.presets import PRESETS
from clinvla_fast.pretraining import Align, Fuse
from clinvla_fast.recipe import Optimization

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
        ends = np.cumsum([0, *LENGTHS])
        self.reports = [batch.tokens[a:b] for a, b in zip(ends[:-1], ends[1:], strict=True)]
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
        formula, losses = self.formula, {}
        if formula.to_report:
            losses["global"], losses["local"] = self._cosine() if formula.cosine else self._contrastive()
        if not formula.local:
            losses.pop("local", None)
        if formula.image:
            losses["image"] = self._image()
        if formula.word:
            losses["word"] = self._word()
        losses["loss"] = sum(losses[name] * weight for name, weight in self._weights().items() if name in losses)
        return losses

    def _weights(self) -> dict[str, float]:
        formula = self.formula
        return {"global": 1.0, "local": 1.0, "image": formula.image, "word": formula.word}

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

    def _contrastive(self) -> tuple[Tensor, Tensor]:
        scale, tau1, tau2, tau3 = self._scales()
        formula, pairs = self.formula, self._pairs()
        both = [self._both(i) for i in pairs]
        to_report, to_image = _towards([[scale * _cos(image, text) for _, text in both] for image, _ in both])
        whole = formula.to_report * to_report + formula.to_image * to_image
        if not formula.local:
            return whole, whole
        parts, logits = [self._parts(i) for i in pairs], []
        for patches, _ in parts:
            logits.append([])
            for _, words in parts:
                contexts = _contexts(patches, words, tau1)
                matches = [(tau2 * _cos(w, c)).exp() for w, c in zip(words, contexts, strict=True)]
                logits[-1].append(tau3 * sum(matches).log())
        return whole, formula.local * sum(_towards(logits))

    def _cosine(self) -> tuple[Tensor, Tensor]:
        """As ClinVLA prints it: 1 - cos of matched pairs; of words and contexts, first the mean of a study."""
        pairs, (_, tau1, _, _) = self._pairs(), self._scales()
        whole = sum(1 - _cos(*self._both(i)) for i in pairs) / len(pairs)
        local = 0.0
        for patches, words in map(self._parts, pairs):
            contexts = _contexts(patches, words, tau1)
            local = local + sum(1 - _cos(w, c) for w, c in zip(words, contexts, strict=True)) / len(words) / len(pairs)
        return whole, 2 * self.formula.local * local

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
    "convirt": ("convirt", {}, Formula((0,), 64, 0.75, 0.25, 0.0, scales=(10.0,) * 4)),
}
SCALES = {"clinvla-reconstructing": [130.0, 4.2, 5.5, 1.7]}  # the first beyond its cap


@pytest.fixture(params=CASES)
def case(request, make_model, make_batch):
    """A model in float64, a batch, and what it minimises."""
    method, changes, formula = CASES[request.param]
    model = make_model(small(method, **changes)).double()
    if model.objective.log_scales.requires_grad:
        with torch.no_grad():
            model.objective.log_scales.copy_(torch.tensor(SCALES.get(request.param, [6.0, 4.2, 5.5, 1.7])).log())
    return model, batch_of(make_batch, model), formula


def _weighted(found: dict[str, Tensor], model: ClinVLA) -> dict[str, Tensor]:
    """Each loss of the alignment with its weight, which the formulas have in them."""
    weights = {"global": model.recipe.global_weight, "local": model.recipe.local_weight}
    return {name: loss.detach() * weights.get(name, 1.0) for name, loss in found.items()}


def test_losses_and_gradients_against_the_formulas(case):
    model, batch, formula = case
    found = _weighted(step(model, batch), model)
    expected = formula.losses(model, batch)
    assert found.keys() == expected.keys()
    for name, loss in expected.items():
        assert loss.item() > 1e-3 and found[name].item() == pytest.approx(loss.item(), rel=1e-10), name
    trained = model.trainable()
    gradients = torch.autograd.grad(expected["loss"], trained.values(), allow_unused=True)
    largest = max(g.abs().max() for g in gradients if g is not None)
    for (name, p), gradient in zip(trained.items(), gradients, strict=True):
        gradient = torch.zeros_like(p) if gradient is None else gradient
        torch.testing.assert_close(p.grad, gradient, rtol=1e-8, atol=1e-10 * largest.item(), msg=name)
