"""Label Studio: tasks with pre-annotations, and the labelling configuration that they need."""

from importlib import metadata
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

from lostreg.exports.items import ExportBox, ExportImage, ExportSet
from lostreg.exports.names import escaped, utf8_name
from lostreg.exports.writing import as_text, write_file

IMAGE_URL: Final = "/data/local-files/?d="
"""What Label Studio's local storage puts before a path below its document root."""

_FROM: Final = "label"
_TO: Final = "image"


def write(out: Path, collection: ExportSet, label: str = "object", image_url: str = IMAGE_URL) -> int:
    """Write the tasks, and beside them the labelling configuration, as .xml."""
    tasks = as_text(as_tasks(collection, label, image_url))
    write_file(out.with_suffix(".xml"), labelling_config(label))
    write_file(out, tasks)
    return 0


def labelling_config(label: str = "object") -> str:
    """The XML that goes into a project's labelling interface."""
    return (
        "<View>\n"
        f'  <Image name="{_TO}" value="${_TO}" zoom="true"/>\n'
        f'  <RectangleLabels name="{_FROM}" toName="{_TO}">\n'
        f"    <Label value={quoteattr(label)}/>\n"
        "  </RectangleLabels>\n"
        "</View>\n"
    )


def as_tasks(collection: ExportSet, label: str = "object", image_url: str = IMAGE_URL) -> list[dict[str, Any]]:
    """The tasks, one an image; images without a box have an empty prediction.

    Args:
        collection: what is exported.
        label: of the rectangles.
        image_url: what stands before the file's name, whose unsafe characters are escaped as URLs have it.
    """
    return [_task(image, label, image_url) for image in collection.images]


def _task(image: ExportImage, label: str, image_url: str) -> dict[str, Any]:
    prediction: dict[str, Any] = {
        "model_version": f"lostreg {metadata.version('lostreg')}",
        "result": [_region(image, box, number, label) for number, box in enumerate(image.boxes, start=1)],
    }
    if image.boxes and image.boxes[0].score is not None:
        prediction["score"] = image.boxes[0].score
    image_id = escaped(image.image_id) if isinstance(image.image_id, str) else image.image_id
    return {
        "data": {_TO: escaped(image_url) + quote(utf8_name(image.name)), "image_id": image_id},
        "predictions": [prediction],
    }


def _region(image: ExportImage, box: ExportBox, number: int, label: str) -> dict[str, Any]:
    x1, y1, x2, y2 = box.xyxy
    region: dict[str, Any] = {
        "id": f"box-{number}",
        "type": "rectanglelabels",
        "from_name": _FROM,
        "to_name": _TO,
        "original_width": image.width,
        "original_height": image.height,
        "image_rotation": 0,
        "value": {
            "x": 100 * x1 / image.width,
            "y": 100 * y1 / image.height,
            "width": 100 * (x2 - x1) / image.width,
            "height": 100 * (y2 - y1) / image.height,
            "rotation": 0,
            "rectanglelabels": [label],
        },
    }
    if box.score is not None:
        region["score"] = box.score
    return region
