"""Linear probes: on tokens that hold everything, nothing, or only which image they are of."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from lostreg.artifacts.probes import (
    ClassProbe,
    PixelProbe,
    PositionProbe,
    Skipped,
    Spread,
    probe_classes,
    probe_pixels,
    probe_position,
)

pytestmark = pytest.mark.filterwarnings("error")

SIDE = 6  # cells of the raster
IMAGES = 60
TWO_SEEDS = (0, 1)


@dataclasses.dataclass(frozen=True)
class Raster:
    """One token of each cell of each image; cells (n, 2), images (n,)."""

    cells: np.ndarray
    images: np.ndarray

    @property
    def codes(self) -> np.ndarray:
        return SIDE * self.cells[:, 0] + self.cells[:, 1]


def raster(images: int = IMAGES) -> Raster:
    cells = np.stack(np.meshgrid(np.arange(SIDE), np.arange(SIDE), indexing="ij"), axis=-1).reshape(-1, 2)
    return Raster(np.tile(cells, (images, 1)), np.repeat(np.arange(images), SIDE**2))


def random_state() -> np.random.Generator:
    return np.random.default_rng(0)


def noise(count: int, dimensions: int = 24) -> np.ndarray:
    return np.random.default_rng(2).normal(size=(count, dimensions)).astype(np.float32)


def coordinates(where: Raster) -> np.ndarray:
    """Two dimensions are row and column, all others noise."""
    tokens = noise(len(where.cells)) / 100
    tokens[:, [3, 8]] = where.cells
    return tokens


def coded(where: Raster) -> np.ndarray:
    """A random vector per cell, and nothing else."""
    return random_state().normal(size=(SIDE**2, 24)).astype(np.float32)[where.codes]


def noisily_coded(where: Raster) -> np.ndarray:
    return coded(where) + noise(len(where.cells)) / 10


def position(tokens: np.ndarray, where: Raster, seeds: tuple[int, ...] = TWO_SEEDS) -> PositionProbe:
    probe = probe_position(tokens, where.cells, where.images, seeds)
    assert isinstance(probe, PositionProbe)
    return probe


def pixel(tokens: np.ndarray, pixels: np.ndarray, images: np.ndarray) -> PixelProbe:
    probe = probe_pixels(tokens, pixels, images, TWO_SEEDS)
    assert isinstance(probe, PixelProbe)
    return probe


def classes(tokens: np.ndarray, labels: Any, seeds: tuple[int, ...] = TWO_SEEDS) -> ClassProbe:
    probes = probe_classes({"CLS": tokens}, labels, seeds)
    assert isinstance(probes, dict)
    return probes["CLS"]


def most_by_chance(rate: float, count: int) -> float:
    """Percentage that guesses right with this rate reach once in 30,000 times.

    Four standard deviations of one split: the mean over several splits varies less.
    """
    return 100 * (rate + 4 * (rate * (1 - rate) / count) ** 0.5)


# Position


@pytest.mark.parametrize("coding", [coordinates, coded, noisily_coded])
def test_a_position_that_tokens_hold_is_read(coding: Callable[[Raster], np.ndarray]) -> None:
    where = raster()
    probe = position(coding(where), where)
    assert probe.accuracy.mean >= 99.9
    assert probe.distance.mean <= 0.005
    assert (probe.tokens, probe.images) == (IMAGES * SIDE**2, IMAGES)


def test_the_scale_of_each_dimension_does_not_matter() -> None:
    where = raster(12)
    tokens = coded(where) + noise(432) * 2
    scaled = tokens * np.float32(2) ** np.arange(-24, 24, 2, dtype=np.float32)
    assert position(scaled, where).accuracy.mean == pytest.approx(position(tokens, where).accuracy.mean)
    pixels = tokens[:, :3] + random_state().random((432, 3))
    first, second = pixel(tokens, pixels, where.images), pixel(scaled, pixels, where.images)
    assert second.error.mean == pytest.approx(first.error.mean)


@pytest.mark.parametrize("coding", [coordinates, coded])
def test_the_position_of_shuffled_tokens_is_guessed(coding: Callable[[Raster], np.ndarray]) -> None:
    where = raster()
    probe = position(random_state().permutation(coding(where)), where)
    # Whatever is said, one in 36 tokens is of that cell.
    assert probe.accuracy.mean <= most_by_chance(1 / SIDE**2, count=18 * SIDE**2)
    assert probe.chance == Spread(100 / SIDE**2, 0.0)
    assert probe.distance.mean > 2  # the middle of the raster is 2.2 to 2.4 from a cell, a corner is 4.6


def test_tokens_without_a_position_get_the_most_frequent_cell() -> None:
    where = raster()
    often = np.where(random_state().random(len(where.cells)) < 0.6, 7, where.codes)
    cells = np.stack([often // SIDE, often % SIDE], axis=1)
    probe = position(noise(len(cells)), Raster(cells, where.images))
    held_out = 18 * SIDE**2
    assert probe.chance.mean == pytest.approx(61, abs=8)
    assert probe.accuracy.mean == pytest.approx(probe.chance.mean, abs=100 * (0.25 / held_out) ** 0.5)


def test_the_distance_is_euclidean_and_in_cells() -> None:
    # Constant tokens: all get the most frequent cell, which is 3 rows and 4 columns away from the other one.
    images = np.repeat(np.arange(20), 10)
    cells = np.tile([[-1, 2]] * 6 + [[2, 6]] * 4, (20, 1))
    probe = position(np.ones((200, 3), np.float32), Raster(cells, images))
    assert probe == PositionProbe(Spread(60.0, 0.0), Spread(pytest.approx(2.0), 0.0), Spread(60.0, 0.0), 200, 20)


def test_positions_are_not_learnt_from_tokens_of_the_same_image() -> None:
    where = raster(120)
    image_codes, image_cells = random_state().normal(size=(120, 200)), random_state().integers(0, 3, (120, 2))
    tokens = image_codes.astype(np.float32)[where.images]
    probe = position(tokens, Raster(image_cells[where.images], where.images))
    # By the token, every cell would be known; by the image, there are 36 guesses at one in 9.
    assert probe.accuracy.mean <= most_by_chance(1 / 9, count=36)


def test_images_may_have_any_numbers_and_any_order() -> None:
    where = raster(20)
    tokens, order = coded(where) + noise(720) * 2, random_state().permutation(720)
    moved = Raster(where.cells[order] * 5 - 40, where.images[order] * 1000 - 3000)
    first, second = position(tokens, where), position(tokens[order], moved)
    assert 20 < first.accuracy.mean < 99
    assert second.accuracy.mean == pytest.approx(first.accuracy.mean)
    assert second.distance.mean == pytest.approx(5 * first.distance.mean)


def test_cells_that_are_not_in_the_training_part_count_as_wrong() -> None:
    where = raster(20)
    # Each image has cells of its own, and the token says which.
    tokens = np.stack([where.images, where.codes], axis=1).astype(np.float32)
    cells = np.stack([where.images, where.codes], axis=1)
    assert position(tokens, Raster(cells, where.images)).accuracy == Spread(0.0, 0.0)


# Pixels


def test_pixels_that_tokens_hold_linearly_are_read() -> None:
    where = raster(20)
    pixels = random_state().random((720, 12)).astype(np.float32)
    mix = random_state().normal(size=(12, 24)).astype(np.float32)
    probe = pixel(pixels @ mix * 40 + 3, pixels, where.images)
    assert probe.error.mean < 1e-3 * probe.baseline.mean
    # The norm of 12 deviations from the mean, each of variance 1 / 12.
    assert probe.baseline.mean == pytest.approx(1, abs=0.05)
    assert (probe.tokens, probe.images) == (720, 20)


@pytest.mark.parametrize("dimensions", [24, 800])
def test_pixels_of_shuffled_tokens_are_the_mean(dimensions: int) -> None:
    where = raster(20)
    pixels = random_state().random((720, 12))
    mix = random_state().normal(size=(12, dimensions))
    tokens = random_state().permutation((pixels @ mix).astype(np.float32) + noise(720, dimensions))
    probe = pixel(tokens, pixels, where.images)
    assert probe.error.mean == pytest.approx(probe.baseline.mean, rel=0.02)


def test_half_of_the_pixels_leaves_the_error_of_the_other_half() -> None:
    where = raster(40)
    pixels = random_state().normal(size=(1440, 2)).astype(np.float32)
    probe = pixel(pixels[:, :1], pixels, where.images)
    assert probe.baseline.mean == pytest.approx((np.pi / 2) ** 0.5, rel=0.05)  # mean of a Rayleigh distribution
    assert probe.error.mean == pytest.approx((2 / np.pi) ** 0.5, rel=0.05)  # mean of half a normal distribution


def test_pixels_are_not_learnt_from_tokens_of_the_same_image() -> None:
    where = raster(40)
    image_codes, image_pixels = random_state().normal(size=(40, 100)), np.random.default_rng(1).random((40, 5))
    tokens = image_codes.astype(np.float32)[where.images]
    probe = pixel(tokens, image_pixels[where.images], where.images)
    assert probe.error.mean > 0.9 * probe.baseline.mean  # by the token, nothing would be left of it


# Classes


def test_separable_classes_are_read() -> None:
    labels = np.repeat(["cat", "dog", "eel", "owl"], [30, 20, 20, 10])
    tokens = noise(80) / 10 + (labels[:, None] == ["cat", "dog", "eel", "owl"] * 6)
    probe = classes(tokens, labels)
    assert probe == ClassProbe(Spread(100.0, 0.0), Spread(pytest.approx(37.5), 0.0), images=80, classes=4)


def test_shuffled_classes_are_guessed() -> None:
    labels = np.repeat(np.arange(4), 200)
    tokens = random_state().permutation(noise(800) + 5 * np.eye(4, 24)[labels])
    probe = classes(tokens, labels)
    assert probe.accuracy.mean <= most_by_chance(1 / 4, count=240)
    assert probe.accuracy.mean >= 50 - most_by_chance(1 / 4, count=240)
    assert probe.chance == Spread(25.0, 0.0)


def test_all_kinds_see_the_same_splits_and_keep_their_order() -> None:
    labels = np.repeat([5, -2, 9], 20)
    tokens = noise(60) + 2 * np.eye(3, 24)[np.unique(labels, return_inverse=True)[1]]
    probes = probe_classes({"z": tokens, "CLS": np.ones((60, 2)), "a": tokens}, labels)
    assert isinstance(probes, dict)
    assert list(probes) == ["z", "CLS", "a"]
    assert probes["z"] == probes["a"]
    assert probes["CLS"].accuracy.mean == pytest.approx(100 / 3)
    assert 40 < probes["a"].accuracy.mean < 100
    assert probes["a"].accuracy.deviation > 0


def test_images_of_small_classes_are_left_out() -> None:
    labels = np.repeat(["many", "few", "some", "four"], [10, 3, 8, 4])
    tokens = noise(25)
    probe, without = (
        classes(tokens, labels),
        classes(np.delete(tokens, slice(10, 13), 0), np.delete(labels, slice(10, 13))),
    )
    assert (probe.images, probe.classes) == (22, 3)
    assert probe == without


def test_no_warning_reaches_the_user_when_many_iterations_do_not_suffice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lostreg.artifacts.probes._MAX_ITERATIONS", 1)
    classes(noise(60) * [1e3] * 24, np.repeat([0, 1, 2], 20))


# All of them


def spreads(probe: Any) -> dict[str, Spread]:
    return {field.name: getattr(probe, field.name) for field in dataclasses.fields(probe) if field.type is Spread}


def run_all(seeds: tuple[int, ...]) -> list[PositionProbe | PixelProbe | ClassProbe]:
    """Each probe on tokens that hold a part of what is asked for."""
    where = raster(12)
    tokens = coded(where) + noise(432) * 2
    pixels = tokens[:, :3] + random_state().random((432, 3))
    pixel_probe = probe_pixels(tokens, pixels, where.images, seeds)
    assert isinstance(pixel_probe, PixelProbe)
    labels = np.repeat([0, 1], 20)
    class_probe = classes(noise(40) + labels[:, None] / 4, labels, seeds)
    return [position(tokens, where, seeds), pixel_probe, class_probe]


def test_the_spread_over_seeds_is_mean_and_population_deviation() -> None:
    seeds = (3, 0, 11)
    alone = [run_all((seed,)) for seed in seeds]
    for probe, *singles in zip(run_all(seeds), *alone, strict=True):
        assert len(spreads(probe)) >= 2
        for name, spread in spreads(probe).items():
            figures = [spreads(single)[name].mean for single in singles]
            assert spread.mean == pytest.approx(np.mean(figures))
            assert spread.deviation == pytest.approx(np.std(figures))
            assert all(spreads(single)[name].deviation == 0 for single in singles)
        assert any(spread.deviation > 0 for spread in spreads(probe).values())


def test_figures_are_the_same_every_time_and_the_global_random_state_is_left_alone() -> None:
    np.random.seed(5)  # noqa: NPY002
    state = np.random.get_state()[1].tolist()  # type: ignore[index]  # noqa: NPY002
    first = run_all(TWO_SEEDS)
    assert np.random.get_state()[1].tolist() == state  # type: ignore[index]  # noqa: NPY002
    np.random.seed(6)  # noqa: NPY002
    assert run_all(TWO_SEEDS) == first
    assert run_all((7, 8)) != first


def test_tokens_are_not_changed() -> None:
    where = raster(12)
    tokens = noise(432).astype(np.float64)
    tokens.flags.writeable = False
    position(tokens, where)
    pixel(tokens, tokens[:, :2], where.images)
    classes(tokens, where.codes)


@pytest.mark.parametrize("images", [0, 1, 9])
def test_too_few_images_are_skipped(images: int) -> None:
    where = raster(images)
    tokens = noise(len(where.cells))
    expected = Skipped(f"needs tokens of at least 10 images, found {images}")
    assert probe_position(tokens, where.cells, where.images) == expected
    assert probe_pixels(tokens, tokens, where.images) == expected


def test_too_few_tokens_are_skipped() -> None:
    where = raster(10)
    few = Raster(where.cells[:: len(where.cells) // 99][:99], np.arange(99) % 10)
    expected = Skipped("needs at least 100 tokens, found 99")
    assert probe_position(noise(99), few.cells, few.images) == expected
    assert probe_pixels(noise(99), noise(99), few.images) == expected


def test_one_cell_is_skipped() -> None:
    where = raster(10)
    expected = Skipped("needs tokens of at least 2 different cells, found 1")
    assert probe_position(noise(360), 0 * where.cells, where.images) == expected


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        ([], "needs at least 2 classes of at least 4 images, found 0"),
        ([0] * 20, "needs at least 2 classes of at least 4 images, found 1"),
        ([0] * 20 + [1] * 3 + [2] * 3, "needs at least 2 classes of at least 4 images, found 1"),
        (["a"] * 4 + ["b"] * 5 + ["c"] * 3, "needs at least 10 images of classes of at least 4, found 9"),
    ],
)
def test_too_few_classes_are_skipped(labels: list[Any], reason: str) -> None:
    assert probe_classes({"CLS": noise(len(labels))}, labels) == Skipped(reason)


def test_the_least_that_is_enough_is_not_skipped() -> None:
    images = np.arange(100) % 10
    cells = np.stack([np.arange(100) // 50, np.zeros(100, int)], axis=1)
    position(noise(100), Raster(cells, images))
    pixel(noise(100), noise(100), images)
    assert classes(noise(10), [0] * 4 + [1] * 6).classes == 2
    assert classes(noise(40), np.arange(40) // 4).classes == 10


def degenerate_tokens() -> dict[str, np.ndarray]:
    where = raster(10)
    tokens = noisily_coded(where)
    image_bits = np.eye(10, dtype=np.float32)[where.images]
    huge, tiny = tokens * np.float32(1e37), tokens * np.float32(1e-40)
    half_constant = np.concatenate([tokens, np.full_like(tokens, 7e5)], axis=1)
    return {
        "zero": np.zeros((360, 5), np.float32),
        "constant": np.full((360, 5), 0.1, np.float32),
        "half constant": half_constant,
        "one dimension": tokens[:, :1],
        "repeated dimensions": np.tile(tokens, 3),
        "more dimensions than tokens": noise(360, 500),
        "constant within images": image_bits,
        "huge": huge,
        "tiny": tiny,
        "half precision": tokens.astype(np.float16),
    }


@pytest.mark.parametrize("name", list(degenerate_tokens()))
def test_degenerate_tokens_give_figures(name: str) -> None:
    tokens, where = degenerate_tokens()[name], raster(10)
    probes = [
        position(tokens, where),
        pixel(tokens, noise(360, 3), where.images),
        pixel(noise(360, 3), tokens, where.images),
        classes(tokens, where.codes % 3),
    ]
    for spread in [spread for probe in probes for spread in spreads(probe).values()]:
        assert np.isfinite([spread.mean, spread.deviation]).all()
        assert spread.mean >= 0
        assert spread.deviation >= 0


def test_cells_that_occur_once_do_no_harm() -> None:
    where = raster(20)
    tokens, cells = noisily_coded(where), where.cells.copy()
    cells[::36] = np.stack([np.arange(20), np.full(20, SIDE)], axis=1)
    # One token in 36 is of a cell that no other image has.
    assert position(tokens, Raster(cells, where.images)).accuracy.mean == pytest.approx(100 * 35 / 36)
    alone = np.stack([np.arange(720), np.zeros(720, int)], axis=1)
    assert position(tokens, Raster(alone, where.images)).accuracy == Spread(0.0, 0.0)


def test_one_token_in_another_cell_than_all_the_rest_does_no_harm() -> None:
    where = raster(10)
    cells = 0 * where.cells
    cells[0] = 1
    for seed in range(5):  # held out by some of them, so that one cell is left to train on
        assert position(noise(360), Raster(cells, where.images), (seed,)).accuracy.mean >= 100 * (1 - 1 / 108) - 1e-9


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_tokens_that_are_not_finite_are_refused(value: float) -> None:
    where = raster(10)
    tokens, good = noise(360), noise(360)
    tokens[[4, 4, 90], [0, 1, 2]] = value
    with pytest.raises(ValueError, match="expected finite tokens, but 2 of 360 rows are not"):
        probe_position(tokens, where.cells, where.images)
    with pytest.raises(ValueError, match="expected finite tokens, but 2 of 360 rows are not"):
        probe_pixels(tokens, good, where.images)
    with pytest.raises(ValueError, match="expected finite pixels, but 2 of 360 rows are not"):
        probe_pixels(good, tokens, where.images)
    with pytest.raises(ValueError, match="expected finite tokens of kind 'one', but 2 of 360 rows are not"):
        probe_classes({"CLS": good, "one": tokens}, where.codes)


def test_shapes_that_do_not_match_are_refused() -> None:
    where, tokens = raster(10), noise(360)
    for wrong in (tokens[1:], tokens[:, 0], tokens[:, :0]):
        expected = re.escape(f"of shape (360, dimensions), not {wrong.shape}")
        with pytest.raises(ValueError, match="tokens " + expected):
            probe_position(wrong, where.cells, where.images)
        with pytest.raises(ValueError, match="tokens " + expected):
            probe_pixels(wrong, tokens, where.images)
        with pytest.raises(ValueError, match="pixels " + expected):
            probe_pixels(tokens, wrong, where.images)
        with pytest.raises(ValueError, match="tokens of kind 'CLS' " + expected):
            probe_classes({"CLS": wrong}, where.codes)
    with pytest.raises(ValueError, match=re.escape("cells of shape (360, 2), not (360,)")):
        probe_position(tokens, where.codes, where.images)
    with pytest.raises(ValueError, match=re.escape("labels of shape (images,), not (360, 2)")):
        probe_classes({"CLS": tokens}, where.cells)


def test_a_seed_is_needed() -> None:
    where, tokens = raster(10), noise(360)
    for probe in (
        lambda: probe_position(tokens, where.cells, where.images, ()),
        lambda: probe_pixels(tokens, tokens, where.images, ()),
        lambda: probe_classes({"CLS": tokens}, where.codes, ()),
    ):
        with pytest.raises(ValueError, match="expected at least one seed"):
            probe()
