"""How clearly a mask is an object: one number that compares masks of one image, and boxes of different images.

It takes no label and no knob of the data's. Three questions, each answered in [0, 1]; the score is their product:

* Do object and rest differ? The correlation ratio of the features with the two-way split, both sides counting the same:
  the square root of the variance between the two means over the variance of all.
* Is the split one of parts? An object of a single patch, or of all but one, says little: (4 a (1 - a))^(1/4) for an
  object that covers a share ``a`` of the patches, which is 1 for half of the image.
* Does the object end inside the image? Backgrounds run out of it: (1 - b)^4, where a share ``b`` of the outline is the
  image's border.
"""

from collections.abc import Callable
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Scorer = Callable[[Tensor, NDArray[np.bool_]], NDArray[np.float32]]
"""Scores masks, as `object_scores` gives them."""

_SIZE_POWER: Final = 0.25
_BORDER_POWER: Final = 4
_APART_POWER: Final = 0.25
_MARGIN: Final = 0.25  # of a box's sides, beyond each of them
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
    size = size_factor(masks)
    inside = np.power(1 - border_share(masks), _BORDER_POWER)
    distinct = _distinct(features, torch.from_numpy(masks).to(features.device).flatten(2))
    return distinct.cpu().numpy(), size, inside


def size_factor(masks: NDArray[np.bool_]) -> NDArray[np.float64]:
    """How much of the image a mask parts: (4 a (1 - a))^(1/4) for a share a of its patches; (..., h, w) to (...)."""
    share = masks.mean(axis=(-2, -1))
    factors: NDArray[np.float64] = np.power(4 * share * (1 - share), _SIZE_POWER)
    return factors


class Contrasts(NamedTuple):
    """How little the patches of a mask have in common with others, on average.

    Attributes:
        apart: with all others: (1 - c)^(1/4) for a mean cosine c. Unlike the score's factors it is not measured in
            units of the image's own spread, so that it compares boxes of different images: a monotonous image has a
            clear split of something that differs little.
        local: with those that surround it, see `surroundings`: (r · (1 - c))^(1/2) for a correlation ratio r. Around a
            part the object goes on, while other objects further away say nothing against it.
    """

    apart: NDArray[np.float32]
    local: NDArray[np.float32]


@torch.no_grad()
def contrasts(features: Tensor, masks: NDArray[np.bool_]) -> Contrasts:
    """Compare K masks of each image with what they leave.

    Args:
        features: shape (B, N, D), any floating dtype, rows of length 1.
        masks: shape (B, K, h, w), bool; N = h * w.

    Returns:
        Shape (B, K) each, float32, in [0, 1]; where a mask leaves nothing, ``apart`` is 1 and ``local`` 0.
    """
    vectors = features.float()
    sums, size = _sums(vectors, masks)
    sums_around, size_around = _sums(vectors, surroundings(masks))
    size_outside = (vectors.shape[1] - size).clamp(min=1)
    mean, mean_around = sums / size.clamp(min=1), sums_around / size_around.clamp(min=1)
    mean_outside = (vectors.sum(dim=1, keepdim=True) - sums) / size_outside
    apart = (1 - (mean * mean_outside).sum(dim=2)).clamp(0, 1).pow(_APART_POWER)
    unlike = (1 - (mean * mean_around).sum(dim=2)).clamp(0, 1)
    ratio = _correlation_ratio(mean, mean_around, vectors.new_ones(()))  # rows of length 1 have a mean square of 1
    local = (ratio * unlike).sqrt() * (size_around.squeeze(2) > 0)
    return Contrasts(apart.cpu().numpy(), local.cpu().numpy())


def _sums(vectors: Tensor, masks: NDArray[np.bool_]) -> tuple[Tensor, Tensor]:
    """Sum of the vectors of each mask, (B, K, D), and their number, (B, K, 1)."""
    members = torch.from_numpy(masks).to(vectors.device).flatten(2).to(vectors.dtype)
    return members @ vectors, members.sum(dim=2, keepdim=True)


def surroundings(masks: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """What surrounds the box of each mask: a quarter of its height and width, and at least one patch, on each side.

    Args:
        masks: shape (..., h, w), bool.

    Returns:
        Shape (..., h, w), bool: patches outside the box; none for an empty mask.
    """
    (box_y, near_y), (box_x, near_x) = _span(masks, -1), _span(masks, -2)
    around: NDArray[np.bool_] = near_y[..., :, None] & near_x[..., None, :]
    return around & ~(box_y[..., :, None] & box_x[..., None, :])


def _span(masks: NDArray[np.bool_], axis: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which rows (axis -1) or columns (axis -2) the boxes of masks take up, without the margin and with it."""
    taken: NDArray[np.bool_] = np.any(masks, axis=axis)
    places, last_place = np.arange(taken.shape[-1]), taken.shape[-1] - 1
    first = taken.argmax(axis=-1)[..., None]
    last = last_place - taken[..., ::-1].argmax(axis=-1)[..., None]
    margin = np.maximum(np.rint(_MARGIN * (last - first + 1)), 1)
    some = taken.max(axis=-1, keepdims=True)
    box = some & (places >= first) & (places <= last)
    return box, some & (places >= first - margin) & (places <= last + margin)


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


def _distinct(features: Tensor, masks: Tensor) -> Tensor:
    """The correlation ratio of each split into mask and rest; features (B, N, D), masks (B, K, N), to (B, K)."""
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
    return _correlation_ratio(object_mean, rest_mean, (object_square + rest_square) / 2)


def _correlation_ratio(first: Tensor, second: Tensor, square: Tensor) -> Tensor:
    """Of two sets of vectors that weigh the same, by their means, (..., D), and the mean square of all vectors."""
    between = (first - second).square().sum(dim=-1) / 4
    total = square - (first + second).square().sum(dim=-1) / 4
    least = (_RESOLUTION * square).clamp(min=torch.finfo(torch.float32).tiny)
    return (between / torch.maximum(total, least)).clamp(0, 1).sqrt()
