"""How clearly a mask is an object: one number that compares masks of one image, and boxes of different images.

It takes no label and no knob of the data's. Three questions, each answered in [0, 1]; the score is their product:

* Do object and rest differ? The correlation ratio of the features with the two-way split, both sides counting the same:
  the square root of the variance between the two means over the variance of all.
* Is the split one of parts? An object of a single patch, or of all but one, says little: (4 a (1 - a))^(1/4) for an
  object that covers a share ``a`` of the patches, which is 1 for half of the image.
* Does the object end inside the image? Backgrounds run out of it: (1 - b)^4, where a share ``b`` of the outline is the
  image's border.
"""

from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_SIZE_POWER: Final = 0.25
_BORDER_POWER: Final = 4
_APART_POWER: Final = 0.25
_RESOLUTION: Final = 1e-6  # of float32: variance below this share of the features' square is rounding


@torch.no_grad()
def object_scores(features: Tensor, masks: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Score K masks of each image.

    Scores do not change when all features are scaled or the map is mirrored. They are 0 for a mask that covers
    everything or nothing, and close to 0 for features that are all the same.

    Args:
        features: shape (B, N, D), float32.
        masks: connected patches, shape (B, K, h, w), bool; N = h * w.

    Returns:
        Shape (B, K), float32, in [0, 1].
    """
    scores: NDArray[np.float32] = np.prod(score_factors(features, masks), axis=0).astype(np.float32)
    return scores


@torch.no_grad()
def score_factors(features: Tensor, masks: NDArray[np.bool_]) -> tuple[NDArray[np.floating], ...]:
    """The three answers whose product is the score: distinct, size, inside; shape (B, K) each, in [0, 1]."""
    share = masks.mean(axis=(2, 3))
    size = np.power(4 * share * (1 - share), _SIZE_POWER)
    inside = np.power(1 - border_share(masks), _BORDER_POWER)
    distinct = _correlation_ratio(features, torch.from_numpy(masks).to(features.device).flatten(2))
    return distinct.cpu().numpy(), size, inside


@torch.no_grad()
def apartness(features: Tensor, masks: NDArray[np.bool_]) -> NDArray[np.float32]:
    """How little a patch inside has in common with one outside, on average: (1 - mean cosine)^(1/4), at most 1.

    Unlike the score's factors it is not measured in units of the image's own spread, so that it compares boxes of
    different images: a monotonous image has a clear split of something that differs little.

    Args:
        features: shape (N, D), any floating dtype, rows of length 1.
        masks: shape (P, h, w), bool; N = h * w.

    Returns:
        Shape (P,), float32, in [0, 1]; 1 for a mask that covers everything or nothing.
    """
    vectors = features.float()
    members = torch.from_numpy(masks).to(vectors.device).flatten(1).float()
    inside = members @ vectors
    pairs = members.sum(dim=1) * (members.shape[1] - members.sum(dim=1))
    # Σ_{i in M} Σ_{j not in M} F[i] · F[j]
    cosine = (inside * (vectors.sum(dim=0) - inside)).sum(dim=1) / pairs.clamp(min=1)
    apart: NDArray[np.float32] = (1 - cosine).clamp(0, 1).pow(_APART_POWER).cpu().numpy()
    return apart


def border_share(masks: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The share of each mask's outline, counted in sides of patches, that is the image's border.

    Args:
        masks: shape (..., h, w), bool.

    Returns:
        Shape (...), in [0, 1]; 0 for an empty mask.
    """
    sides = [masks[..., 0, :], masks[..., -1, :], masks[..., :, 0], masks[..., :, -1]]
    border = np.sum([side.sum(axis=-1) for side in sides], axis=0)
    within = (masks[..., 1:, :] != masks[..., :-1, :]).sum(axis=(-2, -1))
    within += (masks[..., :, 1:] != masks[..., :, :-1]).sum(axis=(-2, -1))
    shares: NDArray[np.float64] = border / np.maximum(border + within, 1)
    return shares


def near_one(features: Tensor) -> Tensor:
    """Each image's features times a power of two that brings the largest near 1; (..., N, D), float32.

    Scaling so rounds nothing, and keeps the squares of all that matters from overflow and underflow.
    """
    if not features.numel():
        return features
    exponent = features.abs().amax(dim=(-2, -1), keepdim=True).frexp().exponent.clamp(-126, 126)
    return torch.ldexp(features, -exponent)


def _correlation_ratio(features: Tensor, masks: Tensor) -> Tensor:
    """Of each split into mask and rest, both weighing the same; features (B, N, D), masks (B, K, N), to (B, K)."""
    features = near_one(features)
    members = masks.to(features.dtype)
    inside = members.sum(dim=2)
    outside = (features.shape[1] - inside).clamp(min=1)
    inside = inside.clamp(min=1)
    sums = members @ features  # (B, K, D)
    squares = features.square().sum(dim=2, keepdim=True)
    square_sums = (members @ squares).squeeze(2)
    object_mean = sums / inside[..., None]
    rest_mean = (features.sum(dim=1, keepdim=True) - sums) / outside[..., None]
    object_square = square_sums / inside
    rest_square = (squares.sum(dim=1) - square_sums) / outside
    between = (object_mean - rest_mean).square().sum(dim=2) / 4
    square = (object_square + rest_square) / 2
    total = square - (object_mean + rest_mean).square().sum(dim=2) / 4
    least = (_RESOLUTION * square).clamp(min=torch.finfo(torch.float32).tiny)
    return (between / torch.maximum(total, least)).clamp(0, 1).sqrt()
