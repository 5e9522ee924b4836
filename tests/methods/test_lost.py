"""LOST against the slow oracle, against pictures one can check by hand, and under transformations."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from random_features import CLEAR, exact_unit_vectors, integer_features
from reference_lost import Reference, flood, reference_lost
from safetensors.torch import load_file

from lostreg.errors import OptionError
from lostreg.methods.lost import (
    LostResult,
    _tensors,
    expand_seed,
    find_candidates,
    lost_boxes,
    lost_maps,
    lowest_degrees,
    prepare,
    seed_components,
)
from lostreg.methods.similarity import Similarities

# Small integers: every sum is exact in float32, so both sides must agree to the last tie.


def assert_same(result: LostResult, index: int, expected: Reference) -> None:
    np.testing.assert_array_equal(result.degrees[index].numpy(), expected.degrees)
    assert tuple(result.seeds[index].tolist()) == expected.seed
    assert tuple(result.xyxy[index].tolist()) == expected.box
    np.testing.assert_array_equal(result.masks[index].numpy(), expected.mask)
    assert float(result.scores[index]) == pytest.approx(expected.score, abs=1e-4)
    assert (float(result.scores[index]) == 0) == (expected.score == 0)
    assert float(result.bias[index]) == pytest.approx(expected.bias, abs=1e-6)


@given(integer_features(), st.integers(-6, 6), st.integers(1, 40))
@settings(deadline=None, max_examples=150)
def test_everything_equals_the_oracle_where_sums_are_exact(case, bias, k) -> None:
    features, grid = case
    result = lost_boxes(torch.from_numpy(features), grid, float(bias), k)
    for index, image in enumerate(features):
        assert_same(result, index, reference_lost(image, grid, bias, k))


@given(st.integers(0, 10_000), st.sampled_from([-0.375, -0.125, 0.0, 0.0625]))
@settings(deadline=None, max_examples=60)
def test_normalised_features_equal_the_oracle(seed, bias) -> None:
    vectors = exact_unit_vectors(seed) * 4
    result = lost_boxes(torch.from_numpy(vectors), (6, 7), bias, normalize=True)
    for index, image in enumerate(vectors):
        assert_same(result, index, reference_lost(image, (6, 7), bias, normalize=True))


@given(st.integers(0, 10_000), st.sampled_from([2, 5, 20]), st.floats(0, 3), st.sampled_from([3, 100]))
@settings(deadline=None, max_examples=60)
def test_auto_equals_the_oracle(seed, depth, offset, k) -> None:
    features = np.random.default_rng(seed).normal(offset, 1, (42, depth)).astype(np.float32)
    expected = reference_lost(features, (6, 7), "auto", k, normalize=True)
    assume(expected.margin > CLEAR)
    assert_same(lost_boxes(torch.from_numpy(features)[None], (6, 7), "auto", k), 0, expected)


@given(st.integers(0, 10_000))
@settings(deadline=None, max_examples=40)
def test_auto_equals_the_oracle_where_similarities_are_exact(seed) -> None:
    vectors = exact_unit_vectors(seed)
    result = lost_boxes(torch.from_numpy(vectors), (6, 7), "auto")
    expected = [reference_lost(image, (6, 7), "auto", normalize=True) for image in vectors]
    assume(all(one.margin > CLEAR for one in expected))
    for index, one in enumerate(expected):
        assert_same(result, index, one)


def test_random_real_features_give_the_oracles_boxes_and_seeds() -> None:
    random = np.random.default_rng(7)
    features = random.normal(0.1, 1, (8, 30 * 40, 24)).astype(np.float32)
    for normalize, bias in ((False, 0.0), (False, -2.0), (True, -0.2), (True, "auto")):
        result = lost_boxes(torch.from_numpy(features), (30, 40), bias, normalize=normalize)
        for index, image in enumerate(features):
            expected = reference_lost(image, (30, 40), bias, normalize=normalize)
            assert tuple(result.xyxy[index].tolist()) == expected.box
            assert tuple(result.seeds[index].tolist()) == expected.seed
            assert float(result.scores[index]) == pytest.approx(expected.score, abs=1e-5)


@given(integer_features(), st.data())
@settings(deadline=None, max_examples=60)
def test_several_biases_are_each_what_it_gives_alone(case, data) -> None:
    features, grid = torch.from_numpy(case[0]), case[1]
    shape = (len(features), data.draw(st.integers(1, 4)))
    biases = torch.from_numpy(data.draw(arrays(np.float32, shape, elements=st.integers(-6, 6).map(float))))
    k = data.draw(st.integers(1, 40))
    maps = lost_maps(features, grid, biases, k)
    objects = maps.candidates(features, grid)
    boxes = objects.boxes()
    assert objects.masks.shape == (*shape, *grid)
    for place in np.ndindex(shape):
        image, index = place
        alone = lost_boxes(features[image : image + 1], grid, float(biases[place]), k)
        assert torch.equal(maps.degrees[place].view(grid), alone.degrees[0])
        assert divmod(int(maps.seeds[place]), grid[1]) == tuple(alone.seeds[0].tolist())
        np.testing.assert_array_equal(objects.masks[place], alone.masks[0].numpy())
        assert boxes[place].tolist() == alone.xyxy[0].tolist()
        assert objects.scores[place] == pytest.approx(float(alone.scores[0]), abs=1e-4)
        assert objects.connected[place] == maps.masks[place][maps.seeds[place]]
        assert objects.connected[place] or objects.scores[place] == 0
    best = objects.best()
    for image, index in enumerate(objects.scores.argmax(axis=1)):
        expected = reference_lost(features[image].numpy(), grid, biases[image, index].item(), k)
        assert_same(best, image, expected)
        assert best.scores[image] == objects.scores[image].max()


@given(integer_features(), st.lists(st.integers(-6, 6), min_size=1, max_size=4))
@settings(deadline=None, max_examples=50)
def test_of_several_biases_the_oracle_keeps_the_same_object(case, biases) -> None:
    features, grid = case
    result = lost_boxes(torch.from_numpy(features), grid, torch.tensor([biases] * len(features)))
    for index, image in enumerate(features):
        # Where two objects are as clear as each other, the first is kept; rounding may make either the clearer one.
        tried = [reference_lost(image, grid, bias) for bias in biases]
        best = max(one.score for one in tried)
        rivals = [one for one in tried if one.score > best - 2e-4]
        assume(all(np.array_equal(one.mask, rivals[0].mask) for one in rivals))
        assert_same(result, index, reference_lost(image, grid, biases))


def test_a_square_object_on_an_even_background_is_boxed_exactly() -> None:
    features = torch.zeros(1, 8 * 10, 2)
    features[..., 0] = 1.0
    features.view(1, 8, 10, 2)[0, 2:5, 3:7] = torch.tensor([-0.5, 1.0])
    result = lost_boxes(features, (8, 10))
    assert result.xyxy.tolist() == [[3, 2, 7, 5]]
    assert result.seeds.tolist() == [[2, 3]]  # of equal patches the first
    # All that tells features apart is the object, which is 12 of 80 patches, and nothing of it is on the border.
    assert result.scores.tolist() == pytest.approx([(4 * 0.15 * 0.85) ** 0.25])
    assert result.degrees[0, 2, 3] == 11
    assert result.degrees[0, 0, 0] == 80 - 12 - 1


def test_of_equally_clear_objects_that_of_the_first_bias_is_kept() -> None:
    features = torch.tensor([1.0, 0.0]).repeat(1, 80, 1)
    features.view(1, 8, 10, 2)[0, 2:5, 3:7] = torch.tensor([-0.5, 1.0])
    # Similarities are 1, -0.5 and 1.25: the object is the same at both, but it is everything at 1 and nothing at -2.
    for biases, first in (([-0.25, 0.25], -0.25), ([0.25, -0.25], 0.25), ([1.0, -2.0, 0.25, 0.0, -0.25], 0.25)):
        result = lost_boxes(features, (8, 10), torch.tensor([biases]))
        assert result.xyxy.tolist() == [[3, 2, 7, 5]]
        assert result.bias.tolist() == [first]
    result = lost_boxes(features, (8, 10), torch.tensor([[-2.0, 1.0, -3.0]]))
    assert result.scores.tolist() == [0]  # one as bad as the other
    assert result.bias.tolist() == [-2]


def test_patches_that_touch_only_at_a_corner_are_not_one_object() -> None:
    features = torch.tensor([1.0, 0.0]).repeat(1, 25, 1)
    image = features.view(1, 5, 5, 2)
    image[0, 1, 1] = image[0, 2, 2] = torch.tensor([-0.5, 1.0])
    assert lost_boxes(features, (5, 5)).xyxy.tolist() == [[1, 1, 2, 2]]


def test_a_bias_that_disconnects_everything_gives_the_seed_with_score_zero() -> None:
    result = lost_boxes(torch.ones(2, 12, 3), (3, 4), bias=-100.0)
    assert result.xyxy.tolist() == [[0, 0, 1, 1]] * 2
    assert result.scores.tolist() == [0.0, 0.0]
    assert result.masks.sum().item() == 2


def test_a_bias_that_connects_everything_gives_the_image_with_score_zero() -> None:
    result = lost_boxes(torch.randn(2, 12, 3), (3, 4), bias=100.0)
    assert result.xyxy.tolist() == [[0, 0, 4, 3]] * 2
    assert result.scores.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("bias", [0.0, -0.5, "auto"])
def test_identical_features_and_a_single_patch_are_no_error(bias) -> None:
    assert len(lost_boxes(torch.ones(1, 1, 4), (1, 1), bias).xyxy) == 1
    flat = lost_boxes(torch.full((1, 20, 4), 0.3), (4, 5), bias)
    assert flat.xyxy.shape == (1, 4)
    assert not torch.isnan(flat.bias).any()


@given(integer_features(batch=3), st.permutations(range(3)), st.lists(st.integers(-6, 6), min_size=9, max_size=9))
@settings(deadline=None, max_examples=50)
def test_the_order_of_the_batch_does_not_matter(case, order, biases) -> None:
    features, grid = torch.from_numpy(case[0]), case[1]
    biases = torch.tensor(biases).view(3, 3)
    plain, moved = (
        lost_maps(images, grid, bias, 20).candidates(images, grid)
        for images, bias in ((features, biases), (features[order], biases[order]))
    )
    np.testing.assert_array_equal(plain.masks[order], moved.masks)
    np.testing.assert_allclose(plain.scores[order], moved.scores, rtol=0, atol=1e-5)
    for name in ("degrees", "seeds", "bias"):
        assert torch.equal(getattr(plain.maps, name)[order], getattr(moved.maps, name))


@given(st.integers(0, 10_000), st.permutations(range(3)))
@settings(deadline=None, max_examples=30)
def test_auto_finds_the_same_boxes_in_a_batch_of_another_order(seed, order) -> None:
    features = torch.randn(3, 42, 5, generator=torch.Generator().manual_seed(seed)) + 0.5
    expected = [reference_lost(image, (6, 7), "auto", normalize=True) for image in features.numpy()]
    moved = lost_boxes(features[order], (6, 7), "auto")
    for index, image in enumerate(order):
        if expected[image].margin > CLEAR:
            assert_same(moved, index, expected[image])


@given(integer_features(), st.integers(1, 4))
@settings(deadline=None, max_examples=50)
def test_feature_dimensions_that_are_zero_change_nothing(case, extra) -> None:
    features, grid = torch.from_numpy(case[0]), case[1]
    padded = torch.nn.functional.pad(features, (0, extra))
    plain, wide = lost_boxes(features, grid, -1.0), lost_boxes(padded, grid, -1.0)
    assert torch.equal(plain.xyxy, wide.xyxy)
    assert torch.equal(plain.masks, wide.masks)
    torch.testing.assert_close(plain.scores, wide.scores, rtol=0, atol=1e-4)


@given(integer_features(), st.integers(1, 3), st.integers(-12, 3))
@settings(deadline=None, max_examples=50)
def test_a_dimension_that_is_the_same_everywhere_adds_its_square_to_the_bias(case, value, bias) -> None:
    features, grid = torch.from_numpy(case[0]), case[1]
    wider = torch.nn.functional.pad(features, (0, 1), value=value)
    plain, shifted = lost_boxes(features, grid, float(bias + value**2)), lost_boxes(wider, grid, float(bias))
    for name in ("xyxy", "seeds", "degrees", "masks"):
        assert torch.equal(getattr(plain, name), getattr(shifted, name))
    torch.testing.assert_close(plain.scores, shifted.scores, rtol=0, atol=2e-4)


@given(st.integers(0, 10_000), st.sampled_from([0.0, -2000.5, 900.5]), st.sampled_from([1, 54]))
@settings(deadline=None, max_examples=100)
def test_a_mirrored_image_has_the_mirrored_box(seed, bias, k) -> None:
    grid = (6, 9)
    # Integers, so that every sum is exact: a product of another order may round to another sign.
    features = torch.randint(-50, 51, (1, 54, 12), generator=torch.Generator().manual_seed(seed)).float()
    plain = lost_boxes(features, grid, bias, k_patches=k)
    lowest = plain.degrees.flatten().sort().values
    assume(lowest[0] != lowest[1])  # a tie: the first wins, another one in the mirror
    flipped = features.view(1, *grid, -1).flip(2).reshape(features.shape)
    mirrored = lost_boxes(flipped, grid, bias, k_patches=k)
    x1, y1, x2, y2 = plain.xyxy[0].tolist()
    assert mirrored.xyxy[0].tolist() == [9 - x2, y1, 9 - x1, y2]
    assert torch.equal(mirrored.masks.flip(2), plain.masks)
    torch.testing.assert_close(mirrored.scores, plain.scores, rtol=0, atol=1e-6)


@given(st.integers(0, 10_000), st.sampled_from([1, 42]), st.sampled_from([(1,), (2,), (1, 2)]))
@settings(deadline=None, max_examples=30)
def test_auto_finds_the_mirrored_box_in_a_mirrored_image(seed, k, axes) -> None:
    features = torch.randn(1, 42, 12, generator=torch.Generator().manual_seed(seed)) + 0.3
    assume(reference_lost(features[0].numpy(), (6, 7), "auto", k, normalize=True).margin > CLEAR)
    lowest = lost_maps(prepare(features, normalize=True), (6, 7), "auto", k).degrees[0].sort(dim=1).values
    flipped = features.view(1, 6, 7, -1).flip(axes).reshape(features.shape)
    plain, mirrored = lost_boxes(features, (6, 7), "auto", k), lost_boxes(flipped, (6, 7), "auto", k)
    assume((lowest[:, 0] != lowest[:, 1]).all())
    assert torch.equal(mirrored.masks.flip(axes), plain.masks)
    assert torch.equal(mirrored.degrees.flip(axes), plain.degrees)
    torch.testing.assert_close(mirrored.scores, plain.scores, rtol=0, atol=1e-5)
    torch.testing.assert_close(mirrored.bias, plain.bias, rtol=0, atol=1e-6)


@given(integer_features(), st.sampled_from([0.25, 2.0, 1024.0]), st.sampled_from([0.0, "auto"]))
@settings(deadline=None, max_examples=50)
def test_scaling_all_features_changes_nothing(case, scale, bias) -> None:
    features, grid = torch.from_numpy(case[0]), case[1]
    plain, scaled = lost_boxes(features, grid, bias), lost_boxes(features * scale, grid, bias)
    for name in ("xyxy", "scores", "degrees", "masks"):
        assert torch.equal(getattr(plain, name), getattr(scaled, name))


@given(integer_features(), st.integers(-120, 120), st.sampled_from([-0.3, "auto"]))
@settings(deadline=None, max_examples=50)
def test_normalised_features_may_have_any_size(case, exponent, bias) -> None:
    features, grid = torch.from_numpy(case[0]), case[1]
    plain = lost_boxes(features, grid, bias, normalize=True)
    scaled = lost_boxes(torch.ldexp(features, torch.tensor(exponent)), grid, bias, normalize=True)
    for name in ("xyxy", "scores", "seeds", "degrees", "masks", "bias"):
        assert torch.equal(getattr(plain, name), getattr(scaled, name))


@given(st.integers(0, 10_000), st.floats(-30, 30).map(lambda exponent: 10**exponent))
@settings(deadline=None, max_examples=50)
def test_any_factor_leaves_boxes_of_normalised_features_as_they_are(seed, factor) -> None:
    features = torch.randn(1, 42, 12, generator=torch.Generator().manual_seed(seed)) + 0.3
    for bias in (-0.2, "auto"):
        assume(reference_lost(features[0].numpy(), (6, 7), bias, normalize=True).margin > CLEAR)
        plain = lost_boxes(features, (6, 7), bias, normalize=True)
        scaled = lost_boxes(features * factor, (6, 7), bias, normalize=True)
        assert torch.equal(plain.xyxy, scaled.xyxy)
        assert torch.equal(plain.degrees, scaled.degrees)
        torch.testing.assert_close(plain.scores, scaled.scores, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e18, 1e30])
def test_scores_of_features_that_are_not_normalised_are_numbers_whatever_their_size(scale: float) -> None:
    result = lost_boxes(torch.randn(2, 42, 8) * scale, (6, 7), normalize=False)
    assert ((result.scores >= 0) & (result.scores <= 1)).all()


@pytest.mark.parametrize("bias", [0.0, "auto"])
def test_images_of_one_batch_may_have_features_of_different_sizes(bias) -> None:
    features = torch.randn(3, 42, 12) + 0.3
    sizes = torch.tensor([2.0**-100, 1.0, 2.0**100]).view(3, 1, 1)
    plain, scaled = (lost_boxes(images, (6, 7), bias, normalize=True) for images in (features, features * sizes))
    for name in ("xyxy", "scores", "seeds", "degrees", "masks", "bias"):
        assert torch.equal(getattr(plain, name), getattr(scaled, name))


@given(integer_features(), st.lists(st.integers(-6, 6), min_size=4, max_size=4))
@settings(deadline=None, max_examples=30)
def test_a_stricter_bias_never_adds_a_connection(case, biases) -> None:
    features, grid = torch.from_numpy(case[0]), case[1]
    biases = torch.tensor([sorted(biases)] * len(features))
    degrees = lost_maps(features, grid, biases, 100).degrees
    assert (degrees.diff(dim=1) >= 0).all()


def test_a_bias_per_image_is_that_images_bias() -> None:
    features = torch.randn(3, 30, 8)
    biases = torch.tensor([-1.0, 0.0, 2.0])
    together = lost_boxes(features, (5, 6), biases)
    for index, bias in enumerate(biases.tolist()):
        alone = lost_boxes(features[index : index + 1], (5, 6), bias)
        assert torch.equal(alone.degrees[0], together.degrees[index])
        assert torch.equal(alone.xyxy[0], together.xyxy[index])
    one_each = lost_boxes(features, (5, 6), biases[:, None])
    assert torch.equal(one_each.masks, together.masks)
    assert together.bias.tolist() == one_each.bias.tolist() == biases.tolist()


def test_biases_may_be_of_any_type_and_layout() -> None:
    features = torch.randn(3, 30, 8)
    biases = torch.tensor([[-1.0, 0.0, 2.0], [0.0, 1.0, -2.0], [3.0, -3.0, 0.0]])
    expected = _tensors(lost_maps(features, (5, 6), biases, 10))
    for same in (biases.long(), biases.double(), biases.T.contiguous().T, biases.repeat(1, 2)[:, :3]):
        for name, found in _tensors(lost_maps(features, (5, 6), same, 10)).items():
            assert torch.equal(found, expected[name]), name
    columns = biases.repeat_interleave(2, dim=1)[:, ::2][:, 1]
    for name, found in _tensors(lost_maps(features, (5, 6), columns, 10)).items():
        assert torch.equal(found, expected[name] if name == "finite" else expected[name][:, 1:2]), name


def test_biases_may_be_made_of_the_similarities_of_a_batch() -> None:
    features = torch.randn(3, 30, 8)
    seen = []

    def make(similarities: Similarities) -> torch.Tensor:
        seen.append(similarities.features)
        return torch.tensor([[-1.0, 0.5]]) * torch.arange(len(similarities.features))[:, None]

    made = find_candidates(features, (5, 6), make, 100).best()
    assert torch.equal(torch.cat(seen), features)
    expected = lost_boxes(features, (5, 6), torch.tensor([[0.0, 0.0], [-1.0, 0.5], [-2.0, 1.0]]))
    for name in ("xyxy", "scores", "seeds", "degrees", "masks", "bias"):
        assert torch.equal(getattr(made, name), getattr(expected, name))


@pytest.mark.parametrize("several", [False, True])
def test_a_batch_whose_similarities_cannot_all_be_kept_is_cut_into_parts(several, monkeypatch) -> None:
    features = torch.randn(5, 36, 8)
    bias = torch.randn(5, 3) if several else "auto"
    whole = lost_boxes(features, (6, 6), bias, normalize=True)
    sizes = []

    class Recorded(Similarities):
        def __init__(self, part: torch.Tensor) -> None:
            sizes.append(len(part))
            super().__init__(part)

    monkeypatch.setattr("lostreg.methods.lost.Similarities", Recorded)
    monkeypatch.setattr("lostreg.methods.similarity._KEPT_ELEMENTS", {"cpu": 2 * 36 * 36})
    parts = lost_boxes(features, (6, 6), bias, normalize=True)
    assert sizes == [2, 2, 1]
    for name in ("xyxy", "scores", "seeds", "degrees", "masks"):
        assert torch.equal(getattr(whole, name), getattr(parts, name))
    per_image = lost_boxes(features, (6, 6), whole.bias, normalize=True)
    assert torch.equal(per_image.degrees, whole.degrees)


def test_autocast_and_gradients_around_it_change_nothing() -> None:
    features = torch.randn(2, 100, 32, requires_grad=True)
    plain = lost_boxes(features, (10, 10), "auto")
    with torch.autocast("cpu", torch.bfloat16):
        cast = lost_boxes(features, (10, 10), "auto")
    assert torch.equal(plain.degrees, cast.degrees)
    assert torch.equal(plain.bias, cast.bias)
    assert torch.equal(plain.scores, cast.scores)
    assert not plain.bias.requires_grad


@pytest.mark.parametrize("bias", [0.0, "auto", torch.zeros(0), torch.zeros(0, 2)])
def test_an_empty_batch_has_an_empty_result(bias) -> None:
    result = lost_boxes(torch.ones(0, 12, 3), (3, 4), bias)
    assert result.xyxy.shape == (0, 4)
    assert result.degrees.shape == result.masks.shape == (0, 3, 4)
    assert result.scores.shape == result.bias.shape == (0,)


def test_half_precision_features_are_compared_in_float32() -> None:
    features = torch.randn(1, 64, 16).bfloat16()
    half, full = lost_boxes(features, (8, 8), -0.5), lost_boxes(features.float(), (8, 8), -0.5)
    assert torch.equal(half.degrees, full.degrees)


def test_prepared_features_have_length_one_if_asked_for() -> None:
    features = torch.randn(3, 30, 8).bfloat16()
    features[1, 4] = 0
    for shape in ((3, 30, 8), (90, 8)):
        plain = prepare(features.view(shape), normalize=False)
        assert plain.dtype == torch.float32
        assert torch.equal(plain, features.view(shape).float())
        unit = prepare(features.view(shape), normalize=True)
        lengths = unit.double().norm(dim=-1).flatten()
        assert lengths[34] == 0
        np.testing.assert_allclose(np.delete(lengths.numpy(), 34), 1, rtol=0, atol=3e-7)
        cosines = (unit * plain).sum(dim=-1) / plain.norm(dim=-1).clamp(min=1e-30)
        np.testing.assert_allclose(np.delete(cosines.flatten().numpy(), 34), 1, rtol=0, atol=1e-6)
    assert prepare(torch.zeros(0, 30, 8), normalize=True).shape == (0, 30, 8)
    assert prepare(torch.zeros(3, 30, 0), normalize=True).shape == (3, 30, 0)


@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-30, 1e30, 1e38])
def test_features_near_the_ends_of_float32_have_length_one(scale: float) -> None:
    unit = prepare(torch.full((1, 2, 4), scale), normalize=True)
    torch.testing.assert_close(unit, torch.full((1, 2, 4), 0.5))


def test_an_image_that_is_not_finite_leaves_the_others_as_they_are() -> None:
    features = torch.randn(3, 30, 8)
    plain = lost_maps(prepare(features, normalize=True), (5, 6), "auto", 10)
    features[1, 4, 2] = torch.inf
    maps = lost_maps(prepare(features, normalize=True), (5, 6), "auto", 10)
    for name in ("masks", "degrees", "seeds", "bias"):
        assert torch.equal(getattr(maps, name)[[0, 2]], getattr(plain, name)[[0, 2]])


def test_lowest_degrees_breaks_ties_by_index() -> None:
    degree = torch.tensor([3, 1, 2, 1, 1, 0])
    assert lowest_degrees(degree, 4).tolist() == [5, 1, 3, 4]
    several = torch.stack([degree, degree.flip(0), torch.zeros_like(degree)]).view(1, 3, 6)
    assert lowest_degrees(several, 4).tolist() == [[[5, 1, 3, 4], [0, 1, 2, 4], [0, 1, 2, 3]]]


def test_degrees_do_not_count_the_patch_itself() -> None:
    features = torch.tensor([[[1.0], [2.0], [-1.0]]])
    assert lost_boxes(features, (1, 3)).degrees.tolist() == [[[1, 1, 0]]]
    assert lost_boxes(features, (1, 3), bias=-1.5).degrees.tolist() == [[[1, 1, 0]]]
    assert lost_boxes(features, (1, 3), bias=2.5).degrees.tolist() == [[[2, 2, 2]]]


def test_expand_seed_adds_up_the_companions_that_are_connected_to_the_seed() -> None:
    features = torch.tensor([[[1.0, 1.0, 0.0], [1.0, 0.0, 1.0], [-1.0, 0.0, 2.0], [1.0, 0.0, -4.0]]])
    # Similarities [2, 1, -1, 1] of patch 0, the seed, and [1, 2, 1, -3] of patch 1 add up to [3, 3, 0, -2].
    # With 0.75 more, they add up to [4.5, 4.5, 1.5, -0.5].
    # With 1 less, the seed is connected to itself alone: [1, 0, -2, 0].
    # With 2 less, not even that.
    biases = torch.tensor([[0.0, 0.75, -1.0, -2.0]])
    expected = [[True, True, False, False], [True, True, True, False], [True, False, False, False], [False] * 4]
    assert expand_seed(features, torch.tensor([0, 1, 2]).repeat(1, 4, 1), biases).tolist() == [expected]


def test_expand_seed_starts_from_each_bias_own_candidates_in_each_image() -> None:
    # Patches 0 and 1 are alike, 2 and 3 are; in the second image 0 and 3 are, 1 and 2 are.
    features = torch.eye(2)[torch.tensor([[0, 0, 1, 1], [0, 1, 1, 0]])] * 2 - 1
    candidates = torch.tensor([[[0, 2], [3, 2]], [[1, 0], [3, 1]]])
    masks = expand_seed(features, candidates, torch.zeros(2, 2))
    expected = [[[1, 1, 0, 0], [0, 0, 1, 1]], [[0, 1, 1, 0], [1, 0, 0, 1]]]
    assert masks.int().tolist() == expected


@pytest.mark.parametrize("bias", [-0.1, "auto", torch.tensor([[0.25, -0.5]] * 3)])
def test_maps_survive_the_way_to_the_host(bias) -> None:
    features = torch.randn(3, 30, 8, device="cuda" if torch.cuda.is_available() else "cpu")
    features[1, 7, 2] = torch.nan
    maps = lost_maps(prepare(features, normalize=True), (5, 6), bias, 10)
    assert maps.finite.tolist() == [True, False, True]
    for name, after in _tensors(maps.to_host()).items():
        before = getattr(maps, name)
        assert after.device.type == "cpu"
        assert before.dtype == after.dtype, name
        torch.testing.assert_close(after, before.cpu(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_one_feature_of_one_image_that_is_not_finite_is_noticed(value: float) -> None:
    features = torch.randn(3, 30, 8)
    features[2, 29, 7] = value
    for bias in (0.0, "auto", torch.zeros(3, 2)):
        with pytest.raises(OptionError, match="features must be finite"):
            lost_boxes(features, (5, 6), bias)


@given(arrays(bool, (3, 5, 7)), arrays(np.int64, 3, elements=st.integers(0, 4)), st.integers(0, 6))
@settings(deadline=None)
def test_components_are_what_a_flood_fill_of_each_mask_reaches(masks, rows, column) -> None:
    found = seed_components(masks, rows, np.full(3, column))
    for mask, row, component in zip(masks, rows, found, strict=True):
        expected = flood(mask, (row, column)) if mask[row, column] else np.zeros_like(mask)
        np.testing.assert_array_equal(component, expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lost_boxes(torch.ones(1, 12, 3), (3, 5)), "N = 3 \\* 5"),
        (lambda: lost_boxes(torch.ones(12, 3), (3, 4)), "shape"),
        (lambda: lost_boxes(torch.ones(1, 0, 3), (0, 4)), "> 0"),
        (
            lambda: lost_boxes(torch.ones(1, 12, 3), (3, 4), k_patches=0),
            "k_patches must be an integer of at least 1, not 0",
        ),
        (lambda: lost_boxes(torch.ones(1, 12, 3), (3, 4), "auto", normalize=False), "normalised"),
        (lambda: lost_boxes(torch.full((1, 12, 3), torch.nan), (3, 4)), "finite"),
        (
            lambda: lost_boxes(torch.ones(2, 12, 3), (3, 4), torch.zeros(3)),
            "bias must have shape \\(2,\\) or \\(2, K\\)",
        ),
        (lambda: lost_boxes(torch.ones(2, 12, 3), (3, 4), torch.zeros(3, 2)), "not \\(3, 2\\)"),
        (lambda: lost_boxes(torch.ones(2, 12, 3), (3, 4), torch.zeros(2, 0)), "not \\(2, 0\\)"),
        (lambda: lost_boxes(torch.ones(2, 12, 3), (3, 4), torch.zeros(2, 1, 1)), "not \\(2, 1, 1\\)"),
        (lambda: lost_boxes(torch.ones(2, 12, 3), (3, 4), "Auto"), "finite number or 'auto', not 'Auto'"),
        (lambda: lost_boxes(torch.ones(2, 12, 3), (3, 4), float("nan")), "finite number or 'auto', not nan"),
        (lambda: lost_boxes(np.ones((2, 12, 3)), (3, 4)), "dense PyTorch tensor of a floating dtype, not .*ndarray"),
        (lambda: lost_boxes(torch.ones(2, 12, 3, device="meta"), (3, 4)), "dense .*not .*meta"),
        (lambda: lost_boxes(torch.ones(2, 12, 3).to_sparse(), (3, 4)), "dense .*not .*sparse_coo"),
        (lambda: lost_boxes(torch.ones(2, 12, 3, dtype=torch.complex64), (3, 4)), "floating dtype, not .*complex64"),
        (lambda: lost_boxes(torch.ones(2, 12, 3, dtype=torch.int64), (3, 4)), "floating dtype, not .*int64"),
        (lambda: lost_boxes(torch.ones(2, 12, 3).double() * 1e100, (3, 4)), "finite, in float32 too"),
        (lambda: lowest_degrees(torch.zeros(1, 4, dtype=torch.long), 5), "\\[1, 4\\], not 5"),
    ],
)
def test_bad_input_says_what_was_expected(call, message) -> None:
    with pytest.raises(OptionError, match=message):
        call()


def test_real_dinov2_features_give_the_oracles_boxes(shared_data) -> None:
    (features,) = load_file(shared_data / "dinov2-reference" / "dinov2_vits14_patch_tokens.safetensors").values()
    features = features.float().reshape(1, 37 * 37, -1)
    for normalize, bias in ((False, 0.0), (True, 0.0), (True, -0.25), (True, "auto")):
        result = lost_boxes(features, (37, 37), bias, normalize=normalize)
        expected = reference_lost(features[0].numpy(), (37, 37), bias, normalize=normalize)
        assert tuple(result.xyxy[0].tolist()) == expected.box
        assert tuple(result.seeds[0].tolist()) == expected.seed
        assert float(result.scores[0]) == pytest.approx(expected.score, abs=1e-5)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_bias_tensor_must_be_finite(value: float) -> None:
    with pytest.raises(OptionError, match="every bias must be a finite number"):
        lost_boxes(torch.randn(2, 12, 3), (3, 4), torch.tensor([0.0, value]))
