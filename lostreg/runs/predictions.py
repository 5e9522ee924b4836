"""The predictions file: JSON Lines, one image a line, appended as it is computed and safe to cut anywhere.

Read is also what other programs write: a JSON list of such objects, or of COCO results, one a box.
"""

import json
from codecs import BOM_UTF8
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from lostreg.checks import FARTHEST, shown
from lostreg.datasets.base import ImageId
from lostreg.defaults import PREDICTIONS_FILE
from lostreg.errors import ImageUnavailableError, PredictionsError
from lostreg.images.rle import Rle
from lostreg.images.stores import StoredImage
from lostreg.inference.discovery import Discovery
from lostreg.jsonio import as_line, is_box, is_finite_number, is_id, short_number

_EXPECTED: Final = "expected an object with image_id and boxes"


@dataclass(frozen=True)
class Prediction:
    """One line of a predictions file; what is read from a file has been checked, see `parse_prediction`.

    Attributes:
        image_id: file stem for VOC, integer id for COCO, a path for photos.
        boxes: ``[x1, y1, x2, y2]`` each, in pixels, best first; none for an image that could not be read.
        width: of the image, in pixels; 0 where unknown.
        height: of the image, in pixels; 0 where unknown.
        scores: one a box, those of lostreg in [0, 1]; none where other programs have written none.
        seeds: patch row and column, one pair a box; or none.
        masks: one a box, in COCO's compressed run-length encoding; None where masks were not asked for.
        error: why there are no boxes, for an image that could not be read.
        unavailable: whether that was a passing fault, which says nothing of its pixels: see `ImageUnavailableError`.
    """

    image_id: ImageId
    boxes: Sequence[Sequence[float]]
    width: int = 0
    height: int = 0
    scores: Sequence[float] = ()
    seeds: Sequence[Sequence[int]] = ()
    masks: Sequence[Rle] | None = None
    error: str | None = None
    unavailable: bool = False

    @property
    def has_scores(self) -> bool:
        """Whether each box has a score."""
        return len(self.scores) == len(self.boxes)

    def to_line(self) -> str:
        """The JSON object, without a line break."""
        fields: dict[str, Any] = {
            "image_id": self.image_id,
            "width": self.width,
            "height": self.height,
            "boxes": [[short_number(value) for value in box] for box in self.boxes],
            "scores": [short_number(value) for value in self.scores],
            "seeds": [list(seed) for seed in self.seeds],
        }
        if self.masks is not None:
            fields["masks"] = list(self.masks)
        if self.error is not None:
            fields["error"] = self.error
        if self.unavailable:
            fields["unavailable"] = True
        return as_line(fields)


def from_discovery(image_id: ImageId, found: Discovery, *, masks: bool = False) -> Prediction:
    """The line for one image's discovery, its numbers rounded as the file holds them; with masks if asked for."""
    return Prediction(image_id, **found.to_dict(masks=masks))


def from_error(image_id: ImageId, error: Exception, source: Path | StoredImage | None = None) -> Prediction:
    """The line for an image that could not be read; without its folder, if its file is given.

    Where images lie is no part of a result: the same run from another place writes the same.
    """
    reason = str(error)
    reason = reason.replace(str(source), source.name) if isinstance(source, Path) else reason
    return Prediction(image_id, (), error=reason, unavailable=isinstance(error, ImageUnavailableError))


