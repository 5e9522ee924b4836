"""The result for one image."""

import contextlib
import importlib
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from lostreg.errors import ImageError, LostregError, OptionError
from lostreg.images.boxes import as_boxes, spread
from lostreg.images.decode import ImageSource, read_image
from lostreg.images.draw import encoded, plot_objects, save_picture, score_text
from lostreg.images.masks import MOST_OBJECTS
from lostreg.images.rle import encode_rle
from lostreg.images.stores import StoredImage
from lostreg.jsonio import short_number

if TYPE_CHECKING:
    import fiftyone
    import pandas as pd
    import supervision

_READ_SIDE: Final = 1024  # of sources, for pictures
_GREY: Final = 200
_COLUMNS: Final = ("image", "path", "width", "height", "x1", "y1", "x2", "y2", "score", "seed_row", "seed_col")


@dataclass(frozen=True, eq=False, repr=False)
class Discovery:
    """The objects found in one image, and the patch maps they come from.

    Attributes:
        xyxy: boxes in pixels of the original image, shape (n, 4), float32, ``x1, y1, x2, y2`` with exclusive
            right and bottom edges, the main object first; see the method for the order of the others.
        scores: how clearly each box is an object, shape (n,), float32, in [0, 1]: see `lostreg.methods.objectness`.
        seeds: row and column of each object's seed patch, shape (n, 2), int64.
        biases: the Gram bias that each object was found with, shape (n,), float32.
        masks: the patches of each object, shape (n, h, w), bool; no patch belongs to two.
        degrees: connections of each patch, shape (h, w), int64: low on what LOST takes for objects.
        width: of the original image, in pixels.
        height: of the original image, in pixels.
        patch_width: of a patch, in pixels of the original image.
        patch_height: of a patch, in pixels of the original image.
        refined: masks sharpened on the pixels, shape (n, a, b), bool, of the whole image at a smaller size; None
            where that was not asked for. See `lostreg.images.masks`.
        source: what was searched, as far as it is known: for pictures of the result.
        exif: whether the source's EXIF orientation was applied.
        candidates: what the objects were chosen from, best first: box of its patches, in pixels of the original image,
            and score, shape (m, 5), float32. Of equal boxes the best; at most 12, the objects before others. None
            where nothing was compared, as in LOST.
        objectness: how likely each patch is part of an object, by what a collection taught, shape (h, w), float32, in
            [0, 1]; None where nothing was taught.

    Example:
        >>> found = lostreg.Discoverer("dinov2_vits14_reg", device="cpu").discover("dog.jpg")
        >>> found  # doctest: +ELLIPSIS
        Discovery('dog.jpg', 1 box, score 0..., 150x110)
        >>> found.xyxy.shape, found.pixel_mask(0).shape, found.plot().shape
        ((1, 4), (110, 150), (503, 1292, 3))
    """

    xyxy: NDArray[np.float32]
    scores: NDArray[np.float32]
    seeds: NDArray[np.int64]
    biases: NDArray[np.float32]
    masks: NDArray[np.bool_]
    degrees: NDArray[np.int64]
    width: int
    height: int
    patch_width: float
    patch_height: float
    refined: NDArray[np.bool_] | None = None
    source: ImageSource | None = None
    exif: bool = True
    candidates: NDArray[np.float32] | None = None
    objectness: NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        count = len(self.xyxy)
        shapes = (self.xyxy.shape, self.scores.shape, self.seeds.shape, self.biases.shape)
        if shapes != ((count, 4), (count,), (count, 2), (count,)):
            raise ValueError(f"expected shapes (n, 4), (n,), (n, 2), (n,) for boxes, scores, seeds, biases: {shapes}")
        if self.degrees.ndim != 2 or self.masks.shape != (count, *self.degrees.shape):
            raise ValueError(
                f"expected {count} masks on one patch grid, got degrees {self.degrees.shape} and masks "
                f"{self.masks.shape}"
            )
        if self.refined is not None and (self.refined.ndim != 3 or len(self.refined) != count):
            raise ValueError(f"expected {count} refined masks, got shape {self.refined.shape}")
        if self.candidates is not None and self.candidates.shape != (len(self.candidates), 5):
            raise ValueError(f"expected candidates of shape (m, 5), got {self.candidates.shape}")
        if self.objectness is not None and self.objectness.shape != self.degrees.shape:
            raise ValueError(f"expected objectness on {self.degrees.shape} patches, got {self.objectness.shape}")

    def __len__(self) -> int:
        return len(self.xyxy)

    def __repr__(self) -> str:
        name = [] if self._name is None else [repr(Path(self._name).name)]
        boxes = f"{len(self)} box{'es' * (len(self) != 1)}"
        score = [f"{'best ' * (len(self) > 1)}score {score_text(self.scores.max())}"] if len(self) else []
        return f"Discovery({', '.join([*name, boxes, *score, f'{self.width}x{self.height}'])})"

    @property
    def _name(self) -> str | None:
        """The path of the source, or its name in a store; None of what has no name."""
        if isinstance(self.source, StoredImage):
            return self.source.name
        return os.fsdecode(self.source) if isinstance(self.source, str | os.PathLike) else None

    @property
    def mask(self) -> NDArray[np.bool_]:
        """The patches of the main object, shape (h, w), bool."""
        first: NDArray[np.bool_] = self.masks[0]
        return first

    @property
    def bias(self) -> float:
        """The Gram bias that the main object was found with."""
        return float(self.biases[0])

    def pixel_mask(self, index: int = 0) -> NDArray[np.bool_]:
        """One object's mask at the original image's size: refined where that was asked for, else its patches.

        Args:
            index: of the object.

        Returns:
            Shape (height, width), bool.
        """
        if self.refined is None:
            return spread(self.masks[index], (self.height, self.width), (self.patch_height, self.patch_width))
        mask = self.refined[index]
        return spread(mask, (self.height, self.width), (self.height / mask.shape[0], self.width / mask.shape[1]))

    def labels(self) -> NDArray[np.uint8]:
        """The objects as one picture of the original image's size, of at most 255 objects.

        Returns:
            Shape (height, width): 0 is background, i + 1 is object i; where two overlap, the earlier one is seen.

        Raises:
            LostregError: if there are more.
        """
        if len(self) > MOST_OBJECTS:
            raise LostregError(f"a picture of masks holds at most {MOST_OBJECTS} objects, found {len(self)}")
        labels = np.zeros((self.height, self.width), dtype=np.uint8)
        for index in reversed(range(len(self))):
            labels[self.pixel_mask(index)] = index + 1
        return labels

    def plot(
        self, pixels: NDArray[np.uint8] | None = None, truth: NDArray[np.float64] | None = None
    ) -> NDArray[np.uint8]:
        """The picture that notebooks show: boxes and seeds on the left, the degree of every patch on the right.

        Args:
            pixels: the image, RGB (h, w, 3), uint8, at any scale; None reads the source. Where that is not known, or
                cannot be read any more, boxes lie on plain grey.
            truth: ground-truth boxes, shape (m, 4), in pixels of the original image, drawn thin; None for none.

        Returns:
            RGB, uint8.

        Raises:
            ImageError: if the pixels are something else.
            OptionError: if the boxes are.
        """
        return plot_objects(
            self._source_pixels() if pixels is None else read_image(pixels).pixels,
            (self.height, self.width),
            xyxy=self.xyxy,
            scores=self.scores,
            seeds=self.seeds,
            degrees=self.degrees,
            patch=(self.patch_height, self.patch_width),
            refined=self.refined,
            truth=None if truth is None else as_boxes(truth),
        )

    def _source_pixels(self) -> NDArray[np.uint8]:
        if isinstance(self.source, np.ndarray):
            return self.source
        if self.source is not None:
            with contextlib.suppress(ImageError):
                return read_image(self.source, max_side=_READ_SIDE, exif=self.exif, max_pixels=sys.maxsize).pixels
        return np.full((1, 1, 3), _GREY, dtype=np.uint8)

    def save(self, path: str | Path) -> None:
        """Write the picture that `plot` makes: PNG, JPEG or WebP, as the suffix says. Its folder is made if need be.

        Numbers are another matter: see `to_dict`, `to_pandas`.

        Raises:
            LostregError: if the suffix is another, or the file cannot be written.

        Example:
            >>> lostreg.Discoverer("dinov2_vits14_reg", device="cpu").discover("dog.jpg").save("found.png")
        """
        if not isinstance(path, str | os.PathLike):
            raise OptionError(f"expected the path of a picture to write, not {type(path).__name__}")
        save_picture(Path(path), self.plot())

    def to_dict(self, *, masks: bool = False) -> dict[str, Any]:
        """What a line of a predictions file holds of the image, for JSON; with ``image_id`` in front it is one.

        Args:
            masks: whether masks go with it, of the image's size, in COCO's compressed run-length encoding.

        Returns:
            ``width`` and ``height``, ``boxes`` (``[x1, y1, x2, y2]``), ``scores``, ``seeds`` (``[row, column]``) and,
            if asked for, ``masks``: plain numbers, of at most three decimals.

        Example:
            >>> found = lostreg.Discoverer("dinov2_vits14_reg", device="cpu").discover("dog.jpg")
            >>> list({"image_id": "dog", **found.to_dict()})
            ['image_id', 'width', 'height', 'boxes', 'scores', 'seeds']
        """
        fields: dict[str, Any] = {
            "width": self.width,
            "height": self.height,
            "boxes": [[short_number(value) for value in box] for box in self.xyxy.tolist()],
            "scores": [short_number(value) for value in self.scores.tolist()],
            "seeds": self.seeds.tolist(),
        }
        if masks:
            fields["masks"] = [encode_rle(self.pixel_mask(index)) for index in range(len(self))]
        return fields

    def to_pandas(self) -> "pd.DataFrame":
        """One row a box: see `lostreg.to_pandas`, which takes several images."""
        return to_pandas(self)

    def to_supervision(self, *, masks: bool = True) -> "supervision.Detections":
        """What was found, for supervision's annotators, metrics and data sets.

        Args:
            masks: whether masks at the image's size go with the boxes: n times its pixels in memory.

        Returns:
            Boxes, scores as ``confidence``, class 0 for all; ``data`` has ``class_name`` ("object") and ``seeds``.

        Raises:
            OptionError: if supervision is not installed.
        """
        library = _optional("supervision", "lostreg[supervision]")
        count = len(self)
        pixels = np.zeros((count, self.height, self.width), dtype=bool) if masks else None
        if pixels is not None:
            for index in range(count):
                pixels[index] = self.pixel_mask(index)
        detections: supervision.Detections = library.Detections(
            xyxy=self.xyxy.astype(np.float32),
            mask=pixels,
            confidence=self.scores.astype(np.float32),
            class_id=np.zeros(count, dtype=int),
            data={"class_name": np.full(count, "object"), "seeds": self.seeds.copy()},
        )
        return detections

    def to_fiftyone(self, *, masks: bool = True) -> "fiftyone.Detections":
        """What was found, as a label of a FiftyOne sample: ``sample["lostreg"] = found.to_fiftyone()``.

        Args:
            masks: whether masks go with the boxes: what of each lies in its box, as FiftyOne keeps it. Of one that was
                refined that may not be all, unless the box was taken from it.

        Returns:
            Boxes as shares of the image's sides, scores as ``confidence``, label "object".

        Raises:
            OptionError: if FiftyOne is not installed.
        """
        library = _optional("fiftyone", "lostreg[fiftyone]")
        sides = np.array([self.width, self.height] * 2)
        corners = self.xyxy.round().astype(int)
        labels = []
        for index, (score, (x1, y1, x2, y2)) in enumerate(zip(self.scores.tolist(), corners.tolist(), strict=True)):
            left, top, right, bottom = (self.xyxy[index] / sides).tolist()
            label = library.Detection(label="object", confidence=score)
            label.bounding_box = [left, top, right - left, bottom - top]
            if masks:
                label.mask = self.pixel_mask(index)[y1 : max(y2, y1 + 1), x1 : max(x2, x1 + 1)].copy()
            labels.append(label)
        detections: fiftyone.Detections = library.Detections(detections=labels)
        return detections

    def _repr_png_(self) -> bytes:
        return encoded(self.plot(), ".png")


