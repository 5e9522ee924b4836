"""Image files in exported folders: as they are where readers take them so, else encoded anew."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from exporting import HEIGHT, TURNED, WIDTH, collect, line, save, upright, write_lines, write_run
from fabricate import exif_block, turned_block, with_exif
from PIL import Image, ImageOps

from lostreg.errors import ImageError, PredictionsError
from lostreg.exports import voc, yolo
from lostreg.exports.items import ExportImage
from lostreg.exports.pictures import Plan, Reader, place, plan
from lostreg.images.decode import read_image
from lostreg.runs.locate import Source
from lostreg.runs.maps import ImageMaps

KINDS: dict[str, tuple[str, dict[str, Any], str]] = {
    # name: how it is saved, and what becomes of it for YOLO
    "plain.jpg": ("RGB", {}, "plain.jpg"),
    "grey.jpeg": ("L", {}, "grey.jpeg"),
    "cmyk.JPG": ("CMYK", {}, "cmyk.JPG"),
    "turned.jpg": ("RGB", {"exif": TURNED}, "turned.jpg"),
    "phone.jpg": ("RGB", {"format": "MPO", "frames": 2}, "phone.jpg"),
    "clear.png": ("RGBA", {}, "new .png"),
    "hole.png": ("P", {"transparency": 0}, "new .png"),
    "deep.png": ("I;16", {}, "new .png"),
    "palette.png": ("P", {}, "palette.png"),
    "misnamed.jpg": ("RGB", {"format": "PNG"}, "misnamed.png"),
    "still.webp": ("RGB", {}, "still.webp"),
    "plain.bmp": ("RGB", {}, "plain.bmp"),
    "plain.tif": ("RGB", {}, "plain.tif"),
    "turned.png": ("RGB", {"exif": TURNED}, "new .png"),
    "turned.webp": ("RGB", {"exif": TURNED, "lossless": True}, "new .png"),
    "turned.tif": ("RGB", {"exif": TURNED}, "new .png"),
    "moving.webp": ("RGB", {"lossless": True, "frames": 2}, "new .png"),
    "moving.png": ("RGB", {"frames": 2}, "new .png"),
    "pages.tif": ("RGB", {"frames": 2}, "new .png"),
    "cmyk.tif": ("CMYK", {}, "new .png"),
    "moving.gif": ("P", {"frames": 2}, "new .png"),
    "misnamed-too.jpg": ("RGB", {"format": "PPM"}, "new .png"),
}


def image_of(path: Path, exif: bool | None = None, **fields: Any) -> ExportImage:
    """The image of a file as a predictions file has it."""
    height, width = upright(path).shape[:2]
    fields = {"width": width, "height": height, **fields}
    predictions = write_lines(
        path.parent / "run", [line(path.name, boxes=[[0, 0, 9, 9]], scores=[], seeds=[], **fields)]
    )
    if exif is not None:
        maps = ImageMaps(path.name, str(path), np.zeros((3, 4), np.int64), 14.0, 14.0, exif)
        predictions.with_name("maps.jsonl").write_text(maps.to_line() + "\n")
    return collect(predictions, path.parent).images[0]


def made(what: Plan, folder: Path, how: Any = "copy") -> Path:
    target = folder / "made" / f"image{what.suffix}"
    place(what, target, how)
    return target


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_is_read_by_opencv_as_people_see_it(tmp_path: Path, name: str) -> None:
    mode, options, expected = KINDS[name]
    path = save(tmp_path / name, mode=mode, **options)
    what = plan(image_of(path), yolo.READER)
    target = made(what, tmp_path)
    assert (f"new {what.suffix}" if what.encode else Path(name).stem + what.suffix) == expected
    assert what.encode or target.read_bytes() == path.read_bytes()
    pixels = cv2.imread(str(target))
    assert pixels is not None
    assert pixels.shape == upright(path).shape
    if mode in ("RGB", "L"):  # others' colours are each reader's own
        assert np.abs(pixels[:, :, ::-1].astype(int) - upright(path)).mean() < 2


@pytest.mark.parametrize("name", KINDS)
def test_for_voc_files_are_jpeg_or_png_and_upright_as_stored(tmp_path: Path, name: str) -> None:
    mode, options, _ = KINDS[name]
    path = save(tmp_path / name, mode=mode, **options)
    target = made(plan(image_of(path), voc.READER), tmp_path)
    assert target.suffix.lower() in (".jpg", ".jpeg", ".png")
    with Image.open(target) as image:
        assert image.format in ("JPEG", "MPO", "PNG")
        assert image.size == upright(path).shape[1::-1]
        assert image.getexif().get(0x0112, 1) == 1


ODD = {
    "text as resolution": [exif_block((0x112, 3, 1, b"\6\0\0\0"), (0x11A, 2, 4, b"abc\0"))],
    "byte as unit": [exif_block((0x112, 3, 1, b"\6\0\0\0"), (0x128, 1, 1, b"\2\0\0\0"))],
    "orientation as byte": [exif_block((0x112, 1, 1, b"\6\0\0\0"))],
    "two orientations": [turned_block(6), turned_block(1)],
    "orientation of no meaning": [turned_block(9)],
    "a broken make before it": [exif_block((0x10F, 2, 99, b"\0\xff\0\0"), (0x112, 3, 1, b"\6\0\0\0"))],
}


@pytest.mark.parametrize("reader", [yolo.READER, voc.READER], ids=["yolo", "voc"])
@pytest.mark.parametrize("kind", [*ODD, "XMP alone"])
def test_where_readers_would_differ_the_image_is_as_it_was_measured(tmp_path: Path, kind: str, reader: Reader) -> None:
    path = tmp_path / "odd.jpg"
    if kind == "XMP alone":
        save(path, xmp=b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>')
    else:
        path.write_bytes(with_exif(save(path).read_bytes(), *ODD[kind]))
    measured = read_image(path)
    source = Source(path, exif=True, name=path.name)
    target = made(
        plan(ExportImage("odd.jpg", "odd.jpg", measured.width, measured.height, (), source), reader), tmp_path
    )
    with Image.open(target) as image:
        assert ImageOps.exif_transpose(image).size == (measured.width, measured.height)
    pixels = cv2.imread(str(target))
    assert pixels is not None
    assert pixels.shape == measured.pixels.shape
    assert np.abs(pixels[:, :, ::-1].astype(int) - measured.pixels).mean() < 2


def test_boxes_in_stored_pixels_get_an_image_that_nobody_turns(tmp_path: Path) -> None:
    path = save(tmp_path / "turned.jpg", exif=TURNED)
    what = plan(image_of(path, exif=False, width=WIDTH, height=HEIGHT), yolo.READER)
    assert what.encode
    pixels = cv2.imread(str(made(what, tmp_path)))
    assert pixels is not None
    assert pixels.shape == (HEIGHT, WIDTH, 3)
    with Image.open(path) as stored:
        assert np.abs(pixels[:, :, ::-1].astype(int) - np.asarray(stored)).mean() < 2


def test_where_nobody_says_whether_boxes_are_turned_the_size_does(tmp_path: Path) -> None:
    path = save(tmp_path / "turned.jpg", exif=TURNED)
    assert plan(image_of(path), yolo.READER).exif
    assert not plan(image_of(path, width=WIDTH, height=HEIGHT), yolo.READER).exif


def test_links_lead_to_the_image_but_never_where_a_reader_would_mend_it(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jpg")
    target = made(plan(image_of(path), yolo.READER), tmp_path, "link")
    assert target.is_symlink()
    assert target.read_bytes() == path.read_bytes()
    target.unlink()
    path.write_bytes(path.read_bytes() + b"more")  # Ultralytics saves such a file anew
    assert not made(plan(image_of(path), yolo.READER), tmp_path, "link").is_symlink()


def test_an_image_of_another_size_is_not_the_one_that_was_searched(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jpg")
    with pytest.raises(PredictionsError, match="has 60x40 pixels, but the predictions say 120x80"):
        plan(image_of(path, width=120, height=80), yolo.READER)


def test_images_that_are_gone_or_broken_are_named(tmp_path: Path) -> None:
    image = image_of(save(tmp_path / "a.jpg"))
    (tmp_path / "a.jpg").write_text("no image")
    with pytest.raises(ImageError, match=r"a\.jpg: not a readable image"):
        plan(image, yolo.READER)
    run = write_run(tmp_path, ["b.jpg"])
    (tmp_path / "photos/b.jpg").unlink()
    with pytest.raises(PredictionsError, match=r"b\.jpg is not there: --images DIR"):
        plan(collect(run / "predictions.jsonl").images[0], yolo.READER)
    with pytest.raises(PredictionsError, match=r"no file found for image 'none\.jpg'"):
        plan(collect(write_lines(tmp_path, [line("none.jpg")])).images[0], yolo.READER)
