"""Frozen means frozen: a tower's weights as buffers, which no optimizer, gradient or DDP bucket ever sees."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.func import functional_call

from ..recipe import Trained


def freeze(tower: nn.Module, dtype: torch.dtype | None = None, trained: Sequence[Trained] = ()) -> None:
    """Turn the parameters of a tower into buffers of the same name, in evaluation mode for good.

    The keys of its state_dict stay as they are; weights that were shared stay shared.

    Args:
        dtype: to store the frozen weights in, once; None keeps theirs.
        trained: what stays a parameter, in its own dtype: "norms", every LayerNorm's; "tokens", a ViT's CLS; "towers",
            everything.
    """
    buffers: dict[nn.Parameter, torch.Tensor] = {}
    for module in tower.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            norm = "norms" in trained and isinstance(module, nn.LayerNorm)
            token = "tokens" in trained and name == "cls_token"
            if norm or token or "towers" in trained:
                continue
            if parameter not in buffers:
                buffers[parameter] = parameter.detach().to(dtype)
            delattr(module, name)
            module.register_buffer(name, buffers[parameter])
    tower.eval()


def run_in(dtype: torch.dtype | None, tower: nn.Module, inner: str, *args) -> torch.Tensor:
    """tower(*args) with what is trained of its module `inner` cast to dtype: the optimizer's weights stay as they are,
    their gradients come back in their own dtype. None: no cast."""
    names = (f"{inner}.{name}" for name, p in getattr(tower, inner).named_parameters() if p.dtype != dtype)
    cast = {name: tower.get_parameter(name).to(dtype) for name in names} if dtype is not None else {}
    return functional_call(tower, cast, args) if cast else tower(*args)


def compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where there are matrix instructions for it, on GPUs and CPUs alike; else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    half = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if half else torch.float32
