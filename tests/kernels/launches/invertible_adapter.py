"""Every tile that the invertible adapter chooses: the towers' widths, few rows and many, each set of gradients."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from clinvla_fast.kernels import invertible_adapter

SHAPES = (  # rows, width, inner width
    (32768, 768, 192, torch.bfloat16),
    (32768, 1024, 256, torch.bfloat16),
    (32768, 384, 96, torch.bfloat16),
    (32768, 192, 48, torch.bfloat16),
    (197, 768, 192, torch.bfloat16),
    (32768, 768, 192, torch.float32),
    (197, 44, 11, torch.float16),
)
GRADIENTS = {"of all": (True, True), "of weights": (False, True), "of x": (True, False)}


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    for rows, width, inner, dtype in SHAPES:
        half = width // 2
        x = torch.empty(rows, width, dtype=dtype)
        f = [torch.empty(shape, dtype=dtype) for shape in ((inner, half), (inner,), (half, inner), (half,))]
        name = f"{rows} x {width} {str(dtype).removeprefix('torch.')}"
        yield f"forward {name}", partial(invertible_adapter._op, x, f, f, False)
        for what, flags in (
            GRADIENTS.items() if width >= 768 and dtype == torch.bfloat16 else [("of all", (True, True))]
        ):
            yield f"backward {name}, {what}", partial(invertible_adapter._backward_op, x, x, f, f, False, *flags)
