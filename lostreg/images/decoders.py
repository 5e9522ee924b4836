"""Processes that decode image files for threads that wait.

Decoding in threads goes no faster than one core interprets what surrounds the decoder, and each thread that does so
keeps whoever feeds a GPU waiting. A thread that asks a process of its own only reads bytes. Processes are a help and
no more: what one cannot or should not do, because an image is unusual, broken or large, is left to the thread.
"""

import json
import os
import select
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from types import TracebackType
from typing import IO, Any, Final, cast

import cv2
import numpy as np
from numpy.typing import NDArray

from lostreg.errors import ImageError
from lostreg.images.allocator import keep_freed_memory
from lostreg.images.decode import read_image
from lostreg.images.patches import PatchedPicture, cut_patches

if sys.platform == "linux":
    import fcntl

_MOST_PIXELS: Final = 1 << 25  # of a file; larger ones are decoded one at a time, by threads
_MOST_KEPT: Final = 1 << 22  # of them after scaling; for larger ones free memory is looked at
_PIPE_BYTES: Final = 1 << 20
_COMMAND: Final = "from lostreg.images.decoders import serve; serve()"
_ANSWER: Final = struct.Struct("<6q")  # rows and columns of patches, height and width as cut, width and height

_READY: Final = b"ready"

Allocate = Callable[[tuple[int, ...]], NDArray[np.uint8]]


@dataclass(frozen=True)
class Reading:
    """How image files are read: the arguments of `read_image` and `cut_patches`.

    Attributes:
        max_side: longer images are scaled down to this side; None keeps the size.
        exif: whether EXIF orientation is applied.
        max_pixels: images with more are refused.
        patch_size: side of a patch in pixels.
    """

    max_side: int | None
    exif: bool
    max_pixels: int
    patch_size: int


class Decoders:
    """One process for each thread that asks, from the moment it first asks until the end.

    Args:
        reading: how images are read.
        allocate: makes the array that patches of a shape are read into, such as pinned memory.
    """

    def __init__(self, reading: Reading, allocate: Allocate) -> None:
        self._reading = reading
        self._allocate = allocate
        self._mine = threading.local()
        self._lock = threading.Lock()
        self._started: list[_Decoder] | None = []  # None behind the end

    def __enter__(self) -> "Decoders":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            started, self._started = self._started or [], None
        for decoder in started:
            decoder.end()

    def read(self, path: str, *, exif: bool | None = None) -> PatchedPicture | None:
        """An image file's patches, or None where the caller has to see to it.

        Args:
            path: of the file.
            exif: in place of that of ``reading``.
        """
        if not hasattr(self._mine, "decoder"):
            self._mine.decoder = self._start()
        decoder: _Decoder | None = self._mine.decoder
        if decoder is None:
            return None
        path = os.path.join(os.getcwd(), path)  # noqa: PTH109, PTH118 - nothing is made of its dots
        reading = self._reading if exif is None else replace(self._reading, exif=exif)
        try:
            return decoder.read(path, reading, self._allocate) if decoder.is_ready() else None
        except (OSError, ValueError, EOFError):  # it has ended, or was ended
            self._mine.decoder = None
            return None

    def _start(self) -> "_Decoder | None":
        if not sys.executable or getattr(sys, "frozen", False):  # no Python to run, or a program in its place
            return None
        with self._lock:
            if self._started is None:
                return None
            try:
                decoder = _Decoder()
            except OSError:
                return None
            self._started.append(decoder)
        return decoder


class _Decoder:
    """One process, asked by one thread.

    Raises:
        OSError: if it cannot be started.
    """

    def __init__(self) -> None:
        self._process = subprocess.Popen(  # noqa: S603 - this Python, and a command of our own
            [sys.executable, "-P", "-c", _COMMAND],  # -P: no module is taken from wherever this happens to run
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(place or os.getcwd() for place in sys.path)},  # noqa: PTH109
            start_new_session=True,  # Ctrl-C is for whoever asks
        )
        self._requests = cast("IO[bytes]", self._process.stdin)
        self._answers = cast("IO[bytes]", self._process.stdout)
        self._is_ready = False
        if sys.platform == "linux":  # an image comes in few pieces
            with suppress(OSError):
                fcntl.fcntl(self._answers.fileno(), fcntl.F_SETPIPE_SZ, _PIPE_BYTES)

    def is_ready(self) -> bool:
        """Whether it has started: nobody waits for that, where the system says it.

        Raises:
            OSError, EOFError: if it has ended.
        """
        if not self._is_ready and (sys.platform == "win32" or select.select([self._answers], [], [], 0)[0]):
            _fill(self._answers, bytearray(_READY))
            self._is_ready = True
        return self._is_ready

    def read(self, path: str, reading: Reading, allocate: Allocate) -> PatchedPicture | None:
        """As `Decoders.read` does it.

        Raises:
            OSError, ValueError, EOFError: if it has ended.
        """
        _write(self._requests, json.dumps({"path": path, **vars(reading)}).encode() + b"\n")
        answer = bytearray(_ANSWER.size)
        _fill(self._answers, answer)
        rows, columns, height, width, *original = _ANSWER.unpack(answer)
        if not rows:
            return None
        patches = allocate((rows, columns, reading.patch_size, reading.patch_size, 3))
        _fill(self._answers, patches.reshape(-1).data)
        return PatchedPicture(patches, (height, width), *original)

    def end(self) -> None:
        """End it, whatever it does."""
        self._process.kill()
        self._process.communicate()


def serve() -> None:
    """Answer requests on standard input, one line of JSON each, on standard output, until there are no more."""
    keep_freed_memory()
    cv2.setNumThreads(1)  # there are as many processes as cores
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb", buffering=0)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever a library prints is no answer
    _write(answers, _READY)
    for line in sys.stdin.buffer:
        picture = _read(json.loads(line))
        if picture is None:
            _write(answers, _ANSWER.pack(*[0] * 6))
            continue
        _write(answers, _ANSWER.pack(*picture.grid, *picture.size, picture.width, picture.height))
        _write(answers, picture.patches.data.cast("B"))


def _read(request: dict[str, Any]) -> PatchedPicture | None:
    """What is asked for; None for any other image than one that is small and sound."""
    most = min(request["max_pixels"], _MOST_PIXELS)
    try:
        picture = read_image(
            request["path"],
            max_side=request["max_side"],
            exif=request["exif"],
            max_pixels=most,
            check_size=_refuse_large,
        )
        return cut_patches(picture, request["patch_size"])
    except (ImageError, MemoryError):
        return None


def _refuse_large(width: int, height: int) -> None:
    if width * height > _MOST_KEPT:
        raise ImageError("large")


def _fill(pipe: IO[bytes], buffer: Any) -> None:
    """Read a buffer full.

    Raises:
        EOFError: if there is no more before.
    """
    view = memoryview(buffer)
    while view:
        count = pipe.readinto(view)  # type: ignore[attr-defined]
        if not count:
            raise EOFError
        view = view[count:]


def _write(pipe: IO[bytes], data: Any) -> None:
    view = memoryview(data)
    while view:
        view = view[pipe.write(view) :]
