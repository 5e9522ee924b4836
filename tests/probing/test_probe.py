"""Whole probes on pictures of which it is known what their tokens hold."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_vit import discoverer, small, strict_json
from torch import Tensor

from lostreg.errors import DatasetError, ImageError, LostregError, OptionError
from lostreg.inference.jobs import FeaturesJob
from lostreg.models.forward import Forward
from lostreg.models.registers import RegisterNeurons
from lostreg.probing import tokens
from lostreg.probing.data import ProbeData, load_probe_data
from lostreg.probing.maps import Frame
from lostreg.probing.probe import _TASKS, _figure, _resampled, difference, identity, probe
from lostreg.progress import Progress

pytestmark = pytest.mark.usefixtures("one_thread")
COLOURS = [(220, 40, 30), (40, 200, 60), (30, 60, 210)]
PATCH = small().spec.patch_size
SEEDS = (0, 1, 2)


def painted(random: np.random.Generator, codes: np.ndarray, patch: int = PATCH) -> np.ndarray:
    """A picture whose patches have the colours of these codes (rows, columns), and noise on them."""
    colours = np.array(COLOURS)[codes].repeat(patch, axis=0).repeat(patch, axis=1)
    return np.clip(colours + random.normal(0, 12, colours.shape), 0, 255).astype(np.uint8)


def write_task(root: Path, task: str, count: int = 24, *, shuffled: bool = False) -> ProbeData:
    """Pictures of one colour each, of several sizes, and what is to be read off them: their colour's code."""
    random = np.random.default_rng(0)
    codes = np.arange(count) % 3
    answers = random.permutation(codes) if shuffled else codes
    for number, (code, answer) in enumerate(zip(codes, answers, strict=True)):
        size = (2 + number % 2, 3)
        pixels = painted(random, np.full(size, code))[: size[0] * PATCH - number % 4]
        folder = root / (f"colour{answer}" if task == "classification" else "images")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{number:03}.png")
        if task == "segmentation":
            (root / "masks").mkdir(exist_ok=True)
            Image.fromarray(np.full(pixels.shape[:2], answer * 10, np.uint8)).save(root / f"masks/{number:03}.png")
        elif task == "depth":
            (root / "depth").mkdir(exist_ok=True)
            np.save(root / f"depth/{number:03}.npy", np.full(pixels.shape[:2], 1.5 + answer))
    return load_probe_data(root, task)


@pytest.fixture
def _pixels_for_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """A patch's token is its mean colour; CLS is the mean of them."""

    def look(forward: Forward, pixels: list[Tensor], grids: list[tuple[int, int]]) -> list[Any]:
        colours = [part.reshape(-1, PATCH * PATCH, 3).mean(dim=1) for part in pixels]
        sizes = [rows * columns for rows, columns in grids]
        patches = torch.split(torch.cat(colours), sizes)
        return [(part.mean(dim=0, keepdim=True).numpy(), part.numpy()) for part in patches]

    monkeypatch.setattr(tokens, "_last_tokens", look)


@pytest.mark.usefixtures("_pixels_for_tokens")
@pytest.mark.parametrize(
    ("task", "best", "worst"), [("classification", 100, 33), ("segmentation", 100, 20), ("depth", 0, 0.816)]
)
def test_tokens_that_hold_the_answer_give_it_and_shuffled_ones_chance(
    tmp_path: Path, task: str, best: float, worst: float
) -> None:
    found = probe(discoverer(small()), write_task(tmp_path / "right", task, 60), seeds=SEEDS)
    assert found.score.mean == pytest.approx(best, abs=0.1)
    assert found.score.deviation <= 0.1
    assert found.interval == pytest.approx((best, best), abs=0.1)
    shuffled = probe(discoverer(small()), write_task(tmp_path / "wrong", task, 60, shuffled=True), seeds=SEEDS)
    # 18 images of three classes a seed: a standard error of 11 points; a mean over the seeds has less.
    assert shuffled.score.mean == pytest.approx(worst, abs=0.15 if task == "depth" else 20)
    assert shuffled.interval[0] <= shuffled.score.mean <= shuffled.interval[1]
    assert found.chance == pytest.approx(shuffled.chance, abs=0.1 if task == "depth" else 17)


