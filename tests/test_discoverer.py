import dataclasses
import itertools
import json
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import disc_picture
from fabricate import png_header
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from lostreg.backbone_table import BACKBONES
from lostreg.backbones import Backbone, build_backbone, find_spec
from lostreg.discoverer import Discoverer, resolve_device
from lostreg.engine import Engine
from lostreg.errors import BackboneError, ImageError, LostregWarning, OptionError
from lostreg.images import PatchedPicture, Picture, read_image
from lostreg.memory import required_bytes
from lostreg.regions import Discovery

_cached: dict[str, Discoverer] = {}
SHAPES = [(150, 110), (90, 120), (98, 70), (150, 112), (60, 60)]  # width, height: two share a grid of 8 x 11


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def discoverer(backbone: Backbone) -> Discoverer:
    return Discoverer(backbone, device="cpu", batch_size=2)


def scene(number: int, width: int = 150, height: int = 110) -> np.ndarray:
    """A picture whose disc lies elsewhere for each number: with the random backbone their boxes differ."""
    return np.roll(disc_picture(width, height), (number * 53, number * 37), axis=(0, 1))


def scenes(count: int) -> list[np.ndarray]:
    return [scene(number, *SHAPES[number * 7 % len(SHAPES)]) for number in range(count)]


def same(first: Discovery, second: Discovery) -> bool:
    """Whether two discoveries are equal to the bit."""
    return all(
        np.array_equal(getattr(first, field.name), getattr(second, field.name))
        for field in dataclasses.fields(Discovery)
    )


def decoders() -> int:
    return sum(thread.name.startswith("ThreadPoolExecutor") for thread in threading.enumerate())


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


def test_skipping_gives_the_rest_to_the_bit(discoverer: Discoverer, photo: Path) -> None:
    images = [*scenes(10), photo.parent / "missing.jpg", *scenes(8)]
    everything = list(discoverer.outcomes(images))
    for skip in range(len(images) + 2):
        rest = list(discoverer.outcomes(images, skip=skip))
        assert len(rest) == max(0, len(images) - skip)
        for expected, outcome in zip(everything[skip:], rest, strict=True):
            if isinstance(expected, ImageError):
                assert str(outcome) == str(expected)
            else:
                assert same(outcome, expected)


