"""Models with outliers that were planted: known neurons, layer, patches and norm."""

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lostreg.images.decode import Picture
from lostreg.images.patches import PatchedPicture, cut_patches
from lostreg.models.backbone import Backbone
from lostreg.models.forward import Forward
from lostreg.models.pixels import normalised, transfer

_FIRE = 10.0  # what planted units are driven by: at planted patches by as much, elsewhere by as much the other way


@dataclass(frozen=True)
class Plant:
    """A model whose hidden units write outliers at some patches of some images.

    Attributes:
        backbone: with the plant.
        plain: the same without: the units fire all the same, and write nothing.
        neurons: pairs of layer and unit.
        patches: of each image, the planted patches, as row-major indices.
        fire: the units' activation at planted patches; elsewhere it is less than a hundredth of it.
    """

    backbone: Backbone
    plain: Backbone
    neurons: tuple[tuple[int, int], ...]
    patches: tuple[tuple[int, ...], ...]
    fire: float


def noise(shapes: Sequence[tuple[int, int]], seed: int = 0) -> list[np.ndarray]:
    """Pictures of random pixels, of these heights and widths: no two of their patches are alike."""
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]


@torch.no_grad()
def plant(
    backbone: Backbone,
    images: Sequence[np.ndarray],
    patches: Sequence[Sequence[int]],
    *,
    layer: int,
    units: Sequence[int],
    norm: float,
) -> Plant:
    """Plant outliers in a copy of a model.

    Args:
        backbone: with random weights; its blocks must add their MLPs' outputs without a norm.
        images: RGB (h, w, 3), uint8, of patches that differ, see `noise`: what is solved for here is badly conditioned
            otherwise. All their tokens together must be fewer than the model is wide.
        patches: of each image, those that become outliers.
        layer: whose MLP writes them.
        units: its hidden units that do.
        norm: of what is added to the planted patches.
    """
    inputs, spans = _inputs(backbone, images, layer, "fc1")
    targets = torch.full((len(inputs),), -_FIRE, dtype=torch.float64)
    for span, chosen in zip(spans, patches, strict=True):
        targets[[span.start + backbone.prefix_tokens + patch for patch in chosen]] = _FIRE
    drive = torch.linalg.lstsq(inputs, targets[:, None], driver="gelsd").solution[:, 0]
    planted = dataclasses.replace(backbone, model=copy.deepcopy(backbone.model))
    generator = torch.Generator().manual_seed(layer)
    direction = torch.randn(int(backbone.model.embed_dim), generator=generator)  # type: ignore[call-overload]
    block: Any = planted.model.blocks[layer]  # type: ignore[index]
    fires = [_connect(block.mlp, unit, drive) for unit in units]
    fire = fires[0]  # they are all alike
    update = direction / direction.norm() * norm / (len(units) * _layer_scale(block))
    for unit in units:
        block.mlp.fc2.weight[:, unit] = update / fire
    hidden, _ = _inputs(planted, images, layer, "fc2")
    expected = torch.where(targets > 0, fire, 0.0)[:, None]
    assert (hidden[:, list(units)] - expected).abs().max() < 0.01 * fire, "alike patches, or more tokens than channels"
    neurons = tuple((layer, unit) for unit in units)
    return Plant(planted, silenced(planted, neurons), neurons, tuple(tuple(sorted(each)) for each in patches), fire)


@torch.no_grad()
def silenced(backbone: Backbone, neurons: Sequence[tuple[int, int]]) -> Backbone:
    """A copy of a model whose hidden units, pairs of layer and unit, write nothing."""
    plain = dataclasses.replace(backbone, model=copy.deepcopy(backbone.model))
    for layer, unit in neurons:
        plain.model.blocks[layer].mlp.fc2.weight[:, unit] = 0  # type: ignore[index, union-attr]
    return plain


@torch.no_grad()
def deafened(backbone: Backbone) -> Backbone:
    """A copy of a model in which no token learns of another: attention adds the same to all of them."""
    deaf = dataclasses.replace(backbone, model=copy.deepcopy(backbone.model))
    for block in deaf.model.blocks:  # type: ignore[union-attr]
        block.attn.proj.weight[:] = 0
    return deaf


def _inputs(backbone: Backbone, images: Sequence[np.ndarray], layer: int, which: str) -> tuple[Tensor, list[slice]]:
    """What a linear layer of a block's MLP reads, of all tokens of all images, float64, and where each image's lie."""
    seen: list[Tensor] = []
    mlp = backbone.model.blocks[layer].mlp  # type: ignore[index, union-attr]
    module = mlp if which == "fc1" else mlp.fc2
    hook = module.register_forward_pre_hook(lambda module, given: seen.append(given[0].detach().double()))
    pictures = cut(images, backbone)
    forward = Forward(backbone)
    walk = forward.start(pixels_of(pictures, backbone), [picture.grid for picture in pictures])
    for _ in range(layer + 1):
        forward.advance(walk)
    hook.remove()
    return torch.cat(seen), list(walk.packing.spans)


def _connect(mlp: Any, unit: int, drive: Tensor) -> float:
    """Let a hidden unit fire where the drive says, and return its activation there."""
    gated = hasattr(mlp, "fc1_g") or mlp.fc1.out_features != mlp.fc2.in_features
    if not gated:
        _set(mlp.fc1, unit, drive)
        return float(mlp.act(torch.tensor(_FIRE)))
    if hasattr(mlp, "fc1_g"):
        _set(mlp.fc1_g, unit, drive)
        _set(mlp.fc1_x, unit, drive)
    else:
        _set(mlp.fc1, unit, drive)
        _set(mlp.fc1, unit + mlp.fc2.in_features, drive)
    return float(mlp.act(torch.tensor(_FIRE))) * _FIRE


def _set(linear: nn.Linear, row: int, weight: Tensor) -> None:
    linear.weight[row] = weight.to(linear.weight.dtype)
    if linear.bias is not None:
        linear.bias[row] = 0


def _layer_scale(block: Any) -> Tensor | float:
    if hasattr(block, "gamma_2"):
        return 1.0 if block.gamma_2 is None else block.gamma_2
    return block.ls2.gamma if hasattr(block.ls2, "gamma") else 1.0


def cut(images: Sequence[np.ndarray], backbone: Backbone) -> list[PatchedPicture]:
    """Images cut into the backbone's patches."""
    pictures = [Picture(image, image.shape[1], image.shape[0]) for image in images]
    return [cut_patches(picture, backbone.spec.patch_size) for picture in pictures]


def pixels_of(pictures: Sequence[PatchedPicture], backbone: Backbone) -> list[Tensor]:
    """What `Forward.start` takes, image by image."""
    patches = transfer(pictures, backbone.device)
    runs = normalised(backbone, patches, [picture.size for picture in pictures])
    return [image for run in runs for image in run]
