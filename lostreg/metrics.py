"""Corloc, score AUC, class-agnostic average precision and recall, overlaps of masks: pure functions on arrays."""

import contextlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from lostreg.checks import shown
from lostreg.errors import OptionError
from lostreg.images.boxes import as_boxes, numbers, pairwise_iou

IOU_THRESHOLD: Final = 0.5
_EVERY_AREA: Final = (0.0, 1e12)
_CATEGORY: Final = 1  # every object is of the same one


@dataclass(frozen=True)
class Corloc:
    """How many images were hit.

    Attributes:
        hits: images whose first box has an intersection over union of at least 0.5 with any object.
        images: images scored.
    """

    hits: int
    images: int

    @property
    def percent(self) -> float:
        """Corloc in [0, 100]; 0 for no images."""
        return 100.0 * self.hits / self.images if self.images else 0.0

    def wilson_interval(self) -> tuple[float, float]:
        """95 % confidence interval of the hit rate in percent (Wilson 1927), as if images were drawn at random."""
        if not self.images:
            return (0.0, 100.0)
        interval = stats.binomtest(self.hits, self.images).proportion_ci(0.95, method="wilson")
        return (100.0 * float(interval.low), 100.0 * float(interval.high))

    def __str__(self) -> str:
        return f"corloc {self.percent:.2f} ({self.hits}/{self.images})"


def paired_gain(first: ArrayLike, other: ArrayLike) -> tuple[float, float, float]:
    """What corloc gains from one run to another over the same images, in points, and its 95 % interval.

    Images are drawn again and again with replacement, each with what both runs made of it: images that both hit, or
    both miss, tell nothing of the difference. The bounds are percentiles of 10,000 draws, always the same ones.

    Args:
        first: whether each image was hit, shape (n,), n >= 1.
        other: the same of the run that is compared with it.

    Returns:
        The gain, and the lower and upper bound.

    Raises:
        OptionError: if they are not as many, or none, or one is not true or false.

    Example:
        >>> lostreg.metrics.paired_gain([True, False, False, True], [True, True, True, True])
        (50.0, 0.0, 100.0)
    """
    before, after = _hits(first), _hits(other)
    if before.shape != after.shape or before.ndim != 1 or not before.size:
        raise OptionError(f"expected hits of the same images, not of shapes {before.shape} and {after.shape}")
    changes = after.astype(int) - before
    shares = np.array([np.mean(changes == change) for change in (1, -1, 0)])
    draws = np.random.default_rng(0).multinomial(changes.size, shares, size=10_000)
    low, high = 100 * np.percentile(draws[:, 0] - draws[:, 1], (2.5, 97.5)) / changes.size
    return 100 * float(changes.mean()), float(low), float(high)


def _hits(hits: ArrayLike) -> NDArray[np.bool_]:
    hit = np.asarray(hits)
    if hit.size and not (hit.dtype.kind in "biuf" and np.isin(hit, (0, 1)).all()):
        raise OptionError(f"expected hits that are true or false, not {shown(hits)}")
    return hit.astype(bool)


def score_auc(scores: ArrayLike, hits: ArrayLike) -> float | None:
    """Area under the ROC curve: how often a hit has a higher score than a miss, ties counting half.

    Args:
        scores: one an image, shape (n,).
        hits: whether each image was hit, shape (n,).

    Returns:
        In [0, 1]; 0.5 is no better than chance. None where there are no hits or no misses.

    Raises:
        OptionError: if a score is not a finite number, a hit not true or false, or there are not as many of them.

    Example:
        >>> lostreg.metrics.score_auc([0.9, 0.4, 0.5], [True, True, False])
        0.5
    """
    values, hit = numbers(scores, "scores"), _hits(hits)
    if values.shape != hit.shape or values.ndim != 1 or not np.isfinite(values).all():
        raise OptionError(f"expected one finite score an image, not {shown(scores)} for hits of shape {hit.shape}")
    if not len(hit) or hit.all() or not hit.any():
        return None
    # Its p-value is not asked for: the exact one would take long.
    statistic = stats.mannwhitneyu(values[hit], values[~hit], method="asymptotic").statistic
    return float(statistic) / (int(hit.sum()) * int((~hit).sum()))


