"""Drawing on pictures, for plots and the demo: boxes, seeds, masks and patch maps. All of it takes arrays."""

from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Final

import cv2
import numpy as np
from numpy.typing import NDArray

from lostreg.errors import LostregError
from lostreg.images.boxes import spread

Pixels = NDArray[np.uint8]
Colour = tuple[int, int, int]  # RGB

PLOT_SUFFIXES: Final = (".png", ".jpg", ".jpeg", ".webp")
# Colours of Okabe and Ito's palette, which people who see few colours tell apart; the main object has the lightest one.
# Lines lie on dark ones, so that they show on any picture, and objects differ by dashes, too. `lostreg report` follows.
OBJECTS: Final = ((240, 228, 66), (86, 180, 233), (230, 159, 0), (204, 121, 167), (0, 158, 115))
DASHES: Final[tuple[tuple[int, ...], ...]] = ((), (12, 7), (5, 7), (14, 7, 4, 7))  # lengths of dash, gap, dash, ...
SEED: Final = (213, 94, 0)
TRUTH: Final = (255, 255, 255)
_CASING: Final = (0, 0, 0)
_INK: Final = (30, 30, 30)
_PAPER: Final = 255
_PANEL_SIDE: Final = 640
_GAP: Final = 12
_CAPTION: Final = 34
_TINT: Final = 0.42


def plot_objects(
    pixels: Pixels,
    size: tuple[int, int],
    *,
    xyxy: NDArray[np.float32],
    scores: NDArray[np.float32],
    seeds: NDArray[np.int64],
    degrees: NDArray[np.int64],
    patch: tuple[float, float],
    refined: NDArray[np.bool_] | None = None,
    truth: NDArray[np.float64] | None = None,
) -> Pixels:
    """Draw what was found: on the left boxes, seeds and refined masks' outlines, on the right each patch's degree.

    Args:
        pixels: the image, RGB (h, w, 3), uint8, at any scale.
        size: (height, width) of the original image, in pixels.
        xyxy: boxes in these pixels, shape (n, 4).
        scores: of the boxes, shape (n,).
        seeds: row and column of the seed patches, shape (n, 2) or (0, 2).
        degrees: of the patches, shape (rows, columns).
        patch: (height, width) of a patch, in pixels of the original image.
        refined: masks over the whole image, shape (n, a, b); None for none.
        truth: ground-truth boxes, shape (m, 4), drawn thin; None for none.

    Returns:
        RGB picture, uint8; each panel's longer side is 640 pixels, upscaled for small images.
    """
    left = fit(pixels, size, _PANEL_SIDE)
    high, wide = left.shape[0] / size[0], left.shape[1] / size[1]  # not the same in thin pictures
    scale, cell = np.array([wide, high, wide, high]), (patch[0] * high, patch[1] * wide)
    right = colour_map(degrees, left.shape[:2], cell)
    for index, mask in enumerate(() if refined is None else refined):
        draw_outline(left, stretched(mask, left.shape[:2]), colour_of(index))
    for panel in (left, right):
        for box in () if truth is None else truth:
            draw_box(panel, box * scale, TRUTH, 1)
        for index in reversed(range(len(xyxy))):  # the main object is drawn over the others
            number = str(index + 1) if panel is left and len(xyxy) > 1 else ""
            draw_box(panel, xyxy[index] * scale, colour_of(index), 2 if index else 3, number, dash_of(index))
        draw_seeds(panel, seeds, cell)
    caption = _caption(scores) + ("" if truth is None else "; thin: ground truth")
    legend = f"degree {degrees.min()} (dark: object-like) to {degrees.max()}"
    panels = [_captioned(left, caption), _captioned(right, legend)]
    gap = np.full((panels[0].shape[0], _GAP, 3), _PAPER, dtype=np.uint8)
    return np.hstack([panels[0], gap, panels[1]])