def test_the_figure_of_masks_is_what_a_loop_counts(tmp_path: Path) -> None:
    """Random masks, random outputs, three heads' worth of images in numpy alone."""
    random = np.random.default_rng(3)
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    masks = [random.choice([0, 4, 9, 255], (9, 11)) for _ in range(5)]
    for number, mask in enumerate(masks):
        Image.new("RGB", (11, 9)).save(tmp_path / f"images/{number}.png")
        Image.fromarray(mask.astype(np.uint8)).save(tmp_path / f"masks/{number}.png")
    data = load_probe_data(tmp_path, "segmentation")
    frame = Frame((9, 11), (1, 1))  # a patch a pixel: nothing is interpolated
    outputs = [torch.from_numpy(random.normal(size=(99, 3)).astype(np.float32)) for _ in masks]
    measured = [
        next(_TASKS["segmentation"].measure(data, number, [output], {number: frame}))
        for number, output in enumerate(outputs)
    ]
    confusion = np.zeros((3, 3))
    for mask, output in zip(masks, outputs, strict=True):
        for value, scores in zip(mask.ravel(), output.numpy(), strict=True):
            if value != 255:
                confusion[[0, 4, 9].index(value), scores.argmax()] += 1
    ious = [confusion[c, c] / (confusion[c].sum() + confusion[:, c].sum() - confusion[c, c]) for c in range(3)]
    ratios = tuple(np.stack(part) for part in zip(*measured, strict=True))
    assert _figure(ratios, np.ones(5)) == pytest.approx(np.mean(ious))
    twice = [np.concatenate([part, part[:1]]) for part in ratios]
    assert _figure(ratios, np.array([2, 1, 1, 1, 1])) == pytest.approx(_figure((twice[0], twice[1]), np.ones(6)))


