"""What is exported: the images of a predictions file with their boxes, checked and cut to the image."""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lostreg.checks import cut
from lostreg.datasets.base import ImageId, name_some
from lostreg.errors import PredictionsError
from lostreg.exports.names import below_one_folder
from lostreg.images.decode import read_image
from lostreg.images.files import SUFFIXES
from lostreg.images.rle import Rle, rle_area
from lostreg.images.stores import StoredImage
from lostreg.runs.locate import ImageFinder, Source
from lostreg.runs.predictions import Prediction

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class ExportBox:
    """One object.

    Attributes:
        xyxy: pixels, exclusive right and bottom edges.
        score: in [0, 1]; None where the predictions have none.
        seed: patch row and column; None where the predictions have none.
        mask: of the whole image; None where the predictions have none, or masks are not exported.
        mask_area: its pixels; None without a mask.
    """

    xyxy: Box
    score: float | None = None
    seed: tuple[int, int] | None = None
    mask: Rle | None = None
    mask_area: int | None = None


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

    @property
    def is_part(self) -> bool:
        """Whether it lies in a larger file: a frame of a video, a member of a shard, a row of a table."""
        place = None if self.source is None else self.source.path
        return isinstance(place, StoredImage) and place.locator != place.file


@dataclass(frozen=True)
class ExportSet:
    """All that is exported.

    Attributes:
        images: in the order of the predictions.
        unreadable: the lines of images that could not be read.
        clipped: how many boxes reached beyond their image and were cut.
        empty: how many images without a box were left out.
    """

    images: tuple[ExportImage, ...]
    unreadable: tuple[Prediction, ...]
    clipped: int = 0
    empty: int = 0

    @property
    def boxes(self) -> int:
        """How many boxes there are."""
        return sum(len(image.boxes) for image in self.images)

    def below(self, score: float) -> int:
        """How many boxes score less."""
        return sum(box.score is not None and box.score < score for image in self.images for box in image.boxes)


def gather(
    predictions: Iterable[Prediction],
    finder: ImageFinder,
    *,
    keep_empty: bool = True,
    sized: bool = True,
    masks: bool = True,
) -> ExportSet:
    """Check predictions, and make of them what is exported.

    Args:
        predictions: of one file, with the boxes that are exported, see `lostreg.runs.decisions.choose_boxes`.
        finder: finds the image files.
        keep_empty: whether images without a box stay.
        sized: whether the format needs sizes: those that are missing are then read from the images, and boxes are cut
            to the image. Else both stay as they are.
        masks: whether the format has masks; else they are neither decoded nor kept.

    Raises:
        PredictionsError: if an image comes twice, its masks are of another size, a box lies outside, or the size is
            needed and neither known nor to be found.
        ImageError: if an image file whose size is needed cannot be read.
    """
    lines = list(predictions)
    _check_ids(lines)
    unreadable = tuple(line for line in lines if line.error is not None)
    readable = [_image(line, finder) for line in lines if line.error is None]
    images = [image for image in readable if image.boxes or keep_empty]
    empty = len(readable) - len(images)
    clipped = 0
    if sized:
        images, clipped = _within([_sized(image) for image in images])
    if masks:
        images = [_decoded(image) for image in images]
    names = below_one_folder([image.name for image in images])
    images = [dataclasses.replace(image, name=name) for image, name in zip(images, names, strict=True)]
    return ExportSet(tuple(images), unreadable, clipped, empty)


def _check_ids(lines: Sequence[Prediction]) -> None:
    counts = Counter(str(line.image_id) for line in lines)
    twice = [cut(name) for name, count in counts.items() if count > 1]
    if twice:
        raise PredictionsError(f"the predictions have {len(twice)} images twice: {name_some(twice)}")


def _image(line: Prediction, finder: ImageFinder) -> ExportImage:
    source = finder.find(line.image_id)
    boxes = [
        ExportBox(
            (box[0], box[1], box[2], box[3]),
            line.scores[index] if line.scores else None,
            (line.seeds[index][0], line.seeds[index][1]) if line.seeds else None,
            line.masks[index] if line.masks else None,
        )
        for index, box in enumerate(line.boxes)
    ]
    return ExportImage(line.image_id, _name(line.image_id, source), line.width, line.height, tuple(boxes), source)


def _sized(image: ExportImage) -> ExportImage:
    """With its size, read from the file where the predictions lack it."""
    if image.width and image.height:
        return image
    if image.source is None:
        raise PredictionsError(
            f"{_name_of(image)}: the predictions lack its width and height; --images DIR says where the images lie "
            "that they can be read from"
        )
    picture = read_image(image.source.path, max_side=64, exif=image.source.exif is not False)
    return dataclasses.replace(image, width=picture.width, height=picture.height)


def _decoded(image: ExportImage) -> ExportImage:
    """With the areas of its masks, if these are sound."""
    return dataclasses.replace(image, boxes=tuple(_with_area(image, box) for box in image.boxes))


def _with_area(image: ExportImage, box: ExportBox) -> ExportBox:
    if box.mask is None:
        return box
    try:
        area = rle_area(box.mask, (image.height, image.width) if image.width and image.height else None)
    except PredictionsError as error:
        raise PredictionsError(f"{_name_of(image)}: {error}") from error
    return dataclasses.replace(box, mask_area=area)


def _name(image_id: ImageId, source: Source | None) -> str:
    if source is not None and source.name is not None:
        return source.name
    if source is not None and not str(image_id).lower().endswith(SUFFIXES):  # VOC's stems, COCO's numbers
        return source.path.name
    return str(image_id)


def _name_of(line: Prediction | ExportImage) -> str:
    return f"image {cut(repr(line.image_id))}"


def _within(images: list[ExportImage]) -> tuple[list[ExportImage], int]:
    """With boxes that lie within their images, and how many of them were cut for it."""
    boxes = [tuple(_cut(image, box) for box in image.boxes) for image in images]
    pairs = [pair for image, found in zip(images, boxes, strict=True) for pair in zip(image.boxes, found, strict=True)]
    whole = [dataclasses.replace(image, boxes=found) for image, found in zip(images, boxes, strict=True)]
    return whole, sum(before is not after for before, after in pairs)


def _cut(image: ExportImage, box: ExportBox) -> ExportBox:
    """A box within the image; a whole and sound one comes back as it is."""
    x1, y1, x2, y2 = box.xyxy
    inside = max(x1, 0), max(y1, 0), min(x2, image.width), min(y2, image.height)
    if inside[2] <= inside[0] or inside[3] <= inside[1]:
        raise PredictionsError(
            f"{_name_of(image)}: the box {cut(str(list(box.xyxy)))} covers nothing of the image of "
            f"{image.width}x{image.height} pixels; expected x1, y1, x2, y2 in its pixels"
        )
    return box if inside == box.xyxy else dataclasses.replace(box, xyxy=inside)