@pytest.fixture
def packs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The widths of the images of each pack that goes through the backbone, as it goes."""
    seen: list[tuple[int, ...]] = []
    transfer = Engine.transfer

    def record(engine: Engine, pictures: Sequence[PatchedPicture]) -> list[Tensor]:
        seen.append(tuple(picture.width for picture in pictures))
        return transfer(engine, pictures)

    monkeypatch.setattr(Engine, "transfer", record)
    return seen


def numbered(heights: Sequence[int]) -> list[np.ndarray]:
    """Pictures two patches wide and some patches high, which their widths tell apart: 28, 27, and so on."""
    return [scene(number, 28 - number, rows * 14) for number, rows in enumerate(heights)]


def test_packs_are_neighbours_of_the_list_whatever_their_shapes(
    backbone: Backbone, packs: list[tuple[int, ...]]
) -> None:
    heights = [1, 5, 2, 2, 7, 1, 1, 3]
    list(Discoverer(backbone, device="cpu", batch_size=3).outcomes(numbered(heights)))
    assert [set(pack) for pack in packs] == [{28, 27, 26}, {25, 24, 23}, {22, 21}]


def test_a_pack_is_cut_where_it_would_be_too_long(
    backbone: Backbone, packs: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lostreg.discoverer._PACK_PATCHES", {"cpu": 10})
    heights = [1, 2, 2, 1, 8, 1, 1, 3, 2, 2]  # half of the patches
    found = list(Discoverer(backbone, device="cpu", batch_size=7).outcomes(numbered(heights)))
    assert [one.degrees.shape[0] for one in found] == heights
    # Five rows make ten patches; a longer image is alone; the seventh image ends a batch.
    assert [set(pack) for pack in packs] == [{28, 27, 26}, {25}, {24}, {23, 22}, {21, 20}, {19}]


def test_the_length_of_packs_does_not_change_boxes(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    images = scenes(11)
    whole = list(Discoverer(backbone, device="cpu").outcomes(images))
    monkeypatch.setattr("lostreg.discoverer._PACK_PATCHES", {"cpu": 150})
    for first, second in zip(whole, Discoverer(backbone, device="cpu").outcomes(images), strict=True):
        np.testing.assert_array_equal(first.xyxy, second.xyxy)
        np.testing.assert_array_equal(first.seeds, second.seeds)


@pytest.mark.parametrize("patches", [10, 4096])
def test_skipping_leaves_packs_as_they_were(
    backbone: Backbone, packs: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch, patches: int
) -> None:
    """The same image meets the same neighbours: what equal bits rest on, whatever the device."""
    monkeypatch.setattr("lostreg.discoverer._PACK_PATCHES", {"cpu": patches})
    discoverer = Discoverer(backbone, device="cpu", batch_size=3)
    images = numbered([2, 1, 3, 1, 1, 4, 2, 2, 1, 3, 1])
    list(discoverer.outcomes(images))
    everything = packs.copy()
    assert sorted(width for pack in everything for width in pack) == list(range(18, 29))
    for skip in range(1, len(images)):
        packs.clear()
        list(discoverer.outcomes(images, skip=skip))
        assert packs == everything[len(everything) - len(packs) :]
        assert min(28 - width for width in packs[0]) == skip // 3 * 3


def test_an_outcome_comes_as_soon_as_those_before_it(discoverer: Discoverer, packs: list[tuple[int, ...]]) -> None:
    images = [scene(number, (28, 56)[number % 2], 28) for number in range(8)]  # two shapes in turn
    counts = [len(packs) for _ in discoverer.outcomes(images)]
    assert counts == [1, 1, 2, 2, 3, 3, 4, 4]


def test_a_pack_may_be_started_before_the_one_before_it_is_finished(
    discoverer: Discoverer, packs: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As on a GPU, which is then never idle while the host draws boxes."""
    images = [*scenes(3), tmp_path / "none.jpg", *scenes(4)]
    expected = list(discoverer.outcomes(images))
    packs.clear()
    monkeypatch.setattr(discoverer, "_ahead", 1)
    counts = []
    for outcome, one in zip(discoverer.outcomes(images), expected, strict=True):
        counts.append(len(packs))
        assert str(outcome) == str(one) if isinstance(one, ImageError) else same(outcome, one)
    assert counts == [2, 2, 3, 3, 4, 4, 4, 4]


def test_skipped_batches_are_not_decoded(discoverer: Discoverer, monkeypatch: pytest.MonkeyPatch) -> None:
    images = scenes(8)
    decoded = []

    def record(image: np.ndarray, **options: object) -> Picture:
        decoded.append(next(number for number, one in enumerate(images) if one is image))
        return read_image(image, **options)

    monkeypatch.setattr("lostreg.discoverer.read_image", record)
    assert len(list(discoverer.outcomes(iter(images), skip=5))) == 3
    assert sorted(decoded) == [4, 5, 6, 7]


def test_discover_many_stops_at_a_broken_image_after_those_before(discoverer: Discoverer, tmp_path: Path) -> None:
    images = [*scenes(5), tmp_path / "none.jpg", *scenes(3)]
    found = discoverer.discover_many(images)
    assert [next(found).width for _ in range(5)] == [image.shape[1] for image in scenes(5)]
    with pytest.raises(ImageError, match=r"none\.jpg: no such file"):
        next(found)
    assert next(found, None) is None


def test_outcomes_go_on_after_a_broken_image(discoverer: Discoverer, tmp_path: Path) -> None:
    text = tmp_path / "text.jpg"
    text.write_text("not a picture")
    images = [*scenes(5), text, *scenes(4), tmp_path / "none.jpg"]
    outcomes = list(discoverer.outcomes(images))
    assert [index for index, outcome in enumerate(outcomes) if isinstance(outcome, ImageError)] == [5, 10]
    assert same(outcomes[6], discoverer.discover(scenes(1)[0]))


def test_only_broken_images(discoverer: Discoverer, tmp_path: Path) -> None:
    outcomes = list(discoverer.outcomes([tmp_path / f"{number}.jpg" for number in range(9)]))
    assert [type(outcome) for outcome in outcomes] == [ImageError] * 9


