"""What a page holds of one image: a small JPEG, what is drawn on it, and the maps that its large view needs."""

import base64
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import cv2
import numpy as np
from numpy.typing import NDArray

from lostreg.datasets.lake import stored_at
from lostreg.errors import ImageError, PredictionsError
from lostreg.images.decode import read_image
from lostreg.images.rle import rle_area, sample_rle
from lostreg.images.stores import StoredImage
from lostreg.runs.decisions import boxes_fingerprint
from lostreg.runs.locate import find_below
from lostreg.runs.maps import ImageMaps
from lostreg.runs.predictions import Prediction
from lostreg.runs.reader import Shown

SIDE: Final = 480
QUALITY: Final = 75
MOST_PATCHES: Final = (
    1 << 16
)  # of a degree map, which takes 175 kB there, or twice as much; a page goes without larger ones
_MASK_SIDE: Final = 320


@dataclass(frozen=True)
class Entry:
    """One image as the page holds it.

    Attributes:
        card: what the overview needs, for JSON.
        maps: what only the large view needs, for JSON.
        jpeg: the picture; empty where its file cannot be read any more.
    """

    card: dict[str, Any]
    maps: dict[str, Any]
    jpeg: bytes


def make_entry(shown: Shown, images: Path | None, *, exif: bool, max_pixels: int) -> Entry:
    """Read one image's file, if it is still there, and gather what was found in it.

    Args:
        shown: the image.
        images: the folder that ids are relative to; None takes the recorded paths.
        exif: whether the image is turned as its EXIF orientation says, where no maps tell.
        max_pixels: a file with more pixels is not decoded.
    """
    prediction, maps = shown.prediction, shown.maps
    jpeg, actual = b"", None
    path, note = _find(prediction.image_id, maps, images)
    if path is not None:
        try:
            picture = read_image(path, max_side=SIDE, exif=maps.exif if maps else exif, max_pixels=max_pixels)
            jpeg, actual, note = _encode(picture.pixels), (picture.width, picture.height), ""
        except ImageError as error:
            note = str(error).replace(str(path), path.name)
    known = (prediction.width, prediction.height)
    width, height = size = known if all(known) else actual or _reach(prediction)
    if actual and actual != size:
        note = f"the file has changed since the run: it was {width}x{height} and is {actual[0]}x{actual[1]}"
    known_size = size if all(known) or actual else None
    return Entry(_card(shown, size, note), _maps(prediction, maps, known_size), jpeg)


def _find(image_id: str | int, maps: ImageMaps | None, images: Path | None) -> tuple[Path | StoredImage | None, str]:
    """Where an image should be; else why nothing says so."""
    if images is None:
        if maps is None:
            return None, "no line in the maps file says where the image is"
        return stored_at(str(image_id), maps.path) or Path(maps.path), ""
    path = find_below(images, image_id, maps.path if maps else None)
    return path, "" if path else f"{image_id}: no such file in {images.name or images}"


def _encode(pixels: NDArray[np.uint8]) -> bytes:
    options = [cv2.IMWRITE_JPEG_QUALITY, QUALITY, cv2.IMWRITE_JPEG_OPTIMIZE, 1]
    return cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), options)[1].tobytes()


def _card(shown: Shown, size: tuple[int, int], note: str) -> dict[str, Any]:
    prediction, maps = shown.prediction, shown.maps
    name = _readable(str(prediction.image_id))
    fields: dict[str, Any] = {
        "number": shown.number,
        "name": name,
        "fingerprint": boxes_fingerprint(prediction),
        "size": list(size),
        "boxes": [[round(value, 2) for value in box] for box in prediction.boxes],
        "scores": list(prediction.scores) or [None] * len(prediction.boxes),
        "seeds": [list(seed) for seed in prediction.seeds],
    }
    if prediction.image_id != name:
        fields["id"] = prediction.image_id
    if maps is not None:
        fields["patch"] = [maps.patch_width, maps.patch_height]
        fields["truth"] = maps.truth
        fields["hit"] = shown.hit
    if note:
        fields["note"] = _readable(note)
    return fields


def _maps(prediction: Prediction, maps: ImageMaps | None, size: tuple[int, int] | None) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if maps is not None and maps.candidates is not None:
        fields["candidates"] = [[*(round(side, 2) for side in box), score] for *box, score in maps.candidates]
    if maps is not None and maps.degrees.size <= MOST_PATCHES and (size is None or maps.covers(*size)):
        kind = "<u2" if maps.degrees.max(initial=0) < 1 << 16 else "<u4"
        fields["grid"] = list(maps.degrees.shape)
        fields["degrees"] = base64.b64encode(maps.degrees.astype(kind).tobytes()).decode("ascii")
        if maps.objectness is not None:
            fields["objectness"] = base64.b64encode(maps.objectness.tobytes()).decode("ascii")
    if prediction.masks:
        fields["masks"] = [small_mask(mask, size=size and size[::-1]) for mask in prediction.masks]
    return fields


def _reach(prediction: Prediction) -> tuple[int, int]:
    """How far the boxes reach, for an image whose size is not known."""
    corners = np.array(prediction.boxes).reshape(-1, 4)[:, 2:].max(axis=0, initial=1)
    right, bottom = np.ceil(corners).clip(1, 1e6).astype(int).tolist()
    return right, bottom


def small_mask(rle: Any, side: int = _MASK_SIDE, size: tuple[int, int] | None = None) -> dict[str, Any] | None:
    """A mask at a page's size.

    Args:
        rle: as COCO has it, of the whole image.
        side: the longer side of the result at most, in pixels.
        size: (height, width) of the image; None where that is not known.

    Returns:
        ``size``, [height, width], and ``runs``, the lengths of runs down the columns, zeros first; None for what is
        no mask, or not one of this image.
    """
    try:
        rle_area(rle, size)
    except PredictionsError:
        return None
    height, width = rle["size"]
    scale = min(1.0, side / max(height, width))
    high, wide = max(1, round(height * scale)), max(1, round(width * scale))
    rows = ((np.arange(high) + 0.5) * height / high).astype(np.int64)
    columns = ((np.arange(wide) + 0.5) * width / wide).astype(np.int64)
    return {"size": [high, wide], "runs": _runs(sample_rle(rle, rows, columns).T.ravel())}


def _runs(values: NDArray[np.bool_]) -> list[int]:
    """Lengths of runs, zeros first."""
    edges = np.flatnonzero(np.diff(values)) + 1
    lengths: list[int] = np.diff(np.concatenate([[0], edges, [len(values)]])).tolist()
    return [0, *lengths] if values[0] else lengths


def _readable(text: str) -> str:
    """A text that can be shown: a file name that is not UTF-8 has lone surrogates, here as escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
