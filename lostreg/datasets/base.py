"""What a benchmark is: images, their boxes, and a fingerprint of both."""

import hashlib
import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lostreg.checks import FARTHEST
from lostreg.errors import DatasetError
from lostreg.images.files import ImageFile

ImageId = str | int


@dataclass(frozen=True)
class Example:
    """One image of a benchmark with its ground truth.

    Attributes:
        image_id: file stem for VOC, integer id for COCO.
        path: the image file (may be absent where only annotations are needed).
        boxes: ground-truth boxes, shape (n, 4) with n >= 1, float64, pixels, ``x1, y1, x2, y2``
            with exclusive right and bottom edges, already in the convention of the metric.
        crowds: boxes around groups of objects that nobody told apart, shape (m, 4), likewise: corloc does not
            know of them, average precision ignores what is found in them.
        size: (width, height) of the image in the annotations' words, pixels; None where they have none.
        exif: whether boxes refer to the image turned as its EXIF orientation says; see `choose_frames`.
    """

    image_id: ImageId
    path: Path
    boxes: NDArray[np.float64]
    crowds: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 4)))
    size: tuple[int, int] | None = None
    exif: bool = False

    @property
    def source(self) -> ImageFile:
        """The image in the frame of the boxes."""
        return ImageFile(self.path, self.exif)


@dataclass(frozen=True)
class Benchmark:
    """An ordered set of examples.

    Attributes:
        name: what the user asked for, such as ``voc07``.
        split: ``trainval`` and the like, or an empty string.
        examples: in the order in which they are predicted and scored.
        notes: one line each on what was left out while loading, for the user to read.
        left_out: ids that belong to the data set and are not scored: predictions for them are no mistake.
    """

    name: str
    split: str
    examples: tuple[Example, ...]
    notes: tuple[str, ...] = ()
    left_out: frozenset[ImageId] = frozenset()

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def title(self) -> str:
        """Name and split, for people."""
        return f"{self.name} {self.split}".strip()

    def fingerprint(self) -> str:
        """SHA-256 over ids and boxes in order: two runs with the same value scored the same task."""
        digest = hashlib.sha256()
        for example in self.examples:
            line = json.dumps([example.image_id, example.boxes.tolist()])
            digest.update(line.encode() + b"\n")
        return digest.hexdigest()

    def limited(self, limit: int | None) -> "Benchmark":
        """The first ``limit`` examples, or all of them for None."""
        if limit is None:
            return self
        beyond = {example.image_id for example in self.examples[limit:]}
        return replace(self, examples=self.examples[:limit], left_out=self.left_out | beyond)


def read_size(width: object, height: object) -> tuple[int, int] | None:
    """(width, height) in pixels as annotations have them, numbers or text; None where they cannot be meant."""
    try:
        sides = float(width), float(height)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return None
    is_sound = all(0 < side < FARTHEST and side.is_integer() for side in sides)
    return (int(sides[0]), int(sides[1])) if is_sound else None


def require_images(benchmark: Benchmark) -> None:
    """Raise `DatasetError` that names the missing image files, if any."""
    missing = [example.path for example in benchmark.examples if not example.path.is_file()]
    if missing:
        raise DatasetError(
            f"{benchmark.name}: {len(missing)} of {len(benchmark)} images are missing: "
            f"{name_some([str(path) for path in missing])}"
        )


def name_some(names: list[str], most: int = 5) -> str:
    """The first few of ``names`` in words, with a count of the rest."""
    shown = ", ".join(names[:most])
    rest = len(names) - most
    return f"{shown} and {rest} more" if rest > 0 else shown


def cache_folder() -> Path | None:
    """Where lostreg may keep what it would have to compute or fetch again; None where the user has no home folder."""
    configured = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        return (configured if configured.is_absolute() else Path.home() / ".cache") / "lostreg"
    except RuntimeError:
        return None
