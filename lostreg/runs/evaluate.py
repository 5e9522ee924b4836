"""The run that scores a benchmark, and the scoring of predictions files."""

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path, PurePath
from typing import Any

from lostreg.checks import shown
from lostreg.datasets import Benchmark, Example
from lostreg.datasets.base import ImageId
from lostreg.defaults import MAPS_FILE, PREDICTIONS_FILE
from lostreg.errors import ImageError, ImageUnavailableError, OptionError, PredictionsError
from lostreg.inference.discoverer import Discoverer
from lostreg.inference.discovery import Discovery
from lostreg.metrics import Corloc, Detections, DetectionScores, corloc, detection_scores, is_hit, score_auc
from lostreg.progress import OnProgress, Progress
from lostreg.runs.entries import Asked, Entry, Workers, make_entry, missing_entries, until_error
from lostreg.runs.folder import Run
from lostreg.runs.maps import move_maps
from lostreg.runs.predictions import Prediction, parse_prediction
from lostreg.runs.results import benchmark_settings, describe_device


@dataclass(frozen=True)
class Evaluation:
    """The outcome of a run.

    Attributes:
        score: hits and images.
        unreadable: images that could not be read, counted as misses.
        computed: images predicted by this run, not by an earlier one that it continued.
        auc: how well the boxes' scores tell hits from misses, see `score_auc`; None where it cannot be said.
        detection: how well all boxes find all objects; None where a box has no score.
        unavailable: of the unreadable images, those that could not be had this time: the next run tries them again.
    """

    score: Corloc
    unreadable: int
    computed: int
    auc: float | None
    detection: DetectionScores | None
    unavailable: int = 0

    def figures(self) -> dict[str, Any]:
        """As results record them."""
        detection = (
            {name: round(value, 4) for name, value in asdict(self.detection).items()} if self.detection else None
        )
        return {
            "corloc": round(self.score.percent, 4),
            "hits": self.score.hits,
            "images": self.score.images,
            "wilson_95": [round(bound, 4) for bound in self.score.wilson_interval()],
            "score_auc": None if self.auc is None else round(self.auc, 4),
            "detection": detection,
            "unreadable": self.unreadable,
            "unavailable": self.unavailable,
        }


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
    on_progress: OnProgress = lambda _: None,
    on_discovery: Hook | None = None,
    on_gone: Callable[[ImageId], None] = lambda _: None,
    try_again: Callable[[Prediction], bool] = lambda _: False,
    workers: Workers | None = None,
) -> Evaluation:
    """Predict and score a benchmark, going on where an earlier run into the same folder stopped.

    Images that could not be had then are tried again.

    Args:
        benchmark: its images must exist; `choose_frames` says which of them are turned.
        discoverer: backbone and options.
        out: folder for ``predictions.jsonl``, ``maps.jsonl`` and ``results.json``; made if need be.
        overwrite: whether to start anew instead of going on.
        strict: whether to stop at the first image that cannot be read, instead of counting a miss.
        masks: whether predictions hold masks.
        extra: further settings of the run to record and compare, such as a limit.
        on_progress: called after each image, with the corloc so far.
        on_discovery: called with each image's discovery before its line is written; its source is the decoded image.
        on_gone: called with each image of an earlier run that is overwritten.
        try_again: whether an image is computed again for another reason, such as a picture of it that is missing.
        workers: who computes, if not this process: see `lostreg.runs.cluster`. Then nothing is called with discoveries.

    Raises:
        OptionError: if workers are given and ``on_discovery``, too.
        PredictionsError: if the folder cannot be written, is in use by another run, or holds a run with other
            settings; or if what was written was deleted meanwhile.
        ImageError: with ``strict``, at the first image that cannot be read; what came before it is kept.
    """
    if workers is not None and on_discovery is not None:
        raise OptionError("workers keep what they see: pictures of images are drawn where one process computes")
    examples = {example.image_id: example for example in benchmark.examples}
    settings = benchmark_settings(benchmark, {**discoverer.options.record(), "masks": masks}, extra)
    compute = partial(discoverer.outcomes, keep_pixels=on_discovery is not None)
    make = partial(make_entry, masks=masks)
    tally = _Tally(examples, strict=strict, on_progress=on_progress)
    with Run(
        Path(out),
        list(examples),
        settings,
        workers.device if workers else describe_device(discoverer.backbone.device, discoverer.backbone.dtype),
        parse_prediction,
        memory=PREDICTIONS_FILE,
        beside=[MAPS_FILE],
        overwrite=overwrite,
        try_again=lambda prediction: prediction.unavailable or try_again(prediction),
        on_gone=on_gone,
    ) as run:
        for prediction in run.resume():
            tally.add(prediction, known=True)

        def ask(image_id: ImageId) -> Asked:
            example = examples[image_id]
            return Asked(image_id, example.source, example.path, example.boxes)

        def shown(asked: Asked, outcome: Discovery | ImageError) -> Entry:
            if on_discovery and not isinstance(outcome, ImageError):
                on_discovery(examples[asked.image_id], outcome)
            return make(asked, outcome)

        computed = missing_entries(
            run,
            ask,
            make if on_discovery is None else shown,
            compute=compute,
            batch_size=discoverer.options.batch_size,
            workers=workers,
        )
        for entries in until_error(computed) if strict else computed:
            run.append_all([(entry.line, entry.maps) for entry in entries])
            for entry in entries:
                tally.add(entry.prediction)
        run.put_in_order()
        if tally.known:
            move_maps(Path(out) / MAPS_FILE, lambda image_id: examples[image_id].path)
        evaluation = tally.evaluation(run.computed)
        run.finish(evaluation.figures())
    return evaluation


