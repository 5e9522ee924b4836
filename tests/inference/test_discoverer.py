import dataclasses
import io
import json
import os
import pickle
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import same, scene, scenes
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lostreg.artifacts.attention import attention_maps
from lostreg.artifacts.measurement import measure
from lostreg.artifacts.register_search import find_registers
from lostreg.defaults import METHODS, PUBLISHED_METHODS
from lostreg.errors import BackboneError, ImageError, ImageUnavailableError, LostregWarning, OptionError
from lostreg.images.decode import read_image
from lostreg.inference.calibrate import calibrate
from lostreg.inference.discoverer import Discoverer, _has_quick_bf16
from lostreg.inference.learn import learn
from lostreg.inference.options import Options
from lostreg.inference.study import Study
from lostreg.methods.objectness import object_scores
from lostreg.models.backbone import Backbone, build_backbone, find_spec, resolve_device
from lostreg.models.table import BACKBONES

_cached: dict[str, Discoverer] = {}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def discoverer(backbone: Backbone) -> Discoverer:
    return Discoverer(backbone, device="cpu", batch_size=2)


def test_the_scenes_are_worth_comparing(discoverer: Discoverer) -> None:
    boxes = {tuple(found.xyxy[0].tolist()) for found in discoverer.discover_many(scenes(12))}
    assert len(boxes) > 6


def test_one_image_is_found_like_a_list_of_one(discoverer: Discoverer, photo: Path) -> None:
    (listed,) = discoverer.discover_many([photo])
    assert same(discoverer.discover(photo), listed)


def test_files_arrays_and_pil_images_are_the_same_to_it(discoverer: Discoverer, tmp_path: Path) -> None:
    pixels = scene(3)
    path = tmp_path / "a.png"
    Image.fromarray(pixels).save(path)
    expected = discoverer.discover(path)
    assert same(discoverer.discover(str(path)), expected)
    assert same(discoverer.discover(pixels), expected)
    assert same(discoverer.discover(Image.fromarray(pixels)), expected)


@pytest.mark.parametrize("count", [0, 1, 2, 7, 8, 9])
def test_order_is_kept_over_mixed_shapes_and_odd_counts(discoverer: Discoverer, count: int) -> None:
    images = scenes(count)
    found = list(discoverer.discover_many(images))
    assert [(one.width, one.height) for one in found] == [image.shape[1::-1] for image in images]
    for one, image in zip(found, images, strict=True):
        np.testing.assert_array_equal(one.xyxy, discoverer.discover(image).xyxy)


def test_the_batch_size_does_not_change_boxes(backbone: Backbone) -> None:
    images = scenes(11)
    by_one = Discoverer(backbone, device="cpu", batch_size=1).discover_many(images)
    by_eight = Discoverer(backbone, device="cpu", batch_size=8).discover_many(images)
    for first, second in zip(by_one, by_eight, strict=True):
        np.testing.assert_array_equal(first.xyxy, second.xyxy)
        np.testing.assert_array_equal(first.seeds, second.seeds)


def test_images_come_in_many_forms(discoverer: Discoverer, photo: Path) -> None:
    pixels = read_image(photo).pixels
    expected = discoverer.discover(photo)
    forms = [str(photo), photo.read_bytes(), io.BytesIO(photo.read_bytes()), pixels, torch.from_numpy(pixels)]
    forms.append(torch.from_numpy(pixels).permute(2, 0, 1))
    forms += [entry for entry in os.scandir(photo.parent) if entry.name == photo.name]
    for found in (*map(discoverer.discover, forms), Study(discoverer, io.BytesIO(photo.read_bytes())).discover()):
        np.testing.assert_array_equal(found.xyxy, expected.xyxy)
        np.testing.assert_array_equal(found.plot(), expected.plot())  # the source can be read again
    many = [io.BytesIO(photo.read_bytes()), photo.read_bytes(), photo]
    assert len(list(discoverer.discover_many(many))) == 3


