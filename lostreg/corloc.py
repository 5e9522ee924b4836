"""Corloc: the share of images whose box overlaps an object well enough. Pure functions on arrays."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from lostreg.errors import OptionError
from lostreg.images.boxes import _as_boxes, pairwise_iou

IOU_THRESHOLD: Final = 0.5


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


def score_auc(scores: ArrayLike, hits: ArrayLike) -> float | None:
    """Area under the ROC curve: how often a hit has a higher score than a miss, ties counting half.

    Args:
        scores: one an image, shape (n,).
        hits: whether each image was hit, shape (n,).

    Returns:
        In [0, 1]; 0.5 is no better than chance. None where there are no hits or no misses.
    """
    values, hit = np.asarray(scores, dtype=np.float64), np.asarray(hits, dtype=bool)
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
    """
    predicted = _as_boxes(boxes)
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
    """
    if len(predictions) != len(truths):
        raise OptionError(f"expected one prediction an image, got {len(predictions)} for {len(truths)} images")
    hits = sum(is_hit(boxes, truth) for boxes, truth in zip(predictions, truths, strict=True))
    return Corloc(hits, len(truths))
