"""COCO: one JSON with images, annotations and one category."""

from importlib import metadata
from pathlib import Path
from typing import Any

from lostreg.exports.items import ExportBox, ExportImage, ExportSet
from lostreg.exports.names import utf8_name
from lostreg.exports.writing import as_text, write_file

CATEGORY = 1


def write(out: Path, collection: ExportSet, label: str = "object") -> int:
    """Write the file; see `as_coco`."""
    write_file(out, as_text(as_coco(collection, label)))
    return 0


def as_coco(collection: ExportSet, label: str = "object") -> dict[str, Any]:
    """The data set as `pycocotools.coco.COCO` reads it; ``annotations`` alone are what its ``loadRes`` reads.

    Images keep their ids where all of them are whole numbers, else they are counted from 1. ``bbox`` is the box of the
    predictions. ``segmentation`` is the mask, where there is one, and ``area`` its pixels: a box around the mask would
    be another. Bytes of a name that are not UTF-8 are replaced, see `lostreg.exports.names.utf8_name`.

    Args:
        collection: what is exported.
        label: name of the one category.
    """
    numbers = _image_numbers(collection.images)
    annotations = [
        _annotation(box, image_number)
        for image, image_number in zip(collection.images, numbers, strict=True)
        for box in image.boxes
    ]
    return {
        "info": {"description": "boxes found by lostreg, without labels", "version": metadata.version("lostreg")},
        "licenses": [],
        "categories": [{"id": CATEGORY, "name": label, "supercategory": ""}],
        "images": [
            {"id": number, "file_name": utf8_name(image.name), "width": image.width, "height": image.height}
            for image, number in zip(collection.images, numbers, strict=True)
        ],
        "annotations": [{"id": number, **fields} for number, fields in enumerate(annotations, start=1)],
    }


def _image_numbers(images: tuple[ExportImage, ...]) -> list[int]:
    numbers = [image.image_id for image in images if isinstance(image.image_id, int)]
    return numbers if len(numbers) == len(images) else list(range(1, len(images) + 1))


def _annotation(box: ExportBox, image_number: int) -> dict[str, Any]:
    x1, y1, x2, y2 = box.xyxy
    width, height = round(x2 - x1, 6), round(y2 - y1, 6)
    fields: dict[str, Any] = {
        "image_id": image_number,
        "category_id": CATEGORY,
        "bbox": [x1, y1, width, height],
        "area": round(width * height, 6),
        "iscrowd": 0,
    }
    if box.mask is not None:
        fields["area"] = box.mask_area
        fields["segmentation"] = box.mask
    if box.score is not None:
        fields["score"] = box.score
    return fields
