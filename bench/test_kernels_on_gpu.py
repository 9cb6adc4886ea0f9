"""Each kernel on a GPU at training shapes, forward and backward: against the floor of the same run (the larger of its
bytes over the bandwidth and its FLOPs over the matrix rate, both measured here), against the same formula in eager
PyTorch and under torch.compile, and the memory it takes. All take turns; times are medians by the device's clock.

    pytest -m gpu bench --benchmark-json=kernels.json

Their accuracy on the device is in tests/kernels; there, `compute-sanitizer python -m pytest -m gpu tests/kernels` looks
for reads and writes out of bounds.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
import triton
from measure_on_gpu import Step, machine, peak, seconds
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.flop_counter import FlopCounterMode

from clinvla_fast import backend, ops
from clinvla_fast.kernels import local_alignment
from clinvla_fast.kernels.contrastive import symmetric_cross_entropy
from clinvla_fast.kernels.traffic import ByteCounter

TIMES_EAGER, TIMES_COMPILED = 3, 1.5
WIDTH, INNER, LOCAL, PATCHES = 768, 192, 128, 196


def normal(*shape: int, scale: float = 1.0, trained: bool = True, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return (scale * torch.randn(shape, device="cuda")).to(dtype).requires_grad_(trained)


def bottleneck(width: int, inner: int) -> ops.Bottleneck:
    down, up = normal(inner, width, scale=width**-0.5), normal(width, inner, scale=0.1 * inner**-0.5)
    return ops.Bottleneck(down, normal(inner, scale=0.02), up, normal(width, scale=0.02))


@dataclass
class Case:
    """An operation at one shape: what is run, in which form it is compared, and how near the floor it must come."""

    function: Callable[..., Tensor]
    inputs: list
    of_floor: float = 0.8
    plain: Callable[..., Tensor] | None = None  # None: the operation's own reference
    compared: bool = True
    leaves: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        tensors = torch.utils._pytree.tree_leaves(self.inputs)
        self.leaves = [x for x in tensors if isinstance(x, Tensor) and x.requires_grad]
        self.grad: Tensor | None = None

    def step(self, function: Callable[..., Tensor] | None = None) -> tuple[Tensor, ...]:
        """Forward and backward, from a gradient that is not all ones."""
        out = (function or self.function)(*self.inputs)
        if self.grad is None:
            self.grad = torch.randn_like(out)
        return torch.autograd.grad(out, self.leaves, self.grad)

    def reference(self, *inputs) -> Tensor:
        with backend.use("reference"):
            return (self.plain or self.function)(*inputs)


def invertible(rows: int) -> Case:
    adapters = bottleneck(WIDTH // 2, INNER // 2), bottleneck(WIDTH // 2, INNER // 2)
    return Case(ops.invertible_adapter, [normal(rows, WIDTH), *adapters])


def adapt(rows: int, normed: bool) -> Case:
    norm = [normal(WIDTH), normal(WIDTH)] if normed else []
    adapters = bottleneck(WIDTH, 64), bottleneck(WIDTH, 64)
    return Case(ops.transformer_adapt, [normal(rows, WIDTH), normal(rows, WIDTH), *adapters, *norm])


def embed(studies: int, trained: bool) -> Case:
    frozen = partial(normal, trained=False, dtype=torch.bfloat16)
    weights = partial(normal, trained=trained)
    inputs = [
        torch.randint(0, 256, (studies, 2, 224, 224), dtype=torch.uint8, device="cuda"),
        torch.ones(studies, 2, dtype=torch.bool, device="cuda"),
        weights(WIDTH, 3, 16, 16, scale=1 / 16),
        *(weights(*shape) for shape in ((WIDTH,), (1 + PATCHES, WIDTH), (WIDTH,))),
        normal(2, WIDTH),
        *(frozen(3).abs() + 0.2 for _ in range(2)),
    ]
    kept = ops.draw_kept_patches(inputs[1], PATCHES, PATCHES // 4, seed=0)[0]
    return Case(lambda *inputs: ops.masked_patch_embed(*inputs, kept).tokens, inputs)


def align(studies: int, compared: bool) -> Case:
    def mask(length: int, least: int) -> Tensor:
        return torch.arange(length, device="cuda") < torch.randint(least, length + 1, (studies, 1), device="cuda")

    taus = [torch.tensor(t, device="cuda", requires_grad=True) for t in (4.0, 5.0, 10.0)]
    image, text = normal(studies, 98, LOCAL), normal(studies, 128, LOCAL)
    inputs = [image, mask(98, 98), text, mask(128, 128), *taus]

    def dense(image, image_mask, text, text_mask, tau1, tau2, tau3):
        image, text = image.float(), text.float()
        return tau3 * local_alignment._dense(image, image_mask, text, text_mask, tau1, tau2)

    return Case(ops.local_alignment, inputs, 0.5, dense, compared)


def contrast(batch: int, sigmoid: bool) -> Case:
    def dense(image, text, scale, *bias):
        logits = scale * normalize(image, dim=-1) @ normalize(text, dim=-1).mT
        if not sigmoid:
            return symmetric_cross_entropy(logits)
        signs = 2 * torch.eye(len(logits), device=logits.device) - 1
        return -torch.nn.functional.logsigmoid(signs * (logits + bias[0])).sum() / len(logits)

    scalars = [torch.tensor(t, device="cuda", requires_grad=True) for t in (1 / 0.07, -10.0)[: 2 if sigmoid else 1]]
    inputs = [normal(batch, LOCAL), normal(batch, LOCAL), *scalars]
    return Case(ops.sigmoid_contrastive if sigmoid else ops.contrastive, inputs, plain=dense)


CASES: dict[str, Callable[[], Case]] = {
    **{f"invertible adapter, {n} rows": partial(invertible, n) for n in (25_600, 100_000)},
    **{f"transformer-adapt, {n} rows": partial(adapt, n, False) for n in (25_600, 100_000)},
    "transformer-adapt with its norm, 32768 rows": partial(adapt, 32_768, True),
    "masked patches, 256 studies": partial(embed, 256, False),
    "masked patches, 256 studies, trained": partial(embed, 256, True),
    "local alignment, 256 studies": partial(align, 256, True),
    "local alignment, 1024 studies": partial(align, 1024, False),
    "InfoNCE, 32768 pairs": partial(contrast, 32_768, False),
    "sigmoid loss, 32768 pairs": partial(contrast, 32_768, True),
}


def work(step: Step) -> tuple[int, int]:
    """FLOPs and compulsory bytes."""
    with FlopCounterMode(display=False) as flops, ByteCounter() as moved:
        step()
    return flops.get_total_flops(), moved.total


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_speed(benchmark, name):
    torch.manual_seed(0)
    torch._dynamo.reset()
    case = CASES[name]()
    steps: dict[str, Step] = {"ours": case.step}
    if case.compared:
        steps["eager"] = partial(case.step, case.reference)
        steps["compiled"] = partial(case.step, torch.compile(case.reference))
    taken = seconds(steps)
    flops, moved = work(case.step)
    floor = max(flops / machine()["flops_a_second"], moved / machine()["bytes_a_second"])
    ratios = {f"times_{other}": taken[other] / taken["ours"] for other in steps if other != "ours"}
    benchmark.extra_info |= (
        machine()
        | ratios
        | {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "flops": flops,
            "bytes": moved,
            "floor": floor,
            "of_floor": floor / taken["ours"],
            "peak_bytes": peak(case.step),
        }
    )
    benchmark.pedantic(lambda: (case.step(), torch.cuda.synchronize()), rounds=3)
    assert floor / taken["ours"] >= case.of_floor
    assert ratios.get("times_eager", TIMES_EAGER) >= TIMES_EAGER
    assert ratios.get("times_compiled", TIMES_COMPILED) >= TIMES_COMPILED


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("make", "most"),
    [(partial(align, 1024, False), 1_000_000_000), (partial(contrast, 65_536, False), 500_000_000)],
    ids=["local alignment, 1024 studies", "InfoNCE, 65536 pairs"],
)
def test_memory(benchmark, make, most):
    """Beyond the inputs; one dense tensor of either is over 50 GB and 17 GB."""
    case = make()
    benchmark.extra_info |= {"device": torch.cuda.get_device_name(), "peak_bytes": peak(case.step)}
    benchmark.pedantic(case.step, rounds=1)
    assert benchmark.extra_info["peak_bytes"] <= most
