"""A second look: which tokens reach the probes, which images are shown, and what LOST makes of them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from planted import cut, noise, pixels_of
from random_models import built
from small_vit import PATCHES, discoverer, norms_of, pictures, small, world

from lostreg.artifacts import sample as module
from lostreg.artifacts.measurement import measure
from lostreg.artifacts.outliers import CutoffRule
from lostreg.artifacts.probes import ClassProbe, Skipped
from lostreg.artifacts.sample import EXAMPLES, RASTER, TOKENS, Sample, look_inside
from lostreg.images.decode import read_image
from lostreg.methods.lost import lost_boxes
from lostreg.models.backbone import Backbone
from lostreg.models.features import patch_features
from lostreg.models.forward import Forward

pytestmark = pytest.mark.usefixtures("one_thread")

CUTOFF = 9.0  # between the two groups of norms of `small_vit`


def look(images: Sequence[Any], backbone: Backbone, cutoff: float | None = CUTOFF, **options: Any) -> Sample:
    given = {"labels": None, "seed": 0, "like": None, **options}
    labels, seed, like = (given.pop(name) for name in ("labels", "seed", "like"))
    one = discoverer(backbone, **given)
    return look_inside(images, one, Forward(one.backbone), cutoff, labels, seed, like, lambda *told: None)


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """What the probes were given."""
    given: dict[str, list[Any]] = {"position": [], "pixels": [], "classes": []}

    def note(name: str) -> Any:
        def probe(*arguments: Any) -> Skipped:
            given[name].append(arguments)
            return Skipped("noted")

        return probe

    for name in given:
        monkeypatch.setattr(module, f"probe_{name}", note(name))
    return given


def final_tokens(backbone: Backbone, images: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Of each image, after the final norm, prefix first; by the model's own forward where images are whole patches."""
    found = cut(images, backbone)
    forward = Forward(backbone)
    walk = forward.start(pixels_of(found, backbone), [one.grid for one in found])
    for _ in range(backbone.depth):
        forward.advance(walk)
    tokens = backbone.model.norm(walk.tokens)  # type: ignore[operator]
    return [tokens[span].numpy() for span in walk.packing.spans]


def row_of(token: np.ndarray, tokens: np.ndarray) -> int:
    (row,) = np.flatnonzero(np.abs(tokens - token).max(axis=1) < 1e-4)
    return int(row)


def test_the_same_seed_gives_the_same_numbers() -> None:
    images, labels = noise([(64, 64)] * 14), ["a", "b"] * 7
    options: dict[str, Any] = {"rule": CutoffRule("percentile", 50), "labels": labels, "sample": 12}
    first, again, other = (measure(images, discoverer(small()), seed=seed, **options).sample for seed in (3, 3, 4))
    assert not isinstance(first.classes, Skipped)
    for name in ("position", "pixels", "classes", "gram", "gram_normal", "outliers"):
        assert getattr(first, name) == getattr(again, name), name
    assert first.pixels != other.pixels


