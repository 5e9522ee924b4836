"""Images in, outcomes out: packs, decoding ahead, memory that runs out, and going on in the middle of a list."""

import itertools
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import disc_picture, same, scene, scenes
from fabricate import png_header
from fabricate_lake import write_tar
from PIL import Image
from torch import Tensor

from lostreg.datasets.folder import find_collection
from lostreg.errors import ImageError, ImageUnavailableError, LostregWarning
from lostreg.images.decode import Picture, read_image
from lostreg.images.decoders import Asked, Decoders
from lostreg.images.patches import PatchedPicture
from lostreg.inference import stream
from lostreg.inference.discoverer import Discoverer
from lostreg.inference.discovery import Discovery
from lostreg.inference.jobs import FeaturesJob, ObjectsJob, Search
from lostreg.inference.memory import required_bytes
from lostreg.methods.lost import Candidates, Lost
from lostreg.models.backbone import Backbone

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def discoverer(backbone: Backbone) -> Discoverer:
    return Discoverer(backbone, device="cpu", batch_size=2)


def test_outcomes_are_what_is_made_of_runs_of_one_grid_in_every_feature(backbone: Backbone, tmp_path: Path) -> None:
    discoverer = Discoverer(backbone, device="cpu", batch_size=4)
    pairs = [("k", 1), ("v", 0), ("out", 1)]
    features = FeaturesJob(backbone, pairs)
    runs: list[list[tuple[int, int]]] = []

    def convert(candidates: list[Candidates], pictures: list[PatchedPicture]) -> list[tuple[Any, ...]]:
        runs.append([picture.grid for picture in pictures])
        assert len(candidates) == len(pairs)
        assert {found.masks.shape for found in candidates} == {(len(pictures), 1, *pictures[0].grid)}
        results = [found.best() for found in candidates]
        return [
            (picture.width, *(result.masks[index].numpy() for result in results))
            for index, picture in enumerate(pictures)
        ]

    images = [scene(0), scene(1, 60, 60), scene(2, 149, 111), scene(3, 59, 58), tmp_path / "none.jpg", scene(4)]
    job = ObjectsJob(features, Lost(-0.5, 100), normalize=True, convert=convert)
    found = list(discoverer.stream_of(job).outcomes(images))
    assert [set(run) for run in runs] == [{(5, 5)}, {(8, 11)}, {(8, 11)}]
    assert [len(run) for run in runs] == [2, 2, 1]
    alone = [Discoverer(backbone, device="cpu", feature=feature, layer=layer, bias=-0.5) for feature, layer in pairs]
    for image, outcome in zip(images, found, strict=True):
        if isinstance(image, Path):
            assert isinstance(outcome, ImageError)
            continue
        width, *masks = outcome
        assert width == image.shape[1]
        for one, mask in zip(alone, masks, strict=True):
            np.testing.assert_array_equal(mask, one.discover(image).mask)


def test_another_job_is_fed_as_the_discoverers_own(backbone: Backbone, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x112] = 6
    path = tmp_path / "a.png"
    Image.fromarray(scene(2, 300, 220)).save(path, exif=exif)
    large = png_header(tmp_path / "large.png", 400, 300)
    options = {"max_side": 150, "exif": False, "max_pixels": 100_000, "batch_size": 3}
    discoverer = Discoverer(backbone, device="cpu", **options)
    stream = discoverer.stream_of(discoverer.features)
    (first, _), second = stream.outcomes([path, large])
    assert (first.size, first.width, first.height) == ((110, 150), 300, 220)
    assert "more than the limit of 100,000" in str(second)
    assert {name: getattr(stream, name) for name in options} == options


