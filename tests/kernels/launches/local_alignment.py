"""Every tile that local alignment chooses: reports that fit one tile of words, and longer ones."""

from collections.abc import Callable, Iterator

import torch

from clinvla_fast.kernels import local_alignment


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    for words in (60, 128, 512):
        pair = (
            torch.empty(72, 98, 128, dtype=torch.bfloat16),
            torch.ones(72, 98, dtype=torch.bool),
            torch.empty(72, words, 128, dtype=torch.bfloat16),
            torch.ones(72, words, dtype=torch.bool),
            torch.ones(()),
            torch.ones(()),
        )
        grad, scores = torch.empty(2, 72, 72)
        yield f"forward {words} words", lambda pair=pair: local_alignment._scores_op(*pair)
        yield f"backward {words} words", lambda pair=pair, g=grad, s=scores: local_alignment._backward_op(g, s, *pair)
