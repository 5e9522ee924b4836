"""Numbers of every kind that users have, at every place that takes one."""

import json
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from conftest import disc_picture, same, scene

import lostreg
from lostreg import artifacts, metrics
from lostreg.artifacts.outliers import CutoffRule
from lostreg.checks import LARGEST_FLOAT32, real_number, shown, whole_number
from lostreg.errors import OptionError
from lostreg.inference.options import Options
from lostreg.models.backbone import Backbone

HUGE = 10**5000  # more digits than Python writes
WHOLE = [np.int64(2), np.uint8(2), np.array(2), torch.tensor(2), torch.tensor(2, dtype=torch.uint8)]
REAL = [-0.5, np.float32(-0.5), np.float64(-0.5), np.array(-0.5), torch.tensor(-0.5), Fraction(-1, 2)]
NO_NUMBER = [True, np.True_, torch.tensor(True), "2", b"2", None, [2], np.array([2]), torch.tensor([2]), 2j, object()]
NOT_WHOLE = [*NO_NUMBER, 2.0, np.float64(2), torch.tensor(2.0), float("nan"), 0, -1, 2**63, HUGE, -HUGE]
NOT_REAL = [*NO_NUMBER, float("nan"), float("inf"), np.float32("-inf"), torch.tensor(torch.nan), HUGE, 10**400]
FEATURES = torch.eye(3).repeat_interleave(torch.tensor([4, 14, 2]), dim=0)[None]  # 20 patches
CALIBRATION = {"interval": (0, 1), "connectivity": 0, "agreement": 0, "mean": 0, "deviation": 0, "images": 1}
CALIBRATION |= {"unreadable": 0, "seed": 0, "backbone": "", "weights": "", "feature": "k", "layer": 0, "k_patches": 1}


@pytest.mark.parametrize("value", WHOLE)
def test_integers_of_any_kind_become_plain_ones(value: Any) -> None:
    assert whole_number(value, "count") == 2
    assert type(whole_number(value, "count")) is int


@pytest.mark.parametrize("value", REAL)
def test_real_numbers_of_any_kind_become_plain_ones(value: Any) -> None:
    assert real_number(value, "bias") == -0.5
    assert type(real_number(value, "bias")) is float


@pytest.mark.parametrize("value", NOT_WHOLE, ids=lambda value: f"{type(value).__name__} {shown(value)}")
def test_all_else_is_no_count(value: Any) -> None:
    with pytest.raises(OptionError, match=r"^count must be an integer of at least 1.*, not .") as told:
        whole_number(value, "count")
    assert "\n" not in str(told.value)
    assert len(str(told.value)) < 150


@pytest.mark.parametrize("value", NOT_REAL, ids=lambda value: f"{type(value).__name__} {shown(value)}")
def test_all_else_is_no_real_number(value: Any) -> None:
    with pytest.raises(OptionError, match=r"^bias must be a finite number, not ."):
        real_number(value, "bias")


def found(backbone: Backbone, **options: Any) -> Any:
    return lostreg.Discoverer(backbone, **{"device": "cpu", **options}).discover(scene(3))


def boxes(**options: Any) -> Any:
    return lostreg.lost_boxes(**{"features": FEATURES, "grid": (4, 5), **options}).xyxy.tolist()


COUNTS: dict[str, Callable[[Backbone, Any], Any]] = {
    **{
        f"Options {name}": lambda _, value, name=name: getattr(Options("dino_vits16", **{name: value}), name)
        for name in ("k_patches", "batch_size", "max_side", "max_pixels", "max_objects")
    },
    "lost_boxes k_patches": lambda _, value: boxes(k_patches=value),
    "lost_boxes grid": lambda _, value: boxes(features=FEATURES[:, :10], grid=(value, 5)),
    "Study": lambda backbone, value: len(
        lostreg.Study(lostreg.Discoverer(backbone, device="cpu"), scene(3)).discover(max_objects=value)
    ),
    "calibrate": lambda backbone, value: lostreg.calibrate(
        [scene(3)], lostreg.Discoverer(backbone, device="cpu"), sample=value
    ),
    "measure": lambda backbone, value: (
        artifacts.measure([scene(3)], lostreg.Discoverer(backbone, device="cpu"), sample=value).patches
    ),
    "registers": lambda _, value: lostreg.RegisterNeurons(((1, 2),), count=value),
}
LAYERS: dict[str, Callable[[Backbone, Any], Any]] = {
    "Discoverer": lambda backbone, value: lostreg.Discoverer(backbone, device="cpu", layer=value).options.layer,
    "patch_features": lambda backbone, value: lostreg.patch_features(backbone, torch.zeros(1, 3, 28, 28), "k", value),
    "attention_maps": lambda backbone, value: [
        maps[0].layer
        for maps in lostreg.attention_maps([scene(3)], lostreg.Discoverer(backbone, device="cpu"), [value])
    ],
}
BIASES: dict[str, Callable[[Backbone, Any], Any]] = {
    "Discoverer": lambda backbone, value: found(backbone, bias=value).xyxy,
    "lost_boxes": lambda _, value: boxes(bias=value),
    "Calibration": lambda _, value: lostreg.Calibration(value, **CALIBRATION).bias,
}


