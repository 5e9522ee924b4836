"""WebDataset's tar shards: where their images lie, without unpacking anything."""

import io
import posixpath
import tarfile
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from lostreg.datasets.parts import Listing
from lostreg.errors import OptionError
from lostreg.images.files import NOTES, SUFFIXES, is_note
from lostreg.images.stores import FileRange, StoredImage, is_uri, open_file, telling

_REMOTE_BLOCK: Final = 1 << 20  # bytes that are asked for at once: one answer has the headers of many small images
_LOCAL_BLOCK: Final = 1 << 12
_PACKINGS: Final = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
    b"7z\xbc\xaf": "7z",
    b"Rar!": "rar",
}


@dataclass(frozen=True, eq=False)
class Shard:
    """The images of a shard.

    Attributes:
        file: absolute path or URI.
        starts: the first byte of each image in it, shape (n,), int64.
        sizes: the number of its bytes, shape (n,), int64.
    """

    file: str
    starts: NDArray[np.int64]
    sizes: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.starts)

    def image(self, number: int, name: str) -> StoredImage:
        """One of its images, by its number from 0."""
        return FileRange(name, self.file, int(self.starts[number]), int(self.sizes[number]))


def list_shard(file: str, name: str) -> Listing:
    """The images of a tar shard: members with an image's ending that are regular, or hard links to such ones.

    Of two members of one name the first counts. Names have no ``.`` and no empty part, so that ``./a.jpg`` and
    ``/a.jpg`` are ``a.jpg``. Nothing but headers is kept of a shard, however large. Where it is cut off or damaged,
    what lies before counts.

    Args:
        file: absolute path or URI.
        name: of the shard, that of its images begin with.

    Raises:
        OptionError: if it cannot be read, or is no tar file.
    """
    names: dict[str, int] = {}
    starts, sizes = array("q"), array("q")
    others: Counter[str] = Counter()
    fault = ""
    with telling(file), open_file(file) as raw:
        shard = io.BufferedReader(raw, _REMOTE_BLOCK if is_uri(file) else _LOCAL_BLOCK)  # type: ignore[type-var]
        end = shard.seek(0, io.SEEK_END)
        try:
            for member in _members(shard, name):
                path = _path(name, member.name)
                ending = NOTES if is_note(path) else posixpath.splitext(path)[1].lower()
                start, size = member.offset_data, member.size
                original = names.get(_path(name, member.linkname)) if member.islnk() else None
                if original is not None:
                    start, size = starts[original], sizes[original]
                is_file = original is not None or (member.isreg() and not member.issparse())
                if ending == NOTES or not path.lower().endswith(SUFFIXES):
                    if is_file:
                        others[ending] += 1
                elif not is_file:
                    others[f"{ending} ({'sparse' if member.isreg() else 'no file of its own'})"] += 1
                elif start + size > end:
                    raise tarfile.ReadError("its last image is cut")
                elif path not in names:
                    names[path] = len(names)
                    starts.append(start)
                    sizes.append(size)
        except OptionError:
            raise
        except (tarfile.TarError, EOFError, ValueError, OverflowError, RecursionError) as error:
            fault = f"{name} is cut off or damaged behind {len(names):,} images ({error}): what lies before counts"
    return Listing(list(names), Shard(file, np.array(starts, np.int64), np.array(sizes, np.int64)), others, fault)


def packing_of(head: bytes) -> str | None:
    """What a file is packed with, by its first bytes; None where they do not tell."""
    return next((kind for mark, kind in _PACKINGS.items() if head.startswith(mark)), None)


def _path(shard: str, member: str) -> str:
    parts = (part for part in member.split("/") if part not in ("", "."))
    return "/".join((shard, *parts)).replace("\0", "\\0")  # which no file's name holds


def _members(shard: BinaryIO, name: str) -> Iterator[tarfile.TarInfo]:
    """What a shard holds, but folders.

    Raises:
        OptionError: if it is no tar file.
        tarfile.TarError: where it is cut off or damaged, or more lies behind its end.
    """
    shard.seek(0)
    head = shard.read(512)
    shard.seek(0)
    try:
        tar = tarfile.open(fileobj=shard, mode="r:")  # noqa: SIM115 - closed below
    except tarfile.TarError as error:
        packing = packing_of(head)
        why = f"it is packed with {packing}, where no image can be read alone" if packing else error
        raise OptionError(f"{name}: expected a plain tar file ({why})") from error
    with tar:
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # which it keeps to extract from
            if not member.isdir():
                yield member
        shard.seek(tar.offset)
        block = shard.read(tarfile.BLOCKSIZE)
    if block != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("a broken header" if block else "no end mark")
    while block := shard.read(_REMOTE_BLOCK):
        if any(block):
            raise tarfile.ReadError("more behind its end mark, such as another archive")
