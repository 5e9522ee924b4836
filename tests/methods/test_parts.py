"""Parts: clusters against k-means by the book, pieces against a walk, objects on scenes one can check by hand."""

import numpy as np
import pytest
import torch
from dispatch import DEVICE, fake_gpu, needs_simulated_pinning
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from lostreg.errors import OptionError
from lostreg.images.boxes import pairwise_iou
from lostreg.methods import parts
from lostreg.methods.learned import LinearObjectness, taught_ranks
from lostreg.methods.lost import Candidates, Objects, find_candidates, prepare, tight_boxes
from lostreg.methods.objectness import contrasts, object_scores, size_factor
from lostreg.methods.parts import (
    CLUSTERS,
    FINE_CLUSTERS,
    candidate_masks,
    find_parts,
    labels_of_pack,
    part_labels,
    part_masks,
)

pytestmark = pytest.mark.usefixtures("one_thread")
Grid = tuple[int, int]


def candidates_of(features: Tensor, grid: Grid) -> Candidates:
    return find_candidates(features, grid, "auto", 100)


def parts_of(features: Tensor, grid: Grid, most: int = 10, least: float = 0.0) -> list[Objects]:
    labels = part_labels(features, several=most > 1).numpy()
    return find_parts(candidates_of(features, grid), labels, most, least)


def noise(seed: int, images: int = 1, grid: Grid = (6, 7), depth: int = 4) -> Tensor:
    values = np.random.default_rng(seed).normal(0.5, 1, (images, grid[0] * grid[1], depth))
    return prepare(torch.from_numpy(values), normalize=True)


def three_squares() -> tuple[Tensor, Grid]:
    """Three squares on a ground, each of them unlike all else, on 12 x 14 patches."""
    kinds = np.zeros((12, 14), dtype=int)
    kinds[1:3, 1:4] = 1
    kinds[2:6, 8:13] = 2
    kinds[7:10, 2:5] = 3
    return torch.eye(4)[torch.from_numpy(kinds.ravel())][None], (12, 14)


SQUARES = [[1, 1, 4, 3], [2, 7, 5, 10], [8, 2, 13, 6]]


# Clusters


def reference_labels(features: np.ndarray, clusters: int, steps: int) -> tuple[np.ndarray, float]:
    """k-means by the book from farthest points, in float64 on all dimensions, and what its choices were clear by."""
    points = features.astype(np.float64) - features.mean(axis=0, dtype=np.float64)
    margins, chosen = [], [int((points**2).sum(axis=1).argmax())]
    far = np.sort((points**2).sum(axis=1))
    margins.append(far[-1] - far[-2])
    while len(chosen) < clusters:
        distance = np.min([((points - points[one]) ** 2).sum(axis=1) for one in chosen], axis=0)
        far = np.sort(distance)
        margins.append(far[-1] - far[-2])
        chosen.append(int(distance.argmax()))
    centres = points[chosen]
    for step in range(steps + 1):
        distance = ((points[:, None] - centres) ** 2).sum(axis=2)
        near = np.sort(distance, axis=1)
        margins.append((near[:, 1] - near[:, 0]).min())
        labels = distance.argmin(axis=1)
        if step < steps:
            for cluster in set(labels):
                centres[cluster] = points[labels == cluster].mean(axis=0)
    return labels, min(margins)


@given(st.integers(0, 10_000), st.integers(1, 4))
@settings(deadline=None, max_examples=25)
def test_clusters_are_those_of_k_means_by_the_book(seed, depth) -> None:
    features = noise(seed, images=2, depth=depth)
    for image, found in zip(features.numpy(), part_labels(features).numpy(), strict=True):
        for labels, clusters in zip(found, CLUSTERS, strict=True):
            expected, margin = reference_labels(image, clusters, parts._LLOYD_STEPS)
            if margin > 1e-4:
                np.testing.assert_array_equal(labels, expected)


def test_components_hold_the_variance_of_the_largest_four() -> None:
    scales = torch.tensor([4, 3, 2, 1.5, 1, 0.8, *[0.5] * 58])
    features = prepare(torch.randn(3, 500, 64) * scales + 1, normalize=True)
    components = parts._principal_components(parts._centred(features))
    for image, found in zip(features, components, strict=True):
        largest = torch.linalg.svdvals(image - image.mean(dim=0))[:4].square().sum()
        assert 0.999 < found.square().sum() / largest <= 1 + 1e-5
    assert components.mean(dim=2).abs().max() < 1e-5


