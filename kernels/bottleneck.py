"""The bottleneck that every adapter is made of: down-projection, ReLU, up-projection."""

from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import relu

from .onednn import linear


class Bottleneck(NamedTuple):
    """Parameters of one bottleneck of width H and inner width d: weights [d, H] and [H, d], biases [d] and [H]."""

    down_weight: Tensor
    down_bias: Tensor
    up_weight: Tensor
    up_bias: Tensor


def bottleneck(x: Tensor, p: Bottleneck) -> Tensor:
    """`U ReLU(D x)` for rows x [..., H]."""
    return linear(relu(linear(x, p.down_weight, p.down_bias)), p.up_weight, p.up_bias)
