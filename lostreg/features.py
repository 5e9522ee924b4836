"""Patch features: queries, keys, values or output tokens of any layer, and no more forward than that needs.

What is returned, for every supported architecture:

* ``q``, ``k``, ``v``: the projections of the layer's attention, heads side by side, after the query and key
  norms where the model has them (they are part of what the model compares), and before rotary embedding (which
  would mix the place of a patch into its content).
* ``out``: the tokens that leave the block. For the last layer, after the model's final norm, where it has one before
  its pooling: what timm's ``forward_features`` returns.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

import torch
from timm.models.eva import Eva
from torch import Tensor, nn
from torch.nn import functional

from lostreg.backbone_table import FEATURES, Feature, Interpolation
from lostreg.backbones import Backbone
from lostreg.errors import OptionError
from lostreg.transformer import BlockRunner, Packing, normed, pack_ropes, project

Wanted = Sequence[tuple[Feature, int]]

_PROJECTED: Final[tuple[Feature, ...]] = ("q", "k", "v")
_CACHED_TOKENS: Final = 1 << 15  # of position embeddings that are kept for the next images of the same grid


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
    extractor = FeatureExtractor(backbone, wanted)
    _check_images(backbone, images)
    patch = backbone.spec.patch_size
    grid = (images.shape[2] // patch, images.shape[3] // patch)
    rows = images.unfold(2, patch, patch).unfold(3, patch, patch).permute(0, 2, 3, 4, 5, 1)  # (B, h, w, p, p, 3)
    pixels = rows.reshape(len(images), grid[0] * grid[1], patch * patch * 3).to(backbone.device)
    found = extractor(list(pixels), [grid] * len(images))
    return [packed.view(len(images), -1, packed.shape[1]) for packed in found]


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
        self._run_block = BlockRunner(backbone.dtype, compiled=compiled)
        self._frames: OrderedDict[tuple[int, int], _Frame] = OrderedDict()

    @torch.no_grad()
    def __call__(self, pixels: Iterable[Tensor], grids: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Run the model as far as the last of the wanted features.

        Args:
            pixels: normalised pixels of each image's patches, row by row, shape (N, patch * patch * 3): in a patch
                row by row too, and of a pixel red, green, blue. On the model's device. Taken one after the other.
            grids: (h, w) of each image; N = h * w.

        Returns:
            One tensor a pair, in the order of ``wanted``: shape (sum of all N, D), float32, the images' patches one
            after the other, prefix tokens dropped.
        """
        prefix = self.backbone.prefix_tokens
        packing = Packing(tuple(prefix + rows * columns for rows, columns in grids), self.backbone.device)
        tokens, ropes = self._embed(pixels, grids, packing)
        found: dict[tuple[Feature, int], Tensor] = {}
        for layer, block in enumerate(list(cast("nn.Sequential", self.backbone.model.blocks))[: self._last + 1]):
            for feature in _PROJECTED:
                if (feature, layer) in self._pairs:
                    projected = project(block, tokens, feature, self.backbone.dtype)
                    found[feature, layer] = _patches_of(projected, packing, prefix)
            if layer == self._last and ("out", layer) not in self._pairs:
                break
            self._run_block(block, tokens, packing, ropes[layer])
            if ("out", layer) in self._pairs:
                found["out", layer] = _patches_of(self._final_norm(tokens, layer), packing, prefix)
        return [found[pair] for pair in self._pairs]

    def _final_norm(self, tokens: Tensor, layer: int) -> Tensor:
        if layer < self.backbone.depth - 1:
            return tokens
        return normed(cast("nn.Module", self.backbone.model.norm), tokens, torch.float32)

    def _embed(
        self, pixels: Iterable[Tensor], grids: Sequence[tuple[int, int]], packing: Packing
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Tokens before the first block, (T, D) in float32, and each block's rotary embedding, if any."""
        model: Any = self.backbone.model
        prefix, dtype = self.backbone.prefix_tokens, self.backbone.dtype
        embedding = model.patch_embed
        weight = embedding.proj.weight.permute(0, 2, 3, 1).flatten(1)  # the convolution's, in the order of the pixels
        frames = [self._frame(grid) for grid in grids]
        tokens = torch.empty(packing.ends[-1], len(weight), device=self.backbone.device)
        for span, frame, image in zip(packing.spans, frames, pixels, strict=True):
            patches = embedding.norm(functional.linear(image.to(dtype), weight, embedding.proj.bias))
            tokens[span] = frame.tokens
            tokens[span][prefix:] += patches
        tokens = normed(model.norm_pre, tokens, torch.float32)
        if frames[0].ropes[0] is None:
            return tokens, [None] * self.backbone.depth
        if not model.rope_mixed:  # one for all blocks
            packed = pack_ropes([cast("Tensor", frame.ropes[0]) for frame in frames], prefix)
            return tokens, [packed] * self.backbone.depth
        by_layer = zip(*(cast("list[Tensor]", frame.ropes) for frame in frames), strict=True)
        return tokens, [pack_ropes(ropes, prefix) for ropes in by_layer]

    def _frame(self, grid: tuple[int, int]) -> "_Frame":
        """What an image of this grid starts from, kept for the next one of the same grid."""
        if grid in self._frames:
            self._frames.move_to_end(grid)
            return self._frames[grid]
        frame = _make_frame(self.backbone, grid)
        self._frames[grid] = frame
        while sum(len(kept.tokens) for kept in self._frames.values()) > _CACHED_TOKENS:
            self._frames.popitem(last=False)
        return frame


@dataclass(frozen=True)
class _Frame:
    """What is the same for all images of one grid.

    Attributes:
        tokens: prefix tokens and position embeddings, shape (prefix + N, D), float32: the patches are added to it.
        ropes: each block's rotary embedding of the patches, or None.
    """

    tokens: Tensor
    ropes: list[Tensor | None]


def _make_frame(backbone: Backbone, grid: tuple[int, int]) -> _Frame:
    model: Any = backbone.model
    ropes: list[Tensor | None] = [None] * backbone.depth
    if backbone.spec.interpolation != "antialias":
        position = stretch_position_embedding(
            model.pos_embed, model.patch_embed.grid_size, grid, backbone.spec.interpolation
        )
        tokens = position.clone()
        tokens[:, :1] += model.cls_token
        return _Frame(tokens[0].float(), ropes)
    # The model's own way with an image whose patches are embedded as zeros.
    tokens = model._pos_embed(torch.zeros(1, *grid, model.embed_dim, device=backbone.device, dtype=backbone.dtype))
    if isinstance(model, Eva):
        tokens, rope = tokens
        if rope is not None:
            ropes = list(rope) if model.rope_mixed else [rope] * backbone.depth
    return _Frame(tokens[0].float(), ropes)


def _patches_of(tokens: Tensor, packing: Packing, prefix: int) -> Tensor:
    """A copy of the patches' tokens, (sum of all N, D), in float32."""
    if not prefix:
        return tokens.to(torch.float32, copy=True)
    return torch.cat([tokens[span][prefix:] for span in packing.spans]).float()


def _check_feature(feature: Feature) -> Feature:
    if feature not in FEATURES:
        raise OptionError(f"feature must be one of {', '.join(FEATURES)}, not '{feature}'")
    return feature


def resolve_layer(backbone: Backbone, layer: int) -> int:
    """The block index from 0 that ``layer`` means.

    Raises:
        OptionError: if the backbone has no such layer.
    """
    depth = backbone.depth
    if not -depth <= layer < depth:
        raise OptionError(f"layer must be in [-{depth}, {depth - 1}] for {backbone.spec.name}, not {layer}")
    return layer % depth


def _check_images(backbone: Backbone, images: Tensor) -> None:
    patch = backbone.spec.patch_size
    if images.ndim != 4 or images.shape[1] != 3:
        raise OptionError(f"images must have shape (B, 3, H, W), not {tuple(images.shape)}")
    height, width = images.shape[-2:]
    if height % patch or width % patch or not (height and width):
        raise OptionError(f"height and width must be multiples of the patch size {patch}, not {height}x{width}")


def stretch_position_embedding(
    position: Tensor, source: tuple[int, int], target: tuple[int, int], interpolation: Interpolation
) -> Tensor:
    """Position embeddings for another patch grid, interpolated bicubically as the weights' release does.

    Args:
        position: embeddings of prefix and patches, shape (1, P + h0*w0, D); the P prefix ones are kept.
        source: (h0, w0), the grid that the weights were trained on.
        target: (h, w), the grid that is wanted.
        interpolation: see `Interpolation`.

    Returns:
        Shape (1, P + h*w, D), of the dtype of ``position``.
    """
    if source == target:
        return position
    count = source[0] * source[1]
    prefix, patches = position[:, :-count], position[:, -count:]
    image = patches.float().reshape(1, *source, -1).permute(0, 3, 1, 2)
    if interpolation == "offset":
        # The releases pass the factor, not the size: sample points lie where (target + 0.1) / source puts them.
        factors = [(wanted + 0.1) / had for wanted, had in zip(target, source, strict=True)]
        stretched = functional.interpolate(image, scale_factor=factors, mode="bicubic")
    else:
        stretched = functional.interpolate(image, size=target, mode="bicubic", antialias=interpolation == "antialias")
    flat = stretched.permute(0, 2, 3, 1).reshape(1, target[0] * target[1], -1)
    return torch.cat([prefix, flat.to(position.dtype)], dim=1)
