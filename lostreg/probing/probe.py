"""Evaluation of frozen features: what can be read off a backbone's tokens by one linear layer.

As in table 2 of "Vision Transformers Need Registers" (Darcet et al., ICLR 2024): classes of images off CLS (or the mean
of the patches), classes and depths of pixels off the patches, by layers that are trained; classes of images off CLS by
their names' texts. `lostreg.artifacts.probes` asks something else: what single tokens, outliers among them, hold.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lostreg.artifacts.probes import Spread
from lostreg.checks import shown
from lostreg.defaults import PROBE_SEEDS, PROBE_TOKENS
from lostreg.errors import DatasetError, ImageError, LostregError, OptionError
from lostreg.inference.discoverer import Discoverer, check_discoverer
from lostreg.metrics import class_overlaps, root_mean_square
from lostreg.models.backbone import Backbone
from lostreg.probing.data import Indices, ProbeData, check_seeds
from lostreg.probing.heads import (
    PENALTIES,
    Fit,
    Head,
    Loss,
    Rows,
    choose,
    fit_ridge,
    fit_softmax,
    softmax_loss,
    squared_error,
)
from lostreg.probing.maps import Frame, predicted_classes, predicted_depths
from lostreg.probing.tokens import Collected, collect_tokens
from lostreg.probing.zero_shot import text_head
from lostreg.progress import OnProgress, telling

RESAMPLES: Final = 1000
_INTERVAL: Final = (2.5, 97.5)
_DIGITS: Final = 6  # of figures in records


@dataclass(frozen=True)
class ProbeResult:
    """How well a task can be solved from one backbone's frozen tokens.

    Attributes:
        backbone: its name.
        title: the same, with its test-time registers and its file of weights, for people.
        weights: where they came from.
        registers: its test-time registers; None without any.
        prefix: names of its tokens in front of the patches.
        tokens: what the head sees: ``cls``, ``cls+mean``, ``mean`` or ``patches``.
        dimensions: of what the head sees.
        metric: ``top-1`` in percent, ``mIoU`` in percent, or ``RMSE`` in the unit of the depth maps.
        score: over the seeds.
        interval: of the mean over the seeds, 95 %, from images drawn again and again.
        chance: the same figure of a head that sees no tokens, with the first seed.
        images: how many were trained, chosen and measured on with the first seed; zero-shot trains and chooses on none.
        classes: of segmentation, each class's IoU in percent, mean over the seeds; None where it is nowhere.
        penalties: that were chosen, one a seed; none of zero-shot.
        left_out: places of the images that could not be read.
        errors: why.
        resamples: the figure behind the interval for each draw of images; the same draws for every backbone.
    """

    backbone: str
    title: str
    weights: str
    registers: dict[str, Any] | None
    prefix: tuple[str, ...]
    tokens: str
    dimensions: int
    metric: str
    score: Spread
    interval: tuple[float, float]
    chance: float
    images: tuple[int, int, int]
    classes: dict[str, float | None]
    penalties: tuple[float, ...]
    left_out: tuple[int, ...]
    errors: tuple[ImageError, ...]
    resamples: tuple[float, ...]

    def record(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        values = {**vars(self), "score": vars(self.score), "errors": [str(error) for error in self.errors]}
        rounded: dict[str, Any] = _rounded(values)
        return rounded


Split = tuple[Indices, Indices, Indices]
Ratios = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Of each measured image, numerators and denominators of the ratios behind a metric, (images, ratios) each; zeros where
the image was not measured."""


def identity(backbone: Backbone) -> dict[str, Any]:
    """The fields of a result that tell one backbone from another."""
    weights = backbone.weights
    of_file = f" ({weights.split(' sha256:')[0].removeprefix('file ')})" if weights.startswith("file ") else ""
    return {
        "backbone": backbone.spec.name,
        "title": backbone.title + of_file,
        "weights": weights,
        "registers": backbone.registers.describe() if backbone.registers else None,
    }