def is_hit(boxes: ArrayLike, truth: ArrayLike) -> bool:
    """Whether the first predicted box overlaps any object by at least 0.5.

    Args:
        boxes: predictions, shape (n, 4); only the first counts, and no prediction is a miss.
        truth: ground truth, shape (m, 4), in the same convention.

    Example:
        >>> lostreg.metrics.is_hit([[0, 0, 10, 10]], [[0, 0, 10, 5], [90, 90, 99, 99]])
        True
    """
    predicted = as_boxes(boxes)
    if not len(predicted):
        return False
    return bool((pairwise_iou(predicted[:1], truth) >= IOU_THRESHOLD).any())


def corloc(predictions: Sequence[ArrayLike], truths: Sequence[ArrayLike]) -> Corloc:
    """Score one list of boxes an image against one list of objects an image.

    Args:
        predictions: for each image, boxes of shape (n, 4), best first.
        truths: for each image, objects of shape (m, 4).

    Raises:
        OptionError: if the two are of different lengths.

    Example:
        >>> print(lostreg.metrics.corloc([[[0, 0, 10, 10]], []], [[[0, 0, 9, 10]], [[0, 0, 5, 5]]]))
        corloc 50.00 (1/2)
    """
    if len(predictions) != len(truths):
        raise OptionError(f"expected one prediction an image, got {len(predictions)} for {len(truths)} images")
    hits = sum(is_hit(boxes, truth) for boxes, truth in zip(predictions, truths, strict=True))
    return Corloc(hits, len(truths))


@dataclass(frozen=True)
class DetectionScores:
    """How well boxes find all objects, in percent.

    Attributes:
        ap: average precision over intersections over union (IoU) of 0.5, 0.55, ... 0.95.
        ap50: average precision at an IoU of 0.5.
        ar_first: average recall over the same IoUs, of the first box of each image alone.
        ar: average recall of all boxes of each image.
        recall50_first: recall at an IoU of 0.5, of the first box of each image alone.
        recall50: recall at an IoU of 0.5, of all boxes of each image.
        most: boxes of an image at most: the N of AR@N.
    """

    ap: float
    ap50: float
    ar_first: float
    ar: float
    recall50_first: float
    recall50: float
    most: int

    def __str__(self) -> str:
        return (
            f"all objects, of no class: AP {self.ap:.2f}, AP50 {self.ap50:.2f}, AR@{self.most} {self.ar:.2f} "
            f"(recall at IoU 0.5: {self.recall50:.2f}); the first boxes alone: AR@1 {self.ar_first:.2f} "
            f"({self.recall50_first:.2f})"
        )


@dataclass(frozen=True)
class Detections:
    """The boxes of one image, and what there is to be found in it.

    Attributes:
        boxes: ``x1, y1, x2, y2`` in pixels, shape (n, 4), in the order found.
        scores: shape (n,).
        objects: ground truth, shape (m, 4).
        crowds: ground truth around groups, shape (c, 4): boxes that lie in one and hit no object do not count.

    Example:
        >>> image = lostreg.Detections([[0, 0, 10, 10]], scores=[0.9], objects=[[0, 0, 10, 6]], crowds=[])
        >>> round(lostreg.detection_scores([image]).ap50)
        100
    """

    boxes: ArrayLike
    scores: ArrayLike
    objects: ArrayLike
    crowds: ArrayLike


def detection_scores(images: Sequence[Detections]) -> DetectionScores:
    """Score several boxes an image. Boxes are ranked by score over all images, and matched as COCO does.

    Args:
        images: at least one of them with an object.

    Raises:
        OptionError: if there is no object at all, or the scores of an image are not finite and as many as its boxes.

    Example:
        >>> image = lostreg.metrics.Detections([[0, 0, 10, 10]], [0.9], [[0, 0, 10, 10], [20, 0, 30, 10]], [])
        >>> round(lostreg.metrics.detection_scores([image]).recall50)
        50
    """
    if not any(len(as_boxes(image.objects)) for image in images):
        raise OptionError("expected at least one object")
    for image in images:
        scores = numbers(image.scores, "scores").ravel()
        if len(scores) != len(as_boxes(image.boxes)) or not np.isfinite(scores).all():
            raise OptionError(f"expected one finite score a box, not {shown(image.scores)} for {shown(image.boxes)}")
    first = [
        Detections(as_boxes(image.boxes)[:1], np.ravel(image.scores)[:1], image.objects, image.crowds)
        for image in images
    ]
    precision, recall = _evaluate(images)
    _, recall_first = _evaluate(first)
    return DetectionScores(
        ap=100 * float(precision.mean()),
        ap50=100 * float(precision[0].mean()),
        ar_first=100 * float(recall_first.mean()),
        ar=100 * float(recall.mean()),
        recall50_first=100 * float(recall_first[0]),
        recall50=100 * float(recall[0]),
        most=max(len(as_boxes(image.boxes)) for image in images),
    )


