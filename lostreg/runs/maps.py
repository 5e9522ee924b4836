"""The maps file of a run: JSON Lines beside the predictions, with what pictures of the results need and boxes lack."""

import base64
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from lostreg.checks import shown
from lostreg.datasets.base import ImageId
from lostreg.errors import PredictionsError
from lostreg.images.stores import StoredImage
from lostreg.inference.discovery import Discovery
from lostreg.jsonio import as_line, is_box, is_finite_number, is_id, whole_file

_MOST_PATCHES: Final = 1 << 22  # of an image: patches of eight pixels on 268 million
_ROUNDED: Final = 1.0  # pixels that a side may be off, since a patch's is rounded


@dataclass(frozen=True)
class ImageMaps:
    """One line of a maps file: one image that could be read.

    Attributes:
        image_id: as in the predictions file.
        path: of the image file, absolute; or `StoredImage.locator`.
        degrees: connections of each patch, shape (h, w), int64.
        patch_width: of a patch, in pixels of the original image.
        patch_height: of a patch, in pixels of the original image.
        exif: whether the file's EXIF orientation was applied.
        truth: ground-truth boxes, ``[x1, y1, x2, y2]`` in pixels; None where there is no ground truth.
        candidates: what the objects were chosen from, ``[x1, y1, x2, y2, score]``, best first; None where nothing was
            compared. See `Discovery`.
        objectness: how likely each patch is part of an object, in 255ths, shape (h, w), uint8; None where nothing was
            taught.
    """

    image_id: ImageId
    path: str
    degrees: NDArray[np.int64]
    patch_width: float
    patch_height: float
    exif: bool = True
    truth: Sequence[Sequence[float]] | None = None
    candidates: Sequence[Sequence[float]] | None = None
    objectness: NDArray[np.uint8] | None = None

    def covers(self, width: int, height: int) -> bool:
        """Whether these are patches of an image of that size: as many as cover it, and no more."""
        sides = zip(self.degrees.shape, (self.patch_height, self.patch_width), (height, width), strict=True)
        return all((count - 1) * patch - _ROUNDED < side < count * patch + _ROUNDED for count, patch, side in sides)

    def to_line(self) -> str:
        """The JSON object, without a line break; maps are deflated and in base64, degrees as little-endian uint32."""
        fields: dict[str, Any] = {
            "image_id": self.image_id,
            "path": self.path,
            "grid": list(self.degrees.shape),
            "patch": [round(self.patch_width, 6), round(self.patch_height, 6)],
            "exif": self.exif,
            "degrees": _pack(self.degrees.astype("<u4")),
        }
        if self.truth is not None:
            fields["truth"] = [[float(value) for value in box] for box in self.truth]
        if self.candidates is not None:
            fields["candidates"] = [list(candidate) for candidate in self.candidates]
        if self.objectness is not None:
            fields["objectness"] = _pack(self.objectness)
        return as_line(fields)


def maps_of(image_id: ImageId, source: Path | StoredImage, found: Discovery, truth: Any = None) -> ImageMaps:
    """The line for one image's discovery.

    Args:
        image_id: as in the predictions file.
        source: the image file, or where the image is kept.
        found: what was found in it.
        truth: ground-truth boxes, shape (m, 4); None where there is no ground truth.
    """
    boxes = None if truth is None else np.asarray(truth, dtype=float).tolist()
    return ImageMaps(
        image_id,
        _place_of(source),
        found.degrees,
        found.patch_width,
        found.patch_height,
        found.exif,
        boxes,
        None if found.candidates is None else found.candidates.astype(float).round(3).tolist(),
        None if found.objectness is None else np.rint(255 * found.objectness).astype(np.uint8),
    )


def _place_of(source: Path | StoredImage) -> str:
    """Where an image is, as a maps file says it: without ``..``, and without following links."""
    return source.locator if isinstance(source, StoredImage) else os.path.abspath(source)  # noqa: PTH100


def move_maps(path: Path, source_of: Callable[[Any], Path | StoredImage]) -> None:
    """Make a maps file say where its images are now; it is written anew only if one is elsewhere.

    Args:
        path: of the file; it need not be there.
        source_of: what an image is read from, by its id.
    """

    def moved(raw: bytes) -> bytes:
        try:
            fields = json.loads(raw)
            place = _place_of(source_of(fields["image_id"]))
            return raw if fields["path"] == place else as_line({**fields, "path": place}).encode() + b"\n"
        except (ValueError, TypeError, KeyError, RecursionError):  # `read_maps` names it
            return raw

    if not path.exists():
        return
    with path.open("rb") as file:
        if not any(moved(raw) != raw for raw in file):
            return
        file.seek(0)
        with whole_file(path) as beside, beside.open("wb") as rewritten:
            rewritten.writelines(map(moved, file))


def read_maps(path: Path) -> Iterator[ImageMaps]:
    """The lines of a maps file, one by one; a last line that its writer did not finish is left out.

    Raises:
        PredictionsError: if the file cannot be read, or a line is malformed; it names the line.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.endswith(b"\n") and line.strip():
                    yield _parse(line, f"{path}, line {number}")
    except OSError as error:
        raise PredictionsError(f"cannot read the maps {path}: {error.strerror}") from error


def _parse(line: bytes, where: str) -> ImageMaps:
    try:
        fields = json.loads(line)
        (rows, columns), (wide, high) = fields["grid"], fields["patch"]
        for name, is_sound in _SOUND.items():
            if not is_sound(fields.get(name)):
                raise ValueError(f"{name} is {shown(fields.get(name))}")
        degrees = _unpack(fields["degrees"], rows, columns, "<u4").astype(np.int64)
        objectness = fields.get("objectness")
        return ImageMaps(
            fields["image_id"],
            fields["path"],
            degrees,
            wide,
            high,
            fields["exif"],
            fields.get("truth"),
            fields.get("candidates"),
            None if objectness is None else _unpack(objectness, rows, columns, "u1"),
        )
    except (ValueError, TypeError, KeyError, zlib.error, RecursionError) as error:
        raise PredictionsError(f"{where}: expected maps as `lostreg discover` writes them ({error})") from error


def _pack(values: NDArray[Any]) -> str:
    return base64.b64encode(zlib.compress(values.tobytes(), 1)).decode("ascii")  # higher levels gain nothing


def _unpack(text: str, rows: int, columns: int, kind: str) -> NDArray[Any]:
    if rows * columns > _MOST_PATCHES:
        raise ValueError(f"{rows} x {columns} are more patches than any image has")
    size = np.dtype(kind).itemsize * rows * columns
    content = zlib.decompressobj().decompress(base64.b64decode(text), size + 1)  # no more, whatever it promises
    if len(content) != size:
        raise ValueError(f"a map is not of {rows} x {columns} patches")
    return np.frombuffer(content, dtype=kind).reshape(rows, columns)


def _is_candidate(value: Any) -> bool:
    return isinstance(value, list) and is_box(value[:-1]) and is_finite_number(value[-1]) and 0 <= value[-1] <= 1


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and bool(value) and "\0" not in value and bool(os.fsencode(value))


_SOUND: Final[dict[str, Callable[[Any], bool]]] = {
    "image_id": is_id,
    "path": _is_path,
    "exif": lambda value: isinstance(value, bool),
    "grid": lambda value: all(type(count) is int and count >= 1 for count in value),
    "patch": lambda value: all(is_finite_number(side) and side >= 1 for side in value),
    "truth": lambda value: value is None or (isinstance(value, list) and all(map(is_box, value))),
    "candidates": lambda value: value is None or (isinstance(value, list) and all(map(_is_candidate, value))),
}
