"""Neurons that write outliers, found in models where they were planted."""

import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import same
from planted import Plant, cut, deafened, noise, pixels_of, plant, silenced
from random_models import OTHERS, built

from lostreg.artifacts.norms import TokenNorms, token_norms
from lostreg.artifacts.outliers import CutoffRule
from lostreg.artifacts.register_search import find_registers
from lostreg.errors import LostregWarning, OptionError, RegistersError
from lostreg.inference.discoverer import Discoverer
from lostreg.models.backbone import Backbone
from lostreg.models.features import FeatureExtractor
from lostreg.models.forward import Forward
from lostreg.models.registers import RegisterNeurons

pytestmark = pytest.mark.usefixtures("one_thread")

DEPTH = 4
LAYER = 1
UNITS = (17, 3, 200)
WIDE = {"embed_dim": 384, "num_heads": 6}
NAMES = (
    "dinov2_vits14",
    "dinov2_vits14_reg",
    "dinov2_vitg14",
    "dinov3_vits16",
    "siglip2_vitb16",
    "sbb_vitm16_reg",
    "openclip_vitb16",
    "RMS norm, SwiGLU",
)
# Pixels, and planted patches of grids of about 6 x 7; the second and the fifth picture have none.
SHAPES = [(84, 98), (70, 112), (98, 65), (61, 84), (84, 84), (70, 70)]
PATCHES = [(0, 9, 20), (), (29, 3, 4), (8, 10), (), (11, 24)]
IMAGES = noise(SHAPES)


def base(name: str, depth: int = DEPTH) -> Backbone:
    table_name, _ = OTHERS.get(name, (name, {}))
    return built(table_name, depth=depth, **WIDE)


def chosen(backbone: Backbone) -> list[tuple[int, ...]]:
    """The planted patches that an image of so many patches has."""
    counts = [rows * columns for rows, columns in (picture.grid for picture in cut(IMAGES, backbone))]
    return [tuple(patch for patch in each if patch < count) for each, count in zip(PATCHES, counts, strict=True)]


def norms_of(backbone: Backbone, images: Sequence[np.ndarray] = IMAGES) -> list[TokenNorms]:
    pictures = cut(images, backbone)
    return token_norms(Forward(backbone), pixels_of(pictures, backbone), [picture.grid for picture in pictures])


def ordinary(backbone: Backbone) -> float:
    """The largest norm of a patch."""
    return max(float(norms.output.max()) for norms in norms_of(backbone))


def planted(backbone: Backbone, layer: int = LAYER, units: Sequence[int] = UNITS, times: float = 8.0) -> Plant:
    norm = times * ordinary(backbone)
    return plant(backbone, IMAGES, chosen(backbone), layer=layer, units=units, norm=norm)


def find(backbone: Backbone, images: Sequence[Any] = IMAGES, batch_size: int = 8, **options: Any) -> RegisterNeurons:
    return find_registers(images, discoverer(backbone, batch_size=batch_size), **options)


def discoverer(backbone: Backbone, **options: Any) -> Discoverer:
    return Discoverer(backbone, device="cpu", **options)


@pytest.fixture(scope="module", params=NAMES)
def healthy(request: pytest.FixtureRequest) -> Backbone:
    return base(request.param)


@pytest.fixture(scope="module")
def example(healthy: Backbone) -> Plant:
    return planted(healthy)


@pytest.fixture(scope="module", params=["dinov2_vits14_reg", "dinov2_vitg14"])
def some(request: pytest.FixtureRequest) -> Plant:
    """One of each kind of MLP."""
    return planted(base(request.param))


@pytest.fixture(scope="module")
def one() -> Plant:
    return planted(base("dinov2_vits14"))


def marked(norms: Sequence[TokenNorms], cutoff: float | None) -> list[tuple[int, ...]]:
    assert cutoff is not None
    return [tuple(np.flatnonzero(found.output >= cutoff).tolist()) for found in norms]