def _evaluate(images: Sequence[Detections]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Precision, shape (10, 101), at each IoU and recall level, and the highest recall, shape (10,), at each IoU."""
    from pycocotools.cocoeval import COCOeval

    truth = _index(len(images), _truths(images))
    found = _index(len(images), _founds(images))
    with contextlib.redirect_stdout(io.StringIO()):  # it reports progress with print
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.params.useCats = 0
        evaluation.params.maxDets = [max(1, *(len(as_boxes(image.boxes)) for image in images))]
        evaluation.params.areaRng = [list(_EVERY_AREA)]
        evaluation.params.areaRngLbl = ["all"]
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation.eval["precision"][:, :, 0, 0, 0], evaluation.eval["recall"][:, 0, 0, 0]


def _index(count: int, entries: Iterator[dict[str, Any]]) -> Any:
    from pycocotools.coco import COCO

    index = COCO()
    index.dataset = {
        "images": [{"id": number} for number in range(count)],
        "annotations": [{"id": number, **entry} for number, entry in enumerate(entries, start=1)],  # 0 means no match
        "categories": [{"id": _CATEGORY}],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        index.createIndex()
    return index


def _truths(images: Sequence[Detections]) -> Iterator[dict[str, Any]]:
    for number, image in enumerate(images):
        for crowd, boxes in enumerate((image.objects, image.crowds)):
            for box in as_boxes(boxes):
                yield {**_entry(number, box), "iscrowd": crowd}


def _founds(images: Sequence[Detections]) -> Iterator[dict[str, Any]]:
    for number, image in enumerate(images):
        for box, score in zip(as_boxes(image.boxes), np.ravel(image.scores), strict=True):
            yield {**_entry(number, box), "score": float(score)}


def _entry(image: int, box: NDArray[np.float64]) -> dict[str, Any]:
    x1, y1, x2, y2 = box.tolist()
    sides = [x2 - x1, y2 - y1]
    return {"image_id": image, "category_id": _CATEGORY, "bbox": [x1, y1, *sides], "area": sides[0] * sides[1]}


def class_overlaps(
    predicted: NDArray[np.integer[Any]], truth: NDArray[np.integer[Any]], classes: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Of each class, how many pixels have it in both masks, and how many in either: their ratio is its IoU.

    Args:
        predicted: classes from 0 on, of any shape.
        truth: the same, -1 where a pixel does not count.
        classes: how many there are.

    Returns:
        Intersection and union, shape (classes,) each.

    Example:
        >>> lostreg.metrics.class_overlaps(np.array([0, 1, 1, 1]), np.array([0, 0, 1, -1]), 2)
        (array([1, 1]), array([2, 2]))
    """
    valid = truth >= 0
    confusion = np.bincount(truth[valid] * classes + predicted[valid], minlength=classes**2).reshape(classes, classes)
    both = confusion.diagonal()
    return both.copy(), confusion.sum(axis=0) + confusion.sum(axis=1) - both


def root_mean_square(predicted: NDArray[np.floating[Any]], truth: NDArray[np.floating[Any]]) -> float:
    """Root of the mean squared error where the truth is a number; NaN where none is.

    Example:
        >>> lostreg.metrics.root_mean_square(np.array([1.0, 2.0, 3.0]), np.array([1.0, 4.0, np.nan]))
        1.4142135623730951
    """
    valid = ~np.isnan(truth)
    if not valid.any():
        return float("nan")
    return float(np.sqrt(np.mean((predicted[valid].astype(np.float64) - truth[valid]) ** 2)))
