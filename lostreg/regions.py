"""The result for one image."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Discovery:
    """The objects found in one image, and the patch maps they come from.

    Attributes:
        xyxy: boxes in pixels of the original image, shape (n, 4), float32, ``x1, y1, x2, y2`` with exclusive
            right and bottom edges, best first.
        scores: how clearly each box is an object, shape (n,), float32, in [0, 1]: see `lostreg.score`.
        seeds: row and column of each object's seed patch, shape (n, 2), int64.
        width: of the original image, in pixels.
        height: of the original image, in pixels.
        degrees: connections of each patch, shape (h, w), int64: low on what LOST takes for objects.
        mask: the patches of the first object, shape (h, w), bool.
        patch_width: of a patch, in pixels of the original image.
        patch_height: of a patch, in pixels of the original image.
        bias: the Gram bias that was used.
    """

    xyxy: NDArray[np.float32]
    scores: NDArray[np.float32]
    seeds: NDArray[np.int64]
    width: int
    height: int
    degrees: NDArray[np.int64]
    mask: NDArray[np.bool_]
    patch_width: float
    patch_height: float
    bias: float

    def __post_init__(self) -> None:
        count = len(self.xyxy)
        shapes = (self.xyxy.shape, self.scores.shape, self.seeds.shape)
        if shapes != ((count, 4), (count,), (count, 2)):
            raise ValueError(f"expected shapes (n, 4), (n,), (n, 2) for boxes, scores, seeds, got {shapes}")
        if self.degrees.shape != self.mask.shape or self.degrees.ndim != 2:
            raise ValueError(f"expected one patch grid, got degrees {self.degrees.shape} and mask {self.mask.shape}")

    def __len__(self) -> int:
        return len(self.xyxy)
