import json
import os
from decimal import ROUND_HALF_EVEN, Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lostreg.datasets import coco20k, require_images
from lostreg.datasets.coco import load_coco, main_categories
from lostreg.datasets.coco20k import coco20k_file_name, coco20k_ids, load_coco20k
from lostreg.errors import DatasetError


def image(image_id: Any, file_name: Any = None) -> dict[str, Any]:
    return {"id": image_id, "file_name": f"{image_id}.jpg" if file_name is None else file_name}


def box(image_id: Any, *xywh: float, crowd: int = 0) -> dict[str, Any]:
    return {"id": 1, "image_id": image_id, "bbox": list(xywh), "iscrowd": crowd, "category_id": 1}


def write(path: Path, images: Any, annotations: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    return path


def test_corners_are_rounded_half_to_even_in_file_order(tmp_path: Path) -> None:
    annotations = [box(7, 0.5, 1.5, 2.0, 2.0), box(3, 10.2, 10.7, 5.1, 5.1), box(7, 2.5, 3.4, 1.0, 1.2)]
    path = write(tmp_path / "a.json", [image(7), image(3, "sub/x.png")], annotations)
    benchmark = load_coco(tmp_path / "pictures", path)
    assert [example.image_id for example in benchmark.examples] == [7, 3]
    assert benchmark.examples[1].path == tmp_path / "pictures/sub/x.png"
    np.testing.assert_array_equal(benchmark.examples[0].boxes, [[0, 2, 2, 4], [2, 3, 4, 5]])
    np.testing.assert_array_equal(benchmark.examples[1].boxes, [[10, 11, 15, 16]])
    assert benchmark.examples[0].boxes.dtype == np.float64
    assert benchmark.notes == ()


def test_crowds_are_kept_apart_and_images_without_boxes_noted(tmp_path: Path) -> None:
    annotations = [box(1, 0, 0, 9, 9, crowd=1), box(1, 1, 1, 2, 2), box(2, 0, 0, 9, 9, crowd=1)]
    path = write(tmp_path / "a.json", [image(1), image(2), image(3)], annotations)
    benchmark = load_coco(tmp_path, path)
    assert [example.image_id for example in benchmark.examples] == [1]
    np.testing.assert_array_equal(benchmark.examples[0].boxes, [[1, 1, 3, 3]])
    np.testing.assert_array_equal(benchmark.examples[0].crowds, [[0, 0, 9, 9]])
    assert "2 of 3 images left out" in benchmark.notes[0]


def test_minimal_annotations_without_id_crowd_or_category_will_do(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", [image(1)], [{"image_id": 1, "bbox": [0, 0, 4, 4]}])
    assert len(load_coco(tmp_path, path)) == 1


def test_keep_chooses_and_orders(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", [image(n) for n in (1, 2, 3)], [box(n, n, n, 5, 5) for n in (1, 2, 3)])
    benchmark = load_coco(tmp_path, path, keep=[3, 1])
    assert [example.image_id for example in benchmark.examples] == [3, 1]
    np.testing.assert_array_equal(benchmark.examples[0].boxes, [[3, 3, 8, 8]])
    with pytest.raises(DatasetError, match="lacks 2 of the 3 images wanted, ids 8, 9"):
        load_coco(tmp_path, path, keep=[8, 1, 9])


def test_tiny_negative_corners_do_not_leave_a_negative_zero(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", [image(1)], [box(1, -0.2, 0, 4, 4)])
    assert not np.signbit(load_coco(tmp_path, path).examples[0].boxes).any()


def test_nothing_is_printed_to_stdout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load_coco(tmp_path, write(tmp_path / "a.json", [image(1)], [box(1, 0, 0, 4, 4)]))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[]", "expected a JSON object .* got a list"),
        (b'{"images": []}', "has no 'annotations'; its keys are images"),
        (b"{}", "has no 'images'; its keys are none"),
        (b'{"images": {}, "annotations": []}', "'images' must be a list, got a dict"),
        (b'{"images": [], "annotations": []}', "lists no images"),
    ],
)
def test_files_of_another_kind(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=message) as caught:
        load_coco(tmp_path, path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("images", "annotations", "message"),
    [
        ([3], [], r"images\[0\] must be an object, got a int"),
        ([image("3")], [], r"images\[0\]: 'id' must be an integer, got '3'"),
        ([image(True)], [], "'id' must be an integer, got True"),
        ([image(1, "")], [], "'file_name' must be a non-empty string"),
        ([image(1), image(1)], [], r"images\[1\]: the id 1 was used before"),
        ([image(1)], [], "has no boxes for its 1 images"),
        ([image(1)], [box(1, 0, 0, 4, 4, crowd=1)], "has no boxes .*crowd"),
        ([image(1)], [box(2, 0, 0, 4, 4)], "has no boxes"),
        ([image(1)], [7], r"annotations\[0\] must be an object"),
        ([image(1)], [{"image_id": 1, "caption": "a dog"}], "has no 'bbox': is this an instances file"),
        ([image(1)], [{"bbox": [0, 0, 1, 1]}], "'image_id' must be an integer, got None"),
        ([image(1)], [box(1, 0, 0, 4)], "four numbers"),
        ([image(1)], [box(1, 0, 0, -4, 4)], "four numbers"),
        ([image(1)], [box(1, 0, 0, float("nan"), 4)], "four numbers"),
        ([image(1)], [box(1, 0, 0, 10**400, 4)], "four numbers"),
        ([image(1)], [{"image_id": 1, "bbox": ["0", 0, 1, 1]}], "four numbers"),
        ([image(1)], [{"image_id": 1, "bbox": 5}], "four numbers"),
        ([image(1)], [box(1, 0, 0, 4, 4, crowd=2)], "'iscrowd' must be 0 or 1, got 2"),
    ],
)
def test_malformed_entries_say_where_they_are(tmp_path: Path, images: Any, annotations: Any, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        load_coco(tmp_path, write(tmp_path / "a.json", images, annotations))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"cannot read .*none\.json"):
        load_coco(tmp_path, tmp_path / "none.json")


# ---------------------------------------------------------------------------------------- COCO 20k


@pytest.fixture
def few_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A root with COCO 20k shrunk to three images, and an empty cache folder."""
    monkeypatch.setattr(coco20k, "coco20k_ids", lambda: (30, 10, 20))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    annotations = [box(n, n, n, 5.5, 5.5) for n in (10, 20, 30, 40)] + [box(10, 1, 1, 2, 2)]
    images = [image(n, f"COCO_train2014_{n:012d}.jpg") for n in (10, 20, 30, 40)]
    write(tmp_path / "coco/annotations/instances_train2014.json", images, annotations)
    return tmp_path


def cache_files(root: Path) -> list[Path]:
    return sorted((root / "cache").rglob("*.*"))


def test_coco20k_in_published_order_from_either_root(few_ids: Path) -> None:
    above, itself = load_coco20k(few_ids), load_coco20k(few_ids / "coco")
    assert [example.image_id for example in above.examples] == [30, 10, 20]
    assert above.examples[1].path == few_ids / "coco/train2014/COCO_train2014_000000000010.jpg"
    np.testing.assert_array_equal(above.examples[1].boxes, [[10, 10, 16, 16], [1, 1, 3, 3]])
    assert above.fingerprint() == itself.fingerprint()


def test_the_second_load_does_not_read_the_annotations(few_ids: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_coco20k(few_ids)
    assert [path.suffix for path in cache_files(few_ids)] == [".json"]

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the annotations were read again")

    monkeypatch.setattr(coco20k, "read_coco", refuse)
    assert load_coco20k(few_ids).fingerprint() == first.fingerprint()


def test_changed_annotations_are_read_again(few_ids: Path) -> None:
    first = load_coco20k(few_ids)
    path = few_ids / "coco/annotations/instances_train2014.json"
    text = path.read_text().replace("5.5", "7.5")
    facts = path.stat()
    path.write_text(text)
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns + 1_000_000))
    assert load_coco20k(few_ids).fingerprint() != first.fingerprint()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: text.replace('"version":2', '"version":0'),
        lambda text: text.replace('"crowds":[[],', '"crowds":['),
        lambda text: text.replace('"ids":[30,', '"ids":[31,'),
        lambda text: text.replace('"boxes":[[[30,', '"boxes":[[["x",'),
        lambda text: text.replace('"boxes":[[[30,', '"boxes":[[[30,4,'),
        lambda text: text.replace('"boxes":[[[30,30,36,36]],', '"boxes":['),
        lambda text: text.replace('"boxes":[[[30,30,36,36]],', '"boxes":[[30,30,36,36],'),
        lambda text: text.replace('"boxes":[[[30,', '"boxes":[[[NaN,'),
    ],
)
def test_a_corrupt_cache_is_replaced(few_ids: Path, spoil: Any) -> None:
    first = load_coco20k(few_ids)
    (cache,) = cache_files(few_ids)
    sound = cache.read_text()
    cache.write_text(spoil(sound))
    assert cache.read_text() != sound
    assert load_coco20k(few_ids).fingerprint() == first.fingerprint()
    assert cache.read_text() == sound


def test_an_unwritable_cache_is_no_error(few_ids: Path) -> None:
    (few_ids / "cache").write_text("a file where the folder should be")
    assert len(load_coco20k(few_ids)) == 3


def test_a_relative_cache_home_is_ignored(few_ids: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "somewhere")
    monkeypatch.setenv("HOME", str(few_ids / "home"))
    monkeypatch.chdir(few_ids)
    load_coco20k(few_ids)
    assert not (few_ids / "somewhere").exists()
    assert len(list((few_ids / "home/.cache/lostreg").iterdir())) == 1


def test_missing_ids_are_listed(few_ids: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coco20k, "coco20k_ids", lambda: (10, 98, 99))
    with pytest.raises(DatasetError, match="lacks 2 of the 3 images wanted, ids 98, 99"):
        load_coco20k(few_ids)


def test_crowds_come_from_the_annotations_and_from_the_cache(few_ids: Path) -> None:
    path = few_ids / "coco/annotations/instances_train2014.json"
    content = json.loads(path.read_text())
    content["annotations"].append(box(30, 1, 2, 3, 4, crowd=1))
    path.write_text(json.dumps(content))
    for _ in range(2):
        benchmark = load_coco20k(few_ids)
        assert [example.crowds.tolist() for example in benchmark.examples] == [[[1, 2, 4, 6]], [], []]


def test_an_image_with_crowds_only_is_left_out_and_noted(few_ids: Path) -> None:
    path = few_ids / "coco/annotations/instances_train2014.json"
    content = json.loads(path.read_text())
    content["annotations"][1]["iscrowd"] = 1
    path.write_text(json.dumps(content))
    for _ in range(2):  # from the annotations, then from the cache
        benchmark = load_coco20k(few_ids)
        assert [example.image_id for example in benchmark.examples] == [30, 10]
        assert "1 of 3 images left out" in benchmark.notes[0]


def test_missing_annotations_list_the_places(tmp_path: Path) -> None:
    with pytest.raises(DatasetError) as caught:
        load_coco20k(tmp_path)
    assert str(tmp_path / "annotations/instances_train2014.json") in str(caught.value)
    assert str(tmp_path / "coco/annotations/instances_train2014.json") in str(caught.value)


def test_the_list_of_ids_is_complete_and_has_no_repeats() -> None:
    ids = coco20k_ids()
    assert len(ids) == len(set(ids)) == 19_817
    assert coco20k_file_name(ids[0]) == "train2014/COCO_train2014_000000560992.jpg"


# ------------------------------------------------------------------------------------- shared data


def test_the_list_of_ids_is_the_published_one(shared_data: Path) -> None:
    published = (shared_data / "coco_20k_filenames.txt").read_text().split()
    assert [coco20k_file_name(image_id) for image_id in coco20k_ids()] == published


def test_the_coco_sample_against_exact_decimals_and_pycocotools(
    shared_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from pycocotools.coco import COCO

    root = shared_data / "coco-sample"
    path = root / "annotations/instances_train2017.json"
    benchmark = load_coco(root / "train2017", path)
    index = COCO(str(path))
    by_hand: dict[int, list[list[float]]] = {}
    for entry in json.loads(path.read_text())["annotations"]:
        if not entry["iscrowd"]:
            x, y, w, h = (Decimal(str(value)) for value in entry["bbox"])
            corners = [value.quantize(Decimal(1), ROUND_HALF_EVEN) for value in (x, y, x + w, y + h)]
            by_hand.setdefault(entry["image_id"], []).append([float(value) for value in corners])
    assert {example.image_id for example in benchmark.examples} == set(by_hand)
    different = 0
    for example in benchmark.examples:
        different += int((example.boxes != by_hand[int(example.image_id)]).sum())
        entries = index.loadAnns(index.getAnnIds(imgIds=[example.image_id], iscrowd=False))
        floats = [[e["bbox"][0], e["bbox"][1], sum(e["bbox"][::2]), sum(e["bbox"][1::2])] for e in entries]
        np.testing.assert_array_equal(example.boxes, [[round(value) for value in row] for row in floats])
    # Decimals may fall on a half where the sum of two floats falls beside it.
    assert different <= 0.01 * sum(example.boxes.size for example in benchmark.examples)


def test_the_images_of_the_coco_sample_are_found(shared_data: Path) -> None:
    root = shared_data / "coco-sample"
    benchmark = load_coco(root / "train2017", root / "annotations/instances_train2017.json")
    present = {path.name for path in (root / "train2017").iterdir()}
    absent = [example for example in benchmark.examples if example.path.name not in present]
    if absent:
        with pytest.raises(DatasetError, match=f"{len(absent)} of {len(benchmark)} images are missing"):
            require_images(benchmark)
    else:
        require_images(benchmark)


def categories(path: Path, annotations: list[dict[str, Any]], **content: Any) -> Path:
    given = {
        "images": [image(7), image(3, "sub/x.png"), image(5)],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "cat"}, {"id": 18, "name": "dog"}],
        **content,
    }
    path.write_text(json.dumps({key: value for key, value in given.items() if value is not None}))
    return path


def of(category: Any, entry: dict[str, Any]) -> dict[str, Any]:
    return {**entry, "category_id": category}


def test_the_main_category_is_that_of_the_largest_object(tmp_path: Path) -> None:
    annotations = [
        of(1, box(7, 0, 0, 4, 5)),
        of(18, box(3, 0, 0, 2, 2)),
        of(18, box(7, 0, 0, 7, 3)),
        of(1, box(7, 0, 0, 21, 1)),  # no larger than the one before
        of(1, box(3, 0, 0, 90, 90, crowd=1)),
        of(1, box(5, 0, 0, 90, 90, crowd=1)),
        of(1, box(99, 0, 0, 9, 9)),
    ]
    assert main_categories(categories(tmp_path / "a.json", annotations)) == {"7.jpg": "dog", "sub/x.png": "dog"}


def test_objects_without_an_extent_have_a_category_too(tmp_path: Path) -> None:
    assert main_categories(categories(tmp_path / "a.json", [of(1, box(7, 3, 3, 0, 0))])) == {"7.jpg": "cat"}
    assert main_categories(categories(tmp_path / "a.json", [])) == {}


@pytest.mark.parametrize(
    ("annotations", "content", "message"),
    [
        ([of(1, box(7, 0, 0, 4, 5))], {"categories": None}, "must be of a category with an id and a name"),
        ([of(1, box(7, 0, 0, 4, 5))], {"categories": 5}, "must be of a category with an id and a name"),
        ([of(1, box(7, 0, 0, 4, 5))], {"categories": [{"id": 1}]}, "must be of a category with an id and a name"),
        ([of(1, box(7, 0, 0, 4, 5))], {"categories": ["cat"]}, "must be of a category with an id and a name"),
        ([of(2, box(7, 0, 0, 4, 5))], {}, "must be of a category with an id and a name"),
        ([of([1], box(7, 0, 0, 4, 5))], {}, "must be of a category with an id and a name"),
        ([{"image_id": 7, "bbox": [0, 0, 1, 1]}], {}, "must be of a category with an id and a name"),
        ([5], {}, "must be"),
        ([of(1, box(7, 0, 0, -4, 5))], {}, "'bbox' must be four numbers"),
        ([], {"images": []}, "lists no images"),
    ],
)
def test_main_categories_of_malformed_files_are_refused(
    tmp_path: Path, annotations: list[Any], content: dict[str, Any], message: str
) -> None:
    with pytest.raises(DatasetError, match=message):
        main_categories(categories(tmp_path / "a.json", annotations, **content))


def test_main_categories_of_the_coco_sample(shared_data: Path) -> None:
    path = shared_data / "coco-sample/annotations/instances_train2017.json"
    content = json.loads(path.read_text())
    names = {entry["id"]: entry["name"] for entry in content["categories"]}
    files = {entry["id"]: entry["file_name"] for entry in content["images"]}
    by_hand: dict[str, tuple[float, str]] = {}
    for entry in content["annotations"]:
        if not entry["iscrowd"]:
            size, file_name = entry["bbox"][2] * entry["bbox"][3], files[entry["image_id"]]
            if size > by_hand.get(file_name, (-1, ""))[0]:
                by_hand[file_name] = (size, names[entry["category_id"]])
    found = main_categories(path)
    assert found == {file_name: name for file_name, (_, name) in by_hand.items()}
    assert len(set(found.values())) > 3