def as_plain(result: Any) -> Any:
    return result.tolist() if isinstance(result, np.ndarray | torch.Tensor) else result


@pytest.mark.parametrize("place", COUNTS)
def test_counts_of_any_kind_are_taken_and_nothing_else_is(backbone: Backbone, place: str) -> None:
    expected = COUNTS[place](backbone, 2)
    assert all(COUNTS[place](backbone, value) == expected for value in WHOLE)
    optional = place in ("Options batch_size", "Options max_side", "Study")
    for value in NOT_WHOLE:
        if not (value is None and optional):
            with pytest.raises(OptionError, match="must "):
                COUNTS[place](backbone, value)


@pytest.mark.parametrize("place", LAYERS)
def test_layers_of_any_kind_are_taken_and_nothing_else_is(backbone: Backbone, place: str) -> None:
    expected = as_plain(LAYERS[place](backbone, 1))
    for value in (np.int64(1), torch.tensor(1), np.array(-1), -1):
        assert as_plain(LAYERS[place](backbone, value)) == expected
    for value in (*NO_NUMBER, 1.0, float("nan"), 2, HUGE, -HUGE):
        with pytest.raises(OptionError, match=r"^layer must be"):
            LAYERS[place](backbone, value)


@pytest.mark.parametrize("place", BIASES)
def test_biases_of_any_kind_are_taken_and_nothing_else_is(backbone: Backbone, place: str) -> None:
    expected = as_plain(BIASES[place](backbone, -0.5))
    assert all(as_plain(BIASES[place](backbone, value)) == expected for value in REAL)
    for value in (*NOT_REAL, 1e39, -1e308):
        if not (value is None and place == "Discoverer") and not (
            place == "lost_boxes" and isinstance(value, torch.Tensor) and value.ndim
        ):
            with pytest.raises(OptionError, match=r"^bias must be"):
                BIASES[place](backbone, value)


@pytest.mark.parametrize("bias", [LARGEST_FLOAT32, -LARGEST_FLOAT32, 1e30])
def test_the_largest_biases_can_be_computed_with(backbone: Backbone, bias: float) -> None:
    assert found(backbone, bias=bias, max_objects=3, min_score=0.0).xyxy.shape == (1, 4)
    assert lostreg.lost_boxes(FEATURES, (4, 5), bias).scores.isfinite().all()


def test_options_of_other_libraries_types_are_recorded_as_plain_values(backbone: Backbone) -> None:
    options = {"bias": np.float32(-0.5), "k_patches": np.int64(50), "layer": torch.tensor(-1), "min_score": np.array(0)}
    plain = {"bias": -0.5, "k_patches": 50, "layer": -1, "min_score": 0.0}
    flags = dict.fromkeys(("normalize", "exif", "refine", "compile"), np.False_)
    discoverer = lostreg.Discoverer(backbone, device="cpu", max_objects=2, **options, **flags)
    other = lostreg.Discoverer(backbone, device="cpu", max_objects=2, **plain, **dict.fromkeys(flags, False))
    assert json.loads(json.dumps(discoverer.options.record())) == other.options.record()
    assert same(discoverer.discover(scene(3)), other.discover(scene(3)))


def test_registers_of_other_libraries_types_can_be_saved(backbone: Backbone, tmp_path: Any) -> None:
    pairs = np.array([[1, 7], [0, 3]])
    registers = lostreg.RegisterNeurons(pairs, np.int64(2), cutoff=np.float32(1.5), layer=np.int64(1))
    registers.save(tmp_path / "registers.json")
    assert lostreg.RegisterNeurons.load(tmp_path / "registers.json") == registers
    assert registers == lostreg.RegisterNeurons(((1, 7), (0, 3)), 2, cutoff=1.5, layer=1)


@pytest.mark.parametrize("count", [10**30, 10**7, 1370])
def test_no_more_tokens_are_added_than_the_model_has_patches(backbone: Backbone, count: int) -> None:
    assert backbone.most_registers == 1369
    with pytest.raises(OptionError, match=r"must be an integer (from 1 to 1369|of at least 1 and below 2..63), not "):
        lostreg.Discoverer(backbone, device="cpu", registers=lostreg.RegisterNeurons(((1, 2),), count))


