"""Norms of tokens at every layer, against norms taken from timm's own blocks."""

import dataclasses

import numpy as np
import pytest
import torch
from planted import cut, noise, pixels_of
from random_models import DEPTH, GRIDS, NARROW, OTHERS, SOME, built, patches, picture
from reference_forward import reference

from lostreg.artifacts.norms import TokenNorms, emergence, token_norms
from lostreg.artifacts.outliers import NormTally
from lostreg.images.patches import PatchedPicture
from lostreg.inference.jobs import LookJob
from lostreg.models.backbone import Backbone
from lostreg.models.forward import Forward
from lostreg.models.registers import RegisterNeurons

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=["dinov2_vits14", "dinov2_vits14_reg", "dinov3_vits16", "sbb_vitm16_reg", *SOME])
def backbone(request: pytest.FixtureRequest) -> Backbone:
    name, options = OTHERS.get(request.param, (request.param, NARROW))
    return built(name, **options)


def norms_of(backbone: Backbone, grids: list[tuple[int, int]]) -> list[TokenNorms]:
    pictures = [picture(backbone, grid, number) for number, grid in enumerate(grids)]
    pixels = [patches(image, backbone.spec.patch_size) for image in pictures]
    return token_norms(Forward(backbone), pixels, grids)


@pytest.mark.parametrize("count", [0, 2])
def test_norms_are_those_of_the_tokens_that_leave_timms_blocks(
    backbone: Backbone, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if count:
        neurons = ((0, 3), (DEPTH - 1, 1), (DEPTH - 1, 8))
        backbone = backbone.with_registers(RegisterNeurons(neurons, count))
    found = norms_of(backbone, GRIDS)
    for number, (grid, norms) in enumerate(zip(GRIDS, found, strict=True)):
        expected = reference(backbone, picture(backbone, grid, number), monkeypatch)
        assert norms.grid == grid
        assert norms.prefix == backbone.prefix_tokens == len(backbone.prefix_names)
        assert norms.layers.dtype == norms.final.dtype == np.float32
        by_hand = np.stack([np.sqrt(np.square(tokens.double().numpy()).sum(axis=1)) for tokens in expected.layers])
        np.testing.assert_allclose(norms.layers, by_hand, rtol=2e-5)
        np.testing.assert_allclose(norms.final, np.linalg.norm(expected.final.numpy(), axis=1), rtol=2e-5)
        np.testing.assert_array_equal(norms.output, norms.layers[-1, backbone.prefix_tokens :])
        assert norms.output.shape == (grid[0] * grid[1],)


def test_the_final_norm_is_not_part_of_the_output() -> None:
    """The register paper's outliers are gone after it."""
    backbone = built("dinov2_vits14", **NARROW)
    norms = norms_of(backbone, [(3, 5)])[0]
    assert not np.allclose(norms.final, norms.layers[-1], rtol=0.1)
    plain = dataclasses.replace(backbone, model=built("dinov2_vits14", **NARROW).model)
    plain.model.norm = torch.nn.Identity()
    norms = norms_of(plain, [(3, 5)])[0]
    np.testing.assert_array_equal(norms.final, norms.layers[-1])


def test_an_images_norms_do_not_hold_on_to_the_packs_memory(backbone: Backbone) -> None:
    for norms in norms_of(backbone, GRIDS):
        assert norms.layers.base is None
        assert norms.final.base is None


def test_a_job_looks_at_pictures_as_they_are_cut() -> None:
    backbone = built("dinov2_vits14", **NARROW)
    pictures = cut(noise([(42, 70), (28, 28), (41, 65)]), backbone)
    job = LookJob(Forward(backbone), token_norms)
    assert job.backbone is backbone
    found = job.finish(job.start(pictures), pictures)
    assert [norms.grid for norms in found] == [(3, 5), (2, 2), (3, 5)]
    for one, norms in zip(pictures, found, strict=True):
        (alone,) = token_norms(Forward(backbone), pixels_of([one], backbone), [one.grid])
        np.testing.assert_allclose(norms.layers, alone.layers, rtol=1e-5)
    assert isinstance(pictures[0], PatchedPicture)


@pytest.mark.parametrize(
    ("outliers", "layer"),
    [
        ([0, 0, 4, 4], 2),
        ([0, 1, 2, 4], 2),  # half as many
        ([0, 1, 2, 5], 3),
        ([3, 0, 0, 5], 0),  # the first, though they are fewer again later
        ([0, 0, 9, 1], 2),
        ([0, 9, 9, 0], None),
        ([1], 0),
        ([0], None),
    ],
)
def test_outliers_emerge_where_half_as_many_are_there_as_at_the_output(outliers: list[int], layer: int | None) -> None:
    tallies = []
    for count in outliers:
        tally = NormTally(100.0)
        tally.add([100.0] * count + [99.99] * (20 - count))
        tallies.append(tally)
    assert emergence(tallies, 100.0) == layer


def test_nothing_emerges_in_no_layers() -> None:
    assert emergence([], 1.0) is None
