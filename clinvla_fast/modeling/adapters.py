"""The trainable modules inside the frozen towers."""

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

    def parts(self) -> ops.Bottleneck:
        return ops.Bottleneck(self.down.weight, self.down.bias, self.up.weight, self.up.bias)


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
        return ops.invertible_adapter(x, self.f.parts(), self.g.parts())

    def inverse(self, x: Tensor) -> Tensor:
        return ops.invertible_adapter(x, self.f.parts(), self.g.parts(), inverse=True)


class TransformerAdapt(nn.Module):
    """The adapters of one block: none when new, those of a recipe after `add` (ClinVLA, section 3.2)."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width
        self.language: Bottleneck | None = None
        self.task: Bottleneck | None = None

    def add(self, recipe: Recipe) -> None:
        if "language" in recipe.adapters:
            self.language = Bottleneck(self.width, recipe.bottleneck)
        if "task" in recipe.adapters:
            self.task = Bottleneck(self.width, recipe.bottleneck)

    def forward(self, ffn: Tensor, residual: Tensor, norm: nn.LayerNorm | None = None) -> Tensor:
        language = self.language and self.language.parts()
        task = self.task and self.task.parts()
        if norm is None:
            return ops.transformer_adapt(ffn, residual, language, task)
        return ops.transformer_adapt(ffn, residual, language, task, norm.weight, norm.bias, norm.eps)
