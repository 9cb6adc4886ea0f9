"""What the kernel tests share: poisoned memory, and the rule by which a kernel counts as accurate."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.utils import deterministic


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan() -> Iterator[None]:
    """torch.empty gives NaN (or the largest integer), so that an output that a kernel leaves unwritten is seen."""
    assert deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def assert_as_accurate() -> Callable[[Tensor, Tensor, Tensor, float], None]:
    """Apple's rule (Cut Cross-Entropy): no further from the truth than the reference in the same dtype, plus a bit."""

    def check(actual: Tensor, same_dtype: Tensor, truth: Tensor, tolerance: float) -> None:
        """`truth` in float64; the tolerance is relative to its largest entry."""
        assert actual.dtype == same_dtype.dtype and actual.shape == same_dtype.shape == truth.shape
        if not truth.numel():
            return
        allowed = (same_dtype.double() - truth).abs() + tolerance * truth.abs().max()
        worst = ((actual.double() - truth).abs() - allowed).max().item()
        assert worst <= 0, f"{worst:.2e} over what is allowed, the largest entry being {truth.abs().max():.2e}"

    return check
