"""The image files that a command line names."""

import glob
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from lostreg.errors import OptionError


def find_images(arguments: Iterable[str]) -> list[Path]:
    """The image files that files, folders and globs stand for, folders and globs sorted.

    Raises:
        OptionError: if a folder holds no images or a glob matches none.
    """
    from lostreg.images import SUFFIXES

    found: list[Path] = []
    for argument in arguments:
        if not argument:
            raise OptionError("expected a file, folder or glob, found an empty argument")
        path = Path(argument)
        if path.is_dir():
            inside = sorted(item for item in _walk(path) if item.suffix.lower() in SUFFIXES)
            if not inside:
                raise OptionError(f"no images in {path}: expected files ending in {', '.join(SUFFIXES)}")
            found += inside
        elif glob.has_magic(argument) and not path.exists():
            # pathlib's glob takes no absolute patterns
            matches = sorted(Path(match) for match in glob.glob(argument, recursive=True))  # noqa: PTH207
            files = [match for match in matches if match.is_file()]
            if not files:
                raise OptionError(f"no file matches '{argument}'")
            found += files
        else:
            found.append(path)
    return found


def _walk(folder: Path) -> Iterator[Path]:
    """The files of a folder and of its subfolders, also those that are links, each folder once."""
    seen: set[str] = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        yield from (Path(place) / name for name in files)
