"""What a model costs, counted: parameters, and floating-point operations at 2 a multiply-add."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from .data.features import FeatureBatch, encode_features
from .distributed import alone
from .modeling import attention
from .modeling.adaptor import Adaptor
from .modeling.encoders import ImageEncoder, TextEncoder
from .modeling.model import ClinVLA
from .pretraining import Towers
from .study import VIEWS, StudyBatch


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
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), attention.use("sdpa"), sdpa_kernel(SDPBackend.MATH), counter:
        model(batch, mask_seed=0 if masked else None)
    return counter.get_total_flops()


def step_flops(model: ClinVLA, views: int, tokens: int, studies: int = 1) -> int:
    """As `forward_flops`, of one masked training step of this many studies: forward, losses and backward.

    Losses between images and reports grow with the square of the studies: see `batch_flops`.
    """
    batch = _study(model, views, tokens, studies, training=True)
    with attention.use("sdpa"), sdpa_kernel(SDPBackend.MATH), alone(), FlopCounterMode(display=False) as counter:
        embeddings, sums = model.train_on(batch, 0)
        (model.objective(embeddings)["loss"] + sum(sums.values())).backward()
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops()


def study_and_pair_flops(model: ClinVLA, views: int, tokens: int) -> tuple[int, int]:
    """What a training step of any number of such studies costs: so much a study, so much a pair of an image and a
    report."""
    one, two = (step_flops(model, views, tokens, n) for n in (1, 2))
    pair = max(0, two - 2 * one) // 2
    return one - pair, pair


def batch_flops(model: ClinVLA, views: int, tokens: int, studies: int) -> int:
    """Of a training step of a whole batch."""
    study, pair = study_and_pair_flops(model, views, tokens)
    return studies * study + studies**2 * pair


def training_flops(model: ClinVLA) -> Callable[[StudyBatch], Tensor]:
    """What training on a batch costs, by its present views and words."""
    return _by_content(lambda *study: step_flops(model, *study), [view in model.recipe.views for view in VIEWS])


def tower_flops(stage: Towers) -> Callable[[StudyBatch], Tensor]:
    """What a step of making towers costs, by its present views and words."""

    def count(views: int, tokens: int) -> int:
        batch = _studies(stage.image_size, next(stage.parameters()).device, views, tokens)
        with attention.use("sdpa"), sdpa_kernel(SDPBackend.MATH), alone(), FlopCounterMode(display=False) as counter:
            stage(batch, 0)["loss"].backward()
        stage.zero_grad(set_to_none=True)
        return counter.get_total_flops()

    return _by_content(count, [True] * len(VIEWS))


def _by_content(count: Callable[[int, int], int], seen: list[bool]) -> Callable[[StudyBatch], Tensor]:
    """Of any batch, from what one study costs by its views and tokens: a line in its views, and for the attention in
    its report a parabola in its tokens, through what is counted.

    Args:
        seen: of the views that a study has, which cost anything.
    """
    one, short, middle, long = (count(*study) for study in ((1, 32), (2, 16), (2, 32), (2, 64)))
    view, rise = middle - one, (middle - short) / 16
    square = ((long - middle) / 32 - rise) / 48
    token = rise - 48 * square
    empty = one - view - 32 * token - 32**2 * square
    looked_at = torch.tensor(seen)

    def flops(batch: StudyBatch) -> Tensor:
        views = (batch.present & looked_at[: batch.present.shape[1]].to(batch.present.device)).sum()
        tokens = token * batch.lengths.sum().item() + square * batch.lengths.square().sum().item()
        return empty * len(batch) + view * views + tokens

    return flops


def saved_bytes(step: Callable[[], None], module: nn.Module) -> int:
    """Bytes that a step holds for its backward pass, beside what belongs to `module` anyway."""
    own = {x.untyped_storage().data_ptr() for x in module.state_dict(keep_vars=True).values()}
    held: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        step()
    return sum(held.values())


def bytes_sent(model: ClinVLA, batch_size: int, ranks: int, tokens: int | None = None) -> int:
    """Bytes that each of several processes sends in a training step, its collectives in rings.

    Gradients of what is trained are all-reduced; global embeddings of both sides and the words of reports are gathered,
    and their gradients go back; of the scores of reports, which all ranks' images have a part in, two sums.

    Args:
        tokens: of the longest report; None: the most there can be.
    """
    if ranks == 1:
        return 0
    own, others, recipe = batch_size / ranks, ranks - 1, model.recipe
    gradients = 2 * others / ranks * sum(p.numel() * p.element_size() for p in model.trainable().values())
    whole = 2 * 2 * others * own * 4 * recipe.width if recipe.global_weight and recipe.objective == "contrastive" else 0
    words = 0
    if recipe.local_weight and recipe.objective == "contrastive":
        element = 4 if model.dtype is None else model.dtype.itemsize
        # Gradients go back in float32, as many are summed.
        words = others * own * (tokens or model.max_tokens) * (recipe.width * (element + 4) + 1)
        words += 2 * 2 * others / ranks * 4 * batch_size
    return round(gradients + whole + words)


def adaptor_cost(
    adaptor: Adaptor, image: ImageEncoder, text: TextEncoder, batch: FeatureBatch, ranks: int, batch_size: int
) -> dict:
    """Sizes and costs of an Adaptor on its towers, by the names that summary.json has.

    Args:
        batch: any one of features; the cost of a training step, a study, is its own.
    """
    towers = sum(x.numel() for part in (image, text) for x in part.model.state_dict().values())
    trained = sum(p.numel() for p in adaptor.parameters())
    study = _studies(image.image_size, image.device, 2, text.max_tokens)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as once:
        encode_features(study, image, text)
    with sdpa_kernel(SDPBackend.MATH), alone(), FlopCounterMode(display=False) as step:
        adaptor.losses(batch.to(image.device))["loss"].backward()
    adaptor.zero_grad(set_to_none=True)
    sent = 2 * (ranks - 1) / ranks * 4 * trained + 4 * 2 * (ranks - 1) * batch_size / ranks * 4 * adaptor.sizes["width"]
    return {
        "params": {"total": towers + trained, "trainable": trained},
        "flops_per_sample": once.get_total_flops(),
        "flops_per_training_sample": round(step.get_total_flops() / len(batch)),
        "flops_per_step": round(step.get_total_flops() / len(batch) * batch_size),
        "bytes_sent_per_step": round(sent) if ranks > 1 else 0,
    }


def _study(model: ClinVLA, views: int, tokens: int, studies: int = 1, training: bool = False) -> StudyBatch:
    size = model.training_size if training else model.vision.image_size
    return _studies(size, model.device, views, tokens, studies)


def _studies(size: int, device: torch.device, views: int, tokens: int, studies: int = 1) -> StudyBatch:
    # The counter knows no formula for a CPU's fused attention: who counts runs attention as plain products.
    return StudyBatch(
        images=torch.zeros(studies, views, size, size, dtype=torch.uint8, device=device),
        present=torch.ones(studies, views, dtype=torch.bool, device=device),
        tokens=torch.full((studies * tokens,), 5, device=device),
        lengths=torch.tensor([tokens] * studies),
    )
