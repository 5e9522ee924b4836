"""Where the images of a run lie, and what its folder says."""

import os
from pathlib import Path

import numpy as np
import pytest

from lostreg.gallery.entries import make_entry
from lostreg.runs.locate import below, find_below
from lostreg.runs.maps import ImageMaps
from lostreg.runs.predictions import Prediction
from lostreg.runs.reader import Shown
from lostreg.runs.results import results_of


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


@pytest.mark.parametrize(
    ("image_id", "name", "recorded"),
    [
        ("x y/a.png", "x y/a.png", None),
        ("000005", "000005.jpg", None),
        ("trip/000005", "trip/000005.JPEG", None),
        (9, "000000000009.jpg", None),
        (9, "COCO_train2014_000000000009.jpg", None),
        (9, "COCO_val2014_000000000009.JPG", None),
        (9, "9.png", None),
        ("x", "im0000.jpg", "/photos/im0000.jpg"),
        (9, "im0000.jpg", "/photos/im0000.jpg"),
        ("/photos/a.jpg", "a.jpg", "/photos/a.jpg"),
        ("../photos/a.jpg", "a.jpg", "/photos/a.jpg"),
    ],
)
def test_images_are_found_in_a_folder(tmp_path: Path, image_id: str | int, name: str, recorded: str | None) -> None:
    path = touch(tmp_path / name)
    assert find_below(tmp_path, image_id, recorded) == path


def test_a_path_with_the_folder_in_front_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path / "photos/a.jpg")
    monkeypatch.chdir(tmp_path)
    assert find_below(Path("photos"), "photos/a.jpg") == Path("photos/a.jpg")
    assert find_below(tmp_path / "photos", "photos/a.jpg") == Path("photos/a.jpg")
    monkeypatch.chdir(touch(tmp_path / "elsewhere/x").parent)
    assert find_below(Path("../photos"), "../photos/a.jpg") == Path("../photos/a.jpg")


def test_an_image_of_the_same_name_in_another_folder_is_not_taken_for_it(tmp_path: Path) -> None:
    touch(tmp_path / "a.jpg")
    assert find_below(tmp_path, "trip/a.jpg", "/photos/trip/a.jpg") is None


@pytest.mark.parametrize("image_id", ["../a.jpg", "../a", "b/../../a.jpg", "{}/a.jpg", "", ".", "..", "a\0b", "\ud800"])
def test_no_id_leads_out_of_the_folder(tmp_path: Path, image_id: str) -> None:
    touch(tmp_path / "a.jpg")
    touch(tmp_path / "images/b/c.jpg")
    assert find_below(tmp_path / "images", image_id.replace("{}", str(tmp_path))) is None


def test_a_page_shows_no_image_from_outside_the_folder_that_was_given(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    touch(tmp_path / "a.jpg").write_bytes(b"secret")
    shown = Shown(1, Prediction("../a.jpg", [[0, 0, 1, 1]], 2, 2), None)
    entry = make_entry(shown, tmp_path / "images", exif=True, max_pixels=100)
    assert entry.card["note"] == "../a.jpg: no such file in images"
    maps = ImageMaps("../a.jpg", str(tmp_path / "a.jpg"), np.zeros((1, 1), np.int64), 14, 14)
    assert (
        "not a readable image"
        in make_entry(Shown(1, shown.prediction, maps), None, exif=True, max_pixels=100).card["note"]
    )


def test_below_says_the_rest_of_the_path() -> None:
    assert below(Path("/x/a/b.jpg"), Path("/x")) == "a/b.jpg"
    assert below(Path("/y/b.jpg"), Path("/x")) is None
    assert below(Path("/x/../b.jpg"), Path("/x")) is None
    assert below(Path("/x"), Path("/x")) is None


@pytest.mark.parametrize("content", ["", "[]", "\0", "{", '{"a":' * 100_000, "1" * 5000])
def test_results_that_say_nothing_are_none(tmp_path: Path, content: str) -> None:
    assert results_of(tmp_path) is None
    (tmp_path / "results.json").write_text(content)
    assert results_of(tmp_path) is None
    (tmp_path / "results.json").write_text('{"complete": true}')
    assert results_of(tmp_path) == {"complete": True}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_nobody_waits_for_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "results.json")
    os.mkfifo(tmp_path / "a.jpg")
    assert results_of(tmp_path) is None
    assert find_below(tmp_path, "a.jpg") is None