def decoders() -> int:
    return sum(thread.name.startswith("ThreadPoolExecutor") for thread in threading.enumerate())


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
    transfer = FeaturesJob.transfer

    def record(job: FeaturesJob, pictures: Sequence[PatchedPicture]) -> list[Tensor]:
        seen.append(tuple(picture.width for picture in pictures))
        return transfer(job, pictures)

    monkeypatch.setattr(FeaturesJob, "transfer", record)
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
    monkeypatch.setattr("lostreg.inference.stream._PACK_PATCHES", {"cpu": 10})
    heights = [1, 2, 2, 1, 8, 1, 1, 3, 2, 2]  # half of the patches
    found = list(Discoverer(backbone, device="cpu", batch_size=7).outcomes(numbered(heights)))
    assert [one.degrees.shape[0] for one in found] == heights
    # Five rows make ten patches; a longer image is alone; the seventh image ends a batch.
    assert [set(pack) for pack in packs] == [{28, 27, 26}, {25}, {24}, {23, 22}, {21, 20}, {19}]


def test_the_length_of_packs_does_not_change_boxes(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    images = scenes(11)
    whole = list(Discoverer(backbone, device="cpu").outcomes(images))
    monkeypatch.setattr("lostreg.inference.stream._PACK_PATCHES", {"cpu": 150})
    for first, second in zip(whole, Discoverer(backbone, device="cpu").outcomes(images), strict=True):
        np.testing.assert_array_equal(first.xyxy, second.xyxy)
        np.testing.assert_array_equal(first.seeds, second.seeds)


@pytest.mark.parametrize("patches", [10, 4096])
def test_skipping_leaves_packs_as_they_were(
    backbone: Backbone, packs: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch, patches: int
) -> None:
    """The same image meets the same neighbours: what equal bits rest on, whatever the device."""
    monkeypatch.setattr("lostreg.inference.stream._PACK_PATCHES", {"cpu": patches})
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
    monkeypatch.setattr(discoverer.stream, "_ahead", 1)
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

    monkeypatch.setattr("lostreg.inference.stream.read_image", record)
    assert len(list(discoverer.outcomes(iter(images), skip=5))) == 3
    assert sorted(decoded) == [4, 5, 6, 7]


def test_outcomes_go_on_after_a_broken_image(discoverer: Discoverer, tmp_path: Path) -> None:
    text = tmp_path / "text.jpg"
    text.write_text("not a picture")
    images = [*scenes(5), text, *scenes(4), tmp_path / "none.jpg"]
    outcomes = list(discoverer.outcomes(images))
    assert [index for index, outcome in enumerate(outcomes) if isinstance(outcome, ImageError)] == [5, 10]
    assert same(outcomes[6], discoverer.discover(scenes(1)[0]))


def test_only_broken_images(discoverer: Discoverer, tmp_path: Path) -> None:
    outcomes = list(discoverer.outcomes([tmp_path / f"{number}.jpg" for number in range(9)]))
    assert [type(outcome) for outcome in outcomes] == [ImageUnavailableError] * 9


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
    monkeypatch.setattr("lostreg.inference.stream._DECODED_BYTES", limit)
    monkeypatch.setattr("lostreg.inference.stream.ThreadPoolExecutor", AtOnce)
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


class Crowded:
    """Stands in for a job's forward: runs out of memory where a pack holds too much."""

    def __init__(self, discoverer: Discoverer, monkeypatch: pytest.MonkeyPatch, *, images: int, patches: int) -> None:
        self.tried: list[int] = []
        self._limits = images, patches
        self._forward = discoverer.features.forward
        monkeypatch.setattr(discoverer.features, "forward", self)

    def __call__(self, patches: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
        self.tried.append(len(patches))
        images, largest = self._limits
        if len(patches) > images or max(run.shape[1] * run.shape[2] for run in patches) > largest:
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


def test_memory_that_runs_out_at_the_end_of_a_pack_costs_no_image(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = scenes(7)
    expected = list(Discoverer(backbone, device="cpu").outcomes(images))
    discoverer = Discoverer(backbone, device="cpu")
    job: Any = discoverer.stream.job
    candidates, tried = job.candidates, []

    def crowded(search: Search) -> list[list[Candidates]]:
        tried.append(sum(len(features[0]) for features in search.features))
        if tried[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return candidates(search)

    monkeypatch.setattr(job, "candidates", crowded)
    with pytest.warns(LostregWarning, match="going on with half"):
        outcomes = list(discoverer.outcomes(images))
    assert tried == [7, 4, 2, 2, 3, 2, 1]
    for outcome, one in zip(outcomes, expected, strict=True):
        np.testing.assert_array_equal(outcome.xyxy, one.xyxy)


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
    "error", [torch.OutOfMemoryError("CUDA"), RuntimeError("MPS backend out of memory (9 GB)"), MemoryError()]
)
@pytest.mark.parametrize("stage", ["transfer", "forward", "search", "candidates"])
def test_running_out_of_memory_says_what_to_do(
    discoverer: Discoverer, monkeypatch: pytest.MonkeyPatch, error: BaseException, stage: str
) -> None:
    def fail(*_: object) -> None:
        raise error

    owner = discoverer.features if stage in ("transfer", "forward") else discoverer.stream.job
    monkeypatch.setattr(owner, stage, fail)
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

    monkeypatch.setattr(discoverer.features, "forward", fail)
    with pytest.raises(RuntimeError, match="shapes disagree"):
        discoverer.discover(disc_picture())


def test_an_image_that_free_memory_cannot_hold_is_refused_before_it_is_decoded(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    discoverer = Discoverer(backbone, device="cpu", max_side=None)
    path = png_header(tmp_path / "huge.png", 12_000, 14_000)  # no pixels follow: decoding would say so
    free = 3_210_000_000
    monkeypatch.setattr("lostreg.inference.stream.available_bytes", lambda device: free)
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
    monkeypatch.setattr("lostreg.inference.stream.available_bytes", lambda device: 0)
    path = png_header(tmp_path / "huge.png", 12_000, 14_000)
    with pytest.raises(ImageError, match="not a readable image"):  # and no word of memory
        Discoverer(backbone, device="cpu", max_side=800).discover(path)


def test_a_very_long_sequence_is_announced(discoverer: Discoverer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lostreg.inference.stream._LONG", 87)
    with pytest.warns(LostregWarning, match="an image of 88 patches: .*--max-side bounds it"):
        discoverer.discover(scene(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        discoverer.discover(scene(1, 140, 110))


def test_processes_decode_for_a_quick_device(
    discoverer: Discoverer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = []
    for number, picture in enumerate(scenes(12)):
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(picture).save(paths[-1])
    paths[7].write_bytes(b"broken")
    expected = list(discoverer.outcomes(paths))
    asked: list[str] = []
    ask = Decoders.ask

    def patient(self: Decoders, path: str, *more: Any, **options: Any) -> Asked | None:
        """Waits for a process to start."""
        while (answer := ask(self, path, *more, **options)) is None:
            time.sleep(0.02)
        asked.append(path)
        return answer

    monkeypatch.setattr(stream, "_DECODED_APART", ("cpu",))
    monkeypatch.setattr(Decoders, "ask", patient)
    found = list(discoverer.outcomes(paths))
    assert sorted(asked) == sorted(str(path) for path in paths[discoverer.options.batch_size :])
    assert str(found.pop(7)) == str(expected.pop(7))
    assert all(same(one, other) for one, other in zip(found, expected, strict=True))  # type: ignore[arg-type]
    asked.clear()
    shard = write_tar(tmp_path / "0.tar", {path.name: path.read_bytes() for path in paths})
    found = list(discoverer.outcomes(find_collection(str(shard))))
    assert asked == [str(shard)] * (len(paths) - discoverer.options.batch_size)
    assert str(found.pop(7)).startswith("0.tar/7.png: not a readable image")
    assert all(same(one, other) for one, other in zip(found, expected, strict=True))  # type: ignore[arg-type]
