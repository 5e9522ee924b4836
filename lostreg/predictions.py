"""The predictions file: JSON Lines, one image a line, appended as it is computed and safe to cut anywhere."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lostreg.datasets.base import ImageId
from lostreg.errors import PredictionsError
from lostreg.regions import Discovery
from lostreg.runs import as_line, whole_lines


@dataclass(frozen=True)
class Prediction:
    """One line of a predictions file.

    Attributes:
        image_id: file stem for VOC, integer id for COCO.
        boxes: ``[x1, y1, x2, y2]`` each, in pixels, best first; none for an image that could not be read.
        width: of the image, in pixels; 0 where unknown.
        height: of the image, in pixels; 0 where unknown.
        scores: one a box, in [0, 1].
        seeds: patch row and column, one pair a box.
        error: why there are no boxes, for an image that could not be read.
    """

    image_id: ImageId
    boxes: Sequence[Sequence[float]]
    width: int = 0
    height: int = 0
    scores: Sequence[float] = ()
    seeds: Sequence[Sequence[int]] = ()
    error: str | None = None

    def to_line(self) -> str:
        """The JSON object, without a line break."""
        fields: dict[str, Any] = {
            "image_id": self.image_id,
            "width": self.width,
            "height": self.height,
            "boxes": [[_short(value) for value in box] for box in self.boxes],
            "scores": [_short(value) for value in self.scores],
            "seeds": [list(seed) for seed in self.seeds],
        }
        if self.error is not None:
            fields["error"] = self.error
        return as_line(fields)


def from_discovery(image_id: ImageId, found: Discovery) -> Prediction:
    """The line for one image's discovery, its numbers rounded as the file holds them."""
    return Prediction(
        image_id,
        [[_short(value) for value in box] for box in found.xyxy.tolist()],
        found.width,
        found.height,
        [_short(value) for value in found.scores.tolist()],
        found.seeds.tolist(),
    )


def from_error(image_id: ImageId, error: Exception) -> Prediction:
    """The line for an image that could not be read."""
    return Prediction(image_id, (), error=str(error))


def _short(value: float) -> float | int:
    """At most three decimals, and none where there is nothing behind the point: patches end on whole pixels."""
    rounded = round(float(value), 3)
    return int(rounded) if rounded.is_integer() else rounded


def read_predictions(path: Path) -> list[Prediction]:
    """All predictions of a file.

    Raises:
        PredictionsError: if the file is missing or empty, or a line is cut or malformed; it names the line.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise PredictionsError(f"cannot read predictions {path}: {error.strerror}") from error
    found = list(_parse_lines(content, path))
    if not found:
        raise PredictionsError(f"{path} holds no predictions: expected one JSON object a line")
    return found


def recover_predictions(path: Path) -> list[Prediction]:
    """The whole lines of a file whose writer may have been killed; what it left of a line is cut off the file.

    Raises:
        PredictionsError: if a whole line is malformed: lostreg did not write it.
    """
    return list(_parse_lines(whole_lines(path), path))


def _parse_lines(content: bytes, path: Path) -> Iterator[Prediction]:
    for number, line in enumerate(content.splitlines(), start=1):
        if line.strip():
            try:
                yield _parse(json.loads(line))
            except (ValueError, TypeError, OverflowError, RecursionError) as error:
                raise PredictionsError(
                    f"{path}, line {number}: expected an object with image_id and boxes ({error})"
                ) from error


def _parse(fields: Any) -> Prediction:
    if not isinstance(fields, dict):
        raise TypeError(f"found {type(fields).__name__}")
    image_id, boxes = fields.get("image_id"), fields.get("boxes")
    if not isinstance(image_id, str | int) or isinstance(image_id, bool):
        raise TypeError(f"image_id is {image_id!r}")
    if not isinstance(boxes, list) or not all(_is_box(box) for box in boxes):
        raise TypeError("boxes is not a list of [x1, y1, x2, y2]")
    return Prediction(
        image_id,
        boxes,
        fields.get("width", 0),
        fields.get("height", 0),
        fields.get("scores", ()),
        fields.get("seeds", ()),
        fields.get("error"),
    )


def _is_box(box: Any) -> bool:
    return (
        isinstance(box, list)
        and len(box) == 4
        and all(type(value) in (int, float) and math.isfinite(value) for value in box)
    )
