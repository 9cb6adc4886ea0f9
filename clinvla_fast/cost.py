"""What a model costs, counted: parameters, and floating-point operations at 2 a multiply-add."""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from .modeling.model import ClinVLA
from .study import StudyBatch


def parameters(model: ClinVLA) -> dict[str, int]:
    """Parameters in all and those that are trained."""
    return {
        "total": sum(x.numel() for x in model.state_dict().values()),
        "trainable": sum(p.numel() for p in model.trainable().values()),
    }


def forward_flops(model: ClinVLA, views: int, tokens: int, *, masked: bool = False) -> int:
    """Floating-point operations of embedding one study, counted while it runs.

    Args:
        views: how many views are present.
        tokens: of the report, CLS and SEP included.
        masked: see only the recipe's share of patches, as in training.
    """
    batch = _study(model, views, tokens)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(batch, mask_seed=0 if masked else None)
    return counter.get_total_flops()


def step_flops(model: ClinVLA, views: int, tokens: int) -> int:
    """As `forward_flops`, of one masked training step: forward, losses and backward, a study."""
    batch = _study(model, views, tokens)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.objective(model(batch, mask_seed=0))["loss"].backward()
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops()


def _study(model: ClinVLA, views: int, tokens: int) -> StudyBatch:
    # The counter knows no formula for a CPU's fused attention, so both functions run attention as plain products.
    size = model.vision.image_size
    return StudyBatch(
        images=torch.zeros(1, views, size, size, dtype=torch.uint8, device=model.device),
        present=torch.ones(1, views, dtype=torch.bool, device=model.device),
        tokens=torch.full((tokens,), 5, device=model.device),
        lengths=torch.tensor([tokens]),
    )
