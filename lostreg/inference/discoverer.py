"""Images in, discoveries out: the object that holds a backbone and LOST's options."""

import dataclasses
import inspect
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Sized
from functools import partial
from typing import Any, Concatenate, Final, ParamSpec

import torch

from lostreg.checks import shown, whole_number
from lostreg.defaults import BACKBONE
from lostreg.errors import ImageError, LostregWarning, OptionError
from lostreg.images.decode import ImageSource, Item, check_several, held
from lostreg.images.patches import PatchedPicture
from lostreg.inference.discovery import Discovery
from lostreg.inference.jobs import FeaturesJob, ObjectsJob
from lostreg.inference.methods import METHODS, wanted_features
from lostreg.inference.objectness import Objectness
from lostreg.inference.options import Options
from lostreg.inference.postprocess import discoveries
from lostreg.inference.stream import ImageStream, Job, Outcome
from lostreg.models.backbone import Backbone, load_backbone, place_model, resolve_device
from lostreg.models.blocks import check_compiler
from lostreg.models.own import FunctionBackbone, OwnModel, own_backbone
from lostreg.models.registers import RegisterNeurons

_LOG: Final = logging.getLogger(__name__)
_DTYPES: Final = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_Keywords = ParamSpec("_Keywords")


def _keywords_of(
    options: Callable[_Keywords, object],
) -> Callable[[Callable[..., None]], Callable[Concatenate["Discoverer", _Keywords], None]]:
    """Tells `help` and type checkers that a method takes what a dataclass takes."""
    signature = inspect.signature(options)
    this = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)

    def decorate(method: Callable[..., None]) -> Callable[Concatenate["Discoverer", _Keywords], None]:
        parameters = [this, *signature.parameters.values()]
        method.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        return method

    return decorate


