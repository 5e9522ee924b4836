"""Pictures: an image with its box and seed, beside its degree map."""

import contextlib
import sys
from pathlib import Path
from typing import Final

import cv2
import numpy as np
from numpy.typing import NDArray

from lostreg.errors import ImageError, LostregError
from lostreg.images.decode import read_image
from lostreg.inference.discovery import Discovery

PLOT_SUFFIXES: Final = (".png", ".jpg", ".jpeg", ".webp")
_BOX: Final = (40, 220, 40)  # RGB
_FURTHER: Final = (70, 170, 255)  # boxes of further objects
_OUTLINE: Final = (255, 255, 255)  # of a refined mask
_SEED: Final = (230, 30, 30)
_TRUTH: Final = (255, 200, 0)
_INK: Final = (30, 30, 30)
_PAPER: Final = 255
_PANEL_SIDE: Final = 640
_READ_SIDE: Final = 1024
_GREY: Final = 200
_GAP: Final = 12
_CAPTION: Final = 34


def plot_discovery(
    pixels: NDArray[np.uint8],
    found: Discovery,
    truth: NDArray[np.float64] | None = None,
) -> NDArray[np.uint8]:
    """Draw what was found: on the left boxes, seeds and refined masks' outlines, on the right each patch's degree.

    Args:
        pixels: the image, RGB (h, w, 3), uint8, at any scale.
        found: its discovery, in pixels of the original.
        truth: ground-truth boxes in the same pixels, shape (n, 4), drawn thin; None for none.

    Returns:
        RGB picture, uint8; each panel's longer side is 640 pixels, upscaled for small images.
    """
    scale = _PANEL_SIDE / max(found.width, found.height)
    size = (max(1, round(found.width * scale)), max(1, round(found.height * scale)))
    interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    left = np.array(cv2.resize(pixels, size, interpolation=interpolation), dtype=np.uint8)
    right = _degree_panel(found, size, scale)
    if found.refined is not None:
        _draw_outlines(left, found.refined)
    for panel in (left, right):
        for box in [] if truth is None else truth:
            _rectangle(panel, box * scale, _TRUTH, 1)
        for index in reversed(range(len(found))):  # the main object is drawn over the others
            _rectangle(panel, found.xyxy[index] * scale, _BOX if index == 0 else _FURTHER, 3 if index == 0 else 2)
            _draw_seed(panel, found, index, scale)
    if len(found) > 1:
        _draw_numbers(left, found, scale)
    panels = [
        _captioned(left, _caption(found) + ("" if truth is None else "; thin: ground truth")),
        _captioned(right, f"degree: dark {found.degrees.min()}, light {found.degrees.max()}"),
    ]
    gap = np.full((panels[0].shape[0], _GAP, 3), _PAPER, dtype=np.uint8)
    return np.hstack([panels[0], gap, panels[1]])


def save_picture(path: Path, picture: NDArray[np.uint8]) -> None:
    """Write an RGB picture; the suffix says in which format.

    Raises:
        LostregError: if the format is unknown or the file cannot be written.
    """
    if path.suffix.lower() not in PLOT_SUFFIXES:
        raise LostregError(f"cannot write {path}: expected a file ending in {', '.join(PLOT_SUFFIXES)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(picture, path.suffix.lower()))
    except OSError as error:
        raise LostregError(f"cannot write {path}: {error.strerror}") from error


def encoded(picture: NDArray[np.uint8], suffix: str) -> bytes:
    """The content of a picture file; the suffix is one of `PLOT_SUFFIXES`."""
    content: bytes = cv2.imencode(suffix, cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))[1].tobytes()
    return content


def readable_pixels(found: Discovery) -> NDArray[np.uint8]:
    """The image that a discovery was made in, at most 1024 pixels long; plain grey where it cannot be had."""
    if found.source is not None:
        with contextlib.suppress(ImageError):
            return read_image(found.source, max_side=_READ_SIDE, exif=found.exif, max_pixels=sys.maxsize).pixels
    return np.full((1, 1, 3), _GREY, dtype=np.uint8)


