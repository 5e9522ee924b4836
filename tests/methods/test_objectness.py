"""Scores of masks: by hand, against plain loops, and under what may not change them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from reference_lost import object_score, outline_on_border
from torch import Tensor

from lostreg.methods.lost import prepare
from lostreg.methods.objectness import border_share, contrasts, near_one, object_scores, score_factors, surroundings

Case = tuple[Tensor, np.ndarray]


@st.composite
def cases(draw: st.DrawFn, depth: int | None = None) -> Case:
    """Features (B, N, D) of small integers, not all the same, and masks (B, K, h, w) of any patches."""
    images, biases = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    height, width = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    shape = (images, height * width, depth or draw(st.integers(1, 4)))
    features = draw(arrays(np.float32, shape, elements=st.integers(-3, 3).map(float)))
    return torch.from_numpy(features), draw(arrays(bool, (images, biases, height, width)))


def picture(mask: np.ndarray, inside: list[float], outside: list[float]) -> Tensor:
    """Features (1, N, D): one vector on the mask, another one elsewhere."""
    return torch.from_numpy(np.where(mask.reshape(1, -1, 1), inside, outside).astype(np.float32))


def score(features: Tensor, mask: np.ndarray) -> float:
    return float(object_scores(features, mask[None, None])[0, 0])


def rectangle(shape: tuple[int, int], rows: slice, columns: slice) -> np.ndarray:
    mask = np.zeros(shape, dtype=bool)
    mask[rows, columns] = True
    return mask


def test_a_square_in_the_middle_has_the_score_of_its_size() -> None:
    mask = rectangle((4, 4), slice(1, 3), slice(1, 3))
    # Nothing but object and rest tells features apart, and no side is on the border.
    assert score(picture(mask, [1.0, 2.0], [3.0, -1.0]), mask) == pytest.approx((4 * 0.25 * 0.75) ** 0.25)


def test_half_of_the_image_has_the_score_of_its_outline() -> None:
    mask = rectangle((4, 4), slice(0, 4), slice(0, 2))
    # 4 sides left, 2 above and 2 below are the image's; 4 are not.
    assert score(picture(mask, [1.0, 2.0], [3.0, -1.0]), mask) == pytest.approx((1 - 8 / 12) ** 4)


def test_features_that_vary_within_object_and_rest_lower_the_score() -> None:
    mask = rectangle((2, 4), slice(0, 2), slice(0, 2))
    sides = (1 - 6 / 8) ** 4
    # Means -1 and 1, and each feature is 2 beside its mean: variance 1 between them, 4 within.
    features = torch.tensor([[[-3.0], [1.0], [3.0], [-1.0], [1.0], [-3.0], [-1.0], [3.0]]])
    assert score(features, mask) == pytest.approx(sides * 0.2**0.5)
    assert score(picture(mask, [-1.0], [1.0]), mask) == pytest.approx(sides)


def test_object_and_rest_weigh_the_same_however_many_patches_they_have() -> None:
    mask = rectangle((1, 6), slice(0, 1), slice(2, 4))
    features = torch.tensor([[[-1.0], [-1.0], [0.0], [2.0], [-1.0], [-1.0]]])
    # Means 1 and -1, variance 1 between them; 1 within the object, 0 within the rest, half of that together.
    size, sides = (4 * (1 / 3) * (2 / 3)) ** 0.25, (1 - 4 / 6) ** 4
    assert score(features, mask) == pytest.approx(size * sides * (1 / 1.5) ** 0.5)


@given(cases())
@settings(deadline=None, max_examples=30)
def test_the_score_is_the_product_of_three_factors(case: Case) -> None:
    distinct, size, inside = score_factors(*case)
    share = case[1].mean(axis=(2, 3))
    np.testing.assert_allclose(size, (4 * share * (1 - share)) ** 0.25)
    np.testing.assert_allclose(inside, (1 - border_share(case[1])) ** 4)
    np.testing.assert_allclose(object_scores(*case), distinct * size * inside, rtol=1e-6, atol=1e-7)
    for factor in (distinct, size, inside):
        assert ((factor >= 0) & (factor <= 1)).all()


@pytest.mark.parametrize("scale", [2.0**-140, 2.0**-60, 1.0, 2.0**60, 2.0**125])
def test_features_are_brought_near_one_by_a_power_of_two(scale: float) -> None:
    features = torch.tensor([[[1.0, -1.5], [0.25, 0.0]], [[-0.5, 0.125], [0.0, 0.375]]])
    # The largest of the first image is 1.5 and becomes 0.75, that of the second is 0.5 already.
    expected = features * torch.tensor([0.5, 1.0]).view(2, 1, 1)
    if scale > 2.0**-126:
        assert torch.equal(near_one(features * scale), expected)
        assert torch.equal(near_one(features[0] * scale), expected[0])
    else:  # as near as one finite factor can bring it
        assert near_one(features * scale).abs().amax() > 2.0**-20
    assert near_one(torch.zeros(2, 3, 4)).tolist() == torch.zeros(2, 3, 4).tolist()
    assert near_one(torch.zeros(2, 0, 4)).shape == (2, 0, 4)


@pytest.mark.parametrize(
    ("rows", "columns", "share"),
    [
        (slice(1, 2), slice(1, 2), 0),
        (slice(0, 1), slice(2, 3), 1 / 4),
        (slice(0, 1), slice(0, 1), 2 / 4),
        (slice(0, 3), slice(0, 2), 7 / 10),
        (slice(1, 2), slice(0, 5), 2 / 12),
        (slice(0, 3), slice(0, 5), 1),
        (slice(0, 0), slice(0, 0), 0),
    ],
)
def test_the_share_of_the_border_is_counted_in_sides(rows: slice, columns: slice, share: float) -> None:
    mask = rectangle((3, 5), rows, columns)
    assert border_share(mask) == pytest.approx(share)
    assert border_share(mask[None, None].repeat(2, axis=1))[0].tolist() == pytest.approx([share, share])


def test_a_hole_has_an_outline_too() -> None:
    mask = ~rectangle((3, 5), slice(1, 2), slice(2, 3))
    assert border_share(mask) == pytest.approx(16 / 20)


@given(arrays(bool, st.tuples(st.integers(1, 6), st.integers(1, 6))))
@settings(deadline=None)
def test_shares_of_the_border_are_what_a_walk_along_the_outline_finds(mask: np.ndarray) -> None:
    assert border_share(mask) == pytest.approx(outline_on_border(mask))


@given(cases())
@settings(deadline=None, max_examples=200)
def test_scores_are_those_of_plain_loops(case: Case) -> None:
    features, masks = case
    found = object_scores(features, masks)
    images = zip(features.double().numpy(), masks, strict=True)
    expected = [[object_score(image, mask) for mask in several] for image, several in images]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4)
    assert ((found >= 0) & (found <= 1)).all()


@pytest.mark.parametrize(("offset", "tolerance"), [(0.0, 1e-6), (3.0, 1e-6), (30.0, 1e-4), (100.0, 1e-3)])
def test_scores_of_normalised_features_are_those_of_plain_loops(offset: float, tolerance: float) -> None:
    """The larger what all features have in common, the fewer digits are left of their differences."""
    features = torch.randn(3, 20 * 30, 48)
    features.view(3, 20, 30, 48)[:, 3:9, 10:20, :24] += 1
    features = prepare(features + offset, normalize=True)
    masks = np.zeros((3, 4, 20, 30), dtype=bool)
    masks[:, 0, 3:9, 10:20] = masks[:, 1, 0:10] = masks[:, 2, 7, 7] = masks[:, 3, :19] = True
    expected = [[object_score(image, mask) for mask in masks[0]] for image in features.double().numpy()]
    np.testing.assert_allclose(object_scores(features, masks), expected, rtol=0, atol=tolerance)


@given(st.integers(0, 10_000), st.floats(-2, 2))
@settings(deadline=None, max_examples=60)
def test_scores_lie_between_nothing_and_one(seed: int, exponent: float) -> None:
    random = np.random.default_rng(seed)
    features = torch.from_numpy(random.normal(random.normal(0, 5), 10**exponent, (2, 42, 7)).astype(np.float32))
    for normalize in (False, True):
        scores = object_scores(prepare(features, normalize=normalize), random.random((2, 5, 6, 7)) < random.random())
        assert ((scores >= 0) & (scores <= 1)).all()


def around(mask: np.ndarray) -> np.ndarray:
    """A quarter of the box, and at least one patch, on each side of it, patch by patch."""
    rows, columns = np.nonzero(mask)
    found = np.zeros_like(mask)
    for row, column in np.ndindex(mask.shape):
        beyond = [max(places.min() - at, at - places.max(), 0) for places, at in ((rows, row), (columns, column))]
        margins = [max(1, round(0.25 * (np.ptp(places) + 1))) for places in (rows, columns)]
        found[row, column] = any(beyond) and all(far <= most for far, most in zip(beyond, margins, strict=True))
    return found


@given(st.integers(0, 10_000), st.integers(1, 9), st.integers(1, 9), st.floats(0.02, 1))
@settings(deadline=None, max_examples=40)
def test_contrasts_are_those_of_all_pairs(seed: int, height: int, width: int, share: float) -> None:
    random = np.random.default_rng(seed)
    features = prepare(torch.from_numpy(random.normal(0.3, 1, (height * width, 4))), normalize=True)
    masks = random.random((3, height, width)) < share
    masks[:, 0, 0] = True
    found = contrasts(features[None], masks[None])
    for mask, apart, local in zip(masks, found.apart[0], found.local[0], strict=True):
        near = around(mask)
        np.testing.assert_array_equal(surroundings(mask), near)
        rows = [features[torch.from_numpy(some.ravel())].double().numpy() for some in (mask, ~mask, near)]
        expected = min(1, 1 - (rows[0] @ rows[1].T).mean()) if len(rows[1]) else 1
        assert apart**4 == pytest.approx(expected, abs=1e-5)
        if not len(rows[2]):
            assert local == 0
            continue
        means = [rows[0].mean(axis=0), rows[2].mean(axis=0)]
        middle = (means[0] + means[1]) / 2
        variance = np.mean([((some - middle) ** 2).sum(axis=1).mean() for some in (rows[0], rows[2])])
        between = np.mean([((mean - middle) ** 2).sum() for mean in means])
        unlike = min(1, max(0, 1 - (rows[0] @ rows[2].T).mean()))
        if variance > 1e-4:
            assert local**2 == pytest.approx((between / variance) ** 0.5 * unlike, abs=1e-4)


def test_what_lies_further_away_says_nothing_against_an_object() -> None:
    kinds = np.zeros((9, 16), dtype=int)
    kinds[3:6, 2:5] = kinds[3:6, 11:14] = 1  # two objects that are alike
    features = torch.eye(2)[torch.from_numpy(kinds.ravel())][None]
    one, half = rectangle((9, 16), slice(3, 6), slice(2, 5)), rectangle((9, 16), slice(3, 6), slice(2, 4))
    found = contrasts(features, np.stack([one, half, np.zeros_like(one)])[None])
    assert found.local[0, 0] == 1
    assert found.local[0, 1] < 0.9
    assert found.apart[0, 0] < 1
    assert found.local[0, 2] == 0


def test_a_mask_of_everything_or_nothing_has_score_zero() -> None:
    masks = np.stack([np.ones((3, 4), dtype=bool), np.zeros((3, 4), dtype=bool)])[None]
    assert object_scores(torch.randn(1, 12, 5), masks).tolist() == [[0.0, 0.0]]
    assert object_scores(torch.randn(1, 1, 5), np.ones((1, 1, 1, 1), dtype=bool)).tolist() == [[0.0]]


@given(arrays(bool, (1, 2, 4, 5)), st.integers(-9, 9))
@settings(deadline=None, max_examples=30)
def test_features_that_are_all_the_same_have_score_zero(masks: np.ndarray, value: int) -> None:
    assert object_scores(torch.zeros(1, 20, 3), masks).tolist() == [[0.0, 0.0]]
    assert (object_scores(torch.full((1, 20, 3), float(value)), masks) < 1e-3).all()
    assert (object_scores(prepare(torch.full((1, 20, 3), value + 0.3), normalize=True), masks) < 1e-3).all()


def test_features_that_differ_by_rounding_have_score_zero_but_for_rounding() -> None:
    mask = rectangle((8, 10), slice(1, 6), slice(1, 9))
    for _ in range(20):
        features = prepare(torch.randn(1, 1, 32) * (0.1 + torch.rand(1, 80, 1)), normalize=True)
        assert len(features[0].unique(dim=0)) > 1
        assert 0 <= score(features, mask) < 1e-3


def test_half_of_the_image_that_is_unlike_the_rest_and_not_on_the_border_has_score_one() -> None:
    mask = rectangle((8, 10), slice(1, 6), slice(1, 9))
    for _ in range(100):
        features = picture(mask, torch.randn(17).tolist(), torch.randn(17).tolist())
        assert 1 - 1e-6 <= score(features, mask) <= 1


@given(cases(), st.sampled_from([(1,), (2,), (1, 2)]))
@settings(deadline=None, max_examples=50)
def test_a_mirrored_image_has_the_same_score(case: Case, axes: tuple[int, ...]) -> None:
    features, masks = case
    images = features.view(len(masks), *masks.shape[2:], -1)
    mirrored = images.flip(axes).reshape(features.shape)
    flipped = np.flip(masks, [axis + 1 for axis in axes]).copy()
    np.testing.assert_allclose(object_scores(mirrored, flipped), object_scores(features, masks), rtol=0, atol=1e-4)
    turned = images.transpose(1, 2).reshape(features.shape)
    transposed = masks.swapaxes(2, 3).copy()
    np.testing.assert_allclose(object_scores(turned, transposed), object_scores(features, masks), rtol=0, atol=1e-4)


@given(cases(depth=4), st.permutations(range(4)), st.integers(1, 3), st.integers(-3, 3))
@settings(deadline=None, max_examples=50)
def test_order_sign_and_number_of_dimensions_and_a_common_offset_change_no_score(
    case: Case, order: list[int], extra: int, offset: int
) -> None:
    features, masks = case
    plain = object_scores(features, masks)
    padded = torch.nn.functional.pad(features, (0, extra))
    for changed in (features[..., order], -features, padded, features + offset):
        np.testing.assert_allclose(object_scores(changed, masks), plain, rtol=0, atol=5e-4)


@given(cases(), st.integers(-40, 40))
@settings(deadline=None, max_examples=50)
def test_a_power_of_two_changes_no_score_to_the_bit(case: Case, exponent: int) -> None:
    features, masks = case
    np.testing.assert_array_equal(
        object_scores(torch.ldexp(features, torch.tensor(exponent)), masks), object_scores(features, masks)
    )


@pytest.mark.parametrize("scale", [1e-37, 1e-30, 1e-20, 1e-9, 1e9, 1e18, 1e30, 1e37])
def test_features_of_any_scale_have_the_same_score(scale: float) -> None:
    features, masks = torch.randn(2, 30, 8), np.random.default_rng(0).random((2, 3, 5, 6)) < 0.3
    features[0] += 1
    plain = object_scores(features, masks)
    np.testing.assert_allclose(object_scores(features * scale, masks), plain, rtol=0, atol=1e-5)
    mixed = torch.stack([features[0] * scale, features[1]])  # one image's scale is not the other's
    np.testing.assert_allclose(object_scores(mixed, masks), plain, rtol=0, atol=1e-5)


@given(cases())
@settings(deadline=None, max_examples=50)
def test_masks_and_images_together_score_as_each_alone(case: Case) -> None:
    features, masks = case
    together = object_scores(features, masks)
    for image, several in enumerate(masks):
        for index, mask in enumerate(several):
            assert score(features[image : image + 1], mask) == pytest.approx(together[image, index], abs=1e-4)


def test_equal_masks_of_an_image_have_the_same_score_to_the_bit() -> None:
    for count in (2, 6, 7, 16):
        features = torch.randn(2, 35, 40) + 0.5
        masks = np.random.default_rng(count).random((2, 1, 5, 7)).repeat(count, axis=1) < 0.3
        scores = object_scores(features, masks)
        np.testing.assert_array_equal(scores, scores[:, :1].repeat(count, axis=1))


def test_object_and_rest_differ_as_rest_and_object() -> None:
    mask = np.zeros((4, 6), dtype=bool)
    mask[:, :3] = True  # whose complement has as long an outline
    mask[1:3, 3] = True
    mask[1:3, 2] = False
    features = torch.randn(1, 24, 5)
    assert score(features, mask) == pytest.approx(score(features, ~mask), rel=1e-4)


def test_an_object_is_the_less_clear_the_more_of_its_outline_is_the_border() -> None:
    places = [(slice(2, 5), slice(3, 6)), (slice(0, 3), slice(3, 6)), (slice(0, 3), slice(0, 3))]
    masks = [rectangle((8, 10), *place) for place in places]
    scores = [score(picture(mask, [1.0, 2.0], [3.0, -1.0]), mask) for mask in masks]
    assert scores[0] > scores[1] > scores[2] > 0


def test_an_object_is_the_clearer_the_less_its_features_vary() -> None:
    mask = rectangle((8, 10), slice(2, 6), slice(3, 7))
    noise = torch.randn(1, 80, 6)
    plain = picture(mask, [1.0] + [0.0] * 5, [0.0] * 5 + [1.0])
    scores = [score(plain + times * noise, mask) for times in (0.0, 0.1, 0.3, 1.0)]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] == pytest.approx((4 * 0.2 * 0.8) ** 0.25)
    assert scores[3] < scores[0] / 2


def test_the_right_mask_scores_higher_than_a_part_of_it_or_more_than_it() -> None:
    exact = rectangle((12, 12), slice(3, 9), slice(3, 9))
    features = picture(exact, [1.0, 0.0], [0.0, 1.0]) + 0.3 * torch.randn(1, 144, 2)
    for size in (1, 2, 4, 5):
        for wrong in (rectangle((12, 12), slice(3, 3 + size), slice(3, 9)), ~exact):
            assert score(features, wrong) < score(features, exact)
        larger = rectangle((12, 12), slice(3 - size // 2, 9 + size // 2), slice(2, 9))
        assert score(features, larger) < score(features, exact)


def test_an_image_that_is_not_finite_leaves_the_scores_of_others_alone() -> None:
    features, masks = torch.randn(3, 12, 4), np.random.default_rng(0).random((3, 2, 3, 4)) < 0.4
    plain = object_scores(features, masks)
    features[1, 3, 2] = torch.nan
    np.testing.assert_allclose(object_scores(features, masks)[[0, 2]], plain[[0, 2]], atol=1e-6)


def test_an_empty_batch_has_no_scores() -> None:
    scores = object_scores(torch.ones(0, 12, 4), np.zeros((0, 6, 3, 4), dtype=bool))
    assert scores.shape == (0, 6)
