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

AUTO_QUANTILE: Final = 0.25
_GRAM_ELEMENTS: Final = 1 << 26  # similarities held at once, over all images of a batch: 256 MiB


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
    _check_input(features, grid, k_patches)
    _, count, _ = features.shape
    at_once = max(1, _GRAM_ELEMENTS // count**2)
    starts = range(0, max(1, len(features)), at_once)  # one part for an empty batch too
    biases = bias if isinstance(bias, Tensor) else None
    if biases is not None and biases.shape != features.shape[:1]:
        raise OptionError(f"bias must have shape ({len(features)},), not {tuple(biases.shape)}")
    parts = []
    for start in starts:
        part = slice(start, start + at_once)
        part_bias = bias if biases is None else biases[part]
        with _exact_float32(features.device):
            parts.append(_lost_part(features[part], grid, part_bias, k_patches, normalize=normalize))
    return parts[0] if len(parts) == 1 else _join(parts)


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


def gram_matrix(features: Tensor) -> Tensor:
    """Similarities of all pairs of patches, without a bias.

    Args:
        features: shape (B, N, D).

    Returns:
        Shape (B, N, N), float32.
    """
    features = features.float()
    return features @ features.mT


def auto_bias(similarities: Tensor) -> Tensor:
    """A bias for each image from its own cosine similarities: minus their 25 % quantile.

    A quarter of all pairs of different patches is then not connected (ties aside). A patch is always connected to
    itself unless every pair is as similar as a patch is to itself, so no seed is left alone. Scaling all features
    changes nothing, since they are normalised.

    Args:
        similarities: cosine similarities without a bias, shape (B, N, N).

    Returns:
        Shape (B,), float32, in [-1, 1]; 0 for an image of a single patch.
    """
    batch, count, _ = similarities.shape
    pairs = count * (count - 1)
    if pairs == 0:
        return similarities.new_zeros(batch)
    # A patch's similarity to itself is the largest there is: the lowest `pairs` values are those of other pairs.
    rank = math.floor(AUTO_QUANTILE * (pairs - 1)) + 1
    return -similarities.flatten(1).kthvalue(rank).values


def patch_degrees(gram: Tensor) -> Tensor:
    """Number of other patches that each patch is connected to (LOST, section 3.1).

    Args:
        gram: biased similarities, shape (B, N, N).

    Returns:
        Shape (B, N), int64, in [0, N - 1].
    """
    own = gram.diagonal(dim1=1, dim2=2) > 0
    return (gram > 0).sum(dim=2) - own.long()


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


def expand_seed(gram: Tensor, degree: Tensor, seed: Tensor, k: int = 100) -> Tensor:
    """Grow one object mask per image from its seed (LOST, section 3.3).

    Args:
        gram: biased similarities, shape (B, N, N), float32.
        degree: connections per patch, shape (B, N), int64.
        seed: index of the seed patch, shape (B,), int64.
        k: how many lowest-degree patches may join the seed, in [1, N].

    Returns:
        Boolean masks, shape (B, N), on the device of ``gram``: patches whose similarities to the seed and its
        companions add up to more than 0. Not yet reduced to one connected component.

    Raises:
        OptionError: if ``k`` is outside [1, N] or the shapes disagree.
    """
    if gram.shape[:2] != degree.shape or gram.shape[1] != gram.shape[2] or seed.shape != degree.shape[:1]:
        shapes = f"{tuple(gram.shape)}, {tuple(degree.shape)}, {tuple(seed.shape)}"
        raise OptionError(f"gram, degree and seed must have shapes (B, N, N), (B, N), (B,), not {shapes}")
    image = torch.arange(len(gram), device=gram.device)
    candidates = lowest_degrees(degree, k)
    kept = gram[image, seed].gather(1, candidates) > 0
    rows = gram[image[:, None], candidates]
    return (kept.to(gram.dtype).unsqueeze(1) @ rows).squeeze(1) > 0


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
    if not torch.isfinite(features).all():
        raise OptionError("features must be finite: in half precision, try bf16 or fp32")


def _lost_part(
    features: Tensor,
    grid: tuple[int, int],
    bias: float | str | Tensor,
    k_patches: int,
    *,
    normalize: bool,
) -> LostResult:
    features = features.float()
    if normalize:
        features = functional.normalize(features, dim=-1)
    gram = gram_matrix(features)
    if isinstance(bias, Tensor):
        biases = bias.to(gram)
    elif bias == "auto":
        biases = auto_bias(gram)
    else:
        biases = gram.new_full((len(gram),), float(bias))
    gram += biases.view(-1, 1, 1)  # the register paper's addition to LOST
    degree = patch_degrees(gram)
    seed = lowest_degrees(degree, 1).squeeze(1)
    mask = expand_seed(gram, degree, seed, min(k_patches, gram.shape[1]))
    return _boxes(mask.cpu(), degree.cpu(), seed.cpu(), biases.cpu(), grid)


def _boxes(mask: Tensor, degree: Tensor, seed: Tensor, bias: Tensor, grid: tuple[int, int]) -> LostResult:
    seeds = torch.stack([seed // grid[1], seed % grid[1]], dim=1)
    masks = mask.view(-1, *grid).numpy()
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
        degrees=degree.view(-1, *grid),
        masks=torch.from_numpy(components),
        bias=bias,
    )


def _join(parts: list[LostResult]) -> LostResult:
    return LostResult(
        xyxy=torch.cat([part.xyxy for part in parts]),
        scores=torch.cat([part.scores for part in parts]),
        seeds=torch.cat([part.seeds for part in parts]),
        degrees=torch.cat([part.degrees for part in parts]),
        masks=torch.cat([part.masks for part in parts]),
        bias=torch.cat([part.bias for part in parts]),
    )
