"""COCO's run-length masks made small enough for a page, whatever a file may hold."""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from lostreg.errors import PredictionsError
from lostreg.images.rle import decode_rle

_SIDE: Final = 320


def small_mask(rle: Any, side: int = _SIDE) -> dict[str, Any] | None:
    """A mask at a page's size.

    Args:
        rle: as COCO has it, of the whole image.
        side: the longer side of the result at most, in pixels.

    Returns:
        ``size``, [height, width], and ``runs``, the lengths of runs down the columns, zeros first; None for what is
        no mask.
    """
    try:
        mask = decode_rle(rle)
    except PredictionsError:
        return None
    height, width = mask.shape
    scale = min(1.0, side / max(height, width))
    high, wide = max(1, round(height * scale)), max(1, round(width * scale))
    rows = ((np.arange(high) + 0.5) * height / high).astype(int)
    columns = ((np.arange(wide) + 0.5) * width / wide).astype(int)
    return {"size": [high, wide], "runs": _runs(mask[rows][:, columns].T.ravel())}


def _runs(values: NDArray[np.bool_]) -> list[int]:
    """Lengths of runs, zeros first."""
    edges = np.flatnonzero(np.diff(values)) + 1
    lengths: list[int] = np.diff(np.concatenate([[0], edges, [len(values)]])).tolist()
    return [0, *lengths] if values[0] else lengths
