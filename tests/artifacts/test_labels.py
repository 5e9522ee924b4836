"""Classes of images: from folders, COCO files and VOC folders."""

import json
from pathlib import Path

import pytest
from fabricate import write_voc

from lostreg.artifacts.labels import annotated_classes, folder_classes
from lostreg.errors import DatasetError, OptionError


def files(folder: str, count: int) -> list[Path]:
    return [Path(folder) / f"{number}.jpg" for number in range(count)]


def test_folders_beside_each_other_are_classes() -> None:
    paths = [*files("set/cats", 4), *files("set/dogs", 5), *files("set/rare", 1)]
    assert folder_classes(paths) == ["cats"] * 4 + ["dogs"] * 5 + ["rare"]
    assert folder_classes(paths[::-1]) == ["rare"] + ["dogs"] * 5 + ["cats"] * 4


@pytest.mark.parametrize(
    "paths",
    [
        files("set", 30),
        files("cats", 30),
        [*files("set/cats", 30), *files("set/dogs", 3)],
        [*files("a/cats", 30), *files("b/dogs", 30)],
        [*files("set/cats", 30), *files("set/dogs", 30), *files("set", 1)],
        [*files("set/cats", 30), *files("set/dogs/small", 30)],
        [Path("set") / str(number) / "image.jpg" for number in range(30)],
        [],
    ],
    ids=["one folder", "relative", "rare", "apart", "beside", "nested", "a folder each", "none"],
)
def test_other_folders_are_no_classes(paths: list[Path]) -> None:
    assert folder_classes(paths) == [None] * len(paths)


def coco(path: Path, names: list[str]) -> Path:
    images = [{"id": number, "file_name": name} for number, name in enumerate(names)]
    boxes = [
        {"image_id": number, "bbox": [0, 0, size, size], "category_id": category, "iscrowd": 0}
        for number in range(len(names))
        for size, category in ((3, 1), (5 + number, 1 + number % 2))
    ]
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    path.write_text(json.dumps({"images": images, "annotations": boxes, "categories": categories}))
    return path


def test_coco_files_give_the_class_of_the_largest_object(tmp_path: Path) -> None:
    annotations = coco(tmp_path / "a.json", ["a.jpg", "sub/b.jpg", "c.jpg"])
    paths = [Path("elsewhere/c.jpg"), Path("b.jpg"), Path("unknown.jpg"), Path("a.jpg")]
    assert annotated_classes(paths, annotations) == ["cat", "dog", None, "cat"]


def test_images_of_one_name_in_different_folders_keep_their_classes(tmp_path: Path) -> None:
    annotations = coco(tmp_path / "a.json", ["a/1.jpg", "b/1.jpg"])
    paths = [Path("data/b/1.jpg"), Path("data/a/1.jpg"), Path("1.jpg")]
    assert annotated_classes(paths, annotations) == ["dog", "cat", None]


def test_voc_folders_give_the_class_of_the_largest_object(tmp_path: Path) -> None:
    folder = write_voc(tmp_path / "voc", 3) / "Annotations"
    small = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>5</xmax><ymax>5</ymax></bndbox>"
    large = small.replace(">5<", ">50<")
    for stem, (first, second) in {"im00": (small, large), "im01": (large, small)}.items():
        body = f"<object><name>cat</name>{first}</object><object><name>dog</name>{second}</object>"
        (folder / f"{stem}.xml").write_text(f"<annotation>{body}</annotation>")
    paths = [Path("im01.png"), Path("x/im00.jpg"), Path("im77.jpg")]
    assert annotated_classes(paths, folder) == ["cat", "dog", None]


def test_annotations_of_other_images_are_refused(tmp_path: Path) -> None:
    annotations = coco(tmp_path / "a.json", ["a.jpg"])
    (tmp_path / "empty").mkdir()
    for place in (annotations, tmp_path / "empty"):
        with pytest.raises(OptionError, match=f"{place} has no annotation of any of the 2 images"):
            annotated_classes([Path("x.jpg"), Path("y.jpg")], place)


def test_annotations_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="cannot read the COCO annotations"):
        annotated_classes([Path("a.jpg")], tmp_path / "none.json")
    (tmp_path / "text.json").write_text("text")
    with pytest.raises(DatasetError, match="is not JSON"):
        annotated_classes([Path("a.jpg")], tmp_path / "text.json")
    (tmp_path / "a.xml").write_text("<annotation>")
    with pytest.raises(DatasetError, match="not well-formed"):
        annotated_classes([Path("a.jpg")], tmp_path)
