"""One bias for a collection: against brute force over images, on rungs made by hand, and what its file may hold."""

import copy
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import same, scene, scenes
from PIL import Image

import lostreg
from lostreg.errors import CalibrationError, LostregError, OptionError
from lostreg.images.boxes import pairwise_iou
from lostreg.images.decode import Picture, read_image
from lostreg.inference.calibrate import _choose, _Rungs, calibrate
from lostreg.inference.calibration import FORMAT, Calibration
from lostreg.inference.discoverer import Discoverer
from lostreg.methods.lost import lost_boxes
from lostreg.models.backbone import Backbone
from lostreg.models.features import patch_features
from lostreg.progress import Progress

STEPS = [0.5 - 0.125 * step for step in range(25)]  # of the ladder, in deviations
SIZES = [(98, 70), (70, 112), (140, 84), (84, 84), (112, 98)]  # width, height: whole patches

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def discoverer(backbone: Backbone) -> Discoverer:
    return Discoverer(backbone, device="cpu", batch_size=3)


@pytest.fixture
def pictures() -> list[np.ndarray]:
    return [scene(number, *SIZES[number % len(SIZES)]) for number in range(24)]


def calibration(**changes: Any) -> Calibration:
    fields = {
        "bias": -0.25,
        "interval": (-0.5, -0.125),
        "connectivity": 0.6,
        "agreement": 0.75,
        "mean": 0.4,
        "deviation": 0.5,
        "images": 24,
        "unreadable": 1,
        "seed": 0,
        "backbone": "dinov2_vits14_reg",
        "weights": "random",
        "feature": "k",
        "layer": 1,
        "k_patches": 100,
    }
    return Calibration(**{**fields, **changes})


