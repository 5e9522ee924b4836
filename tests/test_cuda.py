"""What only a real GPU can show: the same features and boxes as on the CPU and as the oracle, and no waiting.

Nothing here needs the hub, trained weights or pictures. Where boxes are compared, similarities are exact or far from
what decides: products round differently on each device, and nothing is promised about what lies within rounding.
"""

import gc
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from planted import cut
from random_features import CLEAR, exact_unit_vectors
from random_models import DEPTH, GRIDS, NARROW, OTHERS, SOME, assert_close, built, patches, picture
from reference_lost import Reference, reference_lost, reference_several
from small_vit import LAYER, NAME, UNITS, pictures, save_weights, small, world, write_images
from torch import Tensor, nn

from lostreg.artifacts.attention import attention_maps
from lostreg.artifacts.norms import token_norms
from lostreg.artifacts.register_search import find_registers
from lostreg.cli.main import main
from lostreg.errors import LostregWarning
from lostreg.images import decoders
from lostreg.images.decoders import Asked, Decoders
from lostreg.images.patches import PatchedPicture
from lostreg.inference.discoverer import Discoverer
from lostreg.inference.jobs import FeaturesJob, ObjectsJob
from lostreg.methods.lost import Lost, exact_float32, find_candidates, lost_boxes, lost_maps, prepare
from lostreg.methods.multi_object import find_objects
from lostreg.methods.similarity import Similarities
from lostreg.models.backbone import Backbone
from lostreg.models.blocks import varlen_attn
from lostreg.models.features import FeatureExtractor
from lostreg.models.forward import Forward, Grid
from lostreg.models.registers import RegisterNeurons
from lostreg.models.table import BACKBONES, FEATURES
from lostreg.runs.sweep import with_trials

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that PyTorch can use (CUDA)"),
    pytest.mark.usefixtures("one_thread"),
]

DEVICE = torch.device("cuda", 0)
PAIRS = [(feature, layer) for feature in FEATURES for layer in range(DEPTH)]
EQUAL = [(3, 4)] * 4
SINGLE = 1e-4  # of the largest value: float32 summed in other orders, through every norm of a random model
HALF = 0.03  # the same in bfloat16
TWO_RECTANGLES = [(9, 8), (10, 12), (10, 12), (12, 9), (8, 8), (10, 12), (9, 16)]  # rows and columns of patches


def on_device(backbone: Backbone, precision: str = "fp32", **options: Any) -> Discoverer:
    return Discoverer(backbone, device=DEVICE, precision=precision, **options)


def some_registers(backbone: Backbone, count: int = 2) -> RegisterNeurons:
    """Two hidden units of each layer."""
    return RegisterNeurons(tuple((layer, unit) for layer in range(backbone.depth) for unit in (3, 40 + layer)), count)


def features_of(backbone: Backbone, grids: Sequence[Grid], numbers: Sequence[int] | None = None) -> list[Tensor]:
    """Every feature of every layer of a pack, on the CPU. The numbers tell random images of one grid apart."""
    numbers = range(len(grids)) if numbers is None else numbers
    images = [picture(backbone, grid, number) for grid, number in zip(grids, numbers, strict=True)]
    pixels = [patches(image, backbone.spec.patch_size).to(backbone.device) for image in images]
    return [found.cpu() for found in FeatureExtractor(backbone, PAIRS)(pixels, grids)]


