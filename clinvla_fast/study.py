"""What flows through the program: a batch of studies in, their embeddings out."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

VIEWS = ("frontal", "lateral", "prior_frontal", "prior_lateral")  # the view slots; "prior" is the patient's last study


@dataclass(frozen=True)
class StudyBatch:
    """B studies of V view slots, the first V of VIEWS; reports packed one after the other, without padding.

    images: uint8 [B, V, H, W], grayscale; anything where a view is absent.
    present: bool [B, V].
    tokens: int64 [sum of lengths].
    lengths: int64 [B], on the CPU: the number of tokens of each report, CLS and SEP included.
    labels: the findings of each study, the primary one first.
    ids: the study identifiers.
    row: the first study's row in the whole batch, of which several processes, or steps, each have a part.
    """

    images: Tensor
    present: Tensor
    tokens: Tensor
    lengths: Tensor
    labels: tuple[tuple[str, ...], ...] = ()
    ids: tuple[str, ...] = ()
    row: int = 0

    def __len__(self) -> int:
        return len(self.present)

    def to(self, device) -> StudyBatch:
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in ("images", "present", "tokens")}
        return replace(self, **moved)

    def parts(self, size: int) -> list[StudyBatch]:
        """The batch in parts of `size` studies, the last one perhaps of fewer."""
        ends = [0, *self.lengths.cumsum(0).tolist()]
        found = []
        for start in range(0, len(self), size):
            rows = slice(start, min(start + size, len(self)))
            cut = {name: getattr(self, name)[rows] for name in ("images", "present", "lengths", "labels", "ids")}
            tokens = self.tokens[ends[rows.start] : ends[rows.stop]]
            found.append(replace(self, **cut, tokens=tokens, row=self.row + start))
        return found


@dataclass(frozen=True)
class Embeddings:
    """Embeddings of B studies in the shared space of width D, float.

    image_global: [B, D]; zero where a study has no view.
    image_local: patches of all present views [B, N, D]; image_mask: bool [B, N].
    text_global: [B, D].
    text_local: words [B, T, D]; text_mask: bool [B, T], False for CLS, SEP and padding.
    """

    image_global: Tensor
    image_local: Tensor
    image_mask: Tensor
    text_global: Tensor
    text_local: Tensor
    text_mask: Tensor

    def paired(self) -> Embeddings:
        """The studies that have both a view and a word: the others have nothing to align."""
        keep = self.image_mask.any(1) & self.text_mask.any(1)
        return Embeddings(**{f.name: getattr(self, f.name)[keep] for f in fields(self)})
