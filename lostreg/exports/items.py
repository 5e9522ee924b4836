"""What is exported: the images of a predictions file with their boxes, checked and cut to the image."""

import dataclasses
import math
import os.path
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lostreg.datasets.base import ImageId, name_some
from lostreg.errors import OptionError, PredictionsError
from lostreg.exports.sources import ImageFinder, Source
from lostreg.images import SUFFIXES, read_image
from lostreg.masks import Rle
from lostreg.predictions import Prediction

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class ExportBox:
    """One object.

    Attributes:
        xyxy: pixels, exclusive right and bottom edges.
        score: in [0, 1]; None where the predictions have none.
        seed: patch row and column; None where the predictions have none.
        mask: of the whole image; None where the predictions have none.
    """

    xyxy: Box
    score: float | None = None
    seed: tuple[int, int] | None = None
    mask: Rle | None = None


@dataclass(frozen=True)
class ExportImage:
    """One image that could be read.

    Attributes:
        image_id: as in the predictions.
        name: of the file, below the folder of the images, with slashes.
        width: in pixels; 0 where unknown.
        height: in pixels; 0 where unknown.
        boxes: the main object first.
        source: the image file; None where it was not found.
    """

    image_id: ImageId
    name: str
    width: int
    height: int
    boxes: tuple[ExportBox, ...]
    source: Source | None = None


@dataclass(frozen=True)
class Collection:
    """All that is exported.

    Attributes:
        images: in the order of the predictions.
        unreadable: the lines of images that could not be read.
        clipped: how many boxes reached beyond their image and were cut.
    """

    images: tuple[ExportImage, ...]
    unreadable: tuple[Prediction, ...]
    clipped: int = 0

    @property
    def boxes(self) -> int:
        """How many boxes there are."""
        return sum(len(image.boxes) for image in self.images)

    def below(self, score: float) -> int:
        """How many boxes score less."""
        return sum(box.score is not None and box.score < score for image in self.images for box in image.boxes)

    def with_boxes(self) -> "Collection":
        """Without the images that have no box."""
        return dataclasses.replace(self, images=tuple(image for image in self.images if image.boxes))


def gather(
    predictions: Iterable[Prediction], finder: ImageFinder, *, min_score: float = 0.0, sized: bool = True
) -> Collection:
    """Check predictions, and make of them what is exported.

    Args:
        predictions: of one file.
        finder: finds the image files.
        min_score: boxes with a lower score are left out.
        sized: whether the format needs sizes: those that are missing are then read from the images, and boxes are cut
            to the image. Else both stay as they are.

    Raises:
        OptionError: if boxes are to be left out by scores that the predictions do not have.
        PredictionsError: if an image comes twice, its numbers do not fit together, a box lies outside, or the size is
            needed and neither known nor to be found.
        ImageError: if an image file whose size is needed cannot be read.
    """
    lines = list(predictions)
    twice = [name for name, count in Counter(str(line.image_id) for line in lines).items() if count > 1]
    if twice:
        raise PredictionsError(f"the predictions have {len(twice)} images twice: {name_some(twice)}")
    clipped = 0
    images = []
    for line in lines:
        if line.error is None:
            image = _image(line, finder, sized=sized)
            if sized:
                cut = tuple(_cut(image, box) for box in image.boxes)
                clipped += sum(before != after for before, after in zip(image.boxes, cut, strict=True))
                image = dataclasses.replace(image, boxes=cut)
            images.append(_clear(image, min_score))
    unreadable = tuple(line for line in lines if line.error is not None)
    return Collection(tuple(_relative(images)), unreadable, clipped)


