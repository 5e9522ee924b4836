"""Each script runs to its end with its smallest input; the benchmark's contenders find what they should."""

import importlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import disc_picture
from PIL import Image
from reference_lost import reference_lost

from lostreg.artifacts.norms import token_norms
from lostreg.inference.discoverer import Discoverer
from lostreg.inference.jobs import LookJob
from lostreg.models.backbone import Backbone, load_backbone
from lostreg.models.forward import Forward
from lostreg.probing.data import read_mask

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def script(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Any script as a module, found as Python finds what lies beside a script."""
    monkeypatch.syspath_prepend(str(repository / "scripts"))
    return importlib.import_module


@pytest.fixture
def benchmark(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("benchmark")


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
    forward, mine = discoverer.features.forward, []
    monkeypatch.setattr(discoverer.features, "forward", lambda *given: mine.extend(forward(*given)) or mine[-1:])
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
    for watched in (discoverer.features, discoverer.stream, discoverer.stream.job):
        assert vars(watched).keys().isdisjoint({"transfer", "forward", "search", "candidates", "_read"})
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
                benchmark.save_picture(tmp_path / folder, f"{number}.jpg", benchmark.any_size(random))
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
        assert {"python", "torch", "timm"} <= found["versions"].keys()  # lostreg may run from a checkout
        assert found["runs"]
        for run in found["runs"]:
            for contender in run["contenders"].values():
                assert len(contender["seconds"]) == found["settings"]["rounds"]
            for name, ratio in run["ratios"].items():
                first, second = (run["contenders"][part]["seconds"] for part in name.split(" / "))
                assert ratio == pytest.approx(float(np.median(np.divide(second, first))), rel=0.01)
        assert [point["patches"] for point in found["growth"]] == sorted(point["patches"] for point in found["growth"])


# Each script with its smallest input


@pytest.mark.parametrize("name", sorted(path.stem for path in (Path(__file__).parents[1] / "scripts").glob("*.py")))
def test_every_script_starts(
    script: Callable[[str], ModuleType], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        script(name).main(["--help"])
    assert ended.value.code == 0
    assert "usage: " in capsys.readouterr().out


def test_contenders_are_compared_in_processes_of_their_own(
    benchmark: ModuleType, photos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out = tmp_path / "new" / "speed.json"
    small = ["--backbone", "imgfocus_vits14", "--contender", "backbone fp32", "--count", "2", "--rounds", "1"]
    options = ["--images", str(tmp_path), "--device", "cpu", *small, "--growth", "30", "--out", str(out)]
    assert benchmark.main(options) == 0
    found = json.loads(out.read_text())
    (run,) = found["runs"]
    assert (run["backbone"], run["images"], run["count"]) == ("imgfocus_vits14", "photographs", 2)
    assert run["boxes_compared"] == len(photos)
    assert run["contenders"].keys() == {"backbone fp32", "lostreg fp32"}
    assert all(contender["images_per_s"] > 0 for contender in run["contenders"].values())
    assert run["ratios"].keys() == {"lostreg fp32 / backbone fp32"}
    assert run["split"].keys() == {"lostreg fp32"}
    (point,) = found["growth"]
    assert point["patches"] == 30
    assert point["lost_seconds"] > 0


@pytest.fixture
def coco(photos: list[Path], tmp_path: Path) -> list[str]:
    """Options that name the photos as a COCO data set: a disc each, once as a polygon."""
    corners = [(0.4 + 0.2 * math.cos(turn), 0.5 + 0.3 * math.sin(turn)) for turn in np.linspace(0, 2 * math.pi, 20)]
    sizes = [Image.open(path).size for path in photos]
    content = {
        "images": [
            {"id": number, "file_name": path.name, "width": width, "height": height}
            for number, (path, (width, height)) in enumerate(zip(photos, sizes, strict=True), start=1)
        ],
        "annotations": [
            {
                "id": number,
                "image_id": number,
                "category_id": 1,
                "iscrowd": 0,
                "area": 100,
                "bbox": [0.2 * width, 0.2 * height, 0.4 * width, 0.6 * height],
                "segmentation": [[side for x, y in corners for side in (x * width, y * height)]],
            }
            for number, (width, height) in enumerate(sizes, start=1)
        ],
        "categories": [{"id": 1, "name": "disc"}],
    }
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    return ["--images", str(tmp_path), "--annotations", str(tmp_path / "boxes.json")]


def test_rules_for_the_bias_are_compared(
    script: Callable[[str], ModuleType], coco: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, plot = tmp_path / "rules.json", tmp_path / "rules.png"
    assert script("bias_rules").main([*coco, "--layers", "11", "--out", str(out), "--plot", str(plot)]) == 0
    found = json.loads(out.read_text())
    assert found["features"] == ["q 11", "k 11", "v 11", "out 11"]
    assert found["images"] == {"tuning": 2, "reporting": 1}
    assert len(found["rules"]) == capsys.readouterr().out.count("\n") - 1
    for rule in found["rules"].values():
        for half in ("tuning", "reporting"):
            assert all(0 <= corloc <= 100 for corloc in rule[half]["corloc"])
    assert plot.stat().st_size > 1000


def test_masks_are_judged(script: Callable[[str], ModuleType], coco: list[str], tmp_path: Path) -> None:
    assert script("mask_quality").main([*coco, "--out", str(tmp_path / "masks.json")]) == 0
    found = json.loads((tmp_path / "masks.json").read_text())
    assert found["images"] == 3
    assert found["options"]["backbone"] == "imgfocus_vits14"
    for way in ("patches", "watershed", "grabcut", "smooth"):
        assert found[way]["all"]["iou"]["images"] == 3
        assert 0 < found[way]["all"]["iou"]["mean"] <= 100
    assert found["patches"]["all"]["iou"]["gain"] == 0


def test_data_for_probes_is_made(
    script: Callable[[str], ModuleType], coco: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = json.loads((tmp_path / "boxes.json").read_text())
    content["categories"] = [{"id": 1, "name": "disc", "supercategory": "vehicle"}]
    del content["annotations"][2]["segmentation"]
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    assert script("probe_data").main([*coco, "--least", "2", "--out", str(tmp_path / "out")]) == 0
    masks = [read_mask(tmp_path / f"out/segmentation/masks/{number}.png") for number in range(3)]
    assert [np.unique(mask).tolist() for mask in masks] == [[0, 3], [0, 3], [0, 255]]
    assert sorted(path.name for path in (tmp_path / "out/classification/vehicle").iterdir()) == [
        "0.jpg",
        "1.jpg",
        "2.jpg",
    ]
    assert "1 of 3 objects have no segmentation" in capsys.readouterr().out
    for annotation, nothing in zip(content["annotations"][:2], ([], None), strict=True):
        annotation["segmentation"] = nothing
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    with pytest.raises(SystemExit, match="2"):
        script("probe_data").main([*coco, "--out", str(tmp_path / "bare")])
    assert "none of its 3 objects has a segmentation" in capsys.readouterr().err
    assert not (tmp_path / "bare").exists()


def test_boxes_of_bf16_are_compared_with_those_of_fp32(
    script: Callable[[str], ModuleType], coco: list[str], tmp_path: Path
) -> None:
    module, out = script("bf16_boxes"), tmp_path / "bf16.json"
    assert module.main([*coco, "--features", "k", "v", "--limit", "2", "--device", "cpu", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert (found["images"], found["options"]["max_side"], list(found["features"])) == (2, None, ["k", "v"])
    box, moved, away = (np.array([[x, 0, x + 100, 100]], np.float32) for x in (0, 2, 900))
    compared = module.compare([box, box, box], [box, moved, away], [box, box, box])
    assert compared["fp32"] == {"corloc": 100, "hits": 3}
    assert compared["bf16"] == {"corloc": 66.6667, "hits": 2}
    assert (compared["identical"], compared["iou_0.9"], compared["iou_0.5"]) == (1, 2, 2)
    assert (compared["hits_of_one_alone"], compared["gain"]) == ([1, 0], -33.33)
    assert compared["gain_95"] == [-100, 0]


def test_methods_that_find_objects_are_compared(
    script: Callable[[str], ModuleType], coco: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "objects.json"
    assert script("object_methods").main([*coco, "--features", "v", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["images"] == {"choosing": 2, "reporting": 1, "all": 3}
    assert all(0 < milliseconds < 1000 for milliseconds in found["features"]["v"]["milliseconds"].values())
    methods = found["features"]["v"]["methods"]
    assert list(methods) == ["lost", "parts", "taught", "taught by others"]
    assert methods["lost"]["all"]["gain"] == 0
    for method in methods.values():
        for figures in method.values():
            assert 0 <= figures["corloc"] <= found["features"]["v"]["reachable"]["all"] <= 100
            assert 0 <= figures["ap50"] <= 100


def test_the_rule_for_outliers_is_tried(script: Callable[[str], ModuleType], tmp_path: Path) -> None:
    assert script("outlier_rates").main(["--repeats", "2", "--out", str(tmp_path / "rates.json")]) == 0
    found = json.loads((tmp_path / "rates.json").read_text())
    assert found["percent_found"]["one mode"]["normal, 47 +- 5"] == {"64": 0, "1500": 0}
    assert found["percent_found"]["two modes"]["10 % about 300"]["1500"] == 100


def test_outliers_are_planted_where_they_are_found(
    script: Callable[[str], ModuleType], photos: list[Path], tmp_path: Path
) -> None:
    module, out = script("plant_outliers"), tmp_path / "planted.safetensors"
    assert module.main(["--images", *map(str, photos), "--out", str(out)]) == 0
    plain, planted = Discoverer("imgfocus_vits14", device="cpu"), load_backbone("dinov2_vits14", weights=out)
    norms = [token_norms_of(photos, Discoverer(backbone, device="cpu")) for backbone in (plain.backbone, planted)]
    assert norms[0].max() < 100
    assert 0 < (norms[1] > 200).mean() < 0.1
    before, after = plain.backbone.model.state_dict(), planted.model.state_dict()
    axes = {"blocks.6.mlp.fc1.weight": 0, "blocks.6.mlp.fc1.bias": 0, "blocks.6.mlp.fc2.weight": 1}  # of the units
    assert axes.keys() == {name for name in before if not after[name].equal(before[name])}
    for name, axis in axes.items():
        assert set((after[name] != before[name]).nonzero()[:, axis].tolist()) == set(module.UNITS)


def test_what_views_and_training_come_to_is_measured(script: Callable[[str], ModuleType], tmp_path: Path) -> None:
    photo, planted, out = tmp_path / "photo.png", tmp_path / "planted.safetensors", tmp_path / "near.json"
    Image.fromarray(disc_picture(140, 130)).save(photo)
    assert script("plant_outliers").main(["--images", str(photo), "--read", "position", "--out", str(planted)]) == 0
    options = ["--images", str(photo), "--max-side", "98", "--planted", str(planted), "--trained", str(planted)]
    assert script("trained_registers").main([*options, "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert (found["images"], found["side"]) == (1, 98)
    assert found["outliers"]["before"] == 0 < found["outliers"]["planted"]
    near = found["cosine"]
    assert near[f"{tmp_path.name}/planted.safetensors"] == near["planted"]
    assert near["10 views, median"]["planted"] > near["planted"]["planted"]


def token_norms_of(photos: list[Path], discoverer: Discoverer) -> np.ndarray:
    def look(forward: Forward, pixels: list[torch.Tensor], grids: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        return [found.output for found in token_norms(forward, pixels, grids)]

    return np.concatenate(list(discoverer.stream_of(LookJob(Forward(discoverer.backbone), look)).outcomes(photos)))


def test_memory_of_collections_is_measured(script: Callable[[str], ModuleType], tmp_path: Path) -> None:
    out = tmp_path / "memory.json"
    script("collection_memory").main(["--counts", "51", "--out", str(out)])  # the last one is a link
    (row,) = json.loads(out.read_text())["rows"]
    assert row["images"] == 51
    assert row["peak_mb"] > 100


def test_workers_are_measured(script: Callable[[str], ModuleType], tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="needs Ray: pip install lostreg[ray]")
    out = tmp_path / "scale.json"
    script("ray_scale").main(["--counts", "200", "--out", str(out)])
    (row,) = json.loads(out.read_text())["rows"]
    assert row["same_bytes"]
    assert row["plain"]["unreadable"] == row["ray"]["unreadable"] == 2
    assert row["ray"]["peak_mb"].keys() == {"driver", "worker", "ray"}


@pytest.mark.parametrize(
    ("kind", "ending", "files"), [("folder", ".png", 3), ("tar", ".tar", 1), ("parquet", ".parquet", 1)]
)
def test_pictures_of_the_measurement_are_what_they_are_called(
    script: Callable[[str], ModuleType], tmp_path: Path, kind: str, ending: str, files: int
) -> None:
    if kind == "parquet":
        pytest.importorskip("pyarrow", reason="needs pyarrow, which comes with lostreg[ray]")
    script("ray_scale").write_pictures(kind, 3, tmp_path)
    assert sum(path.suffix == ending for path in tmp_path.rglob("*")) == files


def test_further_objects_and_the_demo_are_timed(
    script: Callable[[str], ModuleType], photos: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "speed.json"
    options = ["--images", str(photos[0].parent), "--count", "2", "--rounds", "1", "--device", "cpu"]
    script("photo_speed").main([*options, "--out", str(out)])
    found = json.loads(out.read_text())
    assert found["photos"] == 2
    assert found["objects"]["ratio_to_one"].keys() == {"five, all of them", "five, clear ones", "one, refined"}
    assert found["demo"]["first_ms"] > 0


def test_the_picture_of_the_readme_is_drawn(
    script: Callable[[str], ModuleType], photos: list[Path], tmp_path: Path, repository: Path
) -> None:
    out = tmp_path / "example.png"
    script("example_picture").main(["--images", *map(str, photos[:2]), "--max-objects", "2", "--out", str(out)])
    picture = np.asarray(Image.open(out))
    assert picture.shape[0] == 240 + 8 + 240
    assert (picture == (40, 220, 40)).all(axis=2).sum() > 1000  # both photos have a main object
    assert (repository / "docs" / "example.jpg").stat().st_size < 400_000


def test_what_biases_cost_is_measured(
    benchmark: ModuleType, backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "benchmark_backbone", lambda name, device: backbone)
    out = tmp_path / "cost.json"
    assert benchmark.main(["--bias-cost", "--rounds", "1", "--device", "cpu", "--out", str(out)]) == 0
    runs = json.loads(out.read_text())["runs"]
    assert [run["precision"] for run in runs] == ["fp32", "bf16"]
    assert all(run["patches"] == 35 * 46 for run in runs)
    assert all(run["seconds"].keys() == {"forward", "one bias", "auto", "auto and 25 biases"} for run in runs)


def test_visitors_of_a_demo_get_their_answers(script: Callable[[str], ModuleType], photos: list[Path]) -> None:
    pytest.importorskip("gradio")
    from serving import served

    with served() as address:
        report = script("demo_soak").soak(address.removeprefix("http://"), photos, 4, 2)
    assert (report["uploads"], report["visitors"], report["failed"]) == (4, 2, 0)
    assert report["answer_s"]["most"] >= report["answer_s"]["median"] > 0
