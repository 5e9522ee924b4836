"""The demo's pictures."""

import dataclasses

import numpy as np
import pytest
from fabricate import discovery

from lostreg.demo.panels import draw_attention, draw_degrees, draw_objects, draw_taught
from lostreg.images.draw import SEED, colour_of
from lostreg.inference.discovery import Discovery

GREY = np.full((350, 700, 3), 128, np.uint8)


def close(pixel: np.ndarray, colour: tuple[int, int, int]) -> bool:
    return bool(np.abs(pixel.astype(int) - colour).max() <= 3)


def test_boxes_masks_and_seeds_lie_where_they_were_found() -> None:
    panel = draw_objects(GREY, discovery())
    assert panel.shape == (350, 700, 3)
    assert close(panel[175, 70], colour_of(0))  # the box's left edge
    assert any(close(pixel, colour_of(1)) for pixel in panel[280, 490:510])  # a dash of the other's lower edge
    tinted = panel[180, 175]
    assert not close(tinted, (128, 128, 128))
    assert tinted[1] > tinted[2]  # a yellow tint
    assert close(panel[320, 600], (128, 128, 128))  # nothing was found there
    assert any(close(pixel, SEED) for pixel in panel[105, 60:80])
    assert (GREY == 128).all()  # the photo itself is left alone


def test_candidates_are_faint_and_beneath_what_was_chosen() -> None:
    candidates = np.array([[140, 140, 420, 420, 0.6], [1000, 140, 1380, 630, 0.1]], np.float32)
    found = dataclasses.replace(discovery(), candidates=candidates)
    without, panel = draw_objects(GREY, found), draw_objects(GREY, found, candidates=True)
    assert close(panel[175, 70], colour_of(0))  # the first is the box
    edge = panel[250, 685:695].max(axis=1)
    assert 150 < edge.max() < 250
    panel[60:325, 490:700] = without[60:325, 490:700]
    assert np.abs(panel.astype(int) - without).max() < 100  # no line elsewhere
    assert (draw_objects(GREY, discovery(), candidates=True) == draw_objects(GREY, discovery())).all()


def test_refined_masks_take_the_place_of_patches() -> None:
    refined = np.zeros((2, 50, 100), bool)
    refined[0, 40:50, 90:100] = True
    panel = draw_objects(GREY, dataclasses.replace(discovery(), refined=refined))
    assert not close(panel[330, 670], (128, 128, 128))
    assert close(panel[180, 175], (128, 128, 128))


def test_the_degree_map_has_a_colour_a_patch() -> None:
    panel = draw_degrees(GREY, discovery())
    centres = panel[35::70, 35::70].reshape(-1, 3)
    assert len(np.unique(centres, axis=0)) == 50
    assert close(centres[0], (68, 1, 84))  # viridis from its dark end
    assert close(centres[-1], (253, 231, 37))
    even = dataclasses.replace(discovery(), degrees=np.full((5, 10), 7))
    assert len(np.unique(draw_degrees(GREY, even)[290:].reshape(-1, 3), axis=0)) == 1


def test_attention_starts_at_nothing() -> None:
    attention = np.full((5, 10), 0.5, np.float32)
    attention[0, 0] = 1
    panel = draw_attention(GREY, discovery(), attention)
    assert close(panel[35, 35], (253, 231, 37))
    assert not close(panel[300, 300], (68, 1, 84))  # half as much is not drawn as none


def test_what_was_taught_is_shown_as_shares_of_one_with_the_boxes() -> None:
    assert draw_taught(GREY, discovery()) is None
    taught = np.full((5, 10), 0.5, np.float32)
    taught[4, 9], taught[4, 0] = 1, 0
    panel = draw_taught(GREY, dataclasses.replace(discovery(), objectness=taught))
    assert panel is not None
    assert close(panel[315, 665], (253, 231, 37))
    assert close(panel[315, 35], (68, 1, 84))
    assert close(panel[175, 70], colour_of(0))  # the box's left edge
    low = draw_taught(GREY, dataclasses.replace(discovery(), objectness=taught / 2))
    assert low is not None
    assert close(low[315, 665], tuple(panel[315, 565]))  # half is half, whatever the highest


@pytest.mark.parametrize(("shape", "longer"), [((35, 70, 3), 640), ((350, 700, 3), 700), ((2000, 4000, 3), 1024)])
def test_panels_are_neither_tiny_nor_huge(shape: tuple[int, int, int], longer: int) -> None:
    panels = [
        draw_objects(np.zeros(shape, np.uint8), discovery()),
        draw_degrees(np.zeros(shape, np.uint8), discovery()),
    ]
    assert {panel.shape for panel in panels} == {(longer // 2, longer, 3)}


def test_a_line_of_pixels_can_be_drawn() -> None:
    one = Discovery(
        xyxy=np.array([[0, 0, 3000, 1]], np.float32),
        scores=np.zeros(1, np.float32),
        seeds=np.array([[0, 2]]),
        biases=np.zeros(1, np.float32),
        masks=np.ones((1, 1, 10), bool),
        degrees=np.zeros((1, 10), np.int64),
        width=3000,
        height=1,
        patch_width=300,
        patch_height=300,
    )
    assert draw_objects(np.zeros((1, 1024, 3), np.uint8), one).shape == (1, 1024, 3)


def test_boxes_of_thin_pictures_lie_where_they_are() -> None:
    # 20 x 2000 pixels are 6 x 640 in the panel: the shorter side is rounded, and says nothing of the longer.
    grid = (125, 2)
    found = Discovery(
        xyxy=np.array([[0, 1800, 20, 1900]], np.float32),
        scores=np.zeros(1, np.float32),
        seeds=np.array([[0, 0]]),
        biases=np.zeros(1, np.float32),
        masks=np.zeros((1, *grid), bool),
        degrees=np.zeros(grid, np.int64),
        width=20,
        height=2000,
        patch_width=16,
        patch_height=16,
    )
    drawn = np.flatnonzero(draw_objects(np.zeros((640, 6, 3), np.uint8), found).any(axis=(1, 2)))
    assert abs(drawn.max() - 608) <= 3