@dataclass(frozen=True)
class _Task:
    """How heads of a task are fitted and measured.

    Attributes:
        metric: see `ProbeResult`.
        scale: of the metric.
        fit: of heads.
        loss: that the penalty is chosen by.
        measure: of an image, by its place, each head's outputs, and frames: numerator and denominator of each of
            several ratios. Both are summed over images; the mean of the quotients is the metric.
    """

    metric: str
    scale: float
    fit: Fit
    loss: Loss
    measure: Callable[[ProbeData, int, list[Tensor], Mapping[int, Frame]], Iterator[tuple[Any, Any]]]


def probe(
    discoverer: Discoverer,
    data: ProbeData,
    *,
    tokens: str = PROBE_TOKENS[0],
    seeds: Sequence[int] = tuple(range(PROBE_SEEDS)),
    cache: str | Path | None = None,
    on_progress: OnProgress = lambda _: None,
) -> ProbeResult:
    """Train linear heads on a frozen backbone's tokens, or make one of the names of the classes, and measure them.

    Tokens are those of the last layer, after the final norm; images are run once. For each seed the head whose penalty
    is best on a part of the training images is measured: see `ProbeData.split`, and docs/probes.md for the method.

    Args:
        discoverer: the backbone, and how images are read; options of the search for objects do not matter.
        data: from `lostreg.load_probe_data`.
        tokens: what stands for an image in classification: ``cls``, ``mean`` (of the patches) or ``cls+mean``. Without
            a CLS token it is ``mean``. Zero-shot takes CLS.
        seeds: of the splits, one each; zero-shot has none.
        cache: folder for the file with the tokens; None for the system's folder for temporary files.
        on_progress: called after each class's text, each image, each seed's head, and each image that is measured on.

    Raises:
        OptionError: if there are no such tokens, or no seed, or open_clip is not installed, which zero-shot needs.
        BackboneError: of zero-shot, if the backbone has no text tower, or it cannot be had.
        DatasetError: if too few images can be read.
        LostregError: if tokens are not finite.

    Example:
        >>> discoverer = lostreg.Discoverer("dinov2_vits14_reg", max_side=56, device="cpu")
        >>> data = lostreg.load_probe_data("pets", "classification")
        >>> found = lostreg.probe(discoverer, data, tokens="cls+mean", seeds=(0, 1))
        >>> found.metric, found.dimensions, found.images, found.chance
        ('top-1', 768, (4, 2, 4), 50.0)
    """
    check_discoverer(discoverer, "a Discoverer and then data")
    if not isinstance(data, ProbeData):
        raise OptionError(f"expected data of load_probe_data, not {shown(data)}")
    if tokens not in PROBE_TOKENS:
        raise OptionError(f"tokens must be one of {', '.join(PROBE_TOKENS)}, not {tokens!r}")
    seeds = check_seeds(seeds)
    named: Head | None = None
    if data.task == "zero-shot":
        tokens, seeds = "cls", (0,)
        named = text_head(discoverer.backbone, data.classes, on_progress)
    elif data.task != "classification":
        tokens = "patches"
    elif not discoverer.backbone.spec.class_token:
        tokens = "mean"
    task, outputs = _TASKS[data.task], max(1, len(data.classes))
    kept = collect_tokens(discoverer, data, tokens, None if cache is None else Path(cache), on_progress)
    usable = np.array(kept.readable, np.int64)
    if not len(usable):
        raise LostregError(f"none of {len(data.images)} images could be read: {kept.errors[0]}")
    data.check(usable)
    splits = [data.split(seed, usable) for seed in seeds]
    if named is None:
        fitted = _heads(kept, splits, task, outputs, discoverer.backbone)
        heads = list(telling(fitted, len(splits) + 1, on_progress, "heads"))
    else:
        counts = torch.from_numpy(np.bincount(data.labels[usable], minlength=outputs)).to(named.bias)
        heads = [named, dataclasses.replace(named, weight=torch.zeros_like(named.weight), bias=counts)]
    parts = [measuring for *_, measuring in (*splits, splits[0])]
    *measured, by_chance = _measure(kept, data, task, parts, heads, on_progress)
    every = np.ones(len(by_chance[0]))
    scores = [task.scale * float(_figure(part, every)) for part in measured]
    if np.isnan(scores).any():
        raise DatasetError(f"{data.root}: nothing is known of any pixel of the images that are measured on")
    drawn = task.scale * _resampled(measured)
    low, high = np.nanpercentile(drawn, _INTERVAL)
    missing = sorted(set(range(len(data.images))) - set(kept.readable))
    return ProbeResult(
        **identity(discoverer.backbone),
        prefix=tuple(discoverer.backbone.prefix_names),
        tokens=tokens,
        dimensions=len(heads[0].mean),
        metric=task.metric,
        score=Spread.over(scores),
        interval=(float(low), float(high)),
        chance=task.scale * float(_figure(by_chance, every)),
        images=(len(splits[0][0]), len(splits[0][1]), len(splits[0][2])),
        classes=_class_scores(data, measured) if data.task == "segmentation" else {},
        penalties=tuple(head.penalty for head in heads[:-1]) if named is None else (),
        left_out=tuple(missing),
        errors=tuple(kept.errors),
        resamples=tuple(drawn.tolist()),
    )


