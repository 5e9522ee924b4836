"""One pack of images through backbone and LOST: the four stages between pixels and discoveries.

`transfer` and `forward` and `search` only queue work where the device is a GPU; `finish` waits for its result. A caller
that finishes a pack after starting the next keeps the device busy.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lostreg.backbone_table import Feature
from lostreg.backbones import Backbone
from lostreg.features import FeatureExtractor
from lostreg.images import PatchedPicture, normalise_patches
from lostreg.lost import LostResult, ObjectMaps, object_maps
from lostreg.regions import Discovery

Grid = tuple[int, int]


@dataclass(frozen=True)
class Search:
    """What LOST found in a pack, on its way to the host.

    Attributes:
        maps: packed `ObjectMaps` of neighbouring images of equal grid, on the host.
        grids: of each image of the pack.
        done: recorded on the device after the transfer; None where there is nothing to wait for.
    """

    maps: list[Tensor]
    grids: list[Grid]
    done: torch.cuda.Event | None


class Engine:
    """A backbone and LOST's options, for packs of images of any shapes.

    Args:
        backbone: a frozen model.
        feature: ``q``, ``k``, ``v`` or ``out``.
        layer: block index.
        bias: Gram bias, or ``auto``.
        normalize: whether features are L2-normalised.
        k_patches: how many low-degree patches may join the seed.
        compiled: whether the blocks are compiled.
    """

    def __init__(
        self,
        backbone: Backbone,
        feature: Feature,
        layer: int,
        bias: float | Literal["auto"],
        k_patches: int,
        *,
        normalize: bool,
        compiled: bool = False,
    ) -> None:
        self.backbone = backbone
        self.bias = bias
        self.k_patches = k_patches
        self.normalize = normalize
        self._extract = FeatureExtractor(backbone, [(feature, layer)], compiled=compiled)

    def transfer(self, pictures: Sequence[PatchedPicture]) -> list[Tensor]:
        """Each image's patches on the device, (rows, columns, patch, patch, 3), uint8, in one transfer."""
        patches = [torch.from_numpy(picture.patches) for picture in pictures]
        device = self.backbone.device
        if device.type != "cuda":
            return [image.to(device) for image in patches]
        sizes = [image.numel() for image in patches]
        pinned = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=True)
        torch.cat([image.flatten() for image in patches], out=pinned)
        parts = torch.split(pinned.to(device, non_blocking=True), sizes)
        return [part.view(image.shape) for part, image in zip(parts, patches, strict=True)]

    def forward(self, patches: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> Tensor:
        """Features of all patches of the pack.

        Args:
            patches: as `transfer` gives them.
            sizes: (height, width) of each image in pixels.

        Returns:
            Shape (sum of all N, D), float32.
        """
        mean, std = self.backbone.mean, self.backbone.std
        pixels = (normalise_patches(image, size, mean, std) for image, size in zip(patches, sizes, strict=True))
        return self._extract(pixels, [(image.shape[0], image.shape[1]) for image in patches])[0]

    def search(self, features: Tensor, grids: Sequence[Grid]) -> Search:
        """LOST on the device, and the start of one transfer of its maps to the host.

        Args:
            features: as `forward` gives them.
            grids: (h, w) of each image.
        """
        if features.device.type == "mps":  # which lacks some of what LOST needs
            features = features.cpu()
        maps, start = [], 0
        for grid, group in groupby(grids):
            images = len(list(group))
            stop = start + images * grid[0] * grid[1]
            batch = features[start:stop].view(images, -1, features.shape[1])
            found = object_maps(batch, grid, self.bias, self.k_patches, normalize=self.normalize)
            maps.append(found.pack())
            start = stop
        if features.device.type != "cuda":
            return Search(maps, list(grids), None)
        flat = torch.cat([packed.flatten() for packed in maps])
        host = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
        host.copy_(flat, non_blocking=True)
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record(torch.cuda.current_stream(features.device))
        parts = torch.split(host, [packed.numel() for packed in maps])
        return Search([part.view(packed.shape) for part, packed in zip(parts, maps, strict=True)], list(grids), done)

    def finish(self, search: Search, pictures: Sequence[PatchedPicture]) -> list[Discovery]:
        """Wait for the maps; connected components, and boxes in pixels of the original images."""
        if search.done is not None:
            search.done.synchronize()
        remaining = iter(pictures)
        discoveries = []
        for packed, (grid, _) in zip(search.maps, groupby(search.grids), strict=True):
            result = ObjectMaps.unpack(packed).boxes(grid)
            discoveries += [
                to_discovery(result, index, next(remaining), self.backbone.spec.patch_size)
                for index in range(len(packed))
            ]
        return discoveries


def to_discovery(result: LostResult, index: int, picture: PatchedPicture, patch_size: int) -> Discovery:
    """One image's share of a batched result, with its box in pixels of the original image.

    Args:
        result: of a batch, in patches.
        index: which image of the batch.
        picture: that image.
        patch_size: side of a patch, in pixels of what was cut.
    """
    height, width = picture.size
    scale = np.array([picture.width / width, picture.height / height] * 2)
    limits = np.array([width, height] * 2)
    box = np.minimum(result.xyxy[index].numpy() * patch_size, limits) * scale
    return Discovery(
        xyxy=box[None].astype(np.float32),
        scores=_one(result.scores[index]),
        seeds=result.seeds[index : index + 1].numpy(),
        width=picture.width,
        height=picture.height,
        degrees=result.degrees[index].numpy(),
        mask=result.masks[index].numpy(),
        patch_width=float(patch_size * scale[0]),
        patch_height=float(patch_size * scale[1]),
        bias=float(result.bias[index]),
    )


def _one(value: Tensor) -> NDArray[np.float32]:
    return np.array([float(value)], dtype=np.float32)
