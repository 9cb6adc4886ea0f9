"""Decoded radiographs kept after the first pass, so that later ones decode nothing."""

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError

CacheName = Literal["auto", "gpu", "ram", "disk", "off"]
_GATHERED = 64  # images gathered at once on a GPU: their indices take eight times their pixels


def choose_cache(wanted: CacheName, size: int, *, gpu: bool, processes: int, folder: Path) -> CacheName:
    """Where `size` bytes go: `wanted`, or for "auto" the first of GPU memory (where images are made there), host memory
    and disk of which they take at most half of what is free, or else "off".

    Args:
        processes: how many share host memory and disk; a GPU belongs to one.
        folder: where a file would be.

    Raises:
        DataError: if `wanted` is no such place, or lacks the room.
    """
    if wanted not in get_args(CacheName):
        raise DataError(f"cache is {wanted!r}: expected one of {', '.join(get_args(CacheName))}.")
    if wanted == "gpu" and not gpu:
        raise DataError("cache 'gpu' needs the images to be made on a GPU: use ram, disk or auto.")
    if wanted == "disk" and not folder.is_dir():
        raise DataError(f"{folder}: no such folder, for a cache on disk.")
    if wanted == "off":
        return wanted
    room = {
        "gpu": lambda: _free_gpu_memory() if gpu else 0,
        "ram": lambda: available_memory() // processes,
        "disk": lambda: shutil.disk_usage(folder).free // processes,
    }
    if wanted == "auto":
        return next((place for place, free in room.items() if size <= free() // 2), "off")
    if size > (free := room[wanted]()):
        raise DataError(
            f"cache {wanted!r} needs {size / 1e9:.3g} GB, but {free / 1e9:.3g} GB are free: use another, or auto."
        )
    return wanted


def _free_gpu_memory() -> int:
    """Bytes, with those that PyTorch holds for its next tensors."""
    return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


def available_memory() -> int:
    """Bytes of host memory that this process can still take: the machine's, or one of its control groups' if less."""
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    free = next(int(words[1]) * 1024 for words in lines if words[0] == "MemAvailable:")
    for group, limit, used in _control_groups():
        if (group / limit).is_file() and (most := (group / limit).read_text().strip()) != "max":
            counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            files = int(counts.get("total_inactive_file", counts["inactive_file"]))  # the kernel gives these up
            free = min(free, int(most) - int((group / used).read_text()) + files)
    return max(free, 0)


def _control_groups() -> Iterator[tuple[Path, str, str]]:
    """Each folder that may limit this process's memory, with the names of its files for the limit and what is used."""
    known = Path("/proc/self/cgroup").read_text().splitlines() if Path("/proc/self/cgroup").is_file() else []
    names = {line.split(":", 2)[1]: line.split(":", 2)[2] for line in known}
    for root, controller, files in (
        (Path("/sys/fs/cgroup"), "", ("memory.max", "memory.current")),
        (Path("/sys/fs/cgroup/memory"), "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")),
    ):
        own = root / names.get(controller, "").lstrip("/")  # in a container it may be the root itself
        for group in (own, *own.parents):
            if group.is_relative_to(root):
                yield group, *files


class PixelCache:
    """Images of different sizes, one after the other in one array that is as large as all of them.

    A file has no name: it vanishes with its process, however that ends, so that none is ever found half written.

    Args:
        shapes: int [N, 2], height and width of each image.
        place: "gpu", "ram" or "disk".
        folder: where the file goes.

    Raises:
        DataError: if there is no room.
    """

    def __init__(self, shapes: np.ndarray, place: CacheName, folder: Path):
        self._shapes = shapes.astype(np.int64)
        self._stops = np.cumsum(self._shapes.prod(1))
        size = max(int(self._stops[-1]), 1)
        try:
            if place == "gpu":
                self._pixels = torch.empty(size, dtype=torch.uint8, device="cuda")
            elif place == "ram":
                self._pixels = np.empty(size, np.uint8)
            else:
                with tempfile.TemporaryFile(dir=folder) as file:
                    os.posix_fallocate(file.fileno(), 0, size)  # a disk that fills up later would end the process
                    self._pixels = np.memmap(file, np.uint8, "r+", shape=size)
        except (OSError, MemoryError, torch.OutOfMemoryError) as error:
            raise DataError(f"cache {place!r} needs {size / 1e9:.3g} GB: {error}") from None

    def put(self, numbers: Iterable[int], images: Iterable[np.ndarray | Tensor]) -> None:
        """Keep images, uint8 [H, W, 1], under their numbers."""
        for number, image in zip(numbers, images, strict=True):
            self._image(number)[:] = image

    def get(self, numbers: np.ndarray) -> Sequence[np.ndarray] | Tensor:
        """The images of int64 [n], uint8 [H, W, 1] each; from a GPU as one batch in which smaller ones are padded."""
        if isinstance(self._pixels, np.ndarray):
            return [self._image(number) for number in numbers]
        return gather(self._pixels, self._stops[numbers], self._shapes[numbers])

    def _image(self, number: int) -> np.ndarray | Tensor:
        height, width = self._shapes[number]
        stop = self._stops[number]
        return self._pixels[stop - height * width : stop].reshape(height, width, 1)


def gather(pixels: Tensor, stops: np.ndarray, shapes: np.ndarray) -> Tensor:
    """Images out of `pixels`, one batch [n, H, W, 1] as high and wide as the largest; zero beyond a smaller one.

    One image a call would keep a CPU busy with starting copies.
    """
    if not len(stops):
        return pixels.new_empty(0, 0, 0, 1)
    starts = torch.from_numpy(stops - shapes.prod(1)).to(pixels.device)
    heights, widths = (torch.from_numpy(side).to(pixels.device)[:, None, None] for side in shapes.T)
    rows, columns = (torch.arange(side, device=pixels.device) for side in shapes.max(0).tolist())
    batch = []
    for start, height, width in zip(*(x.split(_GATHERED) for x in (starts, heights, widths)), strict=True):
        inside = (rows[:, None] < height) & (columns < width)
        at = start[:, None, None] + rows[:, None] * width + columns
        batch.append(torch.where(inside, pixels[at.where(inside, 0)], 0))
    return torch.cat(batch)[..., None]