def _class_scores(data: ProbeData, measured: Sequence[Ratios]) -> dict[str, float | None]:
    """IoU of each class in percent, mean over the seeds that have it."""
    by_seed = np.array([100 * _quotients(part, np.ones(len(part[0]))) for part in measured])
    there = ~np.isnan(by_seed)
    return {
        name: float(by_seed[there[:, place], place].mean()) if there[:, place].any() else None
        for place, name in enumerate(data.classes)
    }


def difference(first: dict[str, Any], other: dict[str, Any]) -> tuple[float, float, float] | None:
    """How much better or worse another backbone's figure is, and the 95 % interval over the same draws of images.

    Args:
        first: record of a result.
        other: record of another on the same data, with the same seeds.

    Returns:
        Other minus first, low and high; None where the two could not read the same images.
    """
    if first["left_out"] != other["left_out"]:
        return None
    gaps = np.array(other["resamples"], float) - np.array(first["resamples"], float)
    low, high = np.nanpercentile(gaps, _INTERVAL)
    return other["score"]["mean"] - first["score"]["mean"], float(low), float(high)


def _heads(kept: Collected, splits: Sequence[Split], task: _Task, outputs: int, backbone: Backbone) -> Iterator[Head]:
    """For each split the head whose penalty is best on the part for that; then one of the first that sees no tokens."""
    tokens, targets, images = kept.training.rows(), np.concatenate(kept.targets), np.concatenate(kept.images)

    def rows_of(part: Indices, like: Rows | None = None) -> Rows:
        return Rows(tokens, targets, np.flatnonzero(np.isin(images, part)), backbone.device, like)

    for fitted, chosen_on, _ in splits:
        rows = rows_of(fitted)
        yield choose(task.fit(rows, outputs, PENALTIES), task.loss, rows_of(chosen_on, like=rows))
    yield from task.fit(rows_of(splits[0][0]), outputs, (np.inf,))


