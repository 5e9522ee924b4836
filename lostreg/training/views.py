"""Views of a picture, shifted by whole patches and mirrored, and what they agree on.

A picture is a square of patches somewhat larger than what the model is fed: each view is a window of it, so nothing is
made up at the edges, and a patch of the picture is exactly a patch of each view that contains it, at another position.
What belongs to the content comes back in every view; what belongs to a position is at another patch in each.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lostreg.errors import OptionError
from lostreg.models.forward import Grid
from lostreg.models.table import ReadOnly

SHIFT: Final = 0.15  # of a window's side, in each direction
_TRIMMED: Final = 0.5  # share of the views that a trimmed mean keeps


class View(NamedTuple):
    """A window of a picture: the row and column of its first patch there, and whether it is mirrored left to right."""

    row: int
    column: int
    mirrored: bool


@dataclass(frozen=True)
class Layout:
    """How large windows and pictures are.

    Attributes:
        patch: side of a patch in pixels.
        window: side of a window in patches.
        margin: patches by which a window can be shifted from the middle, in each direction.
    """

    patch: int
    window: int
    margin: int

    @classmethod
    def of(cls, side: int, patch: int) -> "Layout":
        """For windows of at most so many pixels a side.

        Raises:
            OptionError: if they are so small that a shift of `SHIFT` is less than a patch.
        """
        window = side // patch
        least = next(count for count in range(1, 100) if int(SHIFT * count) >= 1)
        if window < least:
            raise OptionError(
                f"max_side {side} is too small: views are shifted by whole patches of {patch} pixels, at most "
                f"{SHIFT:.0%} of a side, which takes at least {least * patch} pixels"
            )
        return cls(patch, window, int(SHIFT * window))

    @property
    def picture(self) -> int:
        """Side of a picture in patches."""
        return self.window + 2 * self.margin

    @property
    def shape(self) -> Grid:
        """Rows and columns of a window."""
        return self.window, self.window

    @property
    def pixels(self) -> int:
        """Side of a picture in pixels."""
        return self.picture * self.patch

    @property
    def middle(self) -> View:
        """The window in the middle, as it is."""
        return View(self.margin, self.margin, False)

    @property
    def shifts(self) -> int:
        """How many windows a picture has, mirrored ones counted apart."""
        return 2 * (2 * self.margin + 1) ** 2


def draw_views(layout: Layout, count: int, generator: np.random.Generator) -> list[View]:
    """Different views, the first of them the middle as it is.

    Raises:
        OptionError: if there are not so many.
    """
    if not 1 <= count <= layout.shifts:
        raise OptionError(
            f"views must be from 1 to {layout.shifts} for windows of {layout.window} patches, not {count}"
        )
    side = 2 * layout.margin + 1
    every = [View(row, column, mirrored) for row in range(side) for column in range(side) for mirrored in (False, True)]
    every.remove(layout.middle)
    chosen = generator.choice(len(every), count - 1, replace=False)
    return [layout.middle, *(every[place] for place in chosen)]


def crop(picture: Tensor, view: View, shape: Grid) -> Tensor:
    """What a view shows of a picture: (rows, columns, ...) to (*shape, ...), of patches or of their features.

    The numbers of a patch stay as they are: mirroring pixels within patches is up to the caller.
    """
    window = picture[view.row : view.row + shape[0], view.column : view.column + shape[1]]
    return window.flip(1) if view.mirrored else window


def lay_back(features: Tensor, views: Sequence[View], layout: Layout) -> Tensor:
    """Features of views, laid on the picture's own patches.

    Args:
        features: shape (views, window * window, D).
        views: what they are of.
        layout: of the windows.

    Returns:
        Shape (views, picture * picture, D); not a number where a view does not reach.
    """
    count, _, width = features.shape
    laid = torch.full((count, layout.picture, layout.picture, width), torch.nan, device=features.device)
    for place, view, window in zip(laid, views, features.view(count, layout.window, layout.window, width), strict=True):
        straight = window.flip(1) if view.mirrored else window
        place[view.row : view.row + layout.window, view.column : view.column + layout.window] = straight
    return laid.flatten(1, 2)


def _mean(laid: Tensor) -> Tensor:
    return laid.nanmean(dim=0)


def _median(laid: Tensor) -> Tensor:
    """Number by number; of an even number of views the mean of the two in the middle."""
    count = laid[..., 0].isfinite().sum(dim=0)  # (patches,)
    ordered = laid.sort(dim=0).values  # what is not a number comes last
    middle = [((count - 1).clamp(min=0) // 2), count // 2]
    picked = [ordered.gather(0, place[None, :, None].expand(1, *laid.shape[1:]))[0] for place in middle]
    return (picked[0] + picked[1]) / 2


def _trimmed(laid: Tensor) -> Tensor:
    """Mean of the half of the views that lie nearest to the median, patch by patch."""
    distance = torch.linalg.vector_norm(laid - _median(laid), dim=2).nan_to_num(nan=torch.inf)  # (views, patches)
    count = distance.isfinite().sum(dim=0)
    kept = (count.float() * _TRIMMED).ceil()
    rank = distance.argsort(dim=0).argsort(dim=0)
    return torch.where((rank < kept)[..., None], laid, torch.nan).nanmean(dim=0)


AGGREGATES: Final[Mapping[str, Callable[[Tensor], Tensor]]] = ReadOnly(
    {"median": _median, "mean": _mean, "trimmed": _trimmed}
)
"""What views agree on, by name: (views, patches, D), some not a number, to (patches, D), as many not as no view saw."""
