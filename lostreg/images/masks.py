"""Masks in pixels: sharpened on the image, their boxes, and PNG files."""

import colorsys
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Final, cast

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lostreg.errors import LostregError
from lostreg.images.boxes import cells

Mask = NDArray[np.bool_]

# scripts/mask_quality.py compares and judges these.
WORKING_SIDE: Final = 320
_LEAST_PATCH: Final = 2  # pixels, at the working size: the smallest object of one patch still has an inside
_INSIDE: Final = 1.5  # patches from an object's outline inwards: from there on a pixel is surely of the object
_OUTSIDE: Final = 0.7  # patches from all outlines outwards: from there on it is surely none
_DEPTH: Final = 1 / 3  # the same as a share of the deepest place, for what is nowhere that deep
_LEAST_IOU: Final = 0.3  # with the patches; a sharpened mask that agrees less with them is not believed
MOST_OBJECTS: Final = 255
_GOLDEN: Final = 0.618034


def refine(pixels: NDArray[np.uint8], masks: Mask, patch: tuple[float, float]) -> Mask:
    """Sharpen patch masks on the pixels: watersheds between what is surely inside and what is surely outside.

    All objects grow together, at a size of at most 320 pixels, or two a patch where that is more, from their own
    patches less a margin, against the background well beyond all of them; they meet where colours change. Of each the
    largest connected part is kept. An object whose result is empty, or has an IoU below 0.3 with its patches, keeps its
    patches. Neither random numbers nor threads have a part in it.

    Args:
        pixels: the image, RGB (h, w, 3), uint8, at any scale.
        masks: patches of each object, shape (n, rows, columns), bool; no patch belongs to two.
        patch: width and height of a patch in these pixels; patches may reach beyond the image.

    Returns:
        Shape (n, a, b), bool: each mask over the whole image, at the working size; no pixel belongs to two.

    Raises:
        ValueError: if the shapes are others, or a patch is not of positive size.
    """
    small, coarse, side = at_working_size(pixels, masks, patch)
    regions = _watershed(small, markers(coarse, _INSIDE * side, _OUTSIDE * side), len(masks))
    free = np.ones(small.shape[:2], dtype=bool)
    for index, region in enumerate(regions):
        coarse[index] = plausible(largest_part(region & free), coarse[index] & free)
        free &= ~coarse[index]
    return coarse


def at_working_size(
    pixels: NDArray[np.uint8], masks: Mask, patch: tuple[float, float]
) -> tuple[NDArray[np.uint8], Mask, float]:
    """The image, its masks on the same pixels (n, a, b), and the mean side of a patch, all as small as worked on.

    Raises:
        ValueError: as `refine`.
    """
    if pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size or masks.ndim != 3 or not min(masks.shape[1:]):
        raise ValueError(f"expected an RGB image (h, w, 3) and masks (n, rows, columns): {pixels.shape}, {masks.shape}")
    if not min(patch) > 0:
        raise ValueError(f"expected a patch of positive width and height, not {patch}")
    small = _shrink(pixels, max(WORKING_SIDE, _LEAST_PATCH * max(masks.shape[1:])))
    wide = patch[0] * small.shape[1] / pixels.shape[1]
    high = patch[1] * small.shape[0] / pixels.shape[0]
    rows = cells(small.shape[0], high, masks.shape[1])
    columns = cells(small.shape[1], wide, masks.shape[2])
    rows[-1], columns[-1] = masks.shape[1] - 1, masks.shape[2] - 1  # a last patch may be cut to less than a pixel
    return small, masks[:, rows[:, None], columns[None, :]].astype(bool), (wide + high) / 2


def plausible(mask: Mask, patches: Mask) -> Mask:
    """The mask, or else the patches it comes from, if it is empty or has an IoU below 0.3 with them."""
    common = np.count_nonzero(mask & patches)
    return mask if common and common >= _LEAST_IOU * np.count_nonzero(mask | patches) else patches


def largest_part(mask: Mask) -> Mask:
    """The largest 4-connected part of a mask of shape (h, w); the first of several equally large."""
    count, parts, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=4)
    if count < 3:
        return mask
    return cast("Mask", parts == 1 + stats[1:, cv2.CC_STAT_AREA].argmax())


def outlines(mask: Mask) -> list[NDArray[np.int32]]:
    """The outlines of the 8-connected pieces of a mask, holes left out, the largest piece first.

    A piece is filled by its polygon with its edges, as OpenCV's `fillPoly` has it.

    Args:
        mask: shape (h, w).

    Returns:
        Of each piece the corners (n, 2), x and y of outermost pixels, at least three.
    """
    found, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    ranked = sorted(found, key=lambda outline: (cv2.contourArea(outline), cv2.arcLength(outline, True)), reverse=True)
    corners = [cast("NDArray[np.int32]", outline[:, 0]) for outline in ranked]
    return [np.resize(outline, (max(3, len(outline)), 2)) for outline in corners]  # a pixel or a line has fewer


