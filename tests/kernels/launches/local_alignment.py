"""Every tile that local alignment chooses: reports that fit one tile of words, and longer ones."""

from collections.abc import Callable, Iterator

import torch

from clinvla_fast.kernels import local_alignment

CASES = [(torch.bfloat16, 60), (torch.bfloat16, 128), (torch.bfloat16, 512)]
CASES += [(dtype, words) for dtype in (torch.float32, torch.float16) for words in (30, 128)]


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    for dtype, words in CASES:
        pair = (
            torch.empty(72, 98, 128, dtype=dtype),
            torch.ones(72, 98, dtype=torch.bool),
            torch.empty(72, words, 128, dtype=dtype),
            torch.ones(72, words, dtype=torch.bool),
            torch.ones(()),
            torch.ones(()),
        )
        grad, scores = torch.empty(2, 72, 72)
        name = f"{words} words of {str(dtype).removeprefix('torch.')}"
        yield f"forward {name}", lambda pair=pair: local_alignment._scores_op(*pair)
        yield f"backward {name}", lambda pair=pair, g=grad, s=scores: local_alignment._backward_op(g, s, *pair)
