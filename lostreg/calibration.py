"""One Gram bias for a whole collection, chosen from unlabelled images, and the file that keeps it.

`auto` judges every image by itself. Where one number is wanted, to publish it or to compare with papers that use one,
`calibrate` finds the fixed bias that gives the box of `auto` in as many images as any: the boxes of `auto` stand in for
labels. Of each image nothing is kept but what a ladder of biases made of it.
"""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, get_type_hints

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lostreg import defaults
from lostreg.engine import Engine, ObjectsJob
from lostreg.errors import CalibrationError, ImageError, OptionError
from lostreg.images.boxes import pairwise_iou
from lostreg.images.decode import ImageSource, draw_sample
from lostreg.images.patches import PatchedPicture
from lostreg.jsonio import load_document, save_document
from lostreg.methods.bias import TRIALS, limits
from lostreg.methods.lost import Objects
from lostreg.methods.similarity import Similarities
from lostreg.metrics import IOU_THRESHOLD

if TYPE_CHECKING:
    from lostreg.discoverer import Discoverer

FORMAT: Final = "lostreg bias 1"
_LADDER: Final = tuple(np.arange(0.5, -2.51, -0.125).tolist())  # in deviations from the mean; the trials are among them
_CANDIDATES: Final = 400
_RESAMPLES: Final = 1000
_COVERED: Final = (5.0, 95.0)  # percentiles of the resamples


@dataclass(frozen=True)
class Calibration:
    """A bias for one feature of one backbone, and how it was found.

    Attributes:
        bias: to be added to every cosine similarity.
        interval: where 90 % of resamples of the images put it (bootstrap), lowest and highest.
        connectivity: share of pairs of different patches that it connects, mean over the images.
        agreement: about the share of images in which it gives the box of ``auto``, at an intersection over union of
            0.5: read from a ladder of biases, on the images that it was chosen by, so a little high.
        mean: of the cosine similarities, mean over the images.
        deviation: their standard deviation within an image, mean over the images.
        images: how many it was found on.
        unreadable: how many more could not be read.
        seed: of the sample.
        backbone: the backbone's name.
        weights: where its weights came from.
        feature: ``q``, ``k``, ``v`` or ``out``.
        layer: block index from 0.
        k_patches: low-degree patches that might join the seed.
    """

    bias: float
    interval: tuple[float, float]
    connectivity: float
    agreement: float
    mean: float
    deviation: float
    images: int
    unreadable: int
    seed: int
    backbone: str
    weights: str
    feature: str
    layer: int
    k_patches: int

    def save(self, path: str | Path) -> None:
        """Write the file that ``--bias FILE`` takes: one JSON object.

        Raises:
            CalibrationError: if it cannot be written.
        """
        save_document(path, FORMAT, dataclasses.asdict(self), CalibrationError)

    @classmethod
    def load(cls, path: str | Path) -> "Calibration":
        """Read such a file.

        Raises:
            CalibrationError: if it cannot be read, or is of something else.
        """
        return load_document(path, FORMAT, _parse, CalibrationError, name="bias file", command="lostreg calibrate")

    def require(self, backbone: str, weights: str, feature: str, layer: int) -> None:
        """Raise `OptionError` unless it was found on this feature."""
        mine = (self.backbone, self.feature, self.layer)
        if mine != (backbone, feature, layer):
            raise OptionError(
                f"the bias was calibrated for {_describe(*mine)}, not for {_describe(backbone, feature, layer)}"
            )
        if self.weights != weights:
            raise OptionError(f"the bias was calibrated on the weights {self.weights}, not on {weights}")


def calibrate(
    images: Sequence[ImageSource],
    discoverer: "Discoverer",
    *,
    sample: int = defaults.CALIBRATION_IMAGES,
    seed: int = 0,
    on_outcome: Callable[[ImageSource, ImageError | None], None] | None = None,
) -> Calibration:
    """Choose one bias from unlabelled images, in one pass over them.

    Args:
        images: files, PIL images or arrays, as `Discoverer.discover` takes them.
        discoverer: backbone, feature and layer, and how images are read; its own bias plays no part.
        sample: how many images to look at, at least 1; of more, a random sample.
        seed: of that sample, and of the resamples behind the interval.
        on_outcome: called after each image, with the error of one that cannot be read.

    Raises:
        OptionError: if there are no images, or ``sample`` is below 1.
        CalibrationError: if no image can be read.
    """
    sources = draw_sample(images, sample, seed)
    engine = Engine(
        discoverer.backbone,
        [(discoverer.feature, discoverer.layer)],
        _ladder,
        discoverer.k_patches,
        normalize=True,
        compiled=discoverer.compile,
    )
    found: list[_Rungs] = []
    errors: list[ImageError] = []
    for source, outcome in zip(
        sources, discoverer.stream_of(ObjectsJob(engine, _convert)).outcomes(sources), strict=True
    ):
        if isinstance(outcome, ImageError):
            errors.append(outcome)
        else:
            found.append(outcome)
        if on_outcome:
            on_outcome(source, outcome if isinstance(outcome, ImageError) else None)
    if not found:
        raise CalibrationError(f"none of {len(sources)} images could be read, so nothing was calibrated")
    return Calibration(
        **_choose(found, seed),
        images=len(found),
        unreadable=len(errors),
        seed=seed,
        backbone=discoverer.backbone.spec.name,
        weights=discoverer.backbone.weights,
        feature=discoverer.feature,
        layer=discoverer.layer,
        k_patches=discoverer.k_patches,
    )


