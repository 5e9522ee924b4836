"""Packs through backbone and LOST against the plain way: each image padded and alone."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from conftest import disc_picture
from torch import Tensor

from lostreg.images.decode import Picture
from lostreg.images.patches import PatchedPicture, cut_patches, patch_grid
from lostreg.inference.discovery import Discovery
from lostreg.inference.jobs import Engine
from lostreg.inference.postprocess import ObjectOptions, to_discovery
from lostreg.methods.lost import Objects, lost_boxes
from lostreg.methods.multi_object import find_several
from lostreg.methods.similarity import Similarities
from lostreg.models.backbone import Backbone
from lostreg.models.features import patch_features

pytestmark = pytest.mark.usefixtures("one_thread")

# Width and height: whole patches or not, not in order of their grids, and of one grid two side by side and one apart.
SHAPES = [(150, 110), (154, 112), (28, 28), (90, 120), (60, 60), (150, 110), (1, 1)]


def pictures() -> list[Picture]:
    moved = [np.roll(disc_picture(*size), (n * 53, n * 37), axis=(0, 1)) for n, size in enumerate(SHAPES)]
    return [Picture(pixels, 2 * pixels.shape[1], 3 * pixels.shape[0]) for pixels in moved]


def padded(backbone: Backbone, pixels: np.ndarray) -> Tensor:
    """Normalised RGB, (1, 3, H, W), zeros beyond the picture."""
    rows, columns = patch_grid(pixels, 14)
    image = torch.zeros(1, 3, rows * 14, columns * 14)
    for channel, (mean, std) in enumerate(zip(backbone.mean, backbone.std, strict=True)):
        image[0, channel, : pixels.shape[0], : pixels.shape[1]] = (
            torch.from_numpy(pixels[:, :, channel]) / 255 - mean
        ) / std
    return image


def patched() -> list[PatchedPicture]:
    return [cut_patches(picture, 14) for picture in pictures()]


def searched(engine: Engine, features: Sequence[Tensor], pack: Sequence[PatchedPicture]) -> list[list[Objects]]:
    return engine.finish(engine.search(features, [picture.grid for picture in pack]))


def discoveries(runs: list[list[Objects]], pack: Sequence[PatchedPicture], which: int = 0) -> list[Discovery]:
    """Of each picture of a pack, what one of the engine's features has found."""
    found = [one for run in runs for one in find_several(run[which], 100, 1, 0.0)]
    return [to_discovery(one, picture, 14, ObjectOptions()) for one, picture in zip(found, pack, strict=True)]


def through(engine: Engine, pack: Sequence[PatchedPicture]) -> list[Discovery]:
    features = engine.forward(engine.transfer(pack), [picture.size for picture in pack])
    return discoveries(searched(engine, features, pack), pack)


def assert_equal(one: Discovery, other: Discovery) -> None:
    for field in dataclasses.fields(Discovery):
        np.testing.assert_array_equal(getattr(one, field.name), getattr(other, field.name))


