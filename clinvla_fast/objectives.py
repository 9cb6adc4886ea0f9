"""What is minimised, and the alarm that says when it is minimised the wrong way."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, normalize

from . import ops
from .kernels.contrastive import symmetric_cross_entropy
from .recipe import Recipe
from .study import Embeddings

_LARGEST_SCALE = 100.0


class Alignment(nn.Module):
    """L = L_global + local_weight * L_local (ClinVLA, section 3.4), in one of two forms.

    contrastive: symmetric InfoNCE on the global embeddings; symmetric cross-entropy of the local alignment logits.
        One learnable scale for the former, three for the latter; the recipe says where they start, 100 is their cap.
    cosine: the formulas as printed, 1 - cos of matched pairs, over studies and over the words of a study. They have
        no negatives: a constant embedding minimises them, so watch `collapse`.
    """

    def __init__(self, recipe: Recipe):
        super().__init__()
        self.form, self.local_weight = recipe.objective, recipe.local_weight
        self.log_scales = nn.Parameter(torch.tensor(recipe.scales).log())

    def scales(self) -> Tensor:
        """The global scale, tau1, tau2 and tau3: [4]."""
        return self.log_scales.exp().clamp(max=_LARGEST_SCALE)

    def forward(self, embeddings: Embeddings) -> dict[str, Tensor]:
        """The losses of the studies that have both a view and a word: scalars `loss`, `global` and `local`.

        Without any such study all three are zero.
        """
        e = embeddings.paired()
        if not len(e.image_global):
            zero = (
                sum(x.sum() for x in (e.image_global, e.image_local, e.text_global, e.text_local, self.log_scales)) * 0
            )
            return {"loss": zero, "global": zero, "local": zero}
        losses = self.contrastive(e) if self.form == "contrastive" else self.cosine(e)
        return {"loss": losses[0] + self.local_weight * losses[1], "global": losses[0], "local": losses[1]}

    def contrastive(self, e: Embeddings) -> tuple[Tensor, Tensor]:
        scale, *taus = self.scales()
        logits = ops.local_alignment(e.image_local, e.image_mask, e.text_local, e.text_mask, *taus)
        return ops.contrastive(e.image_global, e.text_global, scale), symmetric_cross_entropy(logits)

    def cosine(self, e: Embeddings) -> tuple[Tensor, Tensor]:
        tau1 = self.scales()[1]
        contexts = ops.word_contexts(e.image_local, e.image_mask, e.text_local, e.text_mask, tau1)
        words = 1 - cosine_similarity(e.text_local, contexts, dim=-1)
        words = words.masked_fill(~e.text_mask, 0).sum(1) / e.text_mask.sum(1)
        return (1 - cosine_similarity(e.image_global, e.text_global, dim=-1)).mean(), words.mean()


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
