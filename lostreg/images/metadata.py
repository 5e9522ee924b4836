"""What an image file says beside its pixels: its orientation, and all that decoders need not see.

A decoder that meets a tag of the wrong type, or a comment with a wrong checksum, may refuse sound pixels. So metadata
are renamed in memory to what every decoder skips, and the orientation is read by a table of our own. It is the one that
OpenCV sees (since 4.13, in WebP too), through which detectors are trained on what is found here: EXIF's alone and not
XMP's, a 16-bit number whatever type its tag has.
"""

import re
import struct
import zlib
from collections.abc import Callable
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

SIDEWAYS: Final = (5, 6, 7, 8)
"""EXIF orientations that swap width and height."""

_ORIENTATION: Final = 0x112
_SHORT: Final = 3
_TIFF_MARK: Final = 42
_SHORTEST_STRING: Final = 4  # bytes that a tag holds itself, without an offset
# The other tags that OpenCV reads: one that points beyond the block ends its search.
_STRINGS: Final = (0x10E, 0x10F, 0x110, 0x131, 0x132, 0x8298)
_RATIONALS: Final = {0x11A: 1, 0x11B: 1, 0x13E: 2, 0x13F: 6, 0x211: 3, 0x214: 6}

_HIDDEN: Final = b"loSt"  # a chunk that every reader of PNG and WebP skips: ancillary, private
_PNG_END: Final = bytes(4) + b"IEND" + zlib.crc32(b"IEND").to_bytes(4, "big")
# Tags of a TIFF file that say how its pixels are stored; the others are metadata.
_TIFF_PIXELS: Final = {
    *(254, 256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 292, 293, 317, 320, 322, 323, 324, 325, 332, 334),
    *(338, 339, 347, *range(512, 522), 529, 530, 531, 532),
}
_HEIF_ITEM: Final = re.compile(rb"infe\x02.{7}Exif|infe\x03.{9}Exif", re.DOTALL)


class Orientation(NamedTuple):
    """How the pixels of a file are meant to be turned.

    Attributes:
        value: EXIF's, 1 (as stored) to 8.
        is_plain: whether every reader of EXIF must see the same: one tag of its proper type, none that is broken.
    """

    value: int = 1
    is_plain: bool = True


def turn(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Stored pixels as they are meant to be seen.

    Args:
        pixels: shape (h, w, c).
        orientation: EXIF's, 1 to 8; 5 to 8 swap height and width.

    Example:
        >>> from lostreg.images.metadata import turn
        >>> turn(np.array([[[1], [2]]], dtype=np.uint8), 6)[..., 0].tolist()
        [[1], [2]]
    """
    if orientation in SIDEWAYS:
        pixels = pixels.swapaxes(0, 1)
    rows = slice(None, None, -1 if orientation in (3, 4, 7, 8) else 1)
    columns = slice(None, None, -1 if orientation in (2, 3, 6, 7) else 1)
    return np.ascontiguousarray(pixels[rows, columns])


def hide_metadata(data: memoryview) -> Orientation:
    """Hide the metadata of an image file from decoders, in place, and say what they told of its orientation.

    Args:
        data: the whole file, or its beginning; of a kind that is not known here nothing is changed.
    """
    for magic, place, hide in _KINDS:
        if data[place : place + len(magic)] == magic:
            try:
                return _first([exif_orientation(block) for block in hide(data)])
            except (struct.error, IndexError):  # cut short: the decoder has the last word on it
                return Orientation(is_plain=False)
    return Orientation()


def exif_orientation(block: bytes) -> Orientation | None:
    """The orientation of an EXIF block, as OpenCV finds it; None where there is none.

    Args:
        block: a TIFF header and what follows, without the ``Exif`` and two zeros in front that only JPEG has.

    Example:
        >>> from lostreg.images.metadata import exif_orientation
        >>> exif_orientation(bytes.fromhex("49492a00 08000000 0100 1201 0300 01000000 06000000"))
        Orientation(value=6, is_plain=True)
    """
    order = "<" if block[:2] == b"II" else ">"  # whatever else is there
    found: Orientation | None = None
    try:
        mark, start = struct.unpack_from(order + "HI", block, 2)
        if mark != _TIFF_MARK:
            return None
        (count,) = struct.unpack_from(order + "H", block, start)
        for place in range(start + 2, start + 2 + 12 * count, 12):
            (tag,) = struct.unpack_from(order + "H", block, place)
            if tag == _ORIENTATION:
                kind, values, value = struct.unpack_from(order + "HIH", block, place + 2)
                is_plain = found is None and (kind, values) == (_SHORT, 1) and block[:2] in (b"II", b"MM")
                found = Orientation(found.value if found else value if 1 <= value <= 8 else 1, is_plain)
            elif tag in _STRINGS or tag in _RATIONALS:
                values, offset = struct.unpack_from(order + "II", block, place + 4)
                size = 8 * _RATIONALS.get(tag, 0) or values
                if (tag in _RATIONALS or values > _SHORTEST_STRING) and offset + size > len(block):
                    raise IndexError
    except (struct.error, IndexError):
        return found and Orientation(found.value, is_plain=False)
    return found


def _first(found: list[Orientation | None]) -> Orientation:
    """Of several blocks the first that tells."""
    told = [orientation for orientation in found if orientation]
    return Orientation(told[0].value, is_plain=len(told) == 1 and told[0].is_plain) if told else Orientation()


def _hide_jpeg(data: memoryview) -> list[bytes]:
    """Segments before the first scan: application data become those that nobody reads."""
    blocks, place = [], 2
    while (marker := data[place + 1]) != 0xDA or data[place] != 0xFF:
        if data[place] != 0xFF or marker in (0, 1, 0xFF):  # filling bytes, or what belongs to no segment
            data[place] = 0xFF
            place += 1
        elif 0xD0 <= marker <= 0xD9:  # without length
            place += 2
        else:
            (length,) = struct.unpack_from(">H", data, place + 2)
            content = data[place + 4 : place + 2 + length]
            if marker == 0xE1 and bytes(content[:6]) == b"Exif\0\0":
                blocks.append(bytes(content[6:]))
            if 0xE1 <= marker <= 0xED:  # JFIF's 0xE0 and Adobe's 0xEE say how colours are stored
                data[place + 1] = 0xEF
            place += 2 + length
    return blocks


def _hide_png(data: memoryview) -> list[bytes]:
    """Ancillary chunks but transparency, and what follows an image that is complete; APNG's first picture stays."""
    blocks, place, has_pixels = [], 8, False
    while place + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, place)
        kind, end = bytes(data[place + 4 : place + 8]), place + 12 + length
        has_pixels = has_pixels or kind == b"IDAT"
        is_ancillary = kind[:1].islower()
        if has_pixels and is_ancillary and end > len(data):
            data[place : place + 12] = _PNG_END
        if kind == b"IEND" or end > len(data):
            break
        if is_ancillary:
            is_sound = zlib.crc32(data[place + 4 : end - 4]) == struct.unpack_from(">I", data, end - 4)[0]
            if kind == b"eXIf" and is_sound:
                blocks.append(bytes(data[place + 8 : end - 4]))
            if kind != b"tRNS" or not is_sound:
                data[place + 4 : place + 8] = _HIDDEN
                struct.pack_into(">I", data, end - 4, zlib.crc32(data[place + 4 : end - 4]))
        place = end
    return blocks


