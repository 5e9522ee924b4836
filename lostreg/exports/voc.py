"""PASCAL VOC: a folder with an XML file an image, the images, and the list of them."""

import math
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Final

from lostreg.exports.items import Box, ExportImage, ExportSet
from lostreg.exports.names import Names, file_name, xml_text
from lostreg.exports.pictures import Placing, Plan, Reader, place, plan_all
from lostreg.exports.writing import put
from lostreg.progress import OnProgress, Progress

READER: Final = Reader(kinds=("JPEG", "PNG"), turns=False)
SPLIT: Final = "trainval"


def write(
    folder: Path,
    collection: ExportSet,
    *,
    label: str = "object",
    files: Placing = "copy",
    on_progress: OnProgress = lambda _: None,
) -> int:
    """Fill a folder in VOC layout, as `lostreg eval voc` reads it.

    Folders of the images become part of their names. Corners are whole, 1-based and inclusive.

    Args:
        folder: that is filled.
        collection: what is exported.
        label: of every object.
        files: what becomes of the image files.
        on_progress: called after each image.

    Returns:
        How many images were encoded anew: those that are no JPEG or PNG files, such as frames of videos, have an EXIF
        orientation, or would be read differently.

    Raises:
        ImageError: if an image cannot be read.
        PredictionsError: if an image is missing or another.
        OSError: if something cannot be written.
    """
    names = Names(flat=True)
    plans = plan_all(collection.images, READER, files)
    stems = []
    for image, what in zip(collection.images, plans, strict=True):
        stems.append(names.stem(image.name))
        _put_image(folder, stems[-1], image, what, files=files, label=label)
        on_progress(Progress(len(stems), len(plans)))
    put(folder / "ImageSets" / "Main" / f"{SPLIT}.txt", "".join(f"{stem}\n" for stem in stems))
    return sum(what.encode for what in plans if what)


def _put_image(folder: Path, stem: str, image: ExportImage, what: Plan | None, *, files: Placing, label: str) -> None:
    suffix = what.suffix if what else xml_text(Path(file_name(image.name)).suffix) or ".jpg"
    if what:
        place(what, folder / "JPEGImages" / (stem + suffix), files)
    put(folder / "Annotations" / f"{stem}.xml", _xml(image, stem + suffix, label))


def whole_corners(box: Box, width: int, height: int) -> tuple[int, int, int, int]:
    """A box in whole, 1-based, inclusive corners: each edge goes to the nearest, and one pixel stays.

    Args:
        box: pixels, exclusive right and bottom edges, within the image.
        width: of the image.
        height: of the image.
    """
    left, right = _whole_edges(box[0], box[2], width)
    top, bottom = _whole_edges(box[1], box[3], height)
    return left + 1, top + 1, right, bottom


def _whole_edges(low: float, high: float, size: int) -> tuple[int, int]:
    first, end = math.floor(low + 0.5), math.floor(high + 0.5)
    if first < end:
        return first, end
    middle = min(math.floor((low + high) / 2), size - 1)
    return middle, middle + 1


def _xml(image: ExportImage, filename: str, label: str) -> str:
    root = ET.Element("annotation")
    _add(root, {"folder": "JPEGImages", "filename": filename})
    _add(ET.SubElement(root, "source"), {"database": "lostreg", "image": xml_text(image.name)})
    _add(ET.SubElement(root, "size"), {"width": image.width, "height": image.height, "depth": 3})
    _add(root, {"segmented": 0})
    for box in image.boxes:
        item = ET.SubElement(root, "object")
        _add(item, {"name": label, "pose": "Unspecified", "truncated": 0, "difficult": 0})
        corners = whole_corners(box.xyxy, image.width, image.height)
        _add(ET.SubElement(item, "bndbox"), dict(zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True)))
    ET.indent(root)
    return ET.tostring(root, encoding="unicode") + "\n"


def _add(parent: ET.Element, fields: dict[str, str | int]) -> None:
    for name, value in fields.items():
        ET.SubElement(parent, name).text = str(value)
