"""The metric against pycocotools, and its edges."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lostreg.errors import OptionError
from lostreg.images.boxes import pairwise_iou
from lostreg.metrics import (
    Corloc,
    Detections,
    class_overlaps,
    corloc,
    detection_scores,
    is_hit,
    paired_gain,
    root_mean_square,
    score_auc,
)


def test_an_overlap_of_exactly_one_half_is_a_hit() -> None:
    assert is_hit([[0, 0, 10, 10]], [[0, 0, 10, 5]])
    assert not is_hit([[0, 0, 10, 10]], [[0, 0, 10, 4.99]])


def test_only_the_first_box_counts_and_any_object_will_do() -> None:
    truth = [[50, 50, 60, 60], [0, 0, 10, 10]]
    assert is_hit([[0, 0, 10, 10], [90, 90, 91, 91]], truth)
    assert not is_hit([[90, 90, 91, 91], [0, 0, 10, 10]], truth)


def test_no_box_no_area_and_no_object_are_misses() -> None:
    assert not is_hit([], [[0, 0, 10, 10]])
    assert not is_hit([[5, 5, 5, 5]], [[5, 5, 5, 5]])
    assert not is_hit([[0, 0, 10, 10]], [])


def test_the_score_prints_as_the_contract_says() -> None:
    assert str(Corloc(3102, 5011)) == "corloc 61.90 (3102/5011)"
    assert str(Corloc(0, 0)) == "corloc 0.00 (0/0)"


def test_a_paired_gain_knows_of_images_that_changed_alone() -> None:
    first = np.arange(400) % 2 == 0
    better = first | (np.arange(400) < 40)  # 20 more hits, and none lost
    gain, low, high = paired_gain(first, better)
    assert gain == 5
    assert low == pytest.approx(100 * stats.binom(400, 0.05).ppf(0.025) / 400, abs=0.26)
    assert high == pytest.approx(100 * stats.binom(400, 0.05).ppf(0.975) / 400, abs=0.26)
    assert paired_gain(better, first) == pytest.approx((-gain, -high, -low), abs=0.26)
    assert paired_gain(first, first) == (0, 0, 0)
    with pytest.raises(OptionError, match="hits of the same images"):
        paired_gain([True], [True, False])
    with pytest.raises(OptionError, match="true or false"):
        paired_gain([True], [0.3])


def test_hits_are_counted_over_images() -> None:
    truth = [[[0, 0, 10, 10]], [[0, 0, 10, 10]], [[0, 0, 10, 10]]]
    assert corloc([[[0, 0, 10, 10]], [], [[0, 0, 10, 6]]], truth) == Corloc(2, 3)


def test_the_interval_is_wilsons() -> None:
    hits, images, z = 122, 286, 1.959963984540054
    rate = hits / images
    middle = (rate + z**2 / (2 * images)) / (1 + z**2 / images)
    half = z / (1 + z**2 / images) * np.sqrt(rate * (1 - rate) / images + z**2 / (4 * images**2))
    assert Corloc(hits, images).wilson_interval() == pytest.approx((100 * (middle - half), 100 * (middle + half)))
    assert Corloc(0, 0).wilson_interval() == (0.0, 100.0)


def test_bad_shapes_say_what_was_expected() -> None:
    with pytest.raises(OptionError, match="got 1 for 2 images"):
        corloc([[]], [[], []])


judged = st.lists(st.tuples(st.integers(0, 6), st.booleans()), max_size=25)  # few values: many are equal


@given(judged)
@settings(deadline=None)
def test_the_auc_is_the_share_of_pairs_in_which_the_hit_scores_higher(images) -> None:
    hits = [score / 8 for score, hit in images if hit]
    misses = [score / 8 for score, hit in images if not hit]
    found = score_auc([score / 8 for score, _ in images], [hit for _, hit in images])
    if not hits or not misses:
        assert found is None
        return
    pairs = [1.0 if hit > miss else 0.5 if hit == miss else 0.0 for hit in hits for miss in misses]
    assert found == pytest.approx(sum(pairs) / len(pairs))


def test_the_auc_is_one_where_scores_tell_hits_from_misses_and_a_half_where_they_say_nothing() -> None:
    hits = np.array([True, False, True, False])
    assert score_auc([0.9, 0.2, 0.8, 0.7], hits) == 1.0
    assert score_auc([0.1, 0.2, 0.1, 0.7], hits) == 0.0
    assert score_auc([0.5] * 4, hits) == 0.5
    assert score_auc(np.float32([0.9, 0.2, 0.8, 0.85]), hits.astype(int).tolist()) == 0.75


def test_the_auc_of_hits_alone_of_misses_alone_and_of_nothing_cannot_be_said() -> None:
    assert score_auc([0.1, 0.2], [True, True]) is None
    assert score_auc([0.1, 0.2], [False, False]) is None
    assert score_auc([], []) is None


@pytest.mark.parametrize("hits", [["False", "True"], [0.3, 1.0], [None, True]])
def test_hits_are_true_or_false(hits: list[object]) -> None:
    with pytest.raises(OptionError, match="expected hits that are true or false, not"):
        score_auc([0.1, 0.2], hits)  # type: ignore[arg-type]


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
    with pytest.raises(ValueError, match="one finite score a box"):
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


@given(st.integers(1, 4), st.lists(st.tuples(st.integers(0, 3), st.integers(-1, 3)), max_size=40))
@settings(deadline=None)
def test_overlaps_of_classes_are_counted_pixel_by_pixel(classes, pixels) -> None:
    pixels = [(found % classes, true % classes if true >= 0 else -1) for found, true in pixels]
    predicted, truth = (
        (np.array(side, int) for side in zip(*pixels, strict=True)) if pixels else (np.zeros(0, int),) * 2
    )
    both, either = class_overlaps(predicted, truth, classes)
    counted = [(found, true) for found, true in pixels if true >= 0]
    assert both.tolist() == [sum(found == true == code for found, true in counted) for code in range(classes)]
    assert either.tolist() == [sum(code in pair for pair in counted) for code in range(classes)]


def test_an_error_of_nothing_is_no_number() -> None:
    assert np.isnan(root_mean_square(np.ones(2), np.full(2, np.nan)))
    assert root_mean_square(np.array([[3.0, 9.0]]), np.array([[0.0, 5.0]])) == pytest.approx(np.sqrt(12.5))