def _image(line: Prediction, finder: ImageFinder, *, sized: bool) -> ExportImage:
    _check(line)
    source = finder.find(line.image_id)
    width, height = line.width, line.height
    if sized and not (width and height):
        if source is None:
            raise PredictionsError(
                f"image {line.image_id!r}: the predictions lack its width and height; --images DIR says where the "
                "images lie that they can be read from"
            )
        picture = read_image(source.path, max_side=64, exif=source.exif is not False)
        width, height = picture.width, picture.height
    count = len(line.boxes)
    boxes = [
        ExportBox(
            (box[0], box[1], box[2], box[3]),
            line.scores[index] if line.scores else None,
            (line.seeds[index][0], line.seeds[index][1]) if line.seeds else None,
            line.masks[index] if line.masks else None,
        )
        for index, box in enumerate(line.boxes[:count])
    ]
    return ExportImage(line.image_id, _name(line.image_id, source), width, height, tuple(boxes), source)


def _name(image_id: ImageId, source: Source | None) -> str:
    if source is not None and source.name is not None:
        return source.name
    if source is not None and not str(image_id).lower().endswith(SUFFIXES):  # VOC's stems, COCO's numbers
        return source.path.name
    return str(image_id)


def _check(line: Prediction) -> None:
    """Raise unless the numbers of a line fit together: the reader checks boxes alone."""
    count = len(line.boxes)
    wrong = None
    if not all(type(side) is int and side >= 0 for side in (line.width, line.height)):
        wrong = f"width and height must be whole numbers, not {line.width!r} and {line.height!r}"
    elif not _fits(line.scores, count, _is_number):
        wrong = f"expected one finite score for each of {count} boxes, found {line.scores!r}"
    elif not _fits(line.seeds, count, _is_pair):
        wrong = f"expected one seed [row, column] for each of {count} boxes, found {line.seeds!r}"
    elif line.masks is not None and not _fits(line.masks, count, lambda mask: _is_mask(mask, line)):
        wrong = (
            f"expected one mask of {line.width}x{line.height} pixels, as COCO encodes them, for each of {count} boxes"
        )
    if wrong:
        raise PredictionsError(f"image {line.image_id!r}: {wrong}")


def _fits(values: Any, count: int, is_sound: Any) -> bool:
    return isinstance(values, Sequence) and len(values) in (0, count) and all(is_sound(value) for value in values)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_pair(value: Any) -> bool:
    return isinstance(value, Sequence) and len(value) == 2 and all(type(number) is int for number in value)


def _is_mask(value: Any, line: Prediction) -> bool:
    return (
        isinstance(value, dict)
        and value.get("size") == [line.height, line.width]
        and isinstance(value.get("counts"), str)
        and value["counts"].isascii()
    )


def _cut(image: ExportImage, box: ExportBox) -> ExportBox:
    """A box within the image; whole and sound boxes come back as they are."""
    x1, y1, x2, y2 = box.xyxy
    inside = max(x1, 0), max(y1, 0), min(x2, image.width), min(y2, image.height)
    if inside[2] <= inside[0] or inside[3] <= inside[1]:
        raise PredictionsError(
            f"image {image.image_id!r}: the box {list(box.xyxy)} covers nothing of the image of "
            f"{image.width}x{image.height} pixels; expected x1, y1, x2, y2 in its pixels"
        )
    return box if inside == box.xyxy else dataclasses.replace(box, xyxy=inside)


def _clear(image: ExportImage, min_score: float) -> ExportImage:
    """Without the boxes that score too low."""
    if not min_score:
        return image
    if any(box.score is None for box in image.boxes):
        raise OptionError(f"image {image.image_id!r} has boxes without scores: --min-score cannot choose among them")
    return dataclasses.replace(image, boxes=tuple(box for box in image.boxes if (box.score or 0) >= min_score))


def _relative(images: list[ExportImage]) -> list[ExportImage]:
    """Absolute names as what they are below the folder that they share: no export says where a machine keeps files."""
    absolute = [image.name for image in images if Path(image.name).is_absolute()]
    if not absolute:
        return images
    shared = os.path.commonpath([Path(name).parent.as_posix() for name in absolute])
    return [
        dataclasses.replace(image, name=Path(image.name).relative_to(shared).as_posix())
        if Path(image.name).is_absolute()
        else image
        for image in images
    ]
