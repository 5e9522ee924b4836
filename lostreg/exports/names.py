"""Names of files in an exported folder: such as the readers of the format find, no two of them alike."""

import hashlib
import re
import unicodedata
from pathlib import PurePosixPath
from typing import Final

_LONGEST: Final = 180  # bytes of a stem: file systems take 255 with everything that is put in front and behind


class Names:
    """Hands out stems, relative paths without suffix, each once.

    Two names are alike where their stems are, so that no two images share a label file; capitals and the way in which
    accents are written make no difference, because on some file systems they make none.

    Args:
        flat: whether folders become part of the file's name, and white space underscores.
        reserved: a folder's name that may not occur in a path.
    """

    def __init__(self, *, flat: bool = False, reserved: str = "") -> None:
        self._flat = flat
        self._reserved = reserved
        self._used: set[str] = set()

    def stem(self, name: str) -> str:
        """A stem for an image's name, with slashes; the second of two that are alike ends in ``-2``."""
        stem = self._safe(name)
        free, number = stem, 1
        while _key(free) in self._used:
            number += 1
            free = f"{stem}-{number}"
        self._used.add(_key(free))
        return free

    def _safe(self, name: str) -> str:
        *folders, last = [part for part in printable(name).split("/") if part not in ("", ".")] or ["_"]
        parts = [self._folder(part) for part in folders] + [_visible(PurePosixPath(last).stem)]
        if self._flat:
            parts = [_short(re.sub(r"\s", "_", "__".join(parts)))]
        return "/".join(_short(part) for part in parts)

    def _folder(self, part: str) -> str:
        return part + "_" if part == self._reserved else _visible(part)


def printable(name: str) -> str:
    """A name without what is no character of any text: bytes that are not UTF-8, and control characters."""
    return "".join("_" if unicodedata.category(sign) in ("Cs", "Cc", "Cn") else sign for sign in name)


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
