"""What a preset is."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from ..recipe import Method

Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class TowerTraining:
    """How towers that are made here learn by masked modelling before they are frozen."""

    epochs: int = 16
    """Passes over the training studies."""
    batch_size: int = 32
    """Studies a step."""
    lr: float = 3e-3
    """Of AdamW."""
    weight_decay: float = 0.05
    """Of AdamW."""
    warmup: float = 0.1
    """Share of all steps."""
    keep: float = 0.25
    """Share of patches seen."""
    masked_words: float = 0.5
    """Share of words masked."""


@dataclass(frozen=True)
class Preset:
    """Two towers, by hub name or path (None: made here), what they compute in, and how methods fit them."""

    vision: str | None
    text: str | None
    towers: TowerTraining = TowerTraining()
    precision: Precision = "auto"  # bfloat16 where the machine has matrix instructions for it
    every: Mapping[str, Any] = field(default_factory=dict)  # fields of Recipe and Optimization that all methods change
    of_method: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # the same, of one method, by its name

    def fit(self, name: str, method: Method) -> Method:
        """A method at this size."""
        changes = dict(self.every) | dict(self.of_method.get(name, {}))

        def changed(part):
            return replace(part, **{f.name: changes[f.name] for f in fields(part) if f.name in changes})

        return Method(changed(method.recipe), changed(method.optimization))
