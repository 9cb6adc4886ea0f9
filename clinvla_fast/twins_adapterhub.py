"""Fast twins for three modules of AdapterHub's package `adapters` (Poth et al. 2023), where a model has them.

The linear layers that it puts in the place of a model's own, with LoRA or without; its bottleneck adapter with neither
norms, gates nor stochastic depth; and its NICE coupling where that is MAD-X's invertible adapter: ReLU, equal halves,
no condition. All others stay as they are, as do parallel adapters.
"""

import torch
from adapters.methods.lora import LoRALinearTorch
from adapters.methods.modeling import Adapter, NICECouplingBlock
from torch import Tensor, nn

from . import ops
from .kernels import onednn
from .twins import FastLinear, exact_gelu, hooked, plain


class FastLoRALinear(LoRALinearTorch, FastLinear):
    """AdapterHub's Linear: what it calls as nn.Linear's forward is FastLinear's."""


class FastAdapter(Adapter):
    """AdapterHub's Adapter, its GELU applied as the first layer is written, and no product with a scaling of 1."""

    def forward(self, x: Tensor, residual_input: Tensor, output_gating: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        if not _adapter_fits(self):
            return super().forward(x, residual_input, output_gating)
        first, activation = self.adapter_down
        gelu = exact_gelu(activation.f)
        down = onednn.linear(x, first.weight, first.bias, gelu=gelu)
        if not gelu:
            down = activation(down)
        up = self.adapter_up(down)
        if not (isinstance(self.scaling, float) and self.scaling == 1):
            up = up * self.scaling
        return residual_input + self.dropout(up), down, up


class FastNICECouplingBlock(NICECouplingBlock):
    """AdapterHub's NICECouplingBlock as one operation, `ops.invertible_adapter`: on a GPU one kernel."""

    def forward(self, x: Tensor, c=(), rev: bool = False) -> Tensor:
        if not _coupling_fits(self):
            return super().forward(x, c, rev)
        layers = [self.F[0], self.F[2], self.G[0], self.G[2]]
        if torch.is_autocast_enabled(x.device.type) or any(layer.weight.dtype != x.dtype for layer in layers):
            return super().forward(x, c, rev)
        f, g = (ops.Bottleneck(n[0].weight, n[0].bias, n[2].weight, n[2].bias) for n in (self.F, self.G))
        return ops.invertible_adapter(x, f, g, inverse=rev)


def _unheard(module: nn.Module) -> bool:
    """Whether nothing listens to the parts of a module, which a twin does not call one by one."""
    return not any(hooked(m) for m in module.modules() if m is not module)


def _both_plain(*layers: nn.Module) -> bool:
    return all(plain(layer) and layer.bias is not None for layer in layers)


def _adapter_fits(m: Adapter) -> bool:
    more = m.add_layer_norm_before or m.add_layer_norm_after or m.use_gating or hasattr(m, "DropPath")
    return not more and len(m.adapter_down) == 2 and _both_plain(m.adapter_down[0], m.adapter_up) and _unheard(m)


def _coupling_fits(m: NICECouplingBlock) -> bool:
    relu = all(type(n[1].f) is nn.ReLU and _both_plain(n[0], n[2]) for n in (m.F, m.G))
    same = m.split_len1 == m.split_len2 and m.F[0].weight.shape == m.G[0].weight.shape
    return relu and same and not m.conditional and _unheard(m)


# As `_TWINS` of twins.py.
TWINS = {
    LoRALinearTorch: (FastLoRALinear, lambda layer: True),
    Adapter: (FastAdapter, _adapter_fits),
    NICECouplingBlock: (FastNICECouplingBlock, _coupling_fits),
}
