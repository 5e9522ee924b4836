"""Patches and pixels against loops that say what is meant."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from lostreg.probing import maps
from lostreg.probing.maps import Frame, class_shares, enlarge, mean_depths, predicted_classes, predicted_depths

pytestmark = pytest.mark.usefixtures("one_thread")


@st.composite
def framed(draw: st.DrawFn) -> tuple[Frame, tuple[int, int], np.random.Generator]:
    """A map's size, and patches that cover an image of another size or the same."""
    size, resized, patch = draw(st.tuples(*[st.integers(1, 23)] * 2)), draw(st.tuples(*[st.integers(1, 23)] * 2)), 4
    grid = (math.ceil(resized[0] / patch), math.ceil(resized[1] / patch))
    cell = (patch * size[0] / resized[0], patch * size[1] / resized[1])
    return Frame(grid, cell), size, np.random.default_rng(draw(st.integers(0, 1000)))


def patch_of(frame: Frame, y: int, x: int) -> tuple[int, int]:
    row, column = (int((pixel + 0.5) / cell) for pixel, cell in zip((y, x), frame.cell, strict=True))
    return min(row, frame.grid[0] - 1), min(column, frame.grid[1] - 1)


@given(framed())
@settings(deadline=None, max_examples=50)
def test_a_patch_should_say_what_its_pixels_are(drawn: tuple[Frame, tuple[int, int], np.random.Generator]) -> None:
    frame, size, random = drawn
    mask, depths = random.integers(-1, 3, size), random.uniform(1, 9, size).astype(np.float32)
    depths[random.uniform(size=size) < 0.3] = np.nan
    shares, sums = np.zeros((*frame.grid, 3)), np.zeros((*frame.grid, 2))
    for y in range(size[0]):
        for x in range(size[1]):
            place = patch_of(frame, y, x)
            if mask[y, x] >= 0:
                shares[(*place, mask[y, x])] += 1
            if not np.isnan(depths[y, x]):
                sums[place] += depths[y, x], 1
    area = frame.cell[0] * frame.cell[1]
    np.testing.assert_allclose(class_shares(mask, frame, 3), shares.reshape(-1, 3) / area, rtol=1e-6)
    found, counts = mean_depths(depths, frame), sums[..., 1].ravel()
    np.testing.assert_allclose(found[:, 1], counts / area, rtol=1e-6)
    np.testing.assert_allclose(found[:, 0], sums[..., 0].ravel() / np.maximum(counts, 1), rtol=1e-5)


@given(framed())
@settings(deadline=None, max_examples=50)
def test_outputs_are_interpolated_between_the_centres_of_patches(
    drawn: tuple[Frame, tuple[int, int], np.random.Generator],
) -> None:
    frame, size, random = drawn
    outputs = random.normal(size=(*frame.grid, 3)).astype(np.float32)
    weights = []
    for pixels, cell, patches in zip(size, frame.cell, frame.grid, strict=True):
        rows = np.zeros((pixels, patches))
        for pixel in range(pixels):
            place = min(max((pixel + 0.5) / cell - 0.5, 0), patches - 1)
            low = int(place)
            rows[pixel, low] += 1 - (place - low)
            rows[pixel, min(low + 1, patches - 1)] += place - low
        weights.append(rows)
    expected = np.einsum("yr,xc,rck->kyx", *weights, outputs)
    flat = torch.from_numpy(outputs.reshape(-1, 3))
    ((_, found),) = enlarge(flat, frame, size)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-4)
    np.testing.assert_allclose(predicted_depths(flat[:, :1], frame, size), expected[0], atol=1e-4)
    margin = np.sort(expected, axis=0)
    sure = margin[-1] - margin[-2] > 1e-3
    np.testing.assert_array_equal(predicted_classes(flat, frame, size)[sure], expected.argmax(axis=0)[sure])


def test_without_padding_it_is_what_pytorch_calls_bilinear() -> None:
    outputs = torch.randn(12, 5)
    ((_, found),) = enlarge(outputs, Frame((3, 4), (7.0, 8.0)), (21, 32))
    expected = functional.interpolate(outputs.T.reshape(1, 5, 3, 4), (21, 32), mode="bilinear", align_corners=False)
    torch.testing.assert_close(found, expected[0], atol=1e-5, rtol=0)


def test_large_maps_are_made_in_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs, frame = torch.randn(12, 5), Frame((3, 4), (7.0, 8.0))
    whole = predicted_classes(outputs, frame, (20, 30))
    monkeypatch.setattr(maps, "_BAND_VALUES", 1000)
    assert len(list(enlarge(outputs, frame, (20, 30)))) == 4
    np.testing.assert_array_equal(predicted_classes(outputs, frame, (20, 30)), whole)
