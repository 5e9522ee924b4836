"""Patch features: queries, keys, values or output tokens of any layer, and no more forward than that needs.

The model is walked block by block instead of hooked, so nothing is left behind on it and nothing after the
wanted tensor is computed.

What is returned, for every supported architecture:

* ``q``, ``k``, ``v``: the projections of the layer's attention, heads side by side, after the query and key
  norms where the model has them (they are part of what the model compares), and before rotary embedding (which
  would mix the place of a patch into its content).
* ``out``: the tokens that leave the block. For the last layer, after the model's final norm, where it has one before
  its pooling: what timm's ``forward_features`` returns.
"""

from collections.abc import Sequence
from typing import Any, Final, cast

import torch
from timm.models.eva import Eva, EvaAttention, EvaBlockPostNorm
from timm.models.vision_transformer import ResPostBlock
from torch import Tensor, nn
from torch.nn import functional

from lostreg.backbone_table import FEATURES, Feature, Interpolation
from lostreg.backbones import Backbone
from lostreg.errors import OptionError

_PROJECTED: Final[tuple[Feature, ...]] = ("q", "k", "v")


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
def collect_features(backbone: Backbone, images: Tensor, wanted: Sequence[tuple[Feature, int]]) -> list[Tensor]:
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
    pairs = [(_check_feature(feature), resolve_layer(backbone, layer)) for feature, layer in wanted]
    if not pairs:
        raise OptionError("expected at least one pair of feature and layer")
    _check_images(backbone, images)
    tokens, ropes = _embed(backbone, images.to(backbone.device, backbone.dtype))
    found: dict[tuple[Feature, int], Tensor] = {}
    last = max(layer for _, layer in pairs)
    for layer, block in enumerate(list(cast("nn.Sequential", backbone.model.blocks))[: last + 1]):
        for feature in _PROJECTED:
            if (feature, layer) in pairs:
                found[feature, layer] = _project(block, tokens, feature)
        if layer == last and ("out", layer) not in pairs:
            break
        tokens = _run_block(block, tokens, ropes[layer])
        if ("out", layer) in pairs:
            final = layer == backbone.depth - 1
            found["out", layer] = cast("nn.Module", backbone.model.norm)(tokens) if final else tokens
    return [found[pair][:, backbone.prefix_tokens :].float() for pair in pairs]


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


def _embed(backbone: Backbone, images: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    """Tokens before the first block, (B, prefix + N, D), and each block's rotary embedding, if any."""
    model: Any = backbone.model
    patches = model.patch_embed(images)
    if isinstance(model, Eva):
        tokens, rope = model._pos_embed(patches)
        ropes = list(rope) if model.rope_mixed and rope is not None else [rope] * backbone.depth
        return model.norm_pre(tokens), ropes
    if backbone.spec.interpolation == "antialias":
        tokens = model._pos_embed(patches)
    else:
        grid = (patches.shape[1], patches.shape[2])
        position = stretch_position_embedding(
            model.pos_embed, model.patch_embed.grid_size, grid, backbone.spec.interpolation
        )
        cls = model.cls_token.expand(len(patches), -1, -1)
        tokens = torch.cat([cls, patches.flatten(1, 2)], dim=1) + position
    return model.norm_pre(tokens), [None] * backbone.depth


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


def _run_block(block: nn.Module, tokens: Tensor, rope: Tensor | None) -> Tensor:
    return cast("Tensor", block(tokens) if rope is None else block(tokens, rope=rope))


def _project(block: Any, tokens: Tensor, feature: Feature) -> Tensor:
    """The layer's queries, keys or values for all tokens, (B, T, heads * head_dim): one slice of the projection."""
    attention = block.attn
    post_norm = isinstance(block, ResPostBlock | EvaBlockPostNorm)
    inputs = tokens if post_norm else block.norm1(tokens)
    if attention.qkv is None:
        projected = getattr(attention, f"{feature}_proj")(inputs)
    else:
        index = "qkv".index(feature)
        projected = functional.linear(
            inputs, attention.qkv.weight.chunk(3)[index], _projection_bias(attention, feature, index)
        )
    if feature == "v":
        return cast("Tensor", projected)
    norm = attention.q_norm if feature == "q" else attention.k_norm
    return cast("Tensor", norm(projected.unflatten(-1, (-1, attention.head_dim))).flatten(-2))


def _projection_bias(attention: Any, feature: Feature, index: int) -> Tensor | None:
    if isinstance(attention, EvaAttention):
        return cast("Tensor | None", getattr(attention, f"{feature}_bias"))
    bias = attention.qkv.bias
    return None if bias is None else bias.chunk(3)[index]
