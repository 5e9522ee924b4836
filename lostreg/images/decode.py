"""Image files in, arrays out: decode, orient, bound the size and the memory."""

import io
import os
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, TypeVar, Union

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from lostreg.defaults import MAX_PIXELS
from lostreg.errors import ImageError, ImageUnavailableError, OptionError
from lostreg.images.files import HAS_HEIF, HEIF_HINT, ImageFile
from lostreg.images.memory import describe_bytes, host_bytes
from lostreg.images.metadata import SIDEWAYS, Orientation, exif_orientation, hide_metadata, turn
from lostreg.images.stores import StoredImage

if TYPE_CHECKING:
    import torch

Item = TypeVar("Item")

# Named, so that no file is handed to one of the readers of Pillow that run other programs. JPEG covers MPO, of phones.
_FORMATS: Final = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF", "JPEG2000", "PPM")
_HEIF_BRANDS: Final = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")
_INVERSE: Final = {6: 8, 8: 6}  # orientations that undo others; the rest undo themselves
_SIXTEEN_BIT: Final = ("I;16", "I;16B", "I;16L", "I;16N", "I")
_ALWAYS_SIXTEEN_BIT: Final = ("PNG", "PPM")  # formats whose pixels are scaled where Pillow opens them as "I"
_PIXEL_BYTES: Final = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2, "I;16N": 2}  # in Pillow; others 4
_DECODER_BYTES: Final = {"WEBP": 12, "AVIF": 8, "HEIF": 8, "JPEG2000": 24, "GIF": 8, "TIFF": 4}  # a pixel, besides
_COEFFICIENT_BYTES: Final = 2  # a pixel and channel of a progressive JPEG file, whose coefficients are all kept
_LARGE_BYTES: Final = 1 << 28  # images that need more are decoded one at a time, if there is memory
_BAND_PIXELS: Final = 1 << 20  # that are converted together
_TILE_WIDTH, _TILE_HEIGHT = 322, 323  # tags of TIFF
_HEAD_BYTES: Final = 1 << 18
_EXIF: Final = b"Exif\0\0"  # in front of the block that Pillow hands on
_ADDRESS: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # no C:/
_NO_MEMORY: Final = -4  # of OpenCV


ImageSource = Union[
    str, "os.PathLike[str]", bytes, BinaryIO, Image.Image, "NDArray[np.uint8]", "torch.Tensor", ImageFile, StoredImage
]
"""What stands for an image: path, content, PIL image, array (h, w, 3) of uint8, tensor (3, h, w) or (h, w, 3)."""


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


@dataclass(frozen=True)
class Header:
    """What an image file says before it is decoded.

    Attributes:
        format: in Pillow's words.
        mode: likewise.
        width: as stored, in pixels.
        height: as stored, in pixels.
        orientation: how they are meant to be turned.
    """

    format: str
    mode: str
    width: int
    height: int
    orientation: Orientation

    def size(self, *, exif: bool) -> tuple[int, int]:
        """Width and height in pixels, as stored or turned."""
        is_turned = exif and self.orientation.value in SIDEWAYS
        return (self.height, self.width) if is_turned else (self.width, self.height)


def read_image(
    source: ImageSource,
    *,
    max_side: int | None = None,
    exif: bool = True,
    max_pixels: int = MAX_PIXELS,
    check_size: Callable[[int, int], None] | None = None,
) -> Picture:
    """Decode one image as 8-bit RGB.

    Grey, palette, 16-bit and CMYK images are converted; transparent ones are laid on white; of several pictures in a
    file the first is taken.

    Args:
        source: a file's path, its content as bytes or an open file object, a PIL image, an RGB array of shape
            (h, w, 3), uint8, or a tensor of shape (3, h, w) or (h, w, 3), uint8.
        max_side: the longer side is scaled down to this many pixels; None keeps the size. A JPEG file is then decoded
            at half, a quarter or an eighth of its size, where that is still no smaller than what is asked for.
        exif: whether to turn the image as its EXIF orientation says.
        max_pixels: a file with more pixels is refused before it is decoded.
        check_size: called with the width and height that the result will have, or have turned, before a file is
            decoded; may raise `ImageError`.

    Raises:
        ImageUnavailableError: if the file is missing, cannot be read now, or needs more memory than is free.
        ImageError: if it is no image that can be read, or too large, or the array of another kind.

    Example:
        >>> from lostreg.images.decode import read_image
        >>> read_image("dog.jpg", max_side=224).pixels.shape
        (165, 224, 3)
    """
    if isinstance(source, ImageFile):
        exif, source = source.exif, source.path
    name = name_of(source)
    with decoding(name):
        if isinstance(source, Image.Image):
            if source.format != "TIFF":  # an orientation may stand after the pixels
                _load(source)
            stored = _orientation_of(source)
            _load(source)
            pixels, left = _to_rgb(source, name), _orientation_of(source)
            # Pillow turns a TIFF image as it loads it, which is undone where pixels are wanted as stored.
            undo = _INVERSE.get(stored, stored) if left != stored else 1
            pixels = turn(pixels, left if exif else undo)
        elif isinstance(source, np.ndarray) or _is_tensor(source):
            pixels = _check_array(source)
        else:
            pixels, width, height = _decode(_content(source), name, max_side, exif, max_pixels, check_size)
            return Picture(_resize(pixels, _limited_size(width, height, max_side)), width, height)
    height, width = pixels.shape[:2]
    size = _limited_size(width, height, max_side)
    if check_size:
        check_size(*size)
    return Picture(_resize(pixels, size), width, height)