def _hide_webp(data: memoryview) -> list[bytes]:
    """EXIF and XMP: readers look at the first that the header announces.

    The file then ends before those that are its last chunks, which may lack their padding.
    """
    blocks: list[bytes] = []
    place, end, has_exif = 12, 12, False
    while place + 8 <= len(data):
        (length,) = struct.unpack_from("<I", data, place + 4)
        kind = bytes(data[place : place + 4])
        if kind == b"VP8X":
            has_exif = bool(data[place + 8] & 0x08)
            data[place + 8] &= ~0x0C & 0xFF  # announces neither EXIF nor XMP any more
        following = place + 8 + length + length % 2
        if kind == b"EXIF" and has_exif and not blocks and following <= len(data):
            blocks.append(bytes(data[place + 8 : place + 8 + length]))
        if kind in (b"EXIF", b"XMP "):
            data[place : place + 4] = _HIDDEN
        else:
            end = following
        place = following
    if end <= len(data):
        struct.pack_into("<I", data, 4, end - 8)
    return blocks


def _hide_tiff(data: memoryview) -> list[bytes]:
    """The first directory keeps the tags that pixels need: they move up, and so does the offset of the next one."""
    order = "<" if data[0] == ord("I") else ">"
    is_big = 43 in (data[2], data[3])  # BigTIFF: 64-bit offsets
    offset, number, entry = ("Q", "Q", 20) if is_big else ("I", "H", 12)
    (start,) = struct.unpack_from(order + offset, data, 8 if is_big else 4)
    (count,) = struct.unpack_from(order + number, data, start)
    first = start + struct.calcsize(number)
    end = first + entry * count
    if end > len(data):
        raise IndexError
    following = bytes(data[end : end + struct.calcsize(offset)])  # which the last thing in a file may lack
    entries = [bytes(data[place : place + entry]) for place in range(first, end, entry)]
    tags = [struct.unpack_from(order + "H", one)[0] for one in entries]
    kept = b"".join(one for tag, one in zip(tags, entries, strict=True) if tag in _TIFF_PIXELS)
    struct.pack_into(order + number, data, start, len(kept) // entry)
    moved = (kept + following.ljust(struct.calcsize(offset), b"\0"))[: len(data) - first]
    data[first : first + len(moved)] = moved
    # The tag becomes a block of its own.
    turned = [one for tag, one in zip(tags, entries, strict=True) if tag == _ORIENTATION]
    head = struct.pack(order + "2sHIH", data[:2].tobytes(), 42, 8, len(turned))
    values = [one[:4] + struct.pack(order + "I", 1) + one[entry - struct.calcsize(offset) :][:4] for one in turned]
    return [head + b"".join(values)]


def _hide_heif(data: memoryview) -> list[bytes]:
    """AVIF and HEIC: the container itself says how to turn, in what decoders hand on as EXIF or do themselves."""
    for item in _HEIF_ITEM.finditer(data):
        data[item.end() - 4 : item.end()] = _HIDDEN
    return []


_KINDS: Final[tuple[tuple[bytes, int, Callable[[memoryview], list[bytes]]], ...]] = (
    (b"\xff\xd8\xff", 0, _hide_jpeg),
    (b"\x89PNG\r\n\x1a\n", 0, _hide_png),
    (b"WEBP", 8, _hide_webp),
    (b"II*\0", 0, _hide_tiff),
    (b"MM\0*", 0, _hide_tiff),
    (b"II+\0", 0, _hide_tiff),
    (b"MM\0+", 0, _hide_tiff),
    (b"ftyp", 4, _hide_heif),
)
