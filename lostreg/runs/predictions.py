"""The predictions file: JSON Lines, one image a line, appended as it is computed and safe to cut anywhere."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lostreg.datasets.base import ImageId
from lostreg.errors import PredictionsError
from lostreg.images.rle import Rle, encode_rle
from lostreg.inference.discovery import Discovery
from lostreg.jsonio import as_line, is_box, is_finite_number, is_id


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
        masks: one a box, in COCO's compressed run-length encoding; None where masks were not asked for.
        error: why there are no boxes, for an image that could not be read.
    """

    image_id: ImageId
    boxes: Sequence[Sequence[float]]
    width: int = 0
    height: int = 0
    scores: Sequence[float] = ()
    seeds: Sequence[Sequence[int]] = ()
    masks: Sequence[Rle] | None = None
    error: str | None = None

    @property
    def has_scores(self) -> bool:
        """Whether each box has a score that can be compared: a line that a person has edited may hold anything."""
        scores = self.scores
        return (
            isinstance(scores, Sequence)
            and len(scores) == len(self.boxes)
            and all(is_finite_number(score) for score in scores)
        )

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
        if self.masks is not None:
            fields["masks"] = list(self.masks)
        if self.error is not None:
            fields["error"] = self.error
        return as_line(fields)


def from_discovery(image_id: ImageId, found: Discovery, *, masks: bool = False) -> Prediction:
    """The line for one image's discovery, its numbers rounded as the file holds them; with masks if asked for."""
    return Prediction(
        image_id,
        [[_short(value) for value in box] for box in found.xyxy.tolist()],
        found.width,
        found.height,
        [_short(value) for value in found.scores.tolist()],
        found.seeds.tolist(),
        [encode_rle(found.pixel_mask(index)) for index in range(len(found))] if masks else None,
    )


def from_error(image_id: ImageId, error: Exception, path: Path | None = None) -> Prediction:
    """The line for an image that could not be read; without its folder, if its path is given.

    Where images lie is no part of a result: the same run from another place writes the same.
    """
    reason = str(error)
    return Prediction(image_id, (), error=reason if path is None else reason.replace(str(path), path.name))


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
    found = list(_parse_lines(content.splitlines(), path))
    if not found:
        raise PredictionsError(f"{path} holds no predictions: expected one JSON object a line")
    return found


def stream_predictions(path: Path) -> Iterator[Prediction]:
    """The predictions of a file, one by one; a last line that its writer did not finish is left out.

    Raises:
        PredictionsError: if the file cannot be read, or a line is malformed; it names the line.
    """
    try:
        with path.open("rb") as file:
            yield from _parse_lines(file, path, may_be_cut=True)
    except OSError as error:
        raise PredictionsError(f"cannot read predictions {path}: {error.strerror}") from error


def parse_prediction(line: bytes) -> Prediction:
    """One line of a file.

    Raises:
        ValueError: if it is no JSON, or a field has a value that cannot be.
        TypeError: if a field is of another type than it should be.
    """
    return _parse(json.loads(line))


def _parse_lines(lines: Iterable[bytes], path: Path, *, may_be_cut: bool = False) -> Iterator[Prediction]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield parse_prediction(line)
            except (ValueError, TypeError, OverflowError, RecursionError) as error:
                if may_be_cut and not line.endswith(b"\n"):
                    return
                raise PredictionsError(
                    f"{path}, line {number}: expected an object with image_id and boxes ({error})"
                ) from error


def _parse(fields: Any) -> Prediction:
    if not isinstance(fields, dict):
        raise TypeError(f"found {type(fields).__name__}")
    image_id, boxes = fields.get("image_id"), fields.get("boxes")
    if not is_id(image_id):
        raise TypeError(f"image_id is {image_id!r}")
    if not isinstance(boxes, list) or not all(is_box(box) for box in boxes):
        raise TypeError("boxes is not a list of [x1, y1, x2, y2]")
    return Prediction(
        image_id,
        boxes,
        fields.get("width", 0),
        fields.get("height", 0),
        fields.get("scores", ()),
        fields.get("seeds", ()),
        fields.get("masks"),
        fields.get("error"),
    )