def test_probes_get_outliers_and_others_after_the_final_norm(probed: dict[str, list[Any]]) -> None:
    backbone = world().backbone
    found = look(pictures(), backbone)
    assert (found.images, found.affected, found.outliers) == (6, 4, 5)
    finals, images = final_tokens(backbone, pictures()), cut(pictures(), backbone)
    fed = list(pixels_of(images, backbone))
    sides: list[set[tuple[int, int]]] = []
    for (tokens, cells, numbers), (again, pixels, same) in zip(probed["position"], probed["pixels"], strict=True):
        np.testing.assert_array_equal(tokens, again)
        np.testing.assert_array_equal(numbers, same)
        places = set()
        for token, cell, number, patch in zip(tokens, cells, numbers, pixels, strict=True):
            place = row_of(token, finals[number][1:])
            rows, columns = images[number].grid
            middle = (place // columns + 0.5) / rows, (place % columns + 0.5) / columns
            assert tuple(cell) == tuple(int(part * RASTER) for part in middle)
            np.testing.assert_array_equal(patch, fed[number][place].numpy())
            places.add((int(number), place))
        assert len(places) == len(tokens)
        sides.append(places)
    outliers = {(number, patch) for number, chosen in enumerate(PATCHES) for patch in chosen}
    every = {(number, place) for number, one in enumerate(images) for place in range(one.grid[0] * one.grid[1])}
    assert [sides[0], sides[2]] == [outliers, every - outliers]
    assert sides[1] < sides[2]  # as many normal ones of the same images
    assert sorted(number for number, _ in sides[1]) == sorted(number for number, _ in sides[0])


def test_of_many_tokens_some_are_drawn_from_each_image(probed: dict[str, list[Any]]) -> None:
    images = noise([(128, 96), (16, 48)])
    found = look(images, small(), cutoff=None)
    assert found.outliers == 0
    assert set(found.position) == {"outlier", "normal"}
    ((tokens, _, numbers),) = probed["position"]  # of no outliers there is nothing to ask
    assert np.bincount(numbers).tolist() == [TOKENS, 3]
    assert len(np.unique(tokens.round(4), axis=0)) == TOKENS + 3
    assert found.position["outlier"] == Skipped("there are no such tokens")


def test_one_token_of_each_kind_is_asked_for_the_class(probed: dict[str, list[Any]]) -> None:
    backbone = built("dinov2_vits14_reg", depth=2, embed_dim=64, num_heads=2)
    images = noise([(56, 42), (28, 56), (56, 56)])
    norms = [found.output for found in norms_of(backbone, images)]
    limit = float(np.median(norms[0]))
    look(images, backbone, cutoff=limit, labels=["a", None, "b"])
    tokens, labels = probed["classes"][0]
    affected = [number for number in (0, 2) if (norms[number] >= limit).any() and (norms[number] < limit).any()]
    assert labels.tolist() == [["a", None, "b"][number] for number in affected]
    names = ["CLS", "register 1", "register 2", "register 3", "register 4"]
    assert list(tokens) == [*names, "mean of patches", "one outlier token", "one normal token"]
    for row, number in enumerate(affected):
        final = final_tokens(backbone, images[number : number + 1])[0]
        for place, name in enumerate(names):
            np.testing.assert_allclose(tokens[name][row], final[place], atol=1e-4)
        np.testing.assert_allclose(tokens["mean of patches"][row], final[5:].mean(axis=0), atol=1e-4)
        assert norms[number][row_of(tokens["one outlier token"][row], final[5:])] >= limit
        assert norms[number][row_of(tokens["one normal token"][row], final[5:])] < limit


def test_classes_are_asked_over_images_with_outliers_and_without_these_where_they_are_few(
    probed: dict[str, list[Any]],
) -> None:
    labels = list("ababab")
    found = look(pictures(), world().backbone, labels=labels)
    assert found.classes == Skipped("noted")
    (first, of_affected), (second, of_all) = probed["classes"]
    assert of_affected.tolist() == [label for label, chosen in zip(labels, PATCHES, strict=True) if chosen]
    assert of_all.tolist() == labels
    assert "one outlier token" in first
    assert list(second) == ["CLS", "mean of patches", "one normal token"]
    assert all(np.isfinite(tokens).all() for given in (first, second) for tokens in given.values())


def test_with_enough_images_classes_are_compared_over_the_same_ones() -> None:
    images = noise([(48, 48)] * 12)
    limit = float(np.median(np.concatenate([norms.output for norms in norms_of(small(), images)])))
    found = look(images, small(), cutoff=limit, labels=["a", "b"] * 6)
    assert isinstance(found.classes, dict)
    assert set(found.classes) == {"CLS", "mean of patches", "one outlier token", "one normal token"}
    assert {(probe.images, probe.classes) for probe in found.classes.values()} == {(12, 2)}
    without = look(images, small(), cutoff=None, labels=["a", "b"] * 6)
    assert isinstance(without.classes, dict)
    assert set(without.classes) == {"CLS", "mean of patches", "one normal token"}
    assert all(isinstance(probe, ClassProbe) for probe in without.classes.values())


def test_without_labels_there_are_no_classes() -> None:
    for labels in (None, [None] * 6):
        found = look(pictures(), small(), None, labels=labels)
        assert isinstance(found.classes, Skipped)
        assert found.classes.reason.startswith("no image has a class: expected")


# Examples


def test_examples_are_the_images_with_the_most_outliers() -> None:
    found = look(pictures(), world().backbone)
    assert len(found.examples) == EXAMPLES == 4
    order = [3, 0, 1, 4]  # two outliers, then one each in the order of the images
    norms = norms_of(world().backbone, pictures())
    for number, example in zip(order, found.examples, strict=True):
        rows, columns = norms[number].grid
        assert example.outliers.shape == example.norms.shape == (rows, columns)
        assert np.flatnonzero(example.outliers).tolist() == sorted(PATCHES[number])
        np.testing.assert_allclose(example.norms.ravel(), norms[number].output, rtol=1e-4)


def test_without_outliers_examples_are_the_first_images() -> None:
    found = look(pictures(), small(), None)
    assert [example.norms.shape for example in found.examples] == [(3, 3), (3, 2), (2, 3), (3, 3)]
    assert not any(example.outliers.any() for example in found.examples)


@pytest.mark.parametrize("name", ["timm:test_vit", "dinov2_vits14_reg", "siglip2_vitb16", "dinov3_vits16"])
def test_the_pixels_of_an_example_are_those_of_the_image(name: str) -> None:
    backbone = small() if name.startswith("timm:") else built(name, depth=1, embed_dim=64, num_heads=2)
    images = noise([(50, 37), (64, 70)])
    patch = backbone.spec.patch_size
    for image, example in zip(images, look(images, backbone, None).examples, strict=True):
        height, width = image.shape[:2]
        assert example.pixels.dtype == np.uint8
        assert example.pixels.shape == (-(-height // patch) * patch, -(-width // patch) * patch, 3)
        np.testing.assert_array_equal(example.pixels[:height, :width], image)
        beyond = (np.array(backbone.mean, np.float32) * 255).round().astype(np.uint8)
        assert (example.pixels[height:] == beyond).all()
        assert (example.pixels[:, width:] == beyond).all()


@pytest.mark.parametrize(
    "options",
    [{}, {"bias": -0.2}, {"feature": "out", "layer": 3}, {"feature": "v", "layer": 0}, {"feature": "q"}],
    ids=str,
)
def test_degrees_are_those_of_lost(options: dict[str, Any]) -> None:
    backbone = world().backbone
    images = pictures()
    found = look(images, backbone, **options)
    one = discoverer(backbone, **options)
    for number, example in zip([3, 0, 1, 4], found.examples, strict=True):
        grid = (example.norms.shape[0], example.norms.shape[1])
        by_hand = one.discover(images[number])
        np.testing.assert_array_equal(example.degrees, by_hand.degrees)
        assert example.degrees_normal is not None
        np.testing.assert_array_equal(example.degrees_normal < 0, example.outliers)
        features = patch_features(backbone, padded(images[number], backbone), one.options.feature, one.options.layer)[0]
        (bias,) = lost_boxes(features[None], grid, one.options.bias, normalize=one.options.normalize).bias.tolist()
        unit = torch.nn.functional.normalize(features.double(), dim=1) if one.options.normalize else features.double()
        connected = (unit @ unit.T + bias > 0).fill_diagonal_(False).numpy()
        kept = ~example.outliers.ravel()
        by_hand_without = connected[np.ix_(kept, kept)].sum(axis=1)
        np.testing.assert_array_equal(example.degrees_normal.ravel()[kept], by_hand_without)


def padded(image: np.ndarray, backbone: Backbone) -> torch.Tensor:
    """What the model is fed, (1, 3, H, W)."""
    patch = backbone.spec.patch_size
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (backbone.mean, backbone.std))
    pixels = (torch.from_numpy(image).permute(2, 0, 1) / 255 - mean) / std
    return torch.nn.functional.pad(pixels, (0, -image.shape[1] % patch, 0, -image.shape[0] % patch))[None]


def test_gram_figures_are_over_images_with_outliers_where_there_are_any() -> None:
    backbone = world().backbone
    affected = [image for image, chosen in zip(pictures(), PATCHES, strict=True) if chosen]
    found, among = look(pictures(), backbone), look(affected, backbone)
    assert found.gram_normal is not None
    assert among.gram_normal is not None
    assert found.gram.spectrum == pytest.approx(among.gram.spectrum, abs=1e-5)
    assert found.gram_normal.spectrum == pytest.approx(among.gram_normal.spectrum, abs=1e-5)
    assert found.gram.similarity == pytest.approx(among.gram.similarity, abs=1e-5)
    single = [look([image], backbone, None).gram.similarity for image in pictures()]
    assert look(pictures(), backbone, None).gram.similarity == pytest.approx(np.mean(single), abs=1e-5)


def test_images_are_seen_as_the_discoverer_reads_them() -> None:
    (image,) = noise([(96, 64)])
    (example,) = look([image], small(), None, max_side=48).examples
    assert example.norms.shape == (3, 2)
    np.testing.assert_array_equal(example.pixels, read_image(image, max_side=48).pixels)
