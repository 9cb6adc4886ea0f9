"""Every configuration that the launchers of masked_patches and draw_patches choose."""

from collections.abc import Callable, Iterator

import torch

from clinvla_fast.kernels import draw_patches, masked_patches  # noqa: F401

ops = torch.ops.clinvla_fast
_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    for image, size, width, pixels, dtype in (
        (224, 16, 768, torch.uint8, torch.bfloat16),
        (224, 16, 768, torch.uint8, torch.float16),
        (224, 16, 768, torch.uint8, torch.float32),
        (224, 16, 768, torch.uint16, torch.bfloat16),
        (224, 16, 768, torch.uint16, torch.float32),
        (224, 14, 1024, torch.uint8, torch.bfloat16),
        (224, 14, 1024, torch.uint8, torch.float32),
        (224, 28, 768, torch.uint8, torch.bfloat16),
        (448, 32, 768, torch.uint8, torch.bfloat16),
        (448, 32, 768, torch.uint16, torch.bfloat16),
        (128, 8, 100, torch.uint8, torch.bfloat16),
    ):
        patches = (image // size) ** 2
        views, keep = 64, patches // 4

        def empty(*shape, dtype=dtype):
            return torch.empty(shape, dtype=dtype)

        indices = [torch.zeros(shape, dtype=torch.int64) for shape in ((views,), (views, keep), (views, patches))]
        images = empty(32, 2, image, image, dtype=pixels)
        weights = [empty(*s) for s in ((width, size**2), (width,), (1 + patches, width), (width,), (2, width))]
        gradient = empty(views, 1 + keep, width)
        name = f"{width} p{size} {_NAMES[dtype]}{' 16-bit pixels' if pixels == torch.uint16 else ''}"
        yield (
            f"forward {name}",
            lambda images=images, indices=indices, weights=weights: ops.masked_patch_embed(images, *indices, *weights),
        )
        yield (
            f"backward {name}",
            lambda gradient=gradient, images=images, indices=indices, weights=weights: ops.masked_patch_embed_backward(
                gradient, images, *indices, weights[0], True, True, True
            ),
        )
    for patches in (196, 1024, 4096):
        view, seed = torch.empty(64, dtype=torch.int64), torch.empty((), dtype=torch.int64)
        yield (
            f"draw {patches}",
            lambda view=view, seed=seed, patches=patches: ops.draw_patches(view, patches, patches // 4, seed),
        )
