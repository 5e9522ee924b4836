"""Image files by their names alone: no decoder is loaded for them."""

import posixpath
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Final

HAS_HEIF: Final = find_spec("pillow_heif") is not None
HEIF_HINT: Final = 'HEIC is read with pillow-heif: pip install "lostreg[heif]"'
HEIF_SUFFIXES: Final = (".heic", ".heif", ".hif")
SUFFIXES: Final = (
    (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".jpe", ".jfif", ".mpo", ".apng", ".gif", ".avif")
    + (".avifs", ".jp2", ".j2k", ".jpc", ".jpf", ".jpx", ".j2c", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm")
    + HEIF_SUFFIXES * HAS_HEIF
)
"""Endings of files that are taken for images where nobody names them, in lower case; HEIC's with pillow-heif alone."""
NOTES: Final = "._* of macOS"
"""What files are counted as that `is_note` tells."""


def is_note(path: str) -> bool:
    """Whether a file is called like those in which macOS keeps notes on another one, whose ending they have.

    Example:
        >>> from lostreg.images.files import is_note
        >>> is_note("photos/._dog.jpg")
        True
    """
    return posixpath.basename(path).startswith("._")


@dataclass(frozen=True)
class ImageFile:
    """An image file of which it is known whether it is meant to be turned.

    Attributes:
        path: of the file.
        exif: whether it is turned as its EXIF orientation says, whatever holds for the others.
    """

    path: Path
    exif: bool

    def __str__(self) -> str:
        return str(self.path)
