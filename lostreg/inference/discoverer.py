"""Images in, discoveries out: the object that holds a backbone and LOST's options."""

import copy
import dataclasses
import warnings
from collections.abc import Iterable, Iterator, Sized
from pathlib import Path
from typing import Any, Final, Literal

import torch

from lostreg.defaults import (
    BACKBONE,
    BATCH_SIZE,
    CLEAR_SCORE,
    CUDA_BATCH_SIZE,
    K_PATCHES,
    MAX_PIXELS,
    MAX_SIDE,
    Precision,
)
from lostreg.errors import ImageError, LostregWarning, OptionError
from lostreg.images.decode import ImageSource, Item
from lostreg.images.patches import PatchedPicture
from lostreg.inference.calibration import Calibration
from lostreg.inference.discovery import Discovery
from lostreg.inference.jobs import Engine, ObjectsJob
from lostreg.inference.memory import keep_freed_memory
from lostreg.inference.postprocess import BoxFrom, ObjectOptions, discoveries
from lostreg.inference.stream import ImageStream, Job, Outcome
from lostreg.methods.bias import TRIALS, check_bias, resolve_normalize
from lostreg.methods.lost import Objects
from lostreg.models.backbone import Backbone, load_backbone, place_model
from lostreg.models.blocks import check_compiler
from lostreg.models.features import resolve_layer
from lostreg.models.registers import RegisterNeurons
from lostreg.models.table import FEATURES, Feature

