"""Processes that decode: the same patches as in this process, or None, and none of them left behind."""

import mmap
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import disc_picture
from PIL import Image

from lostreg.errors import ImageError, LostregWarning
from lostreg.images import decode
from lostreg.images import decoders as module
from lostreg.images.decode import read_image
from lostreg.images.decoders import Asked, Decoders, Reading
from lostreg.images.patches import PatchedPicture, cut_patches

READING = Reading(max_side=120, exif=True, max_pixels=10**6, patch_size=14)
TURNED = 0x0112


Pins = list[tuple[int, bool]]


class Threads:
    """Who reads what processes do not: notes it, and reads nothing."""

    def __init__(self) -> None:
        self.read = 0

    def __call__(self) -> Future[PatchedPicture]:
        self.read += 1
        future: Future[PatchedPicture] = Future()
        future.set_exception(ImageError("left to a thread"))
        return future


def started(decoders: Decoders, path: Path | str) -> Asked:
    """An image that a process is asked for, as soon as one has started."""
    for _ in range(600):
        asked = decoders.ask(str(path), Threads())
        if asked is not None:
            return asked
        time.sleep(0.05)
    raise AssertionError("no process starts")


def wait_for(condition: Callable[[], bool], decoders: Decoders) -> None:
    """Take answers until something has happened."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        decoders._receive_all()


def processes_of(decoders: Decoders) -> list[int]:
    """The processes that decode, children of the one that was started."""
    assert decoders._process is not None
    first = decoders._process.pid
    return [int(process) for process in Path(f"/proc/{first}/task/{first}/children").read_text().split()]


def is_running(process: str) -> bool:
    """Whether a process is there, and no more than its remains."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def read(decoders: Decoders, path: Path | str, exif: bool | None = None) -> PatchedPicture | None:
    """What a process makes of an image; None where it is left to a thread."""
    asked = decoders.ask(str(path), Threads(), exif=exif)
    try:
        return None if asked is None else asked.result()
    except ImageError:
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


def run(count: int = 1, pins: Pins | None = None) -> Decoders:
    def pin(memory: np.ndarray, wanted: bool) -> None:
        if pins is not None:
            pins.append((memory.nbytes, wanted))

    return Decoders(READING, count, pin)


@pytest.fixture
def decoders(pictures: Path) -> Iterator[Decoders]:
    with run() as running:
        started(running, pictures / "plain.jpg").result()
        yield running


def expected(path: Path, reading: Reading = READING) -> PatchedPicture:
    picture = read_image(path, max_side=reading.max_side, exif=reading.exif, max_pixels=reading.max_pixels)
    return cut_patches(picture, reading.patch_size)


def assert_same(one: PatchedPicture | None, other: PatchedPicture) -> None:
    assert one is not None
    np.testing.assert_array_equal(one.patches, other.patches)
    assert (one.size, one.width, one.height) == (other.size, other.width, other.height)


def test_a_process_reads_what_this_one_does(decoders: Decoders, pictures: Path) -> None:
    for name in ("plain.jpg", "turned.jpg", "grey ünd Leerzeichen.png", "cmyk.jpg"):
        assert_same(read(decoders, pictures / name), expected(pictures / name))
    stored = read(decoders, pictures / "turned.jpg", exif=False)
    assert_same(stored, expected(pictures / "turned.jpg", replace(READING, exif=False)))


def test_what_is_unusual_is_left_to_threads(decoders: Decoders, pictures: Path) -> None:
    for name in ("broken.jpg", "large.png", "none.jpg", "", "\udcff.jpg"):
        assert read(decoders, pictures / name) is None
    assert_same(read(decoders, pictures / "plain.jpg"), expected(pictures / "plain.jpg"))


def test_images_are_read_meanwhile_and_threads_get_theirs_before_anybody_waits(
    decoders: Decoders, pictures: Path
) -> None:
    threads = Threads()
    asked = [decoders.ask(str(pictures / name), threads) for name in ("plain.jpg", "broken.jpg", "cmyk.jpg")]
    wait_for(lambda: threads.read == 1, decoders)
    first, broken, last = asked
    assert first is not None
    assert last is not None
    assert broken is not None
    assert_same(last.result(), expected(pictures / "cmyk.jpg"))
    assert_same(first.result(), expected(pictures / "plain.jpg"))
    with pytest.raises(ImageError, match="left to a thread"):
        broken.result()