@pytest.mark.parametrize(("feature", "layer"), [("k", 1), ("v", 0), ("out", 1)])
def test_features_of_a_pack_are_those_of_each_padded_image(backbone: Backbone, feature: str, layer: int) -> None:
    engine = Engine(backbone, [(feature, layer)], "auto", 100, normalize=True)
    pack = patched()
    (found,) = engine.forward(engine.transfer(pack), [picture.size for picture in pack])
    each = torch.split(found, [picture.grid[0] * picture.grid[1] for picture in pack])
    for picture, actual in zip(pictures(), each, strict=True):
        expected = patch_features(backbone, padded(backbone, picture.pixels), feature, layer)[0]
        assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("bias", "normalize", "k_patches"), [("auto", True, 100), (-0.5, True, 5), (-20.0, False, 100)]
)
def test_discoveries_of_a_pack_are_those_of_each_padded_image(
    backbone: Backbone, bias: float | str, normalize: bool, k_patches: int
) -> None:
    # Rounded, so that sums are exact: products for two images and for one may add in another order.
    engine = Engine(backbone, [("k", 1)], bias, k_patches, normalize=normalize)
    pack = patched()
    (features,) = engine.forward(engine.transfer(pack), [picture.size for picture in pack])
    features = (features * 16).round()
    found = discoveries(searched(engine, [features], pack), pack)
    each = torch.split(features, [picture.grid[0] * picture.grid[1] for picture in pack])
    for discovery, picture, alone in zip(found, pack, each, strict=True):
        expected = lost_boxes(alone[None], picture.grid, bias, k_patches, normalize=normalize)
        np.testing.assert_array_equal(discovery.mask, expected.masks[0].numpy())
        np.testing.assert_array_equal(discovery.degrees, expected.degrees[0].numpy())
        np.testing.assert_array_equal(discovery.seeds, expected.seeds.numpy())
        np.testing.assert_allclose(discovery.scores, expected.scores.numpy(), rtol=0, atol=1e-6)
        assert 0 <= discovery.scores[0] <= 1
        assert discovery.bias == pytest.approx(float(expected.bias[0]), abs=1e-6)
        limits = np.array([picture.size[1], picture.size[0]] * 2)
        box = np.minimum(expected.xyxy[0].numpy() * 14, limits) * [2, 3, 2, 3]
        np.testing.assert_array_equal(discovery.xyxy[0], box)
        assert (discovery.width, discovery.height) == (2 * picture.size[1], 3 * picture.size[0])
        assert (discovery.patch_width, discovery.patch_height) == (28, 42)


def test_an_image_is_found_the_same_wherever_it_stands_in_a_pack(backbone: Backbone) -> None:
    engine = Engine(backbone, [("k", 1)], "auto", 100, normalize=True)
    pack = patched()
    order = [3, 0, 6, 5, 2, 1, 4]
    plain, moved = through(engine, pack), through(engine, [pack[index] for index in order])
    assert len({tuple(one.xyxy[0].tolist()) for one in plain}) > 4
    for index, one in zip(order, moved, strict=True):
        np.testing.assert_array_equal(one.xyxy, plain[index].xyxy)
        np.testing.assert_array_equal(one.seeds, plain[index].seeds)


def test_a_pack_leaves_its_pictures_alone_and_can_be_run_again(backbone: Backbone) -> None:
    engine = Engine(backbone, [("k", 1)], "auto", 100, normalize=True)
    pack = patched()
    before = [picture.patches.copy() for picture in pack]
    first, second = through(engine, pack), through(engine, pack)
    for picture, patches in zip(pack, before, strict=True):
        np.testing.assert_array_equal(picture.patches, patches)
    for one, other in zip(first, second, strict=True):
        assert_equal(one, other)


def test_several_features_of_one_forward_give_what_each_gives_alone(backbone: Backbone) -> None:
    wanted = [("k", 1), ("v", 0), ("out", 1)]
    pack = patched()
    engine = Engine(backbone, wanted, "auto", 100, normalize=True)
    features = engine.forward(engine.transfer(pack), [picture.size for picture in pack])
    runs = searched(engine, features, pack)
    for which, one in enumerate(wanted):
        alone = Engine(backbone, [one], "auto", 100, normalize=True)
        for found, expected in zip(discoveries(runs, pack, which), through(alone, pack), strict=True):
            assert_equal(found, expected)


def test_neighbours_of_one_grid_are_one_run(backbone: Backbone) -> None:
    def biases(similarities: Similarities) -> Tensor:
        return torch.tensor([[-0.5, -0.75, -0.875]]).repeat(similarities.batch, 1)

    engine = Engine(backbone, [("k", 1)], biases, 100, normalize=True)
    pack = [patched()[index] for index in (0, 5, 1, 2, 6)]
    features = engine.forward(engine.transfer(pack), [picture.size for picture in pack])
    search = engine.search(features, [picture.grid for picture in pack])
    assert search.grids == [(8, 11), (2, 2), (1, 1)]
    found = engine.finish(search)
    assert [run[0].masks.shape for run in found] == [(3, 3, 8, 11), (1, 3, 2, 2), (1, 3, 1, 1)]
    for batch, grid, (objects,) in zip(search.features, search.grids, found, strict=True):
        expected = lost_boxes(batch[0], grid, biases)
        assert torch.equal(objects.best().xyxy, expected.xyxy)
        assert torch.equal(objects.best().scores, expected.scores)
