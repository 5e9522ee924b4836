"""The benchmark script: its contenders find what they should, and its committed figures have their shape."""

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import disc_picture
from PIL import Image
from reference_lost import reference_lost

from lostreg.inference.discoverer import Discoverer
from lostreg.models.backbone import Backbone

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def benchmark(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    path = request.config.rootpath / "scripts" / "benchmark.py"
    spec = importlib.util.spec_from_file_location("lostreg_benchmark_script", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{number}.jpg" for number in range(3)]
    for number, path in enumerate(paths):
        Image.fromarray(disc_picture(150 - 20 * number, 110)).save(path, quality=95)
    return paths


def test_the_naive_host_search_is_lost(benchmark: ModuleType) -> None:
    for number in range(8):
        features = np.random.default_rng(number).normal(0.1, 1, (12 * 15, 8)).astype(np.float32)
        expected = reference_lost(features, (12, 15))
        degrees = np.sort(expected.degrees, axis=None)
        if degrees[0] != degrees[1] and degrees[99] != degrees[100]:  # its sort breaks ties as it likes
            assert benchmark.host_lost(torch.from_numpy(features), (12, 15)) == expected.box


def test_the_naive_loop_sees_the_keys_that_lostreg_sees(
    benchmark: ModuleType, backbone: Backbone, photos: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(benchmark, "host_lost", lambda features, grid: seen.append(features))
    discoverer = Discoverer(backbone, device="cpu", max_side=None)
    forward, mine = discoverer.engine.forward, []
    monkeypatch.setattr(discoverer.engine, "forward", lambda *given: mine.extend(forward(*given)) or mine[-1:])
    list(discoverer.discover_many(photos))
    attention = backbone.model.blocks[-1].attn  # type: ignore[index]
    monkeypatch.setattr(attention, "fused_attn", True)  # put back afterwards
    benchmark.naive_run(backbone, photos)(3)
    attention.qkv._forward_hooks.clear()
    expected = torch.cat(sorted(seen, key=len))
    assert len(seen) == 3
    torch.testing.assert_close(torch.cat(mine), expected, atol=1e-4, rtol=1e-4)


def test_the_stages_of_a_run_add_up_and_leave_no_trace(
    benchmark: ModuleType, backbone: Backbone, photos: list[Path]
) -> None:
    discoverer = Discoverer(backbone, device="cpu")
    before = [found.xyxy for found in discoverer.discover_many(photos)]
    shares = benchmark.split(discoverer, photos)
    stages = ("transfer", "forward", "LOST", "host", "rest")
    assert sum(shares[stage] for stage in stages) == pytest.approx(1, abs=1e-3)
    assert all(shares[stage] >= 0 for stage in stages)
    assert shares["forward"] > 0.1
    assert vars(discoverer.engine).keys().isdisjoint({"transfer", "forward", "search", "finish"})
    assert all(map(np.array_equal, before, (found.xyxy for found in discoverer.discover_many(photos))))


def test_buckets_are_full_only_where_shapes_repeat(benchmark: ModuleType) -> None:
    assert benchmark.bucket_fill([(3, 4)] * 32, 8, 32) == 1
    assert benchmark.bucket_fill([(3, n) for n in range(32)], 8, 32) == 1 / 8
    assert benchmark.bucket_fill([(3, 4)] * 4 + [(4, 3)] * 4, 4, 4) == 1
    assert benchmark.bucket_fill([(3, 4), (4, 3)] * 4, 4, 4) == 0.5
    assert benchmark.bucket_fill([(3, 4), (4, 3)] * 4, 8, 32) == 0.5


def test_generated_pictures_are_the_same_each_time_and_of_the_sizes_that_are_drawn(
    benchmark: ModuleType, tmp_path: Path
) -> None:
    files = []
    for folder in ("a", "b"):
        random = np.random.default_rng(0)
        (tmp_path / folder).mkdir()
        files.append(
            [
                benchmark.save_picture(tmp_path / folder / f"{number}.jpg", *benchmark.any_size(random), random)
                for number in range(6)
            ]
        )
    assert [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]]
    sizes = [Image.open(path).size for path in files[0]]
    assert len(set(sizes)) > 1
    assert all(max(size) in (500, 640) and min(size) >= 320 for size in sizes)


def test_committed_figures_were_measured_on_a_device_that_is_named(repository: Path) -> None:
    paths = sorted((repository / "eval" / "results").glob("benchmark-*.json"))
    assert paths
    for path in paths:
        found = json.loads(path.read_text(encoding="utf-8"))
        assert found["device"].startswith(path.stem.removeprefix("benchmark-"))
        assert {"python", "lostreg", "torch", "timm"} <= found["versions"].keys()
        assert {run["backbone"] for run in found["runs"]} >= {"dinov2_vits14_reg", "dinov2_vitl14_reg"}
        for run in found["runs"]:
            for contender in run["contenders"].values():
                assert len(contender["seconds"]) == found["settings"]["rounds"]
            for name, ratio in run["ratios"].items():
                first, second = (run["contenders"][part]["seconds"] for part in name.split(" / "))
                assert ratio == pytest.approx(float(np.median(np.divide(second, first))), rel=0.01)
        assert [point["patches"] for point in found["growth"]] == sorted(point["patches"] for point in found["growth"])