@pytest.mark.parametrize("given", [True, False], ids=["number given", "number measured"])
def test_the_planted_neurons_are_found(example: Plant, given: bool) -> None:
    """Given their number, and without; exactly these, their layer, and their outliers."""
    found = find(example.backbone, neurons=len(UNITS) if given else None)
    assert set(found.neurons) == set(example.neurons)
    assert found.layer == LAYER
    assert (found.count, found.images, found.seed) == (1, len(IMAGES), 0)
    assert (found.backbone, found.weights) == (example.backbone.spec.name, example.backbone.weights)
    norms = norms_of(example.backbone)
    assert marked(norms, found.cutoff) == list(example.patches)
    outliers = sum(map(len, example.patches))
    assert found.outliers == pytest.approx(outliers / sum(one.output.size for one in norms))
    assert found.outliers_left == 0


def test_cured_patches_are_ordinary_and_the_added_token_is_not(example: Plant) -> None:
    found = find(example.backbone)
    cured = example.backbone.with_registers(found)
    added = cured.prefix_tokens - 1
    limit = ordinary(example.plain)
    for before, after, patches in zip(norms_of(example.backbone), norms_of(cured), example.patches, strict=True):
        assert after.output.shape == before.output.shape
        assert after.output.max() < 1.5 * limit
        large = np.flatnonzero(after.layers[-1] > 3 * limit)
        assert large.tolist() == ([added] if patches else [])
        if patches:
            assert after.layers[-1, added] == pytest.approx(before.output[list(patches)].mean(), rel=0.2)


def test_where_attention_carries_nothing_the_cure_is_exact(healthy: Backbone) -> None:
    """Planted in the last block, and in one whose followers do not attend: patches are those of the model without."""
    for model, layer, count in ((healthy, DEPTH - 1, 1), (deafened(healthy), LAYER, 3)):
        sick = planted(model, layer=layer, units=(5, 6))
        found = find(sick.backbone, count=count, neurons=2)
        assert set(found.neurons) == {(layer, 5), (layer, 6)}
        assert found.layer == layer
        assert found.outliers_left == 0
        before, after, expected = (
            norms_of(backbone)
            for backbone in (sick.backbone, sick.backbone.with_registers(found), sick.plain.with_registers(found))
        )
        own = sick.backbone.prefix_tokens
        for norms, cured, plain, patches in zip(before, after, expected, sick.patches, strict=True):
            np.testing.assert_allclose(cured.output, plain.output, rtol=1e-5)
            np.testing.assert_allclose(cured.layers[-1, :own], plain.layers[-1, :own], rtol=1e-5)
            held = cured.layers[-1, own : own + count]
            assert len(set(np.round(held / held[0], 4))) == 1  # each added token has the whole of it
            if patches:
                assert held.min() > 0.5 * norms.output.max()


def test_neurons_of_several_layers_are_found_together() -> None:
    """What the first writes is less than an outlier; only both together make one, and only both together are a cure."""
    healthy = base("dinov2_vits14_reg")
    size = ordinary(healthy)
    first = plant(healthy, IMAGES, chosen(healthy), layer=0, units=(40, 41), norm=6 * size)
    second = plant(first.backbone, IMAGES, chosen(healthy), layer=2, units=(7,), norm=12 * size)
    both = {*first.neurons, *second.neurons}
    rule = CutoffRule("number", 10 * size)
    for neurons in (3, None):
        found = find(second.backbone, neurons=neurons, rule=rule)
        assert set(found.neurons) == both
        assert found.layer == 2
        assert found.outliers_left == 0
    cured = norms_of(second.backbone.with_registers(found))
    plain = norms_of(silenced(second.backbone, tuple(both)).with_registers(found))
    for one, other in zip(cured, plain, strict=True):
        assert one.output.max() < 1.5 * size
        assert other.output.max() < 1.5 * size


def test_layers_after_the_one_where_outliers_emerge_play_no_part() -> None:
    healthy = base("dinov2_vits14")
    first = planted(healthy, layer=1, units=(4,))
    second = plant(first.backbone, IMAGES, chosen(healthy), layer=2, units=(9,), norm=1.0)  # as active as the first
    found = find(second.backbone, neurons=500)
    assert found.layer == 1
    assert found.neurons[0] == (1, 4)
    assert len(found.neurons) == 500
    assert {layer for layer, _ in found.neurons} <= {0, 1}


