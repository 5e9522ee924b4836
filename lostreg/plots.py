"""Pictures: an image with its box and seed, beside its degree map."""

from pathlib import Path
from typing import Final

import cv2
import numpy as np
from numpy.typing import NDArray

from lostreg.errors import LostregError
from lostreg.regions import Discovery

PLOT_SUFFIXES: Final = (".png", ".jpg", ".jpeg", ".webp")
_BOX: Final = (40, 220, 40)  # RGB
_SEED: Final = (230, 30, 30)
_TRUTH: Final = (255, 200, 0)
_INK: Final = (30, 30, 30)
_PAPER: Final = 255
_PANEL_SIDE: Final = 640
_GAP: Final = 12
_CAPTION: Final = 34


def plot_discovery(
    pixels: NDArray[np.uint8],
    found: Discovery,
    truth: NDArray[np.float64] | None = None,
) -> NDArray[np.uint8]:
    """Draw what was found: on the left box and seed, on the right the degree of every patch.

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
    left = np.asarray(cv2.resize(pixels, size, interpolation=interpolation), dtype=np.uint8)
    right = _degree_panel(found, size, scale)
    for panel in (left, right):
        for box in [] if truth is None else truth:
            _rectangle(panel, box * scale, _TRUTH, 1)
        for index, box in enumerate(found.xyxy):
            _rectangle(panel, box * scale, _BOX, 3)
            _draw_seed(panel, found, index, scale)
    score = f"score {found.scores[0]:.2f}" if len(found) else "no object"
    panels = [
        _captioned(left, f"box and seed, {score}" + ("" if truth is None else "; thin: ground truth")),
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
    encoded = cv2.imencode(path.suffix.lower(), cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))[1]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded.tobytes())
    except OSError as error:
        raise LostregError(f"cannot write {path}: {error.strerror}") from error


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


def _captioned(panel: NDArray[np.uint8], text: str) -> NDArray[np.uint8]:
    width = max(panel.shape[1], 330)  # a caption fits
    canvas = np.full((panel.shape[0] + _CAPTION, width, 3), _PAPER, dtype=np.uint8)
    canvas[_CAPTION:, : panel.shape[1]] = panel
    cv2.putText(canvas, text, (4, 23), cv2.FONT_HERSHEY_SIMPLEX, 0.6, _INK, 1, cv2.LINE_AA)
    return canvas
