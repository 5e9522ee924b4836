"""Pictures of attention maps, with matplotlib."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from lostreg.artifacts.attention import AttentionMaps

_SIDE = 2.3  # of a panel, in inches


@dataclass(frozen=True)
class AttentionRow:
    """One backbone and layer.

    Attributes:
        title: of the row.
        patch_size: of its patches, in pixels of the image.
        maps: what to draw.
    """

    title: str
    patch_size: int
    maps: AttentionMaps


def plot_attention(pixels: NDArray[np.uint8], rows: Sequence[AttentionRow]) -> Figure:
    """What each prefix token attends to, averaged over heads: a row a backbone and layer, a column a token.

    Each panel has colours of its own, from 0 to its largest value, which its bar tells; below it stands how much of the
    attention is on patches at all, the rest being on tokens in front of them.

    Args:
        pixels: the image as the backbones saw it, RGB (h, w, 3), uint8.
        rows: at least one.
    """
    names = list(dict.fromkeys(name for row in rows for name in row.maps.names))
    figure, axes = _grid(len(rows), 1 + len(names), pixels)
    for line, row in zip(axes, rows, strict=True):
        line[0].imshow(pixels)
        line[0].set_ylabel(row.title, fontsize=8)
        for panel, name in zip(line[1:], names, strict=True):
            if name not in row.maps.names:
                panel.set_visible(False)
                continue
            heat = row.maps.mean[row.maps.names.index(name)]
            _draw(figure, panel, heat, row.patch_size, pixels)
            panel.set_xlabel(f"{100 * heat.sum():.0f} % on patches", fontsize=7)
    for panel, name in zip(axes[0], ["image", *names], strict=True):
        panel.set_title(name, fontsize=8)
    return figure


def compare_attention(pictures: Sequence[NDArray[np.uint8]], columns: Sequence[Sequence[AttentionRow]]) -> Figure:
    """What the first prefix token, CLS where there is one, attends to: a row an image, a column a backbone.

    Args:
        pictures: the images as the backbones saw them, RGB (h, w, 3), uint8.
        columns: of each backbone its maps of each image; at least one.
    """
    figure, axes = _grid(len(pictures), 1 + len(columns), pictures[0])
    for line, pixels, rows in zip(axes, pictures, zip(*columns, strict=True), strict=True):
        line[0].imshow(pixels)
        for panel, row in zip(line[1:], rows, strict=True):
            _draw(figure, panel, row.maps.mean[0], row.patch_size, pixels)
    for panel, title in zip(axes[0], ["image", *(rows[0].title for rows in columns)], strict=True):
        panel.set_title(title, fontsize=7)
    return figure


def plot_heads(pixels: NDArray[np.uint8], row: AttentionRow) -> Figure:
    """The same for each head: a row a token, a column a head."""
    heads = row.maps.heads
    figure, axes = _grid(heads.shape[0], heads.shape[1], pixels)
    figure.suptitle(row.title, fontsize=9)
    for line, maps, name in zip(axes, heads, row.maps.names, strict=True):
        line[0].set_ylabel(name, fontsize=8)
        for head, (panel, heat) in enumerate(zip(line, maps, strict=True)):
            _draw(figure, panel, heat, row.patch_size, pixels)
            panel.set_title(f"head {head}", fontsize=7)
    return figure


def _grid(lines: int, columns: int, pixels: NDArray[np.uint8]) -> tuple[Figure, Any]:
    height, width = pixels.shape[:2]
    scale = _SIDE / max(height, width)
    size = (columns * (width * scale + 0.5) + 0.4, lines * (height * scale + 0.4) + 0.3)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False)
    for panel in axes.flat:
        panel.set(xticks=[], yticks=[])
    return figure, axes


def _draw(figure: Figure, panel: Axes, heat: NDArray[np.float32], patch_size: int, pixels: NDArray[np.uint8]) -> None:
    """A map where its patches lie in the image, with a colour bar; what they have of padding is cut off."""
    rows, columns = heat.shape
    drawn = panel.imshow(heat, cmap="viridis", vmin=0, extent=(0, columns * patch_size, rows * patch_size, 0))
    panel.set_xlim(0, pixels.shape[1])
    panel.set_ylim(pixels.shape[0], 0)
    bar = figure.colorbar(drawn, ax=panel, fraction=0.05, pad=0.02, ticks=[0, float(heat.max())], format="%.2g")
    bar.ax.tick_params(labelsize=6, length=2)
