"""Every configuration that the launcher of Transformer-Adapt chooses between, at real shapes."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from clinvla_fast.kernels import transformer_adapt

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# name: (width, inner widths, norm, (activation, scaling, inner skip, after the norm), source), dtypes, norm trains too
CASES = {
    "ViT 768-64": ((768, (64, 64), False, ("relu", 1.0, False, False), False), (BF16, FP16, FP32), False),
    "BERT 768-64": ((768, (64, 64), True, ("relu", 1.0, False, False), False), (BF16, FP32), False),
    "BERT 1024-192": ((1024, (192, 192), True, ("relu", 1.0, False, False), False), (BF16, FP32), False),
    "ViT 768-16-64": ((768, (16, 64), False, ("relu", 1.0, False, False), False), (BF16,), False),
    "BERT 768-192-48": ((768, (192, 48), True, ("relu", 1.0, False, False), False), (BF16,), False),
    "MAD-X 192-16": ((192, (16,), True, ("relu", 1.0, False, False), False), (BF16,), False),
    "ALTA ViT 768-192": ((768, (192,), False, ("gelu", 0.5, True, False), True), (BF16,), False),
    "ALTA BERT 768-192": ((768, (192,), True, ("gelu", 0.5, True, True), True), (BF16,), True),
    "everything 768-64": ((768, (64, 64), True, ("gelu", 0.5, True, False), True), (BF16,), True),
}


def _case(width, inner, normed, options, sourced, dtype):
    x = torch.empty(65536, width, dtype=dtype)
    adapters = [x.new_empty(s) for d in inner for s in ((d, width), (d,), (width, d), (width,))]
    norm = [x.new_empty(width) for _ in range(2 * normed)]
    return x, (x, x, x if sourced else None, adapters, norm), options


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    for name, (case, dtypes, norm_trains) in CASES.items():
        for dtype in dtypes:
            x, given, options = _case(*case, dtype)
            of = f"{name} {str(dtype).removeprefix('torch.')}"
            yield f"forward {of}", partial(transformer_adapt._op, *given, 1e-12, *options)
            norms = transformer_adapt._norms(given[2], given[4], options[3])
            saved = [transformer_adapt._statistics(x, wanted) for wanted in norms]
            needs = [True, True, len(case[1]) == 2, norm_trains]
            yield f"backward {of}", partial(transformer_adapt._backward_op, x, *saved, *given, *options, needs)