def assert_features_close(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for (feature, layer), one, other in zip(PAIRS, actual, expected, strict=True):
        assert one.dtype == torch.float32
        assert_close(one, other, f"{feature} of layer {layer}", tolerance)


@pytest.fixture(scope="module", params=[*BACKBONES, *SOME])
def backbone(request: pytest.FixtureRequest) -> Backbone:
    """Every row of the table and what it lacks, narrow, on the CPU."""
    name, options = OTHERS.get(request.param, (request.param, NARROW))
    return built(name, depth=DEPTH, **options)


@pytest.mark.parametrize("grids", [GRIDS, EQUAL], ids=["mixed", "equal"])
def test_features_are_those_of_the_cpu(backbone: Backbone, grids: list[Grid]) -> None:
    expected = features_of(backbone, grids)
    assert_features_close(features_of(on_device(backbone).backbone, grids), expected, SINGLE)
    half = on_device(backbone, "bf16").backbone
    assert (half.device.type, half.dtype) == (DEVICE.type, torch.bfloat16)
    assert_features_close(features_of(half, grids), expected, HALF)


@pytest.mark.parametrize("grids", [GRIDS, EQUAL], ids=["mixed", "equal"])
def test_features_with_test_time_registers_are_those_of_the_cpu(backbone: Backbone, grids: list[Grid]) -> None:
    registers = some_registers(backbone)
    expected = features_of(backbone.with_registers(registers), grids)
    assert_features_close(features_of(on_device(backbone, registers=registers).backbone, grids), expected, SINGLE)


def test_a_mixed_pack_in_half_precision_is_each_image_alone(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where PyTorch has one kernel for sequences of several lengths, a pack goes through it, and an image alone not."""
    half = on_device(backbone, "bf16").backbone
    calls: list[int] = []
    plain = nn.functional.scaled_dot_product_attention

    def counted(q: Tensor, *others: Tensor, **options: Any) -> Tensor:
        calls.append(len(q))
        return plain(q, *others, **options)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", counted)
    together = features_of(half, GRIDS)
    if varlen_attn is not None and torch.cuda.get_device_capability(DEVICE) >= (8, 0):
        assert calls == []
    calls.clear()
    alone = [features_of(half, [grid], [number]) for number, grid in enumerate(GRIDS)]
    assert calls
    assert_features_close(together, [torch.cat(parts) for parts in zip(*alone, strict=True)], HALF)


def test_attention_rows_and_norms_are_those_of_the_cpu(backbone: Backbone) -> None:
    backbone = backbone.with_registers(some_registers(backbone))
    attention, norms = [], []
    for placed in (backbone, on_device(backbone).backbone):
        forward = Forward(placed)
        pixels = [
            patches(picture(placed, grid, number), placed.spec.patch_size).to(placed.device)
            for number, grid in enumerate(GRIDS)
        ]
        walk = forward.start(pixels, GRIDS)
        forward.advance(walk)
        attention.append([rows.cpu() for rows in forward.attention(walk, placed.prefix_tokens)])
        norms.append(token_norms(forward, pixels, GRIDS))
    for expected, actual in zip(*attention, strict=True):
        assert_close(actual, expected, "attention", SINGLE)
        torch.testing.assert_close(actual.sum(dim=-1), torch.ones(actual.shape[:-1]), rtol=0, atol=1e-5)
    for one, other in zip(*norms, strict=True):
        np.testing.assert_allclose(other.layers, one.layers, rtol=SINGLE)
        np.testing.assert_allclose(other.final, one.final, rtol=SINGLE)


def integers(seed: int, batch: int, count: int, width: int) -> np.ndarray:
    """Features whose products and sums are exact in float32, in whatever order."""
    return np.random.default_rng(seed).integers(-3, 4, (batch, count, width)).astype(np.float32)


def assert_same(result: Any, index: int, expected: Reference) -> None:
    np.testing.assert_array_equal(result.degrees[index].numpy(), expected.degrees)
    assert tuple(result.seeds[index].tolist()) == expected.seed
    assert tuple(result.xyxy[index].tolist()) == expected.box
    np.testing.assert_array_equal(result.masks[index].numpy(), expected.mask)
    assert float(result.scores[index]) == pytest.approx(expected.score, abs=1e-4)
    assert float(result.bias[index]) == pytest.approx(expected.bias, abs=1e-6)


@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (6, 7), (20, 25)])
@pytest.mark.parametrize("bias", [-4.0, 0.0, 1.0])
@pytest.mark.parametrize("k", [1, 5, 100])
def test_boxes_are_the_oracles_where_sums_are_exact(grid: Grid, bias: float, k: int) -> None:
    features = integers(grid[1], 3, grid[0] * grid[1], 4)
    result = lost_boxes(torch.from_numpy(features).to(DEVICE), grid, bias, k)
    assert result.xyxy.device.type == result.degrees.device.type == "cpu"
    for index, image in enumerate(features):
        assert_same(result, index, reference_lost(image, grid, bias, k))


@pytest.mark.parametrize("kept", [0, 1 << 28], ids=["computed twice", "kept"])
def test_boxes_of_large_images_are_the_oracles_tile_by_tile(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lostreg.methods.similarity._KEPT_ELEMENTS", {"cpu": kept, "cuda": kept})
    monkeypatch.setattr("lostreg.methods.similarity._BLOCK_ELEMENTS", {"cpu": 1, "cuda": 1})
    features, grid = integers(1, 2, 30 * 40, 8), (30, 40)
    result = lost_boxes(torch.from_numpy(features).to(DEVICE), grid, -6.0)
    for index, image in enumerate(features):
        assert_same(result, index, reference_lost(image, grid, -6.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [-0.375, 0.0, 0.0625])
def test_boxes_of_normalised_features_are_the_oracles(bias: float, dtype: torch.dtype) -> None:
    for seed in range(5):
        vectors = exact_unit_vectors(seed) * 4
        result = lost_boxes(torch.from_numpy(vectors).to(DEVICE, dtype), (6, 7), bias, normalize=True)
        for index, image in enumerate(vectors):
            assert_same(result, index, reference_lost(image, (6, 7), bias, normalize=True))


def test_automatic_biases_give_the_oracles_boxes() -> None:
    compared = 0
    for seed in range(40):
        features = np.random.default_rng(seed).normal(0.5, 1, (1, 42, 8)).astype(np.float32)
        expected = reference_lost(features[0], (6, 7), "auto", normalize=True)
        if expected.margin > CLEAR:
            assert_same(lost_boxes(torch.from_numpy(features).to(DEVICE), (6, 7), "auto"), 0, expected)
            compared += 1
    assert compared >= 10


def test_features_that_are_not_finite_are_noticed() -> None:
    features = torch.randn(3, 30, 8, device=DEVICE)
    features[1, 4, 2] = torch.nan
    assert lost_maps(features, (5, 6), -0.5, 10).to_host().finite.tolist() == [True, False, True]


@pytest.mark.parametrize("most", [2, 6])
def test_several_objects_are_the_oracles_where_sums_are_exact(most: int) -> None:
    grid = (9, 11)
    features = integers(most, 8, 99, 5)
    on_gpu, on_cpu = (
        find_objects(find_candidates(prepare(placed, normalize=False), grid, -4.0, 20), 20, most, 0.0)
        for placed in (torch.from_numpy(features).to(DEVICE), torch.from_numpy(features))
    )
    assert max(len(found.xyxy) for found in on_cpu) > 1
    for found, expected, image in zip(on_gpu, on_cpu, features, strict=True):
        for name in ("xyxy", "masks", "heat", "seeds", "biases"):
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
        np.testing.assert_allclose(found.scores, expected.scores, rtol=0, atol=1e-5)
        oracles = reference_several(image, grid, -4.0, 20, most=most)
        assert [tuple(box) for box in found.xyxy.tolist()] == [one.box for one in oracles]


def test_a_sweeps_biases_are_those_of_the_cpu() -> None:
    features = prepare(torch.from_numpy(integers(3, 2, 42, 8)), normalize=True)
    expected, actual = (with_trials((-0.5, -0.25))(Similarities(placed)) for placed in (features, features.to(DEVICE)))
    assert actual.device.type == DEVICE.type
    torch.testing.assert_close(actual.cpu(), expected, rtol=0, atol=1e-6)


def test_similarities_are_float32_where_the_user_asked_for_quicker_products() -> None:
    features = torch.nn.functional.normalize(
        torch.randn(2, 600, 384, generator=torch.Generator().manual_seed(0)), dim=-1
    )
    expected = features.double() @ features.double().mT
    features = features.to(DEVICE)
    plain = lost_maps(features, (20, 30), "auto", 100).to_host()
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        quick = features @ features.mT
        with exact_float32(features.device):
            exact = features @ features.mT
        again = features @ features.mT
        maps = lost_maps(features, (20, 30), "auto", 100).to_host()
    finally:
        torch.set_float32_matmul_precision(precision)
    assert torch.equal(quick, again), "the user's setting is gone"
    error, quick_error = ((found.cpu().double() - expected).abs().max() for found in (exact, quick))
    assert error < 1e-6
    if torch.version.cuda and torch.cuda.get_device_capability(DEVICE) >= (8, 0):
        assert quick_error > 20 * error, "products were not quick, so nothing was tested"
    for name in ("degrees", "seeds", "masks", "bias"):
        assert torch.equal(getattr(maps, name), getattr(plain, name)), name


@pytest.fixture(scope="module")
def even() -> Backbone:
    """A model that does not know where a patch lies: patches of one colour have one feature wherever they are."""
    backbone = built("dinov2_vits14_reg", depth=DEPTH, **NARROW)
    with torch.no_grad():
        backbone.model.pos_embed.zero_()  # type: ignore[operator, union-attr]
    return backbone


def rectangles(number: int, grid: Grid, patch: int = 14) -> tuple[np.ndarray, list[list[int]]]:
    """A picture of two rectangles of whole patches on an even ground, and their boxes in pixels, the larger first."""
    pixels = np.full((grid[0] * patch, grid[1] * patch, 3), (40, 60, 30), dtype=np.uint8)
    left, top = 1 + number % 2, 1 + number // 2 % 2
    boxes = [[left, top, left + 3, top + 3], [grid[1] - 3, grid[0] - 3, grid[1] - 1, grid[0] - 1]]
    boxes = [[side * patch for side in box] for box in boxes]
    for (x1, y1, x2, y2), colour in zip(boxes, [(250, 200, 20), (20, 40, 250)], strict=True):
        pixels[y1:y2, x1:x2] = colour
    return pixels, boxes


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_a_stream_of_mixed_photos_gives_each_photos_boxes(even: Backbone, precision: str, batch_size: int) -> None:
    photos = [rectangles(number, grid) for number, grid in enumerate(TWO_RECTANGLES * 3)]
    options = {"bias": "auto", "max_objects": 2, "min_score": 0.05, "batch_size": batch_size}
    discoverer = on_device(even, precision, **options)
    found = list(discoverer.discover_many([pixels for pixels, _ in photos]))
    on_cpu = Discoverer(even, device="cpu", **options)
    for (pixels, boxes), one in zip(photos, found, strict=True):
        assert sorted(one.xyxy.tolist()) == sorted(boxes)
        for alone in (discoverer.discover(pixels), on_cpu.discover(pixels)):
            np.testing.assert_array_equal(one.xyxy, alone.xyxy)
            np.testing.assert_array_equal(one.masks, alone.masks)
            np.testing.assert_allclose(one.scores, alone.scores, rtol=0, atol=0.02)


def test_planted_neurons_are_found() -> None:
    planted = world()
    found = find_registers(pictures(), on_device(planted.backbone), neurons=len(UNITS))
    assert sorted(found.neurons) == sorted((LAYER, unit) for unit in UNITS)


def test_attention_maps_come_to_the_host() -> None:
    on_cpu = Discoverer(small(), device="cpu")
    for (actual,), (expected,) in zip(
        attention_maps(pictures(), on_device(small())), attention_maps(pictures(), on_cpu), strict=True
    ):
        np.testing.assert_allclose(actual.rows, expected.rows, rtol=0, atol=1e-5)


def test_a_run_that_goes_on_ends_with_the_same_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = save_weights(small(), tmp_path / "small.safetensors")
    photos = [np.kron(image[::4, ::4], np.ones((4, 4, 1), np.uint8)) for image in pictures() * 3]
    write_images(tmp_path / "photos", photos)
    whole, rest = tmp_path / "whole", tmp_path / "rest"
    options = ["--backbone", NAME, "--weights", str(weights), "--device", DEVICE.type, "--batch-size", "4"]
    options += ["--max-objects", "3", "--min-score", "0.01"]
    assert main(["discover", str(tmp_path / "photos"), "--out", str(whole), *options]) == 0
    shutil.copytree(whole, rest)
    for name in ("predictions.jsonl", "maps.jsonl"):  # as if it had been killed after 7 images
        lines = (rest / name).read_bytes().splitlines(keepends=True)
        (rest / name).write_bytes(b"".join(lines[:7]))
    capsys.readouterr()
    assert main(["discover", str(tmp_path / "photos"), "--out", str(rest), *options]) == 0
    assert "7 of these had been done before" in capsys.readouterr().out
    for name in ("predictions.jsonl", "maps.jsonl"):
        assert (rest / name).read_bytes() == (whole / name).read_bytes()


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Whatever makes the host wait for the GPU raises, as far as PyTorch notices: not Event.synchronize."""
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    yield
    torch.cuda.set_sync_debug_mode(before)


def pack_of(backbone: Backbone, grids: Sequence[Grid]) -> list[PatchedPicture]:
    """Pictures of rectangles in the order in which a stream hands them on."""
    patch = backbone.spec.patch_size
    return cut([rectangles(number, grid, patch)[0] for number, grid in enumerate(sorted(grids))], backbone)


@pytest.mark.parametrize("registers", [False, True], ids=["plain", "test-time registers"])
@pytest.mark.parametrize("grids", [[(10, 12)] * 6, TWO_RECTANGLES], ids=["equal", "mixed"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("bias", ["auto", -0.5])
@pytest.mark.usefixtures("no_waiting")
def test_starting_a_pack_waits_for_nothing(
    even: Backbone, bias: Any, precision: str, grids: list[Grid], registers: bool
) -> None:
    chosen = some_registers(even) if registers else None
    backbone = on_device(even, precision, registers=chosen).backbone
    job = ObjectsJob(
        FeaturesJob(backbone, [("k", DEPTH - 1)]), Lost(bias, 100), normalize=True, convert=lambda found, _: list(found)
    )
    pack = pack_of(backbone, grids)
    job.finish(job.start(pack), pack)  # whatever is made once is there
    torch.cuda.set_sync_debug_mode("error")
    started = job.start(pack)
    torch.cuda.set_sync_debug_mode("default")
    (masks,) = {len(of_run[0].masks) for of_run in job.candidates(started)[:1]}
    assert masks >= 1


def test_pictures_of_a_stream_lie_in_pinned_memory(even: Backbone) -> None:
    pinned = []

    class Job:
        backbone = on_device(even).backbone

        def start(self, pictures: Sequence[PatchedPicture]) -> None:
            pinned.extend(torch.from_numpy(one.patches).is_pinned() for one in pictures)

        def finish(self, started: None, pictures: Sequence[PatchedPicture]) -> list[PatchedPicture]:
            return list(pictures)

    photos = [rectangles(number, (10, 12))[0] for number in range(5)]
    found = list(on_device(even).stream_of(Job()).outcomes(photos))  # type: ignore[arg-type]
    assert pinned == [True] * 5
    for photo, one in zip(photos, found, strict=True):
        np.testing.assert_array_equal(one.pixels, photo)  # type: ignore[union-attr]


def test_processes_decode_into_pinned_memory_that_is_taken_again(
    even: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = [rectangles(number, grid)[0] for number, grid in enumerate(TWO_RECTANGLES)]
    paths = [tmp_path / f"{number}.png" for number in range(len(photos))]
    for path, photo in zip(paths, photos, strict=True):
        Image.fromarray(photo).save(path)
    discoverer = on_device(even, bias="auto", batch_size=len(paths))
    expected = list(discoverer.discover_many(photos))
    ask, pinned = Decoders.ask, []

    def patient(self: Decoders, *arguments: Any, **options: Any) -> Asked:
        """Waits for a process to start, and for room."""
        while (asked := ask(self, *arguments, **options)) is None:
            time.sleep(0.01)
        return asked

    def result(asked: Asked) -> PatchedPicture:
        picture = read(asked)
        pinned.append(asked.picture is not None and torch.from_numpy(picture.patches).is_pinned())
        return picture

    read = Asked.result
    monkeypatch.setattr(Decoders, "ask", patient)
    monkeypatch.setattr(Asked, "result", result)
    monkeypatch.setattr(decoders, "_SHARED_BYTES", 64 << 20)
    rounds = 400
    for number, one in enumerate(discoverer.discover_many(paths * rounds)):
        np.testing.assert_array_equal(one.xyxy, expected[number % len(paths)].xyxy)
        np.testing.assert_array_equal(one.masks, expected[number % len(paths)].masks)
    assert pinned == [True] * len(paths) * (rounds - 1)  # the first batch is left to threads


def used_memory(discoverer: Discoverer, images: Sequence[np.ndarray]) -> tuple[list[Any], int]:
    """What is found, and the most memory that PyTorch took from the GPU for it, in bytes."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(DEVICE)
    found = list(discoverer.discover_many(images))
    return found, torch.cuda.max_memory_reserved(DEVICE)


@contextmanager
def memory_limit(most: float) -> Iterator[None]:
    """PyTorch takes no more than so many bytes from the GPU."""
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    torch.cuda.set_per_process_memory_fraction(most / total, DEVICE)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, DEVICE)


def test_memory_that_runs_out_halves_packs_and_changes_no_box(even: Backbone) -> None:
    photos = [rectangles(number, (40, 40)) for number in range(32)]
    images = [pixels for pixels, _ in photos]
    options = {"bias": "auto", "batch_size": len(images), "max_objects": 2, "min_score": 0.05}
    used_memory(on_device(even, **options), images[:2])  # workspaces of the libraries
    _, least = used_memory(on_device(even, **options), images[:1])
    expected, most = used_memory(on_device(even, **options), images)
    assert most > least + (64 << 20), "the pack is too small to run out of memory"
    discoverer = on_device(even, **options)
    message = "out of memory on cuda.* with 32 images together"
    with memory_limit(least + (most - least) / 3), pytest.warns(LostregWarning, match=message):
        found, used = used_memory(discoverer, images)
    assert used <= least + (most - least) / 3
    for (_, boxes), one, before in zip(photos, found, expected, strict=True):
        assert sorted(one.xyxy.tolist()) == sorted(boxes)
        np.testing.assert_array_equal(one.xyxy, before.xyxy)
        np.testing.assert_allclose(one.scores, before.scores, rtol=0, atol=1e-4)


def test_an_image_that_no_memory_holds_is_an_error_of_its_own(even: Backbone) -> None:
    """The others of its pack are done."""
    images = [rectangles(number, (10, 12))[0] for number in range(3)] + [rectangles(3, (150, 150))[0]]
    discoverer = on_device(even, bias="auto", batch_size=4, max_side=None)
    _, least = used_memory(discoverer, images[:1])
    _, most = used_memory(discoverer, images)
    with memory_limit(least + (most - least) / 4), pytest.warns(LostregWarning, match="out of memory"):
        outcomes = list(discoverer.outcomes(images))
    assert [isinstance(outcome, Exception) for outcome in outcomes] == [False, False, False, True]
    assert "150x150 patches" in str(outcomes[3])
