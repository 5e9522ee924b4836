"""The pictures of an artifacts report, with matplotlib: several backbones side by side in each."""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from numpy.typing import NDArray

from lostreg.artifacts.measurement import COSINE_BINS, Measurement
from lostreg.artifacts.outliers import NormTally
from lostreg.artifacts.probes import PixelProbe, PositionProbe, Skipped

_NORMAL: Final = "#3b6ea5"
_OUTLIER: Final = "#c8442e"
_GREY: Final = "#777777"
_BARS: Final = 60  # of a histogram, about
_WIDTH: Final = 4.6  # of a panel, in inches
_COLUMNS: Final = 3
_PROBES: Final = (("position", "accuracy"), ("pixels", "error"))
_BANDS: Final = ((0.01, 0.99), (0.25, 0.75))


def norm_histograms(found: Sequence[Measurement]) -> Figure:
    """Norms of patches at the output, before and after the final norm (as the register paper's figure 3)."""
    figure, axes = _panels(found, "Norms of patch tokens at the output")
    for panel, measured in zip(axes, found, strict=True):
        before, after = measured.seen.layers[-1], measured.seen.final
        for tally, colour, name in ((after, _GREY, "after the final norm"), (before, _NORMAL, "before the final norm")):
            edges, shares = _histogram(tally)
            panel.stairs(shares, edges, fill=True, alpha=0.55, color=colour, label=name)
        _mark_cutoff(panel.axvline, measured)
        panel.set(xscale="log", yscale="log", xlabel="norm", title=measured.title)
        _plain_numbers(panel.xaxis, *panel.get_xlim())
        panel.legend(fontsize=8)
    axes[0].set_ylabel("share of patches")
    return figure


def norms_by_layer(found: Sequence[Measurement]) -> Figure:
    """How norms are distributed in each layer (as the register paper's figure 4)."""
    figure, axes = _panels(found, "Norms of tokens as they leave each block, before any final norm")
    for panel, measured in zip(axes, found, strict=True):
        tallies = measured.seen.layers
        layers = np.arange(len(tallies))
        for (low, high), alpha in zip(_BANDS, (0.25, 0.5), strict=True):
            bottom, top = ([tally.quantile(share) for tally in tallies] for share in (low, high))
            name = f"patches, {100 * low:.0f} to {100 * high:.0f} %"
            panel.fill_between(layers, bottom, top, color=_NORMAL, alpha=alpha, linewidth=0, label=name)
        panel.plot(layers, [tally.quantile(0.5) for tally in tallies], color=_NORMAL, label="patches, median")
        panel.plot(layers, [tally.largest for tally in tallies], ":", color=_OUTLIER, label="patches, largest")
        shades = colormaps["Dark2"](np.arange(max(1, len(measured.prefix_names))) % 8)
        for index, name in enumerate(measured.prefix_names):
            panel.plot(layers, measured.seen.prefix[:, index], "--", color=shades[index], linewidth=1, label=name)
        _mark_cutoff(panel.axhline, measured)
        if measured.emerges is not None:
            panel.axvline(measured.emerges, color=_OUTLIER, linewidth=0.8, label="outliers emerge")
        panel.set(yscale="log", xlabel="layer", title=measured.title)
        _plain_numbers(panel.yaxis, *panel.get_ylim())
        panel.legend(fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.22))  # the band fills the panel
    axes[0].set_ylabel("norm")
    return figure


def outlier_places(found: Sequence[Measurement]) -> Figure:
    """Where in the image outliers sit or, where there are none, how high norms are."""
    figure, axes = _panels(found, "Where in the image", shared=False)
    for panel, measured in zip(axes, found, strict=True):
        values, name = _places(measured)
        drawn = panel.imshow(values, extent=(0, 1, 1, 0), cmap="magma", interpolation="nearest")
        figure.colorbar(drawn, ax=panel, shrink=0.8, label=name)
        panel.set(title=measured.title, xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])
    return figure


def neighbour_similarities(found: Sequence[Measurement]) -> Figure:
    """Cosine similarity of patches to their neighbours after the patch embedding (as the paper's figure 5a)."""
    figure, axes = _panels(found, "Similarity to the 4 neighbours right after the patch embedding")
    edges = np.linspace(-1, 1, COSINE_BINS + 1)
    for panel, measured in zip(axes, found, strict=True):
        outlier, normal = measured.cosine_histograms()
        for counts, colour, name in ((normal, _NORMAL, "normal"), (outlier, _OUTLIER, "outlier")):
            if counts.sum():
                density = counts / counts.sum() * (COSINE_BINS / 2)
                panel.stairs(density, edges, fill=True, alpha=0.5, color=colour, label=name)
        panel.set(xlabel="mean cosine similarity", title=measured.title)
        if normal.sum() or outlier.sum():  # single patches have no neighbours
            panel.legend(fontsize=8)
    axes[0].set_ylabel("density of patches")
    return figure


