"""The methods that look for objects, by name: how an `ObjectsJob` runs them, and what comes of their maps."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lostreg.inference.jobs import Grid, Method
from lostreg.inference.options import ResolvedOptions
from lostreg.methods.dinoseg import attended_maps, dinoseg_objects
from lostreg.methods.learned import LinearObjectness
from lostreg.methods.lost import Bias, Candidates, Lost, LostMaps, Objects, lost_maps, to_host
from lostreg.methods.multi_object import find_objects
from lostreg.methods.parts import find_parts, labels_of_pack
from lostreg.methods.spectral import (
    MASKCUT_TAU,
    TOKENCUT_TAU,
    maskcut_objects,
    spectral_maps,
    tokencut_objects,
)
from lostreg.models.features import Wanted
from lostreg.models.table import Feature

TOKENS: Final[tuple[Feature, int]] = ("out", -1)  # what an objectness reads


@dataclass(frozen=True)
class PartsFound:
    """What `parts` chooses its objects from, for a batch of images of one grid.

    Attributes:
        candidates: what LOST found at each bias.
        labels: clusters of patches, shape (B, 3 or 5, N), uint8.
        probabilities: how likely each patch is part of an object, shape (B, N), if that was learned.
        tokens: output tokens of the last layer, shape (B, N, D), on the device, where they were wanted.
    """

    candidates: Candidates
    labels: NDArray[np.uint8]
    probabilities: NDArray[np.float32] | None
    tokens: Tensor | None


@dataclass(frozen=True)
class PartsMaps:
    """What `parts` computes where the features are: see `PartsFound`."""

    lost: LostMaps
    labels: Tensor
    probabilities: Tensor | None
    tokens: Tensor | None

    def to_host(self, *, wait: bool = True) -> "PartsMaps":
        """The same on the CPU but for the tokens; see `LostMaps.to_host`."""
        small = to_host(replace(self, tokens=None), wait=wait)
        return replace(small, lost=self.lost.to_host(wait=wait), tokens=self.tokens)

    def candidates(self, features: Tensor, grid: Grid) -> PartsFound:
        """What maps on the CPU hold; see `LostMaps.candidates`."""
        chances = None if self.probabilities is None else self.probabilities.numpy()
        return PartsFound(self.lost.candidates(features, grid), self.labels.numpy(), chances, self.tokens)


@dataclass(frozen=True)
class Parts:
    """Parts beside LOST's trials, see `lostreg.methods.parts`.

    Attributes:
        bias: of LOST's trials.
        k_patches: as for `lost_boxes`.
        head: what a collection taught, if it ranks the candidates.
        several: whether several objects are wanted.
    """

    bias: Bias
    k_patches: int
    head: LinearObjectness | None = None
    several: bool = False

    def search(self, runs: Sequence[Sequence[Tensor]], grids: Sequence[Grid]) -> list[list[PartsMaps]]:
        """Queue the work on normalised features and, behind them, the output tokens of the last layer if wanted."""
        maps = []
        clusters = labels_of_pack([features for features, *_ in runs], several=self.several)
        for (features, *rest), labels, grid in zip(runs, clusters, grids, strict=True):
            tokens = rest[0] if rest else None
            chances = None if self.head is None or tokens is None else self.head.probabilities(tokens)
            lost = lost_maps(features, grid, self.bias, self.k_patches)
            maps.append([PartsMaps(lost, labels, chances, tokens)])
        return maps


@dataclass(frozen=True)
class Found:
    """What a method that leaves all to the end chooses its objects from, for a batch of images of one grid."""

    maps: Any
    features: Tensor
    grid: Grid


@dataclass(frozen=True)
class Kept:
    """Maps of such a method, `SpectralMaps` or `AttendedMaps`, as a job takes them."""

    maps: Any

    def to_host(self, *, wait: bool = True) -> "Kept":
        """The same on the CPU, see `lostreg.methods.lost.to_host`."""
        return Kept(self.maps.to_host(wait=wait))

    def candidates(self, features: Tensor, grid: Grid) -> Found:
        """Nothing is chosen yet: how many objects, the options say."""
        return Found(self.maps, features, grid)


@dataclass(frozen=True)
class Cut:
    """A normalised cut of the graph of patches, see `lostreg.methods.spectral`.

    Attributes:
        tau: the cosine above which two patches are similar.
    """

    tau: float

    def search(self, runs: Sequence[Sequence[Tensor]], grids: Sequence[Grid]) -> list[list[Kept]]:
        """Queue the work on normalised features."""
        return [[Kept(spectral_maps(run[0], grid, self.tau))] for run, grid in zip(runs, grids, strict=True)]


@dataclass(frozen=True)
class DinoSeg:
    """Where the CLS token looks, see `lostreg.methods.dinoseg`."""

    def search(self, runs: Sequence[Sequence[Tensor]], grids: Sequence[Grid]) -> list[list[Kept]]:
        """Queue the work on the attention of the heads, which stands behind the features."""
        return [[Kept(attended_maps(run[1].mT, grid))] for run, grid in zip(runs, grids, strict=True)]


@dataclass(frozen=True)
class Row:
    """A method.

    Attributes:
        make: the method with its options, for features on a device.
        objects: one `Objects` an image of what its maps hold.
    """

    make: Callable[[ResolvedOptions, torch.device], Method]
    objects: Callable[[Any, ResolvedOptions], list[Objects]]


def _parts(options: ResolvedOptions, device: torch.device) -> Parts:
    head = None if options.objectness is None else options.objectness.head.to(device)
    return Parts(options.bias, options.k_patches, head, options.max_objects > 1)


def _objects_of_parts(found: PartsFound, options: ResolvedOptions) -> list[Objects]:
    return find_parts(found.candidates, found.labels, options.max_objects, options.min_score, found.probabilities)


METHODS: Final = {
    "lost": Row(
        lambda options, _: Lost(options.bias, options.k_patches),
        lambda found, options: find_objects(found, options.k_patches, options.max_objects, options.min_score),
    ),
    "parts": Row(_parts, _objects_of_parts),
    "tokencut": Row(
        lambda *_: Cut(TOKENCUT_TAU), lambda found, _: tokencut_objects(found.maps, found.features, found.grid)
    ),
    "maskcut": Row(
        lambda *_: Cut(MASKCUT_TAU),
        lambda found, options: maskcut_objects(
            found.maps, found.features, found.grid, options.max_objects, options.min_score
        ),
    ),
    "dinoseg": Row(lambda *_: DinoSeg(), lambda found, _: dinoseg_objects(found.maps, found.features, found.grid)),
}


def wanted_features(options: ResolvedOptions) -> Wanted:
    """What the method reads: the feature that is compared first."""
    feature: tuple[Feature, int] = (options.feature, options.layer)
    if options.method == "dinoseg":
        return [feature, ("cls", options.layer)]
    return [feature, *([TOKENS] if options.objectness is not None else [])]
