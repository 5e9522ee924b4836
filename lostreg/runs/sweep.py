"""Corloc over features, layers and biases from one forward an image, beside what ``auto`` makes of each feature.

A researcher's study of a backbone: which feature of which layer, and which bias, if labels could choose it. All
features come from the same forward, all biases share one Gram matrix. ``sweep.jsonl`` is the run's memory, a line an
image; ``sweep.json`` is made of it at the end.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lostreg.datasets import Benchmark, Example
from lostreg.errors import ImageError, OptionError, PredictionsError
from lostreg.images.boxes import in_pixels
from lostreg.images.patches import PatchedPicture
from lostreg.inference.discoverer import Discoverer
from lostreg.inference.jobs import FeaturesJob, ObjectsJob
from lostreg.jsonio import as_line, whole_lines, write_json
from lostreg.methods.bias import TRIALS, trial_biases
from lostreg.methods.lost import Candidates
from lostreg.methods.similarity import Similarities
from lostreg.metrics import Corloc, is_hit, score_auc
from lostreg.models.features import resolve_layer
from lostreg.models.table import Feature
from lostreg.runs.folder import (
    benchmark_settings,
    check_same_run,
    describe_device,
    is_complete,
    locked,
    package_versions,
)

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
    """

    feature: Feature
    layer: int
    biases: tuple[float, ...]
    fixed: tuple[Corloc, ...]
    auto: Corloc
    auto_biases: tuple[float, ...]
    auc: float | None
    unconnected: int

    @property
    def best(self) -> int:
        """Place of the fixed bias with the most hits, the laxest of equal ones: labels chose it."""
        return max(range(len(self.biases)), key=lambda index: (self.fixed[index].hits, self.biases[index]))

    @property
    def difference(self) -> float:
        """Corloc of ``auto`` minus that of the best fixed bias, in points."""
        return self.auto.percent - self.fixed[self.best].percent


@dataclass(frozen=True)
class _Found:
    """What one image gave in one feature.

    Attributes:
        boxes: of every fixed bias and, last, of ``auto``, shape (K + 1, 4), pixels.
        bias: what ``auto`` chose.
        score: of its box.
        connected: whether its seed is connected to itself.
    """

    boxes: NDArray[np.float64]
    bias: float
    score: float
    connected: bool


