"""Photos without ground truth: the images that a folder, glob, list or URI stands for, and their order."""

import codecs
import glob
import hashlib
import os
import posixpath
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from lostreg.datasets.lake import (
    PACKED,
    Kinds,
    endings,
    expand,
    find_stored,
    is_packed,
    matching,
    sort_files,
    tell_others,
    unpack,
)
from lostreg.datasets.parts import Part
from lostreg.datasets.shards import packing_of
from lostreg.errors import LostregWarning, OptionError
from lostreg.images.files import SUFFIXES
from lostreg.images.stores import FileRange, StoredImage, arrow, check_uri, is_uri, local_path
from lostreg.jsonio import as_line


@dataclass(frozen=True)
class Collection(Sequence[Path | StoredImage]):
    """Images, in a fixed order, each to be read from its file or from wherever it is kept.

    It can be pickled, and so can each of its images: another process or machine reads them from the same places.

    Attributes:
        root: the folder that names are relative to, or the one file with many images, by whose name they begin; or its
            URI.
        names: of the images, relative to the root, with ``/`` between folders; a file elsewhere has its whole path.
        parts: where they are, in order, if they are no files below the root.
    """

    root: Path | str
    names: Sequence[str]
    parts: Sequence[Part] = ()

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Path | StoredImage:  # type: ignore[override]
        """What an image is read from, by its number."""
        name = self.names[index]
        if not self.parts:
            return FileRange(name, name) if is_uri(name) else self.path(name)
        number = range(len(self))[index]
        part = int(np.searchsorted(self._ends, number, side="right"))
        of_part = self.parts[part]
        return of_part.image(number - int(self._ends[part]) + len(of_part), name)

    def source(self, name: str) -> Path | StoredImage:
        """What an image is read from, by its name."""
        if not self.parts:
            return FileRange(name, name) if is_uri(name) else self.path(name)
        digests, numbers = self._numbers
        place = int(np.searchsorted(digests, _digest(name)))
        while self.names[numbers[place]] != name:
            place += 1
        return self[int(numbers[place])]

    def path(self, name: str) -> Path:
        """Where a file lies."""
        return Path(self.root) / name

    @property
    def place(self) -> str:
        """The root, wherever it is seen from."""
        return str(self.root.absolute()) if isinstance(self.root, Path) else self.root

    def fingerprint(self) -> str:
        """SHA-256 over the names in order."""
        digest = hashlib.sha256()
        for name in self.names:
            digest.update(as_line({"": name}).encode() + b"\n")
        return digest.hexdigest()

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        """Number of images up to the end of each part."""
        return np.cumsum([len(part) for part in self.parts])

    @cached_property
    def _numbers(self) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
        """Digests of the names, sorted, and the number of each: eight bytes a name; a dictionary takes a hundred."""
        digests = np.fromiter(map(_digest, self.names), np.uint32, len(self))
        order = np.argsort(digests, kind="stable").astype(np.uint32)
        return digests[order], order


def _digest(name: str) -> int:
    return zlib.crc32(name.encode("utf-8", "surrogateescape"))


