"""Images where image lakes keep them: in shards and tables, in folders of stores."""

import fnmatch
import glob
import json
import posixpath
import re
import warnings
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice, repeat
from typing import Final
from urllib.parse import unquote

from lostreg.datasets.base import name_some
from lostreg.datasets.parts import Listing, NoImagesError, Part
from lostreg.datasets.shards import list_shard
from lostreg.datasets.tables import cell_at, forget_tables, list_table
from lostreg.datasets.video import VIDEOS, forget_videos, frame_at, list_video
from lostreg.errors import LostregWarning, OptionError
from lostreg.images.files import HEIF_HINT, HEIF_SUFFIXES, NOTES, SUFFIXES, is_note
from lostreg.images.stores import (
    FileRange,
    StoredImage,
    arrow,
    check_uri,
    close_files,
    is_uri,
    join_uri,
    list_files,
    open_file,
    plain_uri,
    range_at,
)

PACKED: Final[dict[str, Callable[[str, str], Listing]]] = {
    ".tar": list_shard,
    ".parquet": list_table,
    ".arrow": list_table,
    **dict.fromkeys(VIDEOS, list_video),
}
"""Endings of files that hold many images, and what lists these, by file and name."""

MOST_NAMES: Final = 1_000_000
"""That a pattern with braces stands for at most."""

_BRACES: Final = re.compile(r"\{(?:(\d{1,9})\.\.(\d{1,9})|([^{}/]*,[^{}/]*))\}")
_MAGIC: Final = frozenset("*[")  # of the globs of stores, where a ? begins settings
_STATE: Final = "state.json"  # of a folder that Hugging Face's `datasets` saved: its files, caches not among them
_STATE_FILES: Final = "_data_files"
_AT_ONCE: Final = 16  # files of a store that are listed together


@dataclass
class Kinds:
    """Files, by what their endings say.

    Attributes:
        images: image files.
        packed: files that hold many images.
        states: where Hugging Face's `datasets` says which files count.
        others: the rest, counted by endings.
        passed_over: files that hold many images and count among the others, because there are image files.
    """

    images: list[str]
    packed: list[str]
    states: list[str]
    others: Counter[str]
    passed_over: list[str] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Objects:
    """The images of a store's folder, each a file of its own.

    Attributes:
        folder: its URI.
        count: of the images.
    """

    folder: str
    count: int

    def __len__(self) -> int:
        return self.count

    def image(self, number: int, name: str) -> StoredImage:
        """One of them: its name says it all."""
        del number
        return FileRange(name, join_uri(self.folder, name))


def sort_files(files: Iterable[str]) -> Kinds:
    """Tell files by their endings. Where there are images, files that hold many count among the others."""
    kinds = Kinds([], [], [], Counter())
    packings = tuple(PACKED)
    for file in files:
        low = file.lower()
        if is_note(low):
            kinds.others[NOTES] += 1
        elif low.endswith(SUFFIXES):
            kinds.images.append(file)
        elif low.endswith(packings):
            kinds.packed.append(file)
        else:
            kinds.others[_ending(low)] += 1
            if posixpath.basename(low) == _STATE:
                kinds.states.append(file)
    kinds.images.sort()
    kinds.packed.sort()
    if kinds.images:
        kinds.others.update(_ending(file) for file in kinds.packed)
        kinds.passed_over, kinds.packed = kinds.packed, []
    return kinds


def _ending(name: str) -> str:
    return posixpath.splitext(name)[1].lower()


def tell_others(others: Counter[str], place: object, passed_over: str | None = None) -> None:
    """Warn of what is left out.

    Args:
        others: counted by endings.
        place: what is read.
        passed_over: path or URI of one of these that holds many images, such as a video.
    """
    if others:
        counts = sorted(others.items(), key=lambda item: (-item[1], item[0]))
        endings = [f"{count:,} {ending or 'without ending'}" for ending, count in counts]
        hints = [HEIF_HINT] if others.keys() & set(HEIF_SUFFIXES) else []
        if passed_over is not None:
            folder, name = posixpath.split(passed_over)
            alone = posixpath.join(glob.escape(folder), f"*{posixpath.splitext(name)[1]}")
            hints.append(f'there are photos, and videos, shards and tables are taken alone, such as "{alone}"')
        hint = f" ({'; '.join(hints)})" if hints else ""
        message = f"left out of {place}, by their endings: {name_some(endings)}{hint}"
        warnings.warn(message, LostregWarning, stacklevel=2)