class _Tally:
    """Counts hits as predictions come in, in whatever order."""

    def __init__(self, examples: dict[ImageId, Example], *, strict: bool, on_progress: OnProgress) -> None:
        self.examples = examples
        self.strict = strict
        self.on_progress = on_progress
        self.predictions: dict[ImageId, Prediction] = {}
        self.is_hit: dict[ImageId, bool] = {}
        self.hits = self.known = self.unreadable = self.unavailable = 0

    def add(self, prediction: Prediction, *, known: bool = False) -> None:
        if self.strict and prediction.error is not None:
            raise ImageError(prediction.error)
        image_id = prediction.image_id
        self.predictions[image_id] = replace(prediction, masks=None)  # they would take up memory
        self.is_hit[image_id] = is_hit(prediction.boxes, self.examples[image_id].boxes)
        self.hits += self.is_hit[image_id]
        self.unreadable += prediction.error is not None
        self.unavailable += prediction.unavailable
        self.known += known
        kind = ImageUnavailableError if prediction.unavailable else ImageError
        error = None if prediction.error is None else kind(prediction.error)
        note = f"corloc {self.score.percent:.2f}"
        self.on_progress(Progress(len(self.is_hit), len(self.examples), known=self.known, error=error, note=note))

    @property
    def score(self) -> Corloc:
        return Corloc(self.hits, len(self.is_hit))

    def evaluation(self, computed: int) -> Evaluation:
        predictions = [self.predictions[image_id] for image_id in self.examples]
        scored = [one for one in predictions if one.boxes and one.has_scores]
        auc = score_auc([one.scores[0] for one in scored], [self.is_hit[one.image_id] for one in scored])
        detection = _detection(predictions, list(self.examples.values()))
        return Evaluation(self.score, self.unreadable, computed, auc, detection, self.unavailable)


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


