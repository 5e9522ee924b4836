"""What a collection teaches: on tokens whose objects were planted, and against plain loops."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import approx_fprime
from torch import Tensor

from lostreg.errors import OptionError
from lostreg.methods import learned
from lostreg.methods.learned import LinearObjectness, fit, taught_ranks
from lostreg.methods.objectness import surroundings

pytestmark = pytest.mark.usefixtures("one_thread")
GRID = (9, 10)
Image = tuple[Tensor, np.ndarray, np.ndarray]


def image(seed: int, right: float = 0.8, wrong: float = 0.4, tokens: Callable[[Tensor], Tensor] = lambda x: x) -> Image:
    """An object that the first of 12 dimensions tells from the rest, a candidate that is right, and one that is not."""
    random = np.random.default_rng(seed)
    row, column = random.integers(0, 5, 2)
    masks = np.zeros((2, *GRID), dtype=bool)
    masks[0, row : row + 4, column : column + 4] = True
    masks[1] = np.roll(masks[0], (4, 5), axis=(0, 1))
    values = torch.from_numpy(random.normal(0, 1, (90, 12))).float()
    values[:, 0] += torch.from_numpy(np.where(masks[0].ravel(), 2.5, -2.5))
    values[:, 1] += 7  # of all patches
    return tokens(values), masks, np.array([right, wrong], dtype=np.float32)


def share_right(objectness: LinearObjectness, seeds: range) -> float:
    """The share of the patches of other images that are told apart, object and rest weighing the same."""
    right = []
    for seed in seeds:
        tokens, masks, _ = image(seed)
        is_object, mask = objectness.probabilities(tokens).numpy() > 0.5, masks[0].ravel()
        right.append((is_object[mask].mean() + (~is_object[~mask]).mean()) / 2)
    return float(np.mean(right))


def test_an_image_has_the_same_map_alone_and_in_a_batch() -> None:
    tokens, random = torch.randn(3, 43, 384), LinearObjectness(torch.randn(384), 0.5)
    together = random.probabilities(tokens)
    assert all(torch.equal(together[image], random.probabilities(tokens[image, None])[0]) for image in range(3))


def test_a_planted_direction_is_recovered() -> None:
    objectness = fit(image(seed) for seed in range(20))
    assert objectness.weight.dtype == torch.float32
    assert objectness.weight.abs().argmax() == 0
    assert objectness.weight[0] > 4 * objectness.weight[1:].abs().max()
    assert share_right(objectness, range(100, 120)) > 0.97


def test_candidates_that_mislead_are_outvoted() -> None:
    def images() -> list[Image]:
        return [image(seed, *((0.3, 0.4) if seed % 3 == 0 else (0.4, 0.3))) for seed in range(30)]

    objectness = fit(images())
    for tokens, masks, _ in images():
        assert taught_ranks(objectness.probabilities(tokens).numpy(), masks).argmax() == 0
    assert share_right(objectness, range(100, 120)) > 0.97


def test_images_without_a_score_teach_nothing() -> None:
    teaching = [image(seed) for seed in range(8)]
    others = [image(seed, 0.0, 0.0, lambda x: 1000 * x.flip(1)) for seed in range(8, 12)]
    alone, beside = fit(teaching), fit([*others[:2], *teaching, *others[2:]])
    assert torch.equal(alone.weight, beside.weight)
    assert alone.bias == beside.bias


def test_the_length_of_tokens_and_their_precision_do_not_matter() -> None:
    plain = fit(image(seed) for seed in range(8))
    scaled = fit(image(seed, tokens=lambda x: x * 2.0**20) for seed in range(8))
    assert torch.equal(plain.weight, scaled.weight)
    half = fit(image(seed, tokens=Tensor.bfloat16) for seed in range(8))
    tokens, _, _ = image(100)
    torch.testing.assert_close(half.probabilities(tokens), plain.probabilities(tokens), atol=0.05, rtol=0)
    assert plain.probabilities(tokens.bfloat16()).dtype == torch.float32


def test_images_count_as_much_as_their_best_candidate() -> None:
    """Two kinds of images that contradict each other: the map is that of the one with the higher scores."""
    for first, second, sign in ((0.8, 0.1, 1), (0.1, 0.8, -1)):
        images = [image(seed, first, 0.01) for seed in range(6)]
        images += [image(seed, second, 0.01, lambda x: torch.cat([-x[:, :1], x[:, 1:]], dim=1)) for seed in range(6)]
        assert fit(images).weight[0] * sign > 0


def test_object_and_rest_weigh_the_same() -> None:
    """Tokens that say nothing: a patch is as likely as not part of an object, however small objects are."""
    random = np.random.default_rng(0)
    images = []
    for _ in range(40):
        _, masks, scores = image(int(random.integers(1000)))
        images.append((torch.from_numpy(random.normal(0, 1, (90, 3))).float(), masks, scores))
    chances = fit(images).probabilities(torch.randn(200, 3))
    assert 0.4 < chances.min() <= chances.max() < 0.6


def test_few_patches_of_an_image_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learned, "_PATCHES", 30)
    seen = []
    regression = learned._logistic_regression
    monkeypatch.setattr(
        learned, "_logistic_regression", lambda rows, *given: seen.append(len(rows)) or regression(rows, *given)
    )
    assert share_right(fit(image(seed) for seed in range(20)), range(100, 120)) > 0.95
    assert seen == [20 * 30]


def test_the_regression_ends_where_its_loss_is_flat() -> None:
    random = np.random.default_rng(0)
    rows, targets, weights = random.normal(0, 1, (80, 3)), random.random(80) < 0.3, random.random(80)
    weight, bias = learned._logistic_regression(torch.from_numpy(rows).float(), targets, weights)

    def loss(parameters: np.ndarray) -> float:
        total = 0.5 * 1e-2 * (parameters[:3] ** 2).sum()
        for row, target, share in zip(rows, targets, weights, strict=True):
            margin = (1 if target else -1) * (row @ parameters[:3] + parameters[3])
            total += share / (2 * weights[targets == target].sum()) * np.log1p(np.exp(-margin))
        return float(total)

    assert np.abs(approx_fprime([*weight.tolist(), bias], loss)).max() < 1e-3


@given(st.integers(0, 10_000))
@settings(deadline=None, max_examples=30)
def test_ranks_are_those_of_plain_loops(seed) -> None:
    random = np.random.default_rng(seed)
    chances = random.random(30).astype(np.float32)
    masks = np.concatenate([random.random((4, 5, 6)) < random.random(), np.ones((1, 5, 6)), np.zeros((1, 5, 6))]) > 0
    found = taught_ranks(chances, masks)
    for value, mask in zip(found, masks, strict=True):
        inside = chances[mask.ravel()].mean() if mask.any() else 0
        around = chances[surroundings(mask).ravel()]
        assert value == pytest.approx(inside**2 * (1 - (around.mean() if len(around) else 0)), abs=1e-5)
    assert found.dtype == np.float32
    assert ((found >= 0) & (found <= 1)).all()


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "at least one image"),
        ([image(0, 0.0, 0.0)], "at least one image"),
        ([image(0), image(1, tokens=lambda x: x / 0)], "must be finite"),
        ([image(0), image(1, tokens=lambda x: x[:, :7])], "dimensions"),
    ],
)
def test_what_teaches_nothing_is_declined(images: list[Image], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        fit(images)


def test_tokens_that_are_all_the_same_teach_nothing_odd() -> None:
    _, masks, scores = image(0)
    objectness = fit([(torch.ones(90, 4), masks, scores)] * 3)
    assert objectness.probabilities(torch.ones(2, 5, 4)).shape == (2, 5)
    torch.testing.assert_close(objectness.probabilities(torch.ones(1, 4)), torch.tensor([0.5]), atol=0.05, rtol=0)


def test_a_map_can_be_put_on_a_device() -> None:
    assert LinearObjectness(torch.ones(3), 0.5).to(torch.device("meta")).weight.is_meta
