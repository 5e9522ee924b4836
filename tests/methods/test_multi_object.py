"""Several objects: against the oracle, against pictures one can check by hand, and whatever shares their batch."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from random_features import CLEAR, exact_unit_vectors, integer_features
from reference_lost import Reference, reference_several

from lostreg.images.boxes import pairwise_iou
from lostreg.methods import similarity
from lostreg.methods.lost import Bias, Objects, find_candidates, prepare
from lostreg.methods.multi_object import find_objects, lost_objects
from lostreg.methods.similarity import connections_to


def several(features: np.ndarray, grid: tuple[int, int], bias: Bias, k: int, most: int, least: float) -> list[Objects]:
    vectors = prepare(torch.from_numpy(features), normalize=bias == "auto")
    return find_objects(find_candidates(vectors, grid, bias, k), k, most, least)


def assert_same(found: Objects, expected: list[Reference]) -> None:
    assert [tuple(box) for box in found.xyxy.tolist()] == [one.box for one in expected]
    assert [tuple(seed) for seed in found.seeds.tolist()] == [one.seed for one in expected]
    np.testing.assert_array_equal(found.masks, [one.mask for one in expected])
    np.testing.assert_allclose(found.scores, [one.score for one in expected], atol=1e-4)
    for bias, one in zip(found.biases.tolist(), expected, strict=True):
        assert min(abs(bias - other) for other in one.alike) < 1e-6
    if abs(found.biases[0] - expected[0].bias) < 1e-6:
        np.testing.assert_array_equal(found.heat, expected[0].degrees)


@given(integer_features(), st.integers(-6, 6), st.integers(1, 40), st.integers(1, 6))
@settings(deadline=None, max_examples=150)
def test_objects_equal_the_oracles_where_sums_are_exact(case, bias, k, most) -> None:
    features, grid = case
    found = several(features, grid, float(bias), k, most, 0.0)
    for image, one in zip(features, found, strict=True):
        assert_same(one, reference_several(image, grid, bias, k, most=most))


@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.2, 0.4]))
@settings(deadline=None, max_examples=40)
def test_automatic_biases_and_thresholds_equal_the_oracles(seed, least) -> None:
    features = np.random.default_rng(seed).normal(1, 1, (2, 42, 5)).astype(np.float32)
    expected = [reference_several(image, (6, 7), "auto", 9, True, 5, least) for image in features]
    assume(all(one.margin > CLEAR for image in expected for one in image))
    for one, reference in zip(several(features, (6, 7), "auto", 9, 5, least), expected, strict=True):
        assert_same(one, reference)


def three_squares() -> tuple[np.ndarray, tuple[int, int]]:
    """Features of 12 x 14 patches: three squares on a ground, each of them unlike all else."""
    kinds = np.zeros((12, 14), dtype=int)
    kinds[1:3, 1:3] = 1
    kinds[2:6, 8:13] = 2
    kinds[7:10, 2:5] = 3
    return np.eye(4, dtype=np.float32)[kinds.ravel()][None], (12, 14)


def test_three_squares_are_boxed_one_after_the_other() -> None:
    features, grid = three_squares()
    (found,) = several(features, grid, "auto", 100, 5, 0.25)
    assert sorted(found.xyxy[:3].tolist()) == [[1, 1, 3, 3], [2, 7, 5, 10], [8, 2, 13, 6]]
    assert (found.scores[:3] > 0.25).all()
    assert found.masks.sum(axis=0).max() == 1
    assert not found.masks[:3].any(axis=0)[0].any()


@given(integer_features(), st.integers(-6, 6), st.integers(1, 6))
@settings(deadline=None, max_examples=60)
def test_a_larger_number_adds_objects_and_changes_none(case, bias, most) -> None:
    features, grid = case
    alone = several(features, grid, float(bias), 9, 1, 0.0)
    for first, more in zip(alone, several(features, grid, float(bias), 9, most, 0.0), strict=True):
        assert first.xyxy.tolist() == more.xyxy[:1].tolist()
        assert first.scores.tolist() == more.scores[:1].tolist()
        assert 1 <= len(more.xyxy) <= most
        assert more.masks.sum(axis=0).max() <= 1
        overlaps = pairwise_iou(more.xyxy, more.xyxy)[~np.eye(len(more.xyxy), dtype=bool)]
        assert (overlaps < 0.5).all()


@given(st.integers(0, 10_000), st.permutations(range(4)))
@settings(deadline=None, max_examples=30)
def test_neighbours_in_the_batch_change_nothing(seed, order) -> None:
    features = np.concatenate([exact_unit_vectors(seed), exact_unit_vectors(seed + 1)])
    together = several(features, (6, 7), -0.125, 20, 4, 0.1)
    for place, one in zip(order, several(features[order], (6, 7), -0.125, 20, 4, 0.1), strict=True):
        alone = several(features[[place]], (6, 7), -0.125, 20, 4, 0.1)[0]
        assert one.xyxy.tolist() == together[place].xyxy.tolist() == alone.xyxy.tolist()
        assert one.seeds.tolist() == together[place].seeds.tolist() == alone.seeds.tolist()


def test_a_weak_object_ends_the_search_and_is_kept_only_as_the_first() -> None:
    features, grid = three_squares()
    (every,) = several(features, grid, "auto", 100, 3, 0.0)
    least = float(every.scores[1:].max()) + 1e-3
    (few,) = several(features, grid, "auto", 100, 3, least)
    assert len(few.xyxy) == 1
    (weak,) = several(features, grid, "auto", 100, 3, 1.0)
    assert weak.scores[0] < 1
    assert weak.xyxy.tolist() == every.xyxy[:1].tolist()


@pytest.mark.parametrize("bias", [0.0, "auto"])
def test_no_images_have_no_objects(bias: float | str) -> None:
    assert lost_objects(torch.ones(0, 12, 3), (3, 4), bias) == []


def test_an_image_may_run_out_of_patches() -> None:
    features = np.repeat(np.eye(2, dtype=np.float32), [12, 4], axis=0)[None]  # three rows of one kind, one of another
    (found,) = several(features, (4, 4), -0.5, 100, 9, 0.0)
    assert found.xyxy.tolist() == [[0, 3, 4, 4], [0, 0, 4, 3]]


@pytest.mark.parametrize("bias", [0.0, -9.0])  # everything is connected, or nothing
def test_a_score_of_0_is_no_further_object(bias: float) -> None:
    (found,) = several(np.ones((1, 4, 2), np.float32), (2, 2), bias, 100, 9, 0.0)
    assert found.scores.tolist() == [0.0]


@pytest.mark.parametrize("block", [1, 3, 1000])
def test_connections_to_a_set_are_counted_whatever_the_blocks(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similarity, "_LEAST_ROWS", block)
    monkeypatch.setattr(similarity, "_BLOCK_ELEMENTS", {"cpu": 1})
    random = np.random.default_rng(0)
    features = random.integers(-3, 4, (3, 20, 4)).astype(np.float32)
    others = random.random((3, 20)) < 0.4
    others[1] = False
    thresholds = torch.tensor([[0.5, -2.5], [0.5, 3.5], [-0.5, 1.5]])
    counts = connections_to(torch.from_numpy(features), torch.from_numpy(others), thresholds)
    gram = features @ features.transpose(0, 2, 1)
    expected = ((gram[:, None] > thresholds.numpy()[:, :, None, None]) & others[:, None, None, :]).sum(axis=3)
    np.testing.assert_array_equal(counts.numpy(), expected)
