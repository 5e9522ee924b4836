"""LOST against the slow oracle, against pictures one can check by hand, and under transformations."""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from reference_lost import flood, reference_lost
from safetensors.torch import load_file

from lostreg.errors import OptionError
from lostreg.lost import (
    ObjectMaps,
    auto_bias,
    expand_seed,
    lost_boxes,
    lowest_degrees,
    object_maps,
    resolve_normalize,
    seed_component,
)
from lostreg.similarity import Similarities

# Small integers: every sum is exact in float32, so both sides must agree to the last tie.
integers = st.integers(-3, 3).map(float)


@st.composite
def integer_features(draw: st.DrawFn, batch: int | None = None) -> tuple[np.ndarray, tuple[int, int]]:
    images = batch or draw(st.integers(1, 3))
    grid = (draw(st.integers(1, 6)), draw(st.integers(1, 6)))
    depth = draw(st.integers(1, 5))
    shape = (images, grid[0] * grid[1], depth)
    return draw(arrays(np.float32, shape, elements=integers)), grid


def assert_same(features: np.ndarray, grid: tuple[int, int], **options) -> None:
    result = lost_boxes(torch.from_numpy(features), grid, **options)
    k, bias = options.get("k_patches", 100), options.get("bias", 0.0)
    for index, image in enumerate(features):
        normalize = bool(options.get("normalize") or bias == "auto")
        expected = reference_lost(image, grid, bias, k, normalize)
        np.testing.assert_array_equal(result.degrees[index].numpy(), expected.degrees)
        assert tuple(result.seeds[index].tolist()) == expected.seed
        assert tuple(result.xyxy[index].tolist()) == expected.box
        np.testing.assert_array_equal(result.masks[index].numpy(), expected.mask)
        assert float(result.scores[index]) == expected.score
        assert float(result.bias[index]) == pytest.approx(expected.bias, abs=1e-6)


@given(integer_features(), st.integers(-6, 6), st.integers(1, 40))
@settings(deadline=None, max_examples=150)
def test_everything_equals_the_oracle_where_sums_are_exact(case, bias, k) -> None:
    assert_same(*case, bias=float(bias), k_patches=k)


@given(st.integers(0, 10_000), st.sampled_from([-0.375, -0.125, 0.0, 0.0625, "auto"]))
@settings(deadline=None, max_examples=60)
def test_normalised_features_equal_the_oracle(seed, bias) -> None:
    # Unit vectors whose products are exact: one-hot, or a signed half in each of four places.
    random = np.random.default_rng(seed)
    vectors = np.zeros((2, 42, 16), dtype=np.float32)
    for vector in vectors.reshape(-1, 16):
        if random.random() < 0.3:
            vector[random.integers(16)] = random.choice([-1, 1])
        else:
            vector[random.choice(16, 4, replace=False)] = random.choice([-0.5, 0.5], 4)
    assert_same(vectors * 4, (6, 7), bias=bias, normalize=True)


def test_random_real_features_give_the_oracles_boxes_and_seeds() -> None:
    random = np.random.default_rng(7)
    features = random.normal(0.1, 1, (8, 30 * 40, 24)).astype(np.float32)
    for normalize, bias in ((False, 0.0), (False, -2.0), (True, -0.2), (True, "auto")):
        result = lost_boxes(torch.from_numpy(features), (30, 40), bias, normalize=normalize)
        for index, image in enumerate(features):
            expected = reference_lost(image, (30, 40), bias, normalize=normalize)
            assert tuple(result.xyxy[index].tolist()) == expected.box
            assert tuple(result.seeds[index].tolist()) == expected.seed


def test_a_square_object_on_an_even_background_is_boxed_exactly() -> None:
    features = torch.zeros(1, 8 * 10, 2)
    features[..., 0] = 1.0
    features.view(1, 8, 10, 2)[0, 2:5, 3:7] = torch.tensor([-0.5, 1.0])
    result = lost_boxes(features, (8, 10))
    assert result.xyxy.tolist() == [[3, 2, 7, 5]]
    assert result.seeds.tolist() == [[2, 3]]  # of equal patches the first
    assert result.scores.tolist() == [1.0]
    assert result.degrees[0, 2, 3] == 11
    assert result.degrees[0, 0, 0] == 80 - 12 - 1


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


