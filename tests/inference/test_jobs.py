"""Packs through backbone and LOST against the plain way: each image padded and alone."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from conftest import disc_picture
from torch import Tensor

from lostreg.images.decode import Picture
from lostreg.images.patches import PatchedPicture, cut_patches, patch_grid
from lostreg.inference.discovery import Discovery
from lostreg.inference.jobs import FeaturesJob, ObjectsJob
from lostreg.inference.options import Options
from lostreg.inference.postprocess import discoveries as as_discoveries
from lostreg.methods.lost import Bias, Candidates, Lost, find_candidates, lost_boxes
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


def job_on(
    backbone: Backbone, wanted: list[tuple[str, int]], bias: Bias, k_patches: int, *, normalize: bool
) -> ObjectsJob[Discovery]:
    return ObjectsJob(FeaturesJob(backbone, wanted), Lost(bias, k_patches), normalize=normalize, convert=convert_first)


def convert_first(candidates: list[Candidates], run: list[PatchedPicture]) -> list[Discovery]:
    return converted(candidates, run, 0)


def converted(candidates: list[Candidates], run: Sequence[PatchedPicture], which: int) -> list[Discovery]:
    return as_discoveries(candidates[which], run, 14, Options(min_score=0.0))  # type: ignore[arg-type]


def searched(job: ObjectsJob[Discovery], features: Sequence[Tensor], pack: Sequence[PatchedPicture]) -> Any:
    return job.candidates(job.search(features, [picture.grid for picture in pack]))


def discoveries(runs: list[list[Candidates]], pack: Sequence[PatchedPicture], which: int = 0) -> list[Discovery]:
    """Of each picture of a pack, what one of the job's features has found."""
    found: list[Discovery] = []
    for run in runs:
        found += converted(run, pack[len(found) : len(found) + len(run[0].masks)], which)
    return found


def through(job: ObjectsJob[Discovery], pack: Sequence[PatchedPicture]) -> list[Discovery]:
    return job.finish(job.start(pack), pack)


def assert_equal(one: Discovery, other: Discovery) -> None:
    for field in dataclasses.fields(Discovery):
        np.testing.assert_array_equal(getattr(one, field.name), getattr(other, field.name))


@pytest.mark.parametrize(("feature", "layer"), [("k", 1), ("v", 0), ("out", 1)])
def test_features_of_a_pack_are_those_of_each_padded_image(backbone: Backbone, feature: str, layer: int) -> None:
    job = job_on(backbone, [(feature, layer)], "auto", 100, normalize=True)
    pack = patched()
    (found,) = job.features.start(pack)
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
    job = job_on(backbone, [("k", 1)], bias, k_patches, normalize=normalize)
    pack = patched()
    (features,) = job.features.start(pack)
    features = (features * 16).round()
    found = discoveries(searched(job, [features], pack), pack)
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
    job = job_on(backbone, [("k", 1)], "auto", 100, normalize=True)
    pack = patched()
    order = [3, 0, 6, 5, 2, 1, 4]
    plain, moved = through(job, pack), through(job, [pack[index] for index in order])
    assert len({tuple(one.xyxy[0].tolist()) for one in plain}) > 4
    for index, one in zip(order, moved, strict=True):
        np.testing.assert_array_equal(one.xyxy, plain[index].xyxy)
        np.testing.assert_array_equal(one.seeds, plain[index].seeds)


def test_a_pack_leaves_its_pictures_alone_and_can_be_run_again(backbone: Backbone) -> None:
    job = job_on(backbone, [("k", 1)], "auto", 100, normalize=True)
    pack = patched()
    before = [picture.patches.copy() for picture in pack]
    first, second = through(job, pack), through(job, pack)
    for picture, patches in zip(pack, before, strict=True):
        np.testing.assert_array_equal(picture.patches, patches)
    for one, other in zip(first, second, strict=True):
        assert_equal(one, other)


def test_several_features_of_one_forward_give_what_each_gives_alone(backbone: Backbone) -> None:
    wanted = [("k", 1), ("v", 0), ("out", 1)]
    pack = patched()
    job = job_on(backbone, wanted, "auto", 100, normalize=True)
    features = job.features.start(pack)
    runs = searched(job, features, pack)
    for which, one in enumerate(wanted):
        alone = job_on(backbone, [one], "auto", 100, normalize=True)
        for found, expected in zip(discoveries(runs, pack, which), through(alone, pack), strict=True):
            assert_equal(found, expected)


def test_neighbours_of_one_grid_are_one_run(backbone: Backbone) -> None:
    def biases(similarities: Similarities) -> Tensor:
        return torch.tensor([[-0.5, -0.75, -0.875]]).repeat(similarities.batch, 1)

    job = job_on(backbone, [("k", 1)], biases, 100, normalize=True)
    pack = [patched()[index] for index in (0, 5, 1, 2, 6)]
    features = job.features.start(pack)
    search = job.search(features, [picture.grid for picture in pack])
    assert search.grids == [(8, 11), (2, 2), (1, 1)]
    found = job.candidates(search)
    assert [run[0].masks.shape for run in found] == [(3, 3, 8, 11), (1, 3, 2, 2), (1, 3, 1, 1)]
    for batch, grid, (candidates,) in zip(search.features, search.grids, found, strict=True):
        expected = find_candidates(batch[0], grid, biases, 100).best()
        assert torch.equal(candidates.best().xyxy, expected.xyxy)
        assert torch.equal(candidates.best().scores, expected.scores)
