"""Masked-patch embedding (ClinVLA, section 3.3): tokens of the kept patches, straight from uint8 pixels.

A patch embedding is linear, so what precedes it folds into its weights exactly. With pixel x in 0..255, gray copied
to C channels, mean m_c and deviation s_c:

    sum_c W_c (x/255 - m_c)/s_c + b  =  W' x + b',   W' = sum_c W_c / (255 s_c),   b' = b - sum_c (m_c/s_c) sum W_c

Pixels are centred at 128 first, which is exact in every dtype and keeps W' x + b' from cancelling large sums.
Only kept patches of present views are read, converted and multiplied.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear

_CENTRE = 128


def draw_kept_patches(views: int, patches: int, keep: int, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """Which patches each view keeps: `keep` of `patches`, uniform, independent a view, a function of `seed` alone.

    Returns:
        int64 [views, keep], ascending in each row.
    """
    noise = torch.rand(views, patches, generator=torch.Generator(device).manual_seed(seed), device=device)
    return noise.argsort(dim=1)[:, :keep].sort(dim=1).values


def fold_normalisation(weight: Tensor, bias: Tensor, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """Patch weights [D, C, p, p] and bias [D] for normalised C-channel input, as [D, p*p] and [D] for gray - 128."""
    scaled = weight.flatten(2) / std.view(1, -1, 1)
    return scaled.sum(1) / 255, bias + (scaled.sum(2) * (_CENTRE / 255 - mean)).sum(1)


def to_patches(images: Tensor, size: int) -> Tensor:
    """A view of images [..., H, W] as a grid of patches [..., H/p, W/p, p, p]; no copy."""
    height, width = images.shape[-2:]
    if height % size or width % size:
        raise ValueError(f"images are {height}x{width}: expected both sides to be multiples of the patch size {size}.")
    return images.unflatten(-1, (-1, size)).unflatten(-3, (-1, size)).transpose(-3, -2)


def reference(
    images: Tensor,
    present: Tensor,
    weight: Tensor,
    bias: Tensor,
    position: Tensor,
    cls: Tensor,
    slot: Tensor,
    mean: Tensor,
    std: Tensor,
    kept: Tensor | None = None,
) -> Tensor:
    grid = to_patches(images, weight.shape[-1])
    columns = grid.shape[3]
    study, view = present.nonzero(as_tuple=True)
    if kept is None:
        kept = torch.arange(grid.shape[2] * columns, device=images.device).expand(len(study), -1)
    pixels = grid[study[:, None], view[:, None], kept // columns, kept % columns].flatten(2)
    weight, bias = fold_normalisation(weight, bias, mean, std)
    patches = linear(pixels.to(weight.dtype) - _CENTRE, weight, bias) + position[1:][kept]
    first = (cls + position[0]).expand(len(study), 1, -1)
    return torch.cat([first, patches], dim=1) + slot[view][:, None]