class OneImage:
    """What every rung of the ladder makes of an image, one plain call of LOST for each."""

    def __init__(self, backbone: Backbone, picture: np.ndarray, feature: Any) -> None:
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (backbone.mean, backbone.std))
        pixels = (torch.from_numpy(picture).permute(2, 0, 1) / 255 - mean) / std
        self.features = patch_features(backbone, pixels[None], feature, -1)
        self.grid = (picture.shape[0] // 14, picture.shape[1] // 14)
        rows = self.features[0].double().numpy()
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        self.cosines = (rows @ rows.T)[~np.eye(len(rows), dtype=bool)]
        self.automatic = lost_boxes(self.features, self.grid, "auto").xyxy.numpy()
        self.biases = [-(self.cosines.mean() + step * self.cosines.std()) for step in STEPS]
        self.verdicts = [self.agrees_at(bias) for bias in self.biases]

    def agrees_at(self, bias: float) -> bool:
        found = lost_boxes(self.features, self.grid, bias, normalize=True)
        return bool(pairwise_iou(found.xyxy.numpy(), self.automatic)[0, 0] >= 0.5)

    def nearest_verdict(self, bias: float) -> bool:
        return self.verdicts[int(np.abs(np.array(self.biases) - bias).argmin())]

    def verdicts_around(self, bias: float) -> set[bool]:
        """Of the two rungs that the bias lies between, or of the one where it is outside of them all."""
        above = int(np.searchsorted(self.biases, bias))
        return set(self.verdicts[max(0, above - 1) : above + 1])


@pytest.mark.parametrize("feature", ["q", "k", "v", "out"])
def test_the_bias_agrees_with_auto_as_often_as_brute_force_says_and_none_does_more_often(
    backbone: Backbone, pictures: list[np.ndarray], feature: Any
) -> None:
    found = calibrate(pictures, Discoverer(backbone, device="cpu", feature=feature))
    images = [OneImage(backbone, picture, feature) for picture in pictures]

    def agreement(bias: float) -> float:
        return float(np.mean([image.nearest_verdict(bias) for image in images]))

    assert found.agreement == pytest.approx(agreement(found.bias), abs=1e-4)
    biases = [bias for image in images for bias in image.biases]
    shares = [agreement(bias) for bias in np.linspace(min(biases), max(biases), 400)]
    assert max(shares) == pytest.approx(found.agreement, abs=1e-4)
    assert min(shares) < 0.2 < 0.5 < found.agreement < 1  # a choice that could have been a bad one
    # The ladder stands in for the bias itself: an image may count otherwise where the rungs on both sides disagree.
    unsure = np.mean([len(image.verdicts_around(found.bias)) > 1 for image in images])
    actual = np.mean([image.agrees_at(found.bias) for image in images])
    assert abs(found.agreement - actual) <= min(unsure, 0.1) + 1e-4
    connected = np.mean([(image.cosines + found.bias > 0).mean() for image in images])
    assert found.connectivity == pytest.approx(connected, abs=0.01)  # in a straight line between two rungs
    assert found.mean == pytest.approx(np.mean([image.cosines.mean() for image in images]), abs=1e-4)
    assert found.deviation == pytest.approx(np.mean([image.cosines.std() for image in images]), abs=1e-4)


def test_what_it_was_found_on_is_told(backbone: Backbone, tmp_path: Path) -> None:
    discoverer = Discoverer(backbone, device="cpu", feature="v", layer=-2, k_patches=9)
    found = calibrate([*scenes(5), tmp_path / "none.jpg"], discoverer, seed=7)
    assert (found.images, found.unreadable, found.seed) == (5, 1, 7)
    assert (found.backbone, found.weights) == ("dinov2_vits14_reg", "random")
    assert (found.feature, found.layer, found.k_patches) == ("v", 0, 9)
    low, high = found.interval
    assert -1 <= low <= high <= 1
    assert lostreg.calibrate is calibrate
    assert lostreg.Calibration is Calibration


@pytest.mark.parametrize("batch_size", [1, 5, 8, 24])
def test_the_batch_size_changes_nothing(backbone: Backbone, discoverer: Discoverer, batch_size: int) -> None:
    expected = calibrate(scenes(24), discoverer)
    assert calibrate(scenes(24), Discoverer(backbone, device="cpu", batch_size=batch_size)) == expected


def test_the_discoverers_own_bias_plays_no_part(backbone: Backbone, discoverer: Discoverer) -> None:
    expected = calibrate(scenes(8), discoverer)
    for options in ({"bias": -0.3}, {"bias": 0.0, "normalize": False}, {"bias": calibration()}):
        assert calibrate(scenes(8), Discoverer(backbone, device="cpu", **options)) == expected
    assert calibrate(scenes(8), Discoverer(backbone, device="cpu", k_patches=3)).bias != expected.bias


def test_files_arrays_and_pil_images_are_the_same_to_it(discoverer: Discoverer, tmp_path: Path) -> None:
    images = scenes(6)
    files = []
    for number, image in enumerate(images):
        files.append(tmp_path / f"{number}.png")
        Image.fromarray(image).save(files[-1])
    expected = calibrate(images, discoverer)
    assert calibrate(files, discoverer) == expected
    assert calibrate([str(file) for file in files], discoverer) == expected
    assert calibrate(tuple(Image.fromarray(image) for image in images), discoverer) == expected


def test_images_are_read_as_the_discoverer_reads_them(backbone: Backbone) -> None:
    large = [scene(number, 300, 220) for number in range(6)]
    small = [read_image(image, max_side=100).pixels for image in large]
    limited = Discoverer(backbone, device="cpu", max_side=100)
    assert calibrate(large, limited) == calibrate(small, limited)
    assert calibrate(large, limited) != calibrate(large, Discoverer(backbone, device="cpu"))


def test_scaling_the_models_keys_changes_nothing(backbone: Backbone) -> None:
    scaled = dataclasses.replace(backbone, model=copy.deepcopy(backbone.model))
    attention = scaled.model.blocks[-1].attn  # type: ignore[index]
    width = attention.qkv.weight.shape[0] // 3
    for tensor in (attention.qkv.weight, attention.qkv.bias):
        tensor[width : 2 * width] *= 1024  # rounds nothing
    picture = torch.randn(1, 3, 28, 28)
    assert torch.equal(patch_features(scaled, picture, "k"), 1024 * patch_features(backbone, picture, "k"))
    expected = calibrate(scenes(12), Discoverer(backbone, device="cpu", feature="k"))
    assert calibrate(scenes(12), Discoverer(scaled, device="cpu", feature="k")) == expected


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The widths of the pictures that were read."""
    widths: list[int] = []

    def record(image: np.ndarray, **options: object) -> Picture:
        widths.append(image.shape[1])
        return read_image(image, **options)

    monkeypatch.setattr("lostreg.inference.stream.read_image", record)
    return widths


def numbered(count: int) -> list[np.ndarray]:
    """Pictures that their widths tell apart."""
    return [scene(number, 30 + number, 40) for number in range(count)]


def test_a_sample_is_a_part_of_the_list_in_its_order_and_nothing_else_is_read(
    discoverer: Discoverer, read: list[int]
) -> None:
    told: list[Progress] = []
    found = calibrate(numbered(40), discoverer, sample=15, on_progress=told.append)
    assert told == [Progress(done, 15) for done in range(1, 16)]
    assert (found.images, len(set(read))) == (15, 15)
    assert sorted(read) != list(range(30, 45))
    assert max(read) > 60  # not only from the beginning
    chosen = [image for image in numbered(40) if image.shape[1] in read]
    assert calibrate(chosen, discoverer) == found


def test_a_sample_depends_on_its_seed_alone(discoverer: Discoverer, read: list[int]) -> None:
    samples = []
    for seed in (0, 0, 1, 2):
        read.clear()
        np.random.seed(len(samples))  # noqa: NPY002 - no one else's state plays a part
        torch.manual_seed(len(samples))
        calibrate(numbered(40), discoverer, sample=15, seed=seed)
        samples.append(tuple(sorted(read)))
    assert samples[0] == samples[1]
    assert len(set(samples)) == 3


@pytest.mark.parametrize("sample", [9, 10, 512])
def test_a_sample_of_no_fewer_than_there_are_is_all_of_them(
    discoverer: Discoverer, read: list[int], sample: int
) -> None:
    assert calibrate(numbered(9), discoverer, sample=sample).images == 9
    assert sorted(read) == list(range(30, 39))


def test_at_most_512_images_are_looked_at_unless_more_are_asked_for(discoverer: Discoverer, read: list[int]) -> None:
    dots = [np.full((14, 14, 3), number % 256, np.uint8) for number in range(520)]
    assert calibrate(dots, discoverer).images == len(read) == 512


def test_a_seed_below_zero_is_refused(discoverer: Discoverer) -> None:
    with pytest.raises(OptionError, match="seed"):
        calibrate(scenes(3), discoverer, seed=-1)


def test_an_unreadable_image_is_told_counted_and_otherwise_left_out(discoverer: Discoverer, tmp_path: Path) -> None:
    text = tmp_path / "text.jpg"
    text.write_text("not a picture")
    images: list[Any] = [*scenes(4), text, *scenes(7)[4:], tmp_path / "none.jpg"]
    told: list[Progress] = []
    found = calibrate(images, discoverer, on_progress=told.append)
    assert [(progress.done, progress.total) for progress in told] == [(done, 9) for done in range(1, 10)]
    assert [progress.done for progress in told if progress.error is not None] == [5, 9]
    assert f"{text}: not a readable image" in str(told[4].error)
    assert "none.jpg" in str(told[8].error)
    assert (found.images, found.unreadable) == (7, 2)
    assert dataclasses.replace(found, unreadable=0) == calibrate(scenes(7), discoverer)


def test_images_of_which_none_can_be_read_are_no_calibration(discoverer: Discoverer, tmp_path: Path) -> None:
    missing = [tmp_path / f"{number}.jpg" for number in range(5)]
    with pytest.raises(CalibrationError, match="none of 5 images could be read"):
        calibrate(missing, discoverer)


@pytest.mark.parametrize(
    ("count", "sample", "message"),
    [(0, 512, "at least one image"), (3, 0, "sample must be an integer of at least 1, not 0"), (3, -1, "not -1")],
)
def test_nothing_to_look_at_is_refused(discoverer: Discoverer, count: int, sample: int, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        calibrate(scenes(count), discoverer, sample=sample)


@pytest.mark.parametrize(
    "images",
    [
        [scene(1)],
        [scene(1, 1, 1)],
        [scene(1, 14, 14), scene(2, 3, 14)],
        [np.full((60, 80, 3), 128, np.uint8)] * 2,
        [scene(1, 28, 14), scene(2, 300, 14), scene(3, 14, 300)],
    ],
    ids=["one", "one pixel", "one patch", "one colour", "strips"],
)
def test_odd_images_have_a_bias_too(discoverer: Discoverer, images: list[np.ndarray], tmp_path: Path) -> None:
    found = calibrate(images, discoverer)
    low, high = found.interval
    assert -1 <= low <= found.bias <= high <= 1
    assert 0 <= found.connectivity <= 1
    assert 0 <= found.agreement <= 1
    assert found.deviation >= 0
    found.save(tmp_path / "bias.json")
    assert Calibration.load(tmp_path / "bias.json") == found
    for image in images:
        assert Discoverer(discoverer.backbone, device="cpu", bias=found).discover(image).xyxy.shape == (1, 4)


def rungs(window: tuple[float, float], biases: Sequence[float] = tuple(np.linspace(-1, 1, 81))) -> _Rungs:
    """An image that has the box of auto between two biases."""
    values = np.array(biases)
    low, high = window
    inside = (values > low - 1e-6) & (values < high + 1e-6)
    return _Rungs(values, inside, (values + 1) / 2)


def test_the_middle_of_the_biases_that_all_images_agree_on_is_chosen() -> None:
    found = _choose([rungs((-0.8, -0.2)), rungs((-0.4, 0.6)), rungs((-1, 0))], 0)
    assert found["bias"] == pytest.approx(-0.3, abs=0.01)
    assert found["agreement"] == 1.0
    assert found["interval"] != (found["bias"], found["bias"])  # other resamples agree on more
    assert found["connectivity"] == pytest.approx(0.35, abs=0.005)
    assert found["mean"] == pytest.approx(0.9)  # the fifth rung of 81 stands for the mean


def test_the_larger_part_of_the_images_decides() -> None:
    parts = [rungs((-0.8, -0.6))] * 3 + [rungs((0.2, 0.4))] * 2
    found = _choose(parts, 0)
    assert found["bias"] == pytest.approx(-0.7, abs=0.01)
    assert found["agreement"] == 0.6
    low, high = found["interval"]  # of five images, the other two may well be the larger part
    assert (low, high) == (pytest.approx(-0.7, abs=0.01), pytest.approx(0.3, abs=0.01))
    low, high = _choose(parts * 100, 0)["interval"]
    assert (low, high) == (found["bias"], found["bias"])


def test_of_two_equal_parts_one_is_chosen_and_nothing_between_them() -> None:
    found = _choose([rungs((-0.8, -0.6)), rungs((0.2, 0.4))], 0)
    assert found["agreement"] == 0.5
    assert -0.82 < found["bias"] < -0.58 or 0.18 < found["bias"] < 0.42


def test_images_have_ladders_of_their_own() -> None:
    """Of each the nearest rung speaks: the first of these has one at -0.9 and one at -0.1."""
    wide = rungs((-0.2, 0.0), biases=(-0.9, -0.1, *np.linspace(0, 0.9, 23)))
    fine = rungs((-1.0, -0.2), biases=np.linspace(-1, 0, 25))
    found = _choose([wide, fine], 0)
    assert found["agreement"] == 1.0
    assert found["bias"] == pytest.approx((-0.5 - 0.2) / 2, abs=0.02)


def test_resamples_depend_on_the_seed_alone() -> None:
    generator = np.random.default_rng(0)
    images = [rungs((low, low + 0.4)) for low in generator.uniform(-1, 0.5, size=12)]
    first, again, other = _choose(images, 0), _choose(images, 0), _choose(images, 1)
    assert first == again
    assert {key: value for key, value in other.items() if key != "interval"} == {
        key: value for key, value in first.items() if key != "interval"
    }


def test_a_discoverer_takes_a_calibration_for_its_bias(backbone: Backbone) -> None:
    found = calibration()
    with_it = Discoverer(backbone, device="cpu", bias=found)
    with_number = Discoverer(backbone, device="cpu", bias=found.bias, normalize=True)
    assert (with_it.options.bias, with_it.options.normalize) == (-0.25, True)
    assert with_it.options == with_number.options
    assert json.loads(json.dumps(with_it.options.record())) == with_it.options.record()
    outcomes = list(zip(with_it.discover_many(scenes(8)), with_number.discover_many(scenes(8)), strict=True))
    assert all(same(first, second) for first, second in outcomes)
    assert {first.bias for first, _ in outcomes} == {-0.25}


def test_features_are_normalised_for_a_calibration_whatever_the_row_says(backbone: Backbone) -> None:
    plain = dataclasses.replace(backbone, spec=dataclasses.replace(backbone.spec, bias=0.0, normalize=False))
    assert Discoverer(plain, device="cpu").options.normalize is False
    with_it = Discoverer(plain, device="cpu", bias=calibration())
    assert with_it.options.normalize is True
    expected = Discoverer(backbone, device="cpu", bias=-0.25, normalize=True)
    assert same(with_it.discover(scene(3)), expected.discover(scene(3)))
    of_plain, of_other = (calibrate(scenes(6), Discoverer(one, device="cpu")) for one in (plain, backbone))
    assert of_plain == of_other


def test_a_calibration_of_something_else_is_refused(backbone: Backbone) -> None:
    for changes, message in (
        (
            {"feature": "v"},
            "calibrated for v of layer 1 of dinov2_vits14_reg, not for k of layer 1 of dinov2_vits14_reg",
        ),
        ({"layer": 0}, "calibrated for k of layer 0 of dinov2_vits14_reg, not for k of layer 1 of dinov2_vits14_reg"),
        ({"backbone": "dino_vits16"}, "for k of layer 1 of dino_vits16, not for k of layer 1 of dinov2_vits14_reg"),
        ({"weights": "file a.pth"}, "calibrated on the weights file a.pth, not on random"),
    ):
        with pytest.raises(OptionError, match=message):
            Discoverer(backbone, device="cpu", bias=calibration(**changes))
        with pytest.raises(OptionError, match=message):
            calibration(**changes).require("dinov2_vits14_reg", "random", "k", 1)
    found = calibration(feature="v", layer=0)
    assert Discoverer(backbone, device="cpu", feature="v", layer=-2, bias=found).options.bias == -0.25


def test_a_calibration_without_normalisation_is_refused(backbone: Backbone) -> None:
    with pytest.raises(OptionError, match="normalised features"):
        Discoverer(backbone, device="cpu", bias=calibration(), normalize=False)
    assert Discoverer(backbone, device="cpu", bias=calibration(), normalize=True).options.normalize


def test_a_file_holds_all_of_it_and_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "ünïcode.json"
    found = calibration(backbone="timm:vit_ß", bias=-0.1234)
    found.save(path)
    assert Calibration.load(path) == Calibration.load(str(path)) == found
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content.pop("format") == FORMAT
    assert content == {**dataclasses.asdict(found), "interval": [-0.5, -0.125]}
    found.save(str(path))  # over the earlier one
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_calibrated_file_gives_the_boxes_of_its_bias(
    backbone: Backbone, discoverer: Discoverer, tmp_path: Path
) -> None:
    found = calibrate(scenes(10), discoverer)
    found.save(tmp_path / "bias.json")
    loaded = Calibration.load(tmp_path / "bias.json")
    assert loaded == found
    first = Discoverer(backbone, device="cpu", bias=loaded).discover(scene(3))
    assert same(first, Discoverer(backbone, device="cpu", bias=found.bias).discover(scene(3)))


def test_a_file_that_cannot_be_written_is_said_plainly(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "bias.json", tmp_path / "folder"):
        with pytest.raises(CalibrationError, match=f"cannot write {path}: "):
            calibration().save(path)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_file_that_cannot_be_read_is_said_plainly(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"cannot read the bias file .*none\.json: No such file"):
        Calibration.load(tmp_path / "none.json")
    with pytest.raises(CalibrationError, match=r"cannot read the bias file .*: Is a directory"):
        Calibration.load(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"-0.5",
        b"not JSON",
        b"\xff\xd8\xff\xe0 a picture",
        b"[]",
        b"{}",
        b'{"bias": -0.5}',
        b'{"format": "lostreg bias 2", "bias": -0.5}',
        b'{"format": null}',
        b"[" * 100_000,
    ],
    ids=["empty", "number", "text", "picture", "list", "object", "no format", "other format", "null", "nested"],
)
def test_a_file_of_something_else_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bias.json"
    path.write_bytes(content)
    with pytest.raises(CalibrationError, match=r"bias\.json is no file of `lostreg calibrate`: "):
        Calibration.load(path)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bias": "auto"}, "bias is 'auto'"),
        ({"bias": None}, "bias is None"),
        ({"bias": True}, "bias is True"),
        ({"bias": float("nan")}, "bias is nan"),
        ({"bias": float("inf")}, "bias is inf"),
        ({"bias": 10**400}, "bias is 1000"),
        ({"interval": [-0.5]}, r"interval is \[-0\.5\]"),
        ({"interval": [-0.5, "x"]}, "interval is"),
        ({"interval": -0.5}, r"interval is -0\.5"),
        ({"images": 2.5}, r"images is 2\.5"),
        ({"images": True}, "images is True"),
        ({"feature": 7}, "feature is 7"),
        ({"layer": "11"}, "layer is '11'"),
        ({"weights": None}, "weights is None"),
        ({"surprise": 1}, "surprise"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_field_of_the_wrong_kind_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "bias.json"
    path.write_text(json.dumps({"format": FORMAT, **dataclasses.asdict(calibration()), **changes}))
    with pytest.raises(CalibrationError, match=f"is no file of `lostreg calibrate`: .*{message}"):
        Calibration.load(path)


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Calibration)])
def test_a_missing_field_is_named(tmp_path: Path, name: str) -> None:
    fields = dataclasses.asdict(calibration())
    del fields[name]
    path = tmp_path / "bias.json"
    path.write_text(json.dumps({"format": FORMAT, **fields}))
    with pytest.raises(CalibrationError, match=f"is no file of `lostreg calibrate`: .*'{name}'"):
        Calibration.load(path)


def test_whole_numbers_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "bias.json"
    path.write_text(json.dumps({"format": FORMAT, **dataclasses.asdict(calibration(bias=0, interval=[-1, 0]))}))
    loaded = Calibration.load(path)
    assert (loaded.bias, loaded.interval) == (0, (-1, 0))


def test_its_errors_are_what_a_user_can_mend() -> None:
    assert issubclass(CalibrationError, LostregError)
