"""Several objects an image: what was found leaves the graph, and LOST runs again on the patches that remain.

The Gram matrix stays what it is. A patch's degree among those that remain is its degree less its connections to those
that left, so each further object costs a few columns of the matrix and not the whole of it. Biases stay those of the
first search, and a score still compares an object with all the rest of the image.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from lostreg.checks import share, whole_number
from lostreg.defaults import CLEAR_SCORE, K_PATCHES, OVERLAP
from lostreg.images.boxes import pairwise_iou
from lostreg.methods.exact import exact_float32
from lostreg.methods.lost import (
    Candidates,
    GivenBias,
    LostMaps,
    LostResult,
    Objects,
    expand_seed,
    lowest_degrees,
    searched,
)
from lostreg.methods.objectness import Scorer
from lostreg.methods.own import ScoreFunction
from lostreg.methods.similarity import connections_to


@torch.no_grad()
def lost_objects(
    features: Tensor,
    grid: tuple[int, int],
    bias: GivenBias = 0.0,
    k_patches: int = K_PATCHES,
    *,
    max_objects: int = 5,
    min_score: float = CLEAR_SCORE,
    normalize: bool | None = None,
    score: ScoreFunction | None = None,
) -> list[Objects]:
    """Find several objects of each image from its patch features: see `find_objects` for how.

    Args:
        features: shape (B, N, D), any floating dtype, finite.
        grid: (h, w), rows and columns of patches; N = h * w.
        bias: as for `lost_boxes`.
        k_patches: as there.
        max_objects: of an image, at least 1.
        min_score: further objects with a lower score are left out and end the search, in [0, 1].
        normalize: as for `lost_boxes`.
        score: as there.

    Returns:
        One `Objects` an image, in units of patches, the object of `lost_boxes` first.

    Raises:
        OptionError: as `lost_boxes`.

    Example:
        >>> features = torch.eye(3).repeat_interleave(torch.tensor([4, 14, 2]), dim=0)  # 20 patches of three kinds
        >>> (found,) = lostreg.lost_objects(features[None], grid=(4, 5), bias=-0.5, max_objects=2, min_score=0)
        >>> found.xyxy.tolist()
        [[3, 3, 5, 4], [0, 0, 4, 1]]
    """
    max_objects, min_score = whole_number(max_objects, "max_objects"), share(min_score, "min_score")
    return find_objects(searched(features, grid, bias, k_patches, normalize, score), k_patches, max_objects, min_score)


@torch.no_grad()
def find_objects(candidates: Candidates, k_patches: int, max_objects: int, min_score: float) -> list[Objects]:
    """The main object of each image of a batch and, if asked for, further ones.

    After each object, its patches leave the graph and LOST runs again, ``max_objects`` times in all. It ends at an
    object whose score is 0 or below ``min_score``, which is left out unless it is the first. A further object is left
    out, too, if the box of its patches overlaps that of an object that was kept by an intersection over union of
    `lostreg.defaults.OVERLAP` or more; its patches leave all the same.

    Args:
        candidates: what LOST found first, with K biases an image.
        k_patches: how many patches of lowest degree may join a seed, at least 1.
        max_objects: at least 1.
        min_score: in [0, 1].

    Returns:
        One `Objects` an image, with one object at least.
    """
    first = candidates.best()
    objects = first.split()
    if max_objects > 1 and objects:
        _find_further(objects, _Rest.after(candidates, first), k_patches, max_objects - 1, min_score)
    return objects


def _find_further(objects: list[Objects], rest: "_Rest", k_patches: int, rounds: int, min_score: float) -> None:
    """Look in all images that may hold more, round after round, and add what is found."""
    images = list(range(len(objects)))
    latest = objects
    for _ in range(rounds):
        left = rest.among.any(dim=1).tolist()
        stays = [place for place, one in enumerate(latest) if may_count(one, min_score) and left[place]]
        if not stays:
            return
        images, rest = [images[place] for place in stays], rest.select(stays)
        result = rest.search(k_patches).best()
        rest.remove(result.masks)
        latest = result.split()
        for image, one in zip(images, latest, strict=True):
            if may_count(one, min_score) and pairwise_iou(one.xyxy, objects[image].xyxy).max() < OVERLAP:
                objects[image] = joined(objects[image], one)


def may_count(objects: Objects, min_score: float) -> bool:
    """Whether the first of them may count as an object: a score of 0 says that it is none."""
    return bool(objects.scores[0] >= min_score and objects.scores[0] > 0)


def joined(objects: Objects, others: Objects) -> Objects:
    """These objects and the others after them; the heat is that of the first."""
    names = ("xyxy", "scores", "masks", "seeds", "biases")
    return replace(objects, **{name: np.concatenate([getattr(objects, name), getattr(others, name)]) for name in names})


class _Rest:
    """The graphs of a batch without the patches of objects that were found.

    Args:
        features: shape (B, N, D), float32.
        grid: (h, w), rows and columns of patches.
        bias: shape (B, K), float32.
        degrees: connections of each patch to those that remain, shape (B, K, N), int64.
        among: the patches that remain, shape (B, N), bool.
        scorer: what scores objects.
    """

    def __init__(
        self,
        features: Tensor,
        grid: tuple[int, int],
        bias: Tensor,
        degrees: Tensor,
        among: Tensor,
        scorer: Scorer,
    ) -> None:
        self.features = features
        self.grid = grid
        self.bias = bias
        self.degrees = degrees
        self.among = among
        self.scorer = scorer

    @classmethod
    def after(cls, candidates: Candidates, first: LostResult) -> "_Rest":
        """What remains after the first search."""
        features, maps = candidates.features, candidates.maps
        bias, degrees = maps.bias.to(features.device), maps.degrees.to(features.device)
        everything = torch.ones(degrees.shape[0], degrees.shape[2], dtype=torch.bool, device=features.device)
        height, width = candidates.masks.shape[2:]
        rest = cls(features, (height, width), bias, degrees, everything, maps.scorer)
        rest.remove(first.masks)
        return rest

    def select(self, images: Sequence[int]) -> "_Rest":
        """Some of the images."""
        if len(images) == len(self.features):
            return self
        picked = torch.tensor(images, device=self.features.device)
        bias, degrees, among = self.bias[picked], self.degrees[picked], self.among[picked]
        return _Rest(self.features[picked], self.grid, bias, degrees, among, self.scorer)

    def remove(self, masks: Tensor) -> None:
        """Take an object out of each graph; masks (B, h, w), bool, on any device."""
        leaving = masks.flatten(1).to(self.features.device)
        with exact_float32(self.features.device):
            self.degrees = self.degrees - connections_to(self.features, leaving, -self.bias)
        self.among = self.among & ~leaving

    def search(self, k_patches: int) -> Candidates:
        """LOST on what remains: at least one patch an image."""
        count = self.features.shape[1]
        # Patches that left come after all others.
        degrees = self.degrees.clamp(min=0).masked_fill(~self.among[:, None], count)
        lowest = lowest_degrees(degrees, min(k_patches, count))
        with exact_float32(self.features.device):
            masks = expand_seed(self.features, lowest, self.bias, self.among)
        finite = self.among.new_ones(len(self.features))
        maps = LostMaps(masks, degrees, lowest[..., 0], self.bias, finite, self.scorer)
        return maps.to_host().candidates(self.features, self.grid)
