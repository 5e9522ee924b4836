"""Pictures: what is drawn where, checked by colour."""

import cv2
import numpy as np
import pytest

from lostreg.errors import LostregError
from lostreg.images.draw import OBJECTS, SEED, colour_of, dash_of, draw_box, save_picture
from lostreg.inference.discovery import Discovery

MAIN, WHITE = colour_of(0), (255, 255, 255)
CAPTION = 34


def discovery(**changes) -> Discovery:
    fields = {
        "xyxy": np.array([[64, 32, 128, 96]], dtype=np.float32),
        "scores": np.ones(1, dtype=np.float32),
        "seeds": np.array([[3, 5]]),
        "width": 320,
        "height": 160,
        "degrees": np.arange(200).reshape(10, 20),
        "biases": np.zeros(1, dtype=np.float32),
        "masks": np.zeros((1, 10, 20), dtype=bool),
        "patch_width": 16.0,
        "patch_height": 16.0,
    }
    return Discovery(**{**fields, **changes})


def near(pixel: np.ndarray, colour: tuple[int, int, int]) -> bool:
    return bool(np.abs(pixel.astype(int) - colour).max() < 40)


def test_box_seed_and_truth_are_drawn_in_both_panels_at_their_place() -> None:
    picture = discovery().plot(np.zeros((160, 320, 3), np.uint8), truth=np.array([[10.0, 10.0, 300.0, 150.0]]))
    assert picture.shape == (320 + CAPTION, 640 + 12 + 640, 3)
    for left in (0, 640 + 12):
        assert near(picture[CAPTION + 128, left + 128], MAIN)  # the box's left edge: x = 64, twice as large
        assert near(picture[CAPTION + 64, left + 200], MAIN)  # its top edge: y = 32
        assert near(picture[CAPTION + 100, left + 5 * 32], SEED)  # the seed's left edge: column 5
        assert near(picture[CAPTION + 20, left + 300], WHITE)  # the truth's top edge: y = 10


def test_the_degree_panel_shows_low_degrees_dark_and_high_ones_light() -> None:
    picture = discovery().plot(np.zeros((160, 320, 3), np.uint8))
    right = picture[CAPTION:, 640 + 12 :].astype(int)
    assert right[5, 5].sum() < right[-5, -5].sum()
    # One patch is one colour: 16 pixels, twice as large.
    assert (right[1:31, 1:31] == right[1, 1]).all()
    assert (right[1, 33] != right[1, 1]).any()


def test_a_pixel_of_the_degree_panel_shows_the_patch_that_its_centre_lies_in() -> None:
    # The panel is two thirds of the image: the second patch ends at 21.33, between pixel 21's left edge and its centre.
    degrees = np.arange(600).reshape(10, 60) % 7 * 40
    found = discovery(width=960, degrees=degrees, masks=np.zeros((1, 10, 60), dtype=bool))
    right = found.plot(np.zeros((160, 960, 3), np.uint8))[CAPTION:, 640 + 12 :]
    edges = np.flatnonzero((right[3, 1:] != right[3, :-1]).any(axis=1)) + 1
    assert edges[:3].tolist() == [11, 21, 32]


def test_boxes_of_thin_pictures_lie_where_they_are() -> None:
    # 20 x 2000 pixels are 6 x 640 in the panel: the shorter side is rounded, and says nothing of the longer.
    found = discovery(
        width=20,
        height=2000,
        xyxy=np.array([[0, 1800, 20, 1900]], dtype=np.float32),
        seeds=np.zeros((1, 2), dtype=int),
        degrees=np.zeros((125, 2), dtype=int),
        masks=np.zeros((1, 125, 2), dtype=bool),
    )
    panel = found.plot(np.zeros((2000, 20, 3), np.uint8))[CAPTION:, :6]
    edges = np.flatnonzero([near(pixel, MAIN) for pixel in panel[:, 0]])
    np.testing.assert_allclose([edges.min(), edges.max()], [576, 608], atol=2)


def test_padding_beyond_the_image_is_not_shown() -> None:
    found = discovery(width=312, degrees=np.zeros((10, 20), dtype=int))
    assert found.plot(np.zeros((160, 312, 3), np.uint8)).shape[1] == 640 * 2 + 12


@pytest.mark.parametrize("size", [(1, 1), (2000, 30), (30, 2000)])
def test_extreme_shapes_are_no_error(size) -> None:
    width, height = size
    grid = (-(-height // 16), -(-width // 16))
    found = discovery(
        width=width,
        height=height,
        xyxy=np.array([[0, 0, width, height]], dtype=np.float32),
        seeds=np.zeros((1, 2), dtype=int),
        degrees=np.zeros(grid, dtype=int),
        masks=np.zeros((1, *grid), dtype=bool),
    )
    assert found.plot(np.zeros((height, width, 3), np.uint8)).dtype == np.uint8


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".PNG"])
def test_pictures_are_written_as_rgb_in_the_format_of_the_suffix(tmp_path, suffix) -> None:
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[..., 0] = 200
    path = tmp_path / "deep" / f"ünïcode{suffix}"
    save_picture(path, pixels)
    read = cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_COLOR)
    assert near(read[20, 30], (0, 0, 200))  # OpenCV reads blue first