def named_by_files(predictions: Sequence[Prediction], benchmark: Benchmark) -> list[Prediction] | None:
    """Predictions whose ids are paths, as those of `lostreg.runs.discover` are, with the benchmark's ids.

    An image is known by its file's name, whatever folder that is in and however it ends; one of COCO by its
    number, too.

    Args:
        predictions: of one file.
        benchmark: the ground truth.

    Returns:
        As many predictions; None where no id is the name of a file of the benchmark, or one is an id of it: then they
        are no paths.

    Raises:
        PredictionsError: if two images have one name, or not all names are the benchmark's.
    """
    everyone = benchmark.left_out.union(example.image_id for example in benchmark.examples)
    ids = {str(image_id): image_id for image_id in everyone}
    numbers = {name: image_id for name, image_id in ids.items() if isinstance(image_id, int)}
    ids |= {example.path.stem: example.image_id for example in benchmark.examples}
    names = [PurePath(str(one.image_id)).stem for one in predictions]
    found = [ids.get(name, numbers.get(_number(name))) for name in names]
    if not any(one is not None for one in found):
        return None
    if not everyone.isdisjoint(one.image_id for one in predictions):
        return None
    _check_unambiguous([(one.path.stem, str(one.path)) for one in benchmark.examples])
    _check_unambiguous([(name, str(one.image_id)) for name, one in zip(names, predictions, strict=True)])
    strangers = [one.image_id for one, image_id in zip(predictions, found, strict=True) if image_id is None]
    if strangers:
        raise PredictionsError(
            f"{len(strangers)} of {len(predictions)} predictions are for images that {benchmark.title} does not have, "
            f"by the names of their files, such as {shown(strangers[0])}: expected all of them to be its images"
        )
    return [
        replace(one, image_id=image_id)
        for one, image_id in zip(predictions, found, strict=True)
        if image_id is not None
    ]


def _number(name: str) -> str:
    """The id of an image that COCO calls ``COCO_train2014_000000000009`` or ``000000000009``."""
    return name[-12:].lstrip("0") if re.fullmatch(r"(COCO_\w+_)?\d{12}", name) else ""


def _check_unambiguous(files: Sequence[tuple[str, str]]) -> None:
    """Raise `PredictionsError` if two files, each a name and a path, have one name."""
    first: dict[str, str] = {}
    for name, path in files:
        if first.setdefault(name, path) is not path:
            raise PredictionsError(
                f"{shown(first[name])} and {shown(path)} have one file name: by names alone they cannot be scored"
            )


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


def hits_of(predictions: Sequence[Prediction], benchmark: Benchmark) -> list[bool]:
    """Whether each image of a benchmark was hit; arguments and errors as for `score_predictions`."""
    found = _by_example(predictions, benchmark)
    return [
        prediction is not None and is_hit(prediction.boxes, example.boxes)
        for prediction, example in zip(found, benchmark.examples, strict=True)
    ]


def score_detections(predictions: Sequence[Prediction], benchmark: Benchmark) -> DetectionScores | None:
    """How well all boxes of a predictions file find all objects; None where a box has no score.

    Args:
        predictions: as for `score_predictions`.
        benchmark: the ground truth.

    Raises:
        PredictionsError: as `score_predictions`.
    """
    return _detection(_by_example(predictions, benchmark), benchmark.examples)


def note_other_sizes(predictions: Sequence[Prediction], benchmark: Benchmark) -> str | None:
    """A line on predictions for images of another size than their annotations say; None where there are none.

    Args:
        predictions: as for `score_predictions`.
        benchmark: the ground truth.
    """
    others = [
        (example, prediction)
        for prediction, example in zip(_by_example(predictions, benchmark), benchmark.examples, strict=True)
        if prediction and prediction.width and example.size not in (None, (prediction.width, prediction.height))
    ]
    if not others:
        return None
    example, prediction = others[0]
    width, height = example.size or (0, 0)
    return (
        f"{len(others)} predictions are for images of another size than the annotations say, such as "
        f"{example.image_id!r}: {prediction.width}x{prediction.height}, not {width}x{height}; is one of them turned?"
    )


def _by_example(predictions: Sequence[Prediction], benchmark: Benchmark) -> list[Prediction | None]:
    """The prediction for each image of a benchmark."""
    by_id: dict[str | int, Prediction] = {}
    for prediction in predictions:
        if prediction.image_id in by_id:
            raise PredictionsError(f"two predictions for image {shown(prediction.image_id)}: expected one an image")
        by_id[prediction.image_id] = prediction
    strangers = by_id.keys() - {example.image_id for example in benchmark.examples} - benchmark.left_out
    if strangers:
        wanted = benchmark.examples[0].image_id
        raise PredictionsError(
            f"{len(strangers)} of {len(by_id)} predictions are for images that {benchmark.title} "
            f"does not have, such as {shown(min(strangers, key=str))}: "
            f"expected ids like {wanted!r}"
        )
    return [by_id.get(example.image_id) for example in benchmark.examples]
