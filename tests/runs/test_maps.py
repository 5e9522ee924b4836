"""The maps file: what goes in comes out, and what else may stand in it is refused in one line."""

import base64
import dataclasses
import json
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import scene
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from lostreg import Discoverer
from lostreg.errors import PredictionsError
from lostreg.models.backbone import Backbone
from lostreg.runs.maps import ImageMaps, maps_of, read_maps

degree_maps = arrays(np.int64, array_shapes(min_dims=2, max_dims=2, max_side=9), elements=st.integers(0, 100_000))


def written(folder: Path, *lines: str) -> Path:
    path = folder / "maps.jsonl"
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


@given(
    degree_maps,
    st.booleans(),
    st.sampled_from([None, [], [[0.0, 1.5, 20.0, 30.0]]]),
    st.sampled_from([None, [], [[0.0, 1.5, 20.0, 30.0, 0.5], [0.0, 0.0, 1.0, 1.0, 0.0]]]),
    st.booleans(),
)
@settings(deadline=None, max_examples=40)
def test_a_line_comes_back_as_it_was(
    tmp_path_factory, degrees: np.ndarray, exif: bool, truth: Any, candidates: Any, taught: bool
) -> None:
    objectness = (degrees % 256).astype(np.uint8) if taught else None
    image = ImageMaps("a/ö.jpg", "/photos/a/ö.jpg", degrees, 14.0, 13.5, exif, truth, candidates, objectness)
    (found,) = read_maps(written(tmp_path_factory.mktemp("maps"), image.to_line()))
    np.testing.assert_array_equal(found.degrees, degrees)
    assert (found.image_id, found.path, found.patch_width, found.patch_height) == (
        "a/ö.jpg",
        "/photos/a/ö.jpg",
        14,
        13.5,
    )
    assert (found.exif, found.truth, found.candidates) == (exif, truth, candidates)
    np.testing.assert_array_equal(found.objectness, objectness)


def test_a_discovery_leaves_what_pictures_of_it_need(backbone: Backbone, tmp_path: Path) -> None:
    found = Discoverer(backbone, device="cpu", exif=False).discover(scene(3))
    line = maps_of(7, Path("photos") / "a.jpg", found, np.array([[1, 2, 3, 4]])).to_line()
    (maps,) = read_maps(written(tmp_path, line))
    np.testing.assert_array_equal(maps.degrees, found.degrees)
    assert (maps.image_id, maps.exif, maps.truth) == (7, False, [[1, 2, 3, 4]])
    assert Path(maps.path) == Path("photos/a.jpg").absolute()
    assert "candidates" not in line
    assert "objectness" not in line
    why = {"candidates": np.float32([[1, 2, 3.3333333, 4, 0.12345]]), "objectness": found.degrees / np.float32(100)}
    (maps,) = read_maps(written(tmp_path, maps_of(7, Path("a.jpg"), dataclasses.replace(found, **why)).to_line()))
    assert maps.candidates == [[1, 2, 3.333, 4, 0.123]]
    assert maps.objectness is not None
    np.testing.assert_allclose(maps.objectness / 255, why["objectness"], atol=0.5001 / 255)


def test_a_last_line_that_was_not_finished_is_left_out(tmp_path: Path) -> None:
    line = ImageMaps("a", "/a.jpg", np.zeros((2, 2), np.int64), 1, 1).to_line()
    path = written(tmp_path, line, "", line)
    with path.open("a") as file:
        file.write(line[:30])
    assert len(list(read_maps(path))) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"image_id": [1]},
        {"image_id": True},
        {"path": 5},
        {"path": None},
        {"path": ""},
        {"path": "a\0b"},
        {"path": "\ud800.jpg"},
        {"exif": "yes"},
        {"grid": [0, 0]},
        {"grid": [2, 3]},
        {"grid": [2.0, 2]},
        {"grid": [1 << 30, 1 << 30]},
        {"grid": [10**400, 2]},
        {"grid": [1 << 12, (1 << 10) + 1]},
        {"patch": [0.5, 1]},
        {"grid": 4},
        {"patch": [0, 1]},
        {"patch": [10**400, 1]},
        {"patch": ["1", "1"]},
        {"patch": [float("nan"), 1]},
        {"truth": "abc"},
        {"truth": [[1, 2, 3]]},
        {"truth": [[1, 2, 3, float("inf")]]},
        {"degrees": "abc"},
        {"degrees": 3},
        {"degrees": None},
        {"candidates": "abc"},
        {"candidates": [[]]},
        {"candidates": [[1, 2, 3, 4]]},
        {"candidates": [[1, 2, 3, 4, 1.1]]},
        {"candidates": [[1, 2, 3, 4, float("nan")]]},
        {"candidates": [[1, 2, 3, float("inf"), 0.5]]},
        {"candidates": [[1, 2, 3, 4, 5, 0.5]]},
        {"objectness": 3},
        {"objectness": "abc"},
        {"objectness": base64.b64encode(zlib.compress(bytes(3))).decode()},
        {"objectness": base64.b64encode(zlib.compress(bytes(5))).decode()},
    ],
    ids=str,
)
def test_what_no_run_writes_is_refused_with_its_line(tmp_path: Path, change: dict[str, Any]) -> None:
    line = ImageMaps("a", "/a.jpg", np.zeros((2, 2), np.int64), 1, 1).to_line()
    path = written(tmp_path, line, json.dumps({**json.loads(line), **change}))
    with pytest.raises(PredictionsError, match=r"maps\.jsonl, line 2: expected maps as `lostreg discover` writes them"):
        list(read_maps(path))


def test_a_map_is_no_larger_than_any_images_whatever_its_line_promises(tmp_path: Path) -> None:
    line = json.loads(ImageMaps("a", "/a.jpg", np.zeros((2, 2), np.int64), 1, 1).to_line())
    rows = 1 << 14
    bomb = base64.b64encode(zlib.compress(bytes(4 * rows * rows // 16), 9) * 16).decode("ascii")
    for promise, told in (
        ({"grid": [rows, rows], "degrees": bomb}, "16384 x 16384 are more patches than any image has"),
        ({"objectness": bomb}, "a map is not of 2 x 2 patches"),
    ):
        path = written(tmp_path, json.dumps({**line, **promise}))
        tracemalloc.start()
        with pytest.raises(PredictionsError, match=rf"line 1: .*{told}"):
            list(read_maps(path))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1 << 24


@pytest.mark.parametrize(
    ("width", "height", "fits"),
    [(154, 112, True), (141, 99, True), (150, 110, True), (139, 110, False), (156, 110, False), (110, 150, False)],
)
def test_a_map_fits_the_sizes_that_its_patches_cover(width: int, height: int, fits: bool) -> None:
    assert ImageMaps("a", "/a.jpg", np.zeros((8, 11), np.int64), 14, 14).covers(width, height) is fits


@pytest.mark.parametrize("side", [1, 5, 13, 14, 15, 29, 900, 2999])
def test_every_run_writes_maps_that_fit(backbone: Backbone, side: int) -> None:
    found = Discoverer(backbone, device="cpu", max_side=56).discover(np.zeros((side, 31, 3), np.uint8))
    assert maps_of("a", Path("a.jpg"), found).covers(31, side)


@pytest.mark.parametrize("line", ["{", "[]", "7", "{}", '"a"', "\xff"])
def test_lines_that_are_no_objects_are_refused(tmp_path: Path, line: str) -> None:
    with pytest.raises(PredictionsError, match="line 1"):
        list(read_maps(written(tmp_path, line)))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(PredictionsError, match=r"cannot read the maps .*none"):
        list(read_maps(tmp_path / "none"))
