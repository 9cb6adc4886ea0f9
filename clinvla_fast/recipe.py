"""A method is data: which adapters it trains, how much of an image it sees, which objective it minimises."""

from dataclasses import dataclass
from typing import Literal

Objective = Literal["contrastive", "cosine"]


@dataclass(frozen=True)
class Recipe:
    """ClinVLA (Table 1 of the paper; where it is silent, the comment says what was chosen).

    Learning rates are for AdamW; an epoch is one pass over the training studies.
    """

    objective: Objective = "contrastive"
    adapters: tuple[str, ...] = ("invertible", "language", "task")
    adapter_blocks: tuple[int, ...] | None = None  # of both towers, from 0; None: every block
    bottleneck: int = 64
    width: int = 128  # of the shared embedding space: chosen
    keep: float = 0.25  # share of patches seen in training
    max_tokens: int = 128
    local_weight: float = 0.8
    scales: tuple[float, float, float, float] = (1 / 0.07,) * 4  # at the start: global, tau1, tau2, tau3: chosen
    batch_size: int = 32
    epochs: int = 30  # chosen
    warmup: float = 0.05  # share of all steps, then cosine: chosen
    language_lr: float = 5e-5
    task_lr: float = 1e-4  # also of the invertible adapters, heads, embeddings and temperatures
    weight_decay: float = 1e-4
