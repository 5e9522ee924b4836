"""Between patches and the pixels of maps: what a patch should say, and what patches say about each pixel."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from lostreg.images.boxes import cells
from lostreg.models.forward import Grid

_BAND_VALUES: Final = 1 << 24  # outputs of pixels that are computed together


@dataclass(frozen=True)
class Frame:
    """How an image's patches lie over its map.

    Attributes:
        grid: rows and columns of patches; the last ones may reach beyond the image.
        cell: (height, width) of a patch in pixels of the map.
    """

    grid: Grid
    cell: tuple[float, float]

    def patch_of_pixels(self, size: tuple[int, int]) -> NDArray[np.int64]:
        """The row-major place of the patch that each pixel's centre lies in, shape ``size``."""
        rows, columns = (cells(*side) for side in zip(size, self.cell, self.grid, strict=True))
        places: NDArray[np.int64] = rows[:, None] * self.grid[1] + columns[None, :]
        return places


def class_shares(mask: NDArray[np.int64], frame: Frame, classes: int) -> NDArray[np.float32]:
    """Which share of each patch's area is of each class: the cross entropy of a patch against it is that of its pixels.

    Args:
        mask: classes from 0, -1 where it is ignored, shape (height, width).
        frame: of the patches.
        classes: how many there are.

    Returns:
        Shape (N, classes); rows sum to less than 1 where pixels are ignored, or the patch reaches beyond the image.
    """
    valid = mask >= 0
    places = frame.patch_of_pixels(mask.shape)[valid] * classes + mask[valid]
    counts = np.bincount(places, minlength=frame.grid[0] * frame.grid[1] * classes)
    return (counts.reshape(-1, classes) / (frame.cell[0] * frame.cell[1])).astype(np.float32)


def mean_depths(depths: NDArray[np.float32], frame: Frame) -> NDArray[np.float32]:
    """The mean depth of each patch's pixels, and the share of its area that it is the mean of.

    The squared error of a patch against its pixels is, up to a constant, its own against their mean times their number.

    Args:
        depths: NaN where there is none, shape (height, width).
        frame: of the patches.

    Returns:
        Shape (N, 2): mean, 0 where there is none; share.
    """
    valid = ~np.isnan(depths)
    places, patches = frame.patch_of_pixels(depths.shape)[valid], frame.grid[0] * frame.grid[1]
    counts = np.bincount(places, minlength=patches)
    sums = np.bincount(places, weights=depths[valid], minlength=patches)
    shares = counts / (frame.cell[0] * frame.cell[1])
    return np.stack([sums / np.maximum(counts, 1), shares], axis=1).astype(np.float32)


def enlarge(outputs: Tensor, frame: Frame, size: tuple[int, int]) -> Iterator[tuple[slice, Tensor]]:
    """What patches say about each pixel, interpolated bilinearly between their centres, band by band.

    Args:
        outputs: of the patches, row by row, shape (N, C).
        frame: of the patches.
        size: (height, width) of the map in pixels.

    Yields:
        The rows of pixels, and their outputs of shape (C, rows, width).
    """
    image = outputs.T.reshape(1, -1, *frame.grid)
    # A pixel's centre from -1, the upper or left edge of the first patch, to 1, the far edge of the last; beyond the
    # centres of these patches it is as there.
    y, x = (
        ((torch.arange(pixels, device=outputs.device) + 0.5) / (cell * patches) * 2 - 1).clamp(
            1 / patches - 1, 1 - 1 / patches
        )
        for pixels, cell, patches in zip(size, frame.cell, frame.grid, strict=True)
    )
    band = max(1, _BAND_VALUES // (outputs.shape[1] * size[1]))
    for top in range(0, size[0], band):
        rows = y[top : top + band]
        points = torch.stack(torch.meshgrid(x, rows, indexing="xy"), dim=2)
        picture = functional.grid_sample(image, points[None], align_corners=False)
        yield slice(top, top + len(rows)), picture[0]


def predicted_classes(outputs: Tensor, frame: Frame, size: tuple[int, int]) -> NDArray[np.int64]:
    """The class with the highest output at each pixel, the lowest of several; shape ``size``."""
    bands = [picture.argmax(dim=0).cpu().numpy() for _, picture in enlarge(outputs, frame, size)]
    return np.concatenate(bands)


def predicted_depths(outputs: Tensor, frame: Frame, size: tuple[int, int]) -> NDArray[np.float32]:
    """The depth at each pixel, shape ``size``; outputs (N, 1)."""
    bands: list[NDArray[Any]] = [picture[0].cpu().numpy() for _, picture in enlarge(outputs, frame, size)]
    return np.concatenate(bands).astype(np.float32)
