"""Triton's kernels against PyTorch's operations: on a GPU, or where there is none in Triton's interpreter.

That must be asked for before Triton is imported, and other tests import it: hence a process of its own.
"""

import importlib.util
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import DEPTH, GRIDS, NARROW, OTHERS, built, patches, picture
from torch import Tensor

from lostreg import kernels
from lostreg.errors import LostregWarning
from lostreg.methods import similarity
from lostreg.methods.similarity import Similarities, Tile
from lostreg.models.backbone import place_model
from lostreg.models.forward import Forward

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = torch.device("cuda" if GPU else "cpu")

where_they_run = pytest.mark.skipif(not (INTERPRETED or GPU), reason="needs a GPU or Triton's interpreter")
gpu = pytest.mark.skipif(not GPU, reason="needs a GPU that PyTorch can use (CUDA)")


def test_what_runs_on_a_gpu_holds_in_the_interpreter() -> None:
    if INTERPRETED or GPU:
        pytest.skip("the other tests run here themselves")
    pytest.importorskip("triton", minversion="3.8", reason="older interpreters do not know the newest NumPy")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__]
    run = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
    assert " passed" in run.stdout


def without_triton(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A second copy of the module, for which there is no Triton."""
    monkeypatch.setitem(sys.modules, "triton", None)
    spec = importlib.util.spec_from_file_location("kernels_without_triton", Path(str(kernels.__file__)))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_triton_they_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not without_triton(monkeypatch)._work_on(torch.device("cuda"))


def test_other_devices_go_the_way_of_pytorch() -> None:
    assert not kernels.usable(torch.zeros(2))
    assert not kernels.usable(torch.zeros(2, device="meta"))


@pytest.mark.skipif(kernels.triton is None or INTERPRETED, reason="needs Triton as it is")
def test_a_failure_is_told_and_pytorch_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.warns(LostregWarning, match="Triton does not work here"):  # on a CPU it does not
        assert not kernels._work_on.__wrapped__(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not kernels._work_on.__wrapped__(torch.device("cpu"))


@gpu
def test_a_gpu_uses_them(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels.usable(torch.zeros(2, device=DEVICE))
    assert not kernels.usable(torch.zeros(2, 3, device=DEVICE).mT)


def counts_of(count: Callable[..., None], tiles: Iterable[Tile], thresholds: Tensor, patches: int) -> Tensor:
    counts = torch.ones(*thresholds.shape, patches, dtype=torch.int64, device=DEVICE)
    for tile in tiles:
        count(tile, thresholds, counts)
    return counts


def assert_same_counts(tiles: Iterable[Tile], thresholds: Tensor, patches: int) -> None:
    tiles = list(tiles)
    expected = counts_of(similarity._count, tiles, thresholds, patches)
    assert torch.equal(counts_of(similarity._count_by_kernel, tiles, thresholds, patches), expected)


def tiles_of(features: Tensor, rows: int) -> Iterable[Tile]:
    similarities = Similarities(features)
    similarities._rows, similarities.keeps = rows, True
    return similarities.tiles()


@where_they_run
@given(
    shape=st.tuples(st.integers(0, 3), st.integers(1, 40), st.integers(0, 9)),
    rows=st.integers(1, 40),
    seed=st.integers(0, 1 << 32),
)
@settings(deadline=None, max_examples=25)
def test_counts_are_equal_where_values_equal_thresholds(shape: tuple[int, int, int], rows: int, seed: int) -> None:
    batch, patches, limits = shape
    torch.manual_seed(seed)
    features = torch.randint(-2, 3, (batch, patches, 3)).float().to(DEVICE)  # exact products, many of them equal
    thresholds = torch.randint(-4, 5, (batch, limits)).float().to(DEVICE)
    assert_same_counts(tiles_of(features, rows), thresholds, patches)


@where_they_run
def test_counts_of_more_than_one_block_and_of_what_is_no_number() -> None:
    rows, columns = slice(3, 21), slice(21, 561)
    beside, square = torch.randn(1, 18, 540, device=DEVICE), torch.randn(1, 540, 540, device=DEVICE)
    beside[0, 17, [5, 520, 539]] = torch.tensor([torch.nan, torch.inf, -torch.inf], device=DEVICE)
    square[0, [0, 9, 539], [3, 530, 539]] = torch.tensor([torch.nan, -torch.inf, torch.inf], device=DEVICE)
    thresholds = torch.tensor([[0.25, -torch.inf, torch.inf, torch.nan]], device=DEVICE)
    assert_same_counts([Tile(rows, columns, beside, 2)], thresholds, 561)
    assert_same_counts([Tile(columns, columns, square, 1)], thresholds[:, :2], 561)


@where_they_run
def test_tiles_and_thresholds_need_not_be_contiguous() -> None:
    values, thresholds = torch.randn(20, 2, 30, device=DEVICE), torch.randn(3, 2, device=DEVICE)
    assert_same_counts([Tile(slice(1, 21), slice(21, 51), values.transpose(0, 1), 2)], thresholds.mT, 60)


@where_they_run
def test_the_kernel_counts_where_it_is_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    features, thresholds = torch.randn(2, 30, 4, device=DEVICE), torch.zeros(2, 1, device=DEVICE)
    expected = counts_of(similarity._count, tiles_of(features, 30), thresholds, 30) - 1
    monkeypatch.setattr(kernels, "usable", lambda tensor: True)
    monkeypatch.setattr(similarity, "_count", None)
    monkeypatch.setattr(similarity, "_count_on_cpu", None)
    assert torch.equal(Similarities(features).counts_above(thresholds), expected)


def steps(width: int) -> dict[str, Tensor]:
    """Tokens of which some channels are outliers, an update and what scales them."""
    tokens = torch.randn(19, width, device=DEVICE) * 3 + 1
    tokens[:, ::50] *= 100
    vectors = torch.randn(3, width, device=DEVICE)
    return {
        "tokens": tokens,
        "update": torch.randn_like(tokens),
        **dict(zip(("gamma", "weight", "bias"), vectors, strict=True)),
    }


@where_they_run
@pytest.mark.parametrize("width", [1, 48, 100, 384, 1024, 1536, 4096])
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_updates_are_scaled_and_added_in_float32(width: int, scaled: bool, dtype: torch.dtype) -> None:
    data = steps(width)
    tokens, update, gamma = data["tokens"], data["update"].to(dtype), data["gamma"] if scaled else None
    expected = tokens + (update if gamma is None else gamma * update)
    kernels.add_scaled(tokens, update, gamma)
    torch.testing.assert_close(tokens, expected, rtol=1e-6, atol=1e-5)


@where_they_run
@pytest.mark.parametrize("width", [1, 48, 100, 384, 1024, 1536, 4096])
@pytest.mark.parametrize("affine", [("weight", "bias"), ("weight",), ("bias",), ()], ids="-".join)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_norms_are_rounded_once(width: int, affine: tuple[str, ...], dtype: torch.dtype) -> None:
    data = steps(width)
    weight, bias = (data[name] if name in affine else None for name in ("weight", "bias"))
    expected = torch.nn.functional.layer_norm(data["tokens"].double(), (width,), *(
        None if vector is None else vector.double() for vector in (weight, bias)
    ), 1e-6)  # fmt: skip
    normed = kernels.layer_norm(data["tokens"], weight, bias, 1e-6, dtype)
    assert normed.dtype == dtype
    rounding = torch.finfo(dtype).eps / 2 * (2 if INTERPRETED and dtype == torch.bfloat16 else 1)  # there it is cut off
    torch.testing.assert_close(normed.double(), expected, rtol=rounding + 1e-6, atol=1e-5)


@where_they_run
@pytest.mark.parametrize(
    ("name", "options", "norms", "additions"),
    [
        ("dinov2_vits14_reg", NARROW, 2 * DEPTH, 2 * DEPTH),
        *[(*OTHERS[name], 2 * DEPTH, 2 * DEPTH) for name in ("plain", "EVA", "mixed RoPE")],
        (*OTHERS["RMS norm, SwiGLU"], 0, 2 * DEPTH),
        (*OTHERS["post-norm"], 0, 0),
    ],
)
def test_blocks_use_them_where_a_gpu_computes_in_half_precision(
    name: str, options: dict[str, Any], norms: int, additions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = built(name, **options)
    pixels = [patches(picture(backbone, grid), backbone.spec.patch_size).to(DEVICE) for grid in GRIDS]
    calls = {"layer_norm": 0, "add_scaled": 0}

    def count(kernel: str) -> Callable[..., Any]:
        original = getattr(kernels, kernel)

        def counted(*args: Any) -> Any:
            calls[kernel] += 1
            return original(*args)

        return counted

    def tokens(used: bool) -> Tensor:
        monkeypatch.setattr(kernels, "usable", lambda tensor: used)
        forward = Forward(backbone)
        walk = forward.start(pixels, GRIDS)
        for _ in range(DEPTH):
            forward.advance(walk)
        return walk.tokens

    for kernel in calls:
        monkeypatch.setattr(kernels, kernel, count(kernel))
    place_model(backbone.model, DEVICE, torch.float32)
    single = tokens(True)
    assert not any(calls.values())
    place_model(backbone.model, DEVICE, torch.float16)
    half = tokens(False)
    assert not any(calls.values())
    by_kernels = tokens(True)
    assert calls == {"layer_norm": norms, "add_scaled": additions}
    assert (by_kernels - single).norm() <= 1.1 * (half - single).norm() + 1e-6


@gpu
@pytest.mark.parametrize(("batch", "patches", "limits"), [(32, 1610, 6), (3, 4000, 31), (1, 16_000, 1)])
def test_counts_of_whole_packs(batch: int, patches: int, limits: int) -> None:
    features = torch.nn.functional.normalize(torch.randn(batch, patches, 64, device=DEVICE), dim=-1)
    thresholds = torch.linspace(-0.3, 0.3, limits, device=DEVICE).expand(batch, limits)
    for rows in (Similarities(features)._rows, 1000):
        assert_same_counts(tiles_of(features, rows), thresholds, patches)


@gpu
@pytest.mark.parametrize(("rows", "width"), [(32 * 1615, 384), (8 * 1615, 1024), (1 << 18, 768)])
def test_tokens_of_whole_packs(rows: int, width: int) -> None:
    tokens, update = torch.randn(rows, width, device=DEVICE), torch.randn(rows, width, device=DEVICE).bfloat16()
    gamma, weight, bias = torch.randn(3, width, device=DEVICE)
    expected = torch.nn.functional.layer_norm(tokens, (width,), weight, bias, 1e-6)
    normed = kernels.layer_norm(tokens, weight, bias, 1e-6, torch.bfloat16)
    torch.testing.assert_close(normed.float(), expected, rtol=torch.finfo(torch.bfloat16).eps / 2 + 1e-6, atol=1e-5)
    del expected, normed
    expected = tokens + gamma * update
    kernels.add_scaled(tokens, update, gamma)
    torch.testing.assert_close(tokens, expected, rtol=1e-6, atol=1e-5)
