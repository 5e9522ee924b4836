"""Class-agnostic average precision and recall of several boxes an image, as pycocotools' ``COCOeval`` computes them."""

import contextlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

_EVERY_AREA: Final = (0.0, 1e12)
_CATEGORY: Final = 1  # every object is of the same one


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
        ValueError: if there is no object at all, or the scores of an image are not as many as its boxes.
    """
    if not any(len(_as_boxes(image.objects)) for image in images):
        raise ValueError("expected at least one object")
    first = [
        Detections(_as_boxes(image.boxes)[:1], np.ravel(image.scores)[:1], image.objects, image.crowds)
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
        most=max(len(_as_boxes(image.boxes)) for image in images),
    )


def _evaluate(images: Sequence[Detections]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Precision, shape (10, 101), at each IoU and recall level, and the highest recall, shape (10,), at each IoU."""
    from pycocotools.cocoeval import COCOeval

    truth = _index(len(images), _truths(images))
    found = _index(len(images), _founds(images))
    with contextlib.redirect_stdout(io.StringIO()):  # it reports progress with print
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.params.useCats = 0
        evaluation.params.maxDets = [max(1, *(len(_as_boxes(image.boxes)) for image in images))]
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
            for box in _as_boxes(boxes):
                yield {**_entry(number, box), "iscrowd": crowd}


def _founds(images: Sequence[Detections]) -> Iterator[dict[str, Any]]:
    for number, image in enumerate(images):
        for box, score in zip(_as_boxes(image.boxes), np.ravel(image.scores), strict=True):
            yield {**_entry(number, box), "score": float(score)}


def _entry(image: int, box: NDArray[np.float64]) -> dict[str, Any]:
    x1, y1, x2, y2 = box.tolist()
    sides = [x2 - x1, y2 - y1]
    return {"image_id": image, "category_id": _CATEGORY, "bbox": [x1, y1, *sides], "area": sides[0] * sides[1]}


def _as_boxes(boxes: ArrayLike) -> NDArray[np.float64]:
    return np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