@pytest.mark.parametrize(
    "one", ["photo.jpg", Path("photo.jpg"), b"JPEG", np.zeros((9, 9, 3)), torch.zeros(3, 9, 9), None, 3]
)
def test_one_image_in_place_of_several_is_refused(discoverer: Discoverer, one: object) -> None:
    with pytest.raises(OptionError, match="expected several images, such as a list of paths, got one"):
        next(iter(discoverer.discover_many(one)))  # type: ignore[call-overload]
    with pytest.raises(OptionError, match="expected several images"):
        discoverer.outcomes(one)  # type: ignore[arg-type]


LOOKERS = (calibrate, learn, find_registers, attention_maps, measure)


@pytest.mark.parametrize("look", LOOKERS)
def test_what_looks_at_collections_says_what_it_expects(discoverer: Discoverer, look: Any) -> None:
    for one in ("photo.jpg", scene(0)):
        with pytest.raises(OptionError, match="expected several images"):
            look(one, discoverer)
    for swapped in ((discoverer, ["photo.jpg"]), ([scene(0)], "dinov2_vits14")):
        with pytest.raises(OptionError, match=r"expected images and then a Discoverer, not .* in its place"):
            look(*swapped)
    with pytest.raises(OptionError, match=r"expected a Discoverer and then an image, not 'photo.jpg'"):
        Study("photo.jpg", discoverer)  # type: ignore[arg-type]


@pytest.mark.parametrize("look", [calibrate, lambda *given: learn(*given).facts, lambda *given: measure(*given).cutoff])
def test_collections_may_be_any_iterable(discoverer: Discoverer, look: Any) -> None:
    assert look(scenes(4), discoverer) == look(iter(scenes(4)), discoverer)


@pytest.mark.parametrize("address", ["https://example.org/x.jpg", "s3://bucket/x.jpg", "file:///x.jpg"])
def test_addresses_are_told_the_way(discoverer: Discoverer, address: str) -> None:
    with pytest.raises(ImageError, match=f"{address}: expected an image, not an address: download it") as raised:
        discoverer.discover(address)
    assert not isinstance(raised.value, ImageUnavailableError)  # another try is in vain


def test_no_outcome_comes_before_the_first(discoverer: Discoverer) -> None:
    with pytest.raises(OptionError, match="skip must be an integer of at least 0, not -1"):
        discoverer.outcomes([], skip=-1)


@pytest.mark.parametrize("image", [None, 3, ["a.jpg"], object()])
def test_what_is_no_image_is_told_what_is_expected(discoverer: Discoverer, image: object) -> None:
    with pytest.raises(ImageError, match="expected an image: a path"):
        discoverer.discover(image)  # type: ignore[arg-type]


def test_discover_many_stops_at_a_broken_image_after_those_before(discoverer: Discoverer, tmp_path: Path) -> None:
    images = [*scenes(5), tmp_path / "none.jpg", *scenes(3)]
    found = discoverer.discover_many(images)
    assert [next(found).width for _ in range(5)] == [image.shape[1] for image in scenes(5)]
    with pytest.raises(ImageError, match=r"none\.jpg: no such file"):
        next(found)
    assert next(found, None) is None


def test_boxes_end_at_the_image_not_at_the_padding(discoverer: Discoverer) -> None:
    found = [discoverer.discover(scene(number)) for number in range(12)]
    for one in found:
        x1, y1, x2, y2 = one.xyxy[0]
        assert 0 <= x1 < x2 <= 150
        assert 0 <= y1 < y2 <= 110
        assert one.mask.shape == one.degrees.shape == (8, 11)  # 112 x 154 pixels
    assert any(one.xyxy[0, 2] == 150 for one in found)
    assert any(one.xyxy[0, 3] == 110 for one in found)


def test_boxes_are_whole_patches_away_from_the_edges(discoverer: Discoverer) -> None:
    for number in range(6):
        found = discoverer.discover(scene(number))
        rows, columns = np.nonzero(found.mask)
        box = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) * 14
        np.testing.assert_array_equal(found.xyxy[0], np.minimum(box, [150, 110, 150, 110]))
        assert found.mask[tuple(found.seeds[0])]


