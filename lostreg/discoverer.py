"""Images in, discoveries out: the object that holds a backbone and LOST's options."""

import copy
import dataclasses
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from lostreg.backbone_table import FEATURES, Feature
from lostreg.backbones import Backbone, load_backbone
from lostreg.defaults import BACKBONE, BATCH_SIZE, K_PATCHES, MAX_PIXELS, MAX_SIDE, Precision
from lostreg.errors import ImageError, LostregError, OptionError
from lostreg.features import patch_features, resolve_layer
from lostreg.images import ImageSource, Picture, patch_grid, read_image, to_batch
from lostreg.lost import LostResult, check_bias, lost_boxes, resolve_normalize
from lostreg.regions import Discovery

_DTYPES: Final = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_WINDOW_BATCHES: Final = 4  # images are grouped by shape within windows of this many batches
_DECODERS: Final = 4


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
        precision: of the backbone; similarities are float32 always.
        batch_size: images of one shape that go through the backbone together, at least 1.
        max_side: longer images are scaled down to this side; boxes are in pixels of the original all the same.
            None keeps every size, as benchmarks do; memory grows with the square of the number of patches.
        exif: whether EXIF orientation is applied.
        max_pixels: images with more are refused before they are decoded.

    Raises:
        OptionError: if an option is out of its range.
        BackboneError: if the backbone or its weights cannot be had.
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
        batch_size: int = BATCH_SIZE,
        max_side: int | None = MAX_SIDE,
        exif: bool = True,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        _check_options(feature, bias, precision)
        counts = {"k_patches": k_patches, "batch_size": batch_size, "max_side": max_side, "max_pixels": max_pixels}
        _check_counts(counts)
        where = resolve_device(device)
        if isinstance(backbone, str):
            backbone = load_backbone(backbone, weights=weights, device=where, dtype=_DTYPES[precision])
        elif weights is not None:
            raise OptionError("weights are for a backbone that is named: this one is loaded already")
        else:
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
        self.max_side = max_side
        self.exif = exif
        self.max_pixels = max_pixels

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
            "max_side": self.max_side,
            "exif": self.exif,
            "max_pixels": self.max_pixels,
        }

    def discover(self, image: ImageSource) -> Discovery:
        """Find the main object of one image.

        Args:
            image: a file, a PIL image, or an RGB array (h, w, 3) of uint8.

        Raises:
            ImageError: if the image cannot be read.
        """
        return self._run([self._read(image)])[0]

    def discover_many(self, images: Iterable[ImageSource]) -> Iterator[Discovery]:
        """Find the main object of each image: batched, streamed, in input order.

        Args:
            images: as for `discover`; may be endless. Up to eight batches of them are taken in advance, so an
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

        Images are taken in windows of fixed length and batched by shape within a window, so how a batch is made
        up depends on the list alone and not on where an interrupted run goes on: the same image meets the same
        neighbours and gets the same box to the bit.

        Args:
            images: as for `discover`.
            skip: how many outcomes at the start are known already and are not computed again.

        Yields:
            One outcome an image, in input order, beginning with number ``skip``.
        """
        length = min(self.batch_size * _WINDOW_BATCHES, sys.maxsize)
        remaining = iter(images)
        known = skip // length * length
        next(islice(remaining, known, known), None)  # whole windows that are known: nothing is decoded
        skip -= known
        with ThreadPoolExecutor(_DECODERS) as pool:
            window = self._submit(pool, remaining, length)
            while window:
                upcoming = self._submit(pool, remaining, length)
                try:
                    yield from islice(self._window(window), skip, None)
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
                window, skip = upcoming, 0

    def _submit(self, pool: ThreadPoolExecutor, images: Iterator[ImageSource], length: int) -> list[Future[Picture]]:
        return [pool.submit(self._read, image) for image in islice(images, length)]

    def _read(self, image: ImageSource) -> Picture:
        return read_image(image, max_side=self.max_side, exif=self.exif, max_pixels=self.max_pixels)

    def _window(self, window: list[Future[Picture]]) -> Iterator[Discovery | ImageError]:
        """The outcomes of one window in order, each as soon as those before it are there."""
        done: dict[int, Discovery | ImageError] = {}
        pictures: dict[int, Picture] = {}
        for index, future in enumerate(window):
            try:
                pictures[index] = future.result()
            except ImageError as error:
                done[index] = error
        batches = self._batches(pictures)
        for index in range(len(window)):
            while index not in done:
                batch = next(batches)
                found = self._run([pictures.pop(member) for member in batch])
                done.update(zip(batch, found, strict=True))
            yield done.pop(index)

    def _batches(self, pictures: dict[int, Picture]) -> Iterator[list[int]]:
        """Indices of pictures that share a patch grid, at most a batch of them, by their first member."""
        by_grid: dict[tuple[int, int], list[int]] = {}
        for index, picture in pictures.items():
            by_grid.setdefault(patch_grid(picture.pixels, self.backbone.spec.patch_size), []).append(index)
        size = self.batch_size
        batches = [
            members[start : start + size] for members in by_grid.values() for start in range(0, len(members), size)
        ]
        yield from sorted(batches)

    def _run(self, pictures: list[Picture]) -> list[Discovery]:
        backbone = self.backbone
        patch = backbone.spec.patch_size
        batch = to_batch([picture.pixels for picture in pictures], patch, backbone.mean, backbone.std, backbone.device)
        grid = patch_grid(pictures[0].pixels, patch)
        try:
            features = patch_features(backbone, batch, self.feature, self.layer)
            result = lost_boxes(features, grid, self.bias, self.k_patches, normalize=self.normalize)
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            raise LostregError(
                f"out of memory on {len(pictures)} images of {grid[0]}x{grid[1]} patches on {backbone.device}: "
                "use a smaller --batch-size, --max-side or backbone, or --precision bf16"
            ) from error
        return [to_discovery(result, index, picture, patch) for index, picture in enumerate(pictures)]


def to_discovery(result: LostResult, index: int, picture: Picture, patch_size: int) -> Discovery:
    """One image's share of a batched result, with its box in pixels of the original image.

    Args:
        result: of a batch, in patches.
        index: which image of the batch.
        picture: that image.
        patch_size: side of a patch, in pixels of ``picture.pixels``.
    """
    height, width = picture.pixels.shape[:2]
    scale = np.array([picture.width / width, picture.height / height] * 2)
    limits = np.array([width, height] * 2)
    box = np.minimum(result.xyxy[index].numpy() * patch_size, limits) * scale
    return Discovery(
        xyxy=box[None].astype(np.float32),
        scores=_one(result.scores[index]),
        seeds=result.seeds[index : index + 1].numpy(),
        width=picture.width,
        height=picture.height,
        degrees=result.degrees[index].numpy(),
        mask=result.masks[index].numpy(),
        patch_width=float(patch_size * scale[0]),
        patch_height=float(patch_size * scale[1]),
        bias=float(result.bias[index]),
    )


def _is_out_of_memory(error: BaseException) -> bool:
    """PyTorch has a class for it on GPUs, and on the CPU only its allocator's words."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _one(value: torch.Tensor) -> NDArray[np.float32]:
    return np.array([float(value)], dtype=np.float32)


def _place(backbone: Backbone, device: torch.device, dtype: torch.dtype) -> Backbone:
    """The backbone on a device in a precision: never changed in place, since others may hold it too."""
    same_device = backbone.device.type == device.type and device.index in (None, backbone.device.index)
    if same_device and backbone.dtype == dtype:
        return backbone
    model = copy.deepcopy(backbone.model).to(device=device, dtype=dtype)
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
