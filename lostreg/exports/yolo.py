"""YOLO: a folder with images, a label file for each, and the data.yaml that Ultralytics trains with."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from lostreg.exports.items import ExportBox, ExportImage, ExportSet
from lostreg.exports.names import Names, escaped
from lostreg.exports.pictures import Placing, Plan, Reader, place, plan_all
from lostreg.exports.writing import put
from lostreg.progress import OnProgress, Progress

READER: Final = Reader(kinds=("JPEG", "PNG", "WEBP", "BMP", "TIFF"), turns=True)
VAL_SHARE: Final = 0.2
_LEAST_SIDE: Final = 1e-6  # what six decimals still hold: readers drop a box without width or height


def write(
    folder: Path,
    collection: ExportSet,
    *,
    label: str = "object",
    files: Placing = "copy",
    val_share: float = VAL_SHARE,
    on_progress: OnProgress = lambda _: None,
) -> int:
    """Fill a folder with ``images/train``, ``images/val``, ``labels/train``, ``labels/val`` and ``data.yaml``.

    Folders of the images are kept below these.

    Args:
        folder: that is filled.
        collection: what is exported.
        label: of the one class.
        files: what becomes of the image files.
        val_share: about how much of the images goes to ``val``, see `choose_val`.
        on_progress: called after each image.

    Returns:
        How many images were encoded anew, because OpenCV or Ultralytics read them differently or not at all.

    Raises:
        ImageError: if an image cannot be read.
        PredictionsError: if an image is missing or another.
        OSError: if something cannot be written.
    """
    names = Names(reserved="images")
    val = choose_val([str(image.image_id) for image in collection.images], val_share)
    plans = plan_all(collection.images, READER, files)
    for index, (image, what) in enumerate(zip(collection.images, plans, strict=True)):
        stem = f"{'val' if index in val else 'train'}/{names.stem(image.name)}"
        _put_image(folder, stem, image, what, files)
        on_progress(Progress(index + 1, len(plans)))
    put(folder / "data.yaml", _data(label, has_val=bool(val)))
    return sum(what.encode for what in plans if what)


def _put_image(folder: Path, stem: str, image: ExportImage, what: Plan | None, files: Placing) -> None:
    if what:
        place(what, folder / "images" / (stem + what.suffix), files)
    put(folder / "labels" / f"{stem}.txt", "".join(_row(image, box) for box in image.boxes))


def choose_val(ids: Sequence[str], share: float) -> set[int]:
    """Which images validate: those whose id's hash falls into the share, so that more images move none of these.

    Args:
        ids: of the images.
        share: in [0, 1).

    Returns:
        Indices; at least one, and not all, where the share is above 0 and there are two images or more.
    """
    places = [int.from_bytes(hashlib.sha256(escaped(one).encode()).digest()[:8], "big") / 2**64 for one in ids]
    chosen = {index for index, drawn in enumerate(places) if drawn < share}
    if share > 0 and len(ids) > 1:
        ranked = sorted(range(len(ids)), key=lambda index: places[index])
        chosen = (chosen | {ranked[0]}) - {ranked[-1]}
    return chosen if len(ids) > 1 else set()


def _row(image: ExportImage, box: ExportBox) -> str:
    x1, y1, x2, y2 = box.xyxy
    centre_x, centre_y = (x1 + x2) / 2 / image.width, (y1 + y2) / 2 / image.height
    width, height = (max(side, _LEAST_SIDE) for side in ((x2 - x1) / image.width, (y2 - y1) / image.height))
    return f"0 {centre_x:.6f} {centre_y:.6f} {width:.6f} {height:.6f}\n"


def _data(label: str, *, has_val: bool) -> str:
    """The YAML, whose paths are relative to where it lies; a JSON string is one of YAML too."""
    return (
        "# Boxes found by lostreg, without labels: one class.\n"
        "train: images/train\n"
        f"val: images/{'val' if has_val else 'train'}\n"
        f"names:\n  0: {json.dumps(label, ensure_ascii=False)}\n"
    )