def sweep(
    benchmark: Benchmark,
    discoverer: Discoverer,
    wanted: Wanted,
    biases: Sequence[float],
    out: Path,
    *,
    overwrite: bool = False,
    extra: dict[str, Any] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[SweepRow]:
    """Score every feature at every bias, going on where an earlier run into the same folder stopped.

    Features are L2-normalised. An image that cannot be read is a miss everywhere.

    Args:
        benchmark: its images must exist.
        discoverer: backbone, device and how images are read; its own feature, layer and bias play no part.
        wanted: pairs of feature and layer; layers from 0, or from the end when negative.
        biases: fixed biases to try, at least one.
        out: folder for ``sweep.jsonl`` and ``sweep.json``; made if need be.
        overwrite: whether to start anew instead of going on.
        extra: further settings of the benchmark to record and compare, such as a limit.
        on_progress: called after each image with how many are done, and of how many.

    Returns:
        One row a pair, in the order of ``wanted``.

    Raises:
        OptionError: if nothing is wanted, a feature or layer does not exist, or a bias is not finite.
        PredictionsError: if the folder cannot be written, is in use, or holds a run with other settings.
    """
    pairs = list(dict.fromkeys((feature, resolve_layer(discoverer.backbone, layer)) for feature, layer in wanted))
    values = tuple(dict.fromkeys(float(bias) for bias in biases))
    if not pairs or not values or not np.isfinite(values).all():
        raise OptionError(f"expected at least one feature and one finite bias, not {list(wanted)} and {list(biases)}")
    settings = benchmark_settings(benchmark, _options(discoverer, pairs, values), extra)
    features = FeaturesJob(discoverer.backbone, pairs, compiled=discoverer.options.compile)
    convert = partial(_convert, patch_size=discoverer.backbone.spec.patch_size)
    job = ObjectsJob(features, with_trials(values), discoverer.options.k_patches, normalize=True, convert=convert)
    stream = discoverer.stream_of(job)
    out = Path(out)
    with locked(out):
        lines = _prepare(out, settings, benchmark, pairs, overwrite=overwrite)
        known = len(lines)
        paths = (example.path for example in benchmark.examples)
        outcomes = stream.outcomes(paths, skip=known) if known < len(benchmark) else ()
        with (out / LINES_FILE).open("a", encoding="utf-8", newline="\n") as file:
            for example, outcome in zip(benchmark.examples[known:], outcomes, strict=True):
                line = _line(example, outcome, pairs)
                file.write(as_line(line) + "\n")
                file.flush()
                lines.append(line)
                if on_progress:
                    on_progress(len(lines), len(benchmark))
        rows = [_row(lines, pair, values) for pair in pairs]
        if known < len(benchmark) or not is_complete(out / RESULTS_FILE):
            device = describe_device(discoverer.backbone.device)
            write_json(out / RESULTS_FILE, _results(settings, rows, lines, device))
    return rows


def summary(rows: Sequence[SweepRow]) -> dict[str, float]:
    """How far ``auto`` lands from the best fixed bias, in points of corloc, over all features: mean and worst."""
    differences = [row.difference for row in rows]
    return {"mean": float(np.mean(differences)), "worst": float(np.min(differences))}


def with_trials(values: tuple[float, ...]) -> Callable[[Similarities], Tensor]:
    """Biases for an `ObjectsJob`: the given ones for every image, and after them those that ``auto`` tries."""

    def biases(similarities: Similarities) -> Tensor:
        trials = trial_biases(similarities)
        fixed = torch.tensor(values, device=trials.device).expand(len(trials), -1)
        return torch.cat([fixed, trials], dim=1)

    return biases


def _convert(candidates: list[Candidates], pictures: list[PatchedPicture], patch_size: int) -> list[list[_Found]]:
    """The candidates of a run of pictures, a list of features for each picture."""
    by_feature = []
    for found in candidates:
        boxes, trials = found.boxes(), len(TRIALS)
        chosen = boxes.shape[1] - trials + found.scores[:, -trials:].argmax(axis=1)
        by_feature.append(
            [
                _Found(
                    in_pixels(np.vstack([boxes[image, :-trials], boxes[image, [best]]]), picture, patch_size),
                    float(found.maps.bias[image, best]),
                    float(found.scores[image, best]),
                    bool(found.connected[image, best]),
                )
                for image, (picture, best) in enumerate(zip(pictures, chosen.tolist(), strict=True))
            ]
        )
    return [list(features) for features in zip(*by_feature, strict=True)]


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


def _prepare(
    out: Path, settings: dict[str, Any], benchmark: Benchmark, pairs: Wanted, *, overwrite: bool
) -> list[dict[str, Any]]:
    """Make sure that the folder belongs to this run, and return the lines that it holds already."""
    file, results = out / LINES_FILE, out / RESULTS_FILE
    if overwrite:
        file.unlink(missing_ok=True)
        results.unlink(missing_ok=True)
    elif results.exists() or file.exists():
        check_same_run(results, settings)
    try:
        lines = [json.loads(line) for line in whole_lines(file).splitlines()]
        wanted = [example.image_id for example in benchmark.examples[: len(lines)]]
        if [line["image_id"] for line in lines] != wanted:
            raise ValueError("the images are others, or in another order")
        names = {_name(pair) for pair in pairs}
        if any(set(line["features"]) != names for line in lines if "error" not in line):
            raise ValueError("the features are others")
    except (ValueError, TypeError, KeyError) as error:
        raise PredictionsError(f"{file} is not of this run ({error}): use --overwrite or another --out") from error
    if len(lines) < len(benchmark) or not results.exists():
        write_json(results, {"complete": False, **settings})
    return lines


def _line(example: Example, outcome: list[_Found] | ImageError, pairs: Wanted) -> dict[str, Any]:
    if isinstance(outcome, ImageError):
        return {"image_id": example.image_id, "error": str(outcome).replace(str(example.path), example.path.name)}
    features = {}
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
    return {"image_id": example.image_id, "features": features}


def _row(lines: list[dict[str, Any]], pair: tuple[Feature, int], values: tuple[float, ...]) -> SweepRow:
    found = [line["features"][_name(pair)] for line in lines if "error" not in line]
    automatic = [entry["auto"] for entry in found]
    hits = [entry["hit"] for entry in automatic]
    scores = [entry["score"] for entry in automatic]
    counts = [sum(entry["hits"][index] == "1" for entry in found) for index in range(len(values))]
    return SweepRow(
        *pair,
        biases=values,
        fixed=tuple(Corloc(count, len(lines)) for count in counts),
        auto=Corloc(sum(hits), len(lines)),
        auto_biases=tuple(entry["bias"] for entry in automatic),
        auc=score_auc(scores, hits) if found else None,
        unconnected=sum(not entry["connected"] for entry in automatic),
    )


def _results(
    settings: dict[str, Any], rows: list[SweepRow], lines: list[dict[str, Any]], device: str
) -> dict[str, Any]:
    return {
        "complete": True,
        "auto_minus_best_fixed": {name: round(value, 4) for name, value in summary(rows).items()},
        "images": len(lines),
        "unreadable": sum("error" in line for line in lines),
        "rows": [_as_json(row) for row in rows],
        **settings,
        "versions": package_versions(),
        "device": device,
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
    }
