"""DINO-seg, the baseline of LOST (Siméoni et al., BMVC 2021, section 4) that needs no graph: where the CLS token looks.

The patches that one head of the last layer's attention gives 60 % of the CLS token's attention to (Caron et al., DINO,
ICCV 2021), and of them the largest 4-connected part. LOST's published code leaves one part out of the comparison, the
last in reading order, and boxes what is not attended to where there is one part alone; here each part counts.
"""

from dataclasses import dataclass
from typing import Final

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lostreg.errors import OptionError
from lostreg.methods.lost import Maps, Objects, main_objects, require_finite
from lostreg.methods.objectness import Scorer, object_scores

HEAD: Final = 4  # the fifth: what LOST's published code takes, of the six of a ViT-S

_SHARE: Final = 0.6  # of the attention to all patches


@dataclass(frozen=True)
class AttendedMaps(Maps):
    """What the CLS token of each image attends to.

    Attributes:
        masks: the fewest patches that get 60 % of the attention, shape (B, N), bool.
        ranks: how many patches are attended to more than each one, shape (B, N), int64; of equal ones the first leads.
        finite: whether each image's attention was, shape (B,), bool.
    """

    masks: Tensor
    ranks: Tensor
    finite: Tensor


@torch.no_grad()
def attended_maps(attention: Tensor, grid: tuple[int, int], head: int = HEAD) -> AttendedMaps:
    """DINO-seg up to the connected components.

    Args:
        attention: the last layer's, of the CLS token to each patch, shape (B, heads, N), float32, not negative; of what
            size does not matter.
        grid: (h, w), rows and columns of patches; N = h * w.
        head: whose attention counts, from 0.

    Returns:
        `AttendedMaps` on the device of the attention. Whether this was finite is noted, not raised.

    Raises:
        OptionError: if the shapes disagree, or there is no such head.
    """
    height, width = grid
    if attention.ndim != 3 or attention.shape[2] != height * width or not attention.shape[2]:
        raise OptionError(
            f"attention must have shape (B, heads, N) with N = {height} * {width} > 0, not {tuple(attention.shape)}"
        )
    if not 0 <= head < attention.shape[1]:
        raise OptionError(f"dinoseg reads head {head}, counted from 0, of the attention: it has {attention.shape[1]}")
    values, order = attention[:, head].double().sort(dim=1, descending=True, stable=True)
    before = values.cumsum(dim=1) - values
    kept = before < _SHARE * values.sum(dim=1, keepdim=True)
    kept[:, 0] |= True
    places = torch.arange(height * width, device=attention.device).expand_as(order)
    finite = attention[:, head].isfinite().all(dim=1)
    return AttendedMaps(
        torch.zeros_like(kept).scatter(1, order, kept), torch.zeros_like(order).scatter(1, order, places), finite
    )


def dinoseg_objects(
    maps: AttendedMaps, features: Tensor, grid: tuple[int, int], scorer: Scorer = object_scores
) -> list[Objects]:
    """DINO-seg's object of each image: the largest part, of equal ones the first in reading order.

    Args:
        maps: on the CPU.
        features: what the score compares, shape (B, N, D), float32, on any device, which is waited for.
        grid: (h, w), rows and columns of patches.
        scorer: what scores the objects.

    Returns:
        One `Objects` an image, of one object each: its seed is its patch that is attended to most, its bias is 0, as
        there is none, and the heat is the ranks.

    Raises:
        OptionError: if attention or features were not finite.
    """
    require_finite(maps.finite & features.sum(dim=2).isfinite().all(dim=1).cpu())
    ranks = maps.ranks.numpy().reshape(-1, *grid)
    masks = np.array([_largest_part(mask.reshape(grid)) for mask in maps.masks.numpy()], dtype=bool).reshape(
        ranks.shape
    )
    seeds = np.where(masks, ranks, grid[0] * grid[1]).reshape(-1, grid[0] * grid[1]).argmin(axis=1)
    return main_objects(features, masks, seeds, ranks, 0.0, scorer)


def _largest_part(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The 4-connected part of the most patches; (h, w), bool, not empty."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=4)
    sizes = stats[1:, cv2.CC_STAT_AREA]
    part: NDArray[np.bool_] = labels == 1 + sizes.argmax()
    return part
