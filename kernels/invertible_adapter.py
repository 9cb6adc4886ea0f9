"""Invertible adapter (ClinVLA, section 3.1.1 and Algorithm 1; the NICE coupling of MAD-X).

With e = [e1, e2] split in halves, and F, G bottlenecks of width H/2:

    forward   o1 = e1 + F(e2)    o2 = e2 + G(o1)
    inverse   e2 = o2 - G(o1)    e1 = o1 - F(e2)
"""

import torch
from torch import Tensor

from .bottleneck import Bottleneck, bottleneck


def reference(x: Tensor, f: Bottleneck, g: Bottleneck, inverse: bool = False) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    if inverse:
        second = second - bottleneck(first, g)
        first = first - bottleneck(second, f)
    else:
        first = first + bottleneck(second, f)
        second = second + bottleneck(first, g)
    return torch.cat([first, second], dim=-1)
