"""Each format, read back by someone else's reader: nothing is lost but what the format has no place for."""

import csv
import io
import json
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from exporting import BROKEN, HEIGHT, MENDED, NAMES, WIDTH, collect, collection_of, line, write_lines, write_run
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as coco_masks
from pycocotools.coco import COCO

from lostreg.datasets.voc import load_voc
from lostreg.errors import LostregWarning, PredictionsError
from lostreg.exports import parquet, voc, yolo
from lostreg.exports.coco import as_coco
from lostreg.exports.csv_table import COLUMNS, as_csv
from lostreg.exports.items import ExportSet
from lostreg.exports.labelstudio import as_tasks, labelling_config
from lostreg.exports.voc import whole_corners
from lostreg.exports.writing import as_text, write_file
from lostreg.exports.yolo import choose_val
from lostreg.runs.decisions import choose_boxes
from lostreg.runs.predictions import read_predictions

BOXES = [[6, 4, 30.5, 28.125], [0, 0, WIDTH, HEIGHT]]
UNUSUAL = st.text(st.characters(exclude_categories=()), min_size=1, max_size=12)


@pytest.fixture
def collection(tmp_path: Path) -> ExportSet:
    return collect(write_run(tmp_path) / "predictions.jsonl")


def masks() -> list[dict[str, Any]]:
    """A mask for each box, as a predictions file has them."""
    pixels = np.zeros((HEIGHT, WIDTH, 2), np.uint8, order="F")
    pixels[4:28, 6:30, 0] = 1
    pixels[::2, :, 1] = 1  # many parts
    return [{**rle, "counts": rle["counts"].decode()} for rle in coco_masks.encode(pixels)]


# Parquet


def test_a_parquet_file_holds_the_predictions_as_they_were(tmp_path: Path) -> None:
    unreadable = {"image_id": "broken.jpg", "boxes": [], "error": "broken.jpg: no such file", "unavailable": True}
    bare = {"image_id": 7, "boxes": [[1, 2, 3, 4.5]]}
    predictions = write_lines(tmp_path, [line("a.jpg", masks=masks()), unreadable, line(BROKEN), bare])
    parquet.write(tmp_path / "x.parquet", read_predictions(predictions))
    table = pq.read_table(tmp_path / "x.parquet")
    assert table.schema.remove_metadata() == parquet.schema().remove_metadata()
    assert table.schema.metadata[b"format"] == b"lostreg predictions 1"
    first, second, third, last = table.to_pylist()
    assert first == {**line("a.jpg", masks=masks()), "error": None, "unavailable": False}
    none = dict.fromkeys(("width", "height", "scores", "seeds", "masks", "error"))
    assert second == {**none, **unreadable, "scores": [], "seeds": []}
    assert third["image_id"] == "caf\\udce9.jpg"
    assert last == {**none, **bare, "image_id": "7", "unavailable": False}


def test_pandas_reads_a_parquet_file(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    parquet.write(tmp_path / "x.parquet", read_predictions(write_lines(tmp_path, [line("a.jpg"), line("b.jpg")])))
    frame = pandas.read_parquet(tmp_path / "x.parquet")
    assert list(frame["image_id"]) == ["a.jpg", "b.jpg"]
    assert [box.tolist() for box in frame["boxes"][1]] == BOXES


def test_the_same_predictions_are_the_same_parquet_file_in_groups_of_bounded_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "ROWS", 4)
    lines = read_predictions(write_lines(tmp_path, [line(f"{number}.jpg") for number in range(10)]))
    taken: list[int] = []
    for name in ("a", "b"):
        read = (one for one in lines if taken.append(0) is None)
        parquet.write(tmp_path / name, choose_boxes(read, min_score=0.5))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    found = pq.ParquetFile(tmp_path / "a")
    assert [found.metadata.row_group(group).num_rows for group in range(found.num_row_groups)] == [4, 4, 2]
    assert found.read()["scores"].to_pylist() == [[0.75]] * 10


def test_an_unsound_mask_leaves_no_parquet_file(tmp_path: Path) -> None:
    lines = read_predictions(write_lines(tmp_path, [line("a.jpg", masks=[{"size": [1, 1], "counts": "x"}] * 2)]))
    with pytest.raises(PredictionsError, match=r"image 'a.jpg': expected masks of 60x40"):
        parquet.write(tmp_path / "out" / "x.parquet", lines)
    assert list((tmp_path / "out").iterdir()) == []


