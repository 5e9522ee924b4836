"""Where the image files of a predictions file lie now."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Final

from lostreg.datasets.base import ImageId
from lostreg.datasets.lake import stored_at
from lostreg.defaults import MAPS_FILE, PREDICTIONS_FILE
from lostreg.errors import OptionError, PredictionsError
from lostreg.images.files import SUFFIXES
from lostreg.images.stores import StoredImage, is_uri
from lostreg.runs.maps import read_maps
from lostreg.runs.results import results_of

_COCO: Final = ("{:012d}", "COCO_train2014_{:012d}", "COCO_val2014_{:012d}", "{}")


def find_below(folder: Path, image_id: ImageId, recorded: str | None = None) -> Path | None:
    """The file of an image in a folder and what lies below it; None where there is none.

    Args:
        folder: that ids are relative to; no id leads out of it.
        image_id: its file's name, with a suffix or without (VOC), or COCO's number; or, as `lostreg predict` has it,
            a path with the folder in front.
        recorded: where the run found the file: one of the same name is taken for it where the id says of no folder
            below this one.
    """
    return next((path for path in _candidates(folder, image_id, recorded) if is_file(path)), None)


def _candidates(folder: Path, image_id: ImageId, recorded: str | None) -> Iterator[Path]:
    path = PurePath(str(image_id))
    given = [folder / path, Path(path)]
    stems = [str(image_id)] if isinstance(image_id, str) else [form.format(image_id) for form in _COCO]
    given += [folder / (stem + end) for stem in stems for suffix in SUFFIXES for end in (suffix, suffix.upper())]
    yield from (candidate for candidate in given if below(candidate, folder))
    if recorded and (len(path.parts) == 1 or path.is_absolute() or ".." in path.parts):
        yield folder / PurePath(recorded).name


def below(path: Path, folder: Path) -> str | None:
    """A path as it is below a folder, with slashes; None where it is not, or goes up on its way."""
    for place, start in ((path, folder), (path.absolute(), folder.absolute())):
        if place.is_relative_to(start):
            rest = place.relative_to(start)
            return rest.as_posix() if rest.parts and ".." not in rest.parts else None
    return None


def is_file(path: Path) -> bool:
    """Whether there is a file; no name is too strange to ask."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # such as a name too long, or with a NUL
        return False


@dataclass(frozen=True)
class Source:
    """An image file, or an image that is kept elsewhere.

    Attributes:
        path: of the file, or its place in another file or a store; it need not be there any more.
        exif: whether boxes are in pixels turned as its EXIF orientation says; None where that is not known.
        name: its place below the folder of the images; None where that folder is not known.
    """

    path: Path | StoredImage
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
    return (results_of(predictions.parent) or {}).get("complete") is False


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
        collection = (results_of(predictions.parent) or {}).get("collection")
        root = collection.get("root") if isinstance(collection, dict) else None
        self.folder = images or (Path(root) if isinstance(root, str) and root and not is_uri(root) else None)
        """The folder that the ids are relative to; None where it is not known."""

    def find(self, image_id: ImageId) -> Source | None:
        """The file of an image; None where there is none."""
        recorded, exif = self._maps.get(image_id, (None, None))
        stored = stored_at(str(image_id), recorded) if recorded is not None and self._given is None else None
        if stored is not None:
            return Source(stored, exif, str(image_id))
        if recorded is not None and self._given is None:
            path: Path | None = Path(recorded)
        else:
            path = find_below(self.folder, image_id, recorded) if self.folder else None
        if path is None and self._given is None and is_file(Path(str(image_id))):
            path = Path(str(image_id))
        return Source(path, exif, below(path, self.folder) if self.folder else None) if path else None

    def place(self, image_id: ImageId) -> Path | None:
        """The file that an image lies in, or would; None where that is in a store."""
        source = self.find(image_id)
        if source is None:
            return (self.folder or Path()) / str(image_id)
        if isinstance(source.path, StoredImage):
            return None if source.path.is_remote else Path(source.path.file)
        return source.path