def unpack(
    kinds: Kinds, place: str, file_of: Callable[[str], str], every: int | None
) -> tuple[tuple[str, ...], tuple[Part, ...]]:
    """The names and places of the images in files that hold many.

    Args:
        kinds: the files; of a folder that Hugging Face's `datasets` saved, those alone that it lists.
        place: what messages call the folder.
        file_of: absolute path or URI of a file.
        every: frames of a video from one image to the next; None for about a second.

    Raises:
        OptionError: if one cannot be read, several columns of one could hold images, or there are tables without such a
            column alone.
    """
    close_files()
    forget_tables()
    forget_videos()
    packed = _without_caches(kinds, file_of)
    files = [file_of(name) for name in packed]
    names: list[str] = []
    parts, others = list[Part](), Counter(kinds.others)
    without: NoImagesError | None = None
    with ThreadPoolExecutor(_AT_ONCE if any(map(is_uri, files)) else 1) as pool:
        for name, listing in zip(packed, pool.map(_listing, files, packed, repeat(every)), strict=True):
            if isinstance(listing, NoImagesError):  # such as what img2dataset writes of a shard beside it
                without = without or listing
                others[f"{_ending(name)} without images"] += 1
                continue
            names += listing.names
            parts.append(listing.part)
            others += listing.others
            if listing.fault:
                warnings.warn(listing.fault, LostregWarning, stacklevel=2)
    if without and not names:
        raise without
    tell_others(others, place)
    return tuple(names), tuple(parts)


def _listing(file: str, name: str, every: int | None) -> Listing | NoImagesError:
    ending = _ending(name)
    try:
        return list_video(file, name, every) if ending in VIDEOS else PACKED[ending](file, name)
    except NoImagesError as error:
        return error


def _without_caches(kinds: Kinds, file_of: Callable[[str], str]) -> list[str]:
    """The files that count: where a folder's state lists its own, no others of it."""
    packed = kinds.packed
    for state in kinds.states:
        folder = posixpath.dirname(state)
        listed = _listed_files(file_of(state))
        if listed is not None:
            mine = {posixpath.join(folder, name) for name in listed}
            missing = sorted(mine - set(packed))
            if missing:
                raise OptionError(f"{missing[0]} is not there, which {state} lists")
            packed = [name for name in packed if posixpath.dirname(name) != folder or name in mine]
    return packed


def _listed_files(state: str) -> list[str] | None:
    try:
        with open_file(state) as file:
            return [str(entry["filename"]) for entry in json.loads(file.read(1 << 20))[_STATE_FILES]]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):  # something else of that name
        return None


def expand(pattern: str) -> list[str]:
    """The names that braces stand for, in order: ``{000..099}`` for numbers, as wide as the first, ``{a,b}`` for words.

    Raises:
        OptionError: if there are more than `MOST_NAMES`, or a range goes down.

    Examples:
        >>> expand("shard-{08..10}.tar")
        ['shard-08.tar', 'shard-09.tar', 'shard-10.tar']
        >>> expand("{train,val}/*.tar")
        ['train/*.tar', 'val/*.tar']
    """
    braces = _BRACES.search(pattern)
    if braces is None:
        return [pattern]
    first, last, words = braces.groups()
    numbers = range(int(first or 0), int(last or 0) + 1)
    count, tails = len(numbers) if words is None else words.count(",") + 1, expand(pattern[braces.end() :])
    if not 1 <= count * len(tails) <= MOST_NAMES:
        raise OptionError(f"{pattern}: expected {{LOW..HIGH}} or {{A,B}} for at most {MOST_NAMES:,} names")
    middles = [f"{number:0{len(first)}}" for number in numbers] if words is None else words.split(",")
    return [f"{pattern[: braces.start()]}{middle}{tail}" for middle in middles for tail in tails]