def read_header(path: Path) -> Header:
    """What a file says of its picture, without decoding it: of a JPEG file the beginning is enough.

    Raises:
        ImageUnavailableError: if the file is missing or cannot be read now.
        ImageError: if it is no image that can be read.

    Example:
        >>> from lostreg.images.decode import read_header
        >>> read_header(Path("dog.jpg")).size(exif=True)
        (646, 476)
    """
    with decoding(str(path)):
        for most in (_HEAD_BYTES, -1):
            content = _read_file(path, most)
            is_whole = most < 0 or len(content.getbuffer()) < most
            try:
                with _open_image(content, str(path), sys.maxsize) as (image, orientation):
                    header = Header(image.format or "", image.mode, *image.size, orientation)
            except Exception:
                if is_whole:
                    raise
            else:
                if is_whole or (header.format == "JPEG" and orientation.is_plain):
                    break
    return header


def held(source: ImageSource) -> ImageSource:
    """What can be read more than once, and travel: the content of a file object, the path of a folder's entry."""
    if isinstance(source, os.DirEntry):  # it cannot be pickled
        return str(source.path)
    is_open = callable(getattr(source, "read", None)) and not isinstance(source, StoredImage)
    return _content(source).getvalue() if is_open else source


def check_several(images: object) -> None:
    """Raise `OptionError` where one image stands in place of several: a path is no list of letters."""
    is_one = isinstance(images, str | os.PathLike | bytes | Image.Image | ImageFile) or hasattr(images, "read")
    is_one = is_one or ((isinstance(images, np.ndarray) or _is_tensor(images)) and images.ndim < 4)  # type: ignore[attr-defined]
    if is_one or not isinstance(images, Iterable):
        raise OptionError(f"expected several images, such as a list of paths, got one {type(images).__name__}")


def listed(images: Iterable[Item]) -> Sequence[Item]:
    """Images that can be asked for by number, of any iterable; raises as `check_several`."""
    check_several(images)
    return images if isinstance(images, Sequence) else list(images)


def name_of(source: object) -> str:
    """What messages call an image: its path, or what kind of thing it is."""
    if isinstance(source, str | os.PathLike):
        return os.fsdecode(source)
    return str(source) if isinstance(source, ImageFile | StoredImage) else "image"


@contextmanager
def decoding(name: str) -> Iterator[None]:
    """Whatever a decoder raises on one image comes out as that image's `ImageError`.

    Raises:
        ImageUnavailableError: where the system or a lack of memory is at fault, not the image.
        ImageError: otherwise.
    """
    try:
        yield
    except ImageError:
        raise
    except FileNotFoundError as error:
        raise ImageUnavailableError(f"{name}: no such file") from error
    except Exception as error:
        if isinstance(error, MemoryError) or (isinstance(error, cv2.error) and error.code == _NO_MEMORY):
            raise ImageUnavailableError(f"{name}: not enough memory to decode it") from error
        if isinstance(error, OSError) and error.errno is not None:
            raise ImageUnavailableError(f"{name}: cannot be read ({error.strerror})") from error
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ImageError(f"{name}: not a readable image ({reason})") from error


