"""Frozen means frozen: a tower's weights as buffers, which no optimizer, gradient or DDP bucket ever sees."""

import torch
from torch import nn


def freeze(tower: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Turn every parameter of a tower into a buffer of the same name, in evaluation mode for good.

    The keys of its state_dict stay as they are; weights that were shared stay shared.

    Args:
        dtype: to store the weights in, once; None keeps theirs.
    """
    buffers: dict[nn.Parameter, torch.Tensor] = {}
    for module in tower.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter not in buffers:
                buffers[parameter] = parameter.detach().to(dtype)
            delattr(module, name)
            module.register_buffer(name, buffers[parameter])
    tower.eval()


def compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where there are matrix instructions for it, on GPUs and CPUs alike; else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    half = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if half else torch.float32