@pytest.mark.parametrize("name", ["dinov2_vits14", "dinov2_vitg14"])
def test_a_unit_that_is_active_everywhere_writes_no_outliers(name: str) -> None:
    healthy = base(name)
    mlp: Any = healthy.model.blocks[0].mlp  # type: ignore[index, union-attr]
    for row in {60, mlp.fc1.out_features - mlp.fc2.in_features + 60}:
        mlp.fc1.weight[row] = 0
        mlp.fc1.bias[row] = 50.0
    mlp.fc2.weight[:, 60] *= 0.01
    sick = planted(healthy)
    assert set(find(sick.backbone, neurons=3).neurons) == set(sick.neurons)
    assert set(find(sick.backbone).neurons) == set(sick.neurons)


def test_units_of_negative_activation_are_found_and_moved() -> None:
    """Of gated MLPs: the same function with the sign of a hidden unit turned."""
    sick = planted(base("dinov2_vitg14"))
    turned = silenced(sick.backbone, ())
    mlp: Any = turned.model.blocks[LAYER].mlp  # type: ignore[index, union-attr]
    for unit in UNITS:
        mlp.fc1.weight[unit + mlp.fc2.in_features] *= -1
        mlp.fc2.weight[:, unit] *= -1
    found = find(turned)
    assert set(found.neurons) == set(sick.neurons)
    for one, other in zip(
        norms_of(turned.with_registers(found)), norms_of(sick.backbone.with_registers(found)), strict=True
    ):
        np.testing.assert_allclose(one.layers, other.layers, rtol=1e-4)


def test_images_together_are_as_each_alone(some: Plant) -> None:
    """Norms and features of every kind, with the cure: packs, single images, another order."""
    cured = some.backbone.with_registers(RegisterNeurons(some.neurons, 2))
    images = [*IMAGES, IMAGES[2], noise([(14, 14)], seed=5)[0]]
    pictures = cut(images, cured)
    wanted: list[Any] = [("q", 2), ("k", DEPTH - 1), ("v", LAYER + 1), ("out", LAYER), ("out", DEPTH - 1)]

    def features(numbers: Sequence[int]) -> list[list[torch.Tensor]]:
        pack = [pictures[number] for number in numbers]
        packed = FeatureExtractor(cured, wanted)(pixels_of(pack, cured), [picture.grid for picture in pack])
        sizes = [picture.grid[0] * picture.grid[1] for picture in pack]
        return [list(torch.split(tensor, sizes)) for tensor in packed]

    together = features(range(8))
    order = [6, 1, 7, 3, 0, 5, 2, 4]
    mixed = features(order)
    norms = norms_of(cured, images)
    for number in range(8):
        alone = features([number])
        (single,) = norms_of(cured, [images[number]])
        np.testing.assert_allclose(norms[number].layers, single.layers, rtol=1e-4)
        np.testing.assert_allclose(norms[number].final, single.final, rtol=1e-4)
        for packed, other, (expected,) in zip(together, mixed, alone, strict=True):
            scale = expected.abs().max()
            assert (packed[number] - expected).abs().max() <= 1e-4 * scale
            assert (other[order.index(number)] - expected).abs().max() <= 1e-4 * scale


def test_batches_and_sides_of_the_same_images_give_the_same(some: Plant) -> None:
    found = find(some.backbone)
    for batch_size in (1, 4):
        again = find(some.backbone, batch_size=batch_size)
        assert set(again.neurons) == set(found.neurons)
        assert dataclasses.replace(again, neurons=found.neurons) == dataclasses.replace(found, cutoff=again.cutoff)


def test_the_same_seed_gives_the_same_and_a_sample_is_drawn(one: Plant) -> None:
    many = [*IMAGES, *IMAGES]
    first = find(one.backbone, images=many, sample=7, seed=3)
    assert first == find(one.backbone, images=many, sample=7, seed=3)
    assert (first.images, first.seed) == (7, 3)
    assert set(first.neurons) == set(one.neurons)
    rule = CutoffRule("number", 4 * ordinary(one.plain))
    samples = [find(one.backbone, sample=5, seed=seed, rule=rule, neurons=3) for seed in range(6)]
    assert {found.images for found in samples} == {5}
    assert len({found.outliers for found in samples}) > 1


