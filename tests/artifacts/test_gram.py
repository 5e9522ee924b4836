"""How LOST sees patches: against explicit Gram matrices."""

import numpy as np
import pytest
import torch

from lostreg.artifacts.gram import EIGENVALUES, GramView, GramViews, view_gram
from lostreg.methods.lost import lost_boxes

pytestmark = pytest.mark.usefixtures("one_thread")


def view(features: torch.Tensor, outliers: np.ndarray | None = None, **options: object) -> GramViews:
    mask = np.zeros(len(features), bool) if outliers is None else outliers
    given = {"bias": 0.0, "k_patches": 100, "normalize": True, **options}
    return view_gram(features, (1, len(features)), mask, **given)  # type: ignore[arg-type]


def gram(features: torch.Tensor) -> np.ndarray:
    unit = features.double().numpy()
    unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
    return unit @ unit.T


def check(found: GramView, features: torch.Tensor) -> None:
    matrix = gram(features)
    values = np.linalg.eigvalsh(matrix)[::-1]
    shares = np.clip(values, 0, None) / values.sum()
    count = min(EIGENVALUES, len(shares))
    assert len(found.spectrum) == EIGENVALUES
    np.testing.assert_allclose(found.spectrum[:count], shares[:count], atol=1e-6)
    assert found.spectrum[count:] == (0,) * (EIGENVALUES - count)
    assert all(type(value) is float for value in found.spectrum)
    sure = shares[shares > 1e-12]
    assert found.effective_rank == pytest.approx(np.exp(-(sure * np.log(sure)).sum()), rel=1e-4)
    pairs = matrix[~np.eye(len(matrix), dtype=bool)]
    assert found.positive == pytest.approx((pairs > 0).mean(), abs=1e-9)
    assert found.similarity == pytest.approx(pairs.mean(), abs=1e-6)


@pytest.mark.parametrize(("count", "dimensions"), [(2, 8), (30, 8), (8, 30), (17, 17), (5, 1)])
def test_figures_are_those_of_the_explicit_gram_matrix(count: int, dimensions: int) -> None:
    features = torch.randn(count, dimensions) + 0.3
    check(view(features).every, features)


@pytest.mark.parametrize("groups", [1, 2, 5, 16, 20])
def test_orthogonal_groups_have_as_many_equal_eigenvalues(groups: int) -> None:
    features = torch.eye(32)[torch.arange(3 * groups) % groups] * torch.rand(3 * groups, 1).add(0.5)
    found = view(features).every
    equal = min(groups, EIGENVALUES)
    np.testing.assert_allclose(found.spectrum[:equal], 1 / groups, rtol=1e-5)
    np.testing.assert_allclose(found.spectrum[equal:], 0, atol=1e-6)
    assert found.effective_rank == pytest.approx(groups, rel=1e-4)
    assert found.positive == pytest.approx(2 / (3 * groups - 1))
    assert found.similarity == pytest.approx(2 / (3 * groups - 1), rel=1e-5)
    assert sum(found.spectrum) == pytest.approx(min(1, EIGENVALUES / groups), rel=1e-5)


def test_one_patch_is_one_direction_without_pairs() -> None:
    found = view(torch.randn(1, 6))
    assert found.every.spectrum == pytest.approx((1, *[0] * 15))
    assert found.every.effective_rank == pytest.approx(1)
    assert (found.every.positive, found.every.similarity, found.normal) == (0, 0, None)


def test_the_length_of_features_plays_no_part_in_the_figures() -> None:
    features = torch.randn(12, 6)
    longer = features * torch.rand(12, 1).add(0.1) * 50
    first, second = view(features, normalize=False), view(longer, normalize=False)
    assert first.every.spectrum == pytest.approx(second.every.spectrum, abs=1e-6)
    assert first.every.similarity == pytest.approx(second.every.similarity, abs=1e-6)


@pytest.mark.parametrize("bias", [0.0, -0.3, 0.2, "auto"])
@pytest.mark.parametrize("normalize", [True, False])
def test_degrees_are_lost_s_with_outliers_and_counted_again_without(bias: float | str, normalize: bool) -> None:
    if bias == "auto" and not normalize:
        return
    features = torch.randn(40, 10) + 0.2
    features[::7] += 3
    outliers = np.arange(40) % 7 == 0
    found = view(features, outliers, bias=bias, k_patches=9, normalize=normalize)
    lost = lost_boxes(features[None], (1, 40), bias, 9, normalize=normalize)  # type: ignore[arg-type]
    np.testing.assert_array_equal(found.degrees, lost.degrees.flatten().numpy())
    assert found.degrees_normal is not None
    assert found.degrees.dtype == found.degrees_normal.dtype == np.int64
    products = gram(features) if normalize else (features.double() @ features.double().T).numpy()
    connected = products + float(lost.bias) > 0
    np.fill_diagonal(connected, val=False)
    np.testing.assert_array_equal(found.degrees_normal[outliers], -1)
    kept = ~outliers
    np.testing.assert_array_equal(found.degrees, connected.sum(axis=1))
    np.testing.assert_array_equal(found.degrees_normal[kept], connected[np.ix_(kept, kept)].sum(axis=1))
    assert (found.degrees_normal[kept] < found.degrees[kept]).any()


def test_figures_without_outliers_are_those_of_the_other_patches() -> None:
    features = torch.randn(30, 12)
    features[:10] = features[0] + 4
    outliers = np.arange(30) < 10
    found = view(features, outliers)
    check(found.every, features)
    assert found.normal is not None
    check(found.normal, features[10:])
    assert found.normal.similarity < found.every.similarity


@pytest.mark.parametrize("kept", [0, 1])
def test_fewer_than_two_other_patches_are_no_view(kept: int) -> None:
    found = view(torch.randn(6, 4), np.arange(6) >= kept)
    assert found.normal is None
    assert found.degrees_normal is None
    assert found.degrees.shape == (6,)


def test_nothing_is_left_out_without_outliers() -> None:
    found = view(torch.randn(6, 4))
    assert found.normal is None
    assert found.degrees_normal is None


def test_equal_and_zero_features_are_finite() -> None:
    for features in (torch.ones(9, 4), torch.zeros(9, 4)):
        one = view(features).every
        assert np.isfinite([*one.spectrum, one.effective_rank, one.positive, one.similarity]).all()
        assert one.effective_rank == pytest.approx(1, abs=1e-3)
        assert sum(one.spectrum) <= 1.0001


def test_the_average_is_that_of_each_figure() -> None:
    views = [GramView(tuple([scale / 20] * 16), 2.0 * scale, 0.1 * scale, -0.2 * scale) for scale in (1, 2, 6)]
    mean = GramView.average(views)
    assert mean.spectrum == pytest.approx([3 / 20] * 16)
    assert (mean.effective_rank, mean.positive, mean.similarity) == pytest.approx((6, 0.3, -0.6))
    assert GramView.average(views[:1]) == views[0]