def _content(source: object) -> io.BytesIO:
    """An encoded image, in memory of our own."""
    if isinstance(source, str | os.PathLike):
        path = Path(os.fsdecode(source))
        if _ADDRESS.match(os.fsdecode(source)) and not path.exists():
            raise ImageError(
                f"{os.fsdecode(source)}: expected an image, not an address: download it first, or give its bytes or a "
                "path; what lies in stores, such as s3://, is for lostreg discover"
            )
        return _read_file(path)
    if isinstance(source, StoredImage):
        return io.BytesIO(source.read(partial(_check_memory, name=source.name, why="its bytes take")))
    if callable(read := getattr(source, "read", None)):
        with suppress(AttributeError, OSError):  # no pipe: from its beginning, wherever what wrote it has left off
            source.seek(0)  # type: ignore[attr-defined]
        source = read()
    if isinstance(source, bytes | bytearray | memoryview):
        return io.BytesIO(source)
    raise ImageError(
        "expected an image: a path, a file object open for reading bytes, bytes, a PIL image, an array (h, w, 3) or a "
        f"tensor (3, h, w) of uint8, got {type(source).__name__}"
    )


def _read_file(path: Path, most: int = -1) -> io.BytesIO:
    """A file, or at most so many bytes of its beginning."""
    if not path.exists():
        raise ImageUnavailableError(f"{path}: no such file")
    if not path.is_file():  # a pipe would be waited for
        raise ImageError(f"{path}: expected an image file, found a {'folder' if path.is_dir() else 'special file'}")
    _check_memory(path.stat().st_size if most < 0 else 0, str(path), "it is a file that takes")
    with path.open("rb") as file:
        return io.BytesIO(file.read(most))


def _check_memory(needed: int, name: str, why: str) -> None:
    if needed < _LARGE_BYTES:
        return
    free = host_bytes()
    if free is not None and needed > free:
        raise ImageUnavailableError(
            f"{name}: {why} up to {describe_bytes(needed)} of memory, but {describe_bytes(free)} are free"
        )


@contextmanager
def _open_image(content: io.BytesIO, name: str, max_pixels: int) -> Iterator[tuple[Image.Image, Orientation]]:
    """An image, not decoded yet, whose decoder sees no metadata; and how it is meant to be turned.

    Raises:
        ImageError: if it is empty, of no known format, or has more than ``max_pixels``.
    """
    with content.getbuffer() as data:
        if not data:
            raise ImageError(f"{name}: not a readable image (empty file)")
        orientation = hide_metadata(data)
        is_heif = bytes(data[4:8]) == b"ftyp" and bytes(data[8:12]) in _HEIF_BRANDS
    with _pillow_limit_lifted, _open_heif(content, name) if is_heif else _open_others(content) as image:
        if not (image.width and image.height):
            raise ImageError(f"{name}: expected at least one pixel, found {image.width}x{image.height}")
        if image.width * image.height > max_pixels:
            raise ImageError(
                f"{name}: {image.width}x{image.height} is {image.width * image.height:,} pixels, more than "
                f"the limit of {max_pixels:,}; not decoded (--max-pixels raises the limit)"
            )
        if image.format == "AVIF":  # its container's own rotation
            orientation = exif_orientation(image.info.get("exif", b"").removeprefix(_EXIF)) or Orientation()
        yield image, orientation


def _open_others(content: io.BytesIO) -> Image.Image:
    try:
        return Image.open(content, formats=_FORMATS)
    except UnidentifiedImageError:
        raise ValueError(f"cannot identify it as one of {', '.join(_FORMATS)}") from None


def _open_heif(content: io.BytesIO, name: str) -> Image.Image:
    """HEIC or HEIF, which its decoder turns by itself."""
    if not HAS_HEIF:
        raise ImageError(f"{name}: {HEIF_HINT}")
    from pillow_heif import HeifImageFile

    image: Image.Image = HeifImageFile(content)  # type: ignore[no-untyped-call]
    return image


def _decode(
    content: io.BytesIO,
    name: str,
    max_side: int | None,
    exif: bool,
    max_pixels: int,
    check_size: Callable[[int, int], None] | None,
) -> tuple[NDArray[np.uint8], int, int]:
    """Pixels, perhaps at a fraction of the size, and the width and height of the original."""
    with _open_image(content, name, max_pixels) as (image, orientation):
        stored = image.size
        target = _limited_size(*stored, max_side)
        if check_size:
            try:
                check_size(*target)
            except ImageError as error:
                raise type(error)(f"{name}: {error}") from error
        if target != stored and image.format == "JPEG":
            image.draft(None, target)  # goes no lower than asked
        value = orientation.value if exif else 1
        needed = _decoding_bytes(image, stored, is_copied=value != 1 or target == stored) + len(content.getbuffer())
        is_large = needed >= _LARGE_BYTES
        with one_at_a_time if is_large else nullcontext():
            why = f"{stored[0]}x{stored[1]} pixels of mode {image.mode} in {image.format} take"
            _check_memory(needed, name, why)
            pixels = turn(_to_rgb(image, name), value)
        width, height = stored[::-1] if value in SIDEWAYS else stored
    return pixels, width, height


