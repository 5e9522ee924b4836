"""The demo's pictures: boxes, masks and seeds on the photo, and maps over it as colours."""

from typing import Final

import cv2
import numpy as np
from numpy.typing import NDArray

from lostreg.images.boxes import spread
from lostreg.images.draw import (
    Pixels,
    colour_map,
    colour_of,
    dash_of,
    draw_box,
    draw_mask,
    draw_seeds,
    fit,
    score_text,
    stretched,
)
from lostreg.inference.discovery import Discovery

_SMALLEST: Final = 640  # longer side in pixels, so that lines and letters have room
_LARGEST: Final = 1024
_FAINT: Final = 0.5  # opacity of candidates


def draw_objects(pixels: Pixels, found: Discovery, *, candidates: bool = False) -> Pixels:
    """The photo with each object's mask, box, number and score, and its seed patch.

    Args:
        pixels: RGB (h, w, 3), at any scale.
        found: in pixels of the original.
        candidates: whether the boxes of all candidates are drawn, too, faintly.
    """
    panel = _fitted(pixels, found)
    size = panel.shape[:2]
    for index in range(len(found)):
        if found.refined is None:
            mask = spread(found.masks[index], size, _patch(found, panel))
        else:
            mask = stretched(found.refined[index], size)
        draw_mask(panel, mask, colour_of(index))
    if candidates and found.candidates is not None:
        lines = panel.copy()
        for box in found.candidates[:, :4] * _scale(found, panel):
            draw_box(lines, box, (255, 255, 255), 1)
        panel = np.asarray(cv2.addWeighted(lines, _FAINT, panel, 1 - _FAINT, 0), dtype=np.uint8)
    _draw_boxes(panel, found)
    draw_seeds(panel, found.seeds, _patch(found, panel))
    return panel


def draw_degrees(pixels: Pixels, found: Discovery) -> Pixels:
    """What the method judged the patches by, in most how many others each one is connected to: dark is few."""
    panel = _fitted(pixels, found)
    panel = colour_map(found.degrees, panel.shape[:2], _patch(found, panel))
    draw_seeds(panel, found.seeds, _patch(found, panel))
    return panel


def draw_attention(pixels: Pixels, found: Discovery, attention: NDArray[np.float32]) -> Pixels:
    """A map over the patches of the same photo: dark is nothing."""
    panel = _fitted(pixels, found)
    return colour_map(attention, panel.shape[:2], _patch(found, panel), lowest=0.0)


def draw_taught(pixels: Pixels, found: Discovery) -> Pixels | None:
    """How likely each patch is part of an object: bright is likely. With the boxes; None where nothing was taught."""
    if found.objectness is None:
        return None
    panel = _fitted(pixels, found)
    panel = colour_map(found.objectness, panel.shape[:2], _patch(found, panel), lowest=0.0, highest=1.0)
    _draw_boxes(panel, found)
    return panel


def _draw_boxes(panel: Pixels, found: Discovery) -> None:
    """Each object's box, number and score, the main object over the others."""
    for index in reversed(range(len(found))):
        label = f"{index + 1}: {score_text(found.scores[index])}"
        draw_box(panel, found.xyxy[index] * _scale(found, panel), colour_of(index), 3, label, dash_of(index))


def _scale(found: Discovery, panel: Pixels) -> NDArray[np.float64]:
    """From pixels of the original to those of a panel, for boxes."""
    return np.array([panel.shape[1] / found.width, panel.shape[0] / found.height] * 2)


def _fitted(pixels: Pixels, found: Discovery) -> Pixels:
    """A copy in the original's proportions, neither tiny nor huge."""
    return fit(pixels, (found.height, found.width), min(max(*pixels.shape[:2], _SMALLEST), _LARGEST))


def _patch(found: Discovery, panel: Pixels) -> tuple[float, float]:
    """(height, width) of a patch, in pixels of a panel."""
    return found.patch_height * panel.shape[0] / found.height, found.patch_width * panel.shape[1] / found.width
