"""Images in, discoveries out: the object that holds a backbone and LOST's options."""

import copy
import dataclasses
import os
import threading
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final, Literal, cast

import torch

from lostreg.backbone_table import FEATURES, Feature
from lostreg.backbones import Backbone, load_backbone, place_model
from lostreg.defaults import BACKBONE, BATCH_SIZE, CUDA_BATCH_SIZE, K_PATCHES, MAX_PIXELS, MAX_SIDE, Precision
from lostreg.engine import Engine, Search
from lostreg.errors import ImageError, LostregWarning, OptionError
from lostreg.features import resolve_layer
from lostreg.images import ImageSource, PatchedPicture, cut_patches, read_image
from lostreg.lost import check_bias, resolve_normalize
from lostreg.memory import available_bytes, describe_bytes, keep_freed_memory, required_bytes
from lostreg.regions import Discovery
from lostreg.transformer import check_compiler

_DTYPES: Final = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_PACK_PATCHES: Final = {"cpu": 1 << 11, "cuda": 1 << 17}  # of several images: a CPU gains nothing from more
_OTHER_PACK_PATCHES: Final = 1 << 14
_DECODED_BYTES: Final = 1 << 30  # that wait for their turn
_UNCHECKED_BYTES: Final = 2 << 30  # an image that needs less is tried without asking for free memory
_LONG: Final = 1 << 16  # patches
_SLOW: Final = "time grows with their square, and this may take hours; --max-side bounds it"


