"""Counts and quantiles tile by tile against the whole Gram matrix in NumPy, to the last tie."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lostreg import similarity
from lostreg.lost import object_maps
from lostreg.similarity import Similarities

FRACTIONS = [0.0, 0.25, 0.5, 0.9375, 1.0]


@contextmanager
def tiled(*, keeps: bool, rows: int, sampled: int = similarity._SAMPLED_PAIRS) -> Iterator[None]:
    """Tiles of so many rows, which are kept or computed again, and quantiles that look at so many pairs first."""
    similarity._sampled_places.cache_clear()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(similarity, "_KEPT_ELEMENTS", {"cpu": 1 << 20 if keeps else 0})
        patched.setattr(similarity, "_BLOCK_ELEMENTS", {"cpu": 0})
        patched.setattr(similarity, "_LEAST_ROWS", rows)
        patched.setattr(similarity, "_SAMPLED_PAIRS", sampled)
        yield
    similarity._sampled_places.cache_clear()


@st.composite
def batches(draw: st.DrawFn, elements: st.SearchStrategy[int], most: int = 14) -> Tensor:
    """Features (B, N, D) of integers: products and their sums are exact."""
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, most)), draw(st.integers(1, 4)))
    return torch.from_numpy(draw(arrays(np.float32, shape, elements=elements.map(float))))


# Vectors of one length, as after normalisation: no similarity is larger than that of a patch to itself.
signs = st.sampled_from([-1, 1])


def products(features: Tensor) -> np.ndarray:
    vectors = features.double().numpy()
    return vectors @ vectors.transpose(0, 2, 1)


def pairs(features: Tensor) -> np.ndarray:
    """Similarities of all pairs of different patches, (B, N * (N - 1))."""
    return products(features)[:, ~np.eye(features.shape[1], dtype=bool)]


def assert_quantiles(features: Tensor, fraction: float) -> None:
    found = Similarities(features).quantile(fraction)
    expected = np.quantile(pairs(features), fraction, axis=1, method="lower")
    np.testing.assert_array_equal(found.numpy(), expected)


@pytest.mark.parametrize("keeps", [True, False])
@given(features=batches(st.integers(-3, 3)), rows=st.integers(1, 16))
@settings(deadline=None)
def test_every_pair_of_patches_is_in_the_tiles_as_often_as_in_the_matrix(
    features: Tensor, rows: int, keeps: bool
) -> None:
    matrix = np.full((len(features), features.shape[1], features.shape[1]), np.nan)
    with tiled(keeps=keeps, rows=rows):
        for tile in Similarities(features).tiles():
            for first, second, values in (
                (tile.rows, tile.columns, tile.values),
                (tile.columns, tile.rows, tile.values.mT),
            )[: tile.weight]:
                assert np.isnan(matrix[:, first, second]).all()
                matrix[:, first, second] = values
    np.testing.assert_array_equal(matrix, products(features))


@pytest.mark.parametrize("keeps", [True, False])
@given(features=batches(st.integers(-3, 3)), rows=st.integers(1, 16), data=st.data())
@settings(deadline=None)
def test_counts_are_those_of_the_whole_matrix(features: Tensor, rows: int, keeps: bool, data: st.DataObject) -> None:
    thresholds = st.lists(st.integers(-20, 20), min_size=len(features), max_size=len(features))
    threshold = torch.tensor(data.draw(thresholds)) / 2
    above = products(features) > threshold.numpy()[:, None, None]
    above[:, np.eye(features.shape[1], dtype=bool)] = False
    with tiled(keeps=keeps, rows=rows):
        counts = Similarities(features).counts_above(threshold)
    assert counts.dtype == torch.int64
    np.testing.assert_array_equal(counts.numpy(), above.sum(axis=2))


@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize("sampled", [4, similarity._SAMPLED_PAIRS])
@given(features=batches(signs).filter(lambda features: features.shape[1] > 1), rows=st.integers(1, 16), data=st.data())
@settings(deadline=None)
def test_quantiles_are_those_of_pairs_of_different_patches(
    features: Tensor, rows: int, sampled: int, keeps: bool, data: st.DataObject
) -> None:
    with tiled(keeps=keeps, rows=rows, sampled=sampled):
        assert_quantiles(features * data.draw(st.integers(1, 3)), data.draw(st.sampled_from(FRACTIONS)))


def looks(similarities: Similarities, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """The brackets in which a quantile is looked for, as it goes."""
    seen = []
    select = similarities._select

    def record(rank: int, low: Tensor, high: Tensor) -> Tensor:
        seen.append((low, high))
        return select(rank, low, high)

    monkeypatch.setattr(similarities, "_select", record)
    return seen


@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize("depth", [1, 2, 9, 64])
def test_a_sample_of_pairs_brackets_the_quantile(keeps: bool, depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From two values, which are the bracket's own limits, to values that are almost all different."""
    features = (torch.randint(2, (3, 90, depth)) * 2 - 1).float()
    with tiled(keeps=keeps, rows=40, sampled=1200):
        similarities = Similarities(features)
        brackets = looks(similarities, monkeypatch)
        found = similarities.quantile(0.25)
    expected = np.quantile(pairs(features), 0.25, axis=1, method="lower")
    np.testing.assert_array_equal(found.numpy(), expected)
    ((low, high),) = brackets
    for image, matrix in enumerate(products(features)):
        assert low[image].isfinite()
        assert ((matrix > float(low[image])) & (matrix < float(high[image]))).sum() < 0.35 * matrix.size


