"""What is done with a pack of images, between pixels and outcomes: features, objects, or a look inside the backbone.

Where the device is a GPU, `start` only queues work and `finish` waits for it: a caller that finishes a pack after
starting the next keeps the device busy.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from lostreg.images.patches import PatchedPicture
from lostreg.methods.lost import Maps, prepare
from lostreg.models.backbone import Backbone
from lostreg.models.features import Wanted, feature_extractor
from lostreg.models.forward import Forward
from lostreg.models.pixels import normalised, transfer

Grid = tuple[int, int]
Method = Callable[[Sequence[Sequence[Tensor]], Sequence[Grid]], Sequence[Sequence[Maps]]]
"""Queues work on a pack: of each run of images of one grid, each of the wanted features, (B, N, D), as `prepare` gives
them, and (h, w). Gives of each run the maps of each feature that is searched."""
Outcome = TypeVar("Outcome")


class FeaturesJob:
    """The work of an `ImageStream` that stops at the features.

    Args:
        backbone: a frozen model.
        wanted: pairs of feature and layer, all from one forward.
        compiled: whether the blocks are compiled.
    """

    def __init__(self, backbone: Backbone, wanted: Wanted, *, compiled: bool = False) -> None:
        self.backbone = backbone
        self._extract = feature_extractor(backbone, wanted, compiled=compiled)

    def transfer(self, pictures: Sequence[PatchedPicture]) -> list[Tensor]:
        """Patches on the device, see `lostreg.models.pixels.transfer`."""
        return transfer(pictures, self.backbone.device)

    def forward(self, runs: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Features of all patches of a pack.

        Args:
            runs: as `transfer` gives them.
            sizes: (height, width) of each image in pixels.

        Returns:
            For each of the wanted features, shape (sum of all N, D), float32.
        """
        pixels = normalised(self.backbone, runs, sizes)
        return self._extract(pixels, [(run.shape[1], run.shape[2]) for run in runs for _ in range(len(run))])

    def start(self, pictures: Sequence[PatchedPicture]) -> list[Tensor]:
        """Queue a pack's forward."""
        return self.forward(self.transfer(pictures), [picture.size for picture in pictures])

    def finish(
        self, started: list[Tensor], pictures: Sequence[PatchedPicture]
    ) -> list[tuple[PatchedPicture, list[Tensor]]]:
        """Each image with the wanted features, (N, D) each."""
        sizes = [picture.grid[0] * picture.grid[1] for picture in pictures]
        by_image = zip(*(torch.split(packed, sizes) for packed in started), strict=True)
        return [(picture, list(features)) for picture, features in zip(pictures, by_image, strict=True)]


@dataclass(frozen=True)
class Search:
    """What a method found in a pack, on its way to the host, by runs of neighbours of equal grid.

    Attributes:
        grids: (h, w) of each run.
        features: of each run, what the method saw: one tensor (B, N, D) for each of the wanted features, on the device.
        maps: of each run, on the host: those of each feature that is searched.
        done: recorded on the device after the transfer; None where there is nothing to wait for.
    """

    grids: list[Grid]
    features: list[list[Tensor]]
    maps: Sequence[Sequence[Maps]]
    done: torch.cuda.Event | None


class ObjectsJob(Generic[Outcome]):
    """The work of an `ImageStream` that looks for objects.

    Args:
        features: what the method runs on.
        method: what looks for objects.
        normalize: whether features are L2-normalised.
        beside: how many of the wanted features, the last ones, are something else: those are left as they are.
        convert: makes outcomes of a run of pictures of equal grid and what the method's maps hold, for each of the
            features that it searched.
    """

    def __init__(
        self,
        features: FeaturesJob,
        method: Method,
        *,
        normalize: bool,
        beside: int = 0,
        convert: Callable[[list[Any], list[PatchedPicture]], list[Outcome]],
    ) -> None:
        self.features = features
        self.backbone = features.backbone
        self.method = method
        self.normalize = normalize
        self.beside = beside
        self._convert = convert

    def start(self, pictures: Sequence[PatchedPicture]) -> Search:
        """Queue a pack's work."""
        return self.search(self.features.start(pictures), [picture.grid for picture in pictures])

    def search(self, features: Sequence[Tensor], grids: Sequence[Grid]) -> Search:
        """The method on the device, and the start of the transfer of its maps to the host.

        Args:
            features: as `FeaturesJob.forward` gives them.
            grids: (h, w) of each image.
        """
        runs = [(grid, len(list(group))) for grid, group in groupby(grids)]
        sizes = [images * grid[0] * grid[1] for grid, images in runs]
        by_feature = [torch.split(packed, sizes) for packed in features]
        compared = len(by_feature) - self.beside
        batches = [
            [
                prepare(part.view(images, -1, part.shape[1]), normalize=self.normalize and place < compared)
                for place, part in enumerate(parts)
            ]
            for (_, images), *parts in zip(runs, *by_feature, strict=True)
        ]
        maps = self.method(batches, [grid for grid, _ in runs])
        on_host = [[of_feature.to_host(wait=False) for of_feature in run] for run in maps]
        done = None
        if self.backbone.device.type == "cuda":
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(torch.cuda.current_stream(self.backbone.device))
        return Search([grid for grid, _ in runs], batches, on_host, done)

    def candidates(self, search: Search) -> list[list[Any]]:
        """Wait for the maps; connected components and their scores.

        Returns:
            Of each run of neighbours of equal grid, what is found in each of the features that are searched.
        """
        if search.done is not None:
            search.done.synchronize()
        return [
            [of_feature.candidates(batch, grid) for of_feature, batch in zip(maps, features, strict=False)]
            for grid, features, maps in zip(search.grids, search.features, search.maps, strict=True)
        ]

    def finish(self, started: Search, pictures: Sequence[PatchedPicture]) -> list[Outcome]:
        """One outcome a picture, in their order."""
        outcomes: list[Outcome] = []
        beside = self._beside
        with nullcontext() if beside is None else torch.cuda.stream(beside):
            for candidates, (features, *_) in zip(self.candidates(started), started.features, strict=True):
                run = pictures[len(outcomes) : len(outcomes) + len(features)]
                outcomes += self._convert(candidates, list(run))
        if beside is not None:
            beside.synchronize()  # nothing reads the features any more: their memory may be taken
        return outcomes

    @cached_property
    def _beside(self) -> torch.cuda.Stream | None:
        """A GPU's stream for scores and further objects, which so need not wait for the pack that is queued behind."""
        device = self.backbone.device
        return torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None  # type: ignore[no-untyped-call]


class LookJob(Generic[Outcome]):
    """The work of an `ImageStream` that looks at a backbone's inside.

    Args:
        forward: of the backbone.
        look: makes one outcome an image of each image's pixels, as `Forward.start` takes them, and grids.
    """

    def __init__(
        self, forward: Forward, look: Callable[[Forward, list[Tensor], Sequence[Grid]], list[Outcome]]
    ) -> None:
        self.forward = forward
        self.backbone = forward.backbone
        self._look = look

    def start(self, pictures: Sequence[PatchedPicture]) -> list[Outcome]:
        """Look at a pack."""
        patches = transfer(pictures, self.backbone.device)
        runs = normalised(self.backbone, patches, [picture.size for picture in pictures])
        return self._look(self.forward, [image for run in runs for image in run], [one.grid for one in pictures])

    def finish(self, started: list[Outcome], pictures: Sequence[PatchedPicture]) -> list[Outcome]:
        """What was seen, one outcome a picture."""
        del pictures
        return started
