"""Counts, means and deviations tile by tile against the whole Gram matrix in NumPy; counts to the last tie."""

from collections.abc import Callable, Iterator
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

from lostreg.methods import similarity
from lostreg.methods.lost import lost_maps, prepare
from lostreg.methods.similarity import Similarities


@contextmanager
def tiled(*, keeps: bool, rows: int) -> Iterator[None]:
    """Tiles of so many rows, which are kept or computed again."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(similarity, "_KEPT_ELEMENTS", {"cpu": 1 << 20 if keeps else 0})
        patched.setattr(similarity, "_BLOCK_ELEMENTS", {"cpu": 0})
        patched.setattr(similarity, "_LEAST_ROWS", rows)
        yield


@st.composite
def batches(draw: st.DrawFn, elements: st.SearchStrategy[int], most: int = 14) -> Tensor:
    """Features (B, N, D) of integers: products and their sums are exact."""
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, most)), draw(st.integers(1, 4)))
    return torch.from_numpy(draw(arrays(np.float32, shape, elements=elements.map(float))))


def products(features: Tensor) -> np.ndarray:
    vectors = features.double().numpy()
    return vectors @ vectors.transpose(0, 2, 1)


def pairs(features: Tensor) -> np.ndarray:
    """Similarities of all pairs of different patches, (B, N * (N - 1))."""
    return products(features)[:, ~np.eye(features.shape[1], dtype=bool)]


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
@pytest.mark.parametrize("count", [similarity._count_on_cpu, similarity._count])  # of the latter, other devices' way
@given(features=batches(st.integers(-3, 3)), rows=st.integers(1, 16), data=st.data())
@settings(deadline=None, max_examples=60)
def test_counts_are_those_of_the_whole_matrix_at_each_threshold(
    features: Tensor, rows: int, count: Callable[..., None], keeps: bool, data: st.DataObject
) -> None:
    shape = (len(features), data.draw(st.integers(1, 4)))
    halves = st.integers(-20, 20).map(float)
    thresholds = torch.from_numpy(data.draw(arrays(np.float32, shape, elements=halves))) / 2
    above = products(features)[:, None] > thresholds.numpy()[:, :, None, None]
    above[..., np.eye(features.shape[1], dtype=bool)] = False
    with tiled(keeps=keeps, rows=rows), pytest.MonkeyPatch.context() as patched:
        patched.setattr(similarity, "_count_on_cpu", count)
        counts = Similarities(features).counts_above(thresholds)
    assert counts.dtype == torch.int64
    np.testing.assert_array_equal(counts.numpy(), above.sum(axis=3))


@pytest.mark.parametrize("length", [255, 256, 65_535, 65_536, 70_000])
def test_flags_are_counted_in_integers_that_hold_their_number(length: int) -> None:
    flags = np.ones((length, 2), dtype=np.bool_)
    flags[0, 1] = False
    assert similarity._sums(flags, axis=0).tolist() == [length, length - 1]
    assert similarity._sums(flags.T, axis=1).tolist() == [length, length - 1]


@pytest.mark.parametrize("keeps", [True, False])
@given(features=batches(st.integers(-3, 3)).filter(lambda features: features.shape[1] > 1), rows=st.integers(1, 16))
@settings(deadline=None, max_examples=60)
def test_mean_and_deviation_are_those_of_pairs_of_different_patches(features: Tensor, rows: int, keeps: bool) -> None:
    with tiled(keeps=keeps, rows=rows):
        mean, deviation = Similarities(features).mean_and_deviation()
    expected = pairs(features)
    rounding = 1e-6 * max(1.0, float(np.abs(expected).max()))  # of float32, at sums of this size
    np.testing.assert_allclose(mean.numpy(), expected.mean(axis=1), rtol=1e-6, atol=rounding)
    # Squares are known to a share of 1e-7 of the largest, which may be a patch's own, and their root to that's root.
    rounding = 1e-3 * np.abs(products(features)).max(axis=(1, 2))
    assert (np.abs(deviation.numpy() - expected.std(axis=1)) <= 1e-6 + rounding).all()


@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize("offset", [0.0, 1.0, 10.0, 100.0])
def test_the_deviation_is_right_where_all_cosines_are_close_to_one(offset: float, keeps: bool) -> None:
    features = prepare(torch.randn(3, 200, 48) + offset, normalize=True)
    with tiled(keeps=keeps, rows=64):
        mean, deviation = Similarities(features).mean_and_deviation()
    expected = pairs(features)
    assert offset < 100 or (expected.mean() > 0.9998 and expected.std(axis=1).max() < 5e-5)
    np.testing.assert_allclose(mean.numpy(), expected.mean(axis=1), rtol=0, atol=1e-6)
    np.testing.assert_allclose(deviation.numpy(), expected.std(axis=1), rtol=0.01)


def test_equal_patches_deviate_by_nothing() -> None:
    mean, deviation = Similarities(torch.full((2, 40, 3), 2.0)).mean_and_deviation()
    assert mean.tolist() == pytest.approx([12, 12], rel=1e-6)
    assert deviation.tolist() == pytest.approx([0, 0], abs=1e-5)


def test_a_single_patch_and_an_empty_batch_have_no_pairs() -> None:
    for features in (torch.ones(3, 1, 4), torch.ones(0, 6, 4), torch.ones(0, 1, 4)):
        for value in Similarities(features).mean_and_deviation():
            assert value.tolist() == [0.0] * len(features)
            assert value.dtype == torch.float32
    assert Similarities(torch.ones(3, 1, 4)).counts_above(torch.zeros(3, 2)).tolist() == [[[0], [0]]] * 3
    assert Similarities(torch.ones(0, 6, 4)).counts_above(torch.zeros(0, 2)).shape == (0, 2, 6)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("keeps", [True, False])
def test_features_that_are_no_numbers_leave_other_images_alone(keeps: bool, value: float) -> None:
    features = torch.randn(3, 20, 9)
    features[1, 4, 2] = value
    others = features[[0, 2]]
    with tiled(keeps=keeps, rows=7):
        mean, deviation = Similarities(features).mean_and_deviation()
        counts = Similarities(features).counts_above(torch.zeros(3, 2))
    np.testing.assert_allclose(mean[[0, 2]].numpy(), pairs(others).mean(axis=1), rtol=0, atol=1e-5)
    np.testing.assert_allclose(deviation[[0, 2]].numpy(), pairs(others).std(axis=1), rtol=1e-5)
    assert not deviation[1].isfinite()
    assert torch.equal(counts[[0, 2]], Similarities(others).counts_above(torch.zeros(2, 2)))


def test_how_tiles_are_cut_and_whether_they_are_kept_change_no_box() -> None:
    features = (torch.randint(2, (3, 120, 64)) * 2 - 1) / 8  # of length 1, and their products are exact
    biases = torch.tensor([[-0.125, 0.0625], [0.0, -0.0625], [-0.25, 0.125]])
    for bias in (-0.125, biases, "auto"):
        expected = lost_maps(features, (10, 12), bias, 20)
        for keeps in (True, False):
            with tiled(keeps=keeps, rows=32):
                found = lost_maps(features, (10, 12), bias, 20)
            torch.testing.assert_close(found.bias, expected.bias, rtol=0, atol=1e-6)  # sums in another order
            for name in ("masks", "degrees", "seeds"):
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
            similarities.mean_and_deviation()
            similarities.counts_above(torch.zeros(2, 6))  # one look for all thresholds
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
        maps = lost_maps(prepare(torch.randn(1, count, 16), normalize=True), (50, 80), bias, 100)
    assert (maps.degrees.sum(dim=2) > 0).all()
    assert (maps.degrees.sum(dim=2) < count**2).all()
    assert similarity._LEAST_ROWS * count <= largest.elements < count**2 / 16


@pytest.mark.parametrize("keeps", [True, False])
@given(count=st.integers(1, 40), rows=st.integers(1, 16))
@settings(deadline=None)
def test_the_bound_on_memory_holds_what_tiles_take(count: int, rows: int, keeps: bool) -> None:
    rows = min(rows, count)
    with tiled(keeps=keeps, rows=rows):
        similarities = Similarities(torch.zeros(1, count, 2))
        tiles = [tile.values for tile in similarities.tiles()]
        held = {tile.untyped_storage().data_ptr(): tile.untyped_storage().nbytes() for tile in tiles}
        assert (len(held) > 1) <= keeps
        beside = max(tile.nbytes for tile in tiles)
        taken = sum(held.values()) + beside
        bound = Similarities.most_bytes(count, torch.device("cpu"))
        assert taken <= bound <= 2 * taken + 8 * rows * count


def test_a_gpu_keeps_more_tiles_and_the_bound_says_so() -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    kept, not_kept = 1 << 14, (1 << 14) + 1
    half = 4 * (1 << 28) // 2
    assert Similarities.most_bytes(kept, cuda) > half > Similarities.most_bytes(kept, cpu)
    assert Similarities.most_bytes(kept, cuda) - Similarities.most_bytes(not_kept, cuda) > half // 2
