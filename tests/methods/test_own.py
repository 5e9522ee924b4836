"""A bias and a score of a user's own, on features alone."""

import pytest
import torch
from random_features import exact_unit_vectors

import lostreg
from lostreg.errors import OptionError
from lostreg.methods.lost import find_candidates, prepare

FEATURES = torch.randn(3, 42, 8, generator=torch.Generator().manual_seed(0))
GRID = (6, 7)


def _median(features: torch.Tensor) -> float:
    return -float((features @ features.T).median())


def _large(features: torch.Tensor, masks: torch.Tensor) -> list[float]:
    assert features.shape == (42, 8)
    return masks.float().mean(dim=(1, 2)).tolist()


@pytest.mark.parametrize("normalize", [False, True])
def test_a_bias_function_gives_what_its_numbers_give(normalize: bool) -> None:
    vectors = prepare(FEATURES, normalize=normalize)
    numbers = torch.tensor([_median(image) for image in vectors])
    found = lostreg.lost_boxes(FEATURES, GRID, _median, 20, normalize=normalize)
    expected = lostreg.lost_boxes(FEATURES, GRID, numbers, 20, normalize=normalize)
    assert all(torch.equal(getattr(found, name), getattr(expected, name)) for name in vars(found))
    assert torch.equal(found.bias, numbers)
    several = lostreg.lost_objects(FEATURES, GRID, _median, 20, normalize=normalize)
    assert [one.xyxy[0].tolist() for one in several] == found.xyxy.tolist()


def test_a_score_function_chooses_among_the_trials_that_are_connected() -> None:
    trials = find_candidates(prepare(FEATURES, normalize=True), GRID, "auto", 20)
    sizes = trials.masks.mean(axis=(2, 3)) * trials.connected
    found = lostreg.lost_boxes(FEATURES, GRID, "auto", 20, score=_large)
    assert found.scores.tolist() == pytest.approx(sizes.max(axis=1).tolist())
    assert found.masks.float().mean(dim=(1, 2)).tolist() == pytest.approx(sizes.max(axis=1).tolist())
    assert not torch.equal(found.masks, lostreg.lost_boxes(FEATURES, GRID, "auto", 20).masks)


def test_further_objects_are_scored_by_it_too() -> None:
    floor = 0.1
    for one in lostreg.lost_objects(FEATURES, GRID, "auto", 20, score=_large, max_objects=9, min_score=floor):
        assert one.scores.tolist() == pytest.approx(one.masks.mean(axis=(1, 2)).tolist())
        assert (one.scores[1:] >= floor).all()


def test_a_seed_that_is_not_connected_scores_0_whatever_a_function_says() -> None:
    features = torch.from_numpy(exact_unit_vectors(1))
    assert lostreg.lost_boxes(features, GRID, -6.0, score=lambda *_: [1.0]).scores.tolist() == [0.0, 0.0]


def test_functions_are_checked() -> None:
    with pytest.raises(OptionError, match="score must be a function of features and masks, not 3"):
        lostreg.lost_boxes(FEATURES, GRID, score=3)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"the bias that .*lambda> gives must be a finite number, not nan"):
        lostreg.lost_boxes(FEATURES, GRID, lambda _: float("nan"))
    with pytest.raises(OptionError, match=r"the score .*lambda> must give 1 numbers in \[0, 1\], one a mask, not 2.0"):
        lostreg.lost_boxes(FEATURES, GRID, score=lambda *_: [2])


def test_what_a_function_changes_changes_nothing() -> None:
    def spoil(features: torch.Tensor, masks: torch.Tensor) -> list[float]:
        scores = _large(features, masks)
        features.zero_()
        masks.zero_()
        return scores

    expected = lostreg.lost_boxes(FEATURES, GRID, _median, score=_large)
    found = lostreg.lost_boxes(FEATURES, GRID, lambda one: (_median(one), one.zero_())[0], score=spoil)
    assert all(torch.equal(getattr(found, name), getattr(expected, name)) for name in vars(found))