def _measure(
    kept: Collected,
    data: ProbeData,
    task: _Task,
    parts: Sequence[Indices],
    heads: Sequence[Head],
    on_progress: OnProgress,
) -> list[Ratios]:
    """Each head on its part of the images; an image is read once for all of them."""
    tokens, device = kept.measuring.rows(), heads[0].weight.device
    images = np.unique(np.concatenate(parts))
    width = len(data.classes) if data.task == "segmentation" else 1
    tables = [(np.zeros((len(images), width)), np.zeros((len(images), width))) for _ in heads]
    belongs = [np.isin(images, part) for part in parts]
    for row, number in enumerate(telling(images.tolist(), len(images), on_progress, "measured")):
        seen = torch.from_numpy(np.array(tokens[kept.spans[number]])).to(device)
        concerned = [place for place in range(len(heads)) if belongs[place][row]]
        ratios = task.measure(data, number, [heads[place](seen) for place in concerned], kept.frames)
        for place, (numerator, denominator) in zip(concerned, ratios, strict=True):
            tables[place][0][row], tables[place][1][row] = numerator, denominator
    return tables


def _measure_class(
    data: ProbeData, number: int, outputs: list[Tensor], frames: Mapping[int, Frame]
) -> Iterator[tuple[Any, Any]]:
    """Whether the class is right, of one."""
    del frames
    for output in outputs:
        yield int(output.argmax()) == data.labels[number], 1


def _measure_mask(
    data: ProbeData, number: int, outputs: list[Tensor], frames: Mapping[int, Frame]
) -> Iterator[tuple[Any, Any]]:
    """Intersection and union of each class."""
    truth = data.read_map(number)
    for output in outputs:
        yield class_overlaps(predicted_classes(output, frames[number], truth.shape), truth, len(data.classes))


def _measure_depth(
    data: ProbeData, number: int, outputs: list[Tensor], frames: Mapping[int, Frame]
) -> Iterator[tuple[Any, Any]]:
    """The image's error, of one; an image without any depth does not count."""
    truth = data.read_map(number)
    for output in outputs:
        error = root_mean_square(predicted_depths(output, frames[number], truth.shape), truth)
        yield (0, 0) if np.isnan(error) else (error, 1)


_TASKS: Final = {
    "classification": _Task("top-1", 100, fit_softmax, softmax_loss, _measure_class),
    "zero-shot": _Task("top-1", 100, fit_softmax, softmax_loss, _measure_class),
    "segmentation": _Task("mIoU", 100, fit_softmax, softmax_loss, _measure_mask),
    "depth": _Task("RMSE", 1, fit_ridge, squared_error, _measure_depth),
}


def _quotients(ratios: Ratios, weights: NDArray[Any]) -> NDArray[np.float64]:
    """Each ratio over images that count with these weights, (..., images); NaN where none of them has any of it."""
    numerator, denominator = (weights @ part for part in ratios)
    quotients = np.full(numerator.shape, np.nan)
    np.divide(numerator, denominator, out=quotients, where=denominator > 0)
    return quotients


def _figure(ratios: Ratios, weights: NDArray[Any]) -> NDArray[np.float64]:
    """The mean of the ratios that there are, (...)."""
    quotients = _quotients(ratios, weights)
    there = ~np.isnan(quotients)
    counts = there.sum(axis=-1)
    figure = np.where(there, quotients, 0).sum(axis=-1) / np.maximum(counts, 1)
    mean: NDArray[np.float64] = np.where(counts, figure, np.nan)
    return mean


def _resampled(parts: Sequence[Ratios]) -> NDArray[np.float64]:
    """The mean over seeds for images drawn with replacement, as many as there are: (RESAMPLES,)."""
    random, images = np.random.default_rng(0), len(parts[0][0])
    figures = np.empty(RESAMPLES)
    for draw in range(RESAMPLES):
        weights = np.bincount(random.integers(images, size=images), minlength=images)
        by_seed = [_figure(part, weights) for part in parts]
        figures[draw] = np.nanmean(by_seed) if not np.isnan(by_seed).all() else np.nan
    return figures


def _rounded(value: Any) -> Any:
    """Plain values with so many digits that a table and a difference lose nothing."""
    if isinstance(value, float):
        return round(value, _DIGITS) if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _rounded(entry) for name, entry in value.items()}
    return [_rounded(entry) for entry in value] if isinstance(value, list | tuple) else value
