"""A model of one's own as a backbone: a timm ViT that is loaded already, or any function from images to features."""

import copy
import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import Eva, VisionTransformer
from torch import Tensor, nn

from lostreg.checks import shown
from lostreg.errors import BackboneError, OptionError
from lostreg.methods.lost import is_features
from lostreg.models.backbone import Backbone, check_supported, fill_row, resolve_device
from lostreg.models.pixels import joined
from lostreg.models.registers import RegisterNeurons
from lostreg.models.table import BackboneSpec

Grid = tuple[int, int]
FeatureFunction = Callable[[Tensor], tuple[Tensor, Grid]]
"""Normalised images (B, 3, H, W), float32, to features (B, N, D) and the grid (h, w) of their patches, row by row."""
OwnModel = nn.Module | FeatureFunction

_BLANK: Final = 448  # pixels: a multiple of 7, 8, 14, 16, 28 and 32


@dataclass(frozen=True)
class FunctionBackbone(Backbone):
    """A function from images to features in the place of a model: it has no blocks, so nothing can look inside.

    Attributes:
        dimensions: of a feature.
        place: the device that images are brought to.
    """

    dimensions: int = 0
    place: torch.device = torch.device("cpu")  # noqa: RUF009 - it cannot be changed

    @property
    def depth(self) -> int:
        """One layer: what the function gives."""
        return 1

    @property
    def own_prefix_tokens(self) -> int:
        """None: the function has dropped them."""
        return 0

    @property
    def width(self) -> int:
        """Dimensions of a feature."""
        return self.dimensions

    @property
    def device(self) -> torch.device:
        """Where images are brought to."""
        return self.place

    @property
    def dtype(self) -> torch.dtype:
        """That of the images; the function may compute in another."""
        return torch.float32

    @property
    def most_registers(self) -> int:
        """Raises `BackboneError`: none can be added."""
        raise no_blocks(self)

    def with_registers(self, registers: RegisterNeurons | None) -> "FunctionBackbone":
        """The same; raises `BackboneError` if registers are asked for."""
        if registers is not None:
            raise no_blocks(self)
        return self

    def on(self, device: torch.device, dtype: torch.dtype) -> "FunctionBackbone":
        """The same with images on another device; the function has to be there, too.

        Raises:
            OptionError: if another precision than float32 is asked for.
        """
        if dtype != torch.float32:
            raise OptionError(f"{self.spec.name} is a function, which decides its precision: expected fp32")
        return replace(self, place=device)

    @torch.no_grad()
    def features(self, images: Tensor, grid: Grid) -> Tensor:
        """What the function gives, checked.

        Args:
            images: normalised, shape (B, 3, H, W), float32.
            grid: (h, w) that it has to have.

        Returns:
            Shape (B, N, D), float32, on the device of the images.
        """
        features, given = _answer(self.spec.name, self.model(images), images)
        if given != grid or features.shape[2] != self.dimensions:
            raise BackboneError(
                f"{self.spec.name} gave a grid {given} and {features.shape[2]} dimensions for images of shape "
                f"{tuple(images.shape)}: expected {grid} and {self.dimensions}, as for the first"
            )
        return features.to(images.device, torch.float32)


class _Called(nn.Module):
    """A function, or a module that is used as one."""

    def __init__(self, function: FeatureFunction) -> None:
        super().__init__()
        self.training = False
        self.function = function

    def forward(self, images: Tensor) -> Any:
        """What the function gives."""
        return self.function(images)


class FunctionFeatures:
    """The features of packed images that a function gives: what `FeatureExtractor` is to models with blocks.

    Args:
        backbone: the function.
        wanted: pairs of feature and layer.
        compiled: whether that was asked for.

    Raises:
        OptionError: if another feature than ``out`` is wanted, or compiled blocks.
    """

    def __init__(self, backbone: FunctionBackbone, wanted: Sequence[tuple[str, int]], *, compiled: bool) -> None:
        self.backbone = backbone
        self._count = len(wanted)
        others = [feature for feature, _ in wanted if feature != "out"]
        if others:
            raise OptionError(
                f"{backbone.spec.name} is a function: its features are what it gives, 'out', not '{others[0]}'"
            )
        if compiled:
            raise OptionError(f"{backbone.spec.name} is a function: compile it before it is given")

    def __call__(self, pixels: Iterable[Tensor], grids: Sequence[Grid]) -> list[Tensor]:
        """See `FeatureExtractor`."""
        patch = self.backbone.spec.patch_size
        parts: list[Tensor] = []
        image = 0
        for values in pixels:
            images = joined(values, grids[image], patch)
            parts.append(self.backbone.features(images, grids[image]).flatten(0, 1))
            image += len(images)
        return [torch.cat(parts)] * self._count