one_at_a_time: AbstractContextManager[object] = threading.Lock()
"""Whoever decodes a large image holds it."""


def _decoding_bytes(image: Image.Image, stored: tuple[int, int], *, is_copied: bool) -> int:
    """An upper bound on what decoding takes at its peak: the decoder's own, Pillow's image, RGB and its copies."""
    pixels, whole = image.width * image.height, stored[0] * stored[1]
    if isinstance(image, TiffImageFile):  # a tile may be larger than the image
        pixels = max(pixels, image.tag_v2.get(_TILE_WIDTH, 0) * image.tag_v2.get(_TILE_HEIGHT, 0))
    needed = pixels * (_PIXEL_BYTES.get(image.mode, 4) + _DECODER_BYTES.get(image.format or "", 0) + 3 + 3 * is_copied)
    return needed + whole * _COEFFICIENT_BYTES * len(image.getbands()) * bool(image.info.get("progressive"))


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


def _to_rgb(image: Image.Image, name: str) -> NDArray[np.uint8]:
    """The pixels as stored, shape (h, w, 3), uint8, converted in bands: no second image of the whole size is made."""
    if image.mode == "F":
        raise ImageError(f"{name}: expected 8 or 16 bits a channel, found floating point")
    if not (image.width and image.height):
        raise ImageError(f"{name}: expected at least one pixel, found {image.width}x{image.height}")
    image.load()
    levels = _levels(image, name) if image.mode in _SIXTEEN_BIT else 0
    pixels = np.empty((image.height, image.width, 3), dtype=np.uint8)
    rows = max(1, _BAND_PIXELS // image.width)
    for top in range(0, image.height, rows):
        band = image.crop((0, top, image.width, min(top + rows, image.height)))
        if levels:
            pixels[top : top + rows] = (np.asarray(band) // levels)[:, :, None]
        else:
            pixels[top : top + rows] = np.asarray(_on_white(band))
    return pixels


def _load(image: Image.Image) -> None:
    """Decode the pixels of an image that somebody has opened, whatever is wrong with what stands beside them."""
    try:
        image.load()
    except Exception as error:
        if getattr(image, "tile", None) or isinstance(error, OSError | MemoryError):  # what decoders raise
            raise


def _levels(image: Image.Image, name: str) -> int:
    """How many values of a deep grey image become one of 8 bits."""
    lowest, highest = image.getextrema() if image.mode == "I" else (0, 0xFFFF)
    if lowest < 0 or highest > 0xFFFF:  # type: ignore[operator]
        raise ImageError(f"{name}: expected 8 or 16 bits a channel, found values from {lowest} to {highest}")
    is_eight_bit = highest <= 0xFF and image.format not in _ALWAYS_SIXTEEN_BIT  # type: ignore[operator]
    return 1 if is_eight_bit else 257


def _on_white(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _orientation_of(image: Image.Image) -> int:
    """Of an image that Pillow has opened, or that somebody has made."""
    block = image.info.get("exif")
    if isinstance(block, bytes):
        found = exif_orientation(block.removeprefix(_EXIF))
        return found.value if found else 1
    if image.format != "TIFF" and any("xmp" in str(key) for key in image.info):  # Pillow would believe it
        return 1
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:
        return 1
    return value if value in range(1, 9) else 1


def _is_tensor(source: object) -> bool:
    """PyTorch need not be loaded for that: where there is a tensor, it is."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(source, torch.Tensor)


def _check_array(array: Any) -> NDArray[np.uint8]:
    if _is_tensor(array):
        if str(array.dtype) == "torch.uint8" and array.ndim == 3 and array.shape[0] == 3:
            array = array.permute(1, 2, 0)
        if str(array.dtype) != "torch.uint8" or array.ndim != 3 or array.shape[2] != 3:
            raise ImageError(
                f"expected an RGB tensor (3, h, w) or (h, w, 3) of uint8, got {tuple(array.shape)} of {array.dtype}"
            )
        array = array.detach().cpu().numpy()
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
