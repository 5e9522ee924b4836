"""Names of files in an exported folder: such as the readers of the format find, no two of them alike."""

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from itertools import takewhile
from pathlib import PurePosixPath
from typing import Final

from lostreg.text import Unused

_PART: Final = re.compile(r"\.[^./#]+#(\d+)$")  # of a file: a frame of a video, a row of a table
_LONGEST: Final = 180  # bytes of a stem: file systems take 255 with everything that is put in front and behind


class Names:
    """Hands out stems, relative paths without suffix, each once. Of ``film.mp4#000120`` it is ``film-000120``.

    Two names are alike where their stems are, so that no two images share a label file; capitals and the way in which
    accents are written make no difference, because on some file systems they make none.

    Args:
        flat: whether folders become part of the file's name, and white space underscores.
        reserved: a folder's name that may not occur in a path.
    """

    def __init__(self, *, flat: bool = False, reserved: str = "") -> None:
        self._flat = flat
        self._reserved = reserved
        self._unused = Unused(_key)

    def stem(self, name: str) -> str:
        """A stem for an image's name, with slashes; the second of two that are alike ends in ``-2``."""
        return self._unused.name(self._safe(name))

    def _safe(self, name: str) -> str:
        *folders, last = [part for part in xml_text(file_name(name)).split("/") if part not in ("", ".")] or ["_"]
        parts = [self._folder(part) for part in folders] + [_visible(PurePosixPath(last).stem)]
        if self._flat:
            parts = [_short(re.sub(r"\s", "_", "__".join(parts)))]
        return "/".join(_short(part) for part in parts)

    def _folder(self, part: str) -> str:
        return part + "_" if part == self._reserved else _visible(part)


def xml_text(name: str) -> str:
    """A name without what XML has no place for: bytes that are not UTF-8, control characters, U+FFFE and U+FFFF."""
    return "".join(
        "_" if unicodedata.category(sign) in ("Cs", "Cc") or sign in "\ufffe\uffff" else sign for sign in name
    )


def file_name(name: str) -> str:
    """A name as that of a file of its own: a frame ``film.mp4#000120`` is ``film-000120.jpg``."""
    return _PART.sub(r"-\1.jpg", name)


def utf8_name(name: str) -> str:
    """A name that every tool can read: bytes that are not UTF-8 become ``_`` and their number, 0xE9 becomes ``_e9``."""
    return "".join(
        f"_{ord(sign) & 0xFF if 0xDC80 <= ord(sign) <= 0xDCFF else ord(sign):02x}"
        if sign == "\0" or unicodedata.category(sign) == "Cs"
        else sign
        for sign in name
    )


def escaped(text: str) -> str:
    """A text that can be written: what is not UTF-8 as in Python's source code."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def below_one_folder(names: Sequence[str]) -> list[str]:
    """Names as paths below one folder: no export says where a machine keeps files, and none leads out of its place.

    Absolute names lose the folders that all of these share, and so do names that lead up.
    """
    parts = {name: _parts(name) for name in names}
    absolute = [name for name in parts if name.startswith("/")]
    leaving = [name for name in parts if parts[name][:1] == [".."] and not name.startswith("/")]
    for group in (absolute, leaving):
        highest = max((parts[name].count("..") for name in group), default=0)
        for name in group:
            up = parts[name].count("..")
            parts[name] = ["_"] * (highest - up) + parts[name][up:]
        levels = zip(*(parts[name][:-1] for name in group), strict=False)
        shared = len(list(takewhile(lambda level: len(set(level)) == 1, levels)))
        parts |= {name: parts[name][shared:] for name in group}
    return ["/".join(parts[name]) or "_" for name in names]


def _parts(name: str) -> list[str]:
    """Folders and file; ``..`` only in front."""
    found: list[str] = []
    for part in name.split("/"):
        if part == ".." and found and found[-1] != "..":
            found.pop()
        elif part not in ("", "."):
            found.append(part)
    return found


def _visible(part: str) -> str:
    """Files whose names begin with a dot are hidden, and not found by readers; two dots would lead elsewhere."""
    return "_" + part[1:] if part.startswith(".") else part


def _short(part: str) -> str:
    content = part.encode("utf-8")
    if len(content) <= _LONGEST:
        return part
    digest = hashlib.sha256(content).hexdigest()[:12]
    return content[: _LONGEST - 13].decode("utf-8", "ignore") + "-" + digest


def _key(stem: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", stem).casefold())
