"""LOST (Siméoni et al., BMVC 2021) as batched tensor functions: features in, one box per image out.

Nothing here knows of models or files. Shapes: B images, N = h*w patches row by row, D feature dimensions.
Similarities are float32, whatever the features were computed in. Ties go to the lowest patch index, always.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional

from lostreg.errors import OptionError
from lostreg.similarity import Similarities

AUTO_QUANTILE: Final = 0.25


@dataclass(frozen=True)
class LostResult:
    """What LOST found in a batch, in units of patches.

    Attributes:
        xyxy: boxes, shape (B, 4), int64, ``x1, y1, x2, y2`` with exclusive right and bottom edges.
        scores: shape (B,), float32: 1, or 0 where the seed is not connected even to itself.
        seeds: row and column of each seed, shape (B, 2), int64.
        degrees: connections of each patch, shape (B, h, w), int64.
        masks: the patches of each object, shape (B, h, w), bool.
        bias: the bias that was added to each image's similarities, shape (B,), float32.
    """

    xyxy: Tensor
    scores: Tensor
    seeds: Tensor
    degrees: Tensor
    masks: Tensor
    bias: Tensor


@torch.no_grad()
def lost_boxes(
    features: Tensor,
    grid: tuple[int, int],
    bias: float | Literal["auto"] | Tensor = 0.0,
    k_patches: int = 100,
    *,
    normalize: bool | None = None,
) -> LostResult:
    """Find the main object of each image from its patch features.

    Args:
        features: shape (B, N, D), any floating dtype, finite.
        grid: (h, w), rows and columns of patches; N = h * w.
        bias: added to every similarity: one number, a tensor (B,) with one number an image, or ``auto``
            (see `auto_bias`).
        k_patches: how many patches of lowest degree may join the seed, at least 1; images with fewer patches
            use all of them.
        normalize: whether to scale every feature vector to length 1 first. None does so for ``auto`` alone,
            which is defined on cosine similarities.

    Returns:
        A `LostResult` on the CPU.

    Raises:
        OptionError: if the shapes disagree, ``k_patches`` is below 1, ``auto`` meets ``normalize=False``, or a
            feature is not finite.
    """
    if not isinstance(features, Tensor):
        raise OptionError(f"features must be a PyTorch tensor, not {type(features).__name__}")
    if not isinstance(bias, Tensor):
        check_bias(bias)
    normalize = resolve_normalize(bias, normalize, default=False)
    if features.device.type == "mps":  # which has no kthvalue
        features = features.cpu()
    if isinstance(bias, Tensor) and bias.shape != features.shape[:1]:
        raise OptionError(f"bias must have shape ({len(features)},), not {tuple(bias.shape)}")
    maps = object_maps(features, grid, bias, k_patches, normalize=normalize)
    return ObjectMaps.unpack(maps.pack().cpu()).boxes(grid)


@dataclass(frozen=True)
class ObjectMaps:
    """What LOST computes where the features are: all but the connected components.

    Attributes:
        masks: patches that are similar to the seed and its companions, shape (B, N), bool.
        degrees: connections of each patch, shape (B, N), int64.
        seeds: patch index of each seed, shape (B,), int64.
        bias: the bias that was added to each image's similarities, shape (B,), float32.
        finite: whether each image's features were, shape (B,), bool.
    """

    masks: Tensor
    degrees: Tensor
    seeds: Tensor
    bias: Tensor
    finite: Tensor

    def pack(self) -> Tensor:
        """All of it in one tensor, so that one transfer takes it to the host; shape (B, N + 3), int32."""
        rows = [
            self.degrees * 2 + self.masks,
            self.seeds[:, None],
            self.bias.view(torch.int32)[:, None],
            self.finite[:, None],
        ]
        return torch.cat([row.int() for row in rows], dim=1)

    @classmethod
    def unpack(cls, packed: Tensor) -> "ObjectMaps":
        """The opposite of `pack`."""
        counts = packed[:, :-3]
        seeds, bias, finite = packed[:, -3:].unbind(dim=1)
        return cls(
            masks=counts % 2 == 1,
            degrees=counts.long() // 2,
            seeds=seeds.long(),
            bias=bias.contiguous().view(torch.float32),
            finite=finite.bool(),
        )

    def boxes(self, grid: tuple[int, int]) -> LostResult:
        """The connected components around the seeds, and their boxes (LOST, section 3.4). Takes maps on the CPU.

        Args:
            grid: (h, w), rows and columns of patches.

        Raises:
            OptionError: if a feature was not finite.
        """
        if not self.finite.all():
            raise OptionError("features must be finite: in half precision, try bf16 or fp32")
        seeds = torch.stack([self.seeds // grid[1], self.seeds % grid[1]], dim=1)
        masks = self.masks.view(-1, *grid).numpy()
        components = np.empty_like(masks)
        boxes = np.empty((len(masks), 4), dtype=np.int64)
        scores = np.ones(len(masks), dtype=np.float32)
        for index, (row, column) in enumerate(seeds.tolist()):
            component = seed_component(masks[index], row, column)
            if not component.any():  # an unsuitable bias: the seed itself is the answer, with no confidence
                component[row, column] = True
                scores[index] = 0.0
            rows, columns = np.nonzero(component)
            components[index] = component
            boxes[index] = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
        return LostResult(
            xyxy=torch.from_numpy(boxes),
            scores=torch.from_numpy(scores),
            seeds=seeds,
            degrees=self.degrees.view(-1, *grid),
            masks=torch.from_numpy(components),
            bias=self.bias,
        )


@torch.no_grad()
def object_maps(
    features: Tensor,
    grid: tuple[int, int],
    bias: float | Literal["auto"] | Tensor,
    k_patches: int,
    *,
    normalize: bool,
) -> ObjectMaps:
    """LOST up to the connected components, in memory that grows with the number of patches and not its square.

    Args:
        features: as for `lost_boxes`.
        grid: (h, w), rows and columns of patches; N = h * w.
        bias: as for `lost_boxes`.
        k_patches: as for `lost_boxes`.
        normalize: whether to scale every feature vector to length 1 first; needed for ``auto``.

    Returns:
        `ObjectMaps` on the device of the features. Whether these were finite is noted, not raised: asking would
        wait for the device.

    Raises:
        OptionError: if the shapes disagree or ``k_patches`` is below 1.
    """
    _check_input(features, grid, k_patches)
    at_once = Similarities.images_at_once(features.shape[1], features.device)
    parts = []
    for start in range(0, max(1, len(features)), at_once):  # one part for an empty batch too
        part = slice(start, start + at_once)
        part_bias = bias[part] if isinstance(bias, Tensor) else bias
        with _exact_float32(features.device):
            parts.append(_maps_of_part(features[part], part_bias, k_patches, normalize=normalize))
    if len(parts) == 1:
        return parts[0]
    names = ("masks", "degrees", "seeds", "bias", "finite")
    return ObjectMaps(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


@contextmanager
def _exact_float32(device: torch.device) -> Iterator[None]:
    """Products in float32, whatever autocast or TF32 the caller has on: signs of similarities decide the boxes."""
    places = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]  # type: ignore[attr-defined]
    settings = [place for place in places if hasattr(place, "fp32_precision")]  # since PyTorch 2.9
    before = [place.fp32_precision for place in settings]
    for place in settings:
        place.fp32_precision = "ieee"
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for place, precision in zip(settings, before, strict=True):
            place.fp32_precision = precision


def check_bias(bias: object) -> None:
    """Raise `OptionError` unless a bias is a finite number or ``auto``."""
    numeric = isinstance(bias, int | float) and not isinstance(bias, bool) and math.isfinite(bias)
    if not (numeric or (isinstance(bias, str) and bias == "auto")):
        raise OptionError(f"bias must be a finite number or 'auto', not {bias!r}")


def resolve_normalize(bias: object, normalize: bool | None, *, default: bool) -> bool:
    """Whether features are normalised: as asked for, else what ``auto`` needs, else ``default``.

    Raises:
        OptionError: if ``auto`` is asked for without normalisation.
    """
    automatic = isinstance(bias, str) and bias == "auto"
    if automatic and normalize is False:
        raise OptionError("bias 'auto' is defined on normalised features: give a number, or normalise")
    return (automatic or default) if normalize is None else normalize


def auto_bias(similarities: Similarities) -> Tensor:
    """A bias for each image from its own cosine similarities: minus their 25 % quantile.

    A quarter of all pairs of different patches is then not connected (ties aside). A patch is always connected to
    itself unless every pair is as similar as a patch is to itself, so no seed is left alone. Scaling all features
    changes nothing, since they are normalised.

    Args:
        similarities: of normalised features.

    Returns:
        Shape (B,), float32, in [-1, 1]; 0 for an image of a single patch.
    """
    return -similarities.quantile(AUTO_QUANTILE).nan_to_num()


def lowest_degrees(degree: Tensor, k: int) -> Tensor:
    """The ``k`` patches of lowest degree, lowest first; of equal ones the lowest index first.

    Args:
        degree: shape (B, N), int64.
        k: in [1, N].

    Returns:
        Patch indices, shape (B, k), int64. The first is the seed (LOST, section 3.2).

    Raises:
        OptionError: if ``k`` is outside [1, N].
    """
    count = degree.shape[1]
    if not 1 <= k <= count:
        raise OptionError(f"k must be in [1, {count}], not {k}")
    index = torch.arange(count, device=degree.device)
    return (degree * count + index).topk(k, dim=1, largest=False, sorted=True).indices


def expand_seed(features: Tensor, candidates: Tensor, bias: Tensor) -> Tensor:
    """Grow one object mask per image from its seed (LOST, section 3.3).

    Args:
        features: shape (B, N, D), float32.
        candidates: the patches of lowest degree, which may join the seed, shape (B, k), int64; the first is the seed.
        bias: added to every similarity, shape (B,), float32.

    Returns:
        Boolean masks, shape (B, N), on the device of ``features``: patches whose biased similarities to the seed and
        its companions add up to more than 0. Not yet reduced to one connected component.
    """
    image = torch.arange(len(features), device=features.device)
    similarities = features[image[:, None], candidates] @ features.mT + bias.view(-1, 1, 1)
    kept = similarities[:, 0].gather(1, candidates) > 0
    return (kept.float().unsqueeze(1) @ similarities).squeeze(1) > 0


def seed_component(mask: np.ndarray, row: int, column: int) -> np.ndarray:
    """The 4-connected part of a mask that holds the seed (LOST, section 3.4).

    Args:
        mask: shape (h, w), bool.
        row: the seed's row.
        column: the seed's column.

    Returns:
        Shape (h, w), bool: all False where the seed is not in the mask.
    """
    if not mask[row, column]:
        return np.zeros_like(mask, dtype=bool)
    labels, _ = ndimage.label(mask)  # SciPy's default structure is the 4-neighbourhood
    component: np.ndarray = labels == labels[row, column]
    return component


def _check_input(features: Tensor, grid: tuple[int, int], k_patches: int) -> None:
    height, width = grid
    if features.ndim != 3 or features.shape[1] != height * width or not features.shape[1]:
        raise OptionError(
            f"features must have shape (B, N, D) with N = {height} * {width} > 0, not {tuple(features.shape)}"
        )
    if k_patches < 1:
        raise OptionError(f"k_patches must be at least 1, not {k_patches}")


def _maps_of_part(
    features: Tensor, bias: float | Literal["auto"] | Tensor, k_patches: int, *, normalize: bool
) -> ObjectMaps:
    features = features.float()
    batch, count, _ = features.shape
    finite = features.sum(dim=2).isfinite().all(dim=1)
    if normalize:
        features = functional.normalize(features, dim=-1)
    similarities = Similarities(features)
    if isinstance(bias, Tensor):
        biases = bias.to(features)
    elif bias == "auto":
        biases = auto_bias(similarities)
    else:
        biases = features.new_full((batch,), float(bias))
    # A biased similarity (the register paper's addition to LOST) is above 0 where the plain one is above -bias.
    degrees = similarities.counts_above(-biases)
    candidates = lowest_degrees(degrees, min(k_patches, count))
    return ObjectMaps(expand_seed(features, candidates, biases), degrees, candidates[:, 0], biases, finite)
