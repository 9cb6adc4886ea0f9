"""The libraries that attend, against each other through our one function: SDPA, xformers, PyTorch's varlen attention,
and softmax written out. One that cannot run here is reported with its reason."""

from collections.abc import Callable
from statistics import median

import pytest
import torch
from torch import Tensor

from bench.measure import peak_memory_on_gpu
from bench.towers import LENGTHS, PADDED, PATCHES
from clinvla_fast.backend import BackendUnavailable
from clinvla_fast.modeling import attention
from clinvla_fast.modeling.frozen import compute_dtype
from clinvla_fast.modeling.packing import Packing

HEADS, DEPTH = 12, 64
WHAT = ["whole views", "masked views", "reports"]


def written_out(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Of sequences [B, L, heads, depth] of which `mask` [B, L] are there."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    scores = query @ key.mT * DEPTH**-0.5
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


def compare(measured, what: str, studies: int, device: str, dtype: torch.dtype, rounds: int) -> dict[str, Callable]:
    """All that can run here, in turns, against padded reports and softmax written out."""
    torch.manual_seed(0)
    packing, mask = None, None
    if what == "reports":
        lengths = torch.tensor(LENGTHS * (studies // len(LENGTHS)))
        packing = Packing.of(lengths, device)
        mask = torch.arange(PADDED, device=device) < lengths.to(device)[:, None]
        shape = studies, PADDED
    else:
        shape = 2 * studies, 1 + (PATCHES if what == "whole views" else PATCHES // 4)
    padded = torch.randn(3, *shape, HEADS, DEPTH, device=device, dtype=dtype)
    given = padded if mask is None else padded[:, mask]
    right = written_out(*padded.double(), mask)
    right = right if mask is None else right[mask]

    def through(library: str) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with attention.use(library):
                return attention.attention(*given, packing)

        return run

    runs, unavailable = {"written out": lambda: written_out(*padded, mask)}, {}
    for library in attention.KERNELS:
        try:
            found = through(library)()
        except BackendUnavailable as error:
            unavailable[library] = str(error)
        else:
            assert (found.double() - right).norm() <= (1e-5 if dtype == torch.float32 else 0.02) * right.norm()
            runs[library] = through(library)
    taken = measured.turns(runs, rounds)
    for other in ("written out", "sdpa"):
        for library in runs:
            if library not in ("written out", other):
                measured.faster(f"{library} than {other}", taken[other], taken[library])
    measured.figure("unavailable", unavailable)
    if measured.on_gpu:
        measured.figure("seconds", {name: median(times) for name, times in taken.items()})
        measured.figure("peak_bytes", {name: peak_memory_on_gpu(run) for name, run in runs.items()})
    return runs


@pytest.mark.parametrize("what", WHAT)
@torch.inference_mode()
def test_attention(measured, what):
    runs = compare(measured, what, 4, "cpu", compute_dtype(torch.device("cpu")), rounds=25)
    assert runs.keys() == {"written out", "sdpa"}


@pytest.mark.gpu
@pytest.mark.parametrize("studies", [4, 256])
@pytest.mark.parametrize("what", WHAT)
@torch.inference_mode()
def test_attention_on_gpu(measured, what, studies):
    compare(measured, what, studies, "cuda", torch.bfloat16, rounds=30)
