"""Corloc over features, layers and biases from one forward an image, beside what ``auto`` makes of each feature.

A researcher's study of a backbone: which feature of which layer, and which bias, if labels could choose it. All
features come from the same forward, all biases share one Gram matrix. Where the discoverer's method is another than
LOST, it runs beside it on each feature. ``sweep.jsonl`` is the run's memory, a line an image; ``sweep.json`` is made of
it at the end.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lostreg.checks import shown
from lostreg.datasets import Benchmark, Example
from lostreg.datasets.base import ImageId
from lostreg.errors import ImageError, ImageUnavailableError, OptionError
from lostreg.images.boxes import in_pixels
from lostreg.images.patches import PatchedPicture
from lostreg.inference.discoverer import Discoverer
from lostreg.inference.jobs import FeaturesJob, Method, ObjectsJob
from lostreg.inference.methods import METHODS, TOKENS
from lostreg.inference.options import ResolvedOptions
from lostreg.jsonio import as_line, is_finite_number, is_id
from lostreg.methods.bias import TRIALS, fixed_bias, on_device, trial_biases
from lostreg.methods.lost import Candidates, Lost, Maps
from lostreg.methods.similarity import Similarities
from lostreg.metrics import Corloc, is_hit, score_auc
from lostreg.models.features import resolve_layer
from lostreg.models.table import Feature
from lostreg.progress import OnProgress, Progress
from lostreg.runs.folder import Run
from lostreg.runs.results import benchmark_settings, describe_device

LINES_FILE: Final = "sweep.jsonl"
RESULTS_FILE: Final = "sweep.json"

Wanted = Sequence[tuple[Feature, int]]


@dataclass(frozen=True)
class SweepRow:
    """One feature of one layer.

    Attributes:
        feature: ``q``, ``k``, ``v`` or ``out``.
        layer: block index from 0.
        biases: the fixed biases, in the order given.
        fixed: the score of each of them, over the same images.
        auto: the score of ``auto``.
        auto_biases: what ``auto`` chose, one an image that could be read.
        auc: how well ``auto``'s scores tell its hits from its misses, see `score_auc`; None where one of them is
            missing.
        unconnected: images in which ``auto`` leaves the seed unconnected.
        other: the score of the discoverer's method, where that is another than LOST.
    """

    feature: Feature
    layer: int
    biases: tuple[float, ...]
    fixed: tuple[Corloc, ...]
    auto: Corloc
    auto_biases: tuple[float, ...]
    auc: float | None
    unconnected: int
    other: Corloc | None = None

    @property
    def best(self) -> int:
        """Place of the fixed bias with the most hits, the laxest of equal ones: labels chose it."""
        return max(range(len(self.biases)), key=lambda index: (self.fixed[index].hits, self.biases[index]))

    @property
    def difference(self) -> float:
        """Corloc of ``auto`` minus that of the best fixed bias, in points."""
        return self.auto.percent - self.fixed[self.best].percent


@dataclass(frozen=True)
class _Line:
    """One line of a sweep file: one image.

    Attributes:
        image_id: as in predictions files.
        features: by feature and layer, whether each fixed bias hits, and what ``auto`` makes of it; none for an image
            that could not be read.
        error: why it could not be read.
        unavailable: whether that was a passing fault: the next run tries it again.
    """

    image_id: ImageId
    features: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    unavailable: bool = False

    def to_line(self) -> str:
        rest: dict[str, Any] = {"features": self.features} if self.error is None else {"error": self.error}
        if self.unavailable:
            rest["unavailable"] = True
        return as_line({"image_id": self.image_id, **rest})


@dataclass(frozen=True)
class _Boxes:
    """What one image gave in one feature.

    Attributes:
        boxes: of every fixed bias and, last, of ``auto``, shape (K + 1, 4), pixels.
        bias: what ``auto`` chose.
        score: of its box.
        connected: whether its seed is connected to itself.
        other: the first box of the discoverer's method, shape (4,), pixels, where that is another than LOST.
    """

    boxes: NDArray[np.float64]
    bias: float
    score: float
    connected: bool
    other: NDArray[np.float64] | None = None


@dataclass(frozen=True)
class _Both:
    """LOST at all biases on each feature and, where that is another, the discoverer's method on each of them again."""

    lost: Lost
    other: Method | None
    pairs: int

    def __call__(self, runs: Sequence[Sequence[Tensor]], grids: Sequence[tuple[int, int]]) -> Sequence[Sequence[Maps]]:
        """See `Method`: of each feature the maps of LOST, then of each those of the other method."""
        maps: list[list[Maps]] = [[*of_run] for of_run in self.lost([run[: self.pairs] for run in runs], grids)]
        if self.other is not None:
            for place in range(self.pairs):
                again = [[run[place], *run[2 * self.pairs :]] for run in runs]
                for of_run, found in zip(maps, self.other(again, grids), strict=True):
                    of_run += found
        return maps


