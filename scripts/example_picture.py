"""Draw what lostreg does: photos with boxes and masks in one row, their degree maps below.

    python scripts/example_picture.py
    python scripts/example_picture.py --method parts --max-objects 3 --images datasets/sample/JPEGImages/*.jpg \
        --out docs/example-parts.jpg

The first is the picture of README.md, the second that of docs/gallery.md.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lostreg import Discoverer, Discovery
from lostreg.images.decode import read_image
from lostreg.images.draw import (
    PLOT_SUFFIXES,
    Pixels,
    colour_map,
    draw_box,
    draw_mask,
    draw_seeds,
    fit,
    save_picture,
    stretched,
)

_SAMPLE = Path(__file__).parents[1] / "datasets" / "sample" / "JPEGImages"
_PHOTOS = tuple(_SAMPLE / f"{name}.jpg" for name in ("chelsea", "coffee", "rocket", "astronaut"))
_COLOURS = ((40, 220, 40), (70, 170, 255), (255, 170, 60))  # of the main object, and of further ones in turn
_HEIGHT = 240  # of each photo, in pixels
_GAP = 8


def main(argv: Sequence[str] | None = None) -> None:
    """Find and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", nargs="+", type=Path, default=_PHOTOS, help="photos (default: four of the sample)")
    parser.add_argument("--backbone", default="imgfocus_vits14")
    parser.add_argument("--method", default="lost", help="as `lostreg predict` has them (default: lost)")
    parser.add_argument("--max-objects", type=int, default=1, metavar="N")
    parser.add_argument(
        "--out", type=Path, default=_SAMPLE.parents[2] / "docs" / "example.jpg", metavar="|".join(PLOT_SUFFIXES)
    )
    args = parser.parse_args(argv)
    discoverer = Discoverer(args.backbone, device="cpu", method=args.method, max_objects=args.max_objects, refine=True)
    columns = [
        column(read_image(path).pixels, found)
        for path, found in zip(args.images, discoverer.discover_many(args.images), strict=True)
    ]
    gap = np.full((columns[0].shape[0], _GAP, 3), 255, dtype=np.uint8)
    save_picture(args.out, np.hstack([part for each in columns for part in (each, gap)][:-1]))


def column(pixels: Pixels, found: Discovery) -> Pixels:
    """A photo with its masks, boxes and seeds, above the degree of every patch."""
    size = (found.height, found.width)
    photo = fit(pixels, size, round(max(size) * _HEIGHT / found.height))
    scale = np.array([photo.shape[1] / found.width, photo.shape[0] / found.height] * 2)
    patch = (found.patch_height * scale[1], found.patch_width * scale[0])
    degrees = colour_map(found.degrees, photo.shape[:2], patch)
    for index in reversed(range(len(found))):
        colour = _COLOURS[index % len(_COLOURS)]
        mask = stretched(found.pixel_mask(index), photo.shape[:2])
        draw_mask(photo, mask, colour)
        for panel in (photo, degrees):
            draw_box(panel, found.xyxy[index] * scale, colour, 3 if index == 0 else 2)
    draw_seeds(photo, found.seeds, patch)
    return np.vstack([photo, np.full((_GAP, photo.shape[1], 3), 255, dtype=np.uint8), degrees])


if __name__ == "__main__":
    main()