def test_the_figure_of_depths_is_the_mean_of_the_images_errors(tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    (tmp_path / "images").mkdir()
    (tmp_path / "depth").mkdir()
    depths = random.uniform(1, 5, (4, 9, 11))
    depths[random.uniform(size=depths.shape) < 0.4] = 0
    depths[2] = np.nan
    for number, depth in enumerate(depths):
        Image.new("RGB", (11, 9)).save(tmp_path / f"images/{number}.png")
        np.save(tmp_path / f"depth/{number}.npy", depth)
    data, frame = load_probe_data(tmp_path, "depth"), Frame((9, 11), (1, 1))
    outputs = random.uniform(1, 5, (4, 99, 1)).astype(np.float32)
    measured = [
        next(_TASKS["depth"].measure(data, number, [torch.from_numpy(output)], {number: frame}))
        for number, output in enumerate(outputs)
    ]
    errors = []
    for depth, output in zip(depths, outputs, strict=True):
        there = depth.ravel() > 0
        if there.any():
            errors.append(np.sqrt(np.mean((depth.ravel()[there] - output[there, 0]) ** 2)))
    assert len(errors) == 3
    ratios = tuple(np.array(part, float)[:, None] for part in zip(*measured, strict=True))
    assert _figure(ratios, np.ones(4)) == pytest.approx(np.mean(errors), rel=1e-5)


def test_the_interval_is_that_of_the_binomial_where_it_is_one() -> None:
    hits = (np.random.default_rng(0).uniform(size=(400, 1)) < 0.3).astype(float)
    drawn = _resampled([(hits, np.ones_like(hits))])
    assert drawn.mean() == pytest.approx(hits.mean(), abs=0.005)
    assert drawn.std() == pytest.approx(np.sqrt(hits.mean() * (1 - hits.mean()) / 400), rel=0.1)


@pytest.mark.parametrize("task", ["classification", "segmentation", "depth"])
def test_figures_depend_on_the_seed_and_not_on_the_batch(tmp_path: Path, task: str) -> None:
    data = write_task(tmp_path, task, 30, shuffled=True)
    first, again, others, small_batch = (
        probe(discoverer(small(), batch_size=batch), data, seeds=seeds)
        for seeds, batch in ((SEEDS, 8), (SEEDS, 8), ((7, 8), 8), (SEEDS, 2))
    )
    assert again == first
    assert others.images == first.images
    assert others.resamples != first.resamples
    assert small_batch.penalties == first.penalties
    assert small_batch.score.mean == pytest.approx(first.score.mean, rel=1e-3)
    assert small_batch.resamples == pytest.approx(first.resamples, rel=1e-3)
    assert strict_json(json.dumps(first.record()))["score"]["mean"] == round(first.score.mean, 6)


@pytest.mark.parametrize(
    ("kind", "dimensions", "expected"),
    [
        ("cls", 64, lambda one: one.prefix[0]),
        ("mean", 64, lambda one: one.patches.mean(axis=0)),
        ("cls+mean", 128, lambda one: np.concatenate([one.prefix[0], one.patches.mean(axis=0)])),
    ],
)
def test_an_image_is_its_cls_token_or_the_mean_of_its_patches(
    tmp_path: Path, kind: str, dimensions: int, expected: Callable[[tokens.ImageTokens], np.ndarray]
) -> None:
    data = write_task(tmp_path, "classification", 12)
    found = probe(discoverer(small()), data, tokens=kind, seeds=(0,))
    assert (found.tokens, found.dimensions) == (kind, dimensions)
    (one,) = discoverer(small()).stream_of(tokens.TokensJob(Forward(small()))).outcomes(data.images[:1])
    assert isinstance(one, tokens.ImageTokens)
    (seen,) = (
        discoverer(small(), feature="out").stream_of(FeaturesJob(small(), [("out", -1)])).outcomes(data.images[:1])
    )
    assert not isinstance(seen, ImageError)
    np.testing.assert_array_equal(one.patches, seen[1][0].numpy())
    np.testing.assert_array_equal(tokens.whole_image(one, kind), expected(one))


def test_without_cls_the_mean_of_the_patches_stands_for_an_image(tmp_path: Path) -> None:
    backbone = small()
    without = dataclasses.replace(backbone, spec=dataclasses.replace(backbone.spec, class_token=False))
    found = probe(discoverer(without), write_task(tmp_path, "classification", 12), seeds=(0,))
    assert found.tokens == "mean"


def test_a_broken_image_is_left_out_and_told(tmp_path: Path) -> None:
    data = write_task(tmp_path, "segmentation", 12)
    before = probe(discoverer(small()), data, seeds=(0,))
    (tmp_path / "images/004.png").write_text("no picture")
    told: list[Progress] = []
    found = probe(discoverer(small()), load_probe_data(tmp_path, "segmentation"), seeds=(0,), on_progress=told.append)
    assert found.left_out == (4,)
    assert len(found.errors) == 1
    assert "004.png" in str(found.errors[0])
    assert sum(found.images) == 11
    assert difference(before.record(), found.record()) is None
    assert sum(report.error is not None for report in told) == 1
    assert {report.step for report in told} == {"features", "heads", "measured"}


def test_what_is_left_must_be_enough(tmp_path: Path) -> None:
    data = write_task(tmp_path, "depth", 5)
    for number in range(2):
        (tmp_path / f"images/{number:03}.png").unlink()
    with pytest.raises(DatasetError, match="at least 4 images, found 3"):
        probe(discoverer(small()), data, seeds=(0,))
    for number in range(2, 5):
        (tmp_path / f"images/{number:03}.png").unlink()
    with pytest.raises(LostregError, match=r"none of 5 images could be read: .*000\.png"):
        probe(discoverer(small()), data, seeds=(0,))


@pytest.mark.parametrize(("task", "kind"), [("classification", "mean"), ("segmentation", "cls")])
def test_one_token_that_is_not_finite_is_told_though_no_head_is_trained_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str, kind: str
) -> None:
    data = write_task(tmp_path, task, 12)
    apart = dataclasses.replace(data, held_out=np.arange(12) == 11)
    finish = tokens.TokensJob.finish
    images: list[tokens.ImageTokens] = []

    def overflowing(*arguments: Any) -> list[tokens.ImageTokens]:
        seen = finish(*arguments)
        images.extend(seen)
        if len(images) == 12:
            images[-1].patches[0, 0] = np.inf
        return seen

    monkeypatch.setattr(tokens.TokensJob, "finish", overflowing)
    with pytest.raises(LostregError, match="expected finite tokens: try --precision fp32"):
        probe(discoverer(small()), apart, tokens=kind, seeds=(0,))


