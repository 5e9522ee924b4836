"""Images in, outcomes out, in order: decoded ahead, packed with their neighbours, halved where memory runs out."""

import logging
import math
import os
import random
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, islice
from typing import Any, Final, Generic, Protocol, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray

from lostreg.checks import whole_number, whole_seed
from lostreg.errors import ImageError, ImageUnavailableError, LostregWarning, OptionError, is_out_of_memory
from lostreg.images.decode import ImageSource, Item, listed, name_of, read_image
from lostreg.images.decoders import Asked, Decoders, Reading
from lostreg.images.files import ImageFile
from lostreg.images.memory import describe_bytes
from lostreg.images.patches import PatchedPicture, cut_patches
from lostreg.images.stores import FileRange, StoredImage
from lostreg.inference.memory import available_bytes, required_bytes
from lostreg.models.backbone import Backbone
from lostreg.models.pixels import pin

_LOG: Final = logging.getLogger(__name__)
_PACK_PATCHES: Final = {"cpu": 1 << 11, "cuda": 1 << 17}  # of several images: a CPU gains nothing from more
_OTHER_PACK_PATCHES: Final = 1 << 14
_DECODED_APART: Final = ("cuda",)  # devices that are quicker than what threads can decode
_DECODED_BYTES: Final = 1 << 30  # that wait for their turn
_REMOTE_READERS: Final = 32  # threads that read from stores: most of their time they wait for an answer
_PINNED_BYTES: Final = 1 << 25  # of an image
_UNCHECKED_BYTES: Final = 2 << 30  # an image that needs less is tried without asking for free memory
_LONG: Final = 1 << 16  # patches
_SLOW: Final = "time grows with their square, and this may take hours; --max-side bounds it"

Outcome = TypeVar("Outcome")
Made = TypeVar("Made", covariant=True)


class Job(Protocol[Made]):
    """What is done with the images of a stream, pack by pack."""

    @property
    def backbone(self) -> Backbone:
        """The model that they go through."""

    def start(self, pictures: Sequence[PatchedPicture]) -> Any:
        """Queue the work of a pack, ordered by grid; on a GPU, without waiting for it."""

    def finish(self, started: Any, pictures: Sequence[PatchedPicture]) -> Sequence[Made]:
        """Wait for it: one outcome a picture, in their order."""