def fit(pixels: Pixels, size: tuple[int, int], side: int) -> Pixels:
    """A copy of a picture in the proportions of an image.

    Args:
        pixels: RGB (h, w, 3), uint8.
        size: (height, width) of the image.
        side: the copy's longer side, in pixels.
    """
    scale = side / max(size)
    width, height = max(1, round(size[1] * scale)), max(1, round(size[0] * scale))
    interpolation = cv2.INTER_AREA if width < pixels.shape[1] else cv2.INTER_CUBIC
    return np.array(cv2.resize(pixels, (width, height), interpolation=interpolation), dtype=np.uint8)


def stretched(mask: NDArray[np.bool_], size: tuple[int, ...]) -> NDArray[np.bool_]:
    """A mask over a whole image at another size, (height, width), by its nearest pixels."""
    nearest = cv2.resize(mask.astype(np.uint8), size[1::-1], interpolation=cv2.INTER_NEAREST)
    return np.asarray(nearest, dtype=np.bool_)


def colour_of(index: int) -> Colour:
    """Of an object, by its place from 0."""
    return OBJECTS[index % len(OBJECTS)]


def dash_of(index: int) -> tuple[int, ...]:
    """How the box of an object is dashed, by its place from 0; 20 objects differ in this or their colour."""
    return DASHES[index % len(DASHES)]


def draw_box(
    panel: Pixels,
    box: NDArray[np.floating],
    colour: Colour,
    thickness: int = 2,
    label: str = "",
    dash: tuple[int, ...] = (),
) -> None:
    """Draw a box on a dark line, and a label at its top left corner, outside where there is room.

    Args:
        panel: RGB (h, w, 3), uint8; it is drawn on.
        box: ``x1, y1, x2, y2`` in its pixels, cut to it.
        colour: of both.
        thickness: of the line, in pixels.
        label: in dark letters on the colour; nothing where it is empty.
        dash: lengths of dashes and gaps in turn, in pixels; none for a whole line.
    """
    x1, y1, x2, y2 = _within(panel, box)
    cv2.rectangle(panel, (x1, y1), (x2, y2), _CASING, thickness + 2, cv2.LINE_AA)
    corners = [(x1, y1), (x2, y1), (x2, y2), (x1, y2)]
    for start, end in zip(corners, [*corners[1:], corners[0]], strict=True):
        for first, last in _dashes(np.array(start), np.array(end), dash):
            cv2.line(panel, first, last, colour, thickness, cv2.LINE_AA)
    if label:
        (width, height), _ = cv2.getTextSize(label, cv2.FONT_HERSHEY_SIMPLEX, 0.6, 2)
        left = max(0, min(x1, panel.shape[1] - width - 8))
        foot = y1 if y1 > height + 10 else y1 + height + 10
        cv2.rectangle(panel, (left, foot - height - 10), (left + width + 8, foot), colour, -1)
        cv2.putText(panel, label, (left + 4, foot - 6), cv2.FONT_HERSHEY_SIMPLEX, 0.6, (10, 10, 10), 2, cv2.LINE_AA)


def _within(panel: Pixels, box: NDArray[np.floating]) -> list[int]:
    """A box in whole pixels, cut to the panel."""
    limit = np.array([panel.shape[1], panel.shape[0]] * 2) - 1
    corners: list[int] = np.clip(np.rint(box), 0, limit).astype(int).tolist()
    return corners