# COCO


def test_pycocotools_reads_boxes_scores_and_masks_as_they_were(tmp_path: Path) -> None:
    found = collection_of(tmp_path, line("a.jpg", masks=masks()), line("b.jpg"))
    write_file(tmp_path / "coco.json", as_text(as_coco(found, "thing")))
    coco = COCO(tmp_path / "coco.json")
    assert coco.getImgIds() == [1, 2]
    assert coco.loadCats(coco.getCatIds())[0]["name"] == "thing"
    annotations = coco.loadAnns(coco.getAnnIds(imgIds=[1]))
    assert [[x, y, x + w, y + h] for x, y, w, h in (one["bbox"] for one in annotations)] == BOXES
    assert [one["score"] for one in annotations] == [0.75, 0.125]
    for annotation, mask in zip(annotations, masks(), strict=True):
        assert np.array_equal(coco.annToMask(annotation), coco_masks.decode(mask))
        assert annotation["area"] == coco_masks.area(mask)
    assert len(coco.loadRes(coco.dataset["annotations"]).anns) == 4


def test_supervision_reads_the_coco_file_of_a_run(tmp_path: Path, collection: ExportSet) -> None:
    supervision = pytest.importorskip("supervision")
    write_file(tmp_path / "coco.json", as_text(as_coco(collection)))
    read = supervision.DetectionDataset.from_coco(str(tmp_path / "photos"), str(tmp_path / "coco.json"))
    (tmp_path / "photos" / BROKEN).rename(tmp_path / "photos" / MENDED)
    names = [Path(path).relative_to(tmp_path / "photos").as_posix() for path in read.image_paths]
    assert names == [*NAMES[:-1], MENDED]
    assert all(cv2.imread(path) is not None for path in read.image_paths)
    assert all(np.array_equal(found.xyxy, BOXES) for found in read.annotations.values())


def test_supervision_reads_masks_of_several_parts(tmp_path: Path) -> None:
    supervision = pytest.importorskip("supervision")
    found = collection_of(tmp_path, line("a.jpg", masks=masks()))
    write_file(tmp_path / "coco.json", as_text(as_coco(found)))
    read = supervision.DetectionDataset.from_coco(str(tmp_path), str(tmp_path / "coco.json"))
    (detections,) = read.annotations.values()
    assert np.array_equal(detections.mask, np.stack([coco_masks.decode(mask) for mask in masks()]).astype(bool))


def test_whole_numbers_stay_the_ids_of_images(tmp_path: Path) -> None:
    found = as_coco(collection_of(tmp_path, line(139), line(25)))
    assert [image["id"] for image in found["images"]] == [139, 25]
    assert [one["image_id"] for one in found["annotations"]] == [139, 139, 25, 25]
    mixed = as_coco(collection_of(tmp_path, line(139), line("a.jpg")))
    assert [image["id"] for image in mixed["images"]] == [1, 2]


# VOC


def test_our_own_reader_and_supervision_read_voc(tmp_path: Path, collection: ExportSet) -> None:
    voc.write(tmp_path / "voc", collection, label="thing <&>")
    benchmark = load_voc(tmp_path / "voc")
    assert len(benchmark) == len(NAMES)
    assert all(np.array_equal(example.boxes, [[6, 4, 31, 28], BOXES[1]]) for example in benchmark.examples)
    assert all(example.path.is_file() for example in benchmark.examples)
    supervision = pytest.importorskip("supervision")
    folders = [str(tmp_path / "voc" / folder) for folder in ("JPEGImages", "Annotations")]
    read = supervision.DetectionDataset.from_pascal_voc(*folders)
    assert read.classes == ["thing <&>"]
    assert len(read) == len(NAMES)
    assert all(np.array_equal(found.xyxy, [[6, 4, 31, 28], BOXES[1]]) for found in read.annotations.values())


def test_stems_of_voc_stay_what_they_are(tmp_path: Path) -> None:
    voc.write(tmp_path / "voc", collection_of(tmp_path, line("000005")), files="none")
    assert [example.image_id for example in load_voc(tmp_path / "voc").examples] == ["000005"]


