"""Masks in pixels: what refinement gains and never breaks, boxes, run-length encoding, PNG files."""

import threading
import tracemalloc

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image
from pycocotools import mask as coco_mask

from lostreg.errors import LostregError, PredictionsError
from lostreg.images.masks import WORKING_SIDE, mask_boxes, outlines, palette, refine, save_mask_png
from lostreg.images.rle import decode_rle, encode_rle, rle_area, sample_rle
from lostreg.inference.discovery import Discovery

bool_masks = arrays(np.bool_, array_shapes(min_dims=2, max_dims=2, max_side=70))


def textured(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A green and brown texture: no pixel like its neighbour."""
    generator = np.random.default_rng(seed)
    return np.clip(generator.normal((90, 120, 60), 12, (height, width, 3)), 0, 255).astype(np.uint8)


def disc(height: int, width: int, x: float, y: float, radius: float) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    return (columns - x) ** 2 + (rows - y) ** 2 < radius**2


def patches_of(mask: np.ndarray, patch: int) -> np.ndarray:
    """The patches that lie in a mask for at least half."""
    rows, columns = -(-mask.shape[0] // patch), -(-mask.shape[1] // patch)
    padded = np.zeros((rows * patch, columns * patch))
    padded[: mask.shape[0], : mask.shape[1]] = mask
    return padded.reshape(rows, patch, columns, patch).mean(axis=(1, 3)) >= 0.5


def discovery(masks: np.ndarray, width: int, height: int, patch: float, refined: np.ndarray | None = None) -> Discovery:
    count = len(masks)
    return Discovery(
        xyxy=np.zeros((count, 4), dtype=np.float32),
        scores=np.ones(count, dtype=np.float32),
        seeds=np.zeros((count, 2), dtype=np.int64),
        biases=np.zeros(count, dtype=np.float32),
        masks=masks,
        degrees=np.zeros(masks.shape[1:], dtype=np.int64),
        width=width,
        height=height,
        patch_width=patch,
        patch_height=patch,
        refined=refined,
    )


def iou(first: np.ndarray, second: np.ndarray) -> float:
    return (first & second).sum() / (first | second).sum()


def two_discs() -> tuple[np.ndarray, np.ndarray]:
    """Red and blue discs that touch, and the patches of each."""
    pixels = textured(200, 260)
    red, blue = disc(200, 260, 80, 100, 55), disc(200, 260, 175, 100, 40)
    pixels[red], pixels[blue] = (220, 40, 40), (40, 60, 220)
    return pixels, np.stack([patches_of(red, 14), patches_of(blue & ~red, 14)])


# Refinement


@pytest.mark.parametrize(("height", "width", "patch"), [(200, 260, 14), (205, 151, 16), (700, 900, 40)])
def test_refined_masks_fit_the_object_better_than_its_patches(height, width, patch) -> None:
    truth = disc(height, width, width * 0.45, height * 0.5, height * 0.3)
    pixels = textured(height, width)
    pixels[truth] = (220, 180, 40)
    masks = patches_of(truth, patch)[None]
    refined = refine(pixels, masks, (patch, patch))
    found = discovery(masks, width, height, patch, refined)
    before = iou(discovery(masks, width, height, patch).pixel_mask(), truth)
    assert before < 0.93
    assert iou(found.pixel_mask(), truth) > 0.97


def test_the_working_size_is_bounded_and_keeps_the_shape_of_the_image() -> None:
    masks = np.zeros((1, 20, 40), dtype=bool)
    masks[0, 5:15, 10:20] = True
    assert refine(textured(1000, 2000), masks, (50, 50)).shape == (1, WORKING_SIDE // 2, WORKING_SIDE)
    assert refine(textured(100, 200), masks, (5, 5)).shape == (1, 100, 200)


def test_every_patch_of_a_large_grid_has_pixels_at_the_working_size() -> None:
    masks = np.zeros((1, 300, 400), dtype=bool)
    masks[0, 7, 201] = True
    refined = refine(np.zeros((900, 1200, 3), np.uint8), masks, (3, 3))
    assert refined.shape[1:] == (600, 800)
    assert refined[0, 14:16, 402:404].any()


def test_pixels_may_be_smaller_than_the_original_and_patches_not_square() -> None:
    truth = disc(150, 300, 120, 70, 45)
    pixels = textured(150, 300)
    pixels[truth] = (220, 180, 40)
    masks = patches_of(truth, 15)[None]
    stretched = cv2.resize(pixels, (300, 75), interpolation=cv2.INTER_AREA)
    refined = refine(stretched, masks, (15, 7.5))
    assert refined.shape == (1, 75, 300)
    assert iou(discovery(masks, 300, 150, 15, refined).pixel_mask(), truth) > 0.95


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (3, 3), (60, 45), (900, 20)])
@pytest.mark.parametrize("kind", ["all", "none", "one", "all but one", "two of all", "line"])
@pytest.mark.parametrize("is_flat", [True, False])
def test_degenerate_masks_keep_something_plausible(size, kind, is_flat) -> None:
    height, width = size
    rows, columns = -(-height // 14), -(-width // 14)
    first = np.full((rows, columns), kind in ("all", "all but one"))
    if kind in ("one", "all but one"):
        first[rows // 2, columns // 2] ^= True
    if kind == "line":
        first[rows // 2] = True
    masks = np.stack([first, ~first]) if kind == "two of all" else first[None]
    pixels = np.full((height, width, 3), 128, dtype=np.uint8) if is_flat else textured(height, width)
    refined = refine(pixels, masks, (14, 14))
    assert refined.dtype == np.bool_
    for index, mask in enumerate(masks):
        raw = discovery(masks, width, height, 14).pixel_mask(index)
        found = discovery(masks, width, height, 14, refined).pixel_mask(index)
        assert found.any() == raw.any() == mask.any()
        assert not raw.any() or iou(found, raw) > 0.28  # 0.3 at the working size


def test_an_implausible_result_gives_way_to_the_patches() -> None:
    masks = np.zeros((1, 20, 20), dtype=bool)
    for row, column in ((1, 1), (1, 14), (8, 8), (14, 1), (14, 14)):
        masks[0, row : row + 4, column : column + 4] = True  # the largest part is a fifth of them
    refined = refine(textured(280, 280), masks, (14, 14))
    assert np.array_equal(refined[0], np.repeat(np.repeat(masks[0], 14, axis=0), 14, axis=1))


def test_only_the_largest_connected_part_is_kept() -> None:
    pixels = textured(280, 280)
    masks = np.zeros((1, 20, 20), dtype=bool)
    masks[0, 2:10, 2:10] = masks[0, 13:18, 13:18] = True
    pixels[28:140, 28:140] = pixels[182:252, 182:252] = (220, 180, 40)
    refined = refine(pixels, masks, (14, 14))[0]
    assert refined[80, 80]
    assert not refined[180:].any()


def test_no_pixel_belongs_to_two_objects_and_each_follows_its_own_colour() -> None:
    pixels, masks = two_discs()
    refined = refine(pixels, masks, (14, 14))
    assert not (refined[0] & refined[1]).any()
    for mask, colour in zip(refined, ((220, 40, 40), (40, 60, 220)), strict=True):
        assert iou(mask, (pixels == colour).all(axis=2)) > 0.95


@settings(max_examples=60, deadline=None)
@given(
    labels=arrays(np.uint8, array_shapes(min_dims=2, max_dims=2, max_side=8), elements=st.integers(0, 3)),
    seed=st.integers(0, 99),
    cut=st.integers(0, 6),
)
def test_refinement_never_fails_and_never_overlaps(labels, seed, cut) -> None:
    masks = np.stack([labels == number for number in (1, 2, 3)])
    pixels = textured(labels.shape[0] * 7 - cut, labels.shape[1] * 7 - cut, seed)
    refined = refine(pixels, masks, (7, 7))
    assert refined.shape == (3, *pixels.shape[:2])
    assert refined.sum(axis=0).max() <= 1
    assert (refined.any(axis=(1, 2)) == masks.any(axis=(1, 2))).all()


@pytest.mark.parametrize("rest", [1, 2, 3])
@pytest.mark.parametrize("sideways", [False, True])
def test_an_object_in_a_last_patch_of_a_few_pixels_keeps_pixels(rest: int, sideways: bool) -> None:
    height, width = 14 * 10 + rest, 14 * 100 + rest
    masks = np.zeros((2, 11, 101), dtype=bool)
    masks[0, -1, :3] = masks[1, :3, -1] = True
    pixels = np.zeros((height, width, 3), np.uint8)
    if sideways:
        pixels, masks = pixels.transpose(1, 0, 2), masks.transpose(0, 2, 1)
    refined = refine(pixels, masks, (14.0, 14.0))
    assert refined.any(axis=(1, 2)).all()
    boxes = mask_boxes(refined, pixels.shape[1], pixels.shape[0])
    assert (boxes[:, 2:] > boxes[:, :2]).all()


def test_no_object_gives_no_mask() -> None:
    assert refine(textured(30, 40), np.zeros((0, 3, 3), dtype=bool), (14, 14)).shape == (0, 30, 40)


def test_results_are_the_same_in_any_thread_and_order() -> None:
    pixels, masks = two_discs()
    other = np.ascontiguousarray(pixels[::-1, ::-1])
    expected = refine(pixels, masks, (14, 14))
    found: list[np.ndarray] = []

    def work(number: int) -> None:
        cv2.setRNGSeed(number)
        for _ in range(number):
            refine(other, masks[:, ::-1, ::-1], (14, 14))
        found.append(refine(pixels, masks, (14, 14)))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(np.array_equal(mask, expected) for mask in found)


def test_inputs_are_left_as_they_were_and_may_be_read_only_views() -> None:
    pixels, masks = two_discs()
    pixels.setflags(write=False)
    masks.setflags(write=False)
    flipped = refine(pixels[:, ::-1], masks, (14, 14))
    assert flipped.shape == (2, 200, 260)


@pytest.mark.parametrize(
    ("pixels", "masks", "patch"),
    [
        (np.zeros((0, 5, 3), np.uint8), np.zeros((1, 1, 1), bool), (14, 14)),
        (np.zeros((5, 5), np.uint8), np.zeros((1, 1, 1), bool), (14, 14)),
        (np.zeros((5, 5, 3), np.uint8), np.zeros((1, 1), bool), (14, 14)),
        (np.zeros((5, 5, 3), np.uint8), np.zeros((1, 0, 1), bool), (14, 14)),
        (np.zeros((5, 5, 3), np.uint8), np.zeros((1, 1, 1), bool), (14, 0)),
        (np.zeros((5, 5, 3), np.uint8), np.zeros((1, 1, 1), bool), (float("nan"), 14)),
    ],
)
def test_other_shapes_are_refused(pixels, masks, patch) -> None:
    with pytest.raises(ValueError, match="expected"):
        refine(pixels, masks, patch)


# Boxes


@settings(deadline=None)
@given(bool_masks, st.integers(0, 90), st.integers(0, 90))
def test_boxes_are_tight_around_what_pixel_mask_has(mask, wider, higher) -> None:
    height, width = mask.shape[0] + higher, mask.shape[1] + wider
    box = mask_boxes(mask[None], width, height)
    assert box.dtype == np.float32
    x1, y1, x2, y2 = box[0].astype(int)
    pixels = discovery(np.zeros((1, 1, 1), bool), width, height, 14, mask[None]).pixel_mask()
    inside = np.zeros_like(pixels)
    inside[y1:y2, x1:x2] = True
    assert not (pixels & ~inside).any()
    if mask.any():
        assert all(pixels[line].any() for line in (y1, y2 - 1))
        assert all(pixels[:, line].any() for line in (x1, x2 - 1))
    else:
        assert not box.any()


def test_boxes_are_in_pixels_of_the_original() -> None:
    masks = np.zeros((2, 10, 20), dtype=bool)
    masks[0, 2:4, 5:9] = True
    masks[1, 9, 19] = True
    assert mask_boxes(masks, 200, 50).tolist() == [[50, 10, 90, 20], [190, 45, 200, 50]]
    assert mask_boxes(masks[:0], 200, 50).shape == (0, 4)


# Run-length encoding


@settings(deadline=None)
@given(bool_masks)
def test_encoding_and_decoding_give_the_mask_back_and_agree_with_pycocotools(mask) -> None:
    rle = encode_rle(mask)
    assert rle["size"] == list(mask.shape)
    assert isinstance(rle["counts"], str)
    decoded = decode_rle(rle)
    assert decoded.dtype == np.bool_
    assert np.array_equal(decoded, mask)
    assert np.array_equal(coco_mask.decode(rle), mask)


@given(runs=st.lists(st.integers(0, 40_000), min_size=1, max_size=30))
def test_runs_of_any_length_are_read_as_pycocotools_reads_them(runs) -> None:
    height, width = sum(runs) + 1, 1
    uncompressed = {"size": [height, width], "counts": [*runs, 1]}
    rle = coco_mask.frPyObjects(uncompressed, height, width)
    read = decode_rle({"size": [height, width], "counts": rle["counts"].decode()})
    assert np.array_equal(read, coco_mask.decode(rle))


def test_encoding_takes_views_and_refuses_other_shapes() -> None:
    mask = disc(40, 60, 30, 20, 10)
    assert encode_rle(mask[::-1, ::2]) == encode_rle(np.ascontiguousarray(mask[::-1, ::2]))
    for shape in ((3, 4, 1), (0, 4), (4,)):
        with pytest.raises(ValueError, match="expected a mask"):
            encode_rle(np.zeros(shape, dtype=bool))


GOOD = encode_rle(disc(40, 60, 30, 20, 10))


@pytest.mark.parametrize(
    "rle",
    [
        None,
        [],
        {},
        {"counts": GOOD["counts"]},
        {"size": GOOD["size"]},
        {"size": [60, 41], "counts": GOOD["counts"]},
        {"size": [40.0, 60.0], "counts": GOOD["counts"]},
        {"size": [True, 60], "counts": GOOD["counts"]},
        {"size": [40, 60, 1], "counts": GOOD["counts"]},
        {"size": [-40, -60], "counts": GOOD["counts"]},
        {"size": [0, 60], "counts": ""},
        {"size": [40, 60], "counts": ""},
        {"size": [40, 60], "counts": [2400]},
        {"size": [40, 60], "counts": GOOD["counts"][:-1]},
        {"size": [40, 60], "counts": GOOD["counts"] + "P"},  # the flag that more follows
        {"size": [40, 60], "counts": GOOD["counts"] + "\x00"},
        {"size": [40, 60], "counts": GOOD["counts"] + "é"},
        {"size": [40, 60], "counts": "\ud800"},
        {"size": [40, 60], "counts": "o" * 2000},
        {"size": [40, 60], "counts": "P" * 30 + "0"},
        {"size": [1, 1], "counts": "2O0"},  # runs of 2, -1 and 0 pixels
    ],
)
def test_a_malformed_encoding_says_what_was_expected(rle) -> None:
    with pytest.raises(PredictionsError, match="malformed mask: expected"):
        decode_rle(rle)


def test_a_mask_that_claims_to_be_huge_takes_no_memory() -> None:
    with pytest.raises(PredictionsError, match="1000000x1000000 is more than the limit of 200,000,000 pixels"):
        decode_rle({"size": [10**6, 10**6], "counts": "0"})
    with pytest.raises(PredictionsError, match="limit of 2,399"):
        decode_rle(GOOD, max_pixels=2399)
    assert decode_rle(GOOD, max_pixels=2400).sum() == disc(40, 60, 30, 20, 10).sum()


@settings(deadline=None)
@given(bool_masks, st.data())
def test_areas_and_samples_are_those_of_the_whole_mask(mask, data) -> None:
    rle = encode_rle(mask)
    assert rle_area(rle) == rle_area(rle, mask.shape) == mask.sum()
    rows, columns = (
        np.array(data.draw(st.lists(st.integers(0, side - 1), max_size=9)), np.int64) for side in mask.shape
    )
    assert np.array_equal(sample_rle(rle, rows, columns), mask[rows][:, columns])
    with pytest.raises(PredictionsError, match="expected masks of 1x1000 pixels, found one of "):
        rle_area(rle, (1000, 1))


def test_what_needs_no_pixels_takes_no_memory_for_them() -> None:
    side = 1 << 17  # all but the last column: runs of 2**34 - 2**17 zeros and 2**17 ones
    rle = {"size": [side, side], "counts": "PPPloo?" + "PPP4"}
    tracemalloc.start()
    area = rle_area(rle)
    ends = np.array([0, side - 1])
    corners = sample_rle(rle, ends, ends)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert area == side
    assert corners.tolist() == [[False, True], [False, True]]
    assert peak < 1 << 20


@given(st.text(alphabet=[chr(code) for code in range(46, 114)], max_size=40), st.integers(1, 50), st.integers(1, 50))
def test_any_string_is_a_mask_or_a_clear_error(counts, height, width) -> None:
    try:
        mask = decode_rle({"size": [height, width], "counts": counts})
    except PredictionsError:
        return
    assert mask.shape == (height, width)
    assert np.array_equal(mask, coco_mask.decode({"size": [height, width], "counts": counts}))


# PNG files


def test_a_mask_file_has_the_size_of_the_image_and_a_number_for_each_object(tmp_path) -> None:
    masks = np.zeros((2, 3, 4), dtype=bool)
    masks[0, 0, :2] = masks[1, 2, 3] = True
    path = tmp_path / "new" / "masks.PNG"
    save_mask_png(path, discovery(masks, 55, 40, 14).labels())
    with Image.open(path) as picture:
        assert (picture.format, picture.mode, picture.size) == ("PNG", "P", (55, 40))
        labels = np.asarray(picture)
        colours = np.asarray(picture.convert("RGB"))
    expected = np.zeros((40, 55), dtype=np.uint8)
    expected[:14, :28], expected[28:, 42:] = 1, 2
    assert np.array_equal(labels, expected)
    assert np.array_equal(colours, palette()[expected])


def test_a_mask_file_has_the_refined_masks_and_the_earlier_object_in_front(tmp_path) -> None:
    refined = np.zeros((2, 20, 27), dtype=bool)
    refined[0, 5:10, 5:10] = refined[1, 8:12, 8:12] = True
    found = discovery(np.zeros((2, 3, 4), dtype=bool), 54, 40, 14, refined)
    save_mask_png(tmp_path / "masks.png", found.labels())
    labels = np.asarray(Image.open(tmp_path / "masks.png"))
    assert np.array_equal(labels == 1, found.pixel_mask(0))
    assert np.array_equal(labels == 2, found.pixel_mask(1) & ~found.pixel_mask(0))


def test_colours_are_distinct_and_the_background_is_black() -> None:
    colours = palette()
    assert len(np.unique(colours, axis=0)) == 256
    assert not colours[0].any()
    first = colours[1:13].astype(int)
    apart = np.abs(first[:, None] - first[None]).max(axis=2) + 255 * np.eye(12, dtype=int)
    assert apart.min() > 30


def test_a_mask_file_that_cannot_be_written_is_one_clear_error(tmp_path) -> None:
    found = discovery(np.zeros((1, 3, 4), dtype=bool), 55, 40, 14)
    with pytest.raises(LostregError, match=r"expected a file ending in \.png"):
        save_mask_png(tmp_path / "masks.jpg", found.labels())
    (tmp_path / "file").touch()
    with pytest.raises(LostregError, match=r"cannot write .*masks\.png"):
        save_mask_png(tmp_path / "file" / "masks.png", found.labels())
    with pytest.raises(LostregError, match="at most 255 objects, found 256"):
        discovery(np.zeros((256, 3, 4), dtype=bool), 55, 40, 14).labels()


# Outlines


@given(mask=bool_masks)
@settings(max_examples=200, deadline=None)
def test_outlines_fill_the_pieces_of_a_mask_the_largest_first(mask: np.ndarray) -> None:
    filled = np.zeros(mask.shape, np.uint8)
    pieces = outlines(mask)
    for piece in pieces:
        assert piece.shape[0] >= 3
        cv2.fillPoly(filled, [piece], 1)
    outside = np.pad(~mask, 1, constant_values=True).astype(np.uint8)  # holes are what the outside does not reach
    _, parts = cv2.connectedComponents(outside, connectivity=4)
    assert np.array_equal(filled.astype(bool), (parts != parts[0, 0])[1:-1, 1:-1])
    areas = [cv2.contourArea(piece) for piece in pieces]
    assert areas == sorted(areas, reverse=True)