def test_unknown_formats_and_unwritable_places_are_said_plainly(tmp_path) -> None:
    with pytest.raises(LostregError, match="expected a file ending in"):
        save_picture(tmp_path / "a.xyz", np.zeros((4, 4, 3), np.uint8))
    (tmp_path / "file").write_text("")
    with pytest.raises(LostregError, match="cannot write"):
        save_picture(tmp_path / "file" / "a.png", np.zeros((4, 4, 3), np.uint8))


def test_a_discovery_of_inconsistent_shapes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(n, 4\), \(n,\), \(n, 2\)"):
        discovery(scores=np.ones(2, dtype=np.float32))
    with pytest.raises(ValueError, match="one patch grid"):
        discovery(masks=np.zeros((1, 3, 3), dtype=bool))
    with pytest.raises(ValueError, match="expected 1 refined masks"):
        discovery(refined=np.zeros((2, 3, 3), dtype=bool))


def three_objects(**changes) -> Discovery:
    masks = np.zeros((3, 10, 20), dtype=bool)
    masks[0, 2:6, 4:8] = masks[1, 0, 0] = masks[2, 9, 19] = True
    fields = {
        "xyxy": np.array([[64, 32, 128, 96], [0, 0, 16, 16], [200, 40, 280, 140]], dtype=np.float32),
        "scores": np.array([0.5, 0.4, 0.3], dtype=np.float32),
        "seeds": np.array([[3, 5], [0, 0], [9, 19]]),
        "biases": np.zeros(3, dtype=np.float32),
        "masks": masks,
    }
    return discovery(**{**fields, **changes})


def test_further_boxes_differ_from_the_main_one_in_colour_and_dashes() -> None:
    picture = three_objects().plot(np.zeros((160, 320, 3), np.uint8))
    for left in (0, 640 + 12):
        assert near(picture[CAPTION + 150, left + 128], MAIN)
        edge = picture[CAPTION + 120 : CAPTION + 240, left + 400]
        shares = [np.mean([near(pixel, colour) for pixel in edge]) for colour in (colour_of(2), (0, 0, 0))]
        assert min(shares) > 0.2  # dashes, on the dark line that goes on between them
    assert len({(colour_of(index), dash_of(index)) for index in range(20)}) == 20


@pytest.mark.parametrize("colour", OBJECTS)
@pytest.mark.parametrize("ground", [(0, 0, 0), (255, 255, 255), (60, 110, 50), *OBJECTS])
def test_a_box_shows_on_any_ground(colour: tuple[int, int, int], ground: tuple[int, int, int]) -> None:
    panel = np.full((60, 60, 3), ground, np.uint8)
    draw_box(panel, np.array([10, 10, 50, 50]), colour, 3)
    across = panel[30, :30] @ np.array([0.2126, 0.7152, 0.0722])
    assert np.ptp(across) > 80  # whatever the hue, something is much darker or lighter


def test_refined_masks_are_outlined_at_their_place_whatever_their_size() -> None:
    refined = np.zeros((1, 80, 160), dtype=bool)
    refined[0, 50:70, 100:140] = True  # 400 to 560 across and 200 to 280 down in the panel
    plain = discovery().plot(np.zeros((160, 320, 3), np.uint8))
    picture = discovery(refined=refined).plot(np.zeros((160, 320, 3), np.uint8))
    changed = np.argwhere((picture != plain).any(axis=2)) - (CAPTION, 0)
    np.testing.assert_allclose(changed.min(axis=0), (200, 400), atol=3)
    np.testing.assert_allclose(changed.max(axis=0), (280, 560), atol=3)


def test_a_notebook_shows_a_discovery_as_a_picture_of_its_source(tmp_path) -> None:
    pixels = np.full((160, 320, 3), (0, 0, 200), np.uint8)
    save_picture(tmp_path / "blue.png", pixels)
    for source in (tmp_path / "blue.png", str(tmp_path / "blue.png"), pixels):
        shown = cv2.imdecode(np.frombuffer(discovery(source=source)._repr_png_(), np.uint8), cv2.IMREAD_COLOR)
        assert near(shown[CAPTION + 300, 600], (200, 0, 0))
        assert near(shown[CAPTION + 128, 128], MAIN[::-1])  # OpenCV reads blue first
    for source in (None, tmp_path / "gone.png"):
        found = discovery(source=source).plot()
        assert near(found[CAPTION + 300, 600], (200, 200, 200))
        assert near(found[CAPTION + 128, 128], MAIN)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_masks_at_the_images_size_are_where_the_patches_are(index) -> None:
    found = three_objects()
    expected = np.kron(found.masks[index], np.ones((16, 16))).astype(bool)
    np.testing.assert_array_equal(found.pixel_mask(index), expected)
    cut = three_objects(width=311, height=153).pixel_mask(index)
    np.testing.assert_array_equal(cut, expected[:153, :311])


def test_refined_masks_go_before_patches_and_are_stretched_over_the_image() -> None:
    refined = np.zeros((1, 4, 8), dtype=bool)
    refined[0, 1, 2:4] = True
    expected = np.zeros((160, 320), dtype=bool)
    expected[40:80, 80:160] = True
    np.testing.assert_array_equal(discovery(refined=refined).pixel_mask(), expected)
