"""The smallest ViT that timm knows, with outliers at known patches: its six narrow blocks run in milliseconds."""

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from planted import Plant, cut, noise, pixels_of, plant
from safetensors.torch import save_model

from lostreg.artifacts.norms import TokenNorms, token_norms
from lostreg.inference.discoverer import Discoverer
from lostreg.models.backbone import Backbone, build_backbone, find_spec
from lostreg.models.forward import Forward

NAME = "timm:test_vit"
LAYER = 2  # that writes the outliers
UNITS = (5, 9)
# Pixels of pictures of 40 patches in all, and their outliers; the third and the last have none.
SHAPES = [(48, 48), (48, 32), (32, 48), (48, 48), (30, 48), (20, 20)]
PATCHES = [(0,), (3,), (), (4, 8), (2,), ()]


@functools.cache
def small() -> Backbone:
    """Random weights, no outliers."""
    torch.manual_seed(0)
    return build_backbone(find_spec(NAME))


@functools.cache
def pictures() -> tuple[np.ndarray, ...]:
    """Random pixels, of `SHAPES`."""
    return tuple(noise(SHAPES))


@functools.cache
def world() -> Plant:
    """The model with outliers at `PATCHES` of `pictures`, whose norms are eight times those of the others or more."""
    largest = max(float(norms.output.max()) for norms in norms_of(small(), pictures()))
    return plant(small(), pictures(), PATCHES, layer=LAYER, units=UNITS, norm=8 * largest)


def norms_of(backbone: Backbone, images: Sequence[np.ndarray]) -> list[TokenNorms]:
    found = cut(images, backbone)
    return token_norms(Forward(backbone), pixels_of(found, backbone), [picture.grid for picture in found])


def discoverer(backbone: Backbone, **options: Any) -> Discoverer:
    return Discoverer(backbone, device="cpu", **options)


def save_weights(backbone: Backbone, path: Path) -> Path:
    """A checkpoint in timm's naming, for ``--weights``."""
    save_model(backbone.model, str(path))
    return path


def write_images(folder: Path, images: Sequence[np.ndarray]) -> list[Path]:
    """PNG files ``im00``, ``im01`` and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"im{number:02}.png" for number in range(len(images))]
    for path, pixels in zip(paths, images, strict=True):
        Image.fromarray(pixels).save(path)
    return paths


def strict_json(text: str) -> Any:
    """JSON without the NaN and infinities that Python's reader and writer let through."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)
