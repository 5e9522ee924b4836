"""What decides the boxes: one set of options for the Python API, the command line, the demo and the record of a run."""

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal, get_args

import torch

from lostreg.checks import LARGEST, share, shown, whole_number
from lostreg.defaults import (
    BACKBONE,
    BATCH_SIZE,
    CLEAR_SCORE,
    CUDA_BATCH_SIZE,
    K_PATCHES,
    MAX_PIXELS,
    MAX_SIDE,
    METHODS,
    PRECISIONS,
    PUBLISHED_METHODS,
    Precision,
)
from lostreg.errors import OptionError
from lostreg.inference.calibration import Calibration
from lostreg.inference.objectness import Objectness
from lostreg.methods.bias import TRIALS, check_bias, resolve_normalize
from lostreg.methods.objectness import Scorer, object_scores
from lostreg.methods.own import BiasFunction, OwnBias, OwnScore, ScoreFunction
from lostreg.models.backbone import Backbone
from lostreg.models.features import resolve_layer
from lostreg.models.own import OwnModel
from lostreg.models.registers import RegisterNeurons
from lostreg.models.table import FEATURES, Feature

BoxFrom = Literal["patches", "mask"]
BOX_SOURCES: Final[tuple[BoxFrom, ...]] = get_args(BoxFrom)
AFTER_FORWARD: Final = ("method", "bias", "k_patches", "max_objects", "min_score", "score", "refine", "box_from")
"""The options that can be tried again on the same features."""


@dataclass(frozen=True)
class Options:
    """The options of a `Discoverer`, which takes them as keywords.

    Attributes:
        backbone: a name of the backbone table, ``timm:NAME``, or a `Backbone` that is already loaded, which is
            copied where it is on another device or in another precision, and shared otherwise. Or a model of one's
            own: timm's ViT, which is copied, or a function from images to features, see `own_backbone`.
        weights: a weights file, see `load_backbone`.
        feature: ``q``, ``k``, ``v`` or ``out``; None takes the row's.
        layer: block index from 0, or from the end when negative.
        method: what looks for objects: ``lost``; ``parts``, which takes clusters of patches as candidates beside LOST's
            trials; or a published one, ``tokencut``, ``maskcut`` or ``dinoseg``. See docs/objects.md.
        objectness: what a collection taught, see `learn`: ranks the candidates of ``parts``, instead of their score.
        bias: Gram bias, ``auto``, a `Calibration` of the same feature, or None for the row's, with ``parts`` for
            ``auto``. Or a function of one image's features, (N, D), normalised unless ``normalize`` is False, on the
            device, that gives a finite number; results record its name. The published ones have none.
        normalize: whether features are L2-normalised; None takes the row's, or what ``auto`` or a function needs. All
            methods but LOST are defined on normalised features.
        k_patches: how many low-degree patches may join the seed, at least 1.
        device: ``auto`` (CUDA, then MPS, then CPU), or a PyTorch device.
        precision: of the backbone's products; tokens are added up, normalised and scaled, and similarities taken, in
            float32 always. ``auto`` is ``bf16`` where the device is known to be quick at it (NVIDIA GPUs from Ampere
            on, AMD GPUs, CPUs with AVX512-BF16 or AMX), else ``fp32``.
        batch_size: images that go through the backbone together at most, at least 1; None takes 8, on CUDA 64.
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
        score: a function in the place of lostreg's own score, see docs/python.md: of one image's features, as for a
            function as ``bias``, and K masks, (K, h, w), bool, on the device, it gives K numbers in [0, 1]. It chooses
            among LOST's trials and the candidates of ``parts``, and is what results tell; they record its name.
        refine: whether masks are sharpened on the pixels, see `lostreg.images.masks`.
        box_from: ``patches``, or ``mask`` for boxes around the refined masks.

    Raises:
        OptionError: if an option is out of its range.

    Example:
        >>> options = lostreg.Discoverer("dinov2_vits14_reg", max_side=448, device="cpu").options
        >>> options.feature, options.layer, options.bias, options.max_side
        ('k', 1, 'auto', 448)
    """

    backbone: str | Backbone | OwnModel = BACKBONE
    _: KW_ONLY
    weights: str | Path | None = None
    feature: Feature | None = None
    layer: int = -1
    method: str = "lost"
    objectness: Objectness | None = None
    bias: float | Literal["auto"] | Calibration | BiasFunction | OwnBias | None = None
    normalize: bool | None = None
    k_patches: int = K_PATCHES
    device: str | torch.device = "auto"
    precision: Precision = "fp32"
    batch_size: int | None = None
    compile: bool = False
    max_side: int | None = MAX_SIDE
    exif: bool = True
    max_pixels: int = MAX_PIXELS
    registers: RegisterNeurons | None = None
    max_objects: int = 1
    min_score: float = CLEAR_SCORE
    score: ScoreFunction | OwnScore | None = None
    refine: bool = False
    box_from: BoxFrom = "patches"

    def __post_init__(self) -> None:
        choices = {"feature": (None, *FEATURES), "method": METHODS, "precision": PRECISIONS, "box_from": BOX_SOURCES}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                listed = ", ".join(str(choice) for choice in allowed if choice is not None)
                raise OptionError(f"{name} must be one of {listed}, not {getattr(self, name)!r}")
        self._take_functions()
        for name in ("k_patches", "batch_size", "max_side", "max_pixels", "max_objects"):
            if getattr(self, name) is not None or name not in ("batch_size", "max_side"):
                self._set(name, whole_number(getattr(self, name), name))
        self._set("layer", whole_number(self.layer, "layer", least=-LARGEST))
        self._set("min_score", share(self.min_score, "min_score"))
        for name in ("normalize", "compile", "exif", "refine"):
            if getattr(self, name) is not None:
                self._set(name, bool(getattr(self, name)))
        if not isinstance(self.objectness, Objectness | None):
            raise OptionError(f"objectness must be an Objectness, such as a file's, not {shown(self.objectness)}")
        self._check_together()

    def _take_functions(self) -> None:
        """Name a bias and a score of the user's own; raise `OptionError` where they are neither that nor allowed."""
        if callable(self.bias):
            self._set("bias", OwnBias.of(self.bias))
        elif not (self.bias is None or isinstance(self.bias, Calibration)):
            self._set("bias", check_bias(self.bias))
        if self.score is not None:
            self._set("score", OwnScore.of(self.score))

    def _check_together(self) -> None:
        """Raise `OptionError` where options contradict each other."""
        if self.objectness is not None and self.method != "parts":
            raise OptionError(f"an objectness ranks the candidates of method 'parts', not of '{self.method}'")
        if self.method in PUBLISHED_METHODS and not (self.bias is None or self.bias == "auto"):
            raise OptionError(f"method '{self.method}' has no bias: leave it out, or use 'lost' or 'parts'")
        if self.method != "lost" and self.normalize is False:
            raise OptionError(f"method '{self.method}' is defined on normalised features: normalise, or use 'lost'")
        if isinstance(self.bias, Calibration) and self.normalize is False:
            raise OptionError("a calibrated bias is defined on normalised features: give a number, or normalise")
        resolve_normalize(self.bias, self.normalize, default=False)
        if self.objectness is not None and self.score is not None:
            raise OptionError("an objectness ranks candidates instead of a score: give one of the two")
        if self.box_from == "mask" and not self.refine:
            raise OptionError("boxes can be taken from masks that are refined: ask for refined masks, too")

    def _set(self, name: str, value: Any) -> None:
        """Put a plain number in the place of one of another library, which could not be recorded."""
        object.__setattr__(self, name, value)

    def resolved(self, backbone: Backbone) -> "ResolvedOptions":
        """The same with what is left open decided, for a backbone that is where it runs, in a precision that is named.

        Raises:
            OptionError: if the backbone has no such layer, or feature, bias and normalisation contradict each other.
        """
        spec = backbone.spec
        feature, layer = self.feature or spec.feature, resolve_layer(backbone, self.layer)
        bias, normalize = self.bias, self.normalize
        if isinstance(bias, Calibration):
            bias.require(spec.name, backbone.weights, feature, layer)
            bias, normalize = bias.bias, True
        if bias is None:
            bias = spec.bias if self.method == "lost" else "auto"
        if self.method != "lost":
            normalize = True
        if self.method == "dinoseg" and not spec.class_token:
            raise OptionError(f"dinoseg reads the attention of the CLS token, which {spec.name} does not have")
        if self.objectness is not None:
            self.objectness.require(spec.name, backbone.weights, backbone.width)
        decided = {
            "backbone": spec.name,
            "weights": backbone.weights,
            "feature": feature,
            "layer": layer,
            "bias": bias,
            "normalize": resolve_normalize(bias, normalize, default=spec.normalize or isinstance(bias, OwnBias)),
            "device": backbone.device.type,
            "batch_size": self.batch_size or (CUDA_BATCH_SIZE if backbone.device.type == "cuda" else BATCH_SIZE),
            "registers": backbone.registers,
        }
        return ResolvedOptions(**{**vars(self), **decided})