@given(
    edges=st.tuples(*[st.floats(0, 1) for _ in range(4)]), width=st.integers(1, 10_000), height=st.integers(1, 10_000)
)
def test_whole_corners_lie_within_the_image_and_half_a_pixel_off(
    edges: tuple[float, ...], width: int, height: int
) -> None:
    x1, x2 = sorted((edges[0] * width, edges[2] * width))
    y1, y2 = sorted((edges[1] * height, edges[3] * height))
    xmin, ymin, xmax, ymax = whole_corners((x1, y1, x2, y2), width, height)
    assert 1 <= xmin <= xmax <= width
    assert 1 <= ymin <= ymax <= height
    # 0.5 pixels off at most, or 1 where the box would vanish.
    for edge, whole, other in ((x1, xmin - 1, x2), (x2, xmax, x1), (y1, ymin - 1, y2), (y2, ymax, y1)):
        assert abs(edge - whole) <= (0.5 if abs(edge - other) > 1 else 1)


# YOLO


def rows(label: Path, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """Boxes of a label file, in pixels."""
    numbers = np.loadtxt(label, ndmin=2)[:, 1:]
    centre, size = numbers[:, :2], numbers[:, 2:]
    return np.hstack([centre - size / 2, centre + size / 2]) * [width, height, width, height]


def test_every_image_has_its_label_where_ultralytics_looks(tmp_path: Path, collection: ExportSet) -> None:
    yolo.write(tmp_path / "images" / "yolo", collection)
    images = [path for path in (tmp_path / "images/yolo/images").rglob("*") if path.is_file()]
    assert len(images) == len(NAMES)
    labels = set()
    for image in images:
        # The last folder called images becomes labels; what follows the last dot becomes txt.
        label = Path("/labels/".join(str(image).rsplit("/images/", 1)).rsplit(".", 1)[0] + ".txt")
        assert np.abs(rows(label) - BOXES).max() < 1e-4
        assert not any(part.startswith(".") for part in image.relative_to(tmp_path).parts)
        assert cv2.imread(str(image)) is not None
        labels.add(label)
    assert len(labels) == len(NAMES)


def test_labels_belong_to_their_images(tmp_path: Path) -> None:
    run = write_run(tmp_path, ["a.jpg", "a.png", "b/a.jpg"])
    found = collect(run / "predictions.jsonl")
    yolo.write(tmp_path / "yolo", found, val_share=0)
    for name, source in (("a.jpg", "a.jpg"), ("a-2.png", "a.png"), ("b/a.jpg", "b/a.jpg")):
        copied = tmp_path / "yolo/images/train" / name
        assert copied.read_bytes() == (tmp_path / "photos" / source).read_bytes()


def test_masks_are_polygons_and_a_box_among_them_is_its_corners(tmp_path: Path) -> None:
    bare, masked = line("a.jpg"), line("b.jpg", masks=masks())
    with pytest.warns(LostregWarning, match="1 masks are of several pieces"):
        yolo.write(tmp_path / "yolo", collection_of(tmp_path, bare, masked), files="none", val_share=0)
    scale = np.array([WIDTH, HEIGHT])
    polygons = {
        name: [
            np.array(row.split()[1:], float).reshape(-1, 2) * scale
            for row in (tmp_path / f"yolo/labels/train/{name}.txt").read_text().splitlines()
        ]
        for name in ("a", "b")
    }
    for polygon, (x1, y1, x2, y2) in zip(polygons["a"], BOXES, strict=True):
        assert np.abs(polygon - [[x1, y1], [x2, y1], [x2, y2], [x1, y2]]).max() < 1e-4
    square, row = polygons["b"]  # of pixels 6 to 29 and 4 to 27; the other mask is every other row, without area
    assert {tuple(point) for point in square.round(3)} == {(6, 4), (29, 4), (29, 27), (6, 27)}
    assert np.abs(row - polygons["a"][1]).max() < 1e-4


def test_supervision_reads_yolo(tmp_path: Path, collection: ExportSet) -> None:
    supervision = pytest.importorskip("supervision")
    yolo.write(tmp_path / "yolo", collection, label="no", val_share=0)
    read = supervision.DetectionDataset.from_yolo(
        str(tmp_path / "yolo/images/train"), str(tmp_path / "yolo/labels/train"), str(tmp_path / "yolo/data.yaml")
    )
    assert read.classes == ["no"]
    assert len(read) == sum("/" not in name for name in NAMES)  # it looks into no folder below
    assert all(np.abs(found.xyxy - BOXES).max() < 1e-3 for found in read.annotations.values())


@pytest.mark.parametrize("label", ["object", "no", "a: b # c", '"', "Tür", "1"])
def test_the_data_file_is_yaml_with_the_label_as_text(tmp_path: Path, label: str) -> None:
    found = collection_of(tmp_path, line("a.jpg"), line("b.jpg"))
    yolo.write(tmp_path / "yolo", found, label=label, files="none")
    data = yaml.safe_load((tmp_path / "yolo/data.yaml").read_text(encoding="utf-8"))
    assert data == {"train": "images/train", "val": "images/val", "names": {0: label}}


def test_without_images_to_validate_with_those_to_train_with_do_both(tmp_path: Path) -> None:
    yolo.write(tmp_path / "yolo", collection_of(tmp_path, line("a.jpg")), files="none")
    assert yaml.safe_load((tmp_path / "yolo/data.yaml").read_text())["val"] == "images/train"


def test_no_box_is_too_small_for_six_decimals(tmp_path: Path) -> None:
    found = collection_of(tmp_path, line(boxes=[[10, 10, 10.0000001, 10.0000001], [0, 0, 6, 4]]))
    yolo.write(tmp_path / "yolo", found, files="none")
    (label,) = (tmp_path / "yolo/labels").rglob("*.txt")
    numbers = np.loadtxt(label)
    assert numbers[0, 3:].tolist() == [1e-6, 1e-6]
    assert numbers[1, 3:].tolist() == [0.1, 0.1]


@given(ids=st.lists(UNUSUAL, unique=True, min_size=2, max_size=30), share=st.floats(0.01, 0.99))
def test_both_parts_of_a_split_have_images(ids: list[str], share: float) -> None:
    assert 0 < len(choose_val(ids, share)) < len(ids)


def test_a_split_stays_when_images_are_added() -> None:
    ids = [f"{number}.jpg" for number in range(1000)]
    small, large = choose_val(ids[:500], 0.2), choose_val(ids, 0.2)
    assert small == {index for index in large if index < 500}
    assert 150 < len(large) < 250
    assert choose_val(ids, 0) == set()


def test_frames_of_a_video_stay_together() -> None:
    videos = [f"{number}/film.MP4" for number in range(100)]
    ids = [f"{video}#{frame:06}" for frame in (0, 30, 60) for video in videos]
    val = choose_val(ids, 0.2)
    assert len(val) == 3 * len({ids[index].partition("#")[0] for index in val})
    assert val == {index for index in val if index % 100 in choose_val(videos, 0.2)}
    assert choose_val(ids[::100], 0.5) == set()  # of one video
    rows = [f"train.parquet#{row}" for row in range(100)]
    assert 0 < len(choose_val(rows, 0.2)) < 100


# CSV


def parse(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text, newline="")))