class Discoverer:
    """Finds the main object of images with one backbone and one set of options.

    Args:
        backbone: a name of the backbone table, ``timm:NAME``, or a `Backbone` that is already loaded. It is
            copied where it is on another device or in another precision, and shared otherwise.
        feature: ``q``, ``k``, ``v`` or ``out``; None takes the row's.
        layer: block index from 0, or from the end when negative.
        bias: Gram bias, ``auto``, or None for the row's.
        normalize: whether features are L2-normalised; None takes the row's, or what ``auto`` needs.
        k_patches: how many low-degree patches may join the seed, at least 1.
        weights: a weights file, see `load_backbone`.
        device: ``auto`` (CUDA, then MPS, then CPU), or a PyTorch device.
        precision: of the backbone's products; tokens are added up, normalised and scaled, and similarities taken, in
            float32 always. On a CPU, ``bf16`` is quick where the CPU has instructions for it (AVX512-BF16, AMX).
        batch_size: images that go through the backbone together at most, at least 1; None takes 8, on CUDA 32.
        compile: whether the backbone's blocks are compiled (`torch.compile`): once, for images of all shapes. That
            takes up to minutes, and pays in long runs.
        max_side: longer images are scaled down to this side; boxes are in pixels of the original all the same.
            None keeps every size, as benchmarks do; time grows with the square of the number of patches.
        exif: whether EXIF orientation is applied.
        max_pixels: images with more are refused before they are decoded.

    Raises:
        OptionError: if an option is out of its range, or nothing can be compiled here.
        BackboneError: if the backbone or its weights cannot be had.

    Note:
        On a CPU, the C library is told to keep freed memory: see `lostreg.memory.keep_freed_memory`.
    """

    def __init__(
        self,
        backbone: str | Backbone = BACKBONE,
        *,
        feature: Feature | None = None,
        layer: int = -1,
        bias: float | Literal["auto"] | None = None,
        normalize: bool | None = None,
        k_patches: int = K_PATCHES,
        weights: str | Path | None = None,
        device: str | torch.device = "auto",
        precision: Precision = "fp32",
        batch_size: int | None = None,
        compile: bool = False,  # noqa: A002 - as the command line's option
        max_side: int | None = MAX_SIDE,
        exif: bool = True,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        _check_options(feature, bias, precision)
        where = resolve_device(device)
        if batch_size is None:
            batch_size = CUDA_BATCH_SIZE if where.type == "cuda" else BATCH_SIZE
        counts = {"k_patches": k_patches, "batch_size": batch_size, "max_side": max_side, "max_pixels": max_pixels}
        _check_counts(counts)
        if where.type == "cpu":
            keep_freed_memory()
            if precision == "bf16" and not _has_quick_bf16():
                _tell("this CPU has no instructions for bf16 (AVX512-BF16 or AMX): fp32 will be quicker")
        if compile:
            check_compiler(where)
        if isinstance(backbone, str):
            backbone = load_backbone(backbone, weights=weights, device=where)
        elif weights is not None:
            raise OptionError("weights are for a backbone that is named: this one is loaded already")
        backbone = _place(backbone, where, _DTYPES[precision])
        spec = backbone.spec
        self.backbone = backbone
        self.feature: Feature = feature or spec.feature
        self.layer = resolve_layer(backbone, layer)
        self.bias: float | Literal["auto"] = spec.bias if bias is None else bias
        self.normalize = resolve_normalize(self.bias, normalize, default=spec.normalize)
        self.k_patches = k_patches
        self.precision: Precision = precision
        self.batch_size = batch_size
        self.compile = compile
        self.max_side = max_side
        self.exif = exif
        self.max_pixels = max_pixels
        # Patches of a pack of several images: fewer after memory ran out.
        self._pack_patches = _PACK_PATCHES.get(backbone.device.type, _OTHER_PACK_PATCHES)
        self._is_halved = False
        self._ahead = 1 if backbone.device.type == "cuda" else 0  # packs that are started before one is finished
        self.engine = Engine(
            backbone,
            self.feature,
            self.layer,
            self.bias,
            k_patches,
            normalize=self.normalize,
            compiled=compile,
        )

    @property
    def options(self) -> dict[str, Any]:
        """Everything that decides the boxes, as plain values: recorded with the results."""
        return {
            "backbone": self.backbone.spec.name,
            "weights": self.backbone.weights,
            "feature": self.feature,
            "layer": self.layer,
            "bias": self.bias,
            "normalize": self.normalize,
            "k_patches": self.k_patches,
            "device": self.backbone.device.type,
            "precision": self.precision,
            "batch_size": self.batch_size,
            "compile": self.compile,
            "max_side": self.max_side,
            "exif": self.exif,
            "max_pixels": self.max_pixels,
        }

    def discover(self, image: ImageSource) -> Discovery:
        """Find the main object of one image.

        Args:
            image: a file, a PIL image, or an RGB array (h, w, 3) of uint8.

        Raises:
            ImageError: if the image cannot be read, or memory does not suffice for it.
        """
        (outcome,) = self.outcomes([image])
        if isinstance(outcome, ImageError):
            raise outcome
        return outcome

    def discover_many(self, images: Iterable[ImageSource]) -> Iterator[Discovery]:
        """Find the main object of each image: batched, streamed, in input order.

        Args:
            images: as for `discover`; may be endless. Up to two batches of them are taken in advance, so an
                array must not be changed until its discovery is there.

        Yields:
            One `Discovery` an image.

        Raises:
            ImageError: at the first image that cannot be read, after everything before it was yielded. See
                `outcomes` for going on instead.

        Note:
            An error raised by ``images`` itself comes before the discoveries of what was taken in advance.
        """
        for outcome in self.outcomes(images):
            if isinstance(outcome, ImageError):
                raise outcome
            yield outcome

    def outcomes(self, images: Iterable[ImageSource], skip: int = 0) -> Iterator[Discovery | ImageError]:
        """Like `discover_many`, with the error in place of the discovery where an image cannot be read.

        Images keep their sizes. Neighbours in the list, whatever their shapes, are packed into one sequence of
        tokens and computed together. What shares a pack depends on the list alone and not on where an interrupted
        run goes on: the same image meets the same neighbours and gets the same box to the bit. Only where memory
        runs out are packs halved, which is told once, by a `LostregWarning`.

        Args:
            images: as for `discover`.
            skip: how many outcomes at the start are known already and are not computed again.

        Yields:
            One outcome an image, in input order, beginning with number ``skip``.
        """
        remaining = iter(images)
        known = skip // self.batch_size * self.batch_size
        next(islice(remaining, known, known), None)  # whole batches that are known: nothing is decoded
        yield from islice(self._stream(remaining), skip - known, None)

    def _stream(self, images: Iterator[ImageSource]) -> Iterator[Discovery | ImageError]:
        """Decode, compute and finish at the same time: on a GPU, the next pack is started before one is finished."""
        started: deque[_Started] = deque()
        with ThreadPoolExecutor(_decoders()) as pool:
            try:
                for pack in self._packs(self._decoded(pool, images)):
                    started.append(self._start(pack))
                    while len(started) > self._ahead:
                        yield from self._finish(started.popleft())
                while started:
                    yield from self._finish(started.popleft())
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _decoded(self, pool: ThreadPoolExecutor, images: Iterator[ImageSource]) -> Iterator["_Decoded"]:
        """Images in order, the next ones being decoded meanwhile: two batches of them, or as much as memory allows."""
        window: deque[tuple[str, Future[PatchedPicture]]] = deque()
        waiting = _ByteCount()
        while True:
            while len(window) < 2 * self.batch_size and (not window or waiting.total < _DECODED_BYTES):
                source = next(images, _END)
                if isinstance(source, _End):
                    break
                window.append((_name(source), pool.submit(self._read, source, waiting)))
            if not window:
                return
            name, future = window.popleft()
            try:
                picture = future.result()
            except ImageError as error:
                yield _Decoded(name, error)
            else:
                waiting.add(-picture.patches.nbytes)
                yield _Decoded(name, picture)

    def _read(self, image: ImageSource, waiting: "_ByteCount") -> PatchedPicture:
        read = read_image(
            image, max_side=self.max_side, exif=self.exif, max_pixels=self.max_pixels, check_size=self._check_size
        )
        picture = cut_patches(read, self.backbone.spec.patch_size)
        waiting.add(picture.patches.nbytes)
        return picture

    def _check_size(self, width: int, height: int) -> None:
        """Refuse an image for which there is not enough memory, before it is decoded."""
        patch, device = self.backbone.spec.patch_size, self.backbone.device
        grid = (-(-height // patch), -(-width // patch))
        needed = required_bytes(self.backbone, grid)
        if needed < _UNCHECKED_BYTES:
            return
        free = available_bytes(device)
        if free is not None and needed > free:
            raise ImageError(
                f"{width}x{height} pixels are {grid[0] * grid[1]:,} patches, which need up to {describe_bytes(needed)} "
                f"with {self.backbone.spec.name}, but {describe_bytes(free)} are free on {device}: "
                "use --max-side, a smaller backbone or --precision bf16"
            )

    def _packs(self, images: Iterable["_Decoded"]) -> Iterator[list["_Decoded"]]:
        """Neighbours of one batch that make up one sequence of bounded length; a long image is alone."""
        pack: list[_Decoded] = []
        for number, image in enumerate(images, start=1):
            if pack and sum(member.patches for member in pack) + image.patches > self._pack_patches:
                yield pack
                pack = []
            pack.append(image)
            if number % self.batch_size == 0:
                yield pack
                pack = []
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
            search = self._try(pictures)
            if search is not None:
                parts.append(_Part(indices, pictures, search))
            elif len(indices) > 1:
                self._halve(pictures)
                half = -(-len(indices) // 2)
                waiting[:0] = [indices[:half], indices[half:]]
            else:
                outcomes[indices[0]] = self._too_large(pack[indices[0]].name, pictures[0])
        return _Started(outcomes, parts)

    def _try(self, pictures: list[PatchedPicture]) -> Search | None:
        """A pack's work, or None where memory ran out: what was taken for it is free again by then."""
        longest = max(picture.grid[0] * picture.grid[1] for picture in pictures)
        if longest > _LONG:
            _tell(f"an image of {longest:,} patches: {_SLOW}")
        try:
            patches = self.engine.transfer(pictures)
            features = self.engine.forward(patches, [picture.size for picture in pictures])
            return self.engine.search(features, [picture.grid for picture in pictures])
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
        if self.backbone.device.type == "cuda":
            torch.cuda.empty_cache()
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
        return ImageError(
            f"{name}: out of memory on one image of {rows}x{columns} patches on {self.backbone.device} "
            f"(needs up to {describe_bytes(required_bytes(self.backbone, picture.grid))}): "
            "use a smaller --max-side or backbone, or --precision bf16"
        )

    def _finish(self, started: "_Started") -> list[Discovery | ImageError]:
        outcomes: dict[int, Discovery | ImageError] = dict(started.outcomes)
        for part in started.parts:
            outcomes.update(zip(part.indices, self.engine.finish(part.search, part.pictures), strict=True))
        return [outcomes[index] for index in sorted(outcomes)]


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


@dataclass(frozen=True)
class _Part:
    """Images of a pack that went to the device together: their places in it, and what is on its way back."""

    indices: list[int]
    pictures: list[PatchedPicture]
    search: Search


@dataclass(frozen=True)
class _Started:
    """A pack whose work is queued: outcomes that are known already, and the parts that are not."""

    outcomes: dict[int, ImageError]
    parts: list[_Part]


def _name(source: ImageSource) -> str:
    return str(source) if isinstance(source, str | Path) else "image"


def _decoders() -> int:
    """Threads that decode: as many as this process may have cores, within reason."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(max(cores, 2), 16)


def _tell(message: str) -> None:
    warnings.warn(message, LostregWarning, stacklevel=2)


def _is_out_of_memory(error: BaseException) -> bool:
    """PyTorch has a class for it on GPUs, and on the CPU only its allocator's words."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _place(backbone: Backbone, device: torch.device, dtype: torch.dtype) -> Backbone:
    """The backbone on a device in a precision: never changed in place, since others may hold it too."""
    same_device = backbone.device.type == device.type and device.index in (None, backbone.device.index)
    if same_device and backbone.dtype == dtype:
        return backbone
    model = copy.deepcopy(backbone.model)
    place_model(model, device, dtype)
    return dataclasses.replace(backbone, model=model)


def resolve_device(device: str | torch.device) -> torch.device:
    """The device that ``auto`` or a name stands for.

    Raises:
        OptionError: if PyTorch does not know the device, or it is not there.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise OptionError(f"device must be auto, cpu, cuda, cuda:N or mps, not '{device}'") from error
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not present.get(found.type, False):
        raise OptionError(f"device '{device}' was asked for, but PyTorch finds none here; try --device cpu")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise OptionError(f"device '{device}' was asked for, but there are {torch.cuda.device_count()} GPUs")
    return found


def _has_quick_bf16() -> bool:
    """Whether an x86 CPU has instructions for bf16; True where PyTorch does not say."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if capabilities.get("architecture") != "x86_64":
        return True
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def _check_options(feature: str | None, bias: object, precision: str) -> None:
    if feature is not None and feature not in FEATURES:
        raise OptionError(f"feature must be one of {', '.join(FEATURES)}, not '{feature}'")
    if bias is not None:
        check_bias(bias)
    if precision not in _DTYPES:
        raise OptionError(f"precision must be one of {', '.join(_DTYPES)}, not '{precision}'")


def _check_counts(counts: dict[str, int | None]) -> None:
    for name, value in counts.items():
        if name == "max_side" and value is None:
            continue
        if not isinstance(value, int) or value < 1:
            raise OptionError(f"{name} must be an integer of at least 1, not {value!r}")