def find_collection(source: str, apart: Path | str | None = None, *, every: int | None = None) -> Collection:
    """The images that a folder, a glob, a list, a file with many images or a URI of these stands for.

    Args:
        source: a folder, which is searched with all its subfolders; a glob such as ``photos/**/*.jpg``, or braces such
            as ``shard-{000..099}.tar``; a tar shard, a Parquet or Arrow file, or a video; the URI of one of these; or a
            text file with a path or URI of an image a line, or of a file with many, paths relative to its own folder.
            Lines that are empty or begin with ``#`` are left out, and so is what has been listed before. Where a
            folder or glob has image files, these count, else its files with many images.
        apart: a folder, or the URI of one, whose files are left out: what a run writes is none of its photos.
        every: of a video, frames from one image to the next; None for about a second.

    Raises:
        OptionError: if there is no such thing, or no image in it, or it cannot be listed.
    """
    if is_uri(source):
        local = local_path(source)
        if local is not None:
            return find_collection(local, apart, every=every)
        return Collection(*find_stored(source, apart if isinstance(apart, str) else None, every))
    apart = None if isinstance(apart, str) else apart
    path = Path(source)
    if source and path.is_dir():
        kinds = sort_files(os.path.relpath(file, path) for file in _files_below(path))
        return _of_kinds(path, kinds, path, _no_images(path), apart, every)
    if path.is_file():
        if path.suffix.lower() in SUFFIXES:
            raise OptionError(f"{path} is one image: expected a folder, a glob or a list; use `lostreg predict`")
        if path.suffix.lower() in PACKED:
            inside = _of_kinds(path.parent, sort_files([path.name]), path, f"no images in {path}", apart, every)
            return replace(inside, root=path)
        listed = _listed(path)
        if any(map(is_packed, listed)):
            return _of_listed(path, listed, every)
        return _collect(path.parent, listed, f"{path} lists no images: expected a path a line", apart)
    if _is_pattern(source):
        root = _fixed_part(path)
        kinds = sort_files(os.path.relpath(name, root) for name in matching(source, _files_like))
        nothing = f"no image matches '{source}': a [ that is part of a name is written [[]"
        return _of_kinds(root, kinds, source, nothing, apart, every)
    raise OptionError(f"{source!r}: no such folder or list; expected a folder, a glob or a file with a path a line")


def find_sources(arguments: Iterable[str]) -> list[Path | StoredImage]:
    """The images that files, folders, globs, files with many images and URIs stand for, folders and globs sorted.

    Each is called by its whole path or URI, so that images of several arguments are told apart. A glob stands for what
    `find_collection` finds; where that is nothing, for whatever files match.

    Args:
        arguments: as a command line names them; a file need not be there, and may have any ending.

    Raises:
        OptionError: if a folder holds no images, a glob matches none, or a URI cannot be listed.
    """
    sources: list[Path | StoredImage] = []
    expanded = ([one] if Path(one).exists() else expand(one) for one in arguments)  # what is there is meant
    for argument in chain.from_iterable(expanded):
        if not argument:
            raise OptionError("expected a file, folder or glob, found an empty argument")
        argument = local_path(argument) or argument
        path = Path(argument)
        if is_uri(argument) and argument.partition("?")[0].lower().endswith(SUFFIXES) and "*" not in argument:
            check_uri(argument)
            arrow("fs", argument)
            sources.append(FileRange(argument.partition("?")[0], argument))
        elif is_uri(argument) or path.suffix.lower() in PACKED:
            sources += _named(find_collection(argument))
        elif path.is_dir():
            kinds = sort_files(os.path.relpath(file, path) for file in _files_below(path))
            inside = _of_kinds(path, kinds, path, _no_images(path), None)
            sources += _named(inside) if inside.parts else sorted(map(inside.path, inside.names))
        elif glob.has_magic(argument) and not path.exists():
            # pathlib's glob takes no absolute patterns
            matches = sorted(Path(match) for match in glob.glob(argument, recursive=True))  # noqa: PTH207
            files = [match for match in matches if match.is_file()]
            if not files:
                raise OptionError(f"no file matches '{argument}'")
            kinds = sort_files(map(str, files))
            if kinds.images:
                tell_others(kinds.others, argument, next(iter(kinds.passed_over), None))
                files = sorted(map(Path, kinds.images))
            sources += _named(find_collection(argument)) if kinds.packed else files
        else:
            sources.append(path)
    return sources


def _named(collection: Collection) -> Iterator[Path | StoredImage]:
    """Its images, called by their whole paths or URIs."""
    root = collection.root
    if isinstance(root, Path):
        folder = root.parent if root.is_file() else root
        prefix = "" if folder == Path() else folder.as_posix()
    else:
        prefix = root.partition("?")[0]
        if is_packed(prefix):
            prefix = posixpath.dirname(prefix)
    for image in collection:
        if isinstance(image, Path):
            yield image
        else:
            yield replace(cast("Any", image), name=posixpath.join(prefix, image.name))