def test_a_number_is_taken_as_the_cutoff(one: Plant) -> None:
    norms = np.concatenate([found.output for found in norms_of(one.backbone)])
    between = float(np.sort(norms)[-4:-2].mean())  # three of the outliers
    found = find(one.backbone, rule=CutoffRule("number", between), neurons=3)
    assert found.cutoff == pytest.approx(between, abs=1e-4)
    assert found.outliers == pytest.approx(3 / norms.size)
    assert set(found.neurons) == set(one.neurons)
    sick = plant(base("dinov2_vits14"), IMAGES, chosen(one.plain), layer=LAYER, units=UNITS, norm=400.0)
    assert ordinary(one.plain) < 150
    large = find(sick.backbone, rule=CutoffRule("number", 150))
    assert large.cutoff == 150.0
    assert set(large.neurons) == set(one.neurons)
    assert marked(norms_of(sick.backbone), 150.0) == list(sick.patches)


@pytest.mark.parametrize("rule", [CutoffRule("sigma", 3.0), CutoffRule("percentile", 96.0)])
def test_other_rules_work_as_well(one: Plant, rule: CutoffRule) -> None:
    found = find(one.backbone, rule=rule)
    assert set(found.neurons) == set(one.neurons)


def test_a_plain_model_has_nothing_to_be_found() -> None:
    with pytest.raises(RegistersError, match="no outliers that test-time registers could take up: not bimodal"):
        find(base("dinov2_vits14", depth=2))
    with pytest.raises(RegistersError, match=r"no outliers .*: no norm reaches 1e\+06: the largest is"):
        find(base("dinov2_vits14", depth=2), rule=CutoffRule("number", 1e6))


def test_a_cutoff_that_all_patches_reach_is_refused(one: Plant) -> None:
    with pytest.raises(RegistersError, match=r"all patches have norms from 0\.01"):
        find(one.backbone, rule=CutoffRule("number", 0.01))


def test_norms_that_are_not_finite_are_one_error(one: Plant) -> None:
    broken = silenced(one.backbone, ())
    broken.model.blocks[2].mlp.fc2.weight[0, 0] = float("inf")  # type: ignore[index, union-attr]
    with pytest.raises(RegistersError, match="some norms are not finite"):
        find(broken)


def test_images_all_of_whose_patches_are_outliers_are_taken_as_they_are(one: Plant) -> None:
    """One patch, an outlier: there is no other patch of an affected image to compare it with."""
    (dot,) = noise([(14, 14)], seed=9)
    images = [dot, IMAGES[1]]
    size = ordinary(one.plain)
    sick = plant(base("dinov2_vits14"), images, [(0,), ()], layer=LAYER, units=(2,), norm=8 * size)
    found = find(sick.backbone, images=images, rule=CutoffRule("number", 4 * size), neurons=1)
    assert found.neurons == ((LAYER, 2),)
    assert set(find(sick.backbone, images=images, rule=CutoffRule("number", 4 * size)).neurons) == set(found.neurons)
    assert found.outliers_left == 0


