"""The image files that a command line names."""

import os
import sys
from pathlib import Path

import pytest

from lostreg.cli.files import find_images
from lostreg.errors import OptionError
from lostreg.images.decode import SUFFIXES


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return touch(tmp_path / "voc" / "JPEGImages", *(f"im{number:02}.jpg" for number in range(5)))


def find(*arguments: object) -> list[Path]:
    return find_images(map(str, arguments))


def test_folders_are_searched_to_the_bottom_and_sorted(tmp_path: Path) -> None:
    top = touch(tmp_path / "top", "z.JPG", "deep/a.jpeg", "deep/notes.txt", "b.png")
    (top / "folder.jpg").mkdir()  # named like an image
    assert find(top) == [top / "b.png", top / "deep/a.jpeg", top / "z.JPG"]


def test_globs_are_expanded_and_sorted(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [path.name for path in find(images / "im0[2-4].jpg", images / "im00.jpg")]
    assert names == ["im02.jpg", "im03.jpg", "im04.jpg", "im00.jpg"]
    monkeypatch.chdir(images.parent)
    assert find("**/*1.jpg") == [Path("JPEGImages/im01.jpg")]


def test_a_glob_finds_files_alone_whatever_their_suffix(images: Path) -> None:
    (images / "im99.jpg").mkdir()
    touch(images, "im50.tmp")
    assert [path.name for path in find(images / "im[59]*")] == ["im50.tmp"]


def test_a_file_whose_name_looks_like_a_glob_is_itself(tmp_path: Path) -> None:
    odd = touch(tmp_path, "a[1].jpg", "a1.jpg") / "a[1].jpg"
    assert find(odd) == [odd]


def test_linked_folders_are_searched_and_circles_end(images: Path, tmp_path: Path) -> None:
    place = tmp_path / "linked"
    place.mkdir()
    (place / "more").symlink_to(images, target_is_directory=True)
    (place / "circle").symlink_to(place, target_is_directory=True)
    assert find(place) == [place / "more" / f"im{number:02}.jpg" for number in range(5)]


def test_files_are_taken_as_they_are_named_in_the_order_given_even_if_they_are_not_there(images: Path) -> None:
    wanted = [images / "im03.jpg", images / "none.jpg", images / "notes", images / "im00.jpg", images / "im03.jpg"]
    assert find(*wanted) == wanted


def test_every_suffix_that_can_be_read_is_an_image_of_a_folder(tmp_path: Path) -> None:
    names = [f"{number}{suffix}" for number, suffix in enumerate(SUFFIXES)]
    folder = touch(tmp_path / "all", *names, *(name.upper() for name in names), "a.txt", "jpg")
    assert {path.name for path in find(folder)} == {*names, *(name.upper() for name in names)}


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="file names are Unicode there")
def test_a_file_name_that_is_no_utf8_is_found(tmp_path: Path) -> None:
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jpg")
    touch(tmp_path, odd)
    assert find(tmp_path) == find(tmp_path / "caf*") == [Path(odd)]


def test_arguments_that_stand_for_nothing_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(OptionError, match="expected a file, folder or glob, found an empty argument"):
        find("")
    with pytest.raises(OptionError, match=r"no images in .*empty: expected files ending in \.jpg"):
        find(tmp_path / "empty")
    with pytest.raises(OptionError, match=r"no file matches '.*\*\.gif'"):
        find(tmp_path / "*.gif")
    assert find() == []
