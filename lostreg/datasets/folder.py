"""Photos without ground truth: the files that a folder, glob or list stands for, and their order."""

import glob
import hashlib
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lostreg.datasets.base import name_some
from lostreg.errors import LostregWarning, OptionError
from lostreg.images.files import HEIF_HINT, HEIF_SUFFIXES, SUFFIXES
from lostreg.jsonio import as_line


@dataclass(frozen=True)
class Collection:
    """Image files, in a fixed order.

    Attributes:
        root: the folder that names are relative to.
        names: of the files, relative to the root, with ``/`` between folders; a file elsewhere has its whole path.
    """

    root: Path
    names: Sequence[str]

    def __len__(self) -> int:
        return len(self.names)

    def path(self, name: str) -> Path:
        """Where a file lies."""
        return self.root / name

    def fingerprint(self) -> str:
        """SHA-256 over the names in order."""
        digest = hashlib.sha256()
        for name in self.names:
            digest.update(as_line({"": name}).encode() + b"\n")
        return digest.hexdigest()


def find_collection(source: str, apart: Path | None = None) -> Collection:
    """The images that a folder, a glob or a list stands for.

    Args:
        source: a folder, which is searched with all its subfolders; a glob such as ``photos/**/*.jpg``; or a text file
            with a path a line, relative to its own folder. Lines that are empty or begin with ``#`` are left out, and
            so is what has been listed before.
        apart: a folder whose files are left out: what a run writes is none of its photos.

    Raises:
        OptionError: if there is no such thing, or no image in it.
    """
    path = Path(source)
    if source and path.is_dir():
        inside = sorted(os.path.relpath(file, path) for file in _images_below(path))
        return _collect(path, inside, _no_images(path), apart)
    if path.is_file():
        if path.suffix.lower() in SUFFIXES:
            raise OptionError(f"{path} is one image: expected a folder, a glob or a list; use `lostreg predict`")
        return _collect(path.parent, _listed(path), f"{path} lists no images: expected a path a line", apart)
    if glob.has_magic(source):
        root = _fixed_part(path)
        matches = (name for name in glob.glob(source, recursive=True) if not Path(name).is_dir())  # noqa: PTH207
        found = sorted(os.path.relpath(name, root) for name in _images_of(matches, source))
        nothing = f"no image matches '{source}': a [ that is part of a name is written [[]"
        return _collect(root, found, nothing, apart)
    raise OptionError(f"{source!r}: no such folder or list; expected a folder, a glob or a file with a path a line")


def find_images(arguments: Iterable[str]) -> list[Path]:
    """The image files that files, folders and globs stand for, folders and globs sorted.

    Args:
        arguments: as a command line names them; a file need not be there, and may have any ending.

    Raises:
        OptionError: if a folder holds no images or a glob matches none.
    """
    paths: list[Path] = []
    for argument in arguments:
        if not argument:
            raise OptionError("expected a file, folder or glob, found an empty argument")
        path = Path(argument)
        if path.is_dir():
            inside = sorted(map(Path, _images_below(path)))
            if not inside:
                raise OptionError(_no_images(path))
            paths += inside
        elif glob.has_magic(argument) and not path.exists():
            # pathlib's glob takes no absolute patterns
            matches = sorted(Path(match) for match in glob.glob(argument, recursive=True))  # noqa: PTH207
            files = [match for match in matches if match.is_file()]
            if not files:
                raise OptionError(f"no file matches '{argument}'")
            paths += files
        else:
            paths.append(path)
    return paths


def _collect(root: Path, names: Iterable[str], nothing: str, apart: Path | None) -> Collection:
    kept = tuple(dict.fromkeys(Path(name).as_posix() for name in names))
    if apart is not None and apart.exists():
        kept = tuple(name for name in kept if not (root / name).resolve().is_relative_to(apart.resolve()))
    if not kept:
        raise OptionError(nothing)
    return Collection(root, kept)


def _images_below(folder: Path) -> Iterator[str]:
    return _images_of(_files_below(folder), folder)


def _images_of(files: Iterable[str], place: str | Path) -> Iterator[str]:
    """The files that end like images; in the end a warning that counts the others by their endings."""
    others: Counter[str] = Counter()
    for file in files:
        if file.lower().endswith(SUFFIXES):
            yield file
        else:
            others[os.path.splitext(file)[1].lower()] += 1  # noqa: PTH122 - lighter than paths
    if others:
        counts = sorted(others.items(), key=lambda item: (-item[1], item[0]))
        endings = [f"{count:,} {ending or 'without ending'}" for ending, count in counts]
        hint = f" ({HEIF_HINT})" if others.keys() & set(HEIF_SUFFIXES) else ""
        message = f"left out of {place}, by their endings: {name_some(endings)}{hint}"
        warnings.warn(message, LostregWarning, stacklevel=2)


def _no_images(folder: Path) -> str:
    return f"no images in {folder}: expected files ending in {name_some(list(SUFFIXES), 7)}"


def _files_below(folder: str | Path) -> Iterator[str]:
    """The files of a folder and of its subfolders, also those that are links, each folder once."""
    seen: set[str] = set()
    for place, folders, files in os.walk(folder, followlinks=True, onerror=_tell):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        yield from (os.path.join(place, name) for name in files)  # noqa: PTH118 - lighter than paths


def _tell(error: OSError) -> None:
    warnings.warn(f"cannot look into {error.filename}: {error.strerror}", LostregWarning, stacklevel=2)


def _listed(path: Path) -> list[str]:
    try:
        text = path.read_bytes().decode("utf-8-sig", "surrogateescape")
    except OSError as error:
        raise OptionError(f"cannot read the list {path}: {error.strerror}") from error
    if "\0" in text:
        raise OptionError(f"{path} is no list of images: expected a text file with a path a line")
    lines = (line.removesuffix("\r") for line in text.split("\n"))  # names may hold what else ends lines
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def _fixed_part(pattern: Path) -> Path:
    """The folder in front of the first wildcard."""
    fixed = Path()
    for part in pattern.parts[:-1]:
        if glob.has_magic(part):
            break
        fixed /= part
    return fixed