def test_work_goes_to_whoever_has_least(pictures: Path) -> None:
    with run(3) as decoders:
        started(decoders, pictures / "plain.jpg").result()
        wait_for(lambda: len(decoders._ready()) == 3, decoders)
        asked = [decoders.ask(str(pictures / "plain.jpg"), Threads()) for _ in range(12)]
        assert max(len(decoder.asked) for decoder in decoders._running) <= 4
        for one in asked:
            assert one is not None
            assert_same(one.result(), expected(pictures / "plain.jpg"))


def test_memory_is_taken_again_only_when_nobody_holds_it(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ring with room for three pictures and a half, and pictures that are let go in any order."""
    whole = expected(pictures / "plain.jpg").patches
    monkeypatch.setattr(module, "_SHARED_BYTES", whole.nbytes * 7 // 2)
    draw = random.Random(0)
    threads = Threads()
    held: list[PatchedPicture] = []
    with run() as decoders:
        decoders._start()
        (decoder,) = decoders._running
        while not decoder.is_ready:
            decoders._receive(decoder)
        decoder._largest = 0  # so that the ring, not this side's guess of it, says that there is no room
        for _ in range(200):
            decoder._largest = 0
            asked = decoders.ask(str(pictures / "plain.jpg"), threads)
            assert asked is not None
            while held and draw.random() < 0.45:
                held.pop(draw.randrange(len(held)))
            try:
                held.append(asked.result())
            except ImageError:
                continue
            held[-1].patches[0, 0] = len(held)  # a mark that must stay
            marks = [int(one.patches[0, 0, 0, 0, 0]) for one in held]
            assert len(held) <= 3
            for one, mark in zip(held, marks, strict=True):
                np.testing.assert_array_equal(one.patches[0, 1:], whole[0, 1:])
                assert (one.patches[0, 0] == mark).all()
    assert 0 < threads.read < 200
    assert_same(replace(held[0], patches=held[0].patches), held[0])  # and is there when the process has gone


def test_who_asks_guesses_whether_there_is_room(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = expected(pictures / "plain.jpg").patches.nbytes
    monkeypatch.setattr(module, "_SHARED_BYTES", 8 * size)
    with run() as decoders:
        assert decoders.has_room()
        decoders._start()
        (decoder,) = decoders._running
        while not decoder.is_ready:
            decoders._receive(decoder)
        decoder._largest = size
        threads = Threads()
        held = []
        while decoders.has_room():
            asked = decoders.ask(str(pictures / "plain.jpg"), threads)
            assert asked is not None
            held.append(asked.result())
        assert len(held) == 7  # an eighth may be lost at the seam
        assert decoders.ask(str(pictures / "plain.jpg"), threads) is None
        asked = None
        del held[0]
        assert decoders.has_room()
        assert not threads.read


def test_memory_is_pinned_once_and_set_free(pictures: Path) -> None:
    pins: Pins = []
    with run(2, pins) as decoders:
        decoders._start()
        assert pins == []
        wait_for(lambda: len(decoders._ready()) == 2, decoders)
        assert pins == [(module._SHARED_BYTES // 2, True)] * 2
    assert pins[2:] == [(module._SHARED_BYTES // 2, False)] * 2


def test_a_path_is_seen_from_where_the_caller_stands(
    decoders: Decoders, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(pictures)
    assert_same(read(decoders, "plain.jpg"), expected(pictures / "plain.jpg"))


def test_without_a_current_folder_whole_paths_are_read(
    decoders: Decoders, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert read(decoders, "plain.jpg") is None
    assert read(decoders, pictures / "plain.jpg") is not None


def test_a_process_that_is_killed_is_done_without(pictures: Path) -> None:
    with run(2) as decoders:
        started(decoders, pictures / "plain.jpg").result()
        wait_for(lambda: len(decoders._ready()) == 2, decoders)
        threads = Threads()
        victim, other = processes_of(decoders)
        for process in (victim, other):
            os.kill(process, signal.SIGSTOP)  # so that none has answered when it is killed
        asked = [decoders.ask(str(pictures / "plain.jpg"), threads) for _ in range(4)]
        assert [len(decoder.asked) for decoder in decoders._running] == [2, 2]
        os.kill(victim, signal.SIGKILL)
        os.kill(other, signal.SIGCONT)
        with pytest.warns(LostregWarning, match="a process that decodes has ended .*: going on without it"):
            wait_for(lambda: threads.read == 2, decoders)
        wait_for(lambda: sum(one is not None and one.picture is not None for one in asked) == 2, decoders)
        assert_same(read(decoders, pictures / "plain.jpg"), expected(pictures / "plain.jpg"))
        os.kill(other, signal.SIGKILL)
        assert read(decoders, pictures / "plain.jpg") is None
        assert decoders.ask(str(pictures / "plain.jpg"), threads) is None
        assert decoders.has_room()


def test_what_takes_much_memory_is_left_to_threads_that_wait_for_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.fromarray(disc_picture()).save(tmp_path / "small.jpg")
    Image.new("RGB", (4000, 4000)).save(tmp_path / "large.webp", method=0)  # its decoder takes 19 bytes a pixel
    request = {"max_side": 120, "exif": True, "max_pixels": 10**8, "patch_size": 14, "freed": 0}
    room = module._Room(mmap.mmap(-1, 1 << 20))
    monkeypatch.setattr(decode, "one_at_a_time", module._Declined())
    answers = [module._answer({"path": str(tmp_path / name), **request}, room) for name in ("large.webp", "small.jpg")]
    assert [answer == module._DECLINED for answer in answers] == [True, False]


def test_places_of_modules_that_are_no_strings_do_not_matter(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, Path("none")])
    with run() as decoders:
        assert started(decoders, pictures / "plain.jpg").result()


def test_none_is_left_at_the_end(pictures: Path) -> None:
    with run(2) as decoders:
        started(decoders, pictures / "plain.jpg")
        wait_for(lambda: len(decoders._ready()) == 2, decoders)
        processes = processes_of(decoders)
        assert len(processes) == 2
    assert decoders._process is not None
    assert decoders._process.returncode is not None
    assert not any(Path(f"/proc/{process}").exists() for process in processes)


def test_none_is_left_when_this_process_is_killed(pictures: Path) -> None:
    code = f"""
import sys, time
from lostreg.images.decoders import Decoders, Reading
running = Decoders(Reading(120, True, 10**6, 14), 2, lambda memory, wanted: None)
while len(running._ready()) < 2:
    running.ask({str(pictures / "plain.jpg")!r}, lambda: None)
print(running._process.pid, flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        first = parent.stdout.readline().strip()
        children = Path(f"/proc/{first}/task/{first}/children").read_text().split()
        assert len(children) == 2
        parent.kill()
    deadline = time.monotonic() + 30
    while any(is_running(process) for process in (first, *children)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.filterwarnings("ignore:a process that decodes")
@pytest.mark.parametrize("executable", ["", None, "/no/such/python", "/usr/bin/maya"])
def test_without_a_python_to_run_threads_decode(
    executable: str | None, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", executable)
    with run() as decoders:
        assert read(decoders, pictures / "plain.jpg") is None
        assert not decoders._running


def test_a_process_that_cannot_start_lostreg_is_done_without(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_COMMAND", "raise SystemExit(3)")
    with run() as decoders:
        decoders._start()
        assert decoders._process is not None
        decoders._process.wait()
        with pytest.warns(LostregWarning, match="answers no more"):
            assert read(decoders, pictures / "plain.jpg") is None
        assert not decoders._running


def test_what_a_library_prints_is_no_answer(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_COMMAND", f"print('hello, this is a plugin', flush=True); {module._COMMAND}")
    with run() as decoders:
        assert_same(started(decoders, pictures / "plain.jpg").result(), expected(pictures / "plain.jpg"))


def test_no_module_is_taken_from_the_folder_of_the_photos(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "struct.py").write_text("raise SystemExit(3)")
    monkeypatch.chdir(tmp_path)
    with run() as decoders:
        assert started(decoders, pictures / "plain.jpg").result()


def test_a_process_needs_no_pytorch() -> None:
    code = "import sys, lostreg.images.decoders; sys.exit('torch' in sys.modules)"
    assert os.spawnl(os.P_WAIT, sys.executable, sys.executable, "-c", code) == 0
