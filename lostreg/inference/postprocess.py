"""From patches to pixels: what LOST found in a batch, as the results that users get."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Final, Literal, get_args

import numpy as np

from lostreg.defaults import CLEAR_SCORE
from lostreg.errors import OptionError
from lostreg.images.boxes import _scale, in_pixels
from lostreg.images.masks import mask_boxes, refine
from lostreg.images.patches import PatchedPicture
from lostreg.inference.discovery import Discovery
from lostreg.methods.lost import Objects
from lostreg.methods.multi_object import Found, find_several

BoxFrom = Literal["patches", "mask"]
BOX_SOURCES: Final[tuple[BoxFrom, ...]] = get_args(BoxFrom)


@dataclass(frozen=True)
class ObjectOptions:
    """What is wanted of each image beyond LOST's options.

    Attributes:
        max_objects: how many objects at most, at least 1.
        min_score: further objects with a lower score are left out and end the search, in [0, 1].
        refine: whether masks are sharpened on the pixels.
        box_from: whether boxes are those of the patches, or of the refined masks.

    Raises:
        OptionError: if a value is out of its range, or boxes are wanted from masks that are not.
    """

    max_objects: int = 1
    min_score: float = CLEAR_SCORE
    refine: bool = False
    box_from: BoxFrom = "patches"

    def __post_init__(self) -> None:
        if isinstance(self.max_objects, bool) or not isinstance(self.max_objects, Integral) or self.max_objects < 1:
            raise OptionError(f"max_objects must be an integer of at least 1, not {self.max_objects!r}")
        if isinstance(self.min_score, bool) or not isinstance(self.min_score, Real) or not 0 <= self.min_score <= 1:
            raise OptionError(f"min_score must be a number in [0, 1], not {self.min_score!r}")
        object.__setattr__(self, "max_objects", int(self.max_objects))  # of NumPy's, too
        object.__setattr__(self, "min_score", float(self.min_score))
        if self.box_from not in BOX_SOURCES:
            raise OptionError(f"box_from must be one of {', '.join(BOX_SOURCES)}, not {self.box_from!r}")
        if self.box_from == "mask" and not self.refine:
            raise OptionError("boxes can be taken from masks that are refined: ask for refined masks, too")

    @property
    def options(self) -> dict[str, Any]:
        """As plain values; a score that decides nothing is None."""
        return {**dataclasses.asdict(self), "min_score": self.min_score if self.max_objects > 1 else None}


def discoveries(
    objects: Objects, pictures: Sequence[PatchedPicture], patch_size: int, k_patches: int, asked: ObjectOptions
) -> list[Discovery]:
    """The results of a batch.

    Args:
        objects: of images of equal grid.
        pictures: these images.
        patch_size: side of a patch, in pixels of what was cut.
        k_patches: as for `lostreg.lost_boxes`.
        asked: how many objects, and what of them.
    """
    found = find_several(objects, k_patches, asked.max_objects, asked.min_score)
    return [to_discovery(one, picture, patch_size, asked) for one, picture in zip(found, pictures, strict=True)]


def to_discovery(found: Found, picture: PatchedPicture, patch_size: int, asked: ObjectOptions) -> Discovery:
    """One image's result, with boxes in pixels of the original image.

    Args:
        found: its objects, in patches.
        picture: that image.
        patch_size: side of a patch, in pixels of what was cut.
        asked: what is wanted of them.
    """
    scale_x, scale_y = _scale(picture)
    refined = refine(picture.pixels, found.masks, (patch_size, patch_size)) if asked.refine else None
    if asked.box_from == "mask" and refined is not None:
        boxes = mask_boxes(refined, picture.width, picture.height)
    else:
        boxes = in_pixels(found.xyxy, picture, patch_size).astype(np.float32)
    return Discovery(
        xyxy=boxes,
        scores=found.scores,
        seeds=found.seeds,
        biases=found.biases,
        masks=found.masks,
        degrees=found.degrees,
        width=picture.width,
        height=picture.height,
        patch_width=patch_size * scale_x,
        patch_height=patch_size * scale_y,
        refined=refined,
        source=picture.source,
    )
