"""Files that tests read, written where they want them."""

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


def png_header(path: Path, width: int, height: int) -> Path:
    """A PNG that promises many pixels and holds none."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
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