def test_a_table_has_a_row_for_each_box_and_one_for_each_image_without(tmp_path: Path) -> None:
    found = collection_of(
        tmp_path,
        line("a.jpg"),
        line("b.jpg", scores=[0, 0]),
        {"image_id": "c.jpg", "boxes": [], "error": "=c.jpg: gone"},
        min_score=0.1,
        sized=False,
    )
    table = parse(as_csv(found))
    assert tuple(table[0]) == COLUMNS
    assert [[float(row[key]) for key in ("x1", "y1", "x2", "y2")] for row in table[:2]] == BOXES
    assert [table[0][key] for key in ("width", "height", "score", "seed_row", "seed_col")] == [
        "60",
        "40",
        "0.75",
        "1",
        "2",
    ]
    assert [row["image_id"] for row in table] == ["a.jpg", "a.jpg", "b.jpg", "c.jpg"]
    assert table[2]["x1"] == table[2]["error"] == ""
    assert table[3]["error"] == "'=c.jpg: gone"


@given(image_id=UNUSUAL)
def test_no_cell_is_a_formula_and_ids_come_back(image_id: str) -> None:
    prediction = {"image_id": image_id, "boxes": [], "error": "gone"}
    found = ExportSet((), tuple(_predictions(prediction)))
    text = as_csv(found)
    cell = parse(text)[0]["image_id"]
    assert not cell.startswith(("=", "+", "-", "@", "\t", "\r"))
    assert cell.removeprefix("'") == image_id.encode("utf-8", "backslashreplace").decode("utf-8")