def outline_distance(mask: Mask) -> NDArray[np.float32]:
    """How far each pixel of a mask lies from what is not of it, in pixels; zero outside, no end without an outside."""
    if mask.all():
        return np.full(mask.shape, np.inf, dtype=np.float32)
    distance = cv2.distanceTransform(mask.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_5)
    return np.asarray(distance, dtype=np.float32)


def _shrink(pixels: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    height, width = pixels.shape[:2]
    scale = side / max(height, width)
    if scale >= 1:
        return pixels
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)


def markers(masks: Mask, inside: float, outside: float) -> NDArray[np.int32]:
    """What is certain of an image: i + 1 inside object i, n + 1 outside all of them, 0 in between.

    Args:
        masks: of each object, shape (n, a, b), bool.
        inside: pixels from an object's outline to what is surely of it; a third of its depth where that is less.
        outside: pixels from all outlines to what is surely of none; or a third of that depth.

    Returns:
        Shape (a, b), int32.
    """
    found = np.zeros(masks.shape[1:], dtype=np.int32)
    for index, mask in enumerate(masks):
        found[_deep(outline_distance(mask), inside)] = index + 1
    background: Mask = ~np.any(masks, axis=0)
    found[_deep(outline_distance(background), outside)] = len(masks) + 1
    return found


def _deep(distance: NDArray[np.float32], enough: float) -> Mask:
    return distance > min(enough, float(distance.max()) * _DEPTH)


def _watershed(pixels: NDArray[np.uint8], certain: NDArray[np.int32], count: int) -> Iterator[Mask]:
    """The region of each object, with the line around it; regions share the lines between them."""
    # OpenCV makes the outermost pixels a line: those are added, and cut off again.
    framed = cv2.copyMakeBorder(pixels, 1, 1, 1, 1, cv2.BORDER_REPLICATE)
    flooded = np.pad(certain, 1)
    if certain.any():
        cv2.watershed(framed, flooded)
    lines = flooded == -1
    for label in range(1, count + 1):
        region = flooded == label
        grown = cv2.dilate(region.astype(np.uint8), np.ones((3, 3), dtype=np.uint8)) > 0
        yield (region | (grown & lines))[1:-1, 1:-1]


def mask_boxes(masks: Mask, width: int, height: int) -> NDArray[np.float32]:
    """The tight box around each mask of an image.

    Args:
        masks: over the whole image, at its size or a smaller one, shape (n, a, b), bool.
        width: of the image, in pixels.
        height: of the image, in pixels.

    Returns:
        ``x1, y1, x2, y2`` in pixels of the image, exclusive right and bottom edges, shape (n, 4), float32: around the
        pixels that `Discovery.pixel_mask` has; zeros for an empty mask.
    """
    boxes = np.zeros((len(masks), 4), dtype=np.float32)
    for axis, size in ((2, width), (1, height)):
        places = cells(size, size / masks.shape[axis], masks.shape[axis])
        for index, mask in enumerate(masks):
            taken = np.flatnonzero(mask.any(axis=2 - axis))
            if taken.size:
                boxes[index, 2 - axis] = np.searchsorted(places, taken[0], side="left")
                boxes[index, 4 - axis] = np.searchsorted(places, taken[-1], side="right")
    return boxes


def save_mask_png(path: Path, labels: NDArray[np.uint8]) -> None:
    """Write the objects of an image as one palette PNG of its size: 0 is background, i + 1 is object i.

    Args:
        path: the file, ending in ``.png``; its folder is made if need be.
        labels: shape (height, width), such as `Discovery.labels` gives.

    Raises:
        LostregError: if the name ends otherwise, or the file cannot be written.
    """
    if path.suffix.lower() != ".png":
        raise LostregError(f"cannot write {path}: expected a file ending in .png")
    write_picture(path, mask_png(labels))


def mask_png(labels: NDArray[np.uint8]) -> bytes:
    """The content of the file that `save_mask_png` writes."""
    picture = Image.fromarray(labels).convert("P")
    picture.putpalette(palette().tobytes())
    encoded = io.BytesIO()
    picture.save(encoded, format="PNG")
    return encoded.getvalue()


def write_picture(path: Path, content: bytes) -> None:
    """Write a picture's file; its folder is made if need be.

    Raises:
        LostregError: if it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except OSError as error:
        raise LostregError(f"cannot write {path}: {error.strerror}") from error
    except ValueError as error:
        raise LostregError(f"cannot write {str(path)!r}: no file can have that name ({error})") from error


def palette() -> NDArray[np.uint8]:
    """The colours of mask files, RGB, shape (256, 3): black for the background, then hues far from the last ones."""
    colours = np.zeros((256, 3), dtype=np.uint8)
    for index in range(MOST_OBJECTS):
        hue, step = (index * _GOLDEN) % 1, index // 16 % 4
        colours[index + 1] = np.round(255 * np.array(colorsys.hsv_to_rgb(hue, 0.85 - 0.15 * step, 1 - 0.1 * step)))
    return colours
