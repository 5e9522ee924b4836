"""Processes that decode image files into memory that they share with this one.

Threads that decode go no faster than one core interprets what surrounds the decoder, and each of them keeps whoever
feeds a GPU waiting for the interpreter. Processes need none of it: they are asked by a line of text, and answer where
in the shared memory the patches lie, from which a GPU takes them. They are a help and no more: what they cannot or
should not do, because an image is unusual, broken or large, is left to the caller.
"""

import json
import math
import mmap
import os
import select
import signal
import struct
import subprocess
import sys
import warnings
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Final, cast

import cv2
import numpy as np
from numpy.typing import NDArray

from lostreg.errors import ImageError, LostregWarning
from lostreg.images import decode
from lostreg.images.allocator import keep_freed_memory
from lostreg.images.decode import read_image
from lostreg.images.patches import PatchedPicture, cut_patches
from lostreg.images.stores import FileRange

_MOST_PIXELS: Final = 1 << 22  # of what is cut; for more, free memory is looked at
_SHARED_BYTES: Final = 1 << 29  # by all processes together
_COMMAND: Final = "from lostreg.images.decoders import serve; serve()"
# Where patches begin, rows and columns of them, height and width as cut, width and height of the original.
_ANSWER: Final = struct.Struct("<7q")
_READY: Final = _ANSWER.pack(*[-1] * 7)
_DECLINED: Final = _ANSWER.pack(*[0] * 7)


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


class Asked:
    """An image that a process was asked for.

    Args:
        wait: takes what the process has to say.
        otherwise: has a thread read the image; called where the process does not.

    Attributes:
        picture: its patches, if the process has read it.
        future: what a thread reads instead, if it has not.
    """

    def __init__(self, wait: Callable[[], None], otherwise: Callable[[], Future[PatchedPicture]]) -> None:
        self._wait = wait
        self._otherwise = otherwise
        self.picture: PatchedPicture | None = None
        self.future: Future[PatchedPicture] | None = None

    def decline(self) -> None:
        """Leave the image to a thread."""
        self.future = self._otherwise()

    def result(self) -> PatchedPicture:
        """Wait for its patches.

        Raises:
            ImageError: if it cannot be read.
        """
        while self.picture is None and self.future is None:
            self._wait()
        return self.picture or cast("Future[PatchedPicture]", self.future).result()


