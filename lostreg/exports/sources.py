"""Where the image files of a predictions file lie."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lostreg.datasets.base import ImageId
from lostreg.defaults import MAPS_FILE, PREDICTIONS_FILE, RESULTS_FILE
from lostreg.errors import OptionError, PredictionsError
from lostreg.images import SUFFIXES
from lostreg.maps import read_maps


@dataclass(frozen=True)
class Source:
    """An image file.

    Attributes:
        path: of the file; it need not exist any more.
        exif: whether boxes are in pixels turned as its EXIF orientation says; None where that is not known.
        name: its place below the folder of the images; None where that folder is not known.
    """

    path: Path
    exif: bool | None
    name: str | None = None


def predictions_file(place: Path) -> Path:
    """The predictions file itself, or the one of a run's folder.

    Raises:
        PredictionsError: if there is none.
    """
    path = place / PREDICTIONS_FILE if place.is_dir() else place
    if not path.is_file():
        raise PredictionsError(f"{place}: expected a predictions file, or the folder of a run with {PREDICTIONS_FILE}")
    return path


def is_unfinished(predictions: Path) -> bool:
    """Whether the run that wrote the predictions says that it has not come to its end."""
    return _results(predictions).get("complete") is False


class ImageFinder:
    """Finds image files: in a folder, else where a run recorded them, else the id itself as a path.

    Args:
        predictions: the predictions file; a maps file and results beside it are used.
        images: the folder that the ids are relative to; nothing else is then searched.

    Raises:
        OptionError: if ``images`` is no folder.
        PredictionsError: if the maps file is malformed.
    """

    def __init__(self, predictions: Path, images: Path | None = None) -> None:
        if images is not None and not images.is_dir():
            raise OptionError(f"--images {images}: expected a folder")
        self._given = images
        maps = predictions.with_name(MAPS_FILE)
        self._maps = {one.image_id: (one.path, one.exif) for one in read_maps(maps)} if maps.is_file() else {}
        collection = _results(predictions).get("collection")
        root = collection.get("root") if isinstance(collection, dict) else None
        self.folder = images or (Path(root) if isinstance(root, str) and root else None)
        """The folder that the ids are relative to; None where it is not known."""

    def find(self, image_id: ImageId) -> Source | None:
        """The file of an image; None where there is none."""
        recorded, exif = self._maps.get(image_id, (None, None))
        if self._given is not None:
            return self._search(self._given, image_id, exif)
        if recorded is not None:
            return Source(Path(recorded), exif, self._below(Path(recorded)))
        found = self._search(self.folder, image_id, exif) if self.folder else None
        if found is None and _is_file(Path(str(image_id))):
            found = Source(Path(str(image_id)), exif)
        return found

    def _search(self, folder: Path, image_id: ImageId, exif: bool | None) -> Source | None:
        for candidate in _candidates(folder, image_id):
            if _is_file(candidate) and (name := self._below(candidate)):
                return Source(candidate, exif, name)
        return None

    def _below(self, path: Path) -> str | None:
        if self.folder is None:
            return None
        for place, folder in ((path, self.folder), (path.absolute(), self.folder.absolute())):
            if place.is_relative_to(folder):
                return place.relative_to(folder).as_posix()
        return None


def _candidates(folder: Path, image_id: ImageId) -> Iterator[Path]:
    """What the file of an id may be: the id, with a suffix for VOC, with leading zeros for COCO."""
    if isinstance(image_id, str):
        yield folder / image_id
        yield Path(image_id)  # as given to `lostreg predict`, the folder in front
        stems = [image_id]
    else:
        padded = f"{image_id:012d}"
        stems = [padded, f"COCO_train2014_{padded}", f"COCO_val2014_{padded}", str(image_id)]
    yield from (
        folder / (stem + ending) for stem in stems for suffix in SUFFIXES for ending in (suffix, suffix.upper())
    )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # such as a name too long, or with a NUL
        return False


def _results(predictions: Path) -> dict[str, Any]:
    try:
        found = json.loads(predictions.with_name(RESULTS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
