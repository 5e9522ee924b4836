"""The methods that look for objects, by name: how an `ObjectsJob` runs them, and what comes of their maps."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from lostreg.inference.jobs import Grid, Method
from lostreg.inference.options import ResolvedOptions
from lostreg.methods.dinoseg import attended_maps, dinoseg_objects
from lostreg.methods.learned import LinearObjectness
from lostreg.methods.lost import Bias, Lost, LostMaps, Maps, Objects, lost_maps
from lostreg.methods.multi_object import find_objects
from lostreg.methods.objectness import Scorer, object_scores
from lostreg.methods.parts import find_parts, labels_of_pack
from lostreg.methods.spectral import (
    MASKCUT_TAU,
    TOKENCUT_TAU,
    SpectralMaps,
    maskcut_objects,
    spectral_maps,
    tokencut_objects,
)
from lostreg.models.features import Wanted
from lostreg.models.table import Feature

TOKENS: Final[tuple[Feature, int]] = ("out", -1)  # what an objectness reads


@dataclass(frozen=True)
class PartsMaps(Maps):
    """What `parts` computes where the features are, and chooses its objects from.

    Attributes:
        lost: LOST's at each bias.
        labels: clusters of patches, shape (B, 3 or 5, N), uint8.
        probabilities: how likely each patch is part of an object, shape (B, N), if that was learned.
        tokens: output tokens of the last layer, shape (B, N, D), alone in a tuple, which stays on the device; none
            where they were not wanted.
    """

    lost: LostMaps
    labels: Tensor
    probabilities: Tensor | None
    tokens: tuple[Tensor, ...]


def parts(
    bias: Bias,
    k_patches: int,
    head: LinearObjectness | None = None,
    *,
    several: bool = False,
    scorer: Scorer = object_scores,
) -> Method:
    """Parts beside LOST's trials, see `lostreg.methods.parts`.

    Args:
        bias: of LOST's trials.
        k_patches: as for `lost_boxes`.
        head: what a collection taught, if it ranks the candidates.
        several: whether several objects are wanted.
        scorer: what scores objects and parts.

    Returns:
        What takes normalised features and, behind them, the output tokens of the last layer if they are wanted.
    """

    def search(runs: Sequence[Sequence[Tensor]], grids: Sequence[Grid]) -> list[list[PartsMaps]]:
        maps = []
        clusters = labels_of_pack([features for features, *_ in runs], several=several)
        for (features, *tokens), labels, grid in zip(runs, clusters, grids, strict=True):
            chances = head.probabilities(tokens[0]) if head is not None else None
            lost = lost_maps(features, grid, bias, k_patches, scorer)
            maps.append([PartsMaps(lost, labels, chances, tuple(tokens))])
        return maps

    return search


def _by_grid(maps_of: Callable[[Sequence[Tensor], Grid], Maps]) -> Method:
    """A method that takes the images of one grid at a time."""
    return lambda runs, grids: [[maps_of(run, grid)] for run, grid in zip(runs, grids, strict=True)]


@dataclass(frozen=True)
class Row:
    """A method.

    Attributes:
        make: the method with its options, for features on a device.
        objects: one `Objects` an image of what its maps hold.
    """

    make: Callable[[ResolvedOptions, torch.device], Method]
    objects: Callable[[Any, ResolvedOptions], list[Objects]]


def _parts(options: ResolvedOptions, device: torch.device) -> Method:
    head = None if options.objectness is None else options.objectness.head.to(device)
    several = options.max_objects > 1
    return parts(options.bias, options.k_patches, head, several=several, scorer=options.scorer)


def _objects_of_parts(found: tuple[PartsMaps, Tensor, Grid], options: ResolvedOptions) -> list[Objects]:
    maps, features, grid = found
    candidates = maps.lost.candidates(features, grid)
    chances = None if maps.probabilities is None else maps.probabilities.numpy()
    return find_parts(candidates, maps.labels.numpy(), options.max_objects, options.min_score, chances)


def _objects_of_maskcut(found: tuple[SpectralMaps, Tensor, Grid], options: ResolvedOptions) -> list[Objects]:
    return maskcut_objects(*found, options.max_objects, options.min_score, options.scorer)


def _of_one_object(objects: Callable[..., list[Objects]]) -> Callable[[Any, ResolvedOptions], list[Objects]]:
    return lambda found, options: objects(*found, options.scorer)


METHODS: Final = {
    "lost": Row(
        lambda options, _: Lost(options.bias, options.k_patches, options.scorer),
        lambda found, options: find_objects(found, options.k_patches, options.max_objects, options.min_score),
    ),
    "parts": Row(_parts, _objects_of_parts),
    "tokencut": Row(
        lambda *_: _by_grid(lambda run, grid: spectral_maps(run[0], grid, TOKENCUT_TAU)),
        _of_one_object(tokencut_objects),
    ),
    "maskcut": Row(
        lambda *_: _by_grid(lambda run, grid: spectral_maps(run[0], grid, MASKCUT_TAU)),
        _objects_of_maskcut,
    ),
    "dinoseg": Row(
        lambda *_: _by_grid(lambda run, grid: attended_maps(run[1].mT, grid)),  # the heads' attention is behind them
        _of_one_object(dinoseg_objects),
    ),
}


def wanted_features(options: ResolvedOptions) -> Wanted:
    """What the method reads: the feature that is compared first."""
    feature: tuple[Feature, int] = (options.feature, options.layer)
    if options.method == "dinoseg":
        return [feature, ("cls", options.layer)]
    return [feature, *([TOKENS] if options.objectness is not None else [])]