def _caption(found: Discovery) -> str:
    if len(found) == 0:
        return "box and seed, no object"
    if len(found) == 1:
        return f"box and seed, score {found.scores[0]:.2f}"
    return "scores " + ", ".join(f"{score:.2f}" for score in found.scores)


def _degree_panel(found: Discovery, size: tuple[int, int], scale: float) -> NDArray[np.uint8]:
    """The degree map as colours, each patch where it lies in the image; the padding is cut off."""
    degrees = found.degrees.astype(np.float64)
    span = max(1.0, float(degrees.max() - degrees.min()))
    grey = ((degrees - degrees.min()) * (255 / span)).astype(np.uint8)
    colours = cv2.cvtColor(cv2.applyColorMap(grey, cv2.COLORMAP_VIRIDIS), cv2.COLOR_BGR2RGB)
    # Sample each pixel's patch, so that patches keep their exact place and size.
    rows = (np.arange(size[1]) / (found.patch_height * scale)).astype(int).clip(max=degrees.shape[0] - 1)
    columns = (np.arange(size[0]) / (found.patch_width * scale)).astype(int).clip(max=degrees.shape[1] - 1)
    return np.ascontiguousarray(colours[rows[:, None], columns[None, :]], dtype=np.uint8)


def _rectangle(
    panel: NDArray[np.uint8], box: NDArray[np.floating], colour: tuple[int, int, int], thickness: int
) -> None:
    limit = np.array([panel.shape[1], panel.shape[0]] * 2) - 1
    x1, y1, x2, y2 = np.clip(np.rint(box), 0, limit).astype(int).tolist()
    cv2.rectangle(panel, (x1, y1), (x2, y2), colour, thickness, cv2.LINE_AA)


def _draw_seed(panel: NDArray[np.uint8], found: Discovery, index: int, scale: float) -> None:
    row, column = found.seeds[index].tolist()
    width, height = found.patch_width * scale, found.patch_height * scale
    corner = np.array([column * width, row * height, (column + 1) * width, (row + 1) * height])
    _rectangle(panel, corner, _SEED, 2)


def _draw_outlines(panel: NDArray[np.uint8], masks: NDArray[np.bool_]) -> None:
    """The edges of masks, wherever the mask was made at another size than the panel."""
    for index, mask in enumerate(masks):
        stretched = cv2.resize(mask.astype(np.uint8), panel.shape[1::-1], interpolation=cv2.INTER_NEAREST)
        outlines, _ = cv2.findContours(stretched, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
        cv2.drawContours(panel, outlines, -1, _OUTLINE if index == 0 else _FURTHER, 1, cv2.LINE_AA)


def _draw_numbers(panel: NDArray[np.uint8], found: Discovery, scale: float) -> None:
    """Each box's number, inside its top left corner."""
    for index, box in enumerate(found.xyxy):
        place = (int(box[0] * scale) + 6, int(box[1] * scale) + 20)
        for colour, thickness in (((0, 0, 0), 4), ((255, 255, 255), 1)):
            cv2.putText(panel, str(index + 1), place, cv2.FONT_HERSHEY_SIMPLEX, 0.6, colour, thickness, cv2.LINE_AA)


def _captioned(panel: NDArray[np.uint8], text: str) -> NDArray[np.uint8]:
    width = max(panel.shape[1], 330)  # a caption fits
    canvas = np.full((panel.shape[0] + _CAPTION, width, 3), _PAPER, dtype=np.uint8)
    canvas[_CAPTION:, : panel.shape[1]] = panel
    cv2.putText(canvas, text, (4, 23), cv2.FONT_HERSHEY_SIMPLEX, 0.6, _INK, 1, cv2.LINE_AA)
    return canvas