def sweep(
    benchmark: Benchmark,
    discoverer: Discoverer,
    wanted: Wanted,
    biases: Sequence[float],
    out: Path,
    *,
    overwrite: bool = False,
    extra: dict[str, Any] | None = None,
    on_progress: OnProgress = lambda _: None,
) -> list[SweepRow]:
    """Score every feature at every bias, going on where an earlier run into the same folder stopped.

    Features are L2-normalised. An image that cannot be read is a miss everywhere; one that could not be had is tried
    again by the next run.

    Args:
        benchmark: its images must exist.
        discoverer: backbone, device and how images are read; its own feature, layer and bias play no part.
        wanted: pairs of feature and layer; layers from 0, or from the end when negative.
        biases: fixed biases to try, at least one.
        out: folder for ``sweep.jsonl`` and ``sweep.json``; made if need be.
        overwrite: whether to start anew instead of going on.
        extra: further settings of the benchmark to record and compare, such as a limit.
        on_progress: called after each image.

    Returns:
        One row a pair, in the order of ``wanted``.

    Raises:
        OptionError: if nothing is wanted, a feature or layer does not exist, a bias is not finite, or the method is
            DINO-seg, which compares no features.
        PredictionsError: if the folder cannot be written, is in use, or holds a run with other settings.
    """
    pairs = list(dict.fromkeys((feature, resolve_layer(discoverer.backbone, layer)) for feature, layer in wanted))
    values = tuple(dict.fromkeys(fixed_bias(bias) for bias in biases))
    if not pairs or not values:
        raise OptionError(f"expected at least one feature and one finite bias, not {list(wanted)} and {list(biases)}")
    if discoverer.options.method == "dinoseg":
        raise OptionError("dinoseg compares no features, so there is nothing to sweep: score it by `lostreg eval`")
    settings = benchmark_settings(benchmark, _options(discoverer, pairs, values), extra)
    stream = discoverer.stream_of(_job(discoverer, pairs, values))
    examples = {example.image_id: example for example in benchmark.examples}
    lines: dict[ImageId, _Line] = {}
    parse = partial(_parse, names={_name(pair) for pair in pairs}, count=len(values))
    with Run(
        Path(out),
        list(examples),
        settings,
        describe_device(discoverer.backbone.device, discoverer.backbone.dtype),
        parse,
        memory=LINES_FILE,
        results=RESULTS_FILE,
        overwrite=overwrite,
    ) as run:
        lines |= {line.image_id: line for line in run.resume()}
        known = len(lines)
        outcomes = run.outcomes(stream.outcomes, lambda image_id: examples[image_id].source, stream.batch_size)
        for image_id, outcome in outcomes:
            lines[image_id] = _line(examples[image_id], outcome, pairs)
            run.append(lines[image_id])
            error = outcome if isinstance(outcome, ImageError) else None
            on_progress(Progress(len(lines), len(examples), known=known, error=error))
        run.put_in_order()
        in_order = [lines[image_id] for image_id in examples]
        rows = [_row(in_order, pair, values) for pair in pairs]
        run.finish(_figures(rows, in_order))
    return rows