class Discoverer:
    """Finds the main objects of images with one backbone and one set of options.

    Args:
        backbone: a name of the backbone table, ``timm:NAME``, a `Backbone` that is already loaded, or a model of
            one's own, timm's or any function from images to features: see `own_backbone`.
        options: the other fields of `lostreg.Options`, as keywords; they are told there.

    Attributes:
        backbone: the frozen model.
        options: with what was left open decided.

    Raises:
        OptionError: if an option is out of its range, or nothing can be compiled here.
        BackboneError: if the backbone or its weights cannot be had.

    Example:
        >>> discoverer = lostreg.Discoverer("dinov2_vits14_reg", feature="k", bias="auto", device="cpu")
        >>> discoverer.discover("dog.jpg").xyxy.shape
        (1, 4)
        >>> [found.scores.shape for found in discoverer.discover_many(["dog.jpg", "dog.jpg"])]
        [(1,), (1,)]

    Note:
        Arrays are taken as RGB, and one of OpenCV's, which is BGR, cannot be told from it: convert it first, by
        ``cv2.cvtColor(array, cv2.COLOR_BGR2RGB)`` or ``array[..., ::-1]``.
    """

    @_keywords_of(Options)
    def __init__(self, backbone: str | Backbone | OwnModel = BACKBONE, **options: Any) -> None:
        asked = Options(backbone, **options)
        device = resolve_device(asked.device)
        if not isinstance(backbone, str | Backbone):
            backbone = own_backbone(backbone, device=device)
        if asked.precision == "auto":
            halves = _has_quick_bf16(device) and not isinstance(backbone, FunctionBackbone)
            asked = dataclasses.replace(asked, precision="bf16" if halves else "fp32")
        elif device.type == "cpu" and asked.precision == "bf16" and _has_quick_bf16(device) is False:
            message = "this CPU has no instructions for bf16 (AVX512-BF16 or AMX): fp32 will be quicker"
            warnings.warn(message, LostregWarning, stacklevel=2)
        if asked.compile:
            check_compiler(device)
        if not isinstance(backbone, str) and asked.weights is not None:
            raise OptionError("weights are for a backbone that is named: this one is loaded already")
        if isinstance(backbone, str):
            backbone = load_backbone(backbone, weights=asked.weights)
            place_model(backbone.model, device, _DTYPES[asked.precision])  # nobody else holds it
        else:
            backbone = backbone.on(device, _DTYPES[asked.precision])
        if asked.registers is not None:
            backbone = backbone.with_registers(asked.registers)
        self._start(backbone, asked)

    def stream_of(self, job: Job[Outcome]) -> ImageStream[Outcome]:
        """Another job on the same backbone, fed as this one's own is: see `ImageStream`."""
        options = self.options
        return ImageStream(
            job,
            batch_size=options.batch_size,
            max_side=options.max_side,
            exif=options.exif,
            max_pixels=options.max_pixels,
        )

    def with_registers(self, registers: RegisterNeurons | None) -> "Discoverer":
        """The same options with test-time registers on the backbone, or without: see `Backbone.with_registers`."""
        other = type(self).__new__(type(self))
        other._start(self.backbone.with_registers(registers), self.options)
        return other

    def with_objectness(self, objectness: Objectness | None) -> "Discoverer":
        """The same options with what a collection taught, or without: see `learn`."""
        other = type(self).__new__(type(self))
        other._start(self.backbone, dataclasses.replace(self.options, objectness=objectness))
        return other

    def on(self, device: str | torch.device) -> "Discoverer":
        """The same on another device, in the same precision.

        Raises:
            OptionError: if the device is not there.
        """
        other = type(self).__new__(type(self))
        other._start(self.backbone.on(resolve_device(device), self.backbone.dtype), self.options)
        return other

    def __getstate__(self) -> dict[str, Any]:
        # What is made of the others is made again: it holds caches, and compiled code, which cannot travel.
        return {name: value for name, value in vars(self).items() if name not in ("features", "stream")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._start(self.backbone, self.options)

    def _start(self, backbone: Backbone, options: Options) -> None:
        """Decide what is left open, and make what works."""
        self.backbone = backbone
        self.options = options.resolved(backbone)
        place = (backbone.device, self.options.precision, self.options.batch_size)
        _LOG.debug("%s on %s in %s, at most %d images together", backbone.title, *place)
        self.features = FeaturesJob(backbone, wanted_features(self.options), compiled=options.compile)
        self.stream = self.stream_of(self._objects_job())

    def _objects_job(self, *, keep_pixels: bool = False) -> ObjectsJob[Discovery]:
        options = self.options
        return ObjectsJob(
            self.features,
            METHODS[options.method].make(options, self.backbone.device),
            normalize=options.normalize,
            beside=len(wanted_features(options)) - 1,
            convert=partial(self._discoveries, keep_pixels=keep_pixels),
        )

    def discover(self, image: ImageSource) -> Discovery:
        """Find the main objects of one image.

        Args:
            image: a file's path, its content as bytes or an open file object, a PIL image, an RGB array (h, w, 3) or a
                tensor (3, h, w) or (h, w, 3) of uint8. What ``cv2.imread`` gives is BGR, which cannot be told from RGB:
                ``array[..., ::-1]`` turns it.

        Raises:
            ImageUnavailableError: if the file cannot be had now, or memory does not suffice for it.
            ImageError: if it is no image that can be read.
        """
        image = held(image)
        (outcome,) = self.outcomes([image])
        if isinstance(outcome, ImageError):
            raise outcome
        return dataclasses.replace(outcome, source=image)

    def discover_many(self, images: Iterable[ImageSource], *, progress: bool = False) -> Iterator[Discovery]:
        """Find the main objects of each image: batched, streamed, in input order.

        Args:
            images: as for `discover`, arrays in RGB; may be endless. Up to two batches of them are taken in advance, so
                an array must not be changed until its discovery is there.
            progress: whether to show a bar, in a notebook as in a terminal.

        Yields:
            One `Discovery` an image.

        Raises:
            OptionError: if ``images`` is one image.
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

    def outcomes(
        self, images: Iterable[ImageSource], skip: int = 0, *, keep_pixels: bool = False
    ) -> Iterator[Discovery | ImageError]:
        """Like `discover_many`, with the error in place of the discovery where an image cannot be read.

        The same image meets the same neighbours of the list, wherever an interrupted run goes on, and gets the same
        box to the bit: see `ImageStream.outcomes`.

        Args:
            images: as for `discover`.
            skip: how many outcomes at the start are known already and are not computed again.
            keep_pixels: whether each discovery holds the decoded image as its source, so that a picture of it needs no
                second decoding; it takes up memory for as long as the discovery is kept.

        Yields:
            One outcome an image, in input order, beginning with number ``skip``.
        """
        check_several(images)
        skip = whole_number(skip, "skip", least=0)
        stream = self.stream_of(self._objects_job(keep_pixels=True)) if keep_pixels else self.stream
        return stream.outcomes(images, skip)

    def _discoveries(self, found: list[Any], pictures: list[PatchedPicture], *, keep_pixels: bool) -> list[Discovery]:
        patch_size = self.backbone.spec.patch_size
        return discoveries(found[0], pictures, patch_size, self.options, keep_pixels=keep_pixels)


def check_discoverer(value: object, order: str) -> None:
    """Raise `OptionError` where something else stands for a discoverer, as where arguments are swapped.

    Args:
        value: that stands for it.
        order: of the arguments, in words.
    """
    if not isinstance(value, Discoverer):
        raise OptionError(f"expected {order}, not {shown(value)} in its place")


def _with_bar(outcomes: Iterator[Item], images: Iterable[ImageSource]) -> Iterator[Item]:
    from tqdm.auto import tqdm

    bar: Iterator[Item] = tqdm(outcomes, total=len(images) if isinstance(images, Sized) else None, unit="img")
    return bar


def _has_quick_bf16(device: torch.device) -> bool | None:
    """Whether a device multiplies in bf16 faster than in fp32; None where that is not known."""
    if device.type == "cuda":
        if torch.version.hip:  # ROCm, whose numbers of capabilities are others
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
        return torch.cuda.get_device_capability(device) >= (8, 0)  # Ampere
    says = device.type == "cpu" and hasattr(torch.cpu, "get_capabilities")
    capabilities = torch.cpu.get_capabilities() if says else {}
    if capabilities.get("architecture") != "x86_64":
        return None
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