def find_images(arguments: Iterable[str]) -> list[Path]:
    """Like `find_sources`, for what works on image files alone.

    Raises:
        OptionError: likewise, or if an image is no file of its own.
    """
    sources = find_sources(arguments)
    stored = next((source for source in sources if isinstance(source, StoredImage)), None)
    if stored is not None:
        raise OptionError(f"{stored} is no image file of its own: `lostreg discover` reads it, this command does not")
    return [source for source in sources if isinstance(source, Path)]


def _of_kinds(
    root: Path, kinds: Kinds, place: object, nothing: str, apart: Path | None, every: int | None = None
) -> Collection:
    """Image files, where there are any, else the images in files that hold many."""
    if kinds.images or not kinds.packed:
        example = (root / kinds.passed_over[0]).as_posix() if kinds.passed_over else None
        tell_others(kinds.others, place, example)
        return _collect(root, kinds.images, nothing, apart)
    folder = os.path.abspath(root)  # noqa: PTH100 - without following links
    names, parts = unpack(kinds, str(place), lambda name: os.path.join(folder, name), every)  # noqa: PTH118
    if not names:
        raise OptionError(nothing)
    return Collection(root, names, parts)


def _collect(root: Path, names: Iterable[str], nothing: str, apart: Path | None) -> Collection:
    kept = tuple(dict.fromkeys(name if is_uri(name) else Path(name).as_posix() for name in names))
    if apart is not None and apart.exists():
        kept = tuple(name for name in kept if not (root / name).resolve().is_relative_to(apart.resolve()))
    if not kept:
        raise OptionError(nothing)
    return Collection(root, kept)


def _of_listed(path: Path, listed: list[str], every: int | None) -> Collection:
    """The images in the files that a list names."""
    other = next((line for line in listed if not is_packed(line)), None)
    if other is not None:
        raise OptionError(f"{path} lists {other} beside files that hold many images: expected one kind of these")
    folder = os.path.abspath(path.parent)  # noqa: PTH100 - without following links
    places = dict(
        (line.partition("?")[0], line) if is_uri(line) else (Path(line).as_posix(), os.path.join(folder, line))  # noqa: PTH118
        for line in listed
    )
    names, parts = unpack(Kinds([], list(places), [], Counter()), str(path), places.__getitem__, every)
    if not names:
        raise OptionError(f"no images in the files that {path} lists")
    return Collection(path.parent, names, parts)


def _is_pattern(text: str) -> bool:
    return glob.has_magic(text) or expand(text) != [text]


def _files_like(pattern: str) -> Iterator[str]:
    """The files that match a glob."""
    return (name for name in glob.glob(pattern, recursive=True) if not Path(name).is_dir())  # noqa: PTH207


def _no_images(folder: Path) -> str:
    return f"no images in {folder}: expected files ending in {endings()}"


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
        with path.open("rb") as file:
            head = file.read(8)
            packing = packing_of(head)
            if packing is not None:  # it may be larger than memory
                raise OptionError(
                    f"{path} is packed with {packing}: unpack it first; of archives, .tar alone is read as it is"
                )
            content = head + file.read()
    except OSError as error:
        raise OptionError(f"cannot read the list {path}: {error.strerror}") from error
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))  # as Windows' Notepad writes "Unicode"
    try:
        text = content.decode("utf-16") if is_utf16 else content.decode("utf-8-sig", "surrogateescape")
    except UnicodeDecodeError as error:
        raise OptionError(f"{path} is no list of images: it begins as UTF-16 and is none") from error
    if "\0" in text:
        raise OptionError(f"{path} is no list of images: expected a text file with a path a line")
    lines = (line.removesuffix("\r") for line in text.split("\n"))  # names may hold what else ends lines
    listed = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    listed = [local_path(line) or line for line in listed]
    uris = [line for line in listed if is_uri(line)]
    for uri in uris:
        check_uri(uri)
    if uris:
        arrow("fs", uris[0])
    return listed


def _fixed_part(pattern: Path) -> Path:
    """The folder in front of the first wildcard."""
    fixed = Path()
    for part in pattern.parts[:-1]:
        if _is_pattern(part):
            break
        fixed /= part
    return fixed
