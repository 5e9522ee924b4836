"""From patches to pixels: what a method found in a batch, as the results that users get."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lostreg.images.boxes import in_pixels
from lostreg.images.files import ImageFile
from lostreg.images.masks import mask_boxes, refine
from lostreg.images.patches import PatchedPicture
from lostreg.inference.discovery import Discovery
from lostreg.inference.methods import METHODS
from lostreg.inference.options import ResolvedOptions
from lostreg.methods.lost import Objects


def discoveries(
    found: Any,
    pictures: Sequence[PatchedPicture],
    patch_size: int,
    options: ResolvedOptions,
    *,
    keep_pixels: bool = False,
) -> list[Discovery]:
    """The results of a batch.

    Args:
        found: what the maps of the options' method hold, of images of equal grid.
        pictures: these images.
        patch_size: side of a patch, in pixels of the resized image.
        options: how many objects, and what of them.
        keep_pixels: whether a discovery's source is its decoded image, instead of its file.
    """
    objects = METHODS[options.method].objects(found, options)
    return [
        to_discovery(of_image, picture, patch_size, options, keep_pixels=keep_pixels)
        for of_image, picture in zip(objects, pictures, strict=True)
    ]


def to_discovery(
    objects: Objects, picture: PatchedPicture, patch_size: int, options: ResolvedOptions, *, keep_pixels: bool = False
) -> Discovery:
    """One image's result, with boxes in pixels of the original image.

    Args:
        objects: what a method found in it, in patches.
        picture: that image.
        patch_size: side of a patch, in pixels of the resized image.
        options: what is wanted of the objects.
        keep_pixels: whether the discovery's source is the decoded image, instead of its file.
    """
    scale_x, scale_y = picture.scale
    source, exif = picture.source, options.exif
    if isinstance(source, ImageFile):
        exif, source = source.exif, source.path
    refined = refine(picture.pixels, objects.masks, (patch_size, patch_size)) if options.refine else None
    boxes = in_pixels(objects.xyxy, picture, patch_size).astype(np.float32)
    if options.box_from == "mask" and refined is not None:
        is_there = refined.any(axis=(1, 2))  # the mask of an object within an earlier one may be empty
        boxes[is_there] = mask_boxes(refined[is_there], picture.width, picture.height)
    candidates = objects.candidates
    if candidates is not None:
        corners = in_pixels(candidates[:, :4], picture, patch_size)
        candidates = np.column_stack([corners, candidates[:, 4]]).astype(np.float32)
    return Discovery(
        xyxy=boxes,
        scores=objects.scores,
        seeds=objects.seeds,
        biases=objects.biases,
        masks=objects.masks,
        degrees=objects.heat,
        width=picture.width,
        height=picture.height,
        patch_width=patch_size * scale_x,
        patch_height=patch_size * scale_y,
        refined=refined,
        source=picture.pixels if keep_pixels else source,
        exif=exif,
        candidates=candidates,
        objectness=objects.objectness,
    )
