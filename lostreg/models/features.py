"""Patch features: queries, keys, values or output tokens of any layer, and no more forward than that needs.

What is returned, for every supported architecture:

* ``q``, ``k``, ``v``: the projections of the layer's attention, heads side by side, after the query and key
  norms where the model has them (they are part of what the model compares), and before rotary embedding (which
  would mix the place of a patch into its content).
* ``out``: the tokens that leave the block. For the last layer, after the model's final norm, where it has one before
  its pooling: what timm's ``forward_features`` returns.
"""

from collections.abc import Iterable, Sequence
from typing import Final, Literal

import torch
from torch import Tensor

from lostreg.checks import LARGEST, whole_number
from lostreg.errors import OptionError
from lostreg.models.backbone import Backbone, check_backbone
from lostreg.models.forward import Forward
from lostreg.models.own import FunctionBackbone, FunctionFeatures
from lostreg.models.table import FEATURES, Feature

Inside = Literal["cls"]
"""What methods read beside features: the attention that the layer's CLS token gives each patch, one number a head."""
Wanted = Sequence[tuple[Feature | Inside, int]]

_PROJECTED: Final[tuple[Feature, ...]] = ("q", "k", "v")


@torch.no_grad()
def patch_features(backbone: Backbone, images: Tensor, feature: Feature = "k", layer: int = -1) -> Tensor:
    """One feature vector per patch.

    Args:
        backbone: a frozen model.
        images: normalised RGB, shape (B, 3, H, W); H and W multiples of the patch size. Moved to the model's
            device and precision if need be.
        feature: ``q``, ``k``, ``v`` or ``out``.
        layer: block index from 0, or from the end when negative.

    Returns:
        Shape (B, N, D), float32, patches row by row, prefix tokens dropped; N = H/patch * W/patch.

    Raises:
        OptionError: if the feature or layer does not exist, or the images' size does not fit.

    Example:
        >>> backbone = lostreg.load_backbone("dinov2_vits14_reg")
        >>> lostreg.patch_features(backbone, torch.zeros(2, 3, 28, 42), "v", layer=-1).shape
        torch.Size([2, 6, 384])
    """
    return collect_features(backbone, images, [(feature, layer)])[0]


@torch.no_grad()
def collect_features(backbone: Backbone, images: Tensor, wanted: Wanted) -> list[Tensor]:
    """Several features of the same images from one forward, which ends where the last of them is there.

    Args:
        backbone: a frozen model.
        images: as for `patch_features`.
        wanted: pairs of feature and layer.

    Returns:
        One tensor a pair, in the order of ``wanted``, each as `patch_features` returns it.

    Raises:
        OptionError: as for `patch_features`, and if nothing is wanted.
    """
    check_backbone(backbone)
    extractor = feature_extractor(backbone, wanted)
    _check_images(backbone, images)
    patch = backbone.spec.patch_size
    grid = (images.shape[2] // patch, images.shape[3] // patch)
    rows = images.unfold(2, patch, patch).unfold(3, patch, patch).permute(0, 2, 3, 4, 5, 1)  # (B, h, w, p, p, 3)
    pixels = rows.reshape(len(images), grid[0] * grid[1], patch * patch * 3).to(backbone.device)
    if not len(images):
        raise OptionError("expected at least one image")
    found = extractor(list(pixels), [grid] * len(images))
    return [packed.view(len(images), -1, packed.shape[1]) for packed in found]


def feature_extractor(
    backbone: Backbone, wanted: Wanted, *, compiled: bool = False
) -> "FeatureExtractor | FunctionFeatures":
    """What reads features of a backbone: see `FeatureExtractor`, and `FunctionFeatures` for one without blocks."""
    if isinstance(backbone, FunctionBackbone):
        return FunctionFeatures(backbone, wanted, compiled=compiled)
    return FeatureExtractor(backbone, wanted, compiled=compiled)


class FeatureExtractor:
    """Features of images of any shapes, packed into one sequence: nothing is padded, and no shape waits for its like.

    Args:
        backbone: a frozen model.
        wanted: pairs of feature and layer.
        compiled: whether the blocks are compiled, see `BlockRunner`.

    Raises:
        OptionError: if nothing is wanted, or a feature or layer does not exist.
    """

    def __init__(self, backbone: Backbone, wanted: Wanted, *, compiled: bool = False) -> None:
        self.backbone = backbone
        self._pairs = [(_check_feature(feature), resolve_layer(backbone, layer)) for feature, layer in wanted]
        if not self._pairs:
            raise OptionError("expected at least one pair of feature and layer")
        self._last = max(layer for _, layer in self._pairs)
        self._forward = Forward(backbone, compiled=compiled)

    @torch.no_grad()
    def __call__(self, pixels: Iterable[Tensor], grids: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Run the model as far as the last of the wanted features.

        Args:
            pixels: as `Forward.start` takes them.
            grids: (h, w) of each image.

        Returns:
            One tensor a pair, in the order of ``wanted``: shape (sum of all N, D), float32, the images' patches one
            after the other, prefix tokens dropped.
        """
        walk = self._forward.start(pixels, grids)
        found: dict[tuple[Feature | Inside, int], Tensor] = {}
        for layer in range(self._last + 1):
            for feature in _PROJECTED:
                if (feature, layer) in self._pairs:
                    found[feature, layer] = walk.patches(self._forward.project(walk, feature))
            if ("cls", layer) in self._pairs:
                rows = self._forward.attention(walk, rows=1)
                found["cls", layer] = torch.cat([row[0, :, walk.prefix :].T for row in rows])
            if layer == self._last and ("out", layer) not in self._pairs:
                break
            self._forward.advance(walk)
            if ("out", layer) in self._pairs:
                found["out", layer] = walk.patches(self._forward.output(walk))
        return [found[pair] for pair in self._pairs]


def _check_feature(feature: Feature | Inside) -> Feature | Inside:
    if feature not in (*FEATURES, "cls"):
        raise OptionError(f"feature must be one of {', '.join(FEATURES)}, not '{feature}'")
    return feature


def resolve_layer(backbone: Backbone, layer: int) -> int:
    """The block index from 0 that ``layer`` means.

    Raises:
        OptionError: if the backbone has no such layer.
    """
    depth, layer = backbone.depth, whole_number(layer, "layer", least=-LARGEST)
    if not -depth <= layer < depth:
        raise OptionError(f"layer must be in [-{depth}, {depth - 1}] for {backbone.spec.name}, not {layer}")
    return layer % depth


def _check_images(backbone: Backbone, images: Tensor) -> None:
    patch = backbone.spec.patch_size
    if not isinstance(images, Tensor):
        raise OptionError(f"images must be a tensor (B, 3, H, W), not {type(images).__name__}")
    if images.ndim != 4 or images.shape[1] != 3:
        raise OptionError(f"images must have shape (B, 3, H, W), not {tuple(images.shape)}")
    height, width = images.shape[-2:]
    if height % patch or width % patch or not (height and width):
        raise OptionError(f"height and width must be multiples of the patch size {patch}, not {height}x{width}")
