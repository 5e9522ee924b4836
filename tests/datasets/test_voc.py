import json
from pathlib import Path

import numpy as np
import pytest

from lostreg.datasets import require_images
from lostreg.datasets.voc import find_voc, load_voc, main_class, read_voc
from lostreg.errors import DatasetError
from lostreg.images.files import SUFFIXES


def an_object(box: str, extra: str = "") -> str:
    xmin, ymin, xmax, ymax = box.split()
    return (
        f"<object><name>dog</name>{extra}<bndbox><xmax>{xmax}</xmax><xmin>{xmin}</xmin>"
        f"<ymin>{ymin}</ymin><ymax>{ymax}</ymax></bndbox></object>"
    )


def write_voc(root: Path, objects: dict[str, str], split: str = "trainval", suffix: str = ".jpg") -> Path:
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for stem, body in objects.items():
        (root / "Annotations" / f"{stem}.xml").write_text(f"<annotation>{body}</annotation>")
        (root / "JPEGImages" / f"{stem}{suffix}").touch()
    (root / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{stem}\n" for stem in objects))
    return root


DIFFICULT = "<difficult>1</difficult>"
TRUNCATED = "<truncated>1</truncated><difficult>0</difficult>"


def test_boxes_become_zero_based_with_exclusive_ends(tmp_path: Path) -> None:
    root = write_voc(tmp_path, {"b": an_object("1 2 30 40") + an_object("5 5 5 5"), "a": an_object("9 8 10 20")})
    benchmark = load_voc(root)
    assert [example.image_id for example in benchmark.examples] == ["b", "a"]
    boxes = benchmark.examples[0].boxes
    assert boxes.dtype == np.float64
    np.testing.assert_array_equal(boxes, [[0, 1, 30, 40], [4, 4, 5, 5]])
    assert benchmark.split == "trainval"
    assert benchmark.notes == ()


def test_fractional_corners_of_voc2012_are_kept(tmp_path: Path) -> None:
    root = write_voc(tmp_path, {"a": an_object("45.75 1 60.5 9")})
    np.testing.assert_array_equal(load_voc(root).examples[0].boxes, [[44.75, 0, 60.5, 9]])


def test_boxes_of_parts_are_not_objects(tmp_path: Path) -> None:
    inner = "<bndbox><xmin>2</xmin><ymin>2</ymin><xmax>3</xmax><ymax>3</ymax></bndbox>"
    part = f"<part><name>head</name>{inner}</part>"
    root = write_voc(tmp_path, {"a": an_object("1 1 9 9", part)})
    np.testing.assert_array_equal(load_voc(root).examples[0].boxes, [[0, 0, 9, 9]])


def test_an_object_with_a_box_only_in_its_part_is_an_error(tmp_path: Path) -> None:
    box = "<bndbox><xmin>2</xmin><ymin>2</ymin><xmax>3</xmax><ymax>3</ymax></bndbox>"
    root = write_voc(tmp_path, {"a": f"<object><part>{box}</part></object>"})
    with pytest.raises(DatasetError, match=r"a\.xml.*no <bndbox>"):
        load_voc(root)


def test_no_hard_drops_objects_and_then_images(tmp_path: Path) -> None:
    objects = {
        "a": an_object("1 1 5 5", DIFFICULT) + an_object("2 2 6 6"),
        "b": an_object("1 1 5 5", TRUNCATED),
        "c": an_object("1 1 5 5", DIFFICULT),
    }
    root = write_voc(tmp_path, objects)
    everything = load_voc(root)
    assert [len(example.boxes) for example in everything.examples] == [2, 1, 1]
    easy = load_voc(root, no_hard=True, expected=3)
    assert [example.image_id for example in easy.examples] == ["a"]
    np.testing.assert_array_equal(easy.examples[0].boxes, [[1, 1, 6, 6]])
    assert "2 of 3 images left out" in easy.notes[0]
    assert easy.fingerprint() != everything.fingerprint()


def test_no_hard_with_nothing_left_is_an_error(tmp_path: Path) -> None:
    root = write_voc(tmp_path, {"a": an_object("1 1 5 5", DIFFICULT)})
    with pytest.raises(DatasetError, match="difficult or truncated"):
        load_voc(root, no_hard=True)


def test_class_files_and_blank_lines_and_byte_order_marks(tmp_path: Path) -> None:
    root = write_voc(tmp_path, {"a": an_object("1 1 5 5"), "b": an_object("1 1 5 5")})
    (root / "ImageSets/Main/dog_val.txt").write_bytes(b"\xef\xbb\xbfb  1\r\n\r\na -1\r\n")
    assert [example.image_id for example in load_voc(root, "dog_val").examples] == ["b", "a"]


def test_stems_with_spaces_in_any_kind_of_split(tmp_path: Path) -> None:
    stems = ["my photo", "photo", "photo 1", "a  b -1", "line\u2028end"]
    root = write_voc(tmp_path, {stem: an_object("1 1 5 5") for stem in stems})
    assert [example.image_id for example in load_voc(root).examples] == stems
    lines = "my photo  1\nphoto -1\nphoto 1  1\na  b -1 0\nline\u2028end 1\n"
    (root / "ImageSets/Main/dog_val.txt").write_text(lines, "utf-8")
    assert [example.image_id for example in load_voc(root, "dog_val").examples] == stems
    (root / "Annotations" / "my photo.xml").unlink()
    with pytest.raises(DatasetError, match=r"1 of 5 annotation files are missing.*: my photo\.xml"):
        load_voc(root)


@pytest.mark.parametrize("empty", ["", "<size><width>9</width></size>"])
def test_images_without_objects_are_left_out_with_a_note(tmp_path: Path, empty: str) -> None:
    root = write_voc(tmp_path, {"a": an_object("1 1 5 5"), "b": empty, "c": empty})
    benchmark = load_voc(root, expected=3)
    assert [example.image_id for example in benchmark.examples] == ["a"]
    assert benchmark.left_out == {"b", "c"}
    assert benchmark.notes == ("2 of 3 images left out: they have no object",)
    (root / "ImageSets/Main/trainval.txt").write_text("b\nc\n")
    with pytest.raises(DatasetError, match=r"all 2 images of split 'trainval' .* have no object.*`lostreg discover`"):
        load_voc(root)


def test_namespaces_are_no_hindrance(tmp_path: Path) -> None:
    root = write_voc(tmp_path, {"a": ""})
    size = "<size><width>60</width><height>40</height></size>"
    body = f'<v:annotation xmlns:v="http://example.org/voc">{size}{an_object("1 1 5 5")}</v:annotation>'
    for text in (body.replace("v:", "").replace("xmlns:v", "xmlns"), body.replace("<", "<v:").replace("<v:/", "</v:")):
        (root / "Annotations/a.xml").write_text(text.replace("v:v:", "v:"))
        boxes, found = read_voc(root / "Annotations/a.xml")
        assert (boxes.tolist(), found) == ([[0, 0, 5, 5]], (60, 40))


@pytest.mark.parametrize("text", ["", "0", "-4", "4.5", "wide", "nan", "inf", "9" * 30])
def test_a_size_that_cannot_be_meant_is_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.xml"
    path.write_text(f"<annotation><size><width>{text}</width><height>40</height></size></annotation>", encoding="utf-8")
    assert read_voc(path)[1] is None


def test_every_ending_of_images_is_found(tmp_path: Path) -> None:
    root = write_voc(tmp_path, {f"a{ending[1:]}": an_object("1 1 5 5") for ending in SUFFIXES}, suffix="")
    for ending in SUFFIXES:
        (root / "JPEGImages" / f"a{ending[1:]}").rename(root / "JPEGImages" / f"a{ending[1:]}{ending.upper()}")
    require_images(load_voc(root))


def test_images_may_be_absent_and_take_the_suffix_that_exists(tmp_path: Path) -> None:
    root = write_voc(tmp_path, {stem: an_object("1 1 5 5") for stem in "abcd"})
    images = root / "JPEGImages"
    (images / "a.jpg").rename(images / "a.png")
    (images / "b.jpg").rename(images / "b.JPEG")
    (images / "c.png").touch()
    (images / "d.jpg").unlink()
    benchmark = load_voc(root)
    assert [example.path.name for example in benchmark.examples] == ["a.png", "b.JPEG", "c.jpg", "d.jpg"]
    with pytest.raises(DatasetError, match=r"1 of 4 images are missing.*d\.jpg"):
        require_images(benchmark)


def test_a_missing_image_folder_does_not_hinder_scoring(tmp_path: Path) -> None:
    root = write_voc(tmp_path, {"a": an_object("1 1 5 5")})
    (root / "JPEGImages/a.jpg").unlink()
    (root / "JPEGImages").rmdir()
    assert load_voc(root).examples[0].path == root / "JPEGImages/a.jpg"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("<annotation>", "not well-formed"),
        ("", "not well-formed"),
        ('<?xml version="1.0" encoding="no-such"?><annotation/>', "not well-formed"),
        ("<html><body/></html>", "expected a VOC <annotation>, found <html>"),
        ("<annotation><object/></annotation>", "no <bndbox>"),
        ("<annotation><object><bndbox><xmin>1</xmin></bndbox></object></annotation>", "must be numbers"),
        (f"<annotation>{an_object('1 1 five 5')}</annotation>", "must be numbers.*five"),
        (f"<annotation>{an_object('1 1 nan 5')}</annotation>", "must be finite"),
        (f"<annotation>{an_object('1 1 inf 5')}</annotation>", "must be finite"),
        (f"<annotation>{an_object('7 1 6 5')}</annotation>", "inside out"),
        (f"<annotation>{an_object('1 7 6 5')}</annotation>", "inside out"),
    ],
)
def test_broken_annotations_are_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "000042.xml"
    path.write_text(content)
    with pytest.raises(DatasetError, match=message) as caught:
        read_voc(path)
    assert str(path) in str(caught.value)