@pytest.mark.parametrize("bias", [0.0, -0.5, "auto"])
def test_identical_features_and_a_single_patch_are_no_error(bias) -> None:
    assert len(lost_boxes(torch.ones(1, 1, 4), (1, 1), bias).xyxy) == 1
    flat = lost_boxes(torch.full((1, 20, 4), 0.3), (4, 5), bias)
    assert flat.xyxy.shape == (1, 4)
    assert not torch.isnan(flat.bias).any()


@given(integer_features(batch=3), st.permutations(range(3)))
@settings(deadline=None, max_examples=50)
def test_the_order_of_the_batch_does_not_matter(case, order) -> None:
    features, grid = torch.from_numpy(case[0]), case[1]
    plain, moved = lost_boxes(features, grid, -1.0), lost_boxes(features[list(order)], grid, -1.0)
    assert torch.equal(plain.xyxy[list(order)], moved.xyxy)
    assert torch.equal(plain.degrees[list(order)], moved.degrees)


@given(integer_features(), st.integers(1, 4))
@settings(deadline=None, max_examples=50)
def test_feature_dimensions_that_are_zero_change_nothing(case, extra) -> None:
    features, grid = torch.from_numpy(case[0]), case[1]
    padded = torch.nn.functional.pad(features, (0, extra))
    plain, wide = lost_boxes(features, grid, -1.0), lost_boxes(padded, grid, -1.0)
    assert torch.equal(plain.xyxy, wide.xyxy)
    assert torch.equal(plain.masks, wide.masks)


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


@given(integer_features(), st.sampled_from([0.25, 2.0, 1024.0]), st.sampled_from([0.0, "auto"]))
@settings(deadline=None, max_examples=50)
def test_scaling_all_features_changes_nothing(case, scale, bias) -> None:
    features, grid = torch.from_numpy(case[0]), case[1]
    plain, scaled = lost_boxes(features, grid, bias), lost_boxes(features * scale, grid, bias)
    assert torch.equal(plain.xyxy, scaled.xyxy)
    assert torch.equal(plain.degrees, scaled.degrees)


@given(integer_features(), st.lists(st.integers(-6, 6), min_size=4, max_size=4))
@settings(deadline=None, max_examples=30)
def test_a_stricter_bias_never_adds_a_connection(case, biases) -> None:
    features, grid = torch.from_numpy(case[0]), case[1]
    degrees = [lost_boxes(features, grid, float(bias)).degrees for bias in sorted(biases)]
    assert all((low <= high).all() for low, high in pairwise(degrees))


def test_a_bias_per_image_is_that_images_bias() -> None:
    features = torch.randn(3, 30, 8)
    biases = torch.tensor([-1.0, 0.0, 2.0])
    together = lost_boxes(features, (5, 6), biases)
    for index, bias in enumerate(biases.tolist()):
        alone = lost_boxes(features[index : index + 1], (5, 6), bias)
        assert torch.equal(alone.degrees[0], together.degrees[index])
        assert torch.equal(alone.xyxy[0], together.xyxy[index])