@dataclass(frozen=True)
class _Rungs:
    """What the ladder of biases made of one image, from the strictest to the laxest; each of shape (K,).

    Attributes:
        biases: of the rungs, rising.
        agrees: whether the box is that of ``auto``.
        connected: share of pairs of different patches that are connected.
    """

    biases: NDArray[np.float64]
    agrees: NDArray[np.bool_]
    connected: NDArray[np.float64]


def _ladder(similarities: Similarities) -> Tensor:
    return -limits(similarities, _LADDER)


def _convert(objects: list[Objects], pictures: list[PatchedPicture]) -> list[_Rungs]:
    (found,) = objects
    trials = [_LADDER.index(step) for step in TRIALS]
    boxes = found.boxes()
    best = np.asarray(trials)[found.scores[:, trials].argmax(axis=1)]
    count = found.masks.shape[2] * found.masks.shape[3]
    connected = found.maps.degrees.sum(dim=2).double().numpy() / max(1, count * (count - 1))
    biases = found.maps.bias.double().numpy()
    return [
        _Rungs(
            biases[image],
            pairwise_iou(boxes[image], boxes[image, [best[image]]])[:, 0] >= IOU_THRESHOLD,
            connected[image],
        )
        for image in range(len(pictures))
    ]


def _choose(found: list[_Rungs], seed: int) -> dict[str, Any]:
    """The bias with the most agreement, and what there is to know of it."""
    every = np.concatenate([rungs.biases for rungs in found])
    candidates = np.linspace(every.min(), every.max(), _CANDIDATES)
    agrees = np.stack([rungs.agrees[_nearest(rungs.biases, candidates)] for rungs in found]).astype(np.float64)
    bias = _middle_of_best(candidates, agrees.mean(axis=0)[None])[0]
    random_state = np.random.default_rng(seed)
    resamples = random_state.multinomial(len(found), np.full(len(found), 1 / len(found)), size=_RESAMPLES)
    low, high = np.percentile(_middle_of_best(candidates, resamples @ agrees), _COVERED)
    middle, step = _LADDER.index(0.0), _LADDER.index(-1.0)
    means = np.array([-rungs.biases[middle] for rungs in found])
    return {
        "bias": round(float(bias), 4),
        "interval": (round(float(low), 4), round(float(high), 4)),
        "connectivity": round(float(np.mean([np.interp(bias, rungs.biases, rungs.connected) for rungs in found])), 4),
        "agreement": round(float(agrees.mean(axis=0)[np.abs(candidates - bias).argmin()]), 4),
        "mean": round(float(means.mean()), 4),
        "deviation": round(float((means + [rungs.biases[step] for rungs in found]).mean()), 4),
    }


def _nearest(rising: NDArray[np.float64], values: NDArray[np.float64]) -> NDArray[np.int64]:
    """For each value the place of the nearest of some rising numbers."""
    places = np.searchsorted((rising[1:] + rising[:-1]) / 2, values)
    return places.astype(np.int64)


def _middle_of_best(candidates: NDArray[np.float64], agreement: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of the candidates with the highest agreement the one in the middle; agreement (R, C), to (R,)."""
    best = agreement >= agreement.max(axis=1, keepdims=True) - 1e-9
    middles: NDArray[np.int64] = (best.cumsum(axis=1) >= (best.sum(axis=1, keepdims=True) + 1) // 2).argmax(axis=1)
    chosen: NDArray[np.float64] = candidates[middles]
    return chosen


def _describe(backbone: str, feature: str, layer: int) -> str:
    return f"{feature} of layer {layer} of {backbone}"


def _parse(fields: dict[str, Any]) -> Calibration:
    """A calibration out of a file's fields.

    Raises:
        ValueError: if one has another type than it should.
        TypeError: if one is missing or unknown.
    """
    calibration = Calibration(**fields)
    for name, kind in get_type_hints(Calibration).items():
        value = fields[name]
        if name == "interval":
            right = isinstance(value, list) and len(value) == 2 and all(_is_finite(bound) for bound in value)
        elif kind is float:
            right = _is_finite(value)
        else:
            right = type(value) is kind
        if not right:
            raise ValueError(f"{name} is {value!r}")
    low, high = calibration.interval
    return dataclasses.replace(calibration, interval=(low, high))


def _is_finite(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= sys.float_info.max  # False for NaN too, and for an integer that is no float