def test_labels_are_small_and_of_as_many_clusters_as_were_asked_for() -> None:
    labels = part_labels(noise(0, images=3, grid=(20, 21)))
    assert (labels.dtype, labels.shape) == (torch.uint8, (3, len(CLUSTERS), 420))
    assert [[len(one.unique()) for one in image] for image in labels] == [list(CLUSTERS)] * 3


@given(st.integers(0, 10_000), st.permutations(range(42)))
@settings(deadline=None, max_examples=15)
def test_the_order_of_patches_plays_no_part(seed, order) -> None:
    features = noise(seed)
    margins = [reference_labels(features[0].numpy(), clusters, parts._LLOYD_STEPS)[1] for clusters in CLUSTERS]
    assume(min(margins) > 1e-4)
    torch.testing.assert_close(part_labels(features[:, order]), part_labels(features)[..., order])


def test_neighbours_in_the_batch_change_nothing() -> None:
    features = noise(1, images=5, grid=(20, 21), depth=40)
    together = part_labels(features)
    for image in range(5):
        assert torch.equal(part_labels(features[image, None])[0], together[image])


@needs_simulated_pinning
def test_nothing_waits_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_gpu(monkeypatch) as dispatched:
        features, head = torch.zeros(2, 42, 8, device=DEVICE), LinearObjectness(torch.zeros(8, device=DEVICE), 0.5)
        part_labels(features)  # its constants come to the device once
        dispatched.take()
        labels, probabilities = part_labels(features), head.probabilities(features)
        launches, waits = dispatched.take()
        assert (labels.device, labels.shape) == (DEVICE, (2, len(CLUSTERS), 42))
        assert (probabilities.device, probabilities.shape) == (DEVICE, (2, 42))
    assert waits == []
    assert launches < 1500


@pytest.mark.parametrize("count", [1, 2, 3, 50])
def test_equal_patches_are_one_cluster(count: int) -> None:
    features = prepare(torch.full((2, count, 7), 0.3), normalize=True)
    assert part_labels(features).unique().tolist() == [0]
    assert part_labels(torch.zeros(1, count, 7)).unique().tolist() == [0]


@pytest.mark.parametrize("count", [2, 3, 4])
def test_few_different_patches_are_a_cluster_each(count: int) -> None:
    labels = part_labels(torch.eye(4)[None, :count])
    assert [len(one.unique()) for one in labels[0]] == [min(clusters, count) for clusters in CLUSTERS]


# Pieces


def pieces(labels: np.ndarray) -> list[np.ndarray]:
    """The 4-connected pieces of equal labels, by a walk."""
    height, width = labels.shape
    left, found = set(np.ndindex(height, width)), []
    while left:
        start = min(left)
        mask, stack = np.zeros(labels.shape, dtype=bool), [start]
        while stack:
            row, column = place = stack.pop()
            if place in left and labels[place] == labels[start]:
                left.remove(place)
                mask[place] = True
                stack += [(row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)]
        found.append(mask)
    return found


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_parts_are_the_pieces_that_a_walk_finds(data) -> None:
    grid = data.draw(st.tuples(st.integers(1, 7), st.integers(1, 7)))
    labels = np.stack([data.draw(arrays(np.uint8, grid, elements=st.integers(0, count - 1))) for count in CLUSTERS])
    found = part_masks(labels.reshape(len(CLUSTERS), -1), grid)
    expected = {mask.tobytes() for one in labels for mask in pieces(one) if 4 <= mask.sum() <= 0.9 * grid[0] * grid[1]}
    assert found.shape == (len(expected), *grid)
    assert {mask.tobytes() for mask in found} == expected


def test_of_many_parts_the_largest_are_kept() -> None:
    lengths = [*range(4, 204), 300]  # of 201 stripes, one patch wide
    stripes = np.zeros((len(CLUSTERS), 201, 601), dtype=np.uint8)
    for row, length in enumerate(lengths):
        stripes[0, row, 210 * (row % 2) : 210 * (row % 2) + length] = 1
    found = part_masks(stripes.reshape(len(CLUSTERS), -1), (201, 601))
    assert len(found) == parts._MOST_PARTS


