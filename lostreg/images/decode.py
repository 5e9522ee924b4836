"""Image files in, arrays out: decode, orient, bound the size."""

import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

from lostreg.defaults import MAX_PIXELS
from lostreg.errors import ImageError

Item = TypeVar("Item")
ImageSource = str | Path | NDArray[np.uint8] | Image.Image

SUFFIXES: Final = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
# Named, so that no file is handed to one of the readers of Pillow that run other programs. JPEG covers MPO, of phones.
_FORMATS: Final = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
_DECODE_ERRORS: Final = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)
_SIXTEEN_BIT: Final = ("I;16", "I;16B", "I;16L", "I;16N", "I")
SIDEWAYS: Final = (5, 6, 7, 8)  # EXIF orientations that swap width and height
_UNDO_ORIENTATION: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@dataclass(frozen=True)
class Picture:
    """A decoded image.

    Attributes:
        pixels: RGB, shape (h, w, 3), uint8; smaller than the original where a side limit was asked for.
        width: of the original image, in pixels.
        height: of the original image, in pixels.
    """

    pixels: NDArray[np.uint8]
    width: int
    height: int


def read_image(
    source: ImageSource,
    *,
    max_side: int | None = None,
    exif: bool = True,
    max_pixels: int = MAX_PIXELS,
    check_size: Callable[[int, int], None] | None = None,
) -> Picture:
    """Decode one image as 8-bit RGB.

    Grey, palette, 16-bit and CMYK images are converted; transparent ones are laid on white.

    Args:
        source: a file, a PIL image, or an RGB array of shape (h, w, 3), uint8.
        max_side: the longer side is scaled down to this many pixels; None keeps the size. A JPEG file is then decoded
            at half, a quarter or an eighth of its size, where that is still no smaller than what is asked for.
        exif: whether to turn the image as its EXIF orientation says. Benchmarks' boxes refer to stored pixels,
            photographs are meant to be turned.
        max_pixels: a file with more pixels is refused before it is decoded.
        check_size: called with the width and height that the result will have, or have turned, before a file is
            decoded; may raise `ImageError`.

    Raises:
        ImageError: if the file is missing, unreadable, truncated or too large, or the array of another kind.
    """
    if isinstance(source, str | Path):
        path = Path(source)
        with decoding(str(path)), open_file(path, max_pixels) as image:
            return _decode_scaled(image, str(path), max_side, exif=exif, check_size=check_size)
    if isinstance(source, np.ndarray):
        pixels = _check_array(source)
    else:
        with decoding("PIL image"):
            pixels = _decode(source, "PIL image", exif=exif)
    height, width = pixels.shape[:2]
    size = _limited_size(width, height, max_side)
    if check_size:
        check_size(*size)
    return Picture(_resize(pixels, size), width, height)


@contextmanager
def open_file(path: Path, max_pixels: int) -> Iterator[Image.Image]:
    """An image file, not decoded yet; `ImageError` if it is missing, empty or has more than ``max_pixels``."""
    if not path.exists():
        raise ImageError(f"{path}: no such file")
    if not path.is_file():  # a pipe would be waited for
        raise ImageError(f"{path}: expected an image file, found a {'folder' if path.is_dir() else 'special file'}")
    if not path.stat().st_size:
        raise ImageError(f"{path}: not a readable image (empty file)")
    with _pillow_limit_lifted, Image.open(path, formats=_FORMATS) as image:
        if image.width * image.height > max_pixels:
            raise ImageError(
                f"{path}: {image.width}x{image.height} is {image.width * image.height:,} pixels, more than "
                f"the limit of {max_pixels:,}; not decoded (--max-pixels raises the limit)"
            )
        yield image


def _decode_scaled(
    image: Image.Image,
    name: str,
    max_side: int | None,
    *,
    exif: bool,
    check_size: Callable[[int, int], None] | None,
) -> Picture:
    stored = image.size
    target = _limited_size(*stored, max_side)
    if check_size:
        try:
            check_size(*target)
        except ImageError as error:
            raise ImageError(f"{name}: {error}") from error
    is_sideways = exif and image.getexif().get(ExifTags.Base.Orientation, 1) in SIDEWAYS
    if target != stored:
        image.draft(None, target)  # only JPEG can, and goes no lower than asked
    is_reduced = image.size != stored
    pixels = _decode(image, name, exif=exif)
    height, width = pixels.shape[:2]
    if is_reduced:
        width, height = stored[::-1] if is_sideways else stored
    return Picture(_resize(pixels, _limited_size(width, height, max_side)), width, height)


@contextmanager
def decoding(name: str) -> Iterator[None]:
    """Whatever a decoder raises on broken data comes out as one kind of error."""
    try:
        yield
    except _DECODE_ERRORS as error:
        reason = str(error).partition("\n")[0]
        raise ImageError(f"{name}: not a readable image ({reason})") from error


class _PillowLimitLifted:
    """Pillow's own, fixed pixel limit is off while any thread of ours decodes: ours is checked instead."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before: int | None = None

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                Image.MAX_IMAGE_PIXELS = self._before


_pillow_limit_lifted = _PillowLimitLifted()


def _decode(image: Image.Image, name: str, *, exif: bool) -> NDArray[np.uint8]:
    if not (image.width and image.height):
        raise ImageError(f"{name}: expected at least one pixel, found {image.width}x{image.height}")
    image = ImageOps.exif_transpose(image) if exif else _as_stored(image)
    if image.mode in _SIXTEEN_BIT:
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 0xFFFF:
            raise ImageError(f"{name}: expected 8 or 16 bits a channel, found values up to {grey.max()}")
        return np.repeat((grey // 257).astype(np.uint8)[:, :, None], 3, axis=2)
    if image.mode == "F":
        raise ImageError(f"{name}: expected 8 or 16 bits a channel, found floating point")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    # np.array, not asarray: PyTorch wants memory it may write to.
    return np.array(image.convert("RGB"))


def _as_stored(image: Image.Image) -> Image.Image:
    """The pixels without EXIF orientation: Pillow leaves it alone in every format but TIFF."""
    if image.format != "TIFF":
        return image
    undo = _UNDO_ORIENTATION.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    image.load()
    return image if undo is None else image.transpose(undo)


def _check_array(array: NDArray[Any]) -> NDArray[np.uint8]:
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8 or not array.size:
        raise ImageError(f"expected an RGB array (h, w, 3) of uint8, got {array.shape} of {array.dtype}")
    return np.require(array, requirements=["C", "W"])  # a copy of read-only memory, for PyTorch


def _limited_size(width: int, height: int, max_side: int | None) -> tuple[int, int]:
    if max_side is None or max(height, width) <= max_side:
        return width, height
    scale = max_side / max(height, width)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _resize(pixels: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    if size == pixels.shape[1::-1]:
        return pixels
    return np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)