@dataclass(frozen=True, kw_only=True)
class ResolvedOptions(Options):
    """`Options` of a backbone at hand: nothing is left open. ``weights`` say where they came from."""

    backbone: str
    weights: str
    feature: Feature
    bias: float | Literal["auto"] | OwnBias
    normalize: bool
    device: str
    precision: Literal["fp32", "bf16", "fp16"]
    batch_size: int
    score: OwnScore | None = None

    @property
    def scorer(self) -> Scorer:
        """What scores masks."""
        return self.score or object_scores

    def with_changes(self, changes: Mapping[str, Any]) -> "ResolvedOptions":
        """The same with other options that need no other forward (`AFTER_FORWARD`); those that are None stay.

        Features are then normalised where the method, ``auto`` or a function needs it. An objectness goes with
        ``parts`` alone, and a published method has no bias.

        Raises:
            OptionError: if one needs another forward or does not exist, or is out of its range.
        """
        other = sorted(changes.keys() - set(AFTER_FORWARD))
        if other:
            raise OptionError(
                f"expected {', '.join(AFTER_FORWARD)}, not {', '.join(other)}, which need another forward"
            )
        given = {"method": self.method, **{name: value for name, value in changes.items() if value is not None}}
        if given["method"] != "parts":
            given["objectness"] = None
        if given["method"] in PUBLISHED_METHODS:
            given.setdefault("bias", "auto")
        bias = given.get("bias", self.bias)
        if given["method"] != "lost" or bias == "auto" or callable(bias):
            given["normalize"] = True
        return replace(self, **given)

    def record(self) -> dict[str, Any]:
        """As plain values, as results record them; a score that decides nothing is None."""
        values: dict[str, Any] = {}
        for name, value in vars(self).items():
            if name == "registers":
                values["auto_trials"] = list(TRIALS) if self.bias == "auto" else None
                values["test_time_registers"] = value.describe() if value else None
            elif name == "objectness":
                values["objectness"] = value.describe() if value else None
            elif isinstance(value, OwnBias | OwnScore):
                values[name] = value.name
            else:
                values[name] = value
        return {**values, "min_score": self.min_score if self.max_objects > 1 else None}
