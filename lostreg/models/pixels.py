"""The pixels of images that are cut into patches, from the host to what a backbone is fed."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import cache, lru_cache
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lostreg.images.patches import PatchedPicture
from lostreg.models.backbone import Backbone


def pin(device: torch.device, memory: NDArray[np.uint8], wanted: bool) -> None:
    """Make memory such that a GPU takes from it without anybody waiting, or ordinary again; elsewhere nothing.

    Args:
        device: the GPU.
        memory: bytes that stay where they are until they are ordinary again.
        wanted: which of the two.
    """
    if device.type != "cuda":
        return
    cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    with torch.cuda.device(device):
        if wanted:
            cudart.cudaHostRegister(memory.ctypes.data, memory.nbytes, 0)  # if it cannot be had, copies take longer
        else:
            torch.cuda.synchronize()
            cudart.cudaHostUnregister(memory.ctypes.data)


def transfer(pictures: Sequence[PatchedPicture], device: torch.device) -> list[Tensor]:
    """The patches of neighbours of one grid together, on a device; but on a CPU each image alone, without a copy.

    There it costs nothing, and the pixels of all images in float32 never exist at once. A GPU takes them from pinned
    memory beside what it computes, and what is queued afterwards waits for them.

    Args:
        pictures: ordered by grid.
        device: of the model.

    Returns:
        Shape (images, rows, columns, patch, patch, 3) each, uint8.
    """
    images = [torch.from_numpy(picture.patches) for picture in pictures]
    if device.type == "cpu":
        return [image[None] for image in images]
    beside = _copying_stream(device)
    with nullcontext() if beside is None else torch.cuda.stream(beside):
        runs = []
        for shape, group in groupby(images, Tensor.size):
            run = list(group)
            runs.append(torch.empty(len(run), *shape, dtype=torch.uint8, device=device))
            for place, image in zip(runs[-1].unbind(), run, strict=True):
                place.copy_(image, non_blocking=beside is not None)
    if beside is not None:
        current = torch.cuda.current_stream(device)
        current.wait_stream(beside)
        for together in runs:
            together.record_stream(current)  # their memory is not taken again before it is done
    return runs


@cache
def _copying_stream(device: torch.device) -> torch.cuda.Stream | None:
    return torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]


def normalised(backbone: Backbone, runs: Iterable[Tensor], sizes: Sequence[tuple[int, int]]) -> Iterator[Tensor]:
    """What `Forward.start` takes.

    Args:
        backbone: whose mean and deviation the pixels are normalised by.
        runs: as `transfer` gives them.
        sizes: (height, width) of each image in pixels.

    Yields:
        Shape (images, N, patch * patch * 3), float32.
    """
    end = 0
    for run in runs:
        start, end = end, end + len(run)
        yield normalise_patches(run, sizes[start:end], backbone.mean, backbone.std)


def normalise_patches(
    patches: Tensor, sizes: Sequence[tuple[int, int]], mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """What a model is fed: normalised pixels, and zeros where a patch reaches beyond its image.

    Args:
        patches: of images of one grid, shape (B, rows, columns, patch, patch, 3), uint8, on the model's device.
        sizes: (height, width) of each image in pixels.
        mean: per channel, in [0, 1].
        std: per channel, in [0, 1].

    Returns:
        Shape (B, rows * columns, patch * patch * 3), float32, on that device.
    """
    batch, rows, columns, patch, _, _ = patches.shape
    shift, scale = (_patch_row(tuple(values), patch, patches.device) for values in (mean, std))
    values = patches.view(batch, rows * columns, -1).float().div_(255).sub_(shift).div_(scale)
    pixels, end = values.view(patches.shape), 0
    for (height, width), group in groupby(sizes):
        start, end = end, end + len(list(group))
        if height < rows * patch:
            pixels[start:end, -1, :, height - (rows - 1) * patch :] = 0
        if width < columns * patch:
            pixels[start:end, :, -1, :, width - (columns - 1) * patch :] = 0
    return values


@lru_cache(maxsize=32)
def _patch_row(channels: tuple[float, ...], patch: int, device: torch.device) -> Tensor:
    """One number a channel, for each number of a patch: over a last dimension of three, arithmetic is slow."""
    return torch.tensor(channels * patch**2, device=device)


def joined(pixels: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """Images of their patches: (B, N, patch * patch * 3), or the same in more dimensions, to (B, 3, H, W)."""
    rows, columns = grid
    cut = pixels.view(-1, rows, columns, patch, patch, 3)
    return cut.permute(0, 5, 1, 3, 2, 4).reshape(len(cut), 3, rows * patch, columns * patch)