def _dashes(
    start: NDArray[np.int64], end: NDArray[np.int64], dash: tuple[int, ...]
) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Where the dashes of a line from one place to another start and end."""
    length = float(np.hypot(*(end - start)))
    edges = [0.0]
    for part in cycle(dash or (length + 1,)):
        edges.append(min(edges[-1] + part, length))
        if edges[-1] >= length:
            break
    places = [tuple(np.rint(start + (end - start) * (edge / max(length, 1))).astype(int).tolist()) for edge in edges]
    yield from zip(places[::2], places[1::2], strict=False)


def draw_seeds(panel: Pixels, seeds: NDArray[np.int64], patch: tuple[float, float]) -> None:
    """Draw the outlines of seed patches in vermilion on white.

    Args:
        panel: RGB (h, w, 3), uint8; it is drawn on.
        seeds: row and column of each, shape (n, 2).
        patch: (height, width) of a patch, in pixels of the panel.
    """
    high, wide = patch
    for row, column in seeds.tolist():
        corners = np.array([column * wide, row * high, (column + 1) * wide, (row + 1) * high])
        draw_box(panel, corners, (255, 255, 255), 4)
        x1, y1, x2, y2 = _within(panel, corners)
        cv2.rectangle(panel, (x1, y1), (x2, y2), SEED, 2, cv2.LINE_AA)


def draw_outline(panel: Pixels, mask: NDArray[np.bool_], colour: Colour) -> None:
    """Draw the edges of a mask of the panel's size, those of its holes too."""
    outlines, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    for line, thickness in ((_CASING, 3), (colour, 1)):
        cv2.drawContours(panel, outlines, -1, line, thickness, cv2.LINE_AA)


def draw_mask(panel: Pixels, mask: NDArray[np.bool_], colour: Colour) -> None:
    """Tint the pixels of a mask of the panel's size, and outline it."""
    panel[mask] = (panel[mask] * (1 - _TINT) + np.array(colour) * _TINT).astype(np.uint8)
    draw_outline(panel, mask, colour)


def colour_map(
    values: NDArray[np.integer] | NDArray[np.floating],
    size: tuple[int, ...],
    patch: tuple[float, float],
    lowest: float | None = None,
    highest: float | None = None,
) -> Pixels:
    """A map over patches as colours, each patch where it lies in the image; padding is cut off.

    Args:
        values: shape (rows, columns).
        size: (height, width) of the result, in pixels.
        patch: (height, width) of a patch, in these pixels.
        lowest: the value of the darkest colour; None takes the lowest of the values.
        highest: the value of the brightest colour; None takes the highest of the values.

    Returns:
        RGB (height, width, 3), uint8: dark is low.
    """
    numbers = values.astype(np.float64)
    low = numbers.min() if lowest is None else lowest
    span = (numbers.max() if highest is None else highest) - low
    grey = np.zeros(numbers.shape, np.uint8) if span <= 0 else ((numbers - low) * (255 / span)).astype(np.uint8)
    coloured = cv2.applyColorMap(spread(grey, size, patch), cv2.COLORMAP_VIRIDIS)
    return np.asarray(cv2.cvtColor(coloured, cv2.COLOR_BGR2RGB), dtype=np.uint8)


def save_picture(path: Path, picture: Pixels) -> None:
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


def encoded(picture: Pixels, suffix: str) -> bytes:
    """The content of a picture file; the suffix is one of `PLOT_SUFFIXES`."""
    content: bytes = cv2.imencode(suffix, cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))[1].tobytes()
    return content


def score_text(score: float) -> str:
    """A score as it is shown, the same everywhere: two decimals of the three that predictions files hold, halves up.

    The page of `lostreg report` has this rule in its script, too.

    Example:
        >>> lostreg.images.draw.score_text(0.3149), lostreg.images.draw.score_text(0.125)
        ('0.32', '0.13')
    """
    thousandths = round(1000 * round(float(score), 3))
    return f"{(thousandths + 5) // 10 / 100:.2f}"


def _caption(scores: NDArray[np.float32]) -> str:
    if len(scores) == 0:
        return "box and seed, no object"
    if len(scores) == 1:
        return f"box and seed, score {score_text(scores[0])}"
    return "scores " + ", ".join(score_text(score) for score in scores)


def _captioned(panel: Pixels, text: str) -> Pixels:
    width = max(panel.shape[1], cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, 0.6, 1)[0][0] + 8)
    canvas = np.full((panel.shape[0] + _CAPTION, width, 3), _PAPER, dtype=np.uint8)
    canvas[_CAPTION:, : panel.shape[1]] = panel
    cv2.putText(canvas, text, (4, 23), cv2.FONT_HERSHEY_SIMPLEX, 0.6, _INK, 1, cv2.LINE_AA)
    return canvas
