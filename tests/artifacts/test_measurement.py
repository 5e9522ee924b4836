"""One pass over images: against planted outliers, the model's own blocks, and loops in NumPy."""

import copy
import dataclasses
import itertools
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from planted import cut, noise, pixels_of
from random_models import built
from reference_forward import reference
from small_vit import LAYER, PATCHES, SHAPES, discoverer, norms_of, pictures, small, world, write_images

from lostreg.artifacts.measurement import (
    CELLS,
    COSINE_BINS,
    Measurement,
    Pass,
    cell_shares,
    measure,
    neighbour_cosines,
)
from lostreg.artifacts.outliers import CutoffRule, parse_rule
from lostreg.artifacts.probes import ClassProbe, PixelProbe, PositionProbe, Skipped
from lostreg.errors import ImageError, LostregError, OptionError
from lostreg.models.backbone import Backbone
from lostreg.models.forward import Forward
from lostreg.progress import Progress

pytestmark = pytest.mark.usefixtures("one_thread")

OUTLIERS = sum(map(len, PATCHES))
GRIDS = [(-(-height // 16), -(-width // 16)) for height, width in SHAPES]
COUNT = sum(rows * columns for rows, columns in GRIDS)


@pytest.fixture(scope="module")
def found() -> Measurement:
    return measure(pictures(), discoverer(world().backbone))


@pytest.fixture
def _no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def planted_mask() -> np.ndarray:
    return np.concatenate(
        [np.isin(np.arange(rows * columns), chosen) for (rows, columns), chosen in zip(GRIDS, PATCHES, strict=True)]
    )


def same_pass(first: Pass, second: Pass) -> None:
    """Equal but for the order in which numbers were summed, and the images that shared a product with another."""
    for one, other in zip([*first.layers, first.final], [*second.layers, second.final], strict=True):
        # Rounding may move a norm across a bin's edge.
        assert np.abs(one.counts.cumsum() - other.counts.cumsum()).max() <= 1
        assert one.count == other.count
        for figure in ("mean", "deviation", "smallest", "largest"):
            assert getattr(one, figure) == pytest.approx(getattr(other, figure), rel=1e-4, abs=1e-6)
    np.testing.assert_allclose(first.prefix, second.prefix, rtol=1e-4)
    np.testing.assert_allclose(first.heat.sum(axis=0), second.heat.sum(axis=0))
    np.testing.assert_allclose(first.cosine_sums.sum(axis=0), second.cosine_sums.sum(axis=0), rtol=1e-4)


# Outliers


def test_planted_outliers_are_counted_where_and_when_they_emerge(found: Measurement) -> None:
    assert (found.outliers, found.patches, found.emerges) == (OUTLIERS, COUNT, LAYER)
    norms = np.concatenate([norms.output for norms in norms_of(world().backbone, pictures())])
    outliers = planted_mask()
    assert found.cutoff.value is not None
    assert norms[~outliers].max() < found.cutoff.value < norms[outliers].min()
    assert found.seen.layers[-1].above(found.cutoff.value) / found.patches == pytest.approx(OUTLIERS / COUNT)
    assert (found.seen.images, found.seen.errors) == (len(SHAPES), [])
    assert (found.sample.images, found.sample.affected, found.sample.outliers) == (len(SHAPES), 4, OUTLIERS)
    assert (found.backbone, found.title, found.prefix_names) == ("timm:test_vit", "timm:test_vit", ("CLS",))
    assert (found.weights, found.registers, found.feature, found.layer) == ("random", None, "k", 5)


def spread_by_hand(place: int, side: int) -> dict[int, float]:
    """The share of a patch in each cell that it overlaps, counted in thousandths of a patch."""
    points = [(place + (step + 0.5) / 1000) * CELLS / side for step in range(1000)]
    return {cell: sum(int(point) == cell for point in points) / 1000 for cell in {int(point) for point in points}}


def test_the_heat_map_holds_the_planted_patches_and_no_others(found: Measurement) -> None:
    assert found.cutoff.value is not None
    outlier, normal = found.seen.split(found.seen.heat, found.cutoff.value)
    expected = np.zeros((2, CELLS, CELLS))
    for (rows, columns), chosen in zip(GRIDS, PATCHES, strict=True):
        for row, column in itertools.product(range(rows), range(columns)):
            for down, height in spread_by_hand(row, rows).items():
                for across, width in spread_by_hand(column, columns).items():
                    expected[int(row * columns + column in chosen), down, across] += height * width
    np.testing.assert_allclose(normal, expected[0], atol=0.01)
    np.testing.assert_allclose(outlier, expected[1], atol=0.01)
    assert outlier.sum() == pytest.approx(found.outliers)


@pytest.mark.parametrize("side", [1, 5, 31, 32, 50, 64])
def test_each_patch_is_shared_out_among_the_cells_that_it_covers(side: int) -> None:
    shares = cell_shares(side, CELLS)
    np.testing.assert_allclose(shares.sum(axis=1), 1)
    np.testing.assert_allclose(shares.sum(axis=0), side / CELLS)  # no cell is left out
    for place in {0, side // 2, side - 1}:
        for cell, share in spread_by_hand(place, side).items():
            assert shares[place, cell] == pytest.approx(share, abs=0.01)


def test_registers_take_the_outliers_away(found: Measurement) -> None:
    from lostreg.models.registers import RegisterNeurons

    registers = RegisterNeurons(world().neurons, count=2)
    cured = measure(pictures(), discoverer(world().backbone).with_registers(registers))
    assert (cured.outliers, cured.emerges, cured.cutoff.found) == (0, None, False)
    assert cured.title == "timm:test_vit + 2 test-time registers"
    assert cured.prefix_names == ("CLS", "test-time register 1", "test-time register 2")
    assert cured.registers == {"count": 2, "neurons": [[LAYER, 5], [LAYER, 9]]}
    assert found.cutoff.value is not None
    assert cured.seen.prefix[-1, 1:].min() > found.cutoff.value


# Norms and similarities, against slower ways


@pytest.mark.parametrize("name", ["timm:test_vit", "dinov2_vits14_reg", "siglip2_vitb16"])
def test_tallies_hold_the_norms_that_the_models_own_blocks_give(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = small() if name.startswith("timm:") else built(name, depth=2, embed_dim=64, num_heads=2)
    patch = backbone.spec.patch_size
    images = noise([(4 * patch, 3 * patch), (2 * patch, 5 * patch), (patch, patch)])
    found = measure(images, discoverer(backbone)).seen
    own = backbone.own_prefix_tokens
    layers: list[list[np.ndarray]] = [[] for _ in range(backbone.depth)]
    prefix = np.zeros((backbone.depth, own))
    final = []
    for image in images:
        (mean, std) = (torch.tensor(values).view(3, 1, 1) for values in (backbone.mean, backbone.std))
        pixels = (torch.from_numpy(image).permute(2, 0, 1) / 255 - mean) / std
        walked = reference(backbone, pixels[None], monkeypatch)
        for layer, tokens in enumerate(walked.layers):
            layers[layer].append(tokens[own:].norm(dim=1).numpy())
            prefix[layer] += tokens[:own].norm(dim=1).double().numpy() / len(images)
        final.append(walked.final[own:].norm(dim=1).numpy())
    for tally, norms in zip([*found.layers, found.final], [*layers, final], strict=True):
        values = np.concatenate(norms).astype(np.float64)
        assert tally.count == values.size
        assert tally.mean == pytest.approx(values.mean(), rel=1e-4)
        assert tally.deviation == pytest.approx(values.std(), rel=1e-3, abs=1e-4)
        assert (tally.smallest, tally.largest) == pytest.approx((values.min(), values.max()), rel=1e-4)
        edges = tally.edges
        counted = tally.counts.cumsum()
        # All but rounding: so many norms lie below each edge, give or take what lies right at it.
        assert (counted[:-1] >= np.searchsorted(np.sort(values), edges * (1 - 1e-4))).all()
        assert (counted[:-1] <= np.searchsorted(np.sort(values), edges * (1 + 1e-4))).all()
    np.testing.assert_allclose(found.prefix, prefix, rtol=1e-4)
    assert found.prefix.shape == (backbone.depth, own)


def slow_cosines(embedded: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    rows, columns = grid
    image = embedded.astype(np.float64).reshape(rows, columns, -1)
    found = np.full(grid, np.nan)
    for row, column in itertools.product(range(rows), range(columns)):
        near = [(row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)]
        cosines = [
            image[row, column] @ image[y, x] / np.linalg.norm(image[row, column]) / np.linalg.norm(image[y, x])
            for y, x in near
            if 0 <= y < rows and 0 <= x < columns
        ]
        if cosines:
            found[row, column] = np.mean(cosines)
    return found.ravel()


@pytest.mark.parametrize("grid", [(1, 1), (1, 2), (1, 7), (6, 1), (2, 2), (5, 4)])
def test_neighbour_cosines_are_means_over_the_neighbours_there_are(grid: tuple[int, int]) -> None:
    embedded = torch.randn(grid[0] * grid[1], 9)
    found = neighbour_cosines(embedded, grid)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), slow_cosines(embedded.numpy(), grid), atol=1e-6)
    assert found.isnan().any() == (grid == (1, 1))


def test_similar_neighbours_are_told_apart_for_outliers_and_others(found: Measurement) -> None:
    backbone, sums = world().backbone, {True: [], False: []}
    images = cut(pictures(), backbone)
    forward = Forward(backbone)
    for image, pixels, chosen in zip(images, pixels_of(images, backbone), PATCHES, strict=True):
        cosines = slow_cosines(forward.embed_patches(pixels).numpy(), image.grid)
        for patch, cosine in enumerate(cosines):
            sums[patch in chosen].append(cosine)
    expected = [np.mean(sums[True]), np.mean(sums[False])]
    assert found.cosine_means() == pytest.approx(expected, abs=1e-5)
    for histogram, values in zip(found.cosine_histograms(), (sums[True], sums[False]), strict=True):
        counts, _ = np.histogram(values, bins=COSINE_BINS, range=(-1, 1))
        assert np.abs(histogram.cumsum() - counts.cumsum()).max() <= 1
        assert histogram.sum() == len(values)


# Streams


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_batch_size_does_not_matter(found: Measurement, batch_size: int) -> None:
    other = measure(pictures(), discoverer(world().backbone, batch_size=batch_size))
    same_pass(found.seen, other.seen)
    assert (other.outliers, other.emerges) == (found.outliers, found.emerges)
    assert other.cutoff.value == pytest.approx(found.cutoff.value, rel=0.02)


def test_the_order_of_images_does_not_matter(found: Measurement) -> None:
    order = [4, 2, 0, 5, 1, 3]
    other = measure([pictures()[index] for index in order], discoverer(world().backbone, batch_size=2))
    same_pass(found.seen, other.seen)
    assert (other.outliers, other.emerges) == (found.outliers, found.emerges)


def arrays_of(value: Any) -> Iterator[np.ndarray]:
    if isinstance(value, np.ndarray):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from arrays_of(item)
    elif hasattr(value, "__dict__"):
        for item in vars(value).values():
            yield from arrays_of(item)


def test_what_is_kept_does_not_grow_with_the_images() -> None:
    one, many = (measure([*pictures()] * times, discoverer(world().backbone), sample=1).seen for times in (1, 5))
    assert many.images == 5 * one.images == 30
    sizes = [[(array.shape, array.dtype) for array in arrays_of(kept)] for kept in (one, many)]
    assert len(sizes[0]) >= 2 * len(one.layers) + 5
    assert sizes[0] == sizes[1]
    for field in dataclasses.fields(Pass):
        if isinstance(getattr(many, field.name), list):
            assert len(getattr(many, field.name)) == len(getattr(one, field.name))


def test_each_image_is_run_once_and_the_sample_twice() -> None:
    steps: list[Progress] = []
    images = [*pictures()] * 2
    sample = measure(images, discoverer(small()), sample=5, on_progress=steps.append).sample
    assert sample.images == 5
    assert steps == [
        Progress(done, total, step=step)
        for step, total in (("norms", 12), ("sample", 5), ("probes", 3))
        for done in range(1, total + 1)
    ]


def test_a_cured_backbone_is_compared_over_the_same_images(found: Measurement) -> None:
    from lostreg.models.registers import RegisterNeurons

    one = discoverer(world().backbone).with_registers(RegisterNeurons(world().neurons))
    assert found.cutoff.value is not None
    rule = CutoffRule("number", found.cutoff.value)
    alone, beside = measure(pictures(), one, rule=rule), measure(pictures(), one, rule=rule, like=found)
    assert alone.outliers == beside.outliers == 0
    affected = tuple(number for number, chosen in enumerate(PATCHES) if chosen)
    assert found.sample.viewed == beside.sample.viewed == affected
    assert beside.sample.shown == found.sample.shown != alone.sample.shown
    assert alone.sample.viewed == tuple(range(len(PATCHES)))
    assert alone.sample.gram != beside.sample.gram
    for mine, before in zip(beside.sample.examples, found.sample.examples, strict=True):
        np.testing.assert_array_equal(mine.pixels, before.pixels)


def test_unreadable_images_are_counted_and_the_others_measured(tmp_path: Path, found: Measurement) -> None:
    paths = write_images(tmp_path, pictures())
    (tmp_path / "broken.png").write_text("no picture")
    given = [tmp_path / "broken.png", *paths[:3], tmp_path / "none.png", *paths[3:]]
    told: list[Exception] = []
    labels = ["bad", "a", "a", "b", "bad", "b", "b", "a"]

    def hear(progress: Progress) -> None:
        if progress.error is not None:
            told.append(progress.error)

    other = measure(given, discoverer(world().backbone), labels=labels, on_progress=hear)
    assert (other.seen.images, other.sample.images, len(other.seen.errors)) == (6, 6, 2)
    assert told == other.seen.errors
    assert "broken.png" in str(told[0])
    assert "none.png" in str(told[1])
    same_pass(found.seen, other.seen)
    assert (other.outliers, other.emerges) == (found.outliers, found.emerges)


def test_a_sample_of_nothing_but_unreadable_images_is_no_crash(tmp_path: Path) -> None:
    """The sample may miss all images that can be read."""
    (good,) = write_images(tmp_path, pictures()[:1])
    given: list[Any] = [good, *[tmp_path / f"none{number}.png" for number in range(20)]]
    for seed in range(3):
        found = measure(given, discoverer(small()), sample=1, seed=seed)
        assert (found.seen.images, len(found.seen.errors)) == (1, 20)
        assert found.sample.images == 1


def test_norms_that_are_not_finite_are_an_error_for_people() -> None:
    broken = dataclasses.replace(small(), model=copy.deepcopy(small().model))
    with torch.no_grad():
        broken.model.blocks[3].mlp.fc2.bias[7] = torch.inf
    with pytest.raises(LostregError, match="some norms are not finite: the model's weights are broken"):
        measure(pictures(), discoverer(broken))


@pytest.mark.parametrize("count", [1, 3])
def test_nothing_readable_is_an_error_with_the_first_reason(tmp_path: Path, count: int) -> None:
    with pytest.raises(LostregError, match=rf"none of {count} images could be read: .*none\.png: no such file") as told:
        measure([tmp_path / "none.png"] * count, discoverer(small()))
    assert not isinstance(told.value, OptionError | ImageError)


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        ((), {}, "at least one image"),
        (pictures(), {"sample": 0}, "sample must be an integer of at least 1, not 0"),
        (pictures(), {"sample": -3}, "sample must be .* not -3"),
        (pictures(), {"seed": -1}, "seed must be an integer of at least 0, not -1"),
        (pictures(), {"labels": ["a"] * 5}, "one label an image, not 5 for 6"),
        (pictures(), {"labels": []}, "one label an image, not 0 for 6"),
    ],
)
def test_options_out_of_range_are_refused(images: Sequence[np.ndarray], options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        measure(images, discoverer(small()), **options)


# Rules


def test_a_number_is_the_cutoff_to_the_bit() -> None:
    norms = np.concatenate([found.output for found in norms_of(small(), pictures())]).astype(np.float64)
    limit = float(np.sort(norms)[-7:-5].mean())
    found = measure(pictures(), discoverer(small()), rule=CutoffRule("number", limit))
    assert found.cutoff.value == limit
    assert found.outliers == found.sample.outliers == 6
    assert found.cosine_histograms()[0].sum() <= 6
    outlier, normal = found.seen.split(found.seen.heat, limit)
    assert (outlier.sum(), normal.sum()) == (pytest.approx(6), pytest.approx(COUNT - 6))


@pytest.mark.parametrize(("text", "least", "most"), [("95%", 2, 3), ("mean+2sigma", 0, 10), ("50%", 20, 22)])
def test_other_rules_reach_the_measurement(text: str, least: int, most: int) -> None:
    norms = np.concatenate([found.output for found in norms_of(small(), pictures())]).astype(np.float64)
    found = measure(pictures(), discoverer(small()), rule=parse_rule(text))
    assert str(found.cutoff.rule) == text
    assert least <= found.outliers <= most
    if found.cutoff.value is not None:
        assert found.outliers == (norms >= found.cutoff.value).sum()
    if text == "mean+2sigma":
        assert found.outliers == (norms >= norms.mean() + 2 * norms.std()).sum()


def test_a_number_that_no_norm_reaches_finds_nothing() -> None:
    found = measure(pictures(), discoverer(world().backbone), rule=CutoffRule("number", 150.0))
    assert (found.outliers, found.cutoff.found, found.emerges, found.sample.affected) == (0, False, None, 0)
    assert "no norm reaches 150" in found.cutoff.reason


def test_a_number_that_all_norms_reach_makes_all_of_them_outliers() -> None:
    found = measure(pictures(), discoverer(small()), rule=CutoffRule("number", 1e-3))
    assert found.outliers == found.patches == COUNT
    assert found.cosine_means()[1] is None
    assert found.sample.gram_normal is None
    assert found.emerges == 0


# Little to measure


def square(side: int, value: int | None = None) -> np.ndarray:
    return noise([(side, side)])[0] if value is None else np.full((side, side, 3), value, np.uint8)


@pytest.mark.usefixtures("_no_warnings")
@pytest.mark.parametrize(
    "images",
    [
        [square(64)],
        [square(16)],
        [square(1)],
        [square(64, 0)],
        [square(64, 255), square(16, 3)],
        [noise([(16, 160)])[0]],
        [noise([(160, 16)])[0]],
    ],
    ids=["one", "one patch", "one pixel", "black", "constant", "a row", "a column"],
)
@pytest.mark.parametrize("rule", ["auto", "50%", "1e-3", "mean+3sigma"])
def test_little_to_measure_is_no_failure(images: list[np.ndarray], rule: str) -> None:
    found = measure(images, discoverer(small()), rule=parse_rule(rule), labels=["a"] * len(images))
    assert found.patches == sum(-(-image.shape[0] // 16) * -(-image.shape[1] // 16) for image in images)
    if rule == "auto":
        assert not found.cutoff.found
    for probes in (found.sample.position, found.sample.pixels):
        kinds = {"outlier", "normal"}
        assert set(probes) == (kinds | {"normal, as many of the same images"} if found.outliers else kinds)
        for probe in probes.values():
            assert isinstance(probe, Skipped)
            assert probe.reason.startswith(("needs tokens of at least 10 images", "there are no such tokens"))
    assert isinstance(found.sample.classes, Skipped)
    assert found.sample.classes.reason.startswith("needs at least 2 classes")
    for view in (found.sample.gram, found.sample.gram_normal):
        if view is not None:
            assert np.isfinite([*view.spectrum, view.effective_rank, view.positive, view.similarity]).all()
    for mean in found.cosine_means():
        assert mean is None or -1.00001 <= mean <= 1.00001


def test_where_nothing_is_bimodal_nothing_is_found() -> None:
    found = measure(pictures(), discoverer(small()))
    assert (found.outliers, found.emerges, found.cutoff.value) == (0, None, None)
    assert found.cutoff.reason.startswith("not bimodal")
    assert found.cosine_means()[0] is None
    assert found.cosine_histograms()[0].sum() == 0
    assert found.cosine_histograms()[1].sum() == COUNT
    assert found.sample.gram_normal is None
    assert all(example.degrees_normal is None for example in found.sample.examples)


def test_probes_are_run_where_there_is_enough() -> None:
    images, labels = noise([(64, 64)] * 16), ["a", "b"] * 8
    backbone: Backbone = small()
    found = measure(images, discoverer(backbone), rule=CutoffRule("percentile", 50), labels=labels)
    for kind in ("outlier", "normal"):
        position, pixels = found.sample.position[kind], found.sample.pixels[kind]
        assert isinstance(position, PositionProbe)
        assert isinstance(pixels, PixelProbe)
        assert position.images == pixels.images == 16
    assert isinstance(found.sample.classes, dict)
    assert all(isinstance(probe, ClassProbe) for probe in found.sample.classes.values())
