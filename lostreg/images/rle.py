"""COCO's run-length encoding of masks."""

from typing import Any, Final, TypedDict, cast

import numpy as np
from numpy.typing import NDArray

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
    height, width = _rle_size(rle, max_pixels)
    runs = _read_counts(rle.get("counts"))
    if not runs.size or runs.min() < 0 or runs.max() > height * width or runs.sum() != height * width:
        raise PredictionsError(f"malformed mask: expected runs of {width}x{height} pixels in all, found others")
    values = np.arange(len(runs)) % 2 == 1
    return np.repeat(values, runs).reshape(width, height).T


def _rle_size(rle: Any, max_pixels: int) -> tuple[int, int]:
    size = rle.get("size") if isinstance(rle, dict) else None
    if not isinstance(size, list) or len(size) != 2 or not all(type(side) is int and side > 0 for side in size):
        found = str(rle if size is None else size)[:60]
        raise PredictionsError(f'malformed mask: expected {{"size": [height, width], "counts": "..."}}, found {found}')
    if size[0] * size[1] > max_pixels:
        raise PredictionsError(f"malformed mask: {size[1]}x{size[0]} is more than the limit of {max_pixels:,} pixels")
    return size[0], size[1]


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
