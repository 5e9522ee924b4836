"""Boxes: their overlap, and the way from patches to pixels."""

from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lostreg.checks import FARTHEST, shown
from lostreg.errors import OptionError
from lostreg.images.patches import PatchedPicture

Value = TypeVar("Value", np.uint8, np.bool_)


def pairwise_iou(boxes: ArrayLike, others: ArrayLike) -> NDArray[np.float64]:
    """Intersection over union of every box with every other.

    Args:
        boxes: shape (n, 4), ``x1, y1, x2, y2`` with exclusive right and bottom edges.
        others: shape (m, 4), likewise.

    Returns:
        Shape (n, m), in [0, 1]; boxes without area overlap nothing.

    Raises:
        OptionError: as `as_boxes`.

    Example:
        >>> lostreg.images.boxes.pairwise_iou([[0, 0, 10, 10]], [[0, 0, 10, 5], [20, 20, 30, 30]]).tolist()
        [[0.5, 0.0]]
    """
    first, second = as_boxes(boxes), as_boxes(others)
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    overlap = np.clip(high - low, 0.0, None).prod(axis=2)
    union = _areas(first)[:, None] + _areas(second)[None, :] - overlap
    iou: NDArray[np.float64] = np.divide(overlap, union, out=np.zeros_like(overlap), where=union > 0)
    return iou


def _areas(boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    areas: NDArray[np.float64] = np.clip(boxes[:, 2:] - boxes[:, :2], 0.0, None).prod(axis=1)
    return areas


def as_boxes(boxes: ArrayLike) -> NDArray[np.float64]:
    """Boxes as an array of shape (n, 4), float64.

    Raises:
        OptionError: if they have another shape, a coordinate is no number within ±2**31, where areas are exact
            enough and finite, or corners are swapped.
    """
    array = numbers(boxes, "boxes")
    if array.size == 0:
        return array.reshape(0, 4)
    if array.ndim != 2 or array.shape[1] != 4:
        raise OptionError(f"boxes must have shape (n, 4), not {array.shape}")
    if not (np.abs(array) <= FARTHEST).all():
        raise OptionError(f"boxes must have finite coordinates within ±{FARTHEST}, not {shown(array)}")
    if (array[:, :2] > array[:, 2:]).any():
        raise OptionError(f"boxes must be x1, y1, x2, y2 with x1 <= x2 and y1 <= y2, not {shown(array)}")
    return array


def numbers(values: ArrayLike, name: str) -> NDArray[np.float64]:
    """An array of real numbers, float64; raises `OptionError` for what holds others, such as text."""
    try:
        array = np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)  # a tensor
        if array.size and array.dtype.kind not in "iufO":
            raise TypeError(f"they are of {array.dtype}")
        return array.astype(np.float64)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise OptionError(f"{name} must be numbers, not {shown(values)}: {str(error).partition(chr(10))[0]}") from error


def cells(pixels: int, size: float, count: int) -> NDArray[np.int64]:
    """The cell that each pixel's centre lies in, along one side of an image; the last one may be cut.

    Args:
        pixels: along that side.
        size: of a cell, in pixels.
        count: of cells.

    Returns:
        Shape (pixels,), in [0, count - 1].
    """
    return ((np.arange(pixels) + 0.5) / size).astype(np.int64).clip(max=count - 1)


def spread(values: NDArray[Value], size: tuple[int, ...], cell: tuple[float, float]) -> NDArray[Value]:
    """Values of cells, such as patches, as a picture: each pixel has that of the cell which its centre lies in.

    Args:
        values: of the cells, shape (rows, columns).
        size: (height, width) of the picture, in pixels; the last cells may reach beyond it.
        cell: (height, width) of a cell, in these pixels.

    Returns:
        Shape (height, width), of the type of the values.

    Example:
        >>> lostreg.images.boxes.spread(np.array([[1, 2]], np.uint8), (2, 3), (2, 1.5)).tolist()
        [[1, 2, 2], [1, 2, 2]]
    """
    rows = cells(size[0], cell[0], values.shape[0])
    columns = cells(size[1], cell[1], values.shape[1])
    picture: NDArray[Value] = values[rows[:, None], columns[None, :]]
    return picture


def in_pixels(
    boxes: NDArray[np.int64] | NDArray[np.float32], picture: PatchedPicture, patch_size: int
) -> NDArray[np.float64]:
    """Boxes in patches as boxes in pixels of the original image; shape (..., 4) both.

    Args:
        boxes: ``x1, y1, x2, y2`` with exclusive right and bottom edges, in patches.
        picture: the image that was cut into patches.
        patch_size: side of a patch, in pixels of the resized image.
    """
    height, width = picture.size
    pixels: NDArray[np.float64] = np.minimum(boxes * patch_size, [width, height] * 2) * (picture.scale * 2)
    return pixels