def own_backbone(
    model: OwnModel,
    *,
    name: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    device: torch.device | str = "cpu",
) -> Backbone:
    """A model of one's own as a backbone; `Discoverer` calls this for a model that it is given.

    A timm `VisionTransformer` or `Eva` is copied, weights and all, and can do what a backbone of the table can. Of a
    subclass the steps of the forward have to be timm's: with other ones, it is called within a function.

    Anything else that can be called is a function: of images (B, 3, H, W), RGB, float32, normalised, with zeros where
    they are padded on the right and bottom to multiples of the patch size, to features (B, N, D) and their grid
    (h, w), N = h * w, row by row, CLS and registers dropped. It is called without gradients, with images of any
    size, and what it gives for an image should not hang on the others of the batch. A blank image of 448x448 pixels
    is tried at once: its grid says the patch size. A function has no queries, keys, layers or registers: what looks
    into blocks (artifacts, attention, probes, test-time registers, ``dinoseg``) refuses it.

    Args:
        model: that model or function; a module has to be in evaluation mode.
        name: what results call it; None takes timm's architecture, or the function's or class's name.
        mean: RGB mean that images are normalised by, in [0, 1]; None takes the model's, of a function ImageNet's.
        std: RGB standard deviation, likewise.
        device: where images for a function go. It has to be there itself.

    Raises:
        BackboneError: if it is a model that lostreg cannot read, or the function fails on the blank image or gives
            something else.
        OptionError: if mean and std are not three numbers in [0, 1] each, or the device is not there.

    Example:
        >>> def colours(images):  # the mean colour of each 16x16 patch
        ...     means = torch.nn.functional.avg_pool2d(images, 16)
        ...     return means.flatten(2).mT, tuple(means.shape[2:])
        >>> backbone = lostreg.own_backbone(colours)
        >>> backbone.spec.name, backbone.spec.patch_size
        ('colours', 16)
        >>> lostreg.Discoverer(backbone, device="cpu").discover("dog.jpg").degrees.shape
        (7, 10)
    """
    is_parallel = isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel)
    inner: Any = getattr(model, "module" if is_parallel else "_orig_mod", None)  # the second of torch.compile
    if isinstance(inner, VisionTransformer | Eva):
        raise BackboneError(
            f"expected the {type(inner).__name__} itself, not {type(model).__name__} around it; compiled blocks are an "
            "option of Discoverer, compile=True"
        )
    if isinstance(model, nn.Module) and model.training and not isinstance(model, VisionTransformer | Eva):
        raise BackboneError(f"{type(model).__name__} is in training mode: call its eval() first")
    if isinstance(model, VisionTransformer | Eva):
        return _of_timm(model, name, mean, std)
    if not callable(model):
        raise OptionError(f"backbone must be a name, a Backbone, a timm model or a function, not {shown(model)}")
    return _of_function(model, name, mean, std, resolve_device(device))


def _of_timm(
    model: VisionTransformer | Eva, name: str | None, mean: Sequence[float] | None, std: Sequence[float] | None
) -> Backbone:
    config: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    name = str(name or config.get("architecture") or type(model).__name__)
    spec = BackboneSpec(name, name, 0, 0, "k", "of its weights", "of one's own")
    check_supported(spec, model)
    _check_no_own_code(name, model)
    for block in model.blocks:
        qkv: Any = block.attn.qkv  # type: ignore[union-attr]
        if qkv is not None and getattr(type(qkv), "forward", None) is not nn.Linear.forward:
            raise BackboneError(f"'{name}' has {type(qkv).__name__} for queries, keys and values: merge it into Linear")
    if not model.dynamic_img_size and getattr(model, "rope", None) is not None:
        raise BackboneError(f"'{name}' has rotary embeddings of one image size: create it with dynamic_img_size=True")
    own: Any = copy.deepcopy(model)
    own.dynamic_img_size = True
    own.reset_classifier(0)
    own.eval().requires_grad_(False)
    return Backbone(
        fill_row(spec, own),
        own,
        _channels(config.get("mean") or IMAGENET_DEFAULT_MEAN if mean is None else mean, "mean"),
        _channels(config.get("std") or IMAGENET_DEFAULT_STD if std is None else std, "std"),
        f"given sha256:{_fingerprint(own)}",
    )


