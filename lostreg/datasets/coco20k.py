"""COCO 20k: the 19,817 images of COCO train2014 that work on object discovery reports.

The annotations are one file of 333 MB. It is read once; what lostreg needs of it is then kept as a
small JSON file in the user's cache folder.
"""

import contextlib
import hashlib
import json
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from lostreg.datasets.base import Benchmark, Example, cache_folder, name_some
from lostreg.datasets.coco import Boxes, CocoBoxes, make_coco, read_coco
from lostreg.errors import DatasetError
from lostreg.jsonio import write_whole

COCO20K_COUNT = 19_817
ANNOTATIONS = "annotations/instances_train2014.json"
ANNOTATIONS_BYTES = 332_556_225
"""Of the one edition there is, as the published archive's catalogue has it. No SHA-256 of it alone is published."""

_CACHE_VERSION = 2  # raise it when the meaning of a cached box changes


def load_coco20k(root: Path, *, name: str = "coco20k") -> Benchmark:
    """Load COCO 20k from a folder with COCO 2014.

    Args:
        root: the folder that holds ``annotations`` and ``train2014``, or the one above it if it is
            called ``coco``. The images may be absent.
        name: what the benchmark calls itself.

    Returns:
        The examples in the published order, boxes as `lostreg.datasets.coco.load_coco` makes them.

    Raises:
        DatasetError: if the annotations are missing or malformed, or lack one of the images.
    """
    base = find_coco20k(root)
    ids = coco20k_ids()
    boxes = _load_boxes(base / ANNOTATIONS, ids)
    examples = [
        Example(image_id, base / coco20k_file_name(image_id), *found)
        for image_id, found in zip(ids, boxes, strict=True)
        if len(found.objects)
    ]
    return make_coco(name, ids, examples)


def find_coco20k(root: Path) -> Path:
    """The folder of ``root`` and ``root/coco`` that holds the train2014 annotations.

    Raises:
        DatasetError: if neither does; the message lists both files.
    """
    places = [root, root / "coco"]
    for place in places:
        with contextlib.suppress(OSError):  # such as a folder that must not be entered
            if (place / ANNOTATIONS).is_file():
                return place
    tried = " and ".join(str(place / ANNOTATIONS) for place in places)
    raise DatasetError(f"no COCO 2014 annotations below {root}: looked for {tried}")


def coco20k_ids() -> tuple[int, ...]:
    """The published image ids, in their published order (package data)."""
    text = resources.files("lostreg.datasets").joinpath("coco_20k.txt").read_text(encoding="ascii")
    ids = tuple(int(line) for line in text.split())
    if len(ids) != COCO20K_COUNT:
        raise DatasetError(f"coco20k: expected {COCO20K_COUNT} ids in lostreg's own list, found {len(ids)}")
    return ids


def coco20k_file_name(image_id: int) -> str:
    """Where COCO 2014 keeps an image, relative to its folder."""
    return f"train2014/COCO_train2014_{image_id:012d}.jpg"


def coco20k_sizes(annotations: Path) -> dict[int, tuple[int, int]]:
    """Width and height in pixels of the published images, by id, as the annotations file has them.

    Raises:
        DatasetError: if the file is missing or malformed, or lacks one of the images or its size.
    """
    images, _ = read_coco(annotations, keep=coco20k_ids())
    sizes = {image_id: image.size for image_id, image in images.items() if image.size}
    if missing := [str(image_id) for image_id in images if image_id not in sizes]:
        raise DatasetError(
            f"{annotations} lacks width and height of {len(missing)} of the {len(images)} images wanted: "
            f"{name_some(missing)}"
        )
    return sizes


def _load_boxes(annotations: Path, ids: tuple[int, ...]) -> list[CocoBoxes]:
    """Boxes in the order of ``ids``, from the cache where it fits and else from the annotations."""
    source = _source(annotations)
    cache = _cache_file(source)
    boxes = _read_cache(cache, source, ids)
    if boxes is None:
        _, by_id = read_coco(annotations, keep=ids)
        boxes = [by_id[image_id] for image_id in ids]
        _write_cache(cache, source, ids, boxes)
    return boxes


def _source(annotations: Path) -> list[str | int]:
    """What tells one annotations file from another without reading it."""
    try:
        facts = annotations.stat()
        return [str(annotations.resolve()), facts.st_size, facts.st_mtime_ns]
    except OSError as error:
        raise DatasetError(f"cannot read the COCO annotations {annotations}: {error}") from error


def _cache_file(source: list[str | int]) -> Path | None:
    """Where the boxes of this source are cached; None where the user has no home folder."""
    folder = cache_folder()
    if folder is None:
        return None
    key = hashlib.sha256(json.dumps(source).encode()).hexdigest()[:24]
    return folder / f"coco20k-{key}.json"


def _read_cache(cache: Path | None, source: list[str | int], ids: tuple[int, ...]) -> list[CocoBoxes] | None:
    """The cached boxes, or None where there is no cache or it is not exactly what is wanted."""
    if cache is None:
        return None
    try:
        content = json.loads(cache.read_bytes())
        same = [content["version"], content["source"], content["ids"]] == [_CACHE_VERSION, source, list(ids)]
        if not same:
            return None
        boxes = [CocoBoxes(*map(_as_boxes, rows)) for rows in zip(content["boxes"], content["crowds"], strict=True)]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    return boxes if len(boxes) == len(ids) else None


def _as_boxes(rows: Any) -> Boxes:
    boxes: Boxes = np.asarray(rows, dtype=np.float64)
    if boxes.size and (boxes.ndim != 2 or boxes.shape[1] != 4 or not np.isfinite(boxes).all()):
        raise ValueError(f"expected boxes, found shape {boxes.shape}")
    return boxes.reshape(-1, 4)


def _write_cache(cache: Path | None, source: list[str | int], ids: tuple[int, ...], boxes: list[CocoBoxes]) -> None:
    """Write the cache in one step; a folder that cannot be written is no reason to stop."""
    if cache is None:
        return
    content = {
        "version": _CACHE_VERSION,
        "source": source,
        "ids": list(ids),
        "boxes": [found.objects.astype(np.int64).tolist() for found in boxes],
        "crowds": [found.crowds.astype(np.int64).tolist() for found in boxes],
    }
    with contextlib.suppress(OSError):
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_whole(cache, json.dumps(content, separators=(",", ":")))
