"""TokenCut and MaskCut against the oracle's dense solver, on scenes to check by hand, and under transformations."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from dispatch import DEVICE, fake_gpu, needs_simulated_pinning
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from random_features import CLEAR, integer_features
from reference_spectral import Cut, reference_maskcut, reference_tokencut
from safetensors.torch import load_file
from torch import Tensor

from lostreg.errors import OptionError
from lostreg.methods import similarity
from lostreg.methods.lost import Objects, prepare
from lostreg.methods.spectral import (
    MASKCUT_TAU,
    TOKENCUT_TAU,
    _Graph,
    maskcut_objects,
    spectral_maps,
    tokencut_objects,
)

pytestmark = pytest.mark.usefixtures("one_thread")
Grid = tuple[int, int]
taus = st.sampled_from([-0.35, 0.1, 0.2, 0.65])


def tokencut(features: Tensor, grid: Grid, tau: float = TOKENCUT_TAU) -> list[Objects]:
    unit = prepare(features, normalize=True)
    return tokencut_objects(spectral_maps(unit, grid, tau).to_host(), unit, grid)


def maskcut(
    features: Tensor, grid: Grid, tau: float = MASKCUT_TAU, most: int = 1, least_score: float = 0.0
) -> list[Objects]:
    unit = prepare(features, normalize=True)
    return maskcut_objects(spectral_maps(unit, grid, tau).to_host(), unit, grid, most, least_score)


def assert_same(objects: Objects, expected: list[Cut], tau: float) -> None:
    assert [tuple(box) for box in objects.xyxy.tolist()] == [cut.box for cut in expected]
    np.testing.assert_array_equal(objects.masks, [cut.mask for cut in expected])
    assert [tuple(seed) for seed in objects.seeds.tolist()] == [cut.seed for cut in expected]
    np.testing.assert_allclose(objects.scores, [cut.score for cut in expected], atol=1e-4)
    np.testing.assert_array_equal(objects.heat, expected[0].degrees)
    np.testing.assert_allclose(objects.biases, -tau)


def scene(kinds: np.ndarray) -> tuple[Tensor, Grid]:
    """Features that are one-hot for each kind of patch, and the grid."""
    return torch.eye(int(kinds.max()) + 1)[torch.from_numpy(kinds.ravel())][None], (kinds.shape[0], kinds.shape[1])


def three_squares() -> tuple[Tensor, Grid]:
    kinds = np.zeros((12, 14), dtype=int)
    kinds[1:3, 1:3] = 1
    kinds[2:6, 8:13] = 2
    kinds[7:10, 2:5] = 3
    return scene(kinds)


def real_features(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + 0.2


@given(integer_features(), taus)
@settings(deadline=None, max_examples=50)
def test_tokencut_equals_the_oracle(case: tuple[np.ndarray, Grid], tau: float) -> None:
    features, grid = case
    expected = [reference_tokencut(image, grid, tau) for image in features]
    for objects, cut in zip(tokencut(torch.from_numpy(features), grid, tau), expected, strict=True):
        assert len(objects.xyxy) == 1
        if cut.margin > CLEAR:
            assert_same(objects, [cut], tau)


@given(integer_features(), taus, st.integers(1, 5), st.sampled_from([0.0, 0.3]))
@settings(deadline=None, max_examples=50)
def test_maskcut_equals_the_oracle(case: tuple[np.ndarray, Grid], tau: float, most: int, least_score: float) -> None:
    features, grid = case
    found = maskcut(torch.from_numpy(features), grid, tau, most, least_score)
    for objects, image in zip(found, features, strict=True):
        expected = reference_maskcut(image, grid, tau, most, least_score)
        assert 1 <= len(objects.xyxy) <= most
        assert objects.masks.sum(axis=0).max() == 1
        if min(cut.margin for cut in expected) > CLEAR and abs(expected[-1].score - least_score) > 1e-4:
            assert_same(objects, expected, tau)


@pytest.mark.parametrize("tau", [0.1, 0.2, 0.3])
def test_noisy_scenes_give_the_oracles_objects(tau: float) -> None:
    features, grid = three_squares()
    features = features + 0.35 * torch.randn(4, 168, 4, generator=torch.Generator().manual_seed(3))
    one, several = tokencut(features, grid, tau), maskcut(features, grid, tau, 3)
    for place, image in enumerate(features.numpy()):
        assert one[place].xyxy.tolist() == [list(reference_tokencut(image, grid, tau).box)]
        assert several[place].xyxy.tolist() == [list(cut.box) for cut in reference_maskcut(image, grid, tau, 3)]


def test_real_dinov2_features_give_the_oracles_object(shared_data) -> None:
    (features,) = load_file(shared_data / "dinov2-reference" / "dinov2_vits14_patch_tokens.safetensors").values()
    features = features.float().reshape(1, 37 * 37, -1)
    expected = reference_tokencut(features[0].numpy(), (37, 37), TOKENCUT_TAU)
    (objects,) = tokencut(features, (37, 37))
    assert objects.xyxy.tolist() == [list(expected.box)]
    np.testing.assert_array_equal(objects.masks, [expected.mask])


def test_three_squares_are_cut_one_after_the_other() -> None:
    features, grid = three_squares()
    (one,) = tokencut(features, grid)
    assert one.xyxy.tolist() == [[8, 2, 13, 6]]
    (objects,) = maskcut(features, grid, most=3)
    assert objects.xyxy.tolist() == [[8, 2, 13, 6], [2, 7, 5, 10], [1, 1, 3, 3]]
    assert objects.seeds.tolist() == [[2, 8], [7, 2], [1, 1]]  # of equal patches the first
    assert objects.heat[2, 8] == 19
    assert objects.heat[0, 0] == 168 - 20 - 9 - 4 - 1
    (weak,) = maskcut(features, grid, most=3, least_score=float(objects.scores[1]) + 1e-4)
    assert weak.xyxy.tolist() == objects.xyxy[:1].tolist()


def test_a_mask_of_one_percent_is_no_further_object() -> None:
    kinds = np.zeros((12, 14), dtype=int)
    kinds[2:6, 8:13] = 1
    kinds[9, 3] = 2
    features, grid = scene(kinds)
    assert [len(maskcut(features, grid, most=most)[0].xyxy) for most in (1, 2, 9)] == [1, 1, 1]
    kinds[9, 4] = 2  # 2 of 168 are more
    features, grid = scene(kinds)
    assert maskcut(features, grid, most=9)[0].xyxy.tolist()[:2] == [[8, 2, 13, 6], [3, 9, 5, 10]]


def test_the_corner_rule_takes_the_middle_of_a_frame_whatever_the_eigenvectors_sign() -> None:
    kinds = np.ones((10, 12), dtype=int)
    kinds[1:-1, 1:-1] = 0
    features, grid = scene(kinds)
    maps = spectral_maps(features, grid, 0.2)
    for turned in (maps, replace(maps, vectors=-maps.vectors)):
        (whole,) = tokencut_objects(turned, features, grid)  # the frame is smaller, so that its values are larger
        (middle,) = maskcut_objects(turned, features, grid, 1, 0.0)
        assert whole.xyxy.tolist() == [[0, 0, 12, 10]]
        assert whole.masks.sum() == 40
        assert middle.xyxy.tolist() == [[1, 1, 11, 9]]
        assert middle.seeds.tolist() == [[1, 1]]


@given(st.integers(0, 10_000), st.sampled_from([-3.0, -1.0, 2.0**-40, 7.0]))
@settings(deadline=None, max_examples=20)
def test_sign_and_size_of_the_eigenvector_do_not_matter(seed: int, factor: float) -> None:
    features = prepare(real_features((2, 42, 5), seed), normalize=True)
    maps = spectral_maps(features, (6, 7), 0.2)
    other = replace(maps, vectors=maps.vectors * factor)
    for cut in (
        lambda maps: tokencut_objects(maps, features, (6, 7)),
        lambda maps: maskcut_objects(maps, features, (6, 7), 3, 0.0),
    ):
        for plain, turned in zip(cut(maps), cut(other), strict=True):
            np.testing.assert_array_equal(plain.masks, turned.masks)
            np.testing.assert_array_equal(plain.seeds, turned.seeds)


@pytest.mark.parametrize(("shape", "grid"), [((2, 30, 4), (5, 6)), ((1, 1, 4), (1, 1))])
def test_equal_features_have_no_cut_and_are_one_object_with_score_zero(shape: tuple[int, ...], grid: Grid) -> None:
    for found in (tokencut(torch.full(shape, 0.3), grid), maskcut(torch.full(shape, 0.3), grid, most=3)):
        for objects in found:
            assert objects.xyxy.tolist() == [[0, 0, grid[1], grid[0]]]
            assert objects.scores.tolist() == [0]
            assert objects.seeds.tolist() == [[0, 0]]


def test_similar_patches_all_over_have_no_cut() -> None:
    """As on the keys of DINOv2, whose cosines are all above 0.2."""
    features = real_features((1, 300, 8)) + 4
    maps = spectral_maps(prepare(features, normalize=True), (15, 20), 0.2)
    assert not maps.vectors.any()
    assert maps.degrees.unique().tolist() == [299]
    assert tokencut(features, (15, 20))[0].xyxy.tolist() == [[0, 0, 20, 15]]


def test_patches_of_which_no_two_are_similar_are_no_error() -> None:
    features = torch.eye(30)[None]
    for objects in (*tokencut(features, (5, 6)), *maskcut(features, (5, 6), most=4)):
        assert objects.masks[0].any()
        assert np.isfinite(objects.scores).all()
    blank = torch.zeros(1, 30, 4)
    assert np.isfinite(tokencut(blank, (5, 6))[0].scores).all()
    assert tokencut(blank, (5, 6))[0].heat.max() == 0


@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize("rows", [7, 64])
def test_vectors_are_the_same_to_the_bit_alone_in_a_batch_and_in_other_tiles(
    keeps: bool, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = prepare(real_features((5, 300, 16)), normalize=True)
    together = spectral_maps(features, (15, 20), 0.2)
    for image in range(5):
        alone = spectral_maps(features[image : image + 1], (15, 20), 0.2)
        assert torch.equal(alone.vectors[0], together.vectors[image])
    monkeypatch.setattr(similarity, "_KEPT_ELEMENTS", {"cpu": 2 * 300**2 if keeps else 0})
    monkeypatch.setattr(similarity, "_BLOCK_ELEMENTS", {"cpu": 0})
    monkeypatch.setattr(similarity, "_LEAST_ROWS", rows)
    tiled = spectral_maps(features, (15, 20), 0.2)
    assert torch.equal(tiled.vectors, together.vectors)
    assert torch.equal(tiled.degrees, together.degrees)


@given(st.integers(0, 10_000), st.permutations(range(3)))
@settings(deadline=None, max_examples=10)
def test_neighbours_in_the_batch_change_no_object(seed: int, order: list[int]) -> None:
    features = real_features((3, 42, 5), seed)
    moved = maskcut(features[order], (6, 7), most=3)
    for place, image in enumerate(order):
        (alone,) = maskcut(features[image : image + 1], (6, 7), most=3)
        np.testing.assert_array_equal(moved[place].masks, alone.masks)
        np.testing.assert_allclose(moved[place].scores, alone.scores, atol=1e-6)


@given(st.integers(0, 10_000), st.sampled_from([(1,), (2,), (1, 2)]))
@settings(deadline=None, max_examples=20)
def test_a_mirrored_image_has_the_mirrored_object(seed: int, axes: tuple[int, ...]) -> None:
    features = real_features((1, 42, 8), seed)
    assume(reference_maskcut(features[0].numpy(), (6, 7), 0.15)[0].margin > CLEAR)
    flipped = features.view(1, 6, 7, -1).flip(axes).reshape(features.shape)
    (plain,), (mirrored,) = maskcut(features, (6, 7)), maskcut(flipped, (6, 7))
    np.testing.assert_array_equal(np.flip(mirrored.masks, axes), plain.masks)
    np.testing.assert_array_equal(np.flip(mirrored.heat, [axis - 1 for axis in axes]), plain.heat)


@given(st.integers(0, 10_000), st.integers(1, 90), st.integers(-30, 30))
@settings(deadline=None, max_examples=20)
def test_products_with_the_graph_are_those_of_the_dense_matrix(seed: int, count: int, exponent: int) -> None:
    features = prepare(real_features((2, count, 4), seed), normalize=True)
    vectors = real_features((2, count), seed + 1).double() * 2.0**exponent
    vectors[0, 0] = 0
    dense = (features @ features.mT > 0.2).double() @ vectors[..., None]
    graph = _Graph(features, 0.2)
    for _ in range(2):  # tiles that are kept are not marked twice
        torch.testing.assert_close(graph.times(vectors), dense.squeeze(2), rtol=0, atol=2e-9 * 2.0**exponent)


@needs_simulated_pinning
def test_nothing_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_gpu(monkeypatch) as dispatched:
        features = torch.zeros(2, 20, 4, device=DEVICE)
        dispatched.take()
        maps = spectral_maps(features, (4, 5), 0.2)
        launches, waits = dispatched.take()
    assert maps.vectors.device == DEVICE
    assert launches
    assert not waits


@needs_simulated_pinning
def test_objects_mix_no_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_gpu(monkeypatch):
        features = torch.zeros(2, 20, 4, device=DEVICE)
        maps = spectral_maps(features, (4, 5), 0.2).to_host(wait=False)
        assert len(tokencut_objects(maps, features, (4, 5))) == 2
        assert len(maskcut_objects(maps, features, (4, 5), 3, 0.0)) == 2


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_one_feature_of_one_image_that_is_not_finite_is_noticed(value: float) -> None:
    features = prepare(real_features((3, 30, 8)), normalize=True)
    plain = spectral_maps(features, (5, 6), 0.2)
    features[2, 29, 7] = value
    maps = spectral_maps(features, (5, 6), 0.2)
    assert maps.finite.tolist() == [True, True, False]
    assert torch.equal(maps.vectors[:2], plain.vectors[:2])
    for cut in (
        lambda: tokencut_objects(maps, features, (5, 6)),
        lambda: maskcut_objects(maps, features, (5, 6), 2, 0),
    ):
        with pytest.raises(OptionError, match="features must be finite"):
            cut()


def test_features_must_fit_the_grid_and_an_empty_batch_is_no_error() -> None:
    with pytest.raises(OptionError, match=r"N = 5 \* 5 > 0, not \(1, 30, 4\)"):
        spectral_maps(torch.ones(1, 30, 4), (5, 5), 0.2)
    assert tokencut(torch.ones(0, 30, 4), (5, 6)) == []
    assert maskcut(torch.ones(0, 30, 4), (5, 6), most=3) == []
