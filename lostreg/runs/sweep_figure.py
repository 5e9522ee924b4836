"""The chart of a sweep, with matplotlib."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lostreg.errors import LostregError
from lostreg.runs.sweep import SweepRow


def plot_sweep(path: Path, rows: Sequence[SweepRow], title: str) -> None:
    """Corloc against the bias, a panel a feature and a line a layer; dashed: the automatic bias.

    Args:
        path: the picture; its suffix says in which format, such as ``.png``, ``.svg`` or ``.pdf``.
        rows: at least one.
        title: of the whole picture.

    Raises:
        LostregError: if the file cannot be written.
    """
    features = list(dict.fromkeys(row.feature for row in rows))
    layers = sorted({row.layer for row in rows})
    columns = min(2, len(features))
    lines = -(-len(features) // columns)
    figure = Figure(figsize=(5.4 * columns, 3.6 * lines + 0.4), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for index, panel in enumerate(axes.flat):
        if index < len(features):
            _panel(panel, [row for row in rows if row.feature == features[index]], layers)
        else:
            panel.set_visible(False)
    highest = max(score.percent for row in rows for score in (*row.fixed, row.auto))
    axes[0, 0].set_ylim(0, 1.08 * max(highest, 1.0))
    for panel in axes[:, 0]:
        panel.set_ylabel("corloc (%)")
    for column in range(columns):  # the lowest panel that is there
        last = max(line for line in range(lines) if line * columns + column < len(features))
        axes[last, column].set_xlabel("bias")
        axes[last, column].tick_params(labelbottom=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise LostregError(f"cannot write {path}: {error}") from error


def _panel(panel: Axes, rows: Sequence[SweepRow], layers: Sequence[int]) -> None:
    colours = mpl.colormaps["viridis"]
    for row in rows:
        place = layers.index(row.layer) / max(1, len(layers) - 1)
        colour = colours(0.9 * place)
        points = sorted(zip(row.biases, (score.percent for score in row.fixed), strict=True))
        panel.plot(*zip(*points, strict=True), color=colour, marker=".", label=f"layer {row.layer}")
        panel.axhline(row.auto.percent, color=colour, linestyle="--", linewidth=1.2)
    panel.plot([], [], color="0.3", linestyle="--", linewidth=1.2, label="auto, without labels")
    panel.set_title(rows[0].feature)
    panel.grid(alpha=0.3)
    panel.legend(fontsize="small", loc="best")
