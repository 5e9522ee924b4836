"""Boxes are scored in the frame that their annotations fit: stored pixels, or turned ones."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import disc_picture
from fabricate import encoded, turned_block, with_exif

from lostreg.datasets import choose_frames, load_benchmark
from lostreg.datasets.base import Benchmark
from lostreg.images.decode import read_image

STORED, TURNED = (60, 40), (40, 60)


def coco(folder: Path, *images: tuple[int, tuple[int, int] | None], square: bool = False) -> Benchmark:
    """Images of given EXIF orientations, with annotations of given sizes."""
    pixels = disc_picture(40, 40) if square else disc_picture(*STORED)
    entries = []
    for number, (orientation, size) in enumerate(images):
        content = with_exif(encoded(pixels, "JPEG"), turned_block(orientation))
        (folder / f"{number}.jpg").write_bytes(content)
        entries.append({"id": number, "file_name": f"{number}.jpg"})
        if size:
            entries[-1].update(width=size[0], height=size[1])
    boxes = [{"id": entry["id"] + 1, "image_id": entry["id"], "bbox": [1, 1, 20, 20]} for entry in entries]
    (folder / "boxes.json").write_text(json.dumps({"images": entries, "annotations": boxes}))
    return load_benchmark("coco", images=folder, annotations=folder / "boxes.json")


@pytest.mark.parametrize(
    ("images", "turned", "notes"),
    [
        ([(1, STORED)], [False], []),
        ([(6, STORED)], [False], ["1 of 1 images with an EXIF orientation are taken as they are stored"]),
        ([(6, TURNED)], [True], ["1 of 1 images are turned as their EXIF orientation says (the size"]),
        ([(5, TURNED), (8, STORED)], [True, False], ["1 of 2 images are turned", "1 of 2 images with an EXIF"]),
        # What sizes do not tell is as most of the others are, else as stored.
        ([(3, STORED)], [False], ["1 of 1 images with", "of these, 1 are taken as stored though sizes do not"]),
        ([(3, STORED), (6, TURNED)], [True, True], ["2 of 2 images are turned", "of these, 1 are taken as turned"]),
        ([(6, None), (7, TURNED)], [True, True], ["2 of 2 images are turned", "of these, 1 are taken as turned"]),
        ([(6, None)], [False], ["1 of 1 images with", "of these, 1 are taken as stored"]),
        ([(1, TURNED)], [False], ["1 images have another size than their annotations say, such as 0.jpg: 60x40, not"]),
        ([(6, (600, 400))], [False], ["1 of 1 images with", "of these, 1", "1 images have another size"]),
    ],
)  # fmt: skip
def test_the_frame_that_sizes_fit_is_chosen_and_told(
    tmp_path: Path, images: list[tuple[int, tuple[int, int]]], turned: list[bool], notes: list[str]
) -> None:
    benchmark = choose_frames(coco(tmp_path, *images))
    assert [example.exif for example in benchmark.examples] == turned
    assert len(benchmark.notes) == len(notes)
    for told, expected in zip(benchmark.notes, notes, strict=True):
        assert told.startswith(expected)
    for example in benchmark.examples:
        expected_pixels = read_image(example.path, exif=example.exif).pixels
        np.testing.assert_array_equal(read_image(example.source, exif=not example.exif).pixels, expected_pixels)


@pytest.mark.parametrize("exif", [True, False])
def test_who_says_which_frame_it_is_gets_it(tmp_path: Path, exif: bool) -> None:
    benchmark = choose_frames(coco(tmp_path, (6, TURNED), (3, None), (6, STORED), (1, STORED)), exif)
    assert [example.exif for example in benchmark.examples] == [exif, exif, exif, False]
    assert ("(--exif)" in benchmark.notes[0]) is exif
    assert "1 images have another size" in benchmark.notes[-1]


def test_a_square_does_not_tell(tmp_path: Path) -> None:
    assert not choose_frames(coco(tmp_path, (6, (40, 40)), square=True)).examples[0].exif


def test_images_that_cannot_be_read_are_left_to_the_run(tmp_path: Path) -> None:
    benchmark = coco(tmp_path, (6, TURNED), (6, TURNED))
    (tmp_path / "0.jpg").write_bytes(b"no image")
    assert [example.exif for example in choose_frames(benchmark).examples] == [False, True]


@pytest.mark.parametrize(
    ("width", "height", "turned"),
    [
        (40.0, 60.0, True),
        ("40", "60", True),
        (40.5, 60, False),
        (0, 60, False),
        (10**400, 60, False),
        ([40], 60, False),
        (None, None, False),
    ],
)
def test_sizes_of_any_type_count_where_they_can_be_meant(
    tmp_path: Path, width: object, height: object, turned: bool
) -> None:
    coco(tmp_path, (6, TURNED))
    content = json.loads((tmp_path / "boxes.json").read_text())
    content["images"][0].update(width=width, height=height)
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    benchmark = load_benchmark("coco", images=tmp_path, annotations=tmp_path / "boxes.json")
    assert choose_frames(benchmark).examples[0].exif is turned


def test_the_size_of_a_voc_file_counts_likewise(tmp_path: Path) -> None:
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "JPEGImages" / "a.jpg").write_bytes(with_exif(encoded(disc_picture(*STORED), "JPEG"), turned_block()))
    (tmp_path / "ImageSets/Main/trainval.txt").write_text("a\n")
    box = "<object><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></object>"
    for size, turned in (
        ("<width>40</width><height>60</height>", True),
        ("<width>60</width><height>40</height>", False),
        ("<width>40.0</width><height> 60 </height>", True),
        ("<width>40.5</width><height>60</height>", False),
        ("<width>nan</width><height>60</height>", False),
        ("<height>60</height>", False),
    ):
        (tmp_path / "Annotations" / "a.xml").write_text(f"<annotation><size>{size}</size>{box}</annotation>")
        assert choose_frames(load_benchmark("voc", root=tmp_path)).examples[0].exif is turned