def read_predictions(path: str | Path) -> list[Prediction]:
    """All predictions of a file, such as the ``predictions.jsonl`` of a run, checked.

    Args:
        path: of JSON Lines, or of a JSON list of the same objects or of COCO results (``image_id``, ``bbox`` as
            ``[x, y, width, height]`` and ``score``), which become one prediction an image, by falling score, of any
            category; or the folder of a run.

    Raises:
        PredictionsError: if the file is missing or empty, or a line is cut or malformed; it names the line.

    Example:
        >>> line = '{"image_id": "000005", "width": 500, "height": 375, "boxes": [[13, 7, 99, 80]], "scores": [0.8]}'
        >>> _ = Path("predictions.jsonl").write_text(line)
        >>> [(one.image_id, one.boxes, one.scores) for one in lostreg.read_predictions("predictions.jsonl")]
        [('000005', [[13, 7, 99, 80]], [0.8])]
    """
    path = Path(path) / PREDICTIONS_FILE if Path(path).is_dir() else Path(path)
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

    A JSON list, see `read_predictions`, is read whole before the first.

    Raises:
        PredictionsError: if the file cannot be read, or a line is malformed; it names the line.
    """
    try:
        with path.open("rb") as file:
            yield from _parse_lines(file, path, may_be_cut=True)
    except OSError as error:
        raise PredictionsError(f"cannot read predictions {path}: {error.strerror}") from error


def _parse_lines(lines: Iterable[bytes], path: Path, *, may_be_cut: bool = False) -> Iterator[Prediction]:
    lines, is_first = iter(lines), True
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if is_first and line.removeprefix(BOM_UTF8).lstrip().startswith(b"["):
            yield from _parse_list(b"\n".join((line, *lines)), path)
            return
        is_first = False
        try:
            yield parse_prediction(line)
        except (ValueError, TypeError) as error:
            if may_be_cut and not line.endswith(b"\n") and error.__cause__:  # no whole JSON
                return
            raise PredictionsError(f"{path}, line {number}: {error}") from error


def _parse_list(content: bytes, path: Path) -> Iterator[Prediction]:
    """The objects of a JSON list, or of COCO results, if its first entry is one, a prediction an image."""
    try:
        entries = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise PredictionsError(f"{path}: expected a JSON list of COCO results, or JSON Lines ({error})") from error
    results: dict[ImageId, list[tuple[float, list[float]]]] = {}
    are_results = isinstance(entries[0], dict) and "bbox" in entries[0] if entries else False
    for number, entry in enumerate(entries, start=1):
        try:
            if are_results and isinstance(entry, dict):
                image_id, box, score = _parse_result(entry)
                results.setdefault(image_id, []).append((score, box))
            else:
                yield _parse_fields(entry)
        except (ValueError, TypeError) as error:
            raise PredictionsError(f"{path}, entry {number} of the list: {error}") from error
    for image_id, found in results.items():
        found.sort(key=lambda scored: -scored[0])
        yield Prediction(image_id, [box for _, box in found], scores=[score for score, _ in found])


def _parse_result(entry: dict[str, Any]) -> tuple[ImageId, list[float], float]:
    """Image, box as ``x1, y1, x2, y2``, and score of one of COCO's results."""
    image_id = entry.get("image_id")
    bbox: Any = entry.get("bbox")
    score: Any = entry.get("score")
    if not is_id(image_id) or not is_box(bbox) or not is_finite_number(score):
        raise TypeError(
            "expected an object with image_id, bbox as [x, y, width, height] and a finite score "
            f"(found {shown(image_id)}, {shown(bbox)}, {shown(score)})"
        )
    x, y, width, height = bbox
    corners = [x, y, x + width, y + height]
    if not is_box(corners):
        raise ValueError(f"expected boxes within ±{FARTHEST}, not {shown(corners)}")
    return image_id, _in_order(corners), score


def _in_order(box: list[float]) -> list[float]:
    """The box itself.

    Raises:
        ValueError: if its corners are swapped. Some detectors' boxes have no area: they hit nothing.
    """
    if box[0] > box[2] or box[1] > box[3]:
        raise ValueError(f"expected boxes [x1, y1, x2, y2] with x1 <= x2 and y1 <= y2, not {shown(box)}")
    return box


def parse_prediction(line: bytes) -> Prediction:
    """One line of a file, checked completely.

    Only ``image_id`` and ``boxes`` are needed. Other fields may be missing or null, ``error`` also false or empty, as
    other programs write them; what is there has to fit. Run lengths of masks are checked where they are decoded.

    Raises:
        ValueError: if it is no JSON, or a field has a value that cannot be, such as a box with x2 < x1.
        TypeError: if a field is of another type than it should be.
    """
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{_EXPECTED} ({error})") from error
    return _parse_fields(fields)


def _parse_fields(fields: Any) -> Prediction:
    if not isinstance(fields, dict):
        raise TypeError(f"{_EXPECTED} (found {type(fields).__name__})")
    image_id, boxes, reason = fields.get("image_id"), fields.get("boxes"), fields.get("error")
    if not is_id(image_id):
        raise TypeError(f"{_EXPECTED} (image_id is {shown(image_id)})")
    if not isinstance(boxes, list) or not all(is_box(box) for box in boxes):
        raise TypeError(f"{_EXPECTED} (boxes is not a list of [x1, y1, x2, y2])")
    if reason is False or reason == "":
        reason = None
    if not isinstance(reason, str | None):
        raise TypeError(f"expected the error as text, not {shown(reason)}")
    return Prediction(
        image_id,
        [_in_order(box) for box in boxes],
        _side(fields, "width"),
        _side(fields, "height"),
        _of_boxes(fields, "scores", is_finite_number, "finite score") or (),
        _of_boxes(fields, "seeds", _is_place, "seed [row, column]") or (),
        _of_boxes(fields, "masks", lambda mask: isinstance(mask, dict), "mask, as COCO encodes them,"),
        reason,
        reason is not None and fields.get("unavailable") is True,
    )


def _side(fields: dict[str, Any], name: str) -> int:
    side = fields.get(name)
    if side is None:
        return 0
    if type(side) is not int or not 0 <= side < FARTHEST:
        raise ValueError(f"width and height must be whole numbers below 2**31, not {shown(side)}")
    return side


def _of_boxes(fields: dict[str, Any], name: str, is_sound: Callable[[Any], bool], words: str) -> list[Any] | None:
    """A list with a sound value for each box, or without any; None where it is missing."""
    values, count = fields.get(name), len(fields["boxes"])
    if values is None:
        return None
    if not isinstance(values, list) or len(values) not in (0, count) or not all(is_sound(value) for value in values):
        raise ValueError(f"expected one {words} for each of {count} boxes, found {shown(values)}")
    return values


def _is_place(value: Any) -> bool:
    if not isinstance(value, list) or len(value) != 2:
        return False
    return all(type(number) is int and 0 <= number < FARTHEST for number in value)
