"""What a run's folder says of itself, and where the image files of its ids lie."""

import json
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any, Final

from lostreg.datasets.base import ImageId
from lostreg.defaults import RESULTS_FILE
from lostreg.images.decode import SUFFIXES

_COCO: Final = ("{:012d}", "COCO_train2014_{:012d}", "COCO_val2014_{:012d}", "{}")


def results_of(folder: Path) -> dict[str, Any] | None:
    """What a run says of itself; None where it says nothing that can be read."""
    path = folder / RESULTS_FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


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
