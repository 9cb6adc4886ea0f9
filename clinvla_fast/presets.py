"""The sizes that the main job offers by name."""

from dataclasses import dataclass
from typing import Literal

from .recipe import Recipe

PresetName = Literal["tiny", "base"]
Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class TowerTraining:
    """How towers that are made here learn by masked modelling before they are frozen."""

    epochs: int = 16
    batch_size: int = 32
    lr: float = 3e-3
    weight_decay: float = 0.05
    warmup: float = 0.1
    keep: float = 0.25
    masked_words: float = 0.5


@dataclass(frozen=True)
class Preset:
    """Two towers, by hub name or path (None: made here), what they compute in, and the recipe that aligns them."""

    recipe: Recipe
    vision: str | None
    text: str | None
    towers: TowerTraining | None = None
    precision: Precision = "auto"  # bfloat16 where the machine has matrix instructions for it


PRESETS: dict[str, Preset] = {
    # Small enough to learn something on two CPU cores in minutes. Its steps are few, so its learning rates are high,
    # and its scales start low: from 1/0.07 the first loss is far above chance, and its gradient collapses the
    # embeddings for the first hundred steps. At its width bfloat16 is no faster, and costs retrieval.
    "tiny": Preset(
        Recipe(width=64, epochs=36, batch_size=32, language_lr=1e-3, task_lr=1.5e-3, scales=(5.0, 4.0, 5.0, 1.5)),
        vision=None,
        text=None,
        towers=TowerTraining(),
        precision="float32",
    ),
    "base": Preset(Recipe(), vision="vit_base_patch16_224.mae", text="dmis-lab/biobert-base-cased-v1.2"),
}