def summary(rows: Sequence[SweepRow]) -> dict[str, float]:
    """How far ``auto`` lands from the best fixed bias, in points of corloc, over all features: mean and worst."""
    differences = [row.difference for row in rows]
    return {"mean": float(np.mean(differences)), "worst": float(np.min(differences))}


def with_trials(values: tuple[float, ...]) -> Callable[[Similarities], Tensor]:
    """Biases for an `ObjectsJob`: the given ones for every image, and after them those that ``auto`` tries."""

    def biases(similarities: Similarities) -> Tensor:
        trials = trial_biases(similarities)
        return torch.cat([on_device(values, trials.device).expand(len(trials), -1), trials], dim=1)

    return biases


def _job(discoverer: Discoverer, pairs: Wanted, values: tuple[float, ...]) -> ObjectsJob[list[_Boxes]]:
    options = discoverer.options
    is_other = options.method != "lost"
    wanted = [*pairs, *(pairs if is_other else ()), *([TOKENS] if options.objectness is not None else [])]
    other = METHODS[options.method].make(options, discoverer.backbone.device) if is_other else None
    return ObjectsJob(
        FeaturesJob(discoverer.backbone, wanted, compiled=options.compile),
        _Both(Lost(with_trials(values), options.k_patches, options.scorer), other, len(pairs)),
        normalize=True,
        beside=0 if options.objectness is None else 1,
        convert=partial(_convert, patch_size=discoverer.backbone.spec.patch_size, count=len(pairs), options=options),
    )


def _convert(
    found: list[Any], pictures: list[PatchedPicture], patch_size: int, count: int, options: ResolvedOptions
) -> list[list[_Boxes]]:
    """What a run of pictures holds, a list of features for each picture."""
    by_feature = _lost_boxes(found[:count], pictures, patch_size)
    for boxes, again in zip(by_feature, found[count:], strict=False):
        for image, objects in enumerate(METHODS[options.method].objects(again, options)):
            other = in_pixels(objects.xyxy[:1], pictures[image], patch_size)[0]
            boxes[image] = replace(boxes[image], other=other)
    return [list(features) for features in zip(*by_feature, strict=True)]


def _lost_boxes(candidates: list[Candidates], pictures: list[PatchedPicture], patch_size: int) -> list[list[_Boxes]]:
    """The boxes of LOST, of each feature one a picture."""
    by_feature = []
    for found in candidates:
        boxes, trials = found.boxes(), len(TRIALS)
        chosen = boxes.shape[1] - trials + found.scores[:, -trials:].argmax(axis=1)
        by_feature.append(
            [
                _Boxes(
                    in_pixels(np.vstack([boxes[image, :-trials], boxes[image, [best]]]), picture, patch_size),
                    float(found.maps.bias[image, best]),
                    float(found.scores[image, best]),
                    bool(found.connected[image, best]),
                )
                for image, (picture, best) in enumerate(zip(pictures, chosen.tolist(), strict=True))
            ]
        )
    return by_feature


def _options(discoverer: Discoverer, pairs: Wanted, values: tuple[float, ...]) -> dict[str, Any]:
    """What decides the figures: the discoverer's options but for what the sweep chooses itself."""
    replaced = ("feature", "layer", "bias", "normalize")
    kept = {name: value for name, value in discoverer.options.record().items() if name not in replaced}
    return {
        **kept,
        "features": [_name(pair) for pair in pairs],
        "biases": list(values),
        "auto_trials": list(TRIALS),
        "normalize": True,
    }


def _name(pair: tuple[Feature, int]) -> str:
    return f"{pair[0]} {pair[1]}"


