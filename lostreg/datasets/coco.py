"""Benchmarks in the format of COCO: a folder of images and one JSON file of boxes."""

import contextlib
import io
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lostreg.checks import FARTHEST
from lostreg.datasets.base import Benchmark, Example, name_some, read_size
from lostreg.errors import DatasetError

Boxes = NDArray[np.float64]


class CocoBoxes(NamedTuple):
    """The boxes of one image, shape (n, 4) with n >= 0, float64: of objects, and of crowds."""

    objects: Boxes
    crowds: Boxes


class CocoImage(NamedTuple):
    """An entry of the list of images: where its file is, and its (width, height) where the entry has them."""

    file_name: str
    size: tuple[int, int] | None


def load_coco(images: Path, annotations: Path, *, name: str = "coco", keep: Sequence[int] | None = None) -> Benchmark:
    """Load a COCO instances file.

    Crowd boxes are kept apart and corners rounded to integers, halves to even: ``x1, y1`` from ``x, y``
    and ``x2, y2`` from ``x + w, y + h``.

    Args:
        images: the folder that the ``file_name`` entries are relative to; it may be absent.
        annotations: JSON with the lists ``images`` and ``annotations``.
        name: what the benchmark calls itself.
        keep: image ids to load, in the order wanted, or None for all in file order.

    Returns:
        The examples; ids are COCO's integers. Images with no box are left out with a note.

    Raises:
        DatasetError: if the file is missing, not JSON, not of this structure, has no boxes, or lacks
            ids in ``keep``.
    """
    entries, boxes = read_coco(annotations, keep=keep)
    examples = [
        Example(image_id, images / entry.file_name, *boxes[image_id], size=entry.size)
        for image_id, entry in entries.items()
        if len(boxes[image_id].objects)
    ]
    return make_coco(name, entries, examples)


def read_coco(path: Path, *, keep: Sequence[int] | None = None) -> tuple[dict[int, CocoImage], dict[int, CocoBoxes]]:
    """Read the images and their rounded boxes, both by image id.

    Args:
        path: a COCO instances file.
        keep: image ids to read, in the order wanted, or None for all in file order.

    Returns:
        The images in the order described, and for the same ids the boxes, in pixels, ``x1, y1, x2, y2``.

    Raises:
        DatasetError: as `load_coco`.
    """
    content = _read_json(path)
    images = _images(content["images"], path)
    if keep is not None:
        missing = [str(image_id) for image_id in keep if image_id not in images]
        if missing:
            raise DatasetError(
                f"{path} lacks {len(missing)} of the {len(keep)} images wanted, ids {name_some(missing)}"
            )
        images = {image_id: images[image_id] for image_id in keep}
    entries = _object_entries(content["annotations"], images, path)
    if all(entry["iscrowd"] for entry in entries):
        raise DatasetError(
            f"{path} has no boxes for its {len(images)} images "
            f"({len(content['annotations'])} annotations, none of them usable: crowd or of other images); "
            "`lostreg discover` finds objects where there are no annotations"
        )
    index = _index(images, entries)
    return images, {image_id: _boxes_of(index.imgToAnns[image_id]) for image_id in images}


def main_categories(path: Path) -> dict[str, str]:
    """The category of the largest object of each image of an annotations file, crowd left out.

    Returns:
        File names, as the file has them, to names of categories; images without objects are missing.

    Raises:
        DatasetError: as `load_coco`, and if a category is missing or has no name.
    """
    content = _read_json(path)
    images = _images(content["images"], path)
    try:
        categories = {entry["id"]: str(entry["name"]) for entry in content["categories"]}
        by_place = [categories[entry["category_id"]] for entry in content["annotations"]]
    except (KeyError, TypeError) as error:
        raise DatasetError(f"{path}: every annotation must be of a category with an id and a name ({error})") from error
    largest: dict[int, tuple[float, str]] = {}
    for entry in _object_entries(content["annotations"], images, path):
        if entry["iscrowd"]:
            continue
        size = entry["bbox"][2] * entry["bbox"][3]
        if size > largest.get(entry["image_id"], (-1.0, ""))[0]:
            largest[entry["image_id"]] = (size, by_place[entry["id"]])
    return {images[image_id].file_name: category for image_id, (_, category) in largest.items()}


