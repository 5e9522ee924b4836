"""The pixels of images that are cut into patches, from the host to what a backbone is fed."""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import groupby

import torch
from torch import Tensor

from lostreg.images.patches import PatchedPicture
from lostreg.models.backbone import Backbone


def transfer(pictures: Sequence[PatchedPicture], device: torch.device) -> list[Tensor]:
    """Each image's patches on a device, (rows, columns, patch, patch, 3), uint8; from pinned memory they are queued."""
    patches = (torch.from_numpy(picture.patches) for picture in pictures)
    return [image.to(device, non_blocking=device.type == "cuda") for image in patches]


def normalised(backbone: Backbone, patches: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> Iterator[Tensor]:
    """What `Forward.start` takes: neighbours of one grid together, but on a CPU each image alone.

    There it costs nothing, and the pixels of all images in float32 never exist at once.

    Args:
        backbone: whose mean and deviation the pixels are normalised by.
        patches: as `transfer` gives them.
        sizes: (height, width) of each image in pixels.

    Yields:
        Shape (images, N, patch * patch * 3), float32.
    """
    alone = backbone.device.type == "cpu"
    runs = [[image] for image in patches] if alone else [list(run) for _, run in groupby(patches, Tensor.size)]
    end = 0
    for run in runs:
        start, end = end, end + len(run)
        together = run[0][None] if len(run) == 1 else torch.stack(run)
        yield normalise_patches(together, sizes[start:end], backbone.mean, backbone.std)


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
