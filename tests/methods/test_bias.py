"""Which biases are allowed, and which ones are tried without being asked for one."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lostreg.errors import OptionError
from lostreg.methods.bias import check_bias, limits, resolve_normalize, trial_biases
from lostreg.methods.lost import find_candidates, lost_boxes, lost_maps, prepare
from lostreg.methods.similarity import Similarities

STEPS = [0, -0.25, -0.5, -0.75, -1, -1.25]


def connected_seeds(features: Tensor, grid: tuple[int, int]) -> Tensor:
    """Whether each trial's seed is similar to itself at least, (B, K)."""
    maps = lost_maps(prepare(features, normalize=True), grid, "auto", 100)
    return maps.masks.gather(2, maps.seeds[..., None]).squeeze(2)


@pytest.mark.parametrize("bias", [0, -0.25, 1e30, "auto"])
def test_a_finite_number_and_auto_are_biases(bias: object) -> None:
    check_bias(bias)


@pytest.mark.parametrize("bias", [float("nan"), float("inf"), "Auto", "0.1", None, True, [0.0]])
def test_nothing_else_is_a_bias(bias: object) -> None:
    with pytest.raises(OptionError, match="bias must be a finite number or 'auto', not "):
        check_bias(bias)


def test_normalisation_follows_the_bias_unless_told() -> None:
    assert resolve_normalize("auto", None, default=False) is True
    assert resolve_normalize("auto", True, default=False) is True
    assert resolve_normalize(0.0, None, default=False) is False
    assert resolve_normalize(0.0, None, default=True) is True
    assert resolve_normalize(0.0, False, default=True) is False
    assert resolve_normalize(torch.zeros(2, 3), None, default=False) is False
    with pytest.raises(OptionError, match="normalised features"):
        resolve_normalize("auto", False, default=True)


@pytest.mark.parametrize("offset", [0.0, 1.0, 30.0])
def test_limits_lie_on_and_below_the_mean_of_pairs_of_different_patches(offset: float) -> None:
    features = prepare(torch.randn(4, 90, 24) + offset, normalize=True)
    vectors = features.double().numpy()
    others = (vectors @ vectors.transpose(0, 2, 1))[:, ~np.eye(90, dtype=bool)]
    expected = others.mean(axis=1)[:, None] + others.std(axis=1)[:, None] * STEPS
    biases = trial_biases(Similarities(features))
    assert biases.dtype == torch.float32
    np.testing.assert_allclose(biases.numpy(), -expected, rtol=0, atol=1e-6)
    assert (biases.diff(dim=1) > 0).all()  # the strictest first
    found = limits(Similarities(features), (2.0, -0.5))
    assert found.dtype == torch.float32
    further = others.mean(axis=1)[:, None] + others.std(axis=1)[:, None] * [2, -0.5]
    np.testing.assert_allclose(found.numpy(), further, rtol=0, atol=1e-6)


def test_limits_stay_where_a_cosine_can_be_on_either_side() -> None:
    equal = trial_biases(Similarities(torch.eye(3)[:1].repeat(1, 5, 1)))
    assert equal.tolist() == [pytest.approx([-1] * 6, abs=2e-6)]
    assert (equal > -1).all()
    opposite = trial_biases(Similarities(torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]])))
    assert opposite.tolist() == [pytest.approx([1] * 6, abs=2e-6)]
    assert (opposite < 1).all()
    apart = limits(Similarities(torch.eye(2)[None, [0, 0, 1]]), (100.0, -100.0))
    assert apart.tolist() == [pytest.approx([1, -1], abs=2e-6)]
    assert (apart.abs() < 1).all()
    alone = trial_biases(Similarities(torch.ones(2, 1, 1)))
    assert alone.tolist() == [[0.0] * 6] * 2
    assert trial_biases(Similarities(torch.ones(0, 7, 4))).shape == (0, 6)


