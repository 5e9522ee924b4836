"""The demo's pictures: boxes, masks and seeds on the photo, and maps over it as colours."""

from typing import Final, TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

from lostreg.inference.discovery import Discovery

# RGB, one an object, told apart by people who see few colours too
COLOURS: Final = (
    (0, 200, 120),
    (255, 140, 0),
    (70, 150, 255),
    (240, 80, 170),
    (245, 220, 40),
    (150, 100, 255),
    (0, 200, 220),
    (200, 60, 40),
    (150, 200, 40),
    (180, 140, 110),
)
SEED: Final = (230, 30, 30)
_SMALLEST: Final = 640  # longer side in pixels, so that lines and letters have room
_LARGEST: Final = 1024
_TINT: Final = 0.42

Pixels = NDArray[np.uint8]
Value = TypeVar("Value", np.uint8, np.bool_)


def colour_of(index: int) -> tuple[int, int, int]:
    """RGB of one object, in the picture and in the table."""
    return COLOURS[index % len(COLOURS)]


def draw_objects(pixels: Pixels, found: Discovery) -> Pixels:
    """The photo with each object's mask, box, number and score, and its seed patch.

    Args:
        pixels: RGB (h, w, 3), at any scale.
        found: in pixels of the original.
    """
    panel = _fitted(pixels, found)
    scale = panel.shape[1] / found.width
    for index in range(len(found)):
        _tint(panel, _mask(found, index, panel.shape[:2]), colour_of(index))
    for index in reversed(range(len(found))):
        _box(panel, found.xyxy[index] * scale, colour_of(index), f"{index + 1}: {found.scores[index]:.2f}")
    _draw_seeds(panel, found)
    return panel


def draw_degrees(pixels: Pixels, found: Discovery) -> Pixels:
    """How many patches each patch is connected to, with the seeds: dark is few."""
    panel = _heat(found.degrees.astype(np.float64), _fitted(pixels, found).shape[:2], found)
    _draw_seeds(panel, found)
    return panel


def draw_attention(pixels: Pixels, found: Discovery, attention: NDArray[np.float32]) -> Pixels:
    """A map over the patches of the same photo: dark is nothing."""
    return _heat(attention.astype(np.float64), _fitted(pixels, found).shape[:2], found, lowest=0.0)


def _fitted(pixels: Pixels, found: Discovery) -> Pixels:
    """A copy in the original's proportions, neither tiny nor huge."""
    side = min(max(*pixels.shape[:2], _SMALLEST), _LARGEST)
    scale = side / max(found.width, found.height)
    size = max(1, round(found.width * scale)), max(1, round(found.height * scale))
    way = cv2.INTER_AREA if size[0] < pixels.shape[1] else cv2.INTER_CUBIC
    return np.array(cv2.resize(pixels, size, interpolation=way), dtype=np.uint8)


def _mask(found: Discovery, index: int, size: tuple[int, ...]) -> NDArray[np.bool_]:
    if found.refined is None:
        return _on_pixels(found.masks[index], size, found)
    refined = found.refined[index].astype(np.uint8)
    mask: NDArray[np.bool_] = cv2.resize(refined, size[1::-1], interpolation=cv2.INTER_NEAREST).astype(bool)
    return mask


def _on_pixels(cells: NDArray[Value], size: tuple[int, ...], found: Discovery) -> NDArray[Value]:
    """Of each pixel of a panel, the value of its patch."""
    height, width = size
    rows = ((np.arange(height) + 0.5) * found.height / height / found.patch_height).astype(int)
    columns = ((np.arange(width) + 0.5) * found.width / width / found.patch_width).astype(int)
    rows, columns = rows.clip(max=cells.shape[0] - 1), columns.clip(max=cells.shape[1] - 1)
    spread: NDArray[Value] = cells[rows[:, None], columns[None, :]]
    return spread


def _heat(values: NDArray[np.float64], size: tuple[int, ...], found: Discovery, lowest: float | None = None) -> Pixels:
    low = values.min() if lowest is None else lowest
    span = values.max() - low
    grey = np.zeros(values.shape, np.uint8) if span <= 0 else ((values - low) * (255 / span)).astype(np.uint8)
    colours = cv2.cvtColor(cv2.applyColorMap(_on_pixels(grey, size, found), cv2.COLORMAP_VIRIDIS), cv2.COLOR_BGR2RGB)
    return np.asarray(colours, dtype=np.uint8)


def _tint(panel: Pixels, mask: NDArray[np.bool_], colour: tuple[int, int, int]) -> None:
    panel[mask] = (panel[mask] * (1 - _TINT) + np.array(colour) * _TINT).astype(np.uint8)
    outlines, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(panel, outlines, -1, colour, 1, cv2.LINE_AA)


def _box(panel: Pixels, box: NDArray[np.floating], colour: tuple[int, int, int], label: str) -> None:
    x1, y1, x2, y2 = _corners(panel, box)
    cv2.rectangle(panel, (x1, y1), (x2, y2), colour, 3, cv2.LINE_AA)
    (width, height), _ = cv2.getTextSize(label, cv2.FONT_HERSHEY_SIMPLEX, 0.6, 2)
    left = max(0, min(x1, panel.shape[1] - width - 8))
    foot = y1 if y1 > height + 10 else y1 + height + 10
    cv2.rectangle(panel, (left, foot - height - 10), (left + width + 8, foot), colour, -1)
    cv2.putText(panel, label, (left + 4, foot - 6), cv2.FONT_HERSHEY_SIMPLEX, 0.6, (10, 10, 10), 2, cv2.LINE_AA)


def _draw_seeds(panel: Pixels, found: Discovery) -> None:
    wide, high = found.patch_width * panel.shape[1] / found.width, found.patch_height * panel.shape[0] / found.height
    for row, column in found.seeds.tolist():
        place = np.array([column * wide, row * high, (column + 1) * wide, (row + 1) * high])
        x1, y1, x2, y2 = _corners(panel, place)
        cv2.rectangle(panel, (x1, y1), (x2, y2), (255, 255, 255), 4, cv2.LINE_AA)
        cv2.rectangle(panel, (x1, y1), (x2, y2), SEED, 2, cv2.LINE_AA)


def _corners(panel: Pixels, box: NDArray[np.floating]) -> list[int]:
    limit = np.array([panel.shape[1], panel.shape[0]] * 2) - 1
    corners: list[int] = np.clip(np.rint(box), 0, limit).astype(int).tolist()
    return corners