def _predictions(fields: dict[str, Any]) -> list[Any]:
    from lostreg.runs.predictions import Prediction

    return [Prediction(**fields)]


# Label Studio


def test_tasks_hold_boxes_in_percent_and_point_at_their_images(tmp_path: Path, collection: ExportSet) -> None:
    tasks = json.loads(as_text(as_tasks(collection)))
    for task, name in zip(tasks, [*NAMES[:-1], MENDED], strict=True):
        prefix, path = task["data"]["image"].split("?d=")
        assert prefix == "/data/local-files/"
        assert unquote(path, errors="strict") == name
        (prediction,) = task["predictions"]
        assert prediction["score"] == 0.75
        assert len({region["id"] for region in prediction["result"]}) == 2
        for region, box in zip(prediction["result"], BOXES, strict=True):
            assert (region["type"], region["from_name"], region["to_name"]) == ("rectanglelabels", "label", "image")
            assert (region["original_width"], region["original_height"]) == (WIDTH, HEIGHT)
            assert region["value"]["rectanglelabels"] == ["object"]
            x, y, wide, high = (region["value"][key] for key in ("x", "y", "width", "height"))
            corners = np.array([x, y, x + wide, y + high]) / 100 * [WIDTH, HEIGHT, WIDTH, HEIGHT]
            assert corners == pytest.approx(box)


def test_the_configuration_names_what_the_tasks_use(tmp_path: Path) -> None:
    from xml.etree import ElementTree

    config = ElementTree.fromstring(labelling_config('a "b" <&>'))
    (task,) = as_tasks(collection_of(tmp_path, line()), 'a "b" <&>', "https://example.org/")
    region = task["predictions"][0]["result"][0]
    image, rectangles = config.find("Image"), config.find("RectangleLabels")
    assert image is not None
    assert rectangles is not None
    assert task["data"][str(image.get("value")).removeprefix("$")] == "https://example.org/a.jpg"
    assert (rectangles.get("name"), rectangles.get("toName")) == (region["from_name"], region["to_name"])
    assert [one.get("value") for one in rectangles] == region["value"]["rectanglelabels"]


@pytest.mark.parametrize(
    ("image_id", "name"),
    [
        (BROKEN, MENDED),
        ("\ud800.jpg", "_d800.jpg"),
        ("a\0b.jpg", "a_00b.jpg"),
        ("a\nb.jpg", "a\nb.jpg"),
        ("a\x01.jpg", "a\x01.jpg"),
        ("\ufffe.jpg", "\ufffe.jpg"),
        ("x" * 300 + ".jpg", "x" * 300 + ".jpg"),
        ("]]>.jpg", "]]>.jpg"),
    ],
)
def test_no_name_is_too_strange_for_any_format(tmp_path: Path, image_id: str, name: str) -> None:
    found = collection_of(tmp_path, line(image_id))
    voc.write(tmp_path / "voc", found, files="none")
    yolo.write(tmp_path / "yolo", found, files="none")
    assert len(load_voc(tmp_path / "voc")) == 1
    assert len(list((tmp_path / "yolo/labels").rglob("*.txt"))) == 1
    for number, text in enumerate((as_text(as_coco(found)), as_text(as_tasks(found)), as_csv(found))):
        write_file(tmp_path / f"{number}.txt", text)
        assert (tmp_path / f"{number}.txt").stat().st_size > 100
    coco, tasks = json.loads(as_text(as_coco(found))), json.loads(as_text(as_tasks(found)))
    assert coco["images"][0]["file_name"] == name
    assert unquote(tasks[0]["data"]["image"], errors="strict").endswith("?d=" + name)
    json.dumps(tasks, ensure_ascii=False).encode()  # no lone surrogates, which data bases refuse


@pytest.mark.parametrize("image_id", ["../../a.jpg", "/home/me/a.jpg", "//home/a.jpg", "b/../../a.jpg"])
def test_no_name_leads_out_of_the_images(tmp_path: Path, image_id: str) -> None:
    found = collection_of(tmp_path, line(image_id))
    assert as_coco(found)["images"][0]["file_name"] == "a.jpg"
    assert as_tasks(found)[0]["data"]["image"] == "/data/local-files/?d=a.jpg"