def to_pandas(discoveries: Discovery | Iterable[Discovery]) -> "pd.DataFrame":
    """What was found in several images as one table, a row a box.

    Args:
        discoveries: one, or several, such as `Discoverer.discover_many` gives, taken one by one.

    Returns:
        Columns ``image`` (its place in the list, from 0), ``path`` (missing where there is none), ``width`` and
        ``height``, ``x1``, ``y1``, ``x2``, ``y2`` in pixels, ``score``, ``seed_row`` and ``seed_col``.

    Raises:
        OptionError: if pandas is not installed, or something is no discovery, such as an error among `outcomes`.

    Example:
        >>> discoverer = lostreg.Discoverer("dinov2_vits14_reg", device="cpu")
        >>> lostreg.to_pandas(discoverer.discover_many(["dog.jpg", "dog.jpg"]))[["image", "path", "width"]]
           image     path  width
        0      0  dog.jpg    150
        1      1  dog.jpg    150
    """
    pandas = _optional("pandas", "pandas")
    rows = [
        (image, found._name, found.width, found.height, *box, score, *seed)
        for image, found in enumerate(_checked(discoveries))
        for box, score, seed in zip(found.xyxy.tolist(), found.scores.tolist(), found.seeds.tolist(), strict=True)
    ]
    table: pd.DataFrame = pandas.DataFrame(rows, columns=_COLUMNS)
    return table


def _checked(discoveries: Discovery | Iterable[Discovery]) -> Iterator[Discovery]:
    for number, found in enumerate([discoveries] if isinstance(discoveries, Discovery) else discoveries):
        if not isinstance(found, Discovery):
            raise OptionError(f"expected discoveries alone, number {number} is {type(found).__name__}: {found}")
        yield found


def _optional(library: str, requirement: str) -> Any:
    """A library that is not always there."""
    try:
        return importlib.import_module(library)
    except ModuleNotFoundError as error:
        if error.name != library:
            raise
        raise OptionError(f'{library} is not installed: pip install "{requirement}"') from error
