"""The trainable modules inside the frozen towers."""

from collections.abc import Sequence

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
    """The adapters of one block: none when new, those of a recipe after `add`.

    language, task: ClinVLA's, stacked behind the feed-forward network (section 3.2).
    attention, mlp: ALTA's, on the output of the attention and, at half strength, beside the feed-forward network.
    """

    def __init__(self, width: int):
        super().__init__()
        self.width = width
        self.language: Bottleneck | None = None
        self.task: Bottleneck | None = None
        self.attention: Bottleneck | None = None
        self.mlp: Bottleneck | None = None

    def add(self, recipe: Recipe) -> None:
        """New adapters, as a recipe has them."""
        for name in ("language", "task", "attention", "mlp"):
            if name in recipe.adapters:
                setattr(self, name, Bottleneck(self.width, recipe.bottleneck))

    def attend(self, out: Tensor, residual: Tensor, norm: nn.LayerNorm | None = None) -> Tensor:
        """The stream behind the attention: norm(out + residual), and ALTA's adapter of `out` where there is no norm, of
        the normalised stream where there is one."""
        normed = (norm.weight, norm.bias, norm.eps) if norm is not None else ()
        if self.attention is None:
            return out + residual if norm is None else norm(out + residual)
        where = {"source": out} if norm is None else {"after_norm": True}
        parts = self.attention.parts(out.dtype)
        return ops.transformer_adapt(out, residual, None, parts, *normed, activation="gelu", **where)

    def forward(self, ffn: Tensor, residual: Tensor, source: Tensor, norm: nn.LayerNorm | None = None) -> Tensor:
        """The end of the block. `source` is what its feed-forward network has read, which ALTA's adapter reads too."""
        normed = (norm.weight, norm.bias, norm.eps) if norm is not None else ()
        if self.mlp is not None:
            parts, alta = self.mlp.parts(ffn.dtype), {"activation": "gelu", "scaling": 0.5, "source": source}
            return ops.transformer_adapt(ffn, residual, None, parts, *normed, after_norm=norm is not None, **alta)
        language = self.language and self.language.parts(ffn.dtype)
        task = self.task and self.task.parts(ffn.dtype)
        return ops.transformer_adapt(ffn, residual, language, task, *normed)


def adapted_blocks(recipe: Recipe, depth: int) -> Sequence[int]:
    """Which blocks of a tower of this depth carry adapters.

    Raises:
        ValueError: if the recipe names a block that the tower has not.
    """
    blocks = range(depth) if recipe.adapter_blocks is None else recipe.adapter_blocks
    if not set(blocks) <= set(range(depth)):
        found = ", ".join(map(str, blocks))
        raise ValueError(f"adapter blocks are {found}: expected some of 0 to {depth - 1}, which the towers have.")
    return blocks


def add_adapters(adapts: nn.ModuleList, recipe: Recipe, width: int) -> InvertibleAdapter | None:
    """Put a recipe's adapters into the blocks that it names, and return that of the embeddings, if it has one.

    Adapters that start higher up leave the embeddings alone: the backward pass ends at the first adapter.

    Raises:
        ValueError: if the recipe names a block that the tower has not.
    """
    blocks = adapted_blocks(recipe, len(adapts))
    for block in blocks:
        adapts[block].add(recipe)
    whole = min(blocks) == 0 and "invertible" in recipe.adapters
    return InvertibleAdapter(width) if whole else None
