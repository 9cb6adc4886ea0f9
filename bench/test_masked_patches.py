"""Masked-patch embedding against normalising, embedding every patch and gathering: the same tokens, the same run.

The two alternate, so that a machine that slows down slows both; their medians are compared. On a CPU it is the
processor time of one thread, which neighbours on a shared machine move least, and the fused way must take at most an
eighth of it. On a GPU both are measured and nothing is asserted here.
"""

import platform
from collections.abc import Callable, Iterator
from statistics import median
from time import perf_counter, process_time

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d
from torch.utils.flop_counter import FlopCounterMode

from clinvla_fast import ops
from clinvla_fast.kernels.traffic import nbytes

STUDIES, VIEWS, SIDE, PATCH, WIDTH, KEEP = 32, 2, 224, 16, 768, 49
PATCHES = (SIDE // PATCH) ** 2
ROUNDS = 25
AT_LEAST = 8


@pytest.fixture(scope="module")
def parts() -> dict[str, Tensor]:
    """What ViT-B/16 has, in fp32, a batch of two views a study, and the patches that are kept."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    present = torch.ones(STUDIES, VIEWS, dtype=torch.bool)
    made = {
        "images": torch.randint(0, 256, (STUDIES, VIEWS, SIDE, SIDE), generator=generator, dtype=torch.uint8),
        "present": present,
        "weight": torch.randn(WIDTH, 3, PATCH, PATCH, generator=generator) / PATCH,
        "bias": torch.randn(WIDTH, generator=generator),
        "position": torch.randn(1 + PATCHES, WIDTH, generator=generator),
        "cls": torch.randn(WIDTH, generator=generator),
        "slot": torch.randn(VIEWS, WIDTH, generator=generator),
        "mean": torch.tensor([0.485, 0.456, 0.406]),
        "std": torch.tensor([0.229, 0.224, 0.225]),
        "kept": ops.draw_kept_patches(present, PATCHES, KEEP, seed=0)[0],
    }
    return {name: x.to(device) for name, x in made.items()}


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def embed_all_and_gather(images, present, weight, bias, position, cls, slot, mean, std, kept) -> Tensor:
    gray = images[present].float() / 255
    normal = (gray[:, None] - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
    patches = conv2d(normal, weight, bias, stride=PATCH).flatten(2).mT + position[1:]
    patches = patches.gather(1, kept[..., None].expand(-1, -1, WIDTH))
    first = (cls + position[0]).expand(len(patches), 1, -1)
    return torch.cat([first, patches], 1) + slot[present.nonzero()[:, 1]][:, None]


def kept_patches_only(**parts) -> Tensor:
    return ops.masked_patch_embed(**parts).tokens


def _record(benchmark, function: Callable[..., Tensor], parts: dict[str, Tensor]) -> None:
    with FlopCounterMode(display=False) as counter:
        function(**parts)
    device = parts["images"].device
    benchmark.extra_info |= {
        "flops": counter.get_total_flops(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


@pytest.mark.parametrize("function", [embed_all_and_gather, kept_patches_only])
@torch.no_grad()
def test_embed(benchmark, parts, function):
    _record(benchmark, function, parts)
    tokens = benchmark(function, **parts)
    if function is kept_patches_only:
        pixels = parts["kept"].numel() * PATCH**2
        benchmark.extra_info["bytes"] = pixels + nbytes([x for name, x in parts.items() if name != "images"], tokens)
        assert benchmark.extra_info["flops"] == 2 * pixels * WIDTH


@torch.no_grad()
def test_ratio(benchmark, parts, one_thread):
    """Interleaved: every other run is the other function."""
    torch.testing.assert_close(kept_patches_only(**parts), embed_all_and_gather(**parts), rtol=1e-4, atol=1e-4)
    times: dict[Callable, list[float]] = {embed_all_and_gather: [], kept_patches_only: []}
    on_gpu = parts["images"].is_cuda
    clock = perf_counter if on_gpu else process_time
    wait = torch.cuda.synchronize if on_gpu else lambda: None

    def both() -> None:
        for function, taken in times.items():
            wait()
            start = clock()
            function(**parts)
            wait()
            taken.append(clock() - start)

    _record(benchmark, kept_patches_only, parts)
    benchmark.pedantic(both, rounds=ROUNDS, warmup_rounds=3)
    medians = {function.__name__: median(taken[3:]) for function, taken in times.items()}
    ratio = medians["embed_all_and_gather"] / medians["kept_patches_only"]
    benchmark.extra_info |= {"ratio": round(ratio, 2)} | {f"{name}_ms": 1e3 * t for name, t in medians.items()}
    if not on_gpu:
        assert ratio >= AT_LEAST, f"{ratio:.1f} times as fast: {medians}"
