"""The trainable modules inside the frozen towers."""

import torch
from torch import Tensor, nn

from .. import ops
from ..recipe import Recipe


class Bottleneck(nn.Module):
    """Down-projection, ReLU, up-projection. The up-projection starts at zero: a new adapter changes nothing.

    Algorithm 1 of ClinVLA initialises all four by He; that would break a pretrained tower at the first step.
    """

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.down = nn.Linear(width, inner)
        self.up = nn.Linear(inner, width)
        nn.init.kaiming_normal_(self.down.weight, nonlinearity="relu")
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def parts(self, dtype: torch.dtype) -> ops.Bottleneck:
        """The weights in the dtype that the tower computes in; those that are trained stay as they are."""
        weights = (self.down.weight, self.down.bias, self.up.weight, self.up.bias)
        return ops.Bottleneck(*(w.to(dtype) for w in weights))


class InvertibleAdapter(nn.Module):
    """ClinVLA's invertible adapter on embeddings [..., width] (Algorithm 1).

    Raises:
        ValueError: if the width is not divisible by 4.
    """

    def __init__(self, width: int):
        super().__init__()
        if width % 4:
            raise ValueError(f"an invertible adapter halves its width twice: {width} is not divisible by 4.")
        self.f = Bottleneck(width // 2, width // 4)
        self.g = Bottleneck(width // 2, width // 4)

    def forward(self, x: Tensor) -> Tensor:
        return ops.invertible_adapter(x, self.f.parts(x.dtype), self.g.parts(x.dtype))

    def inverse(self, x: Tensor) -> Tensor:
        return ops.invertible_adapter(x, self.f.parts(x.dtype), self.g.parts(x.dtype), inverse=True)


class TransformerAdapt(nn.Module):
    """The adapters of one block: none when new, those of a recipe after `add` (ClinVLA, section 3.2)."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width
        self.language: Bottleneck | None = None
        self.task: Bottleneck | None = None

    def add(self, recipe: Recipe) -> None:
        """New adapters, as a recipe has them."""
        if "language" in recipe.adapters:
            self.language = Bottleneck(self.width, recipe.bottleneck)
        if "task" in recipe.adapters:
            self.task = Bottleneck(self.width, recipe.bottleneck)

    def forward(self, ffn: Tensor, residual: Tensor, norm: nn.LayerNorm | None = None) -> Tensor:
        language = self.language and self.language.parts(ffn.dtype)
        task = self.task and self.task.parts(ffn.dtype)
        if norm is None:
            return ops.transformer_adapt(ffn, residual, language, task)
        return ops.transformer_adapt(ffn, residual, language, task, norm.weight, norm.bias, norm.eps)


def add_adapters(adapts: nn.ModuleList, recipe: Recipe, width: int) -> InvertibleAdapter | None:
    """Put a recipe's adapters into the blocks that it names, and return that of the embeddings, if it has one.

    Adapters that start higher up leave the embeddings alone: the backward pass ends at the first adapter.

    Raises:
        ValueError: if the recipe names a block that the tower has not.
    """
    blocks = range(len(adapts)) if recipe.adapter_blocks is None else recipe.adapter_blocks
    if not blocks or not set(blocks) <= set(range(len(adapts))):
        found = ", ".join(map(str, blocks)) or "none"
        raise ValueError(f"adapter blocks are {found}: expected some of 0 to {len(adapts) - 1}, which the tower has.")
    for block in blocks:
        adapts[block].add(recipe)
    whole = min(blocks) == 0 and "invertible" in recipe.adapters
    return InvertibleAdapter(width) if whole else None
