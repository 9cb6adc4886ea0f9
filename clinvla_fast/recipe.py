"""A method is data: which adapters it trains, what it sees of a study, what it minimises, and how.

`clinvla_fast/methods/` has a file a method; `presets/` fits them to towers of a size.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from .study import VIEWS

Objective = Literal["contrastive", "cosine"]
Adapter = Literal["invertible", "language", "task", "attention", "mlp"]
View = Literal["frontal", "lateral", "prior_frontal", "prior_lateral"]
Trained = Literal["norms", "tokens", "towers"]


@dataclass(frozen=True)
class Recipe:
    """What a model is and minimises. The defaults are ClinVLA's (Table 1 of the paper; where it is silent, the comment
    says what was chosen)."""

    adapters: tuple[Adapter, ...] = ("invertible", "language", "task")
    """Those put into the towers: ClinVLA's three; ALTA's on the attention's and beside the feed-forward's output."""
    adapter_blocks: tuple[int, ...] | None = None
    """Which blocks of both towers carry adapters, from 0, as 8-11 or 2,5,8-11. What lies below the lowest is not
    trained and costs no backward pass. None: every block."""
    bottleneck: int = 64
    """Inner width of the adapters in the blocks."""
    trained: tuple[Trained, ...] = ()
    """What else of the towers is trained: every LayerNorm, the CLS token, or all of them (end to end)."""
    scratch: bool = False
    """Towers start from random weights."""
    fusion: bool = False
    """Adaptor: no adapters in the towers, whose outputs are computed once; one block of cross-attention on top."""
    views: tuple[View, ...] = VIEWS
    """Those that are seen; others count as missing."""
    missing_views: bool = False
    """A learned token stands for a missing view in the mean (ALTA); else a missing view is left out."""
    keep: float = 0.25
    """Share of patches seen in training."""
    max_tokens: int = 128
    """Of a report, CLS and SEP included."""
    width: int = 128  # chosen
    """Of the shared embedding space; Adaptor's block is as wide."""
    objective: Objective = "contrastive"
    """contrastive: InfoNCE and local alignment. cosine: the paper's formulas as printed, which have no negatives."""
    global_weight: float = 1.0
    """Of the loss between global embeddings; 0 leaves it out."""
    local_weight: float = 0.8
    """Of the loss between patches and words; 0 leaves it out."""
    image_weight: float = 0.0
    """Of masked image reconstruction; 0 leaves it out."""
    word_weight: float = 0.0
    """Of masked words; 0 leaves it out."""
    image_share: float = 0.5
    """Of the global loss: images looking for reports; the rest is reports looking for images (ConVIRT: 0.75)."""
    scales: tuple[float, float, float, float] = (1 / 0.07,) * 4  # chosen
    """At the start: of the global logits, tau1, tau2, tau3."""
    learn_scales: bool = True
    """Scales are learned, up to 100."""
    masked_words: float = 0.5
    """Share of a report's words that are masked, where words are reconstructed."""
    image_in_words: Literal["none", "cls", "patches"] = "none"
    """What of the image is added to a masked report's embeddings: the mean CLS (ALTA) or the mean patch (MRM)."""
    target_scale: int = 1
    """Side of the image that is reconstructed, in the towers' image size: 2 is finer than what the tower sees."""
    decoder_blocks: int = 4
    """Of the decoder that reconstructs images."""
    train_decoder: bool = True
    """All of it; else its first and last layer and its embeddings alone (ALTA, whose decoder comes trained)."""

    def __post_init__(self):
        """Raises ValueError: for a name that there is not, or a number out of range."""
        for name, known in (("adapters", Adapter), ("views", View), ("trained", Trained)):
            for found in set(getattr(self, name)) - set(get_args(known)):
                raise ValueError(f"{name} has {found!r}: expected some of {', '.join(get_args(known))}.")
        if "mlp" in self.adapters and {"language", "task"} & set(self.adapters):
            raise ValueError(f"adapters are {', '.join(self.adapters)}: mlp takes the place of language and task.")
        if self.adapter_blocks is not None and not self.adapter_blocks:
            raise ValueError("adapter_blocks is empty: expected at least one, or null for every block.")
        if not self.views:
            raise ValueError("views is empty: expected at least one, the model would see nothing.")
        for name in ("keep", "masked_words"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}: expected a share above 0, at most 1.")
        for name in ("bottleneck", "width", "max_tokens", "target_scale", "decoder_blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: expected at least 1.")
        for name in ("global_weight", "local_weight", "image_weight", "word_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}: expected 0 or more.")
        if not 0 <= self.image_share <= 1:
            raise ValueError(f"image_share is {self.image_share}: expected a share, 0 to 1.")
        if min(self.scales) <= 0:
            raise ValueError(f"scales are {self.scales}: expected all above 0.")
        if self.image_weight and self.keep == 1:
            raise ValueError("image_weight reconstructs masked patches, and keep is 1: expected it below 1.")
        if self.image_weight and "frontal" not in self.views:
            raise ValueError("image_weight reconstructs the frontal view, and views has none.")
        if not any((self.global_weight, self.local_weight, self.image_weight, self.word_weight)):
            raise ValueError("all weights of losses are 0: expected one above.")


@dataclass(frozen=True)
class Optimization:
    """How a recipe is trained: AdamW, a linear warm-up, a cosine. An epoch is one pass over the training studies."""

    batch_size: int = 32
    """Studies a step, in all processes together."""
    epochs: int = 30  # chosen
    """Passes over the training studies."""
    schedule_epochs: int | None = None
    """Where the cosine ends, if training is stopped before it does. None: with the last epoch."""
    warmup: float = 0.05  # chosen
    """Share of the schedule."""
    language_lr: float = 5e-5
    """Of the language and the invertible adapters."""
    task_lr: float = 1e-4
    """Of all else that is new: task adapters, heads, embeddings, temperatures."""
    tower_lr: float = 1e-4
    """Of what is trained of the towers."""
    weight_decay: float = 1e-4
    """Of AdamW."""
    decay_vectors: bool = True
    """Whether biases, norms and other vectors decay too."""
    betas: tuple[float, float] = (0.9, 0.95)  # chosen
    """Of AdamW."""
    clip: float = 1.0  # chosen
    """Largest norm of all gradients together."""
    accumulate: int = 1
    """Batches whose gradients are averaged into one step."""
    chunk: int | None = None
    """Studies in the towers at a time: embeddings come first, then gradients are replayed chunk by chunk, so that any
    batch fits, at the price of a second forward pass. None: the whole batch at once."""
    ema: float = 0.0
    """Decay of an average of the weights, which is then what is evaluated and saved; 0 for none. After n steps it is
    (1 + n) / (10 + n) at most, so that short runs forget how they started."""
    patience: int | None = None
    """Evaluations on the validation split without a better retrieval before training ends, with the best weights."""
    skip_limit: int = 10
    """Steps in a row with a loss or gradient that is not finite before the run ends; each is skipped and counted."""
    stop_on_collapse: bool = False
    """Whether the collapse alarm ends the run; else it warns."""


@dataclass(frozen=True)
class Method:
    """A recipe and how it is trained."""

    recipe: Recipe
    optimization: Optimization