def _parse(raw: bytes, names: set[str], count: int) -> _Line:
    """A line of a sweep over these features and so many fixed biases."""
    fields = json.loads(raw)
    if not isinstance(fields, dict):
        raise TypeError(f"expected an object, found {type(fields).__name__}")
    line = _Line(**fields)
    if not is_id(line.image_id) or not isinstance(line.features, dict):
        raise TypeError("expected an image_id, and features by name")
    if line.error is None and set(line.features) != names:
        raise ValueError("the features are others")
    if not isinstance(line.error, str | None):
        raise TypeError(f"expected the error as text, not {shown(line.error)}")
    for entry in line.features.values():
        auto = entry["auto"]
        sound = [isinstance(entry["hits"], str) and bool(re.fullmatch(f"[01]{{{count}}}", entry["hits"]))]
        sound += [isinstance(auto[name], bool) for name in ("hit", "connected")]
        sound += [is_finite_number(auto[name]) for name in ("score", "bias")]
        sound += [isinstance(entry.get("other", {"hit": True})["hit"], bool)]
        if not all(sound):
            raise ValueError(f"expected whether each bias hits, and what auto chose, not {shown(entry)}")
    return line


def _line(example: Example, outcome: list[_Boxes] | ImageError, pairs: Wanted) -> _Line:
    if isinstance(outcome, ImageError):
        reason = str(outcome).replace(str(example.path), example.path.name)
        return _Line(example.image_id, error=reason, unavailable=isinstance(outcome, ImageUnavailableError))
    features: dict[str, Any] = {}
    for pair, found in zip(pairs, outcome, strict=True):
        hits = [is_hit([box], example.boxes) for box in found.boxes.tolist()]
        features[_name(pair)] = {
            "hits": "".join(str(int(hit)) for hit in hits[:-1]),
            "auto": {
                "hit": hits[-1],
                "box": [round(value, 3) for value in found.boxes[-1].tolist()],
                "score": round(found.score, 3),  # as in predictions files
                "bias": round(found.bias, 6),
                "connected": found.connected,
            },
        }
        if found.other is not None:
            box = found.other.tolist()
            features[_name(pair)]["other"] = {
                "hit": is_hit([box], example.boxes),
                "box": [round(value, 3) for value in box],
            }
    return _Line(example.image_id, features)


def _row(lines: list[_Line], pair: tuple[Feature, int], values: tuple[float, ...]) -> SweepRow:
    found = [line.features[_name(pair)] for line in lines if line.error is None]
    automatic = [entry["auto"] for entry in found]
    hits = [entry["hit"] for entry in automatic]
    scores = [entry["score"] for entry in automatic]
    others = [entry["other"]["hit"] for entry in found if "other" in entry]
    counts = [sum(entry["hits"][index] == "1" for entry in found) for index in range(len(values))]
    return SweepRow(
        *pair,
        biases=values,
        fixed=tuple(Corloc(count, len(lines)) for count in counts),
        auto=Corloc(sum(hits), len(lines)),
        auto_biases=tuple(entry["bias"] for entry in automatic),
        auc=score_auc(scores, hits) if found else None,
        unconnected=sum(not entry["connected"] for entry in automatic),
        other=Corloc(sum(others), len(lines)) if others else None,
    )


def _figures(rows: list[SweepRow], lines: list[_Line]) -> dict[str, Any]:
    return {
        "auto_minus_best_fixed": {name: round(value, 4) for name, value in summary(rows).items()},
        "images": len(lines),
        "unreadable": sum(line.error is not None for line in lines),
        "unavailable": sum(line.unavailable for line in lines),
        "rows": [_as_json(row) for row in rows],
    }


def _as_json(row: SweepRow) -> dict[str, Any]:
    low, high = row.auto.wilson_interval()
    return {
        "feature": row.feature,
        "layer": row.layer,
        "corloc": [round(score.percent, 4) for score in row.fixed],
        "best_bias": row.biases[row.best],
        "best_corloc": round(row.fixed[row.best].percent, 4),
        "auto_corloc": round(row.auto.percent, 4),
        "auto_hits": row.auto.hits,
        "auto_wilson_95": [round(low, 4), round(high, 4)],
        "auto_median_bias": round(float(np.median(row.auto_biases)), 4) if row.auto_biases else None,
        "auto_score_auc": None if row.auc is None else round(row.auc, 4),
        "auto_unconnected": row.unconnected,
        **({} if row.other is None else {"other_corloc": round(row.other.percent, 4), "other_hits": row.other.hits}),
    }
