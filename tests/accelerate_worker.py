"""One of several processes: a rank's gradients of an accelerated model under DDP, from its share of a batch.

Arguments: the folder to write gradients to. Run under torchrun.
"""

import sys
from pathlib import Path

import timm
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from clinvla_fast import accelerate


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}
    return timm.create_model("vit_tiny_patch16_224", **sizes).eval()


def write_gradients(found: torch.nn.Module, pixels: torch.Tensor, path: Path) -> None:
    found(pixels).square().mean().backward()
    torch.save({name.removeprefix("module."): p.grad for name, p in found.named_parameters()}, path)


def main(out: Path) -> None:
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    pixels = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    share = pixels.chunk(ranks)[rank]
    write_gradients(DistributedDataParallel(accelerate(model())), share, out / f"before-{rank}.pt")
    write_gradients(accelerate(DistributedDataParallel(model())), share, out / f"after-{rank}.pt")
    if rank == 0:
        write_gradients(model(), pixels, out / "plain.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
