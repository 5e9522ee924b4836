"""Overlaps of boxes against pycocotools and a count of pixels; patches on pixels against one pixel after the other."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from lostreg.errors import OptionError
from lostreg.images.boxes import pairwise_iou, spread

corner = st.integers(0, 50)
box = st.tuples(corner, corner, st.integers(1, 30), st.integers(1, 30)).map(
    lambda values: [values[0], values[1], values[0] + values[2], values[1] + values[3]]
)
boxes = st.lists(box, min_size=1, max_size=5)


@given(boxes, boxes)
@settings(deadline=None)
def test_overlaps_equal_those_of_pycocotools(first, second) -> None:
    def as_xywh(rows):
        return np.array([[x1, y1, x2 - x1, y2 - y1] for x1, y1, x2, y2 in rows], dtype=float)

    expected = coco_mask.iou(as_xywh(first), as_xywh(second), [0] * len(second))
    np.testing.assert_allclose(pairwise_iou(first, second), expected, atol=1e-12)


@given(boxes, boxes)
@settings(deadline=None)
def test_overlaps_equal_a_count_of_pixels(first, second) -> None:
    def pixels(values):
        canvas = np.zeros((90, 90), dtype=bool)
        x1, y1, x2, y2 = values
        canvas[y1:y2, x1:x2] = True
        return canvas

    found = pairwise_iou(first, second)
    for row, one in enumerate(first):
        for column, other in enumerate(second):
            shared = (pixels(one) & pixels(other)).sum()
            assert found[row, column] == pytest.approx(shared / (pixels(one) | pixels(other)).sum())


def test_boxes_may_be_part_of_a_graph() -> None:
    assert pairwise_iou(torch.tensor([[0.0, 0, 2, 2]], requires_grad=True), [[0, 0, 2, 1]]).tolist() == [[0.5]]


def test_boxes_of_another_shape_are_refused() -> None:
    with pytest.raises(OptionError, match=r"\(n, 4\), not \(1, 3\)"):
        pairwise_iou([[1, 2, 3]], [[1, 2, 3, 4]])


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 9), st.integers(1, 9))
@settings(deadline=None)
def test_each_pixel_has_the_value_of_the_cell_that_its_centre_lies_in(height, width, high, wide) -> None:
    rows, columns = -(-height // high), -(-width // wide)
    values = np.arange(rows * columns, dtype=np.uint8).reshape(rows, columns)
    picture = spread(values, (height, width), (high, wide))
    for y, x in np.ndindex(height, width):
        assert picture[y, x] == values[int((y + 0.5) // high), int((x + 0.5) // wide)]


def test_cells_of_less_than_a_pixel_and_a_last_one_that_is_cut_are_no_error() -> None:
    assert spread(np.arange(4, dtype=np.uint8)[None], (1, 2), (1, 0.5)).tolist() == [[1, 3]]
    assert spread(np.array([[True, False]]), (2, 5), (2, 3.5)).tolist() == [[True] * 3 + [False] * 2] * 2
