"""YOLO: a folder with images, a label file for each, and the data.yaml that Ultralytics trains with."""

import hashlib
import json
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np

from lostreg.datasets.video import VIDEOS
from lostreg.errors import LostregWarning
from lostreg.exports.items import ExportBox, ExportImage, ExportSet
from lostreg.exports.names import Names, escaped
from lostreg.exports.pictures import Placing, Reader, place, plan_all
from lostreg.exports.writing import put
from lostreg.images.masks import outlines
from lostreg.images.rle import decode_rle
from lostreg.progress import OnProgress, Progress

READER: Final = Reader(kinds=("JPEG", "PNG", "WEBP", "BMP", "TIFF"), turns=True)
VAL_SHARE: Final = 0.2
_FRAME: Final = re.compile(rf"(.*(?:{'|'.join(map(re.escape, VIDEOS))}))#\d+", re.IGNORECASE | re.DOTALL)
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

    Folders of the images are kept below these. Where an object has a mask, all rows are polygons, since Ultralytics
    takes a data set either for segmentation or for detection: of the mask's outline or, without a mask, of the box. A
    polygon is one piece without holes: that of the largest piece, see `lostreg.images.masks.outlines`.

    Args:
        folder: that is filled.
        collection: what is exported.
        label: of the one class.
        files: what becomes of the image files.
        val_share: about how much of the images goes to ``val``, see `choose_val`.
        on_progress: called after each image.

    Returns:
        How many images were encoded anew, because OpenCV or Ultralytics read them differently or not at all, as they
        do frames of videos.

    Warns:
        LostregWarning: if a polygon leaves out pieces of its mask, or no image is left for ``val``.

    Raises:
        ImageError: if an image cannot be read.
        PredictionsError: if an image is missing or another.
        OSError: if something cannot be written.
    """
    names = Names(reserved="images")
    val = choose_val([str(image.image_id) for image in collection.images], val_share)
    plans = plan_all(collection.images, READER, files)
    rows = _Rows(collection)
    for index, (image, what) in enumerate(zip(collection.images, plans, strict=True)):
        stem = f"{'val' if index in val else 'train'}/{names.stem(image.name)}"
        if what:
            place(what, folder / "images" / (stem + what.suffix), files)
        put(folder / "labels" / f"{stem}.txt", "".join(rows.row(image, box) for box in image.boxes))
        on_progress(Progress(index + 1, len(plans)))
    put(folder / "data.yaml", _data(label, has_val=bool(val)))
    if val_share > 0 and len(plans) > 1 and not val:
        message = "all images are frames of one video, which is not divided: data.yaml validates with those to train on"
        warnings.warn(message, LostregWarning, stacklevel=2)
    if rows.cut:
        message = f"{rows.cut} masks are of several pieces, of which a YOLO polygon holds the largest alone"
        warnings.warn(message, LostregWarning, stacklevel=2)
    return sum(what.encode for what in plans if what)


def choose_val(ids: Sequence[str], share: float) -> set[int]:
    """Which images validate: those whose id's hash falls into the share, so that more images move none of these.

    Frames of a video are nearly alike, so that all of them go where the video's name does.

    Args:
        ids: of the images.
        share: in [0, 1).

    Returns:
        Indices; at least one, and not all, where the share is above 0 and there are two images or videos or more.
    """
    whole = [frame[1] if (frame := _FRAME.fullmatch(one)) else one for one in ids]
    places = {one: int.from_bytes(hashlib.sha256(escaped(one).encode()).digest()[:8], "big") / 2**64 for one in whole}
    chosen = {one for one, drawn in places.items() if drawn < share}
    if share > 0 and len(places) > 1:
        ranked = sorted(places, key=places.__getitem__)
        chosen = (chosen | {ranked[0]}) - {ranked[-1]}
    return {index for index, one in enumerate(whole) if one in chosen} if len(places) > 1 else set()


class _Rows:
    """Rows of label files.

    Args:
        collection: what is exported.

    Attributes:
        cut: how many masks have lost pieces.
    """

    def __init__(self, collection: ExportSet) -> None:
        self._has_masks = any(box.mask is not None for image in collection.images for box in image.boxes)
        self.cut = 0

    def row(self, image: ExportImage, box: ExportBox) -> str:
        """One object: a box or, where there are masks, a polygon."""
        if not self._has_masks:
            return _box_row(image, box)
        x1, y1, x2, y2 = box.xyxy
        points = [(x1, y1), (x2, y1), (x2, y2), (x1, y2)]
        if box.mask is not None and box.mask_area:
            pieces = outlines(decode_rle(box.mask, max_pixels=image.width * image.height))
            self.cut += len(pieces) > 1
            if np.ptp(pieces[0], axis=0).all():  # readers drop what has no area
                points = pieces[0].tolist()
        return "0 " + " ".join(f"{x / image.width:.6f} {y / image.height:.6f}" for x, y in points) + "\n"


def _box_row(image: ExportImage, box: ExportBox) -> str:
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
