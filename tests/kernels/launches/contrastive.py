"""Every configuration that kernels/contrastive.py can choose."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from clinvla_fast.kernels import contrastive  # noqa: F401, registers the operation

SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
CASES = [  # dtype, width, form
    (torch.bfloat16, 128, "symmetric"),
    (torch.bfloat16, 128, "one-way"),
    (torch.bfloat16, 128, "sigmoid"),
    (torch.float16, 128, "symmetric"),
    (torch.bfloat16, 24, "symmetric"),
    (torch.bfloat16, 512, "symmetric"),
    (torch.bfloat16, 768, "sigmoid"),
    (torch.float32, 128, "symmetric"),
    (torch.float32, 128, "sigmoid"),
    (torch.float32, 24, "symmetric"),
]


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    forward, backward = torch.ops.clinvla_fast.contrastive, torch.ops.clinvla_fast.contrastive_backward
    for dtype, width, form in CASES:
        image, text = torch.empty(2, 4096, width, dtype=dtype)
        scale, rows = torch.empty(()), torch.empty(4096)
        bias, lse = (torch.empty(()), torch.empty(0)) if form == "sigmoid" else (None, rows)
        inputs = image, text, scale, bias
        name = f"{width} {SHORT[dtype]} {form}"
        yield f"forward {name}", partial(forward, *inputs, 0, form == "symmetric")
        if form != "one-way":  # its backward is the symmetric one
            yield f"backward {name}", partial(backward, scale, *inputs, rows, rows, lse, lse, 0, True, False)
