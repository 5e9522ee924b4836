"""An image cut into patches, ready for a device."""

import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lostreg.images.decode import Picture
from lostreg.images.files import ImageFile
from lostreg.images.stores import StoredImage


def patch_grid(pixels: NDArray[np.uint8], patch_size: int) -> tuple[int, int]:
    """Rows and columns of patches that cover the pixels: the last ones may be partly padding."""
    height, width = pixels.shape[:2]
    return -(-height // patch_size), -(-width // patch_size)


@dataclass(frozen=True)
class PatchedPicture:
    """An image cut into patches, ready for a device.

    Attributes:
        patches: RGB, shape (rows, columns, patch, patch, 3), uint8; zeros beyond the image's right and bottom edges.
        size: (height, width) of what was cut, in pixels.
        width: of the original image, in pixels.
        height: of the original image, in pixels.
        source: the file that it comes from, or its place in another one or in a store, if it comes from one.
    """

    patches: NDArray[np.uint8]
    size: tuple[int, int]
    width: int
    height: int
    source: "str | os.PathLike[str] | ImageFile | StoredImage | None" = None

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.patches.shape[0], self.patches.shape[1]

    @property
    def scale(self) -> tuple[float, float]:
        """Scale (x, y) from resized to original pixels."""
        return self.width / self.size[1], self.height / self.size[0]

    @property
    def pixels(self) -> NDArray[np.uint8]:
        """What was cut, put together again: shape (*size, 3), uint8."""
        rows, columns, patch, _, _ = self.patches.shape
        whole = self.patches.transpose(0, 2, 1, 3, 4).reshape(rows * patch, columns * patch, 3)
        return np.ascontiguousarray(whole[: self.size[0], : self.size[1]])


def cut_patches(
    picture: Picture, patch_size: int, allocate: Callable[[tuple[int, ...]], NDArray[np.uint8]] | None = None
) -> PatchedPicture:
    """Cut an image into patches, row by row, each with its pixels side by side in memory.

    Args:
        picture: a decoded image.
        patch_size: side of a patch in pixels.
        allocate: makes the array of a shape that patches are written into, such as one of pinned memory.
    """
    pixels = picture.pixels
    height, width = pixels.shape[:2]
    rows, columns = patch_grid(pixels, patch_size)
    if (height, width) != (rows * patch_size, columns * patch_size):
        padded = np.zeros((rows * patch_size, columns * patch_size, 3), dtype=np.uint8)
        padded[:height, :width] = pixels
        pixels = padded
    cut = pixels.reshape(rows, patch_size, columns, patch_size, 3).transpose(0, 2, 1, 3, 4)
    patches = np.empty(cut.shape, dtype=np.uint8) if allocate is None else allocate(cut.shape)
    np.copyto(patches, cut)
    return PatchedPicture(patches, (height, width), picture.width, picture.height)