@given(st.integers(0, 10_000), st.floats(-8, 8), st.integers(0, 8), st.sampled_from([1, 2, 7, 30]))
@settings(deadline=None, max_examples=100)
def test_no_seed_is_left_unconnected(seed: int, offset: float, doublings: int, count: int) -> None:
    """Whatever all features have in common: little, or so much that their directions differ by rounding."""
    random = np.random.default_rng(seed)
    features = random.normal(np.sign(offset) * 10 ** abs(offset) - 1, 1, (2, count, 1 << doublings))
    assume(np.abs(features).max(axis=2).min() > 1e-6)  # zeros have no direction
    assert connected_seeds(torch.from_numpy(features).float(), (1, count)).all()


@pytest.mark.parametrize("depth", [1, 3, 384, 1536, 8192])
def test_equal_patches_are_one_whole(depth: int) -> None:
    vector = torch.randn(1, 1, depth) * 10.0 ** torch.randint(-3, 4, (1, 1, depth))
    result = lost_boxes(vector.repeat(1, 42, 1), (6, 7), "auto")
    assert result.xyxy.tolist() == [[0, 0, 7, 6]]
    assert (result.degrees == 41).all()
    assert result.scores.tolist() == [0]  # which is no object
    assert connected_seeds(vector.repeat(1, 42, 1), (6, 7)).all()


def square(contrast: float) -> Tensor:
    """Features of an image of 8x10 patches with an object of 3x4, with noise."""
    features = 0.1 * torch.randn(1, 8, 10, 32)
    features[..., :16] += contrast
    features[0, 2:5, 3:7, :16] -= contrast
    features[0, 2:5, 3:7, 16:] += contrast
    return features.view(1, 80, 32)


@pytest.mark.parametrize("common", [0.0, 1.0, 10.0, 100.0, 300.0])
def test_what_all_features_have_in_common_hides_no_object(common: float) -> None:
    """Any one bias would see everything connected, from some size of it on."""
    result = lost_boxes(square(1.0) + common, (8, 10), "auto")
    assert result.xyxy.tolist() == [[3, 2, 7, 5]]
    assert result.scores[0] > 0.7
    if common >= 10:
        assert (lost_boxes(square(1.0) + common, (8, 10), -0.5, normalize=True).degrees == 79).all()


def test_where_nothing_but_rounding_tells_features_apart_the_image_is_the_object_with_score_zero() -> None:
    result = lost_boxes(square(1.0) + 1e6, (8, 10), "auto")
    assert result.xyxy.tolist() == [[0, 0, 10, 8]]
    assert result.scores.tolist() == [0]


def test_a_patch_of_zeros_is_similar_to_nothing() -> None:
    features = square(1.0) + 1
    features[0, 17] = 0
    result = lost_boxes(features, (8, 10), "auto")
    assert result.degrees[0, 1, 7] == 0
    assert lost_boxes(torch.zeros(1, 12, 3), (3, 4), "auto").scores.tolist() == [0]


def test_auto_keeps_the_first_of_the_highest_scores_of_its_trials() -> None:
    chosen = set()
    for number in range(50):
        features = torch.randn(1, 6 * 7, 2, generator=torch.Generator().manual_seed(number)) + 0.5
        biases = trial_biases(Similarities(prepare(features, normalize=True)))
        each = [lost_boxes(features, (6, 7), float(bias), normalize=True) for bias in biases[0]]
        scores = [float(one.scores) for one in each]
        result = lost_boxes(features, (6, 7), "auto")
        best = scores.index(max(scores))
        chosen.add(best)
        assert float(result.scores) == pytest.approx(max(scores), abs=1e-6)
        assert torch.equal(result.masks, each[best].masks)
        assert torch.equal(result.degrees, each[best].degrees)
        assert result.bias[0] == biases[0, best]
    assert chosen >= {0, 1, 2, 3}


def test_auto_is_a_function_of_the_similarities_like_any_other() -> None:
    features = torch.randn(3, 42, 6) + 0.5
    vectors = prepare(features, normalize=True)
    biases = trial_biases(Similarities(vectors))
    automatic = lost_boxes(features, (6, 7), "auto")
    for same in (trial_biases, biases):
        result = find_candidates(vectors, (6, 7), same, 100).best()
        for name in ("xyxy", "scores", "seeds", "degrees", "masks", "bias"):
            assert torch.equal(getattr(result, name), getattr(automatic, name))
