"""Average precision and recall: cases one can work out by hand, and an independent matcher."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lostreg.detection import Detections, detection_scores
from lostreg.images.boxes import pairwise_iou

NONE = np.zeros((0, 4))


def at(x: float, y: float = 0.0, width: float = 10.0, height: float = 10.0) -> list[float]:
    return [x, y, x + width, y + height]


def test_a_box_on_each_object_is_perfect() -> None:
    scores = detection_scores([Detections([at(0), at(50)], [0.9, 0.2], [at(50), at(0)], NONE)])
    assert (scores.ap, scores.ap50, scores.ar, scores.recall50) == (100, 100, 100, 100)
    assert (scores.ar_first, scores.recall50_first) == (50, 50)


def test_the_first_box_counts_alone_even_if_a_later_one_has_the_higher_score() -> None:
    scores = detection_scores([Detections([at(200), at(0)], [0.1, 0.9], [at(0)], NONE)])
    assert (scores.ar_first, scores.ar) == (0, 100)


def test_precision_falls_with_false_boxes_of_higher_score_only() -> None:
    def ap50(*boxes_and_scores: tuple[float, float]) -> float:
        boxes = [at(x) for x, _ in boxes_and_scores]
        return detection_scores([Detections(boxes, [score for _, score in boxes_and_scores], [at(0)], NONE)]).ap50

    assert ap50((0, 0.9), (100, 0.5)) == pytest.approx(100)
    assert ap50((100, 0.9), (0, 0.5)) == pytest.approx(50)
    assert ap50((100, 0.9), (200, 0.8), (0, 0.5)) == pytest.approx(100 / 3)


def test_boxes_in_crowds_count_neither_as_hits_nor_as_misses() -> None:
    crowd = [at(100, 0, 200, 200)]
    found = [at(110, 5), at(150, 5), at(0)]
    with_crowd = detection_scores([Detections(found, [0.9, 0.8, 0.7], [at(0)], crowd)])
    without = detection_scores([Detections(found, [0.9, 0.8, 0.7], [at(0)], NONE)])
    assert with_crowd.ap50 == pytest.approx(100)
    assert without.ap50 == pytest.approx(100 / 3)


def test_overlaps_between_half_and_all_count_at_some_of_the_thresholds() -> None:
    moved = [0, 0, 10, 7.2]  # an intersection over union of 0.72: above 0.5, 0.55, ... 0.7
    scores = detection_scores([Detections([moved], [1.0], [at(0)], NONE)])
    assert (scores.recall50, scores.ar) == (pytest.approx(100), pytest.approx(50))


def test_images_without_boxes_are_misses_and_none_without_objects_is_required() -> None:
    images = [Detections(NONE, [], [at(0)], NONE), Detections([at(0)], [1.0], [at(0)], NONE)]
    assert detection_scores(images).recall50 == pytest.approx(50)
    with pytest.raises(ValueError, match="at least one object"):
        detection_scores([Detections([at(0)], [1.0], NONE, NONE)])
    with pytest.raises(ValueError, match="zip"):
        detection_scores([Detections([at(0)], [], [at(0)], NONE)])


boxes = st.lists(
    st.tuples(*[st.integers(0, 12)] * 2, *[st.integers(1, 8)] * 2).map(lambda box: at(*map(float, box))), max_size=4
)


@given(
    st.lists(st.tuples(boxes, boxes), min_size=1, max_size=4).filter(lambda images: any(len(one[1]) for one in images))
)
@settings(deadline=None, max_examples=80)
def test_recall_equals_that_of_a_plain_greedy_matcher(images) -> None:
    given_images = [Detections(found, np.linspace(1, 0.5, len(found)), objects, NONE) for found, objects in images]
    hits = 0
    for found, objects in images:
        free = list(range(len(objects)))
        for box in found:
            overlaps = [(pairwise_iou([box], [objects[index]])[0, 0], index) for index in free]
            # COCO takes the last of equally good ones.
            best = max(overlaps, key=lambda one: (round(one[0], 9), one[1]), default=(0.0, -1))
            if best[0] >= 0.5 - 1e-9:
                hits += 1
                free.remove(best[1])
    scores = detection_scores(given_images)
    assert scores.recall50 == pytest.approx(100 * hits / sum(len(objects) for _, objects in images))
    assert scores.ar <= scores.recall50 + 1e-9
    assert scores.ar_first <= scores.ar + 1e-9
    assert scores.ap <= scores.ap50 + 1e-9