class Decoders:
    """Processes, from the moment that one is first asked until the end. For one thread.

    Args:
        reading: how images are read.
        count: of processes.
        pin: is given each process's memory, an array of bytes, before it is used, with True, and at the end with False:
            makes it memory that a GPU takes from without anybody waiting, and ordinary again.
    """

    def __init__(self, reading: Reading, count: int, pin: Callable[[NDArray[np.uint8], bool], None]) -> None:
        self._reading = reading
        self._count = count
        self._pin = pin
        self._process: subprocess.Popen[bytes] | None = None
        self._started: list[_Decoder] | None = None
        self._running: list[_Decoder] = []
        self._has_told = False
        self._poll = select.poll() if hasattr(select, "poll") else None

    def __enter__(self) -> "Decoders":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for decoder in self._started or []:
            decoder.close()
        if self._process is not None:
            self._process.terminate()  # which ends the others, too
            with suppress(subprocess.TimeoutExpired):  # of whom one may wait for a file server
                self._process.wait(timeout=5)
        for decoder in self._started or []:
            if decoder.is_ready:
                self._pin(decoder.memory, False)

    def has_room(self) -> bool:
        """Whether a process could take one more image now; True as long as none of them has started."""
        ready = self._ready()
        return not ready or any(decoder.has_room() for decoder in ready)

    def ask(
        self,
        path: str,
        otherwise: Callable[[], Future[PatchedPicture]],
        *,
        exif: bool | None = None,
        part: tuple[int, int] | None = None,
    ) -> Asked | None:
        """Have a process read a file; None where none can now.

        Args:
            path: of the file.
            otherwise: has a thread read it, where the process turns out not to.
            exif: in place of that of the reading.
            part: the first byte and the number of bytes of the image in the file; None for all of it.
        """
        if self._started is None:
            self._start()
        self._receive_all()
        able = [decoder for decoder in self._ready() if decoder.has_room()]
        if not able:
            return None
        if not os.path.isabs(path):  # noqa: PTH117 - nothing is made of its dots
            try:
                path = os.path.join(os.getcwd(), path)  # noqa: PTH109, PTH118
            except FileNotFoundError:
                return None
        decoder = min(able, key=lambda decoder: len(decoder.asked))
        asked = Asked(partial(self._receive, decoder), otherwise)
        try:
            decoder.ask(asked, path, self._reading.exif if exif is None else exif, part)
        except (OSError, ValueError) as error:
            self._end(decoder, error)
            return None
        return asked

    def _ready(self) -> "list[_Decoder]":
        return [decoder for decoder in self._running if decoder.is_ready]

    def _receive_all(self) -> None:
        """Take what has been answered meanwhile."""
        if not self._running or self._poll is None:
            return
        said = {number for number, _ in self._poll.poll(0)}
        for decoder in [decoder for decoder in self._running if decoder.answers in said]:
            self._receive(decoder)

    def _receive(self, decoder: "_Decoder") -> None:
        was_ready = decoder.is_ready
        try:
            decoder.receive(self._reading.patch_size)
        except (OSError, ValueError) as error:
            self._end(decoder, error)
        if decoder.is_ready and not was_ready:
            self._pin(decoder.memory, True)

    def _start(self) -> None:
        """Start one process, which becomes all of them when it has loaded what they need."""
        self._started = []
        name = Path(sys.executable or "").name.lower()
        is_python = name.startswith(("python", "pypy")) and not getattr(sys, "frozen", False)
        if not is_python or not hasattr(os, "memfd_create") or self._poll is None:  # a program in Python's place
            return
        theirs: list[tuple[int, int, int]] = []
        try:
            size = _SHARED_BYTES // self._count
            for _ in range(self._count):
                decoder = _Decoder(size)
                self._started.append(decoder)
                theirs.append(decoder.theirs)
            places = [place or os.getcwd() for place in sys.path if isinstance(place, str)]  # noqa: PTH109
            self._process = subprocess.Popen(  # noqa: S603 - this Python, and a command of our own
                # -P: no module is taken from wherever this happens to run
                [sys.executable, "-P", "-c", _COMMAND, json.dumps([vars(self._reading), size, theirs])],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[number for numbers in theirs for number in numbers],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(places), "OPENBLAS_NUM_THREADS": "1"},
                start_new_session=True,  # Ctrl-C is for whoever asks
            )
        except (OSError, ValueError) as error:
            self._tell(error)
            return
        finally:
            for number in (number for numbers in theirs for number in numbers):
                os.close(number)
        for decoder in self._started:
            self._poll.register(decoder.answers, select.POLLIN)
        self._running = list(self._started)

    def _end(self, decoder: "_Decoder", error: Exception) -> None:
        """Do without one that has ended; its memory may still be read."""
        if decoder not in self._running or self._poll is None:
            return
        self._running.remove(decoder)
        self._poll.unregister(decoder.answers)
        decoder.close()
        self._tell(error)
        for asked in decoder.asked:
            asked.decline()

    def _tell(self, error: Exception) -> None:
        """Say once that something is missing."""
        if not self._has_told:
            self._has_told = True
            reason = str(error) or type(error).__name__
            message = f"a process that decodes has ended ({reason}): going on without it, which may be slower"
            warnings.warn(message, LostregWarning, stacklevel=2)


@dataclass(eq=False)
class _Span:
    """Where a picture lies in the shared memory, in bytes that were ever taken there."""

    end: int
    is_free: bool = False