@pytest.mark.parametrize(("width", "height"), [(300, 220), (301, 219), (777, 95)])
def test_a_side_limit_maps_boxes_back_to_the_original(backbone: Backbone, width: int, height: int) -> None:
    limited = Discoverer(backbone, device="cpu", max_side=150)
    for number in range(4):
        original = scene(number, width, height)
        found = limited.discover(original)
        small = read_image(original, max_side=150).pixels
        scale = np.array([width / small.shape[1], height / small.shape[0]] * 2)
        np.testing.assert_allclose(found.xyxy[0], limited.discover(small).xyxy[0] * scale, rtol=1e-6)
        assert (found.width, found.height) == (width, height)
        assert (found.xyxy[0] <= [width, height] * 2).all()
        assert found.patch_width == pytest.approx(14 * scale[0])
        assert found.patch_height == pytest.approx(14 * scale[1])


@given(st.integers(1, 130), st.integers(1, 130), st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_extra_zero_padding_changes_nothing_but_where_the_image_ends(width: int, height: int, number: int) -> None:
    """Zeros after normalisation are the mean colour before it: 102 of 255 for a mean of 0.4."""
    if "padding" not in _cached:
        torch.manual_seed(0)
        small = build_backbone(find_spec("dinov2_vits14_reg"), depth=1)
        _cached["padding"] = Discoverer(dataclasses.replace(small, mean=(0.4,) * 3), device="cpu")
    discoverer = _cached["padding"]
    picture = scene(number, width, height)
    padded = np.full((-(-height // 14) * 14, -(-width // 14) * 14, 3), 102, dtype=np.uint8)
    padded[:height, :width] = picture
    first, second = discoverer.discover(picture), discoverer.discover(padded)
    np.testing.assert_array_equal(first.mask, second.mask)
    np.testing.assert_array_equal(first.degrees, second.degrees)
    np.testing.assert_array_equal(first.seeds, second.seeds)
    np.testing.assert_array_equal(first.xyxy[0], np.minimum(second.xyxy[0], [width, height] * 2))


@pytest.mark.parametrize(("width", "height"), [(1, 1), (14, 14), (15, 1), (3, 200)])
def test_tiny_images_have_a_box_inside_them(discoverer: Discoverer, width: int, height: int) -> None:
    found = discoverer.discover(scene(1, width, height))
    x1, y1, x2, y2 = found.xyxy[0]
    assert 0 <= x1 < x2 <= width
    assert 0 <= y1 < y2 <= height


def test_a_picture_of_one_colour_has_a_box(discoverer: Discoverer) -> None:
    found = discoverer.discover(np.full((60, 80, 3), 128, np.uint8))
    assert found.xyxy.shape == (1, 4)
    assert np.isfinite(found.xyxy).all()


def test_orientation_can_be_left_alone(backbone: Backbone, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x112] = 6
    path = tmp_path / "a.png"
    Image.fromarray(scene(2)).save(path, exif=exif)
    turned = Discoverer(backbone, device="cpu").discover(path)
    stored = Discoverer(backbone, device="cpu", exif=False).discover(path)
    assert (turned.width, turned.height) == (110, 150)
    assert (stored.width, stored.height) == (150, 110)


def test_the_pixel_limit_is_the_callers(backbone: Backbone, photo: Path) -> None:
    with pytest.raises(ImageError, match="more than the limit of 1,000"):
        Discoverer(backbone, device="cpu", max_pixels=1000).discover(photo)


def test_options_are_plain_values_that_say_what_was_chosen(backbone: Backbone) -> None:
    discoverer = Discoverer(
        backbone, device="cpu", feature="v", layer=-2, bias=-0.25, normalize=False, k_patches=7, max_side=99, exif=False
    )
    assert json.loads(json.dumps(discoverer.options.record())) == discoverer.options.record()
    assert discoverer.options.record() == {
        "backbone": "dinov2_vits14_reg",
        "weights": "random",
        "feature": "v",
        "layer": 0,
        "method": "lost",
        "objectness": None,
        "bias": -0.25,
        "auto_trials": None,
        "normalize": False,
        "k_patches": 7,
        "device": "cpu",
        "precision": "fp32",
        "batch_size": 8,
        "compile": False,
        "max_side": 99,
        "exif": False,
        "max_pixels": 200_000_000,
        "test_time_registers": None,
        "max_objects": 1,
        "min_score": None,
        "score": None,
        "refine": False,
        "box_from": "patches",
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feature": "z"}, "feature must be one of q, k, v, out, not 'z'"),
        ({"k_patches": 0}, "k_patches must be an integer of at least 1, not 0"),
        ({"max_objects": 0}, "max_objects must be an integer of at least 1, not 0"),
        ({"max_objects": 2.0}, "max_objects must be an integer of at least 1, not 2.0"),
        ({"min_score": 1.5}, r"min_score must be a number in \[0, 1\], not 1.5"),
        ({"min_score": float("nan")}, r"min_score must be a number in \[0, 1\], not nan"),
        ({"box_from": "seeds"}, "box_from must be one of patches, mask, not 'seeds'"),
        ({"box_from": "mask"}, "ask for refined masks, too"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, not 0"),
        ({"max_pixels": 0}, "max_pixels must be an integer of at least 1, not 0"),
        ({"batch_size": 2.5}, "batch_size must be an integer of at least 1, not 2.5"),
        ({"weights": "some.pth"}, "this one is loaded already"),
        ({"max_side": -1}, "max_side must be an integer of at least 1, not -1"),
        ({"bias": float("nan")}, "bias must be a finite number or 'auto', not nan"),
        ({"bias": float("inf")}, "bias must be a finite number or 'auto', not inf"),
        ({"bias": "automatic"}, "bias must be a finite number or 'auto', not 'automatic'"),
        ({"bias": True}, "bias must be a finite number or 'auto', not True"),
        ({"precision": "int8"}, "precision must be one of auto, fp32, bf16, fp16, not 'int8'"),
        ({"layer": 2}, r"layer must be in \[-2, 1\] for dinov2_vits14_reg, not 2"),
        ({"layer": -3}, r"layer must be in \[-2, 1\] for dinov2_vits14_reg, not -3"),
        ({"bias": "auto", "normalize": False}, "'auto' is defined on normalised features"),
        ({"device": "nonsense"}, "device must be auto, cpu, cuda, cuda:N or mps, not 'nonsense'"),
        ({"device": "meta"}, "PyTorch finds none here"),
        ({"device": 10**400}, "device must be auto, cpu, cuda, cuda:N or mps, not 1000"),
        ({"registers": "registers.json"}, "registers must be RegisterNeurons, such as a file's, not 'registers.json'"),
        ({"registers": 0}, "registers must be RegisterNeurons, such as a file's, not 0"),
    ],
    ids=str,
)
def test_options_out_of_range_say_what_is_in_it(backbone: Backbone, options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Discoverer(backbone, **{"device": "cpu", **options})


def test_a_backbone_is_a_name_or_one() -> None:
    with pytest.raises(OptionError, match=r"backbone must be a name, a Backbone, .* or a function, not None"):
        Discoverer(None)  # type: ignore[arg-type]


def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(OptionError, match="'cuda' was asked for, but PyTorch finds none here; try --device cpu"):
        resolve_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(OptionError, match="'cuda:2' was asked for, but there are 2 GPUs"):
        resolve_device("cuda:2")


def test_auto_prefers_cuda_then_mps_then_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("auto") == torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve_device("auto") == torch.device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu")


def test_an_unknown_backbone_suggests_near_ones() -> None:
    with pytest.raises(BackboneError, match="did you mean dinov2_vits14_reg"):
        Discoverer("dinov2_vits14_regs", device="cpu")


@pytest.mark.parametrize("name", BACKBONES)
def test_defaults_come_from_the_row(backbone: Backbone, name: str) -> None:
    """Options alone are looked at: the small model stands in for the row's own."""
    options = Discoverer(dataclasses.replace(backbone, spec=BACKBONES[name]), device="cpu").options
    is_dino = name.startswith("dino_")
    assert options.feature == BACKBONES[name].feature
    assert (options.bias, options.normalize) == ((0.0, False) if is_dino else ("auto", True))


def test_what_is_given_wins_over_the_row(backbone: Backbone) -> None:
    dino = dataclasses.replace(backbone, spec=BACKBONES["dino_vits16"])
    options = Discoverer(dino, device="cpu", feature="q", bias="auto").options
    assert (options.feature, options.bias, options.normalize) == ("q", "auto", True)
    options = Discoverer(backbone, device="cpu", bias=-0.1).options
    assert (options.bias, options.normalize) == (-0.1, True)
    assert Discoverer(backbone, device="cpu", bias=-0.1, normalize=False).options.normalize is False


def test_another_precision_leaves_a_shared_backbone_alone(backbone: Backbone) -> None:
    before = {name: value.clone() for name, value in backbone.model.state_dict().items()}
    full = Discoverer(backbone, device="cpu")
    half = Discoverer(backbone, device="cpu", precision="bf16")
    assert full.backbone is backbone
    assert half.backbone.dtype == torch.bfloat16
    assert half.discover(scene(1)).xyxy.shape == (1, 4)
    assert full.backbone.dtype == torch.float32
    assert all(torch.equal(value, before[name]) for name, value in backbone.model.state_dict().items())


@pytest.mark.parametrize(
    ("capabilities", "precision"),
    [
        ({"architecture": "x86_64", "avx512_bf16": True}, "bf16"),
        ({"architecture": "x86_64", "amx_bf16": True}, "bf16"),
        ({"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": False}, "fp32"),
        ({"architecture": "arm64", "bf16": True}, "fp32"),
        (None, "fp32"),  # before PyTorch said it
    ],
    ids=str,
)
def test_automatic_precision_is_bf16_where_the_processor_is_quick_at_it(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, object] | None, precision: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    if capabilities is None:
        monkeypatch.delattr(torch.cpu, "get_capabilities")
    with warnings.catch_warnings(action="error"):
        discoverer = Discoverer(backbone, device="cpu", precision="auto")
    assert discoverer.options.record()["precision"] == precision
    assert discoverer.backbone.dtype == {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    assert Discoverer(backbone, device="cpu").options.precision == "fp32"
    slow = capabilities is not None and capabilities["architecture"] == "x86_64" and precision == "fp32"
    with pytest.warns(LostregWarning, match="no instructions for bf16") if slow else nullcontext():
        assert Discoverer(backbone, device="cpu", precision="bf16").options.precision == "bf16"


def test_gpus_are_quick_at_bf16_from_ampere_on(monkeypatch: pytest.MonkeyPatch) -> None:
    capabilities = {"cuda:0": (7, 5), "cuda:1": (8, 0), "cuda:2": (12, 0)}
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[str(device)])
    assert [_has_quick_bf16(torch.device(name)) for name in capabilities] == [False, True, True]
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: not including_emulation)
    assert _has_quick_bf16(torch.device("cuda:0")) is True
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    assert _has_quick_bf16(torch.device("cuda:0")) is False
    assert _has_quick_bf16(torch.device("mps")) is None


def test_a_gpu_takes_more_images_at_once(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Discoverer(backbone, device="cpu").options.batch_size == 8
    monkeypatch.setattr(Backbone, "device", torch.device("cuda"))
    assert Options().resolved(backbone).batch_size == 64
    assert Options(batch_size=5).resolved(backbone).batch_size == 5


def test_a_discovery_knows_the_file_it_was_made_in(discoverer: Discoverer, tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.png" for number in range(7)]
    for number, path in enumerate(paths):
        Image.fromarray(scene(number)).save(path)
    assert [one.source for one in discoverer.discover_many(iter(paths))] == paths
    assert [one.source for one in discoverer.outcomes(paths, skip=5)] == paths[5:]
    pixels = scene(2)
    assert discoverer.discover(pixels).source is pixels
    assert [one.source for one in discoverer.discover_many([pixels])] == [None]  # which would keep it in memory


def test_a_bar_is_shown_on_request_and_changes_nothing(
    discoverer: Discoverer, capsys: pytest.CaptureFixture[str]
) -> None:
    images = scenes(3)
    expected = list(discoverer.discover_many(images))
    assert capsys.readouterr().err == ""
    shown = list(discoverer.discover_many(images, progress=True))
    assert "3/3" in capsys.readouterr().err
    assert all(same(one, other) for one, other in zip(shown, expected, strict=True))
    list(discoverer.discover_many(iter(images), progress=True))
    assert "3img" in capsys.readouterr().err


def test_several_objects_come_in_pixels_and_the_first_is_that_of_a_search_for_one(backbone: Backbone) -> None:
    one = Discoverer(backbone, device="cpu")
    several = Discoverer(backbone, device="cpu", max_objects=4, min_score=0.0)
    counts = set()
    for first, more in zip(one.discover_many(scenes(8)), several.discover_many(scenes(8)), strict=True):
        counts.add(len(more))
        for name in ("xyxy", "scores", "seeds", "biases", "masks"):
            np.testing.assert_array_equal(getattr(more, name)[:1], getattr(first, name))
        np.testing.assert_array_equal(more.degrees, first.degrees)
        for index, box in enumerate(more.xyxy):
            rows, columns = np.nonzero(more.pixel_mask(index))
            assert [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] == box.tolist()
    assert max(counts) > 1


def test_boxes_may_be_those_of_the_refined_masks(backbone: Backbone) -> None:
    patches = Discoverer(backbone, device="cpu", refine=True)
    refined = Discoverer(backbone, device="cpu", refine=True, box_from="mask")
    moved = 0
    for first, second in zip(patches.discover_many(scenes(8)), refined.discover_many(scenes(8)), strict=True):
        np.testing.assert_array_equal(first.refined, second.refined)
        rows, columns = np.nonzero(second.pixel_mask())
        assert second.xyxy.tolist() == [[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]]
        moved += first.xyxy.tolist() != second.xyxy.tolist()
    assert moved


def test_a_named_backbone_is_loaded_on_the_host_and_placed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of gigabytes: there is no second copy of it, and in bf16 the device never holds it in fp32."""
    loaded: list[Backbone] = []
    given: dict[str, Any] = {}

    def load(name: str, **options: Any) -> Backbone:
        given.update(options)
        loaded.append(build_backbone(find_spec(name), depth=1))
        return loaded[0]

    placed: list[tuple[Any, ...]] = []
    monkeypatch.setattr("lostreg.inference.discoverer.load_backbone", load)
    monkeypatch.setattr("lostreg.inference.discoverer.resolve_device", lambda device: torch.device("meta"))
    monkeypatch.setattr("lostreg.inference.discoverer.place_model", lambda *given: placed.append(given))
    discoverer = Discoverer("dinov2_vits14", device="cuda", precision="bf16")
    assert discoverer.backbone.model is loaded[0].model
    assert placed == [(loaded[0].model, torch.device("meta"), torch.bfloat16)]
    assert given.get("device", "cpu") == "cpu"
    assert given.get("dtype", torch.float32) == torch.float32


def _minus_mean(features: torch.Tensor) -> float:
    """What makes similarities have a mean of about zero."""
    assert torch.allclose(features.norm(dim=1), torch.ones(len(features)))
    return -float(features.mean(dim=0).square().sum())


@pytest.mark.parametrize("method", ["lost", "parts"])
def test_a_function_is_the_bias_of_each_image_and_results_record_its_name(backbone: Backbone, method: str) -> None:
    told: list[float] = []
    discoverer = Discoverer(backbone, bias=lambda one: told.append(_minus_mean(one)) or told[-1], method=method)
    named = Discoverer(backbone, bias=_minus_mean, method=method, device="cpu")
    for image in (scene(1), scene(3)):
        found = discoverer.discover(image)
        fixed = Discoverer(backbone, bias=told[-1], normalize=True, method=method, device="cpu")
        assert same(found, fixed.discover(image))
        assert same(found, pickle.loads(pickle.dumps(named)).discover(image))
        study = Study(Discoverer(backbone, device="cpu", normalize=False, bias=0.0), image)
        assert same(found, study.discover(bias=_minus_mean, method=method))
    assert len(set(told)) == 2
    record = json.loads(json.dumps(named.options.record()))
    assert record["bias"].endswith("._minus_mean")
    assert record["normalize"] is True


def _smallest(features: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """The smaller, the better; it checks what it is given."""
    assert torch.allclose(features.norm(dim=1), torch.ones(len(features)))
    assert masks.dtype == torch.bool
    assert masks.shape[1] * masks.shape[2] == len(features)
    return 1 - masks.float().mean(dim=(1, 2))


@pytest.mark.parametrize("method", METHODS)
def test_a_function_is_the_score_of_each_method(backbone: Backbone, method: str) -> None:
    options = {"device": "cpu", "method": method, "bias": None if method in PUBLISHED_METHODS else "auto"}
    own = Discoverer(backbone, score=_smallest, max_objects=3, min_score=0.0, **options)
    for image in (scene(1), scene(3)):
        found = own.discover(image)
        sizes = found.masks.mean(axis=(1, 2), dtype=np.float64)
        assert found.scores[0] == pytest.approx(1 - sizes[0], abs=1e-6)
        if method in PUBLISHED_METHODS:
            assert (found.masks[0] == Discoverer(backbone, **options).discover(image).masks[0]).all()
        assert same(found, pickle.loads(pickle.dumps(own)).discover(image))
        study = Study(Discoverer(backbone, **options, max_objects=3, min_score=0.0), image)
        assert same(found, study.discover(score=_smallest))
        assert not same(found, study.discover())
    record = json.loads(json.dumps(own.options.record()))
    assert record["score"].endswith("._smallest")
    assert Discoverer(backbone, **options).options.record()["score"] is None


def test_a_function_ranks_lost_and_parts_alone(backbone: Backbone) -> None:
    for image in (scene(number) for number in range(4)):
        lost, parts = (
            Discoverer(backbone, device="cpu", bias="auto", method=method, score=_smallest).discover(image)
            for method in ("lost", "parts")
        )
        assert parts.mask.sum() <= lost.mask.sum()  # LOST's trials are among the candidates
        assert parts.candidates is not None
        assert parts.candidates[:, 4].max() == parts.scores[0]


def test_the_score_of_ones_own_that_is_ours_changes_nothing(backbone: Backbone) -> None:
    def ours(features: torch.Tensor, masks: torch.Tensor) -> np.ndarray:
        return object_scores(features[None], masks[None].numpy())[0]

    for method in ("lost", *PUBLISHED_METHODS):
        options = {"device": "cpu", "method": method, "max_objects": 3, "min_score": 0.1}
        plain, own = Discoverer(backbone, **options), Discoverer(backbone, score=ours, **options)
        assert all(same(plain.discover(image), own.discover(image)) for image in (scene(1), scene(3)))


def test_masks_of_which_earlier_objects_left_nothing_are_not_asked_for(backbone: Backbone) -> None:
    def filled(features: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        assert features.ndim == 2
        assert masks.flatten(1).any(dim=1).all()
        return 1 - masks.float().mean(dim=(1, 2)) / 2

    options = {"device": "cpu", "method": "maskcut", "max_objects": 4, "min_score": 0.0}
    discoverer = Discoverer(backbone, score=filled, **options)
    for number in range(6):
        assert discoverer.discover(scene(number)).masks.any(axis=(1, 2)).all()


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (torch.zeros(6, dtype=torch.complex64), "not Tensor"),
        (None, "not NoneType"),
        ("0.5", "not str"),
        (0.5, r"not shape \(\)"),
        (torch.zeros(2, 2), r"not shape \(2, 2\)"),
        ([0.5] * 6 + [0.5], r"not shape \(7,\)"),
        ([0.5] * 5 + [float("nan")], "not nan"),
        ([0.5] * 5 + [1.5], "not 1.5"),
    ],
)
def test_a_score_function_has_to_give_a_share_for_each_mask(backbone: Backbone, answer: Any, told: str) -> None:
    with pytest.raises(OptionError, match=rf"score .*<lambda> must give 6 numbers in \[0, 1\], one a mask, {told}"):
        Discoverer(backbone, bias="auto", score=lambda _, __: answer, device="cpu").discover(scene(0))


def test_what_is_no_function_is_no_score(backbone: Backbone) -> None:
    with pytest.raises(OptionError, match=r"score must be a function of features and masks, not 0\.5"):
        Discoverer(backbone, score=0.5)


@pytest.mark.parametrize("answer", ["0.5", float("nan"), None, torch.zeros(2), 1e39])
def test_a_bias_function_has_to_give_a_number(backbone: Backbone, answer: Any) -> None:
    with pytest.raises(OptionError, match=r"the bias that .*<lambda> gives must be"):
        Discoverer(backbone, bias=lambda _: answer, device="cpu").discover(scene(0))