def matching(pattern: str, matches: Callable[[str], Iterable[str]]) -> Iterator[str]:
    """What a glob stands for, each name once; of braces, each must stand for something.

    Args:
        pattern: with wildcards or braces.
        matches: the names that match a pattern without braces.

    Raises:
        OptionError: if a name is missing.
    """
    patterns, told = expand(pattern), set[str]()
    for one in patterns:
        names = list(matches(one))
        if not names and patterns != [pattern]:
            raise OptionError(f"{one}: no such file, which {pattern} stands for, too")
        yield from (name for name in names if name not in told)
        told.update(names)


def is_packed(place: str) -> bool:
    """Whether a path or URI ends like a file that holds many images."""
    return (place.partition("?")[0] if is_uri(place) else place).lower().endswith(tuple(PACKED))


def find_stored(
    uri: str, apart: str | None = None, every: int | None = None
) -> tuple[str, tuple[str, ...], tuple[Part, ...]]:
    """The images that the URI of a store's folder, glob or file stands for.

    Args:
        uri: of it.
        apart: URI of a folder whose files are left out.
        every: frames of a video from one image to the next; None for about a second.

    Returns:
        The URI of the folder that names are relative to, or of the one file, the names, and where the images are.

    Raises:
        OptionError: if there is no such thing, no image in it, or it cannot be listed.
    """
    check_uri(uri)
    path, mark, query = uri.partition("?")
    path, pattern = _fixed_part(path)
    root = folder = path.rstrip("/") + mark + query
    files = list_files(root)
    if files is None:  # it is a file
        head, _, last = path.rstrip("/").rpartition("/")
        folder, files = head + mark + query, [unquote(last, errors="surrogateescape")]
        if files[0].lower().endswith(SUFFIXES):
            raise OptionError(f"{uri} is one image: expected a folder, a glob, or a file with many images")
    if apart is not None:
        files = [name for name in files if not f"{plain_uri(root)}/{name}".startswith(f"{plain_uri(apart)}/")]
    if pattern:
        there = sorted(files)
        files = list(matching("/".join(pattern), lambda one: _matching(there, one)))
    kinds = sort_files(files)
    if kinds.images:
        example = f"{path.rstrip('/')}/{kinds.passed_over[0]}" if kinds.passed_over else None
        tell_others(kinds.others, uri, example)
        return root, tuple(kinds.images), (Objects(root, len(kinds.images)),)
    names, parts = unpack(kinds, uri, lambda name: join_uri(folder, name), every)
    if not names:
        raise OptionError(f"no images in {uri}: expected files ending in {endings()}")
    return root, names, parts


def endings() -> str:
    """What image files end in, and files that hold many of them, for people."""
    return f"{name_some(list(SUFFIXES), 7)}, or in {name_some(list(PACKED), 7)}"


def _fixed_part(path: str) -> tuple[str, list[str]]:
    """The folder in front of the first wildcard, and the parts of the pattern behind it; none where there is none."""
    scheme, _, rest = path.partition("://")
    parts = rest.split("/")
    first = next((number for number, part in enumerate(parts) if _MAGIC & set(part) or _BRACES.search(part)), None)
    if first is None:
        return path, []
    return f"{scheme}://" + "/".join(parts[:first]), [unquote(part) for part in parts[first:]]


def _matching(names: Sequence[str], pattern: str) -> Iterator[str]:
    """The names, which are sorted, that fit a glob without braces: only those that begin as it does are looked at."""
    fixed = pattern[: next((place for place, letter in enumerate(pattern) if letter in _MAGIC), len(pattern))]
    parts = pattern.split("/")
    for name in islice(names, bisect_left(names, fixed), None):
        if not name.startswith(fixed):
            return
        if _matches(name.split("/"), parts):
            yield name


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether a name fits a glob, part by part; ``**`` is any number of folders."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_matches(parts[start:], pattern[1:]) for start in range(len(parts) + 1))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def stored_at(name: str, locator: str) -> StoredImage | None:
    """The image at a place that `StoredImage.locator` wrote; None for the path of a file.

    Raises:
        OptionError: if pyarrow is needed for it and not installed.
    """
    image = cell_at(name, locator) or frame_at(name, locator) or range_at(name, locator)
    if image is not None and image.is_remote:
        arrow("fs", image.file)
    return image
