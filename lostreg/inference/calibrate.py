"""One Gram bias for a whole collection, chosen from unlabelled images.

`auto` judges every image by itself. Where one number is wanted, to publish it or to compare with papers that use one,
`calibrate` finds the fixed bias that gives the box of `auto` in as many images as any: the boxes of `auto` stand in for
labels. Of each image nothing is kept but what a ladder of biases made of it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lostreg import defaults
from lostreg.checks import whole_seed
from lostreg.errors import CalibrationError, ImageError
from lostreg.images.boxes import pairwise_iou
from lostreg.images.decode import ImageSource
from lostreg.images.patches import PatchedPicture
from lostreg.inference.calibration import Calibration
from lostreg.inference.discoverer import Discoverer, check_discoverer
from lostreg.inference.jobs import ObjectsJob
from lostreg.inference.stream import draw_sample
from lostreg.methods.bias import TRIALS, limits
from lostreg.methods.lost import Candidates, Lost
from lostreg.methods.similarity import Similarities
from lostreg.metrics import IOU_THRESHOLD
from lostreg.progress import OnProgress, telling

_LADDER: Final = tuple(np.arange(0.5, -2.51, -0.125).tolist())  # in deviations from the mean; the trials are among them
_CANDIDATES: Final = 400
_RESAMPLES: Final = 1000
_COVERED: Final = (5.0, 95.0)  # percentiles of the resamples


def calibrate(
    images: Iterable[ImageSource],
    discoverer: Discoverer,
    *,
    sample: int = defaults.CALIBRATION_IMAGES,
    seed: int = 0,
    on_progress: OnProgress = lambda _: None,
) -> Calibration:
    """Choose one bias from unlabelled images, in one pass over them.

    Args:
        images: files, PIL images or arrays, as `Discoverer.discover` takes them.
        discoverer: backbone, feature and layer, and how images are read; its own bias plays no part.
        sample: how many images to look at, at least 1; of more, a random sample.
        seed: of that sample, and of the resamples behind the interval.
        on_progress: called after each image.

    Raises:
        OptionError: if there are no images, or ``sample`` is below 1.
        CalibrationError: if no image can be read.

    Example:
        >>> discoverer = lostreg.Discoverer("dinov2_vits14_reg", device="cpu")
        >>> calibration = lostreg.calibrate(sorted(Path("photos").iterdir()), discoverer)
        >>> -1 <= calibration.bias <= 1, calibration.images
        (True, 3)
    """
    check_discoverer(discoverer, "images and then a Discoverer")
    sources, seed = draw_sample(images, sample, seed), whole_seed(seed)
    options = discoverer.options
    job = ObjectsJob(
        discoverer.features, Lost(_ladder, options.k_patches, options.scorer), normalize=True, convert=_convert
    )
    outcomes = telling(discoverer.stream_of(job).outcomes(sources), len(sources), on_progress)
    found = [outcome for outcome in outcomes if not isinstance(outcome, ImageError)]
    if not found:
        raise CalibrationError(f"none of {len(sources)} images could be read, so nothing was calibrated")
    return Calibration(
        **_choose(found, seed),
        images=len(found),
        unreadable=len(sources) - len(found),
        seed=seed,
        backbone=discoverer.backbone.spec.name,
        weights=discoverer.backbone.weights,
        feature=options.feature,
        layer=options.layer,
        k_patches=options.k_patches,
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


def _convert(candidates: list[Candidates], pictures: list[PatchedPicture]) -> list[_Rungs]:
    (found,) = candidates
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
