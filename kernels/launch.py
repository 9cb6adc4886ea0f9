"""What the Triton kernels here share: the type they multiply in, and how they are started."""

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret
"""Whether kernels are interpreted on the CPU (TRITON_INTERPRET=1), as the tests do where there is no GPU."""

_MULTIPLIED_IN = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.float32 if INTERPRETED else tl.bfloat16,  # the interpreter's bf16 products are wrong
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


def multiplied_in(dtype: torch.dtype) -> tl.dtype:
    """The type of the operands of a matrix product of tensors of this dtype, a constexpr argument of a kernel.

    Raises:
        ValueError: where a kernel has no arithmetic for it.
    """
    if dtype not in _MULTIPLIED_IN:
        raise ValueError(f"tensors are {dtype}: expected float16, bfloat16 or float32.")
    return _MULTIPLIED_IN[dtype]


def summed_in(dtype: torch.dtype) -> tl.dtype:
    """The type of sums and of everything pointwise: float32, and float64 where a gradient is checked in it."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def launch(kernel: triton.JITFunction, grid: tuple[int, ...], *args, **meta) -> None:
    """Run a kernel over a grid on the device of its first tensor; an empty grid runs nothing."""
    if 0 in grid:
        return
    tensor = next(a for a in args if isinstance(a, Tensor))
    with torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext():
        kernel[grid](*args, **meta, enable_fp_fusion=True)