@pytest.mark.parametrize("keeps", [True, False])
def test_the_sample_holds_similarities_of_the_matrix_about_as_often_as_that(keeps: bool) -> None:
    features = (torch.randint(2, (2, 100, 6)) * 2 - 1).float()
    with tiled(keeps=keeps, rows=30, sampled=4000):
        sample = Similarities(features)._sample().numpy()
    assert sample.shape == (2, 4000)
    for values, matrix in zip(sample, products(features), strict=True):
        for value in np.unique(matrix):
            assert np.mean(values == value) == pytest.approx(np.mean(matrix == value), abs=0.05)


@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize("size", [600, 20_000])  # a second, wider bracket holds everything, or misses again
@pytest.mark.parametrize("value", [-1000.0, 1000.0, 1.0])
def test_a_bracket_that_misses_costs_time_alone(
    value: float, size: int, keeps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = (torch.randint(2, (2, 60, 9)) * 2 - 1).float()
    expected = np.quantile(pairs(features), 0.25, axis=1, method="lower")
    with tiled(keeps=keeps, rows=25, sampled=600):
        similarities = Similarities(features)
        useless = similarities._sample()[:, :1].repeat(1, size)
        useless[1] = value  # the other image's is no better, but for its value
        monkeypatch.setattr(similarities, "_sample", lambda: useless)
        brackets = looks(similarities, monkeypatch)
        np.testing.assert_array_equal(similarities.quantile(0.25).numpy(), expected)
    assert len(brackets) == (3 if size == 20_000 else 2)


@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize("sampled", [4, similarity._SAMPLED_PAIRS])
@pytest.mark.parametrize("count", [2, 3, 40])
def test_equal_patches_have_one_quantile(count: int, sampled: int, keeps: bool) -> None:
    with tiled(keeps=keeps, rows=7, sampled=sampled):
        for fraction in FRACTIONS:
            assert Similarities(torch.full((2, count, 3), 2.0)).quantile(fraction).tolist() == [12.0, 12.0]


def test_two_patches_are_one_pair() -> None:
    features = torch.tensor([[[3.0, 4.0], [-5.0, 0.0]]])
    for fraction in FRACTIONS:
        assert Similarities(features).quantile(fraction).tolist() == [-15.0]


def test_a_single_patch_and_an_empty_batch_have_no_pairs() -> None:
    assert Similarities(torch.ones(3, 1, 4)).quantile(0.25).isnan().tolist() == [True] * 3
    assert Similarities(torch.ones(0, 6, 4)).quantile(0.25).shape == (0,)
    assert Similarities(torch.ones(3, 1, 4)).counts_above(torch.zeros(3)).tolist() == [[0]] * 3
    assert Similarities(torch.ones(0, 6, 4)).counts_above(torch.zeros(0)).shape == (0, 6)


@pytest.mark.parametrize("sampled", [4, similarity._SAMPLED_PAIRS])
@pytest.mark.parametrize("keeps", [True, False])
def test_features_that_are_no_numbers_leave_other_images_alone(keeps: bool, sampled: int) -> None:
    features = (torch.randint(2, (3, 20, 9)) * 2 - 1).float()
    expected = np.quantile(pairs(features), 0.25, axis=1, method="lower")
    features[1] = torch.nan
    with tiled(keeps=keeps, rows=7, sampled=sampled):
        found = Similarities(features).quantile(0.25).numpy()
    np.testing.assert_array_equal(found[[0, 2]], expected[[0, 2]])
    assert not np.isfinite(found[1])


def test_how_tiles_are_cut_and_whether_they_are_kept_change_no_box() -> None:
    features = (torch.randint(2, (3, 120, 64)) * 2 - 1) / 8  # of length 1, and their products are exact
    for bias in (-0.125, "auto"):
        expected = object_maps(features, (10, 12), bias, 20, normalize=True)
        for keeps in (True, False):
            with tiled(keeps=keeps, rows=32, sampled=3000):
                found = object_maps(features, (10, 12), bias, 20, normalize=True)
            for name in ("masks", "degrees", "seeds", "bias"):
                assert torch.equal(getattr(found, name), getattr(expected, name))


def test_kept_similarities_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    products = []
    product = Similarities._product

    def record(similarities: Similarities, rows: slice, columns: slice) -> Tensor:
        products.append((rows, columns))
        return product(similarities, rows, columns)

    monkeypatch.setattr(Similarities, "_product", record)
    features = torch.randn(2, 40, 8)
    for keeps, times in ((True, 1), (False, 2)):
        products.clear()
        with tiled(keeps=keeps, rows=10):
            similarities = Similarities(features)
            for _ in range(2):
                similarities.counts_above(torch.zeros(2))
        assert len(products) == 7 * times  # four tiles on the diagonal, three beside it


class Largest(TorchDispatchMode):
    """Notes how many elements the largest tensor has that any operation gives."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, tuple | list) else [result]:
            if isinstance(one, Tensor):
                self.elements = max(self.elements, one.numel())
        return result


@pytest.mark.parametrize("bias", [-0.1, "auto"])
def test_no_tensor_grows_with_the_square_of_the_number_of_patches(bias: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similarity, "_KEPT_ELEMENTS", {"cpu": 0})
    count = 4000
    with Largest() as largest:
        maps = object_maps(torch.randn(1, count, 16), (50, 80), bias, 100, normalize=True)
    assert 0 < maps.degrees.sum() < count**2
    assert similarity._LEAST_ROWS * count <= largest.elements < count**2 / 16