def probe_bars(found: Sequence[Measurement]) -> Figure:
    """What linear probes read off tokens: position, pixels, class; bars are means over splits, whiskers deviations."""
    figure = Figure(figsize=(4.2 * 3, 3.4), layout="constrained")
    figure.suptitle("What linear probes read off tokens (held-out images)")
    panels = list(figure.subplots(1, 3))
    names = [one.title.replace(" + ", "\n+ ") for one in found]
    position, pixels = ([_probe_row(one, *probe) for one in found] for probe in _PROBES)
    _bars(panels[0], names, position, "position: top-1 accuracy (%)")
    _bars(panels[1], names, pixels, "pixels of the patch: L2 error")
    _bars(panels[2], names, [_class_row(one) for one in found], "class of the image: accuracy (%)")
    return figure


def gram_spectra(found: Sequence[Measurement]) -> Figure:
    """The Gram matrix's largest eigenvalues, with and without outliers."""
    figure, axes = _panels(found, "Spectrum of the Gram matrix")
    for panel, measured in zip(axes, found, strict=True):
        views = [(measured.sample.gram, _NORMAL, "all patches"), (measured.sample.gram_normal, _OUTLIER, "no outliers")]
        for view, colour, name in views:
            if view is not None:
                numbers = np.arange(1, len(view.spectrum) + 1)
                text = f"{name}: {100 * view.positive:.1f} % positive"
                panel.plot(numbers, np.maximum(view.spectrum, 1e-6), "o-", color=colour, markersize=3, label=text)
        panel.set(yscale="log", xlabel="eigenvalue", title=f"{measured.title}\n{measured.feature}, {measured.layer}")
        panel.legend(fontsize=8)
    axes[0].set_ylabel("share of the trace")
    return figure


def example_maps(measured: Measurement) -> Figure:
    """Images with the norms of their patches, outliers, and LOST's degree maps with and without these."""
    examples = measured.sample.examples
    has_outliers = any(example.outliers.any() for example in examples)
    names = ["image", "norm at the output", "degree"] + ["outliers", "degree without outliers"] * has_outliers
    heights = [np.clip(example.norms.shape[0] / example.norms.shape[1], 0.3, 3.0) for example in examples]
    figure = Figure(figsize=(3.1 * len(names), 2.6 * sum(heights) + 0.8), layout="constrained")
    figure.suptitle(measured.title)
    axes = figure.subplots(len(examples), len(names), squeeze=False, height_ratios=heights)
    for row, example in zip(axes, examples, strict=True):
        drawn: list[Any] = [
            None,
            row[1].imshow(example.norms, cmap="viridis", norm="log" if example.norms.min() > 0 else "linear"),
        ]
        row[0].imshow(example.pixels)
        drawn.append(row[2].imshow(example.degrees, cmap="viridis"))
        if has_outliers:
            row[3].imshow(_over(example.pixels, example.outliers))
            without = example.degrees if example.degrees_normal is None else example.degrees_normal
            drawn += [None, row[4].imshow(np.ma.masked_less(without, 0), cmap="viridis")]
        for panel, picture in zip(row, drawn, strict=False):
            if picture is not None:
                bar = figure.colorbar(picture, ax=panel, shrink=0.75)
                _plain_numbers(bar.ax.yaxis, *picture.get_clim())
    for panel, name in zip(axes[0], names, strict=True):
        panel.set_title(name)
    for panel in axes.flat:
        panel.set(xticks=[], yticks=[])
    return figure


