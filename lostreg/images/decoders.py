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
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, cast

import cv2
import numpy as np
from numpy.typing import NDArray

from lostreg.errors import ImageError, LostregWarning
from lostreg.images import decode
from lostreg.images.allocator import keep_freed_memory
from lostreg.images.decode import read_image
from lostreg.images.patches import PatchedPicture, cut_patches

if sys.platform == "linux":
    import fcntl

_MOST_PIXELS: Final = 1 << 22  # of what is cut; for more, free memory is looked at
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
        self._has_told = False

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
        reading = self._reading if exif is None else replace(self._reading, exif=exif)
        try:
            if not os.path.isabs(path):  # noqa: PTH117 - nothing is made of its dots
                path = os.path.join(os.getcwd(), path)  # noqa: PTH109, PTH118
            return decoder.read(path, reading, self._allocate) if decoder.is_ready() else None
        except (OSError, ValueError, EOFError, MemoryError) as error:  # it has ended, or what it says is not to be had
            self._mine.decoder = None
            decoder.end()
            self._tell(error)
            return None

    def _start(self) -> "_Decoder | None":
        name = Path(sys.executable or "").name.lower()
        if not name.startswith(("python", "pypy")) or getattr(sys, "frozen", False):  # a program in Python's place
            return None
        with self._lock:
            if self._started is None:
                return None
            try:
                decoder = _Decoder()
            except (OSError, ValueError) as error:
                self._tell(error)
                return None
            self._started.append(decoder)
        return decoder

    def _tell(self, error: Exception) -> None:
        """Say once that threads have to do it, unless this is the end."""
        if not self._has_told and self._started is not None:
            self._has_told = True
            reason = str(error) or type(error).__name__
            message = f"a process that decodes has ended ({reason}): threads go on, which may be slower"
            warnings.warn(message, LostregWarning, stacklevel=2)


class _Decoder:
    """One process, asked by one thread.

    Raises:
        OSError: if it cannot be started.
    """

    def __init__(self) -> None:
        places = [place or os.getcwd() for place in sys.path if isinstance(place, str)]  # noqa: PTH109
        self._process = subprocess.Popen(  # noqa: S603 - this Python, and a command of our own
            [sys.executable, "-P", "-c", _COMMAND],  # -P: no module is taken from wherever this happens to run
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(places)},
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
            OSError, ValueError, EOFError: if it has ended.
        """
        if not self._is_ready and _has_something(self._answers):
            answer = bytearray(len(_READY))
            _fill(self._answers, answer)
            if answer != _READY:
                raise ValueError("it says something else")
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
    decode.one_at_a_time = _Declined()
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
    try:
        picture = read_image(
            request["path"],
            max_side=request["max_side"],
            exif=request["exif"],
            max_pixels=request["max_pixels"],
            check_size=_refuse_large,
        )
        return cut_patches(picture, request["patch_size"])
    except (ImageError, MemoryError):
        return None


def _refuse_large(width: int, height: int) -> None:
    if width * height > _MOST_PIXELS:
        raise ImageError("large")


class _Declined:
    """Stands where large images wait for each other: other processes know nothing of that."""

    def __enter__(self) -> None:
        raise ImageError("large")

    def __exit__(self, *_: object) -> None:
        """Nothing."""


def _has_something(pipe: IO[bytes]) -> bool:
    """Whether there is something to read, or an end; True where the system does not say."""
    if not hasattr(select, "poll"):
        return True
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    return bool(poll.poll(0))


def _fill(pipe: IO[bytes], buffer: Any) -> None:
    """Read a buffer full.

    Raises:
        EOFError: if there is no more before.
    """
    view = memoryview(buffer)
    while view:
        count = pipe.readinto(view)  # type: ignore[attr-defined]
        if not count:
            raise EOFError("it has ended")
        view = view[count:]


def _write(pipe: IO[bytes], data: Any) -> None:
    view = memoryview(data)
    while view:
        view = view[pipe.write(view) :]