def test_a_batch_whose_similarities_cannot_all_be_kept_is_cut_into_parts(monkeypatch) -> None:
    features = torch.randn(5, 36, 8)
    whole = lost_boxes(features, (6, 6), "auto")
    sizes = []

    class Recorded(Similarities):
        def __init__(self, part: torch.Tensor) -> None:
            sizes.append(len(part))
            super().__init__(part)

    monkeypatch.setattr("lostreg.lost.Similarities", Recorded)
    monkeypatch.setattr("lostreg.similarity._KEPT_ELEMENTS", {"cpu": 2 * 36 * 36})
    parts = lost_boxes(features, (6, 6), "auto")
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
    assert not plain.bias.requires_grad


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="needs PyTorch 2.9")
def test_reduced_precision_of_products_is_off_while_it_matters_and_back_afterwards(monkeypatch) -> None:
    seen = {}

    def spy_on(name: str, product: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def spy(*tensors: torch.Tensor, **options: torch.Tensor) -> torch.Tensor:
            backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
            seen.setdefault(name, set()).add(tuple(backend.fp32_precision for backend in backends))
            return product(*tensors, **options)

        return spy

    places = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [place.fp32_precision for place in places]
    try:
        for place, reduced in zip(places, ("tf32", "bf16"), strict=True):
            place.fp32_precision = reduced
        with monkeypatch.context() as patched:
            for owner, name in ((torch, "mm"), (torch, "bmm"), (torch.Tensor, "__matmul__")):
                patched.setattr(owner, name, spy_on(name, getattr(owner, name)))
            for batch in (1, 2):
                lost_boxes(torch.randn(batch, 100, 32), (10, 10), "auto")
        assert seen == {name: {("ieee", "ieee")} for name in ("mm", "bmm", "__matmul__")}
        assert [place.fp32_precision for place in places] == ["tf32", "bf16"]
    finally:
        for place, precision in zip(places, before, strict=True):
            place.fp32_precision = precision


def test_an_empty_batch_has_an_empty_result() -> None:
    result = lost_boxes(torch.ones(0, 12, 3), (3, 4), "auto")
    assert result.xyxy.shape == (0, 4)
    assert result.degrees.shape == result.masks.shape == (0, 3, 4)


def test_half_precision_features_are_compared_in_float32() -> None:
    features = torch.randn(1, 64, 16).bfloat16()
    half, full = lost_boxes(features, (8, 8), -0.5), lost_boxes(features.float(), (8, 8), -0.5)
    assert torch.equal(half.degrees, full.degrees)


def test_the_automatic_bias_is_the_quantile_of_pairs_of_different_patches() -> None:
    vectors = (torch.randint(2, (4, 50, 1024)) * 2 - 1) / 32  # of length 1, and their products are exact
    similarity = vectors @ vectors.mT
    others = similarity[:, ~torch.eye(50, dtype=torch.bool)].numpy()
    expected = -np.quantile(others, 0.25, axis=1, method="lower")
    biases = auto_bias(Similarities(vectors))
    np.testing.assert_array_equal(biases.numpy(), expected)
    connected = ((similarity + biases.view(-1, 1, 1)) > 0).float().mean()
    assert 0.72 < connected < 0.78


def test_the_automatic_bias_leaves_no_seed_alone() -> None:
    for sharpness in (0.1, 1.0, 20.0):
        features = torch.randn(6, 80, 16) + sharpness
        assert lost_boxes(features, (8, 10), "auto").scores.tolist() == [1.0] * 6


def test_lowest_degrees_breaks_ties_by_index() -> None:
    degree = torch.tensor([[3, 1, 2, 1, 1, 0]])
    assert lowest_degrees(degree, 4).tolist() == [[5, 1, 3, 4]]


def test_degrees_do_not_count_the_patch_itself() -> None:
    features = torch.tensor([[[1.0], [2.0], [-1.0]]])
    assert lost_boxes(features, (1, 3)).degrees.tolist() == [[[1, 1, 0]]]
    assert lost_boxes(features, (1, 3), bias=-1.5).degrees.tolist() == [[[1, 1, 0]]]
    assert lost_boxes(features, (1, 3), bias=2.5).degrees.tolist() == [[[2, 2, 2]]]


def test_expand_seed_adds_up_the_companions_that_are_connected_to_the_seed() -> None:
    features = torch.tensor([[[1.0, 1.0, 0.0], [1.0, 0.0, 1.0], [-1.0, 0.0, 2.0], [1.0, 0.0, -4.0]]])
    candidates = torch.tensor([[0, 1, 2]])
    # Similarities [2, 1, -1, 1] of patch 0, the seed, and [1, 2, 1, -3] of patch 1 add up to [3, 3, 0, -2].
    assert expand_seed(features, candidates, torch.tensor([0.0])).tolist() == [[True, True, False, False]]
    # With 0.75 more, they add up to [4.5, 4.5, 1.5, -0.5].
    assert expand_seed(features, candidates, torch.tensor([0.75])).tolist() == [[True, True, True, False]]
    # With 1 less, the seed is connected to itself alone: [1, 0, -2, 0].
    assert expand_seed(features, candidates, torch.tensor([-1.0])).tolist() == [[True, False, False, False]]


@pytest.mark.parametrize("bias", [-0.1, "auto"])
def test_maps_survive_the_way_to_the_host_in_one_tensor(bias) -> None:
    features = torch.randn(3, 30, 8)
    features[1, 7, 2] = torch.nan
    maps = object_maps(features, (5, 6), bias, 10, normalize=True)
    back = ObjectMaps.unpack(maps.pack())
    assert maps.finite.tolist() == [True, False, True]
    for name in ("masks", "degrees", "seeds", "bias", "finite"):
        before, after = getattr(maps, name), getattr(back, name)
        assert before.dtype == after.dtype, name
        torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_one_feature_of_one_image_that_is_not_finite_is_noticed(value: float) -> None:
    features = torch.randn(3, 30, 8)
    features[2, 29, 7] = value
    with pytest.raises(OptionError, match="features must be finite"):
        lost_boxes(features, (5, 6))


@given(arrays(bool, (5, 7)), st.integers(0, 4), st.integers(0, 6))
@settings(deadline=None)
def test_the_component_is_what_a_flood_fill_reaches(mask, row, column) -> None:
    expected = flood(mask, (row, column)) if mask[row, column] else np.zeros_like(mask)
    np.testing.assert_array_equal(seed_component(mask, row, column), expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lost_boxes(torch.ones(1, 12, 3), (3, 5)), "N = 3 \\* 5"),
        (lambda: lost_boxes(torch.ones(12, 3), (3, 4)), "shape"),
        (lambda: lost_boxes(torch.ones(1, 0, 3), (0, 4)), "> 0"),
        (lambda: lost_boxes(torch.ones(1, 12, 3), (3, 4), k_patches=0), "k_patches must be at least 1, not 0"),
        (lambda: lost_boxes(torch.ones(1, 12, 3), (3, 4), "auto", normalize=False), "normalised"),
        (lambda: lost_boxes(torch.full((1, 12, 3), torch.nan), (3, 4)), "finite"),
        (lambda: lost_boxes(torch.ones(2, 12, 3), (3, 4), torch.zeros(3)), "bias must have shape"),
        (lambda: lost_boxes(torch.ones(2, 12, 3), (3, 4), "Auto"), "finite number or 'auto', not 'Auto'"),
        (lambda: lost_boxes(torch.ones(2, 12, 3), (3, 4), float("nan")), "finite number or 'auto', not nan"),
        (lambda: lost_boxes(np.ones((2, 12, 3)), (3, 4)), "PyTorch tensor, not ndarray"),
        (lambda: lowest_degrees(torch.zeros(1, 4, dtype=torch.long), 5), "\\[1, 4\\], not 5"),
    ],
)
def test_bad_input_says_what_was_expected(call, message) -> None:
    with pytest.raises(OptionError, match=message):
        call()


def test_normalisation_follows_the_bias_unless_told() -> None:
    assert resolve_normalize("auto", None, default=False) is True
    assert resolve_normalize(0.0, None, default=False) is False
    assert resolve_normalize(0.0, None, default=True) is True
    assert resolve_normalize(0.0, False, default=True) is False


def test_real_dinov2_features_give_the_oracles_boxes(shared_data) -> None:
    (features,) = load_file(shared_data / "dinov2-reference" / "dinov2_vits14_patch_tokens.safetensors").values()
    features = features.float().reshape(1, 37 * 37, -1)
    for normalize, bias in ((False, 0.0), (True, 0.0), (True, -0.25), (True, "auto")):
        result = lost_boxes(features, (37, 37), bias, normalize=normalize)
        expected = reference_lost(features[0].numpy(), (37, 37), bias, normalize=normalize)
        assert tuple(result.xyxy[0].tolist()) == expected.box
        assert tuple(result.seeds[0].tolist()) == expected.seed
