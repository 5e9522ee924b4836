"""Files that tests read, written where they want them."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from conftest import disc_picture
from PIL import Image

from lostreg.inference.discovery import Discovery

SPLIT = "trainval"
BOX = "<object><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"


def write_voc(root: Path, count: int, width: int = 98, height: int = 70) -> Path:
    """Pictures ``im00``, ``im01`` and so on of two sizes, each with one box around the middle; returns ``root``."""
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    stems = [f"im{number:02}" for number in range(count)]
    for number, stem in enumerate(stems):
        picture = disc_picture(width - number % 2 * 20, height)
        moved = np.roll(picture, (number * 53, number * 37), axis=(0, 1))
        Image.fromarray(moved).save(root / "JPEGImages" / f"{stem}.jpg", quality=95)
        set_box(root, stem, (10, 10, 60, 60))
    (root / "ImageSets/Main" / f"{SPLIT}.txt").write_text("\n".join(stems) + "\n")
    return root


def set_box(root: Path, stem: str, box: tuple[float, ...]) -> None:
    """Replace a picture's objects by one: ``xmin, ymin, xmax, ymax`` as VOC has them, from 1 and inclusive."""
    (root / "Annotations" / f"{stem}.xml").write_text(f"<annotation>{BOX.format(*box)}</annotation>")


def png_chunk(name: bytes, data: bytes) -> bytes:
    """A sound chunk of a PNG file."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_header(path: Path, width: int, height: int) -> Path:
    """A PNG that promises many pixels and holds none."""

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", b"") + png_chunk(b"IEND", b"")
    )
    return path


def discovery(width: int = 1400, height: int = 700, patch: float = 140.0) -> Discovery:
    """Two objects on a grid of 5 x 10 patches: left and right."""
    masks = np.zeros((2, 5, 10), bool)
    masks[0, 1:3, 1:3] = masks[1, 2:4, 6:9] = True
    return Discovery(
        xyxy=np.array([[1, 1, 3, 3], [6, 2, 9, 4]], np.float32) * patch,
        scores=np.array([0.6, 0.3], np.float32),
        seeds=np.array([[1, 1], [2, 6]]),
        biases=np.array([-0.2, -0.2], np.float32),
        masks=masks,
        degrees=np.arange(50).reshape(5, 10),
        width=width,
        height=height,
        patch_width=patch,
        patch_height=patch,
    )


def exif_block(*tags: tuple[int, int, int, bytes], order: str = "<", count: int | None = None) -> bytes:
    """An EXIF block of tags (number, type, count, 4 bytes of value), in ``<`` or ``>`` byte order."""
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 8)
    body = b"".join(struct.pack(order + "HHI", *tag[:3]) + tag[3] for tag in tags)
    return head + struct.pack(order + "H", len(tags) if count is None else count) + body + bytes(4)


def turned_block(orientation: int = 6, order: str = "<") -> bytes:
    """An EXIF block that says nothing but how to turn."""
    return exif_block((0x112, 3, 1, struct.pack(order + "HH", orientation, 0)), order=order)


def with_exif(image: bytes, *blocks: bytes) -> bytes:
    """An encoded JPEG, PNG or WebP with EXIF blocks put in as they are, sound or not."""
    if image[:2] == b"\xff\xd8":
        segments = [struct.pack(">HH", 0xFFE1, len(block) + 8) + b"Exif\0\0" + block for block in blocks]
        return image[:2] + b"".join(segments) + image[2:]
    if image[:4] == b"RIFF":
        chunks = [b"EXIF" + struct.pack("<I", len(block)) + block + bytes(len(block) % 2) for block in blocks]
        body = image[8:] + b"".join(chunks)
        return b"RIFF" + struct.pack("<I", len(body)) + body
    place = image.index(b"IDAT") - 4
    chunks = [png_chunk(b"eXIf", block) for block in blocks]
    return image[:place] + b"".join(chunks) + image[place:]


def encoded(pixels: np.ndarray, kind: str, **options: object) -> bytes:
    """A picture as a file's content."""
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, kind, **options)
    return content.getvalue()