def _panels(found: Sequence[Measurement], title: str, *, shared: bool = True) -> tuple[Figure, list[Axes]]:
    columns = min(_COLUMNS, len(found))
    rows = -(-len(found) // columns)
    figure = Figure(figsize=(max(5.6, _WIDTH * columns), 3.5 * rows + 0.4), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=shared and "all", sharey=shared and "all")
    for panel in axes.flat[len(found) :]:
        panel.set_visible(False)
    return figure, list(axes.flat[: len(found)])


def _histogram(tally: NormTally) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Edges and shares of merged bins, from the first that holds a norm to the last."""
    used = np.flatnonzero(tally.counts)
    first, last = max(1, int(used[0])), max(1, min(int(used[-1]), len(tally.edges) - 1))
    starts = np.arange(first, last + 1, -(-(last + 1 - first) // _BARS))
    shares = np.add.reduceat(tally.counts[first : last + 1], starts - first) / tally.count
    edges = np.append(tally.edges[starts - 1], tally.edges[last])
    return edges, shares


def _plain_numbers(axis: Axis, low: float, high: float) -> None:
    """Ticks of a logarithmic axis as 50, not 5 x 10^1; between powers of ten where there is little else."""
    plain = StrMethodFormatter("{x:g}")
    axis.set_major_formatter(plain)
    axis.set_minor_formatter(plain if high < 20 * low else NullFormatter())
    axis.set_minor_locator(LogLocator(subs=(1.5, 2, 3, 4, 5, 7)))  # with 8 and 9, numbers run into the next power


def _mark_cutoff(line: Any, measured: Measurement) -> None:
    if measured.cutoff.value is not None:
        share = 100 * measured.outliers / measured.patches
        line(measured.cutoff.value, color=_OUTLIER, linestyle="--", linewidth=1, label=f"cut-off, {share:.2f} % above")


def _places(measured: Measurement) -> tuple[NDArray[np.float64], str]:
    """Of each cell the share of outliers in per cent, or the geometric mean of its norms; NaN where it has no patch."""
    heat, tally = measured.seen.heat, measured.seen.layers[-1]
    with np.errstate(invalid="ignore", divide="ignore"):
        if measured.cutoff.value is not None:
            outlier, normal = measured.seen.split(heat, measured.cutoff.value)
            return 100 * outlier / (outlier + normal), "outliers (%)"
        logs = np.log(np.append(tally.edges, tally.edges[-1]))
        return np.exp(np.tensordot(logs, heat, axes=1) / heat.sum(axis=0)), "norm, geometric mean"


def _over(pixels: NDArray[np.uint8], outliers: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """The image in grey, with the outliers in red."""
    patch = pixels.shape[0] // outliers.shape[0]
    grey = np.repeat(pixels.mean(axis=2, keepdims=True), 3, axis=2) * 0.6 + 80
    grey[np.kron(outliers, np.ones((patch, patch), bool))] = (220, 50, 30)
    return grey.astype(np.uint8)


def _bars(panel: Axes, names: Sequence[str], rows: Sequence[dict[str, tuple[float, float]]], title: str) -> None:
    """Grouped bars: a group a backbone, a bar a kind of token, with its deviation."""
    panel.set_title(title, fontsize=10)
    kinds = list(dict.fromkeys(kind for row in rows for kind in row))
    if not kinds:
        panel.text(0.5, 0.5, "not measured", ha="center", va="center", transform=panel.transAxes, color=_GREY)
        panel.set(xticks=[], yticks=[])
        return
    width = min(0.25, 0.8 / len(kinds))
    shades = colormaps["tab10"](np.arange(len(kinds)) % 10)
    for index, kind in enumerate(kinds):
        places = [group + (index + 0.5 - len(kinds) / 2) * width for group, row in enumerate(rows) if kind in row]
        means, deviations = zip(*(row[kind] for row in rows if kind in row), strict=True)
        panel.bar(places, means, width, yerr=deviations, color=shades[index], label=kind, capsize=2)
    panel.set_xticks(range(len(rows)), names, fontsize=8)
    panel.set_xlim(-0.6, len(rows) - 0.4)
    panel.legend(fontsize=7)


def _probe_row(measured: Measurement, probe: str, figure: str) -> dict[str, tuple[float, float]]:
    found: dict[str, PositionProbe | PixelProbe | Skipped] = getattr(measured.sample, probe)
    spreads = {kind: getattr(one, figure) for kind, one in found.items() if not isinstance(one, Skipped)}
    return {kind: (spread.mean, spread.deviation) for kind, spread in spreads.items()}


def _class_row(measured: Measurement) -> dict[str, tuple[float, float]]:
    classes = measured.sample.classes
    if isinstance(classes, Skipped):
        return {}
    accuracies = {kind: one.accuracy for kind, one in classes.items() if not isinstance(one, Skipped)}
    return {kind: (accuracy.mean, accuracy.deviation) for kind, accuracy in accuracies.items()}
