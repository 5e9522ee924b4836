"""Several objects an image: what was found leaves the graph, and LOST runs again on the patches that remain.

The Gram matrix stays what it is. A patch's degree among those that remain is its degree less its connections to those
that left, so each further object costs a few columns of the matrix and not the whole of it. Biases stay those of the
first search, and a score still compares an object with all the rest of the image.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lostreg.defaults import OVERLAP
from lostreg.images.boxes import pairwise_iou
from lostreg.methods.lost import LostResult, ObjectMaps, Objects, exact_float32, expand_seed, lowest_degrees
from lostreg.methods.similarity import connections_to


@dataclass(frozen=True)
class Found:
    """The objects of one image, in units of patches, in the order found.

    Attributes:
        xyxy: boxes, shape (n, 4), int64, ``x1, y1, x2, y2`` with exclusive right and bottom edges.
        scores: shape (n,), float32.
        seeds: row and column of each seed, shape (n, 2), int64.
        biases: shape (n,), float32.
        masks: shape (n, h, w), bool; no patch belongs to two.
        degrees: connections of each patch before anything was found, shape (h, w), int64.
    """

    xyxy: NDArray[np.int64]
    scores: NDArray[np.float32]
    seeds: NDArray[np.int64]
    biases: NDArray[np.float32]
    masks: NDArray[np.bool_]
    degrees: NDArray[np.int64]

    def is_at_least(self, min_score: float) -> bool:
        """Whether the first of them may count as an object: a score of 0 says that it is none."""
        return bool(self.scores[0] >= min_score and self.scores[0] > 0)

    def joined(self, other: "Found") -> "Found":
        """These objects and the other's, after them."""
        names = ("xyxy", "scores", "seeds", "biases", "masks")
        return replace(self, **{name: np.concatenate([getattr(self, name), getattr(other, name)]) for name in names})


@torch.no_grad()
def find_several(objects: Objects, k_patches: int, max_objects: int, min_score: float) -> list[Found]:
    """The main object of each image of a batch and, if asked for, further ones.

    After each object, its patches leave the graph and LOST runs again, ``max_objects`` times in all. It ends at an
    object whose score is 0 or below ``min_score``, which is left out unless it is the first. A further object is left
    out, too, if the box of its patches overlaps that of an object that was kept by an intersection over union of
    `lostreg.defaults.OVERLAP` or more; its patches leave all the same.

    Args:
        objects: what LOST found, with K biases an image.
        k_patches: how many patches of lowest degree may join a seed, at least 1.
        max_objects: at least 1.
        min_score: in [0, 1].

    Returns:
        One `Found` an image, with one object at least.
    """
    first = objects.best()
    found = _split(first)
    if max_objects > 1:
        _find_further(found, _Rest.after(objects, first), k_patches, max_objects - 1, min_score)
    return found


def _find_further(found: list[Found], rest: "_Rest", k_patches: int, rounds: int, min_score: float) -> None:
    """Look in all images that may hold more, round after round, and add what is found."""
    going = list(range(len(found)))
    latest = found
    for _ in range(rounds):
        left = rest.among.any(dim=1).tolist()
        stays = [place for place, one in enumerate(latest) if one.is_at_least(min_score) and left[place]]
        if not stays:
            return
        going, rest = [going[place] for place in stays], rest.select(stays)
        result = rest.search(k_patches).best()
        rest.remove(result.masks)
        latest = _split(result)
        for image, one in zip(going, latest, strict=True):
            if one.is_at_least(min_score) and pairwise_iou(one.xyxy, found[image].xyxy).max() < OVERLAP:
                found[image] = found[image].joined(one)


class _Rest:
    """The graphs of a batch without the patches of objects that were found.

    Args:
        features: shape (B, N, D), float32.
        grid: (h, w), rows and columns of patches.
        bias: shape (B, K), float32.
        degrees: connections of each patch to those that remain, shape (B, K, N), int64.
        among: the patches that remain, shape (B, N), bool.
    """

    def __init__(self, features: Tensor, grid: tuple[int, int], bias: Tensor, degrees: Tensor, among: Tensor) -> None:
        self.features = features
        self.grid = grid
        self.bias = bias
        self.degrees = degrees
        self.among = among

    @classmethod
    def after(cls, objects: Objects, first: LostResult) -> "_Rest":
        """What remains after the first search."""
        features, maps = objects.features, objects.maps
        bias, degrees = maps.bias.to(features.device), maps.degrees.to(features.device)
        everything = torch.ones(degrees.shape[0], degrees.shape[2], dtype=torch.bool, device=features.device)
        height, width = objects.masks.shape[2:]
        rest = cls(features, (height, width), bias, degrees, everything)
        rest.remove(first.masks)
        return rest

    def select(self, images: Sequence[int]) -> "_Rest":
        """Some of the images."""
        if len(images) == len(self.features):
            return self
        picked = torch.tensor(images, device=self.features.device)
        return _Rest(self.features[picked], self.grid, self.bias[picked], self.degrees[picked], self.among[picked])

    def remove(self, masks: Tensor) -> None:
        """Take an object out of each graph; masks (B, h, w), bool, on any device."""
        leaving = masks.flatten(1).to(self.features.device)
        with exact_float32(self.features.device):
            self.degrees = self.degrees - connections_to(self.features, leaving, -self.bias)
        self.among = self.among & ~leaving

    def search(self, k_patches: int) -> Objects:
        """LOST on what remains: at least one patch an image."""
        count = self.features.shape[1]
        # Patches that left come after all others.
        degrees = self.degrees.clamp(min=0).masked_fill(~self.among[:, None], count)
        candidates = lowest_degrees(degrees, min(k_patches, count))
        with exact_float32(self.features.device):
            masks = expand_seed(self.features, candidates, self.bias, self.among)
        finite = self.among.new_ones(len(self.features))
        maps = ObjectMaps(masks, degrees, candidates[..., 0], self.bias, finite)
        return ObjectMaps.unpack(maps.pack().cpu()).objects(self.features, self.grid)


def _split(result: LostResult) -> list[Found]:
    """The main object of each image."""
    return [
        Found(
            result.xyxy[image : image + 1].numpy(),
            result.scores[image : image + 1].numpy(),
            result.seeds[image : image + 1].numpy(),
            result.bias[image : image + 1].numpy(),
            result.masks[image : image + 1].numpy(),
            result.degrees[image].numpy(),
        )
        for image in range(len(result.xyxy))
    ]
