"""Frames of videos: which count, what they are called, and that each is the right one, in whatever order."""

import pickle
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import numpy as np
import pytest
from fabricate_lake import S3Server, write_video
from numpy.typing import NDArray

from lostreg.datasets import video
from lostreg.datasets.folder import Collection, find_collection
from lostreg.datasets.lake import stored_at
from lostreg.errors import ImageError, ImageUnavailableError, LostregWarning, OptionError
from lostreg.images.decode import ImageSource, read_image

FRAMES = 90
CONTAINERS = {"a.mp4": "libx264", "a.mkv": "libx264", "a.webm": "libvpx-vp9", "a.avi": "mpeg4", "a.m2ts": "libx264"}
TURNED = ((0, 1 << 16, 0), (-(1 << 16), 0, 0), (0, 0, 1 << 30))  # the matrix of a camera held upright


def shown(pixels: NDArray[np.uint8]) -> int:
    """The number that a picture shows."""
    return sum(int(pixels[40, 10 + 20 * digit, 0] > 127) << digit for digit in range(8))


def number_of(image: ImageSource) -> int:
    return shown(read_image(image).pixels)


def numbers_of(collection: Collection, order: Iterable[int]) -> list[int]:
    return [number_of(collection[place]) for place in order]


@pytest.mark.parametrize("name", CONTAINERS)
def test_every_nth_frame_is_the_right_one_in_any_order(name: str, tmp_path: Path) -> None:
    path = write_video(tmp_path / name, CONTAINERS[name])
    seconds = find_collection(str(path))
    assert seconds.names == tuple(f"{name}#{number:06}" for number in (0, 30, 60))
    assert numbers_of(seconds, range(3)) == [0, 30, 60]
    frames = find_collection(str(path), every=7)
    assert len(frames) == 13
    order = np.random.default_rng(0).permutation(13).tolist()
    assert numbers_of(frames, order) == [7 * place for place in order]


def test_threads_places_and_other_processes_get_the_same_frames(tmp_path: Path) -> None:
    frames = find_collection(str(write_video(tmp_path / "a.mp4")), every=2)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(number_of, frames)) == list(range(0, FRAMES, 2))
    middle = pickle.loads(pickle.dumps(frames))[20]
    again = stored_at(middle.name, middle.locator)
    assert again == middle
    assert number_of(again) == 40


def test_frames_that_are_passed_are_kept_within_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = find_collection(str(write_video(tmp_path / "a.mp4")), every=2)
    monkeypatch.setattr(video, "_KEPT_BYTES", 3 * 96 * 160 * 3)
    player = video._player(str(tmp_path / "a.mp4"))
    assert numbers_of(frames, (0, 20)) == [0, 40]
    assert len(player._passed) == 3
    assert numbers_of(frames, (19, 1)) == [38, 2]  # the last one is still there, and the first is sought again


def test_a_video_is_turned_as_the_camera_was_held(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", frames=30)
    content = bytearray(path.read_bytes())
    matrix = content.index(b"tkhd") + 4 + 40
    content[matrix : matrix + 36] = b"".join(value.to_bytes(4, "big", signed=True) for row in TURNED for value in row)
    path.write_bytes(content)
    frame = find_collection(str(path), every=29)[1]
    pixels = read_image(frame).pixels
    assert pixels.shape == (160, 96, 3)
    assert shown(np.rot90(pixels)) == 29  # what was on the left is above


def test_a_store_a_list_and_a_folder_hold_videos_too(server: S3Server, tmp_path: Path) -> None:
    path = write_video(tmp_path / "b.mp4")
    server.put("films/b.mp4", path.read_bytes())
    assert numbers_of(find_collection(server.uri("films/b.mp4")), range(3)) == [0, 30, 60]
    (tmp_path / "list.txt").write_text("b.mp4\n")
    for source in (tmp_path, tmp_path / "list.txt"):
        assert find_collection(str(source), every=45).names == ("b.mp4#000000", "b.mp4#000045")


def test_what_lies_before_a_cut_counts_and_a_broken_frame_is_its_own_fault(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mkv")
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    frames = find_collection(str(path), every=10)
    assert 3 <= len(frames) < 9
    assert numbers_of(frames, range(len(frames) - 1)) == list(range(0, 10 * (len(frames) - 1), 10))
    whole = find_collection(str(write_video(tmp_path / "b.mp4")), every=10)
    write_video(tmp_path / "b.mp4", frames=30)
    video.forget_videos()
    assert number_of(whole[2]) == 20
    with pytest.raises(ImageError, match=r"b\.mp4#000050: cannot be read \(the frame is broken or gone\)"):
        read_image(whole[5])
    assert number_of(whole[1]) == 10


def cut(path: Path, share: float) -> Path:
    path.write_bytes(path.read_bytes()[: round(path.stat().st_size * share)])
    return path


@pytest.mark.parametrize("name", ["a.mkv", "a.webm", "a.avi", "fast.mp4", "pieces.mp4"])
def test_a_video_that_is_cut_off_is_told_and_a_whole_one_is_not(
    name: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    options = {"fast.mp4": {"movflags": "faststart"}, "pieces.mp4": {"movflags": "frag_keyframe+empty_moov"}}
    path = write_video(tmp_path / name, CONTAINERS.get(name, "libx264"), options=options.get(name))
    assert len(find_collection(str(path), every=10)) == 9
    assert not recwarn.list
    with pytest.warns(LostregWarning, match=rf"{name} is cut off or damaged behind \d\d frames \(it.*\): these count$"):
        assert 3 <= len(find_collection(str(cut(path, 0.6)), every=10)) < 9


@pytest.mark.parametrize(("name", "share"), [("a.mp4", 0.9), ("a.mp4", 0), ("a.mkv", 0.1), ("a.mkv", 0.15)])
def test_a_video_without_a_frame_is_one_image_that_cannot_be_read(name: str, share: float, tmp_path: Path) -> None:
    write_video(tmp_path / "b.avi", "mpeg4")
    cut(write_video(tmp_path / name), share)
    found = find_collection(str(tmp_path), every=45)
    assert found.names == (name, "b.avi#000000", "b.avi#000045")
    assert numbers_of(found, (1, 2)) == [0, 45]
    broken = pickle.loads(pickle.dumps(found[0]))
    with pytest.raises(ImageError, match=rf"^{name}: cannot be read \(\w.*\)$") as raised:
        read_image(broken)
    assert not isinstance(raised.value, ImageUnavailableError)


def test_what_is_no_video_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.mp4").write_bytes(b"no video at all")
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        silence = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), format="fltp", layout="stereo")
        silence.sample_rate = 44100
        container.mux(stream.encode(silence))
        container.mux(stream.encode())
    with pytest.raises(OptionError, match=r"sound\.mp4 holds no video"):
        find_collection(str(tmp_path / "sound.mp4"))
    with pytest.warns(LostregWarning, match="by their endings: 1 .mp4 without images$"):
        assert find_collection(str(tmp_path)).names == ("a.mp4",)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(OptionError, match=r'a\.mp4 needs PyAV: pip install "lostreg\[video\]"'):
        find_collection(str(tmp_path / "a.mp4"))