class _Decoder:
    """What connects with one process: pipes, and memory that is taken and given back in turns, as a ring.

    Args:
        size: of the memory, in bytes.

    Attributes:
        memory: the shared bytes.
        theirs: file descriptors of the memory, the requests and the answers, for the process.
        answers: where the answers come from.
        asked: what it has not answered yet, in order.
        is_ready: whether it has started.

    Raises:
        OSError: if the system gives no more.
    """

    def __init__(self, size: int) -> None:
        self.asked: deque[Asked] = deque()
        self.is_ready = False
        self._spans: deque[_Span] = deque()  # of pictures that somebody may still hold
        self._taken = self._freed = 0  # bytes, ever
        self._largest = 1 << 21  # of the pictures of late, in bytes
        self._received = bytearray()
        shared = os.memfd_create("lostreg")
        os.ftruncate(shared, size)
        self._shared = mmap.mmap(shared, size)
        self.memory = np.frombuffer(self._shared, dtype=np.uint8)
        requests, self._requests = os.pipe()
        self.answers, answers = os.pipe()
        self.theirs = shared, requests, answers

    def has_room(self) -> bool:
        """Whether its memory should take one more picture beside those that it was asked for."""
        while self._spans and self._spans[0].is_free:
            self._freed = self._spans.popleft().end
        return self._freed + len(self.memory) >= self._taken + (len(self.asked) + 2) * self._largest  # 1 for the seam

    def ask(self, asked: Asked, path: str, exif: bool, part: tuple[int, int] | None) -> None:
        """Have it read a file.

        Raises:
            OSError, ValueError: if it has ended.
        """
        request = {"path": path, "exif": exif, "part": part, "freed": self._freed}
        line = json.dumps(request).encode() + b"\n"
        while line:
            line = line[os.write(self._requests, line) :]
        self.asked.append(asked)

    def receive(self, patch_size: int) -> None:
        """Take the answers that are there, or wait for one.

        Raises:
            OSError: if it has ended.
        """
        received = os.read(self.answers, 64 * _ANSWER.size)
        if not received:
            raise OSError("it answers no more")
        self._received += received
        while len(self._received) >= _ANSWER.size:
            answer = bytes(self._received[: _ANSWER.size])
            del self._received[: _ANSWER.size]
            if answer == _READY:
                self.is_ready = True
                continue
            asked = self.asked.popleft()
            if answer == _DECLINED:
                asked.decline()
            else:
                asked.picture = self._picture(answer, patch_size)

    def _picture(self, answer: bytes, patch_size: int) -> PatchedPicture:
        start, rows, columns, height, width, original_width, original_height = _ANSWER.unpack(answer)
        size = rows * columns * patch_size**2 * 3
        values = np.frombuffer(self._shared, dtype=np.uint8, count=size, offset=start % len(self.memory))
        span = _Span(start + size)
        # Whatever is made of these values refers to them: when they go, nobody reads the place any more.
        weakref.finalize(values, setattr, span, "is_free", True).atexit = False
        self._spans.append(span)
        self._taken = span.end
        self._largest = max(size, self._largest * 7 // 8)
        patches = values.reshape(rows, columns, patch_size, patch_size, 3)
        return PatchedPicture(patches, (height, width), original_width, original_height)

    def close(self) -> None:
        """Close the pipes, where that has not been done: the process then ends."""
        if self.answers >= 0:
            os.close(self._requests)
            os.close(self.answers)
            self._requests = self.answers = -1


def serve() -> None:
    """Load what is needed, become several processes, and see to it that none of them is left behind."""
    reading, size, connections = json.loads(sys.argv[1])
    keep_freed_memory()
    cv2.setNumThreads(1)  # there are as many processes as cores
    decode.one_at_a_time = _Declined()
    processes: list[int] = []

    def end(*_: object) -> None:
        for process in processes:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    signal.signal(signal.SIGTERM, end)
    for mine in connections:
        process = os.fork()
        if not process:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            for number in (number for numbers in connections if numbers != mine for number in numbers):
                os.close(number)
            _decode(reading, size, *mine)
            os._exit(0)
        processes.append(process)
    for number in (number for numbers in connections for number in numbers):
        os.close(number)
    while processes:
        processes.remove(os.wait()[0])


def _decode(reading: dict[str, Any], size: int, shared: int, requests: int, answers: int) -> None:
    """Answer requests, one line of JSON each, until there are no more."""
    memory = mmap.mmap(shared, size)
    np.frombuffer(memory, dtype=np.uint8).fill(0)  # all processes at once have the system find it, not who pins it
    room = _Room(memory)
    os.write(answers, _READY)
    with os.fdopen(requests, "rb") as lines:
        for line in lines:
            os.write(answers, _answer({**reading, **json.loads(line)}, room))


def _answer(request: dict[str, Any], room: "_Room") -> bytes:
    """Read what is asked for into the room; decline any other image than one that is small and sound."""
    room.freed = request["freed"]
    path, part = request["path"], request.get("part")
    try:
        picture = read_image(
            path if part is None else FileRange(path, path, *part),
            max_side=request["max_side"],
            exif=request["exif"],
            max_pixels=request["max_pixels"],
            check_size=_refuse_large,
        )
        patched = cut_patches(picture, request["patch_size"], room.take)
    except (ImageError, MemoryError):
        return _DECLINED
    return _ANSWER.pack(room.start, *patched.grid, *patched.size, patched.width, patched.height)


class _Room:
    """The shared memory as its process sees it: pictures behind each other, from the front again where none fits.

    Attributes:
        freed: bytes, of all that were ever taken, that nobody needs any more.
        start: where the latest picture begins, in bytes that were ever taken.
    """

    def __init__(self, shared: mmap.mmap) -> None:
        self._shared = shared
        self._taken = 0
        self.freed = self.start = 0

    def take(self, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        """Room for the patches of a picture.

        Raises:
            MemoryError: if there is none.
        """
        count, size = math.prod(shape), len(self._shared)
        start = self._taken if self._taken % size + count <= size else self._taken + size - self._taken % size
        if start + count > self.freed + size:
            raise MemoryError
        self.start, self._taken = start, start + count
        return np.frombuffer(self._shared, dtype=np.uint8, count=count, offset=start % size).reshape(shape)


def _refuse_large(width: int, height: int) -> None:
    if width * height > _MOST_PIXELS:
        raise ImageError("large")


class _Declined:
    """Stands where large images wait for each other: other processes know nothing of that."""

    def __enter__(self) -> None:
        raise ImageError("large")

    def __exit__(self, *_: object) -> None:
        """Nothing."""
