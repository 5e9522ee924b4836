"""Video files: every nth frame is an image, read with PyAV (extra ``video``)."""

import errno
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any, Final

import cv2
import numpy as np
from numpy.typing import NDArray

from lostreg.datasets.parts import Listing, NoImagesError
from lostreg.errors import ImageError, OptionError
from lostreg.images.stores import CheckSize, StoredImage, is_uri, open_file, telling

VIDEOS: Final = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".mts", ".m2ts", ".3gp")
"""Endings of video files, in lower case."""

VIDEO_HINT: Final = 'needs PyAV: pip install "lostreg[video]"'
_OPEN: Final = 4  # videos that stay open, each with its decoder
_KEPT_BYTES: Final = 1 << 28  # of frames that another thread may be about to ask for
_AHEAD: Final = 120  # frames from which seeking beats decoding on
_PROMISING: Final = ("matroska,webm", "mov,mp4,m4a,3gp,3g2,mj2")  # formats whose header says how long a file is
_SLACK_SECONDS: Final = 0.25  # and a frame, that a file may end before that


@dataclass(frozen=True, slots=True)
class VideoFrame(StoredImage):
    """A frame of a video.

    Attributes:
        name: what messages call it.
        file: absolute path or URI.
        time: when it is shown, in ticks of its stream.
        number: how many frames are shown before it.
        every: of its listing: frames of numbers divisible by it are read.
    """

    name: str
    file: str
    time: int
    number: int
    every: int

    @property
    def locator(self) -> str:
        """The file, with ``#time=T&number=N&every=E``."""
        return f"{self.file}#time={self.time}&number={self.number}&every={self.every}"

    def _read(self, check_size: CheckSize) -> bytes:
        pixels = _player(self.file).pixels(self)
        check_size(pixels.nbytes)
        return cv2.imencode(".bmp", pixels[..., ::-1])[1].tobytes()  # exact, and nothing is packed only to be unpacked


def frame_at(name: str, locator: str) -> VideoFrame | None:
    """The frame that a locator names; None where it names none."""
    file, _, place = locator.rpartition("#")
    numbers = re.fullmatch(r"time=(-?\d{1,18})&number=(\d{1,18})&every=([1-9]\d{0,17})", place)
    return VideoFrame(name, file, *map(int, numbers.groups())) if numbers else None


@dataclass(frozen=True, slots=True)
class BrokenVideo(StoredImage):
    """What stands in a list of images for a video that no frame can be read from: an image that cannot be read.

    Attributes:
        name: of the video.
        file: absolute path or URI.
        reason: why, for people.
    """

    name: str
    file: str
    reason: str

    @property
    def locator(self) -> str:
        """The file."""
        return self.file

    def _read(self, check_size: CheckSize) -> bytes:
        del check_size
        raise ImageError(f"{self.name}: cannot be read ({self.reason})")


@dataclass(frozen=True, eq=False)
class Video:
    """Frames of a video.

    Attributes:
        file: absolute path or URI.
        times: when each is shown, in ticks of the stream, shape (n,), int64.
        every: how many frames of the video there are from one to the next.
        fault: why there is no frame, for people; one image that cannot be read then stands for the video.
    """

    file: str
    times: NDArray[np.int64]
    every: int
    fault: str = ""

    def __len__(self) -> int:
        return len(self.times) or 1

    def image(self, number: int, name: str) -> VideoFrame | BrokenVideo:
        """One of them, by its number from 0."""
        if self.fault:
            return BrokenVideo(name, self.file, self.fault)
        return VideoFrame(name, self.file, int(self.times[number]), number * self.every, self.every)


def list_video(file: str, name: str, every: int | None = None) -> Listing:
    """Every nth frame of a video, called ``NAME#NUMBER`` by how many frames are shown before it.

    Nothing is decoded: the frames' times stand beside them. Where the file is cut off or damaged, what lies before
    counts; where that is nothing, one image that cannot be read, called like the video.

    Args:
        file: absolute path or URI.
        name: of the file.
        every: frames from one to the next; None for about a second.

    Raises:
        NoImagesError: if it has no video, such as a file of sound alone.
        OptionError: if it cannot be had now, or PyAV is not installed.
    """
    av = _av(name)
    times: list[int] = []
    step, reason = 1, ""
    with telling(file):
        try:
            with _opened(av, file) as container:
                stream = _stream(container, name)
                step = every or max(1, round(stream.average_rate or 1))
                reason = _read_times(container, stream, times)
        except av.FFmpegError as error:
            # FFmpeg says EIO, too, where a file ends in the middle of its header.
            if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno != errno.EIO):
                raise
            reason = error.strerror
    if not times:
        fault = reason or "no frame of it says when it is shown"
        return Listing([name], Video(file, np.empty(0, np.int64), step, fault))
    chosen = np.unique(np.array(times, np.int64))[::step]
    digits = max(6, len(str(len(times))))
    return Listing(
        [f"{name}#{number * step:0{digits}}" for number in range(len(chosen))],
        Video(file, chosen, step),
        fault=reason and f"{name} is cut off or damaged behind {len(times):,} frames ({reason}): these count",
    )