_DTYPES: Final = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Discoverer:
    """Finds the main objects of images with one backbone and one set of options.

    Args:
        backbone: a name of the backbone table, ``timm:NAME``, or a `Backbone` that is already loaded. It is
            copied where it is on another device or in another precision, and shared otherwise.
        feature: ``q``, ``k``, ``v`` or ``out``; None takes the row's.
        layer: block index from 0, or from the end when negative.
        bias: Gram bias, ``auto``, a `Calibration` of the same feature, or None for the row's.
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
        registers: test-time registers, see `find_registers`; None adds nothing to any image.
        max_objects: how many objects of an image are looked for at most, at least 1, see
            `lostreg.methods.multi_object`. The first is the same whatever the number.
        min_score: further objects with a lower score are left out and end the search, in [0, 1]. The first is kept.
        refine: whether masks are sharpened on the pixels, see `lostreg.images.masks`.
        box_from: ``patches``, or ``mask`` for boxes around the refined masks.

    Raises:
        OptionError: if an option is out of its range, or nothing can be compiled here.
        BackboneError: if the backbone or its weights cannot be had.

    Note:
        On a CPU, the C library is told to keep freed memory: see `lostreg.inference.memory.keep_freed_memory`.
    """

    def __init__(
        self,
        backbone: str | Backbone = BACKBONE,
        *,
        feature: Feature | None = None,
        layer: int = -1,
        bias: float | Literal["auto"] | Calibration | None = None,
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
        registers: RegisterNeurons | None = None,
        max_objects: int = 1,
        min_score: float = CLEAR_SCORE,
        refine: bool = False,
        box_from: BoxFrom = "patches",
    ) -> None:
        self.object_options = ObjectOptions(max_objects, min_score, refine, box_from)
        _check_options(feature, bias, precision)
        where = resolve_device(device)
        if batch_size is None:
            batch_size = CUDA_BATCH_SIZE if where.type == "cuda" else BATCH_SIZE
        counts = {"k_patches": k_patches, "batch_size": batch_size, "max_side": max_side, "max_pixels": max_pixels}
        _check_counts(counts)
        if where.type == "cpu":
            keep_freed_memory()
            if precision == "bf16" and not _has_quick_bf16():
                message = "this CPU has no instructions for bf16 (AVX512-BF16 or AMX): fp32 will be quicker"
                warnings.warn(message, LostregWarning, stacklevel=2)
        if compile:
            check_compiler(where)
        if isinstance(backbone, str):
            backbone = load_backbone(backbone, weights=weights, device=where)
        elif weights is not None:
            raise OptionError("weights are for a backbone that is named: this one is loaded already")
        backbone = _place(backbone, where, _DTYPES[precision])
        if registers is not None:
            backbone = backbone.with_registers(registers)
        spec = backbone.spec
        self.backbone = backbone
        self.feature: Feature = feature or spec.feature
        self.layer = resolve_layer(backbone, layer)
        if isinstance(bias, Calibration):
            bias.require(spec.name, backbone.weights, self.feature, self.layer)
            if normalize is False:
                raise OptionError("a calibrated bias is defined on normalised features: give a number, or normalise")
            normalize = True
            bias = bias.bias
        self.bias: float | Literal["auto"] = spec.bias if bias is None else bias
        self.normalize = resolve_normalize(self.bias, normalize, default=spec.normalize)
        self.k_patches = k_patches
        self.precision: Precision = precision
        self.batch_size = batch_size
        self.compile = compile
        self.max_side = max_side
        self.exif = exif
        self.max_pixels = max_pixels
        self._start()

    def stream_of(self, job: Job[Outcome]) -> ImageStream[Outcome]:
        """Another job on the same backbone, fed as this one's own is: see `ImageStream`."""
        return ImageStream(
            job,
            batch_size=self.batch_size,
            max_side=self.max_side,
            exif=self.exif,
            max_pixels=self.max_pixels,
        )

    def with_registers(self, registers: RegisterNeurons | None) -> "Discoverer":
        """The same options with test-time registers on the backbone, or without: see `Backbone.with_registers`."""
        other = copy.copy(self)
        other.backbone = self.backbone.with_registers(registers)
        other._start()
        return other

    def _start(self) -> None:
        """Make what works: an engine on the backbone, and the stream that feeds it."""
        self.engine = Engine(
            self.backbone,
            [(self.feature, self.layer)],
            self.bias,
            self.k_patches,
            normalize=self.normalize,
            compiled=self.compile,
        )
        self.stream = self.stream_of(ObjectsJob(self.engine, self._discoveries))

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
            "auto_trials": list(TRIALS) if self.bias == "auto" else None,
            "test_time_registers": self.backbone.registers.describe() if self.backbone.registers else None,
            **self.object_options.options,
        }

    def discover(self, image: ImageSource) -> Discovery:
        """Find the main objects of one image.

        Args:
            image: a file, a PIL image, or an RGB array (h, w, 3) of uint8.

        Raises:
            ImageError: if the image cannot be read, or memory does not suffice for it.
        """
        (outcome,) = self.outcomes([image])
        if isinstance(outcome, ImageError):
            raise outcome
        return dataclasses.replace(outcome, source=image)

    def discover_many(self, images: Iterable[ImageSource], *, progress: bool = False) -> Iterator[Discovery]:
        """Find the main objects of each image: batched, streamed, in input order.

        Args:
            images: as for `discover`; may be endless. Up to two batches of them are taken in advance, so an
                array must not be changed until its discovery is there.
            progress: whether to show a bar, in a notebook as in a terminal.

        Yields:
            One `Discovery` an image.

        Raises:
            ImageError: at the first image that cannot be read, after everything before it was yielded. See
                `outcomes` for going on instead.

        Note:
            An error raised by ``images`` itself comes before the discoveries of what was taken in advance.
        """
        outcomes = self.outcomes(images)
        for outcome in _with_bar(outcomes, images) if progress else outcomes:
            if isinstance(outcome, ImageError):
                raise outcome
            yield outcome

    def outcomes(self, images: Iterable[ImageSource], skip: int = 0) -> Iterator[Discovery | ImageError]:
        """Like `discover_many`, with the error in place of the discovery where an image cannot be read.

        The same image meets the same neighbours of the list, wherever an interrupted run goes on, and gets the same
        box to the bit: see `ImageStream.outcomes`.

        Args:
            images: as for `discover`.
            skip: how many outcomes at the start are known already and are not computed again.

        Yields:
            One outcome an image, in input order, beginning with number ``skip``.
        """
        return self.stream.outcomes(images, skip)

    def _discoveries(self, objects: list[Objects], pictures: list[PatchedPicture]) -> list[Discovery]:
        found = discoveries(objects[0], pictures, self.backbone.spec.patch_size, self.k_patches, self.object_options)
        return found if self.exif else [dataclasses.replace(one, exif=False) for one in found]


def _with_bar(outcomes: Iterator[Item], images: Iterable[ImageSource]) -> Iterator[Item]:
    from tqdm.auto import tqdm

    bar: Iterator[Item] = tqdm(outcomes, total=len(images) if isinstance(images, Sized) else None, unit="img")
    return bar


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
    if not (bias is None or isinstance(bias, Calibration)):
        check_bias(bias)
    if precision not in _DTYPES:
        raise OptionError(f"precision must be one of {', '.join(_DTYPES)}, not '{precision}'")


def _check_counts(counts: dict[str, int | None]) -> None:
    for name, value in counts.items():
        if name == "max_side" and value is None:
            continue
        if not isinstance(value, int) or value < 1:
            raise OptionError(f"{name} must be an integer of at least 1, not {value!r}")
