import json
import subprocess
import sys
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest

from lostreg.datasets import BENCHMARKS, FETCHABLE, coco20k, find_benchmarks, load_benchmark, registry
from lostreg.errors import DatasetError, OptionError


def a_voc_folder(root: Path, split: str = "trainval", stems: str = "ab") -> Path:
    for folder in ("Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    corners = "<xmin>2</xmin><ymin>2</ymin><xmax>9</xmax><ymax>9</ymax>"
    for stem in stems:
        body = f"<annotation><object><truncated>1</truncated><bndbox>{corners}</bndbox></object></annotation>"
        (root / f"Annotations/{stem}.xml").write_text(body)
    (root / f"ImageSets/Main/{split}.txt").write_text("\n".join(stems))
    return root


def a_coco_file(path: Path, ids: tuple[int, ...] = (1,)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"id": n, "file_name": f"{n}.jpg"} for n in ids]
    annotations = [{"id": n, "image_id": n, "bbox": [0, 0, 5, 5]} for n in ids]
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    return path


def test_the_table() -> None:
    assert list(BENCHMARKS) == ["voc07", "voc12", "coco20k", "sample", "voc", "coco"]
    counts = {row.name: {split.name: split.images for split in row.splits} for row in BENCHMARKS.values()}
    assert counts["voc07"] == {"trainval": 5011, "train": 2501, "val": 2510, "test": 4952}
    assert counts["voc12"] == {"trainval": 11540, "train": 5717, "val": 5823}
    assert BENCHMARKS["coco20k"].images == 19817
    for row in BENCHMARKS.values():
        assert row.title
        assert row.terms
        assert row.source
        assert not row.splits or row.splits[0].name == row.default_split
    with pytest.raises(FrozenInstanceError):
        BENCHMARKS["voc07"].title = "mine"  # type: ignore[misc]


@pytest.mark.parametrize(("typed", "meant"), [("voc7", "voc07"), ("VOC07", "voc07"), ("coco-20k", "coco20k")])
def test_an_unknown_name_suggests_the_nearest(typed: str, meant: str) -> None:
    with pytest.raises(DatasetError, match=f"did you mean {meant}.*known are voc07, voc12") as caught:
        load_benchmark(typed)
    assert repr(typed) in str(caught.value)


def test_an_unknown_name_far_from_all_just_lists_them() -> None:
    with pytest.raises(DatasetError, match="'zzz': known are"):
        load_benchmark("zzz")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("voc07", {"images": Path("x")}, "voc07 takes no images: it takes root, split, no_hard"),
        ("voc12", {"annotations": Path("x"), "images": Path("x")}, "takes no annotations or images"),
        ("coco20k", {"no_hard": True}, "coco20k takes no no_hard"),
        ("coco20k", {"split": "val"}, "coco20k takes no split"),
        ("coco", {"split": "val", "images": Path("x"), "annotations": Path("x")}, "coco takes no split"),
        ("coco", {"root": Path("x")}, "coco takes no root: it takes images, annotations"),
        ("coco", {"images": Path("x")}, "needs an annotations file"),
        ("coco", {}, "needs an annotations file"),
        ("voc", {}, "voc needs a root"),
    ],
)
def test_options_that_do_not_fit(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        load_benchmark(name, **options)


def test_a_voc_of_the_wrong_size_is_not_voc07(tmp_path: Path) -> None:
    a_voc_folder(tmp_path / "VOCdevkit/VOC2007")
    with pytest.raises(DatasetError, match="voc07: expected 5011 images in split 'trainval', found 2"):
        load_benchmark("voc07", root=tmp_path)


def test_voc07_of_the_right_size_loads_from_the_default_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a_voc_folder(tmp_path / "datasets/VOCdevkit/VOC2007")
    monkeypatch.setattr(registry, "_expected_images", lambda info, split: 2)
    monkeypatch.chdir(tmp_path)
    benchmark = load_benchmark("voc07")
    assert (benchmark.name, benchmark.split, len(benchmark)) == ("voc07", "trainval", 2)


def test_splits_that_do_not_exist(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"test split were never published.*trainval, train, val"):
        load_benchmark("voc12", root=tmp_path, split="test")
    with pytest.raises(DatasetError, match=r"voc07 has no split 'dog': expected trainval, train, val, test"):
        load_benchmark("voc07", root=tmp_path, split="dog")


def test_voc_takes_any_split_of_any_size(tmp_path: Path) -> None:
    root = a_voc_folder(tmp_path, split="mine", stems="abc")
    benchmark = load_benchmark("voc", root=root, split="mine")
    assert (benchmark.name, benchmark.split, len(benchmark)) == ("voc", "mine", 3)
    with pytest.raises(DatasetError, match="difficult or truncated"):
        load_benchmark("voc", root=root, split="mine", no_hard=True)


def test_the_sample_from_either_folder(tmp_path: Path) -> None:
    folder = a_voc_folder(tmp_path / "sample", split="all")
    for root in (tmp_path, folder):
        benchmark = load_benchmark("sample", root=root)
        assert (benchmark.name, benchmark.split, len(benchmark)) == ("sample", "all", 2)
    with pytest.raises(DatasetError, match=r"no sample benchmark below .*all\.txt"):
        load_benchmark("sample", root=tmp_path / "elsewhere")


def test_coco_and_coco20k(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = a_coco_file(tmp_path / "coco/annotations/instances_train2014.json", (5, 6, 7))
    benchmark = load_benchmark("coco", images=tmp_path / "pictures", annotations=path)
    assert (benchmark.name, benchmark.split, len(benchmark)) == ("coco", "", 3)
    monkeypatch.setattr(coco20k, "coco20k_ids", lambda: (7, 5))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    benchmark = load_benchmark("coco20k", root=tmp_path)
    assert [example.image_id for example in benchmark.examples] == [7, 5]


def test_find_benchmarks_says_where_each_is(tmp_path: Path) -> None:
    assert [found.path for found in find_benchmarks(tmp_path)] == [None] * len(BENCHMARKS)
    voc = a_voc_folder(tmp_path / "VOCdevkit/VOC2012")
    sample = a_voc_folder(tmp_path / "sample", split="all")
    a_coco_file(tmp_path / "coco/annotations/instances_train2014.json")
    paths = {found.info.name: found.path for found in find_benchmarks(tmp_path)}
    assert paths == {
        "voc07": None,
        "voc12": voc,
        "coco20k": tmp_path / "coco",
        "sample": sample,
        "voc": None,
        "coco": None,
    }


def test_the_table_costs_no_heavy_import() -> None:
    code = "import sys, lostreg.datasets; sys.exit('torch' in sys.modules or 'pycocotools' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", ["voc07", "coco20k", "sample", "voc"])
def test_a_root_that_the_system_refuses_is_an_ordinary_error(name: str) -> None:
    root = Path("x" * 5000)  # longer than any file name may be
    with pytest.raises(DatasetError, match="looked for") as caught:
        load_benchmark(name, root=root)
    command = f"`lostreg datasets fetch {name} --root {root}` fetches it"
    assert str(caught.value).endswith(command) == (name in FETCHABLE)
    assert all(found.path is None for found in find_benchmarks(root))
