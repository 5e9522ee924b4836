"""A benchmark run: predict, appending to a file that survives a kill; score; write down what was measured.

``predictions.jsonl`` is the run's memory: going on means reading it and computing what it lacks. ``results.json``
is there from the start with the settings, so that a run with other settings is noticed.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lostreg.datasets import Benchmark, Example
from lostreg.defaults import MAPS_FILE, PREDICTIONS_FILE, RESULTS_FILE
from lostreg.errors import ImageError, PredictionsError
from lostreg.inference.discoverer import Discoverer
from lostreg.inference.discovery import Discovery
from lostreg.jsonio import write_json
from lostreg.metrics import Corloc, Detections, DetectionScores, corloc, detection_scores, is_hit, score_auc
from lostreg.runs.folder import benchmark_settings, check_same_run, is_complete, locked, run_facts
from lostreg.runs.maps import ImageMaps, keep_maps, maps_of
from lostreg.runs.predictions import Prediction, RunFiles, from_discovery, from_error, recover_predictions


@dataclass(frozen=True)
class Progress:
    """Where a run stands, after each image.

    Attributes:
        done: images predicted, earlier runs included.
        total: images of the benchmark.
        hits: of the images that are done.
        unreadable: of the images that are done.
        known: of the images that are done, those that an earlier run predicted.
    """

    done: int
    total: int
    hits: int
    unreadable: int
    known: int


@dataclass(frozen=True)
class Evaluation:
    """The outcome of a run.

    Attributes:
        score: hits and images.
        unreadable: images that could not be read, counted as misses.
        computed: images predicted by this run, not by an earlier one that it continued.
        seconds: what predicting them took.
        auc: how well the boxes' scores tell hits from misses, see `score_auc`; None where it cannot be said.
        detection: how well all boxes find all objects; None where a box has no score.
    """

    score: Corloc
    unreadable: int
    computed: int
    seconds: float
    auc: float | None
    detection: DetectionScores | None


Callback = Callable[[Progress], None]
Hook = Callable[[Example, Discovery], None]


def evaluate(
    benchmark: Benchmark,
    discoverer: Discoverer,
    out: Path,
    *,
    overwrite: bool = False,
    strict: bool = False,
    masks: bool = False,
    extra: dict[str, Any] | None = None,
    on_progress: Callback | None = None,
    on_discovery: Hook | None = None,
) -> Evaluation:
    """Predict and score a benchmark, going on where an earlier run into the same folder stopped.

    Args:
        benchmark: its images must exist.
        discoverer: backbone and options.
        out: folder for ``predictions.jsonl``, ``maps.jsonl`` and ``results.json``; made if need be.
        overwrite: whether to start anew instead of going on.
        strict: whether to stop at the first image that cannot be read, instead of counting a miss.
        masks: whether predictions hold masks.
        extra: further settings of the run to record and compare, such as a limit.
        on_progress: called after each image.
        on_discovery: called with each image's discovery before its line is written.

    Raises:
        PredictionsError: if the folder cannot be written, is in use by another run, or holds a run with other
            settings.
        ImageError: with ``strict``, at the first image that cannot be read; what came before it is kept.
    """
    out = Path(out)
    settings = benchmark_settings(benchmark, {**discoverer.options.record(), "masks": masks}, extra)
    with locked(out):
        known = _prepare(out, settings, benchmark, overwrite=overwrite)
        tally = _Tally(benchmark.examples, len(known), strict=strict, on_progress=on_progress)
        for prediction in known:
            tally.add(prediction)
        keep_maps(out / MAPS_FILE, (one.image_id for one in known))
        start = time.perf_counter()
        with RunFiles(out) as files:
            for prediction, maps in _predict(benchmark.examples, discoverer, len(known), on_discovery, masks=masks):
                tally.check(prediction)
                files.add(prediction, maps)
                tally.add(prediction)
        seconds = time.perf_counter() - start
        evaluation = Evaluation(
            tally.score,
            tally.unreadable,
            tally.done - len(known),
            seconds,
            score_auc(tally.scores, tally.judged),
            _detection(tally.predictions, benchmark.examples),
        )
        if evaluation.computed or not is_complete(out / RESULTS_FILE):
            write_json(out / RESULTS_FILE, _results(settings, evaluation, discoverer.backbone.device))
    return evaluation


class _Tally:
    """Counts hits as predictions come in, in the order of the benchmark."""

    def __init__(self, examples: Sequence[Example], known: int, *, strict: bool, on_progress: Callback | None) -> None:
        self.examples = examples
        self.known = known
        self.strict = strict
        self.on_progress = on_progress
        self.done = self.unreadable = 0
        self.predictions: list[Prediction] = []
        self.scores: list[float] = []  # of the images that have a box with a score, and whether each was hit
        self.judged: list[bool] = []
        self.hits = 0

    @property
    def score(self) -> Corloc:
        return Corloc(self.hits, self.done)

    def check(self, prediction: Prediction) -> None:
        if self.strict and prediction.error is not None:
            raise ImageError(prediction.error)

    def add(self, prediction: Prediction) -> None:
        self.check(prediction)
        self.predictions.append(replace(prediction, masks=None))
        hit = is_hit(prediction.boxes, self.examples[self.done].boxes)
        self.hits += hit
        if prediction.boxes and prediction.has_scores:
            self.scores.append(prediction.scores[0])
            self.judged.append(hit)
        self.unreadable += prediction.error is not None
        self.done += 1
        if self.on_progress:
            known = min(self.done, self.known)
            self.on_progress(Progress(self.done, len(self.examples), self.hits, self.unreadable, known))


def _detection(predictions: Sequence[Prediction | None], examples: Sequence[Example]) -> DetectionScores | None:
    """Of one prediction an image, or None for an image without one."""
    found = [
        prediction or Prediction(example.image_id, ())
        for prediction, example in zip(predictions, examples, strict=True)
    ]
    if not all(one.has_scores for one in found) or not any(len(example.boxes) for example in examples):
        return None
    return detection_scores(
        [
            Detections(one.boxes, one.scores, example.boxes, example.crowds)
            for one, example in zip(found, examples, strict=True)
        ]
    )


def _rounded(scores: DetectionScores | None) -> dict[str, float] | None:
    return None if scores is None else {name: round(value, 4) for name, value in asdict(scores).items()}


def _predict(
    examples: Sequence[Example], discoverer: Discoverer, known: int, on_discovery: Hook | None, *, masks: bool
) -> Iterator[tuple[Prediction, ImageMaps | None]]:
    if known == len(examples):
        return
    outcomes = discoverer.outcomes((example.path for example in examples), skip=known)
    for example, outcome in zip(examples[known:], outcomes, strict=True):
        if isinstance(outcome, ImageError):
            yield from_error(example.image_id, outcome, example.path), None
            continue
        if on_discovery:
            on_discovery(example, outcome)
        prediction = from_discovery(example.image_id, outcome, masks=masks)
        yield prediction, maps_of(example.image_id, example.path, outcome, example.boxes)


def score_predictions(predictions: Sequence[Prediction], benchmark: Benchmark) -> tuple[Corloc, int]:
    """Score a predictions file, in whatever order its lines are.

    Args:
        predictions: at most one an image; those for images that the benchmark leaves out are ignored.
        benchmark: the ground truth; an image without a prediction is a miss.

    Returns:
        The score, and how many images have no prediction.

    Raises:
        PredictionsError: if an image is predicted twice, or is not in the benchmark.
    """
    found = _by_example(predictions, benchmark)
    boxes = [[] if prediction is None else prediction.boxes for prediction in found]
    return corloc(boxes, [example.boxes for example in benchmark.examples]), found.count(None)


def score_detections(predictions: Sequence[Prediction], benchmark: Benchmark) -> DetectionScores | None:
    """How well all boxes of a predictions file find all objects; None where a box has no score.

    Args:
        predictions: as for `score_predictions`.
        benchmark: the ground truth.

    Raises:
        PredictionsError: as `score_predictions`.
    """
    return _detection(_by_example(predictions, benchmark), benchmark.examples)


def _by_example(predictions: Sequence[Prediction], benchmark: Benchmark) -> list[Prediction | None]:
    """The prediction for each image of a benchmark."""
    by_id: dict[str | int, Prediction] = {}
    for prediction in predictions:
        if prediction.image_id in by_id:
            raise PredictionsError(f"two predictions for image {prediction.image_id!r}: expected one an image")
        by_id[prediction.image_id] = prediction
    strangers = by_id.keys() - {example.image_id for example in benchmark.examples} - benchmark.left_out
    if strangers:
        wanted = benchmark.examples[0].image_id
        raise PredictionsError(
            f"{len(strangers)} of {len(by_id)} predictions are for images that {benchmark.title} "
            f"does not have, such as {min(strangers, key=str)!r}: "
            f"expected ids like {wanted!r}"
        )
    return [by_id.get(example.image_id) for example in benchmark.examples]


def _prepare(out: Path, settings: dict[str, Any], benchmark: Benchmark, *, overwrite: bool) -> list[Prediction]:
    """Make sure that the folder belongs to this run, and return what it holds already."""
    predictions, results = out / PREDICTIONS_FILE, out / RESULTS_FILE
    if overwrite:
        predictions.unlink(missing_ok=True)
        results.unlink(missing_ok=True)
        (out / MAPS_FILE).unlink(missing_ok=True)
    elif results.exists() or predictions.exists():
        check_same_run(results, settings)
    known = [replace(one, masks=None) for one in recover_predictions(predictions)]  # masks would take up memory
    wanted = [example.image_id for example in benchmark.examples[: len(known)]]
    if [prediction.image_id for prediction in known] != wanted:
        raise PredictionsError(
            f"{predictions} does not follow the order of {benchmark.name}: it is not of this run; "
            "use --overwrite or another --out"
        )
    if len(known) < len(benchmark) or not results.exists():
        write_json(results, {"complete": False, **settings})
    return known


def _results(settings: dict[str, Any], evaluation: Evaluation, device: torch.device) -> dict[str, Any]:
    score = evaluation.score
    return {
        "complete": True,
        "corloc": round(score.percent, 4),
        "hits": score.hits,
        "images": score.images,
        "wilson_95": [round(bound, 4) for bound in score.wilson_interval()],
        "score_auc": None if evaluation.auc is None else round(evaluation.auc, 4),
        "detection": _rounded(evaluation.detection),
        "unreadable": evaluation.unreadable,
        **settings,
        **run_facts(evaluation.computed, evaluation.seconds, device),
    }