@pytest.mark.parametrize(
    "neurons", [None, 3, "ab", [[1]], [[1, 2.0]], [[1, True]], [[0, -1]], [[0, HUGE]], [(0, 1)] * 2]
)
def test_neurons_are_different_pairs(neurons: Any) -> None:
    with pytest.raises(OptionError, match=r"^neurons must be different pairs of layer and unit, from 0, not "):
        lostreg.RegisterNeurons(neurons)


@pytest.mark.parametrize("grid", [None, 20, (4,), (4, 5, 1), "45x", (4.0, 5), (4, -5), (4, True), (HUGE, 5)])
def test_a_grid_is_two_integers(grid: Any) -> None:
    with pytest.raises(OptionError, match="grid"):
        boxes(grid=grid)
    assert boxes(grid=np.array([4, 5])) == boxes(grid=torch.tensor([4, 5])) == boxes()


@pytest.mark.parametrize("shape", [(), (20,), (20, 3), (1, 1, 20, 3)])
def test_features_of_another_shape_are_refused_normalised_or_not(shape: tuple[int, ...]) -> None:
    for normalize in (False, True):
        with pytest.raises(OptionError, match=r"features must have shape \(B, N, D\)"):
            boxes(features=torch.ones(shape), normalize=normalize)


def test_a_bias_tensor_must_be_finite_in_float32_too() -> None:
    with pytest.raises(OptionError, match="every bias must be a finite number, in float32 too"):
        boxes(bias=torch.tensor([1e39], dtype=torch.float64))


@pytest.mark.parametrize(
    "rule", [("number", 0), ("number", np.nan), ("number", "150"), ("percentile", 100), ("sigma", np.inf), ("mean", 1)]
)
def test_a_rule_for_outliers_has_a_value_in_its_range(rule: tuple[Any, Any]) -> None:
    with pytest.raises(OptionError, match="must be"):
        CutoffRule(*rule)
    assert str(CutoffRule("percentile", np.float32(99.5))) == "99.5%"


def test_layers_are_a_sequence(backbone: Backbone) -> None:
    discoverer = lostreg.Discoverer(backbone, device="cpu")
    with pytest.raises(OptionError, match="layers must be a sequence of integers, not -1"):
        lostreg.attention_maps([scene(3)], discoverer, -1)  # type: ignore[arg-type]
    (maps,) = lostreg.attention_maps([scene(3)], discoverer, np.array([0, 1]))  # type: ignore[arg-type]
    assert [one.layer for one in maps] == [0, 1]


@pytest.mark.parametrize("seed", [-1, 0.5, None, True, 2**128 + 1])
def test_a_seed_is_an_integer_from_0(backbone: Backbone, seed: Any) -> None:
    discoverer = lostreg.Discoverer(backbone, device="cpu")
    for ask in (lostreg.calibrate, artifacts.measure, lostreg.find_registers):
        with pytest.raises(OptionError, match="seed must be an integer of at least 0, not "):
            ask([disc_picture()], discoverer, seed=seed)  # type: ignore[operator]


BAD_BOXES = [
    [["a", 0, 1, 1]],
    [[None, 0, 1, 1]],
    [[np.nan, 0, 1, 1]],
    [[0, 0, np.inf, 1]],
    [[0, 0, 1e10, 1]],
    [[0, 0], [1]],
    [[0, 0, 1, 1], [9, 0, 1, 1]],
    [[0, 9, 1, 1]],
]


@pytest.mark.parametrize("value", [*BAD_BOXES, [[0, 0, HUGE, 1]], np.ones((1, 4), bool), [[0j, 0, 1, 1]]], ids=shown)
def test_boxes_are_finite_numbers_within_reach(value: Any) -> None:
    sound = [[0, 0, 10, 10]]
    for ask in (
        lambda: metrics.is_hit(value, sound),
        lambda: metrics.is_hit(sound, value),
        lambda: metrics.corloc([value], [sound]),
        lambda: metrics.detection_scores([metrics.Detections(value, [0.5], sound, [])]),
    ):
        with pytest.raises(OptionError, match=r"^boxes must "):
            ask()
    assert metrics.is_hit(torch.tensor(sound), np.float16(sound))


@pytest.mark.parametrize("scores", [["a"], [np.nan], [np.inf], [], [0.5, 0.5], [[0.5]], None, [True]])
def test_scores_are_finite_and_one_each(scores: Any) -> None:
    with pytest.raises(OptionError, match="score"):
        metrics.score_auc(scores, [True, False][: 1 if len(scores or []) != 1 else 2])
    if scores != [[0.5]]:  # raveled
        with pytest.raises(OptionError, match="score"):
            metrics.detection_scores([metrics.Detections([[0, 0, 1, 1]], scores, [[0, 0, 1, 1]], [])])
