"""Processes that decode: the same patches as in this process, or None, and none of them left behind."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import disc_picture
from PIL import Image

from lostreg.errors import LostregWarning
from lostreg.images import decode
from lostreg.images import decoders as module
from lostreg.images.decode import read_image
from lostreg.images.decoders import Decoders, Reading
from lostreg.images.patches import PatchedPicture, cut_patches

READING = Reading(max_side=120, exif=True, max_pixels=10**6, patch_size=14)
TURNED = 0x0112


def empty(shape: tuple[int, ...]) -> np.ndarray:
    return np.full(shape, 77, dtype=np.uint8)


def ready(decoders: Decoders, path: Path) -> PatchedPicture | None:
    """The answer of a process that has had time to start."""
    for _ in range(600):
        picture = decoders.read(str(path))
        if picture is not None:
            return picture
        time.sleep(0.05)
    return None


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    picture = Image.fromarray(disc_picture())
    exif = Image.Exif()
    exif[TURNED] = 6
    picture.save(folder / "plain.jpg", quality=95)
    picture.save(folder / "turned.jpg", exif=exif)
    picture.convert("L").save(folder / "grey ünd Leerzeichen.png")
    picture.convert("CMYK").save(folder / "cmyk.jpg")
    (folder / "broken.jpg").write_bytes((folder / "plain.jpg").read_bytes()[:900])
    picture.resize((1001, 1000)).save(folder / "large.png")
    return folder


@pytest.fixture
def decoders() -> Iterator[Decoders]:
    with Decoders(READING, empty) as running:
        yield running


def expected(path: Path, reading: Reading = READING) -> PatchedPicture:
    picture = read_image(path, max_side=reading.max_side, exif=reading.exif, max_pixels=reading.max_pixels)
    return cut_patches(picture, reading.patch_size)


def assert_same(one: PatchedPicture | None, other: PatchedPicture) -> None:
    assert one is not None
    np.testing.assert_array_equal(one.patches, other.patches)
    assert (one.size, one.width, one.height) == (other.size, other.width, other.height)


def test_a_process_reads_what_this_one_does(decoders: Decoders, pictures: Path) -> None:
    assert_same(ready(decoders, pictures / "plain.jpg"), expected(pictures / "plain.jpg"))
    for name in ("turned.jpg", "grey ünd Leerzeichen.png", "cmyk.jpg"):
        assert_same(decoders.read(str(pictures / name)), expected(pictures / name))
    stored = decoders.read(str(pictures / "turned.jpg"), exif=False)
    assert_same(stored, expected(pictures / "turned.jpg", replace(READING, exif=False)))


def test_what_is_unusual_is_left_to_the_caller(decoders: Decoders, pictures: Path) -> None:
    assert ready(decoders, pictures / "plain.jpg")
    for name in ("broken.jpg", "large.png", "none.jpg", "", "\udcff.jpg"):
        assert decoders.read(str(pictures / name)) is None
    assert_same(decoders.read(str(pictures / "plain.jpg")), expected(pictures / "plain.jpg"))


def test_a_path_is_seen_from_where_the_caller_stands(
    decoders: Decoders, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ready(decoders, pictures / "plain.jpg")
    monkeypatch.chdir(pictures)
    assert_same(decoders.read("plain.jpg"), expected(pictures / "plain.jpg"))


def test_a_process_that_is_killed_is_done_without(decoders: Decoders, pictures: Path) -> None:
    assert ready(decoders, pictures / "plain.jpg")
    (one,) = decoders._started or []
    os.kill(one._process.pid, signal.SIGKILL)
    with pytest.warns(LostregWarning, match="a process that decodes has ended .*: threads go on"):
        assert decoders.read(str(pictures / "plain.jpg")) is None
    assert decoders.read(str(pictures / "plain.jpg")) is None


def test_a_picture_without_room_is_left_to_the_caller_and_so_are_the_others(pictures: Path) -> None:
    def refuse(shape: tuple[int, ...]) -> np.ndarray:
        raise MemoryError

    with Decoders(READING, empty) as decoders:
        assert ready(decoders, pictures / "plain.jpg")
        decoders._allocate = refuse
        with pytest.warns(LostregWarning, match="MemoryError"):
            assert decoders.read(str(pictures / "plain.jpg")) is None
        decoders._allocate = empty
        assert decoders.read(str(pictures / "plain.jpg")) is None


def test_what_takes_much_memory_is_left_to_threads_that_wait_for_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.fromarray(disc_picture()).save(tmp_path / "small.jpg")
    Image.new("RGB", (4000, 4000)).save(tmp_path / "large.webp", method=0)  # its decoder takes 19 bytes a pixel
    request = {"max_side": 120, "exif": True, "max_pixels": 10**8, "patch_size": 14}
    monkeypatch.setattr(decode, "one_at_a_time", module._Declined())
    assert module._read({"path": str(tmp_path / "large.webp"), **request}) is None
    assert module._read({"path": str(tmp_path / "small.jpg"), **request}) is not None


def test_a_process_that_says_something_else_is_done_without(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_COMMAND", "print('hello, this is a plugin', flush=True); input()")
    with Decoders(READING, empty) as decoders:
        assert decoders.read(str(pictures / "plain.jpg")) is None
        (one,) = decoders._started or []
        while not module._has_something(one._answers):
            time.sleep(0.02)
        with pytest.warns(LostregWarning, match="it says something else"):
            assert decoders.read(str(pictures / "plain.jpg")) is None


def test_places_of_modules_that_are_no_strings_do_not_matter(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, Path("none")])
    with Decoders(READING, empty) as decoders:
        assert ready(decoders, pictures / "plain.jpg")


def test_without_a_current_folder_whole_paths_are_read(
    decoders: Decoders, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ready(decoders, pictures / "plain.jpg")
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert decoders.read(str(pictures / "plain.jpg")) is not None
    with pytest.warns(LostregWarning):
        assert decoders.read("plain.jpg") is None


def test_none_is_left_at_the_end(pictures: Path) -> None:
    with Decoders(READING, empty) as decoders:
        assert ready(decoders, pictures / "plain.jpg")
        (one,) = decoders._started or []
    assert one._process.returncode is not None
    assert decoders.read(str(pictures / "plain.jpg")) is None


@pytest.mark.filterwarnings("ignore:a process that decodes")
@pytest.mark.parametrize("executable", ["", None, "/no/such/python", "/usr/bin/maya"])
def test_without_a_python_to_run_threads_decode(
    executable: str | None, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", executable)
    with Decoders(READING, empty) as decoders:
        assert decoders.read(str(pictures / "plain.jpg")) is None


def test_a_process_that_cannot_start_lostreg_is_done_without(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_COMMAND", "raise SystemExit(3)")
    with Decoders(READING, empty) as decoders:
        assert decoders.read(str(pictures / "plain.jpg")) is None
        (one,) = decoders._started or []
        one._process.wait()
        with pytest.warns(LostregWarning, match="it has ended"):
            assert decoders.read(str(pictures / "plain.jpg")) is None
        assert decoders._mine.decoder is None


def test_no_module_is_taken_from_the_folder_of_the_photos(
    decoders: Decoders, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "struct.py").write_text("raise SystemExit(3)")
    monkeypatch.chdir(tmp_path)
    assert ready(decoders, pictures / "plain.jpg")


def test_a_process_needs_no_pytorch() -> None:
    code = "import sys, lostreg.images.decoders; sys.exit('torch' in sys.modules)"
    assert os.spawnl(os.P_WAIT, sys.executable, sys.executable, "-c", code) == 0