def test_an_endless_source_is_read_two_batches_ahead_at_most(discoverer: Discoverer) -> None:
    taken = itertools.count()
    picture = scene(1, 28, 28)

    def camera() -> Iterator[np.ndarray]:
        for _ in taken:
            yield picture

    found = discoverer.discover_many(camera())
    assert len(list(itertools.islice(found, 3))) == 3
    found.close()
    assert next(taken) <= 4 + 4  # what was computed with the third, and two batches


class AtOnce(ThreadPoolExecutor):
    """Decodes when asked, so that what is decoded does not depend on how quick threads are."""

    def submit(self, call: Callable[..., Any], /, *arguments: Any) -> Future[Any]:  # type: ignore[override]
        future: Future[Any] = Future()
        try:
            future.set_result(call(*arguments))
        except ImageError as error:
            future.set_exception(error)
        return future


@pytest.mark.parametrize(("limit", "ahead"), [(1, 1), (3 * 2 * 588, 3), (10**9, 6)])
def test_less_is_decoded_ahead_where_images_are_large(
    backbone: Backbone, packs: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch, limit: int, ahead: int
) -> None:
    """Whatever is decoded ahead, packs stay the same. Each picture has two patches of 588 bytes."""
    images: list[Any] = [*numbered([1] * 12), "none.jpg", scene(1, 28, 14)]
    whole = list(Discoverer(backbone, device="cpu", batch_size=3).outcomes(images))
    before = packs.copy()
    packs.clear()
    monkeypatch.setattr("lostreg.discoverer._DECODED_BYTES", limit)
    monkeypatch.setattr("lostreg.discoverer.ThreadPoolExecutor", AtOnce)
    taken: list[int] = []
    sources = (taken.append(number) or image for number, image in enumerate(images))
    most = 0
    discoverer = Discoverer(backbone, device="cpu", batch_size=3)
    for number, (one, expected) in enumerate(zip(discoverer.outcomes(sources), whole, strict=True)):
        assert str(one) == str(expected) if isinstance(one, ImageError) else same(one, expected)
        most = max(most, len(taken) - (number // 3 + 1) * 3)  # the pack of three is computed, and no longer waits
    assert packs == before
    assert most == ahead - 1  # one of those ahead was taken when the last of its pack had gone


def test_closing_early_leaves_no_thread(discoverer: Discoverer, photo: Path) -> None:
    before = decoders()
    outcomes = discoverer.outcomes([photo] * 40)
    next(outcomes)
    assert decoders() > before
    outcomes.close()
    assert decoders() == before


def test_a_source_that_raises_is_passed_on_and_leaves_no_thread(discoverer: Discoverer) -> None:
    def failing() -> Iterator[np.ndarray]:
        yield from scenes(9)
        raise RuntimeError("the camera was unplugged")

    before = decoders()
    with pytest.raises(RuntimeError, match="unplugged"):
        list(discoverer.discover_many(failing()))
    assert decoders() == before


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
    assert json.loads(json.dumps(discoverer.options)) == discoverer.options
    assert discoverer.options == {
        "backbone": "dinov2_vits14_reg",
        "weights": "random",
        "feature": "v",
        "layer": 0,
        "bias": -0.25,
        "normalize": False,
        "k_patches": 7,
        "device": "cpu",
        "precision": "fp32",
        "batch_size": 8,
        "compile": False,
        "max_side": 99,
        "exif": False,
        "max_pixels": 200_000_000,
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feature": "z"}, "feature must be one of q, k, v, out, not 'z'"),
        ({"k_patches": 0}, "k_patches must be an integer of at least 1, not 0"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, not 0"),
        ({"max_pixels": 0}, "max_pixels must be an integer of at least 1, not 0"),
        ({"batch_size": 2.5}, "batch_size must be an integer of at least 1, not 2.5"),
        ({"weights": "some.pth"}, "this one is loaded already"),
        ({"max_side": -1}, "max_side must be an integer of at least 1, not -1"),
        ({"bias": float("nan")}, "bias must be a finite number or 'auto', not nan"),
        ({"bias": float("inf")}, "bias must be a finite number or 'auto', not inf"),
        ({"bias": "automatic"}, "bias must be a finite number or 'auto', not 'automatic'"),
        ({"bias": True}, "bias must be a finite number or 'auto', not True"),
        ({"precision": "int8"}, "precision must be one of fp32, bf16, fp16, not 'int8'"),
        ({"layer": 2}, r"layer must be in \[-2, 1\] for dinov2_vits14_reg, not 2"),
        ({"layer": -3}, r"layer must be in \[-2, 1\] for dinov2_vits14_reg, not -3"),
        ({"bias": "auto", "normalize": False}, "'auto' is defined on normalised features"),
        ({"device": "nonsense"}, "device must be auto, cpu, cuda, cuda:N or mps, not 'nonsense'"),
        ({"device": "meta"}, "PyTorch finds none here"),
    ],
    ids=str,
)
def test_options_out_of_range_say_what_is_in_it(backbone: Backbone, options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Discoverer(backbone, **{"device": "cpu", **options})


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
    discoverer = Discoverer(dataclasses.replace(backbone, spec=BACKBONES[name]), device="cpu")
    is_dino = name.startswith("dino_")
    assert discoverer.feature == BACKBONES[name].feature
    assert (discoverer.bias, discoverer.normalize) == ((0.0, False) if is_dino else ("auto", True))


def test_what_is_given_wins_over_the_row(backbone: Backbone) -> None:
    dino = dataclasses.replace(backbone, spec=BACKBONES["dino_vits16"])
    discoverer = Discoverer(dino, device="cpu", feature="q", bias="auto")
    assert (discoverer.feature, discoverer.bias, discoverer.normalize) == ("q", "auto", True)
    discoverer = Discoverer(backbone, device="cpu", bias=-0.1)
    assert (discoverer.bias, discoverer.normalize) == (-0.1, True)
    assert Discoverer(backbone, device="cpu", bias=-0.1, normalize=False).normalize is False


def test_another_precision_leaves_a_shared_backbone_alone(backbone: Backbone) -> None:
    before = {name: value.clone() for name, value in backbone.model.state_dict().items()}
    full = Discoverer(backbone, device="cpu")
    half = Discoverer(backbone, device="cpu", precision="bf16")
    assert full.backbone is backbone
    assert half.backbone.dtype == torch.bfloat16
    assert half.discover(scene(1)).xyxy.shape == (1, 4)
    assert full.backbone.dtype == torch.float32
    assert all(torch.equal(value, before[name]) for name, value in backbone.model.state_dict().items())


class Crowded:
    """Stands in for an engine's forward: runs out of memory where a pack holds too much."""

    def __init__(self, discoverer: Discoverer, monkeypatch: pytest.MonkeyPatch, *, images: int, patches: int) -> None:
        self.tried: list[int] = []
        self._limits = images, patches
        self._forward = discoverer.engine.forward
        monkeypatch.setattr(discoverer.engine, "forward", self)

    def __call__(self, patches: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> Tensor:
        self.tried.append(len(patches))
        images, largest = self._limits
        if len(patches) > images or max(image.shape[0] * image.shape[1] for image in patches) > largest:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self._forward(patches, sizes)


def test_a_pack_that_memory_does_not_hold_is_halved_and_that_is_told_once(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [scene(number) for number in range(19)]
    expected = list(Discoverer(backbone, device="cpu", batch_size=8).outcomes(images))
    discoverer = Discoverer(backbone, device="cpu", batch_size=8)
    crowded = Crowded(discoverer, monkeypatch, images=2, patches=10**6)
    with pytest.warns(LostregWarning, match="out of memory on cpu with 8 images together: going on with half") as told:
        outcomes = list(discoverer.outcomes(images))
    assert len(told) == 1
    for outcome, one in zip(outcomes, expected, strict=True):
        np.testing.assert_array_equal(outcome.xyxy, one.xyxy)
        assert (outcome.width, outcome.height) == (one.width, one.height)
    # The first pack finds out what memory holds; those after it, of 8 and of 3, go in pieces at once.
    assert crowded.tried == [8, 4, 2, 2, 4, 2, 2] + [2] * 4 + [2, 1]
    crowded.tried.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(discoverer.outcomes(images[:8]))
    assert crowded.tried == [2] * 4


def test_one_image_that_memory_does_not_hold_is_named_and_the_others_are_found(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    large = tmp_path / "large.png"
    Image.fromarray(scene(1, 300, 280)).save(large)
    images = [*scenes(3), large, *scenes(2), tmp_path / "none.jpg"]
    expected = list(Discoverer(backbone, device="cpu").outcomes(images))
    discoverer = Discoverer(backbone, device="cpu")
    Crowded(discoverer, monkeypatch, images=8, patches=200)
    with pytest.warns(LostregWarning) as told:
        outcomes = list(discoverer.outcomes(images))
    assert len(told) == 1
    assert [index for index, outcome in enumerate(outcomes) if isinstance(outcome, ImageError)] == [3, 6]
    assert str(outcomes[3]).startswith(f"{large}: out of memory on one image of 20x22 patches on cpu (needs up to 0.")
    assert str(outcomes[6]) == str(expected[6])
    for outcome, one in zip(outcomes, expected, strict=True):
        if not isinstance(outcome, ImageError):
            np.testing.assert_array_equal(outcome.xyxy, one.xyxy)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA"), RuntimeError("DefaultCPUAllocator: can't allocate memory"), MemoryError()]
)
@pytest.mark.parametrize("stage", ["transfer", "forward", "search"])
def test_running_out_of_memory_says_what_to_do(
    discoverer: Discoverer, monkeypatch: pytest.MonkeyPatch, error: BaseException, stage: str
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(discoverer.engine, stage, fail)
    message = (
        r"image: out of memory on one image of 8x11 patches on cpu \(needs up to 0\.\d GB\): use a smaller --max-side"
    )
    with pytest.raises(ImageError, match=message):
        discoverer.discover(disc_picture())


def test_other_failures_of_a_model_are_not_taken_for_memory(
    discoverer: Discoverer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("shapes disagree")

    monkeypatch.setattr(discoverer.engine, "forward", fail)
    with pytest.raises(RuntimeError, match="shapes disagree"):
        discoverer.discover(disc_picture())


def test_an_image_that_free_memory_cannot_hold_is_refused_before_it_is_decoded(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    discoverer = Discoverer(backbone, device="cpu", max_side=None)
    path = png_header(tmp_path / "huge.png", 12_000, 14_000)  # no pixels follow: decoding would say so
    free = 3_210_000_000
    monkeypatch.setattr("lostreg.discoverer.available_bytes", lambda device: free)
    first, refused, last = discoverer.outcomes([scene(1), path, scene(2)])
    assert isinstance(first, Discovery)
    assert isinstance(last, Discovery)
    needed = required_bytes(discoverer.backbone, (1000, 858))
    assert str(refused) == (
        f"{path}: 12000x14000 pixels are 858,000 patches, which need up to {needed / 1e9:.1f} GB with "
        "dinov2_vits14_reg, but 3.2 GB are free on cpu: use --max-side, a smaller backbone or --precision bf16"
    )
    free = needed
    with pytest.raises(ImageError, match="not a readable image"):
        discoverer.discover(path)
    free = None
    with pytest.raises(ImageError, match="not a readable image"):
        discoverer.discover(path)


def test_memory_is_asked_for_the_size_that_an_image_is_scaled_down_to(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("lostreg.discoverer.available_bytes", lambda device: 0)
    path = png_header(tmp_path / "huge.png", 12_000, 14_000)
    with pytest.raises(ImageError, match="not a readable image"):  # and no word of memory
        Discoverer(backbone, device="cpu", max_side=800).discover(path)


def test_a_very_long_sequence_is_announced(discoverer: Discoverer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lostreg.discoverer._LONG", 87)
    with pytest.warns(LostregWarning, match="an image of 88 patches: .*--max-side bounds it"):
        discoverer.discover(scene(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        discoverer.discover(scene(1, 140, 110))


def test_a_gpu_takes_more_images_at_once(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Discoverer(backbone, device="cpu").batch_size == 8
    monkeypatch.setattr("lostreg.discoverer.resolve_device", torch.device)
    monkeypatch.setattr("lostreg.discoverer._place", lambda backbone, device, dtype: backbone)
    assert Discoverer(backbone, device="cuda").batch_size == 32
    assert Discoverer(backbone, device="cuda", batch_size=5).batch_size == 5