# Objects


def test_three_squares_are_the_three_objects() -> None:
    features, grid = three_squares()
    (found,) = parts_of(features, grid, most=3)
    assert sorted(found.xyxy.tolist()) == SQUARES
    assert found.masks.sum(axis=(1, 2)).tolist() == [(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in found.xyxy.tolist()]


def test_what_is_likelier_to_be_an_object_comes_first() -> None:
    features, grid = three_squares()
    labels, candidates = part_labels(features).numpy(), candidates_of(features, grid)
    for x1, y1, x2, y2 in SQUARES:
        probabilities = np.full((1, *grid), 0.2, dtype=np.float32)
        probabilities[0, y1:y2, x1:x2] = 0.9
        (found,) = find_parts(candidates, labels, 1, 0.0, probabilities.reshape(1, -1))
        assert found.xyxy.tolist() == [[x1, y1, x2, y2]]


@given(st.integers(0, 10_000), st.integers(1, 6), st.sampled_from([0.0, 0.25, 0.4]), st.booleans())
@settings(deadline=None, max_examples=30)
def test_objects_are_the_best_candidates_without_those_that_overlap(seed, most, least, taught) -> None:
    features, grid = noise(seed, images=2), (6, 7)
    labels, candidates = part_labels(features, several=most > 1).numpy(), candidates_of(features, grid)
    chances = np.random.default_rng(seed).random((2, 42)).astype(np.float32) if taught else None
    found = find_parts(candidates, labels, most, least, chances)
    for image, (masks, scores, contrasted, leading) in enumerate(candidate_masks(candidates, labels)):
        coarse = part_masks(labels[image, :3], grid)
        assert {mask.tobytes() for mask in masks[:leading]} == {
            mask.tobytes() for mask in [*candidates.masks[image], *coarse]
        }
        assert most > 1 or leading == len(masks)
        apart, local = (one[0] for one in contrasts(features[image, None], masks[None]))
        np.testing.assert_allclose(contrasted.apart, apart, rtol=1e-5)
        ranks, boxes, ranked = scores * contrasted.local, tight_boxes(masks), []
        np.testing.assert_allclose(ranks, scores * local, rtol=1e-5, atol=1e-7)
        lead = taught_ranks(chances[image], masks) if taught else ranks
        clear = apart * (lead if taught else scores / np.sqrt(np.maximum(size_factor(masks), 1e-6)))
        for place in [lead[:leading].argmax(), *sorted(range(len(masks)), key=lambda place: -ranks[place])]:
            if len(ranked) < most and (not ranked or pairwise_iou(boxes[[place]], boxes[ranked]).max() < 0.5):
                ranked.append(place)
        clear = np.minimum(clear, clear[ranked[0]])
        kept = [place for place in ranked if place == ranked[0] or clear[place] >= least]
        kept.sort(key=lambda place: -clear[place])
        one = found[image]
        assert one.xyxy.tolist() == boxes[kept].tolist()
        np.testing.assert_allclose(one.scores, clear[kept], rtol=1e-5)
        assert one.scores.dtype == np.float32
        assert (np.diff(one.scores) <= 0).all()
        taken = np.zeros(grid, dtype=bool)
        for place, mask, seed_place, bias in zip(kept, one.masks, one.seeds, one.biases, strict=True):
            np.testing.assert_array_equal(mask, masks[place] & ~taken)
            taken |= mask
            assert bias == candidates.maps.bias[image, place if place < 6 else 0]
            if place < 6:
                assert candidates.maps.seeds[image, place] == np.ravel_multi_index(seed_place, grid)
            else:
                degrees = np.where(masks[place], one.heat, 999)
                assert tuple(seed_place) == np.unravel_index(degrees.argmin(), grid)
        np.testing.assert_array_equal(one.heat.ravel(), candidates.maps.degrees[image, 0])
        told: list[int] = []
        for place in [*ranked, *sorted(range(len(masks)), key=lambda place: -lead[place])]:
            if boxes[place].tolist() not in boxes[told].tolist():
                told.append(place)
        told = sorted(told[:12], key=lambda place: -lead[place])
        assert one.candidates[:, :4].tolist() == boxes[told].tolist()
        np.testing.assert_allclose(one.candidates[:, 4], clear[told], rtol=1e-5)
        np.testing.assert_array_equal(one.objectness, None if chances is None else chances[image].reshape(grid))


def test_candidates_are_those_of_lost_and_then_parts_that_differ() -> None:
    features, grid = three_squares()
    candidates = candidates_of(features, grid)
    ((masks, scores, _, _),) = candidate_masks(candidates, part_labels(features).numpy())
    np.testing.assert_array_equal(masks[:6], candidates.masks[0])
    np.testing.assert_array_equal(scores[:6], candidates.scores[0])
    others = [mask.tobytes() for mask in masks[6:]]
    assert len(set(others)) == len(others)
    assert set(others).isdisjoint(mask.tobytes() for mask in masks[:6])


@pytest.mark.parametrize("axis", [1, 2])
def test_a_mirrored_scene_has_mirrored_objects(axis: int) -> None:
    features, grid = three_squares()
    mirrored = features.view(1, *grid, 4).flip(axis).reshape(features.shape)
    (found,), (flipped,) = parts_of(features, grid, most=3), parts_of(mirrored, grid, most=3)
    np.testing.assert_array_equal(np.flip(found.masks, axis), flipped.masks)


def test_a_scene_may_be_scaled_and_have_neighbours() -> None:
    features, grid = three_squares()
    several = torch.cat([noise(2, grid=grid), features, noise(3, grid=grid)])
    for scaled in (features * 2.0**-30, features * 2.0**40):
        (alone,) = parts_of(prepare(scaled, normalize=True), grid)
        beside = parts_of(several, grid)[1]
        assert alone.xyxy.tolist() == beside.xyxy.tolist()
        assert alone.scores.tolist() == beside.scores.tolist()


@pytest.mark.parametrize("grid", [(1, 1), (1, 2), (1, 9), (7, 1), (2, 2)])
@pytest.mark.parametrize("same", [True, False])
def test_every_image_has_an_object(grid: Grid, same: bool) -> None:
    count = grid[0] * grid[1]
    features = prepare(torch.ones(1, count, 5) if same else torch.randn(1, count, 5), normalize=True)
    (found,) = parts_of(features, grid, least=1.0)
    x1, y1, x2, y2 = found.xyxy[0]
    assert 0 <= x1 < x2 <= grid[1]
    assert 0 <= y1 < y2 <= grid[0]
    assert len(found.xyxy) == 1
    assert 0 <= found.scores[0] <= 1


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_not_finite_are_declined(value: float) -> None:
    features = torch.ones(2, 12, 5)
    features[1, 3, 2] = value
    assert part_labels(features).shape == (2, len(CLUSTERS), 12)  # nothing waits for the device to say so
    with pytest.raises(OptionError, match="must be finite"):
        parts_of(features, (3, 4))


def test_a_pack_of_several_grids_has_the_labels_of_each_image() -> None:
    """Images that are padded to the longest for a GPU are clustered as they are alone."""
    runs = [noise(number, images=2, grid=grid, depth=16) for number, grid in enumerate([(5, 6), (9, 8), (4, 4)])]
    runs.append(torch.zeros(1, 3, 16))
    alone = [part_labels(features, several=True) for features in runs]
    for found in (labels_of_pack(runs, several=True), parts._padded_labels(runs, CLUSTERS + FINE_CLUSTERS)):
        assert all(torch.equal(labels, expected) for labels, expected in zip(found, alone, strict=True))


def test_candidates_are_compared_together_as_each_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    features = noise(0, images=3, grid=(6, 7))
    masks = np.random.default_rng(0).random((9, 6, 7)) > 0.5
    several = [masks[:4], masks[4:4], masks[4:]]
    alone = parts._compare(features, several)
    monkeypatch.setattr(parts, "object_scores", lambda _, padded: object_scores(features, padded))
    monkeypatch.setattr(parts, "contrasts", lambda _, padded: contrasts(features, padded))
    for found, expected in zip(parts._compare(features.to("meta"), several), alone, strict=True):
        for one, other in zip((found[0], *found[1]), (expected[0], *expected[1]), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-6)