def _read_times(container: Any, stream: Any, times: list[int]) -> str:
    """Note when the frames of a video are shown.

    Args:
        container: the open file.
        stream: its video.
        times: gets them, in ticks of the stream, also those before an error.

    Returns:
        What shows that the file is cut off; empty where nothing does.
    """
    ends: dict[int, int] = {}  # when each stream ends, in its ticks
    is_cut = False
    for packet in container.demux():
        if packet.size and packet.pts is not None:
            is_cut = packet.is_corrupt
            end = packet.pts + (packet.duration or 0)
            ends[packet.stream_index] = max(ends.get(packet.stream_index, 0), end)
            if packet.stream_index == stream.index and not packet.is_discard:
                times.append(packet.pts)
    seconds = max((float(end * container.streams[index].time_base) for index, end in ends.items()), default=0.0)
    promised = (container.duration or 0) / 1e6 if container.format.name in _PROMISING else 0.0
    if seconds < promised - _SLACK_SECONDS - float(1 / (stream.average_rate or 1)):
        return f"it ends after {seconds:.1f} of {promised:.1f} seconds"
    return "its last frame is cut" if is_cut else ""


def forget_videos() -> None:
    """Let go of what is kept of files: they may have been written anew."""
    _player.cache_clear()


def _av(name: str) -> Any:
    try:
        return import_module("av")
    except ImportError as error:
        raise OptionError(f"{name} {VIDEO_HINT}") from error


def _opened(av: Any, file: str) -> Any:
    return av.open(open_file(file) if is_uri(file) else file)


def _stream(container: Any, name: str) -> Any:
    """The video of a file; a cover beside music is none."""
    av = import_module("av")
    covers = av.stream.Disposition.attached_pic
    for stream in container.streams.video:
        if not stream.disposition & covers:
            return stream
    raise NoImagesError(f"{name} holds no video")


class _Player:
    """An open video, of which one frame is read at a time.

    Threads that each read the next image ask nearly in order. Decoding goes on from the last frame where that is near,
    and what is passed on the way and belongs to the listing is kept until it is asked for.
    """

    def __init__(self, file: str) -> None:
        self._lock = threading.Lock()
        self._file = file
        self._container: Any = None
        self._stream: Any
        self._frames: Iterator[Any]
        self._open()
        self._number: int | None = None  # of the last frame
        self._passed: OrderedDict[int, NDArray[np.uint8]] = OrderedDict()  # by time

    def pixels(self, wanted: VideoFrame) -> NDArray[np.uint8]:
        """RGB of a frame, upright, shape (H, W, 3)."""
        with self._lock:
            passed = self._passed.pop(wanted.time, None)
            if passed is not None:
                return passed
            number, self._number = self._number, None  # unless it is found
            if self._is_counted or number is None or not number < wanted.number <= number + _AHEAD:
                number = None
                self._container.seek(wanted.time, stream=self._stream)
                self._decode()
            frame = self._advance(number, wanted)
            if frame is None:  # seeking misses it in formats without a true index
                self._open()
                frame = self._advance(None, wanted)
            if frame is None:
                raise ValueError("the frame is broken or gone")
            self._number = wanted.number
            return _upright(frame)

    def _advance(self, number: int | None, wanted: VideoFrame) -> Any:
        """Decode up to a frame; None where it does not come.

        Args:
            number: of the frame before, where it is known.
            wanted: the frame.
        """
        for frame in self._frames:
            number = None if number is None else number + 1
            if frame.pts >= wanted.time:
                return frame if frame.pts == wanted.time else None
            if number is not None and number % wanted.every == 0:
                self._keep(frame.pts, _upright(frame))
        return None

    def __del__(self) -> None:
        if self._container is not None:
            self._container.close()  # it is part of a cycle

    def _open(self) -> None:
        if self._container is not None:
            self._container.close()
        self._container = _opened(_av(self._file), self._file)
        self._stream = _stream(self._container, self._file)
        self._stream.thread_type = "AUTO"
        # Where frames are counted instead of being told their time, those behind damage are right after seeking alone.
        self._is_counted = self._container.format.name == "avi"
        self._decode()

    def _decode(self) -> None:
        self._frames = (frame for frame in self._container.decode(self._stream) if frame.pts is not None)

    def _keep(self, time: int, pixels: NDArray[np.uint8]) -> None:
        self._passed[time] = pixels
        while sum(kept.nbytes for kept in self._passed.values()) > _KEPT_BYTES:
            self._passed.popitem(last=False)


def _upright(frame: Any) -> NDArray[np.uint8]:
    """RGB, turned as the camera was held."""
    pixels = frame.to_ndarray(format="rgb24")
    return np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90)))


@lru_cache(_OPEN)
def _player(file: str) -> _Player:
    return _Player(file)