def test_a_broken_box_of_a_dropped_object_is_still_an_error(tmp_path: Path) -> None:
    root = write_voc(tmp_path, {"a": an_object("1 1 5 5") + an_object("9 9 1 1", DIFFICULT)})
    with pytest.raises(DatasetError, match="inside out"):
        load_voc(root, no_hard=True)


def test_missing_annotations_are_counted_in_one_message(tmp_path: Path) -> None:
    root = write_voc(tmp_path, {f"{number:02d}": an_object("1 1 5 5") for number in range(9)})
    for number in range(1, 8):
        (root / f"Annotations/{number:02d}.xml").unlink()
    with pytest.raises(DatasetError, match=r"7 of 9 .*01\.xml.* and 2 more"):
        load_voc(root)


def test_the_count_must_be_the_expected_one(tmp_path: Path) -> None:
    root = write_voc(tmp_path, {"a": an_object("1 1 5 5")})
    assert len(load_voc(root, expected=1)) == 1
    with pytest.raises(DatasetError, match=r"expected 5011 images.*found 1 in"):
        load_voc(root, expected=5011)


def test_splits_that_are_missing_empty_or_repeat_an_image(tmp_path: Path) -> None:
    root = write_voc(tmp_path, {"a": an_object("1 1 5 5")})
    with pytest.raises(DatasetError, match=r"no split 'val'.*there are trainval"):
        load_voc(root, "val")
    (root / "ImageSets/Main/val.txt").write_text("a\na\n")
    with pytest.raises(DatasetError, match="lists 1 images twice: a"):
        load_voc(root, "val")
    (root / "ImageSets/Main/val.txt").write_text("\n")
    with pytest.raises(DatasetError, match="lists no image"):
        load_voc(root, "val")
    (root / "ImageSets/Main/val.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(DatasetError, match="cannot read the split file"):
        load_voc(root, "val")


def test_a_folder_without_the_layout_is_described(tmp_path: Path) -> None:
    (tmp_path / "cats").mkdir()
    with pytest.raises(DatasetError, match=r"looked for .*Annotations and ImageSets/Main; .* has cats"):
        load_voc(tmp_path)
    with pytest.raises(DatasetError, match="does not exist"):
        load_voc(tmp_path / "nowhere")
    with pytest.raises(DatasetError, match="is empty"):
        load_voc(tmp_path / "cats")


@pytest.mark.parametrize("above", ["", "VOC2012", "VOCdevkit/VOC2012", "TrainVal/VOCdevkit/VOC2012"])
def test_find_voc_from_any_height(tmp_path: Path, above: str) -> None:
    folder = write_voc(tmp_path / above, {"a": an_object("1 1 5 5")})
    assert find_voc(tmp_path, 2012) == folder


def test_find_voc_does_not_take_another_year(tmp_path: Path) -> None:
    folder = write_voc(tmp_path / "VOCdevkit/VOC2012", {"a": an_object("1 1 5 5")})
    assert find_voc(folder, 2012) == folder
    with pytest.raises(DatasetError, match="no VOC2007 below"):
        find_voc(folder, 2007)
    with pytest.raises(DatasetError, match="TrainVal/VOCdevkit/VOC2007"):
        find_voc(tmp_path, 2007)


def test_the_demo_of_voc07_has_the_published_boxes(shared_data: Path) -> None:
    benchmark = load_voc(find_voc(shared_data / "voc07-demo", 2007), expected=5)
    require_images(benchmark)
    published = json.loads((shared_data / "voc07/trainval_boxes.json").read_text())
    for example in benchmark.examples:
        corners = [entry["bndbox"] for entry in published[f"{example.image_id}.jpg"]]
        np.testing.assert_array_equal(example.boxes, np.array(corners) - [1, 1, 0, 0])


def test_all_of_voc07_trainval_rebuilt_from_the_published_boxes(tmp_path: Path, shared_data: Path) -> None:
    published = json.loads((shared_data / "voc07/trainval_boxes.json").read_text())
    objects = {
        name.removesuffix(".jpg"): "".join(
            an_object(" ".join(map(str, entry["bndbox"])), f"<difficult>{entry['difficult']}</difficult>")
            for entry in entries
        )
        for name, entries in published.items()
    }
    benchmark = load_voc(write_voc(tmp_path, objects), expected=5011)
    assert sum(len(example.boxes) for example in benchmark.examples) == sum(map(len, published.values()))


def test_the_main_class_is_that_of_the_largest_object(tmp_path: Path) -> None:
    small, large = an_object("1 1 30 30"), an_object("5 5 35 35", DIFFICULT).replace("dog", " potted plant\n")
    part = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part></object>"
    path = tmp_path / "a.xml"
    for body in (small + large, large + small, large.replace("</object>", part) + small):
        path.write_text(f"<annotation><folder>VOC</folder>{body}</annotation>")
        assert main_class(path) == "potted plant"
    path.write_text(f"<annotation>{small}{small.replace('dog', 'cat')}</annotation>")
    assert main_class(path) == "dog"  # of equal ones the first


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("<annotation>", "not well-formed XML"),
        (f"<annotation>{an_object('1 1 5 5').replace('<name>dog</name>', '')}</annotation>", "without a <name>"),
        (f"<annotation>{an_object('1 1 5 5').replace('dog', ' ')}</annotation>", "without a <name>"),
        (f"<annotation>{an_object('9 9 5 5')}</annotation>", "empty or inside out"),
        ("<annotation><object><name>dog</name></object></annotation>", "has no <bndbox>"),
    ],
)
def test_main_classes_of_malformed_files_are_refused(tmp_path: Path, body: str, message: str) -> None:
    (tmp_path / "a.xml").write_text(body)
    with pytest.raises(DatasetError, match=rf"a\.xml.*{message}"):
        main_class(tmp_path / "a.xml")
    with pytest.raises(DatasetError, match="cannot read"):
        main_class(tmp_path / "none.xml")
