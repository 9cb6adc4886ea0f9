"""Sequences of different lengths, one after the other without padding."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


@dataclass(frozen=True)
class Packing:
    """Where each packed row lies in a padded [B, L] grid.

    slot: int64 [total], the packed row's place in the flattened grid; row, column: int64 [total], in the grid;
    mask: bool [B, L], True where a sequence reaches; first: int64 [B], the packed row that each sequence starts at.
    """

    slot: Tensor
    row: Tensor
    column: Tensor
    mask: Tensor
    first: Tensor

    @classmethod
    def of(cls, lengths: Tensor, device: torch.device | str) -> "Packing":
        """The packing of sequences of `lengths` (int64 [B], on the CPU, so that no device is waited for)."""
        longest = max(lengths.tolist(), default=0)
        mask = torch.arange(longest) < lengths[:, None]
        slot = mask.flatten().nonzero().squeeze(1)
        first = lengths.cumsum(0) - lengths
        width = max(longest, 1)
        return cls(*(x.to(device) for x in (slot, slot // width, slot % width, mask, first)))

    def pad(self, rows: Tensor) -> Tensor:
        """Packed rows [total, ...] as [B, L, ...], zero where there is none."""
        batch, longest = self.mask.shape
        grid = rows.new_zeros(batch * longest, *rows.shape[1:]).index_copy(0, self.slot, rows)
        return grid.unflatten(0, (batch, longest))

    def pack(self, grid: Tensor) -> Tensor:
        """The inverse of `pad`: [B, L, ...] to [total, ...]."""
        return grid.flatten(0, 1)[self.slot]


def packed_attention(query: Tensor, key: Tensor, value: Tensor, packing: Packing) -> Tensor:
    """Attention of packed sequences, each to itself: [total, heads, d] to [total, heads, d].

    Only this product is padded, to the longest sequence of the batch.
    """
    query, key, value = (packing.pad(x).transpose(1, 2) for x in (query, key, value))
    out = scaled_dot_product_attention(query, key, value, attn_mask=packing.mask[:, None, None])
    return packing.pack(out.transpose(1, 2))