def test_options_are_checked(tmp_path: Path) -> None:
    data = write_task(tmp_path, "classification", 12)
    with pytest.raises(OptionError, match="expected a Discoverer and then data, not"):
        probe(data, discoverer(small()))  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="expected data of load_probe_data, not 'folder'"):
        probe(discoverer(small()), "folder")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="tokens must be one of cls, cls\\+mean, mean, not 'all'"):
        probe(discoverer(small()), data, tokens="all")
    with pytest.raises(OptionError, match="at least one seed"):
        probe(discoverer(small()), data, seeds=())
    with pytest.raises(OptionError, match="seed must be an integer"):
        probe(discoverer(small()), data, seeds=(-1,))


def test_tokens_trained_on_are_bounded_and_drawn_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_task(tmp_path, "segmentation", 12)
    monkeypatch.setattr(tokens, "MOST_TOKENS", 36)
    kept = tokens.collect_tokens(discoverer(small()), data, "patches", tmp_path, lambda _: None)
    assert [len(images) for images in kept.images] == [3] * 12
    assert kept.training.rows().shape == (36, 64)
    assert len(kept.measuring.rows()) == sum(len(np.arange(span.start, span.stop)) for span in kept.spans.values())
    again = tokens.collect_tokens(discoverer(small(), batch_size=1), data, "patches", None, lambda _: None)
    np.testing.assert_allclose(again.training.rows(), kept.training.rows(), atol=1e-4)
    assert {path.name for path in tmp_path.iterdir()} == {"images", "masks"}  # their file has no name


def test_paired_differences_are_of_the_same_draws(tmp_path: Path) -> None:
    data = write_task(tmp_path, "classification", 30)
    first = probe(discoverer(small()), data, seeds=(0, 1)).record()
    assert difference(first, first) == (0, 0, 0)
    other = {**first, "score": {"mean": first["score"]["mean"] + 3}, "resamples": [r + 3 for r in first["resamples"]]}
    assert difference(first, other) == pytest.approx((3, 3, 3))


def test_registers_are_told_apart(tmp_path: Path) -> None:
    registers = RegisterNeurons(((2, 5),), 1)
    cured = discoverer(small(), registers=registers)
    plain, with_one = identity(small()), identity(cured.backbone)
    assert plain["registers"] is None
    assert with_one["registers"] == {"count": 1, "neurons": [[2, 5]]}
    assert with_one["title"] == "timm:test_vit + 1 test-time register"
    of_file = dataclasses.replace(small(), weights="file trained.safetensors sha256:00ff")
    assert identity(of_file)["title"] == "timm:test_vit (trained.safetensors)"
    found = probe(cured, write_task(tmp_path, "classification", 12), seeds=(0,))
    assert found.prefix == ("CLS", "test-time register 1")