def test_images_that_cannot_be_read_are_left_out(one: Plant, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no picture")
    found = find(one.backbone, images=[broken, *IMAGES[:3], tmp_path / "none.png", *IMAGES[3:]])
    assert found == find(one.backbone)
    with pytest.raises(RegistersError, match="none of 2 images could be read"):
        find(one.backbone, images=[broken, tmp_path / "none.png"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": []}, "at least one image"),
        ({"count": 0}, "count must be an integer from 1 to [0-9]+, not 0"),
        ({"count": 10**7}, "count must be an integer from 1 to [0-9]+, not 10000000"),
        ({"neurons": 0}, "neurons must be an integer of at least 1, not 0"),
        ({"neurons": -3}, "not -3"),
        ({"sample": 0}, "sample must be an integer of at least 1, not 0"),
        ({"seed": -1}, "seed must be"),
    ],
)
def test_options_out_of_range_are_refused(one: Plant, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        find(one.backbone, **options)


def test_nothing_is_left_on_the_model(some: Plant) -> None:
    model = some.backbone.model
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    user = discoverer(some.backbone)
    before = user.discover(IMAGES[0])
    found = find_registers(IMAGES, user)
    cured = user.with_registers(found)
    cured.discover(IMAGES[0])
    assert cured.backbone.model is model
    assert some.backbone.registers is None
    assert user.backbone.registers is None
    assert same(user.discover(IMAGES[0]), before)
    assert same(cured.with_registers(None).discover(IMAGES[0]), before)
    assert same(discoverer(some.backbone, registers=None).discover(IMAGES[0]), before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    for module in model.modules():
        assert not any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks))


def test_registers_that_are_there_already_play_no_part(some: Plant) -> None:
    found = find(some.backbone)
    assert find_registers(IMAGES, discoverer(some.backbone, registers=found)) == found
    assert find(some.backbone.with_registers(found)) == found


def test_progress_is_told_of_each_image(one: Plant) -> None:
    steps: list[tuple[str, int, int]] = []
    find(one.backbone, on_progress=lambda now: steps.append((now.step, now.done, now.total)))
    assert steps[:6] == [("norms", done, 6) for done in range(1, 7)]
    assert steps[6:10] == [("neurons", done, 4) for done in range(1, 5)]
    assert steps[10:14] == [("trying 1", done, 4) for done in range(1, 5)]
    assert steps[-1] == ("checking 3", 4, 4)


def test_nine_in_ten_outliers_have_to_be_cured(monkeypatch: pytest.MonkeyPatch) -> None:
    """One neuron writes eight of ten, another the other two."""
    healthy = base("dinov2_vits14")
    patches, norm = chosen(healthy), 8 * ordinary(healthy)
    first = plant(healthy, IMAGES, [*patches[:5], ()], layer=LAYER, units=(5,), norm=norm)
    both = plant(first.backbone, IMAGES, [*[()] * 5, patches[5]], layer=LAYER, units=(6,), norm=norm)
    found = find(both.backbone)
    assert found.neurons == ((LAYER, 5), (LAYER, 6))
    assert found.outliers_left == 0
    monkeypatch.setattr("lostreg.artifacts.register_search._CURED", 0.75)
    found = find(both.backbone)
    assert found.neurons == ((LAYER, 5),)
    patches_of_affected = sum(one.output.size for one in norms_of(both.backbone) if one.output.max() >= norm / 2)
    assert found.outliers_left == pytest.approx(2 / patches_of_affected)


def test_at_most_so_many_neurons_are_taken(one: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six are needed and four allowed: those come back, and how little they help is told."""
    sick = planted(base("dinov2_vits14"), units=range(30, 36), times=60)
    assert set(find(sick.backbone).neurons) == set(sick.neurons)
    monkeypatch.setattr("lostreg.artifacts.register_search._MOST_NEURONS", 4)
    found = find(sick.backbone)
    assert set(found.neurons) < set(sick.neurons)
    assert found.outliers_left > 0


def test_half_precision_finds_the_same(some: Plant) -> None:
    with warnings.catch_warnings(action="ignore", category=LostregWarning):  # of CPUs that are slow at it
        half = discoverer(some.backbone, precision="bf16")
    found = find_registers(IMAGES, half, neurons=len(UNITS))
    assert set(found.neurons) == set(some.neurons)
    assert found.outliers_left == 0
    assert found.cutoff == pytest.approx(find(some.backbone).cutoff, rel=0.1)
    cured = norms_of(half.backbone.with_registers(found))
    single = norms_of(some.backbone.with_registers(found))
    for one, other in zip(cured, single, strict=True):
        np.testing.assert_allclose(one.output, other.output, rtol=0.1)


def test_what_is_found_survives_its_file(one: Plant, tmp_path: Path) -> None:
    found = find(one.backbone, count=2)
    found.save(tmp_path / "registers.json")
    loaded = RegisterNeurons.load(tmp_path / "registers.json")
    assert loaded == found
    first, second = (discoverer(one.backbone, registers=registers) for registers in (found, loaded))
    assert same(first.discover(IMAGES[0]), second.discover(IMAGES[0]))
    assert first.options == second.options