class ImageStream(Generic[Outcome]):
    """A job fed with images from files or memory.

    Args:
        job: what is done with them.
        batch_size: images that go through the backbone together at most.
        max_side: longer images are scaled down to this side.
        exif: whether EXIF orientation is applied.
        max_pixels: images with more are refused before they are decoded.
    """

    def __init__(
        self,
        job: Job[Outcome],
        *,
        batch_size: int,
        max_side: int | None,
        exif: bool,
        max_pixels: int,
    ) -> None:
        self.job = job
        self.backbone = job.backbone
        self.batch_size = batch_size
        self.max_side = max_side
        self.exif = exif
        self.max_pixels = max_pixels
        self.cores = available_cores()  # that may be busy with it
        # Patches of a pack of several images: fewer after memory ran out.
        self._pack_patches = _PACK_PATCHES.get(self.backbone.device.type, _OTHER_PACK_PATCHES)
        self._is_halved = False
        self._ahead = 1 if self.backbone.device.type == "cuda" else 0  # packs started before one is finished

    def outcomes(self, images: Iterable[ImageSource], skip: int = 0) -> Iterator[Outcome | ImageError]:
        """One outcome an image, in input order; an `ImageError` where an image cannot be read.

        Images keep their sizes. Neighbours in the list, whatever their shapes, are packed into one sequence of
        tokens and computed together. What shares a pack depends on the list alone and not on where an interrupted
        run goes on: the same image meets the same neighbours and gets the same box to the bit. Only where memory
        runs out are packs halved, which is told once, by a `LostregWarning`.

        Args:
            images: as for `read_image`; may be endless. Up to two batches of them are
                taken in advance.
            skip: how many outcomes at the start are known already and are not computed again.

        Yields:
            Outcomes, beginning with number ``skip``.
        """
        remaining = iter(images)
        known = skip // self.batch_size * self.batch_size
        next(islice(remaining, known, known), None)  # whole batches that are known: nothing is decoded
        yield from islice(self._stream(remaining), skip - known, None)

    def _stream(self, images: Iterator[ImageSource]) -> Iterator[Outcome | ImageError]:
        """Decode, compute and finish at the same time: on a GPU, the next pack is started before one is finished."""
        started: deque[_Started] = deque()
        with (
            ThreadPoolExecutor(self._decoders) as pool,
            ThreadPoolExecutor(_REMOTE_READERS) as remote,  # whose threads begin with the first image for them
            self._decoding_processes() as decoders,
        ):
            try:
                for pack in self._packs(self._decoded(pool, remote, decoders, images)):
                    started.append(self._start(pack))
                    while len(started) > self._ahead:
                        yield from self._finish(started.popleft())
                while started:
                    yield from self._finish(started.popleft())
            except BaseException:
                for threads in (pool, remote):
                    threads.shutdown(wait=False, cancel_futures=True)
                raise

    def _decoding_processes(self) -> AbstractContextManager[Decoders | None]:
        """Where a device would wait for threads that decode."""
        if self.backbone.device.type not in _DECODED_APART:
            return nullcontext()
        reading = Reading(self.max_side, self.exif, self.max_pixels, self._patch_size)
        return Decoders(reading, self._decoders - 1, partial(pin, self.backbone.device))  # a core feeds the device

    def _decoded(
        self,
        pool: ThreadPoolExecutor,
        remote: ThreadPoolExecutor,
        decoders: Decoders | None,
        images: Iterator[ImageSource],
    ) -> Iterator["_Decoded"]:
        """Images in order, the next ones being decoded meanwhile: two batches of them, or as much as memory allows."""
        window: deque[tuple[ImageSource, Asked | Future[PatchedPicture]]] = deque()
        waiting = _ByteCount()  # of what threads have decoded
        for number in count():
            while len(window) < 2 * self.batch_size and (
                not window or (waiting.total < _DECODED_BYTES and (decoders is None or decoders.has_room()))
            ):
                source = next(images, _END)
                if isinstance(source, _End):
                    break
                threads = remote if isinstance(source, StoredImage) and source.is_remote else pool
                by_thread = partial(threads.submit, self._read, source, waiting)
                asked = None
                if number + len(window) >= self.batch_size:  # a short list is not worth processes
                    asked = self._ask(decoders, source, by_thread)
                window.append((source, asked or by_thread()))
            if not window:
                return
            source, reading = window.popleft()
            try:
                picture = reading.result()
            except ImageError as error:
                yield _Decoded(name_of(source), error)
                continue
            if isinstance(reading, Future) or reading.future is not None:
                waiting.add(-picture.patches.nbytes)
            if isinstance(source, str | os.PathLike | ImageFile | StoredImage):
                picture = replace(picture, source=source.path if isinstance(source, os.DirEntry) else source)
            yield _Decoded(name_of(source), picture)

    def _ask(
        self, decoders: Decoders | None, source: ImageSource, otherwise: Callable[[], Future[PatchedPicture]]
    ) -> Asked | None:
        """Have a process decode an image, where there is one and the image is a file, or part of one, on a disk."""
        if decoders is None:
            return None
        if isinstance(source, FileRange) and source.size is not None and not source.is_remote:
            return decoders.ask(source.file, otherwise, part=(source.start, source.size))
        if not isinstance(source, str | os.PathLike | ImageFile):
            return None
        path, exif = (source.path, source.exif) if isinstance(source, ImageFile) else (source, None)
        return decoders.ask(os.fsdecode(path), otherwise, exif=exif)

    def _read(self, image: ImageSource, waiting: "_ByteCount") -> PatchedPicture:
        try:
            read = read_image(
                image, max_side=self.max_side, exif=self.exif, max_pixels=self.max_pixels, check_size=self._check_size
            )
            picture = cut_patches(read, self._patch_size, self._empty)
        except MemoryError as error:
            raise ImageUnavailableError(f"{name_of(image)}: not enough memory to decode it") from error
        waiting.add(picture.patches.nbytes)
        return picture

    def _empty(self, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        """Room for patches, if possible where a GPU can take them from without anybody waiting.

        PyTorch gives nothing of pinned memory back, so large images have none.
        """
        if self.backbone.device.type == "cuda" and math.prod(shape) <= _PINNED_BYTES:
            try:
                pinned: NDArray[np.uint8] = torch.empty(shape, dtype=torch.uint8, pin_memory=True).numpy()
                return pinned
            except RuntimeError as error:
                if not is_out_of_memory(error):  # no more can be pinned
                    raise
        return np.empty(shape, dtype=np.uint8)

    @property
    def _decoders(self) -> int:
        """Threads that decode: as many as there are cores, within reason."""
        return min(max(self.cores, 2), 16)

    @property
    def _patch_size(self) -> int:
        return self.backbone.spec.patch_size

    def _check_size(self, width: int, height: int) -> None:
        """Refuse an image for which there is not enough memory, before it is decoded."""
        patch, device = self._patch_size, self.backbone.device
        grid = (-(-height // patch), -(-width // patch))
        needed = required_bytes(self.backbone, grid)
        if needed < _UNCHECKED_BYTES:
            return
        free = available_bytes(device)
        if free is not None and needed > free:
            raise ImageUnavailableError(
                f"{width}x{height} pixels are {grid[0] * grid[1]:,} patches, which need up to {describe_bytes(needed)} "
                f"with {self.backbone.spec.name}, but {describe_bytes(free)} are free on {device}: "
                "use --max-side, a smaller backbone or --precision bf16"
            )

    def _packs(self, images: Iterable["_Decoded"]) -> Iterator[list["_Decoded"]]:
        """Neighbours of one batch that make up one sequence of bounded length; a long image is alone."""
        pack: list[_Decoded] = []
        patches = 0
        for number, image in enumerate(images, start=1):
            if pack and patches + image.patches > self._pack_patches:
                yield pack
                pack, patches = [], 0
            pack.append(image)
            patches += image.patches
            if number % self.batch_size == 0:
                yield pack
                pack, patches = [], 0
        if pack:
            yield pack

    def _start(self, pack: list["_Decoded"]) -> "_Started":
        """Queue a pack's work, ordered by grid: neighbours of one grid share the steps that know of shapes."""
        readable = [index for index, image in enumerate(pack) if isinstance(image.picture, PatchedPicture)]
        readable.sort(key=lambda index: cast("PatchedPicture", pack[index].picture).grid)
        outcomes = {index: image.picture for index, image in enumerate(pack) if isinstance(image.picture, ImageError)}
        parts: list[_Part] = []
        waiting = [readable] if readable else []
        while waiting:
            indices = waiting.pop(0)
            pictures = [cast("PatchedPicture", pack[index].picture) for index in indices]
            part = self._try(indices, pictures)
            if part is not None:
                parts.append(part)
            elif len(indices) > 1:
                self._halve(pictures)
                half = -(-len(indices) // 2)
                waiting[:0] = [indices[:half], indices[half:]]
            else:
                outcomes[indices[0]] = self._too_large(pack[indices[0]].name, pictures[0])
        return _Started(outcomes, parts)

    def _try(self, indices: list[int], pictures: list[PatchedPicture]) -> "_Part | None":
        """A pack's work, or None where memory ran out: what was taken for it is free again by then."""
        _LOG.debug("a pack of %d images, %d patches", len(pictures), sum(one.grid[0] * one.grid[1] for one in pictures))
        longest = max(picture.grid[0] * picture.grid[1] for picture in pictures)
        if longest > _LONG:
            _tell(f"an image of {longest:,} patches: {_SLOW}")
        try:
            return _Part(indices, pictures, self.job.start(pictures))
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        self._free()
        return None

    def _halve(self, pictures: list[PatchedPicture]) -> None:
        """Make the packs to come half as large as the one that did not fit."""
        half = sum(picture.grid[0] * picture.grid[1] for picture in pictures) // 2
        self._pack_patches = min(self._pack_patches, half)
        if not self._is_halved:
            _tell(
                f"out of memory on {self.backbone.device} with {len(pictures)} images together: going on with half as "
                "much at once; a smaller --batch-size avoids the attempt"
            )
        self._is_halved = True

    def _too_large(self, name: str, picture: PatchedPicture) -> ImageError:
        rows, columns = picture.grid
        return ImageUnavailableError(
            f"{name}: out of memory on one image of {rows}x{columns} patches on {self.backbone.device} "
            f"(needs up to {describe_bytes(required_bytes(self.backbone, picture.grid))}): "
            "use a smaller --max-side or backbone, or --precision bf16"
        )

    def _finish(self, started: "_Started") -> list[Outcome | ImageError]:
        outcomes: dict[int, Outcome | ImageError] = dict(started.outcomes)
        for part in started.parts:
            outcomes.update(zip(part.indices, self._wait(part), strict=True))
        return [outcomes[index] for index in sorted(outcomes)]

    def _wait(self, part: "_Part") -> Sequence[Outcome | ImageError]:
        """A part's outcomes; where memory runs out only now, the part is done again in halves."""
        pictures, started = part.pictures, part.started
        part.started = None  # so that nobody else holds on to it
        try:
            return self.job.finish(started, pictures)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        del started
        self._free()
        if len(pictures) == 1:
            return [self._too_large(name_of(pictures[0].source), pictures[0])]
        self._halve(pictures)
        half = -(-len(pictures) // 2)
        found: list[Outcome | ImageError] = []
        for several in (pictures[:half], pictures[half:]):
            begun = self._try(list(range(len(several))), several)
            if begun is None:
                found += [self._too_large(name_of(one.source), one) for one in several]
            else:
                found += self._wait(begun)
        return found

    def _free(self) -> None:
        """Give back what the device's allocator keeps."""
        if self.backbone.device.type == "cuda":
            torch.cuda.empty_cache()
        elif self.backbone.device.type == "mps":
            torch.mps.empty_cache()


class _End:
    """Marks the end of the list of images."""


_END: Final = _End()


class _ByteCount:
    """Bytes of decoded images that wait for their turn, counted by several threads."""

    def __init__(self) -> None:
        self.total = 0
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        with self._lock:
            self.total += count


@dataclass(frozen=True)
class _Decoded:
    """One image of the list, and what became of reading it."""

    name: str
    picture: PatchedPicture | ImageError

    @property
    def patches(self) -> int:
        if isinstance(self.picture, ImageError):
            return 0
        return self.picture.grid[0] * self.picture.grid[1]


@dataclass
class _Part:
    """Images of a pack that went to the device together: their places in it, and what is on its way back."""

    indices: list[int]
    pictures: list[PatchedPicture]
    started: Any


@dataclass(frozen=True)
class _Started:
    """A pack whose work is queued: outcomes that are known already, and the parts that are not."""

    outcomes: dict[int, ImageError]
    parts: list[_Part]


def available_cores() -> int:
    """How many cores this process may have."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _tell(message: str) -> None:
    warnings.warn(message, LostregWarning, stacklevel=2)


def draw_sample(images: Iterable[Item], count: int, seed: int) -> list[Item]:
    """Some images, or whatever stands for them, drawn at random and left in order; all of them where there are no more.

    Raises:
        OptionError: if there are no images or one in place of several, ``count`` is below 1, or ``seed`` below 0.
    """
    count, seed = whole_number(count, "sample"), whole_seed(seed)
    sources = listed(images)
    if not len(sources):
        raise OptionError("expected at least one image")
    drawn = random.Random(seed).sample(range(len(sources)), min(count, len(sources)))  # noqa: S311 - no secret
    return [sources[index] for index in sorted(drawn)]