def make_coco(name: str, ids: Iterable[int], examples: Sequence[Example]) -> Benchmark:
    """A benchmark without a split, with a note on the ``ids`` that have no box, if there are any."""
    listed = frozenset(ids)
    left_out = listed - {example.image_id for example in examples}
    note = f"{len(left_out)} of {len(listed)} images left out: they have no box, or only crowd boxes"
    return Benchmark(name, "", tuple(examples), (note,) if left_out else (), left_out)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise DatasetError(f"cannot read the COCO annotations {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise DatasetError(
            f"{path}: expected a JSON object with the lists 'images' and 'annotations', got a {type(content).__name__}"
        )
    for key in ("images", "annotations"):
        if key not in content:
            raise DatasetError(f"{path} has no {key!r}; its keys are {name_some(list(content)) or 'none'}")
        if not isinstance(content[key], list):
            raise DatasetError(f"{path}: {key!r} must be a list, got a {type(content[key]).__name__}")
    if not content["images"]:
        raise DatasetError(f"{path} lists no images")
    return content


def _images(entries: Iterable[Any], path: Path) -> dict[int, CocoImage]:
    images: dict[int, CocoImage] = {}
    for position, entry in enumerate(entries):
        where = f"{path}: images[{position}]"
        if not isinstance(entry, dict):
            raise DatasetError(f"{where} must be an object, got a {type(entry).__name__}")
        image_id, file_name = entry.get("id"), entry.get("file_name")
        if type(image_id) is not int:
            raise DatasetError(f"{where}: 'id' must be an integer, got {image_id!r}")
        if not isinstance(file_name, str) or not file_name:
            raise DatasetError(f"{where}: 'file_name' must be a non-empty string, got {file_name!r}")
        if image_id in images:
            raise DatasetError(f"{where}: the id {image_id} was used before")
        images[image_id] = CocoImage(file_name, read_size(entry.get("width"), entry.get("height")))
    return images


def _object_entries(entries: Iterable[Any], wanted: Collection[int], path: Path) -> list[dict[str, Any]]:
    """The annotations that belong to a wanted image, checked and cut to the box."""
    kept = []
    for position, entry in enumerate(entries):
        where = f"{path}: annotations[{position}]"
        if not isinstance(entry, dict):
            raise DatasetError(f"{where} must be an object, got a {type(entry).__name__}")
        image_id = entry.get("image_id")
        if type(image_id) is not int:
            raise DatasetError(f"{where}: 'image_id' must be an integer, got {image_id!r}")
        if "bbox" not in entry:
            raise DatasetError(f"{where} has no 'bbox': is this an instances file?")
        crowd = entry.get("iscrowd", 0)
        if crowd not in (0, 1):
            raise DatasetError(f"{where}: 'iscrowd' must be 0 or 1, got {crowd!r}")
        if image_id in wanted:
            bbox = _check_bbox(entry["bbox"], where)
            kept.append({"id": position, "image_id": image_id, "iscrowd": crowd, "bbox": bbox})
    return kept


def _check_bbox(bbox: Any, where: str) -> list[float]:
    sound = (
        isinstance(bbox, list)
        and len(bbox) == 4
        and all(type(value) in (int, float) and abs(value) < FARTHEST for value in bbox)
    )
    if not sound or bbox[2] < 0 or bbox[3] < 0:
        raise DatasetError(f"{where}: 'bbox' must be four numbers x, y, width, height, got {bbox!r}")
    return [float(value) for value in bbox]


def _index(images: Collection[int], entries: list[dict[str, Any]]) -> Any:
    """A pycocotools index of already checked entries."""
    from pycocotools.coco import COCO

    index = COCO()
    index.dataset = {"images": [{"id": image_id} for image_id in images], "annotations": entries}
    with contextlib.redirect_stdout(io.StringIO()):  # it reports progress with print
        index.createIndex()
    return index


def _boxes_of(entries: Sequence[Mapping[str, Any]]) -> CocoBoxes:
    of_kind = [_round_boxes([entry for entry in entries if entry["iscrowd"] == kind]) for kind in (0, 1)]
    return CocoBoxes(*of_kind)


def _round_boxes(entries: Sequence[Mapping[str, Any]]) -> Boxes:
    """Corners from COCO's x, y, width, height, shape (n, 4), rounded half to even."""
    xywh = np.asarray([entry["bbox"] for entry in entries], dtype=np.float64).reshape(-1, 4)
    corners = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
    rounded: Boxes = np.rint(corners) + 0.0  # no negative zeros: they would change the fingerprint
    return rounded
