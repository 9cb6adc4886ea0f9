"""What is minimised, and the alarm that says when it is minimised the wrong way."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, normalize

from . import ops
from .distributed import Rows, largest, ranks, summed
from .kernels.contrastive import symmetric_cross_entropy
from .recipe import Recipe
from .study import Embeddings

_LARGEST_SCALE = 100.0


class Alignment(nn.Module):
    """L = global_weight * L_global + local_weight * L_local (ClinVLA, section 3.4), in one of two forms.

    contrastive: symmetric InfoNCE on the global embeddings; symmetric cross-entropy of the local alignment logits.
        One learnable scale for the former, three for the latter; the recipe says where they start, 100 is their cap.
    cosine: the formulas as printed, 1 - cos of matched pairs, over studies and over the words of a study. They have
        no negatives: a constant embedding minimises them, so watch `collapse`.

    Over several ranks, each holds some rows of the batch and scores these against all, its images against everyone's
    reports: no pair is scored twice. The mean of the ranks' losses, and of their gradients, is that of one process.
    """

    def __init__(self, recipe: Recipe):
        super().__init__()
        self.recipe = recipe
        scales = torch.tensor(recipe.scales).log()
        learned = recipe.learn_scales and (recipe.global_weight or recipe.local_weight)
        self.log_scales = nn.Parameter(scales, requires_grad=bool(learned))

    def scales(self) -> Tensor:
        """The global scale, tau1, tau2 and tau3: [4]."""
        return self.log_scales.exp().clamp(max=_LARGEST_SCALE)

    def forward(self, embeddings: Embeddings) -> dict[str, Tensor]:
        """The losses of the studies that have both a view and a word: scalars `loss`, and `global` and `local` where
        the recipe weighs them.

        Without any such study all are zero.
        """
        e, weights = embeddings.paired(), {"global": self.recipe.global_weight, "local": self.recipe.local_weight}
        rows = Rows(len(e.image_global))
        zero = sum(x.sum() * 0 for x in (e.image_global, e.image_local, e.text_global, e.text_local, self.log_scales))
        losses = {name: zero for name, weight in weights.items() if weight}
        if rows.total:
            form = self if self.recipe.objective == "contrastive" else _Cosine(self)
            losses = {name: zero + getattr(form, f"{name}_loss")(e, rows) for name in losses}
        return {"loss": sum((weights[name] * loss for name, loss in losses.items()), zero), **losses}

    def global_loss(self, e: Embeddings, rows: Rows) -> Tensor:
        return global_contrastive(e.image_global, e.text_global, self.scales()[0], rows, self.recipe.image_share)

    def local_loss(self, e: Embeddings, rows: Rows) -> Tensor:
        _, *taus = self.scales()
        texts, masks = rows.everyone(e.text_local), rows.everyone(e.text_mask.byte()).bool()
        logits = ops.local_alignment(e.image_local, e.image_mask, texts, masks, *taus)
        if ranks() == 1:
            return symmetric_cross_entropy(logits)
        matched = logits.diagonal(rows.offset)
        by_image = logits.logsumexp(1) - matched
        # A report's images are on all ranks. The gradient of its log-sum-exp needs its value alone.
        highest = largest(logits.detach().amax(0) if rows.own else logits.new_full((rows.total,), -torch.inf))
        by_report = highest + summed((logits.detach() - highest).exp().sum(0)).log()
        share = (logits.detach() - by_report).exp()
        by_report = (share * (logits - logits.detach())).sum() + by_report[rows.offset :][: rows.own].sum()
        return ranks() / (2 * rows.total) * (by_image.sum() + by_report - matched.sum())


def global_contrastive(image: Tensor, text: Tensor, scale: Tensor, rows: Rows, image_share: float = 0.5) -> Tensor:
    """InfoNCE of this rank's pairs, image and text [own, D], against everyone's; the mean over ranks is the loss.

    Args:
        image_share: weight of images looking for texts; the rest is of texts looking for images.
    """
    if ranks() == 1 and image_share == 0.5:
        return ops.contrastive(image, text, scale)
    parts = []
    for weight, own, others in ((image_share, image, text), (1 - image_share, text, image)):
        others = rows.everyone(others)  # of every rank, even of one without rows
        if rows.own:
            parts.append(weight * ops.contrastive(own, others, scale, offset=rows.offset, symmetric=False))
        else:  # nothing to lose, but others' backward passes wait for this one
            parts.append(others.sum() * 0)
    return rows.weight * sum(parts)


class _Cosine:
    """The formulas as printed: see `Alignment`."""

    def __init__(self, alignment: Alignment):
        self.tau1 = alignment.scales()[1]

    def global_loss(self, e: Embeddings, rows: Rows) -> Tensor:
        return rows.weight * _mean(1 - cosine_similarity(e.image_global, e.text_global, dim=-1))

    def local_loss(self, e: Embeddings, rows: Rows) -> Tensor:
        contexts = ops.word_contexts(e.image_local, e.image_mask, e.text_local, e.text_mask, self.tau1)
        words = 1 - cosine_similarity(e.text_local, contexts, dim=-1)
        return rows.weight * _mean(words.masked_fill(~e.text_mask, 0).sum(1) / e.text_mask.sum(1))


def _mean(x: Tensor) -> Tensor:
    """Zero for nothing."""
    return x.sum() / max(1, len(x))


@dataclass(frozen=True)
class Collapse:
    """How much room a set of embeddings uses.

    variance: of the normalised embeddings about their mean, summed over dimensions: 1 is spread out, 0 is one point.
    rank: effective rank, exp of the entropy of the singular values' shares (Roy and Vetterli 2007): 1 to D.
    """

    variance: float
    rank: float

    @property
    def alarming(self) -> bool:
        """True where all studies look alike or lie on a line: the thresholds are far below any useful model's."""
        return self.variance < 0.05 or self.rank < 2.0


def collapse(embeddings: Tensor) -> Collapse:
    """Measure embeddings [n, D], n >= 2.

    Raises:
        ValueError: for fewer than two embeddings: one has no spread.
    """
    if len(embeddings) < 2:
        raise ValueError(f"collapse needs at least 2 embeddings to compare, got {tuple(embeddings.shape)}.")
    points = normalize(embeddings.detach().double(), dim=-1)
    centred = points - points.mean(0)
    shares = torch.linalg.svdvals(centred)
    shares = shares / shares.sum().clamp(min=1e-12)
    entropy = -(shares * shares.clamp(min=1e-12).log()).sum()
    return Collapse(variance=centred.square().sum(1).mean().item(), rank=entropy.exp().item())