def _check_no_own_code(name: str, model: VisionTransformer | Eva) -> None:
    """Refuse a step of one's own where `Forward` computes timm's in its place; all else is called as it is."""
    steps: list[Any] = [model.forward, model.forward_features, model.forward_intermediates, model._pos_embed]
    parts = [model.patch_embed, model.patch_embed.proj, model.patch_drop, model.blocks]
    for block in model.blocks:
        parts += [block, block.attn, getattr(block, "ls1", None), getattr(block, "ls2", None)]
    steps += [part.forward for part in parts if isinstance(part, nn.Module)]
    for step in steps:
        if not str(step.__module__).startswith(("timm.", "torch.")):
            own = getattr(step, "__qualname__", type(step).__name__)
            raise BackboneError(
                f"'{name}' has a {own} of its own, in whose place timm's would be computed: give a function of images "
                "that calls the model, see own_backbone"
            )


def _of_function(
    function: FeatureFunction,
    name: str | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    device: torch.device,
) -> FunctionBackbone:
    name = str(name or getattr(function, "__name__", type(function).__name__))
    blank = torch.zeros(1, 3, _BLANK, _BLANK, device=device)
    try:
        with torch.no_grad():
            answer = function(blank)
    except Exception as error:
        what = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise BackboneError(f"{name} failed on a blank image {tuple(blank.shape)} on {device}: {what}") from error
    features, (rows, columns) = _answer(name, answer, blank)
    if rows != columns or _BLANK % rows:
        raise BackboneError(
            f"{name} gave a grid ({rows}, {columns}) for {_BLANK}x{_BLANK} pixels: expected square patches of a whole "
            "number of pixels"
        )
    spec = BackboneSpec(name, "", _BLANK // rows, 0, "out", "of its weights", "of one's own", class_token=False)
    return FunctionBackbone(
        spec,
        _Called(function),
        _channels(IMAGENET_DEFAULT_MEAN if mean is None else mean, "mean"),
        _channels(IMAGENET_DEFAULT_STD if std is None else std, "std"),
        f"given sha256:{_fingerprint(function)}" if isinstance(function, nn.Module) else _plain(spec, features),
        dimensions=features.shape[2],
        place=device,
    )


def _answer(name: str, answer: Any, images: Tensor) -> tuple[Tensor, Grid]:
    """Features and grid, if they are such."""
    expected = f"{name} must give features (B, N, D) and their grid (h, w)"
    if not isinstance(answer, tuple | list) or len(answer) != 2:
        raise BackboneError(f"{expected}, not {_kind(answer)}")
    features, grid = answer
    if not is_features(features) or features.ndim != 3 or not features.shape[2]:
        raise BackboneError(f"{expected}: the features are {_kind(features)}")
    try:
        rows, columns = (int(side) for side in grid)
    except (TypeError, ValueError) as error:
        raise BackboneError(f"{expected}: the grid is {shown(grid)}") from error
    if len(features) != len(images) or rows < 1 or columns < 1 or features.shape[1] != rows * columns:
        raise BackboneError(
            f"{expected}: for {len(images)} images and a grid ({rows}, {columns}) the features should have shape "
            f"({len(images)}, {rows * columns}, D), not {tuple(features.shape)}; CLS and registers are dropped"
        )
    return features, (rows, columns)


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} of {value.dtype}"
    return f"{type(value).__name__} of {len(value)}" if isinstance(value, tuple | list) else type(value).__name__


def _channels(values: Sequence[float], name: str) -> tuple[float, float, float]:
    try:
        red, green, blue = (float(value) for value in values)
    except (TypeError, ValueError) as error:
        raise OptionError(f"{name} must be three numbers, not {shown(values)}") from error
    if not all(0 <= value <= 1 and (value or name == "mean") for value in (red, green, blue)):
        kind = "numbers in [0, 1]" if name == "mean" else "numbers above 0, 1 at most"
        raise OptionError(f"{name} must be three {kind}, as of pixels in [0, 1], not {shown(values)}")
    return red, green, blue


def _plain(spec: BackboneSpec, features: Tensor) -> str:
    """What there is to tell one function from another."""
    return f"given, patches of {spec.patch_size} pixels, {features.shape[2]} dimensions"


def _fingerprint(model: nn.Module) -> str:
    """SHA-256 of all its weights and their names."""
    total = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):  # whatever else a module keeps
            total.update(f"{name} {tensor!r}".encode())
            continue
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.detach().to_dense().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


def no_blocks(backbone: Backbone) -> BackboneError:
    """The error of what looks into the blocks of a model."""
    return BackboneError(f"{backbone.spec.name} is a function: it has no blocks to look into, and takes no registers")
