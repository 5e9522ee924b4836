"""COCO's run-length encoding of masks."""

from typing import Any, Final, TypedDict, cast

import numpy as np
from numpy.typing import NDArray

from lostreg.checks import FARTHEST, shown
from lostreg.defaults import MAX_PIXELS
from lostreg.errors import PredictionsError
from lostreg.images.masks import Mask


class Rle(TypedDict):
    """A mask as COCO's tools read and write it: ``size`` is (height, width), ``counts`` their string."""

    size: list[int]
    counts: str


_LONGEST_COUNT: Final = 7  # characters of five bits each: more than any image needs


def encode_rle(mask: Mask) -> Rle:
    """A mask in COCO's compressed run-length encoding.

    Args:
        mask: shape (height, width), bool, of at least one pixel.

    Raises:
        ValueError: if it is of another shape.
    """
    from pycocotools import mask as coco_mask

    if mask.ndim != 2 or not mask.size:
        raise ValueError(f"expected a mask (height, width) of at least one pixel, got {mask.shape}")
    encoded = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(side) for side in mask.shape], "counts": encoded["counts"].decode("ascii")}


def decode_rle(rle: Rle, *, max_pixels: int = MAX_PIXELS) -> Mask:
    """The mask that COCO's compressed run-length encoding stands for.

    Everything is checked before memory is taken for it: pycocotools would read past the end of a cut string, and
    fill whatever size is named.

    Args:
        rle: ``size`` is [height, width], ``counts`` a string.
        max_pixels: a larger mask is refused.

    Returns:
        Shape (height, width), bool.

    Raises:
        PredictionsError: if it is of another structure, too large, or the runs do not fill the size.
    """
    height, width = _size(rle)
    if height * width > max_pixels:
        raise PredictionsError(f"malformed mask: {width}x{height} is more than the limit of {max_pixels:,} pixels")
    runs = _runs(rle)
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


def rle_area(rle: Rle, size: tuple[int, int] | None = None) -> int:
    """How many pixels a mask has, by its runs alone: it may be of any size, and no memory is taken for that.

    Args:
        rle: as for `decode_rle`.
        size: (height, width) that it should have; None for any.

    Raises:
        PredictionsError: if it is of another structure or size, or the runs do not fill its size.
    """
    if size not in (None, _size(rle)):
        height, width = _size(rle)
        raise PredictionsError(f"expected masks of {size[1]}x{size[0]} pixels, found one of {width}x{height}")
    return int(_runs(rle)[1::2].sum())


def sample_rle(rle: Rle, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> Mask:
    """Some rows and columns of a mask, of whatever size: no memory is taken for the others.

    Args:
        rle: as for `decode_rle`.
        rows: of the mask.
        columns: of the mask.

    Returns:
        Shape (rows, columns), bool.

    Raises:
        PredictionsError: if it is of another structure, or the runs do not fill its size.
    """
    ends = _runs(rle).cumsum()
    places = columns[None, :] * _size(rle)[0] + rows[:, None]  # down the columns
    found: Mask = np.searchsorted(ends, places, side="right") % 2 == 1
    return found


def _size(rle: Any) -> tuple[int, int]:
    """Height and width."""
    size = rle.get("size") if isinstance(rle, dict) else None
    if isinstance(size, list) and len(size) == 2 and all(type(side) is int and 0 < side <= FARTHEST for side in size):
        return size[0], size[1]
    found = shown(rle if size is None else size)
    raise PredictionsError(f'malformed mask: expected {{"size": [height, width], "counts": "..."}}, found {found}')


def _runs(rle: Rle) -> NDArray[np.int64]:
    """The lengths of the runs, zeros first, if they fill the mask."""
    height, width = _size(rle)
    runs = _read_counts(rle.get("counts"))
    if not runs.size or runs.min() < 0 or runs.max() > height * width or runs.sum() != height * width:
        raise PredictionsError(f"malformed mask: expected runs of {width}x{height} pixels in all, found others")
    return runs


def _read_counts(counts: Any) -> NDArray[np.int64]:
    """The lengths of the runs: five bits a character, the lowest first; from the fourth on, differences."""
    if not isinstance(counts, str):
        raise PredictionsError(f"malformed mask: expected counts as a compressed string, found {type(counts).__name__}")
    codes = np.frombuffer(counts.encode("utf-8", "surrogatepass"), dtype=np.uint8).astype(np.int64) - ord("0")
    ends = np.flatnonzero((codes & 32) == 0)
    lengths = np.diff(ends, prepend=-1)
    is_whole = ends.size and ends[-1] == len(codes) - 1 and lengths.max() <= _LONGEST_COUNT
    if not is_whole or codes.min() < 0 or codes.max() > 63:
        raise PredictionsError(f"malformed mask: expected counts as COCO compresses them, found {counts[:40]!r}")
    starts = ends - lengths + 1
    places = np.arange(len(codes)) - np.repeat(starts, lengths)
    values = np.add.reduceat((codes & 31) << (5 * places), starts)
    values -= np.where(codes[ends] & 16, 1 << (5 * lengths), 0)
    values[1::2] = values[1::2].cumsum()
    values[2::2] = values[2::2].cumsum()
    return cast("NDArray[np.int64]", values)
