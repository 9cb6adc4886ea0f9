"""Sequences of different lengths, one after the other without padding."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Where each packed row lies in a padded [B, L] grid.

    slot: int64 [total], the packed row's place in the flattened grid; row, column: int64 [total], in the grid;
    mask: bool [B, L], True where a sequence reaches; first: int64 [B], the packed row that each sequence starts at;
    starts: int32 [1 + B], the same with the total at the end; lengths: int64 [B], on the CPU.
    """

    slot: Tensor
    row: Tensor
    column: Tensor
    mask: Tensor
    first: Tensor
    starts: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, lengths: Tensor, device: torch.device | str) -> "Packing":
        """The packing of sequences of `lengths` (int64 [B], on the CPU, so that no device is waited for)."""
        longest = max(lengths.tolist(), default=0)
        mask = torch.arange(longest) < lengths[:, None]
        slot = mask.flatten().nonzero().squeeze(1)
        ends = lengths.cumsum(0)
        starts = torch.cat([ends.new_zeros(1), ends]).int()
        width = max(longest, 1)
        moved = (x.to(device) for x in (slot, slot // width, slot % width, mask, ends - lengths, starts))
        return cls(*moved, lengths)

    def pad(self, rows: Tensor) -> Tensor:
        """Packed rows [total, ...] as [B, L, ...], zero where there is none."""
        batch, longest = self.mask.shape
        grid = rows.new_zeros(batch * longest, *rows.shape[1:]).index_copy(0, self.slot, rows)
        return grid.unflatten(0, (batch, longest))

    def pack(self, grid: Tensor) -> Tensor:
        """The inverse of `pad`: [B, L, ...] to [total, ...]."""
        return grid.flatten(0, 1)[self.slot]
