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
        grid = rows.new_zeros(batch * longest, *rows.shape[1:]).index_put((self.slot,), rows)  # saves no rows
        return grid.unflatten(0, (batch, longest))

    def pack(self, grid: Tensor) -> Tensor:
        """The inverse of `pad`: [B, L, ...] to [total, ...]."""
        return grid.flatten(0, 1)[self.slot]

    def bias(self, dtype: torch.dtype) -> Tensor:
        """What attention in a padded grid adds to its logits: 0 where a sequence reaches, else -inf. [B, 1, 1, L]."""
        return torch.where(self.mask, 0.0, -torch.inf).to(dtype)[:, None, None]


@dataclass(frozen=True)
class Grid(Packing):
    """Sequences that stay in their padded grid: no shape depends on their lengths, which may be on any device.

    masked: its `bias`, once for all blocks.
    """

    masked: Tensor

    @classmethod
    def of(cls, lengths: Tensor, longest: int, dtype: torch.dtype) -> "Grid":
        """The grid of sequences of `lengths` (int64 [B], from 1 up to `longest`), attended to in dtype."""
        batch, device = len(lengths), lengths.device
        slot = torch.arange(batch * longest, device=device)
        mask = torch.arange(longest, device=device) < lengths[:, None]
        starts = torch.arange(0, (batch + 1) * longest, longest, device=device, dtype=torch.int32)
        masked = torch.where(mask, 0.0, -torch.inf).to(dtype)[:, None, None]
        return cls(slot, slot // longest, slot % longest, mask, slot[::longest], starts, lengths, masked)

    def bias(self, dtype: torch.dtype) -> Tensor:
        return self.masked

    def pad(self, rows: Tensor) -> Tensor:
        """Rows [B L, ...] as [B, L, ...], whatever they are where a sequence has ended."""
        return rows.unflatten(0, self.mask.shape)

    def pack(self, grid: Tensor) -> Tensor:
        return grid.flatten(0, 1)
