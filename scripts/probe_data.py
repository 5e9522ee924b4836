"""Make data for `lostreg probe` of a COCO file: masks of three supercategories, and folders by the main object's.

    python scripts/probe_data.py --images train2017 --annotations annotations/instances_train2017.json --out probes

Masks have 0 for background, 1 for persons, 2 for animals and 3 for vehicles; what else is an object, and the boxes of
objects without an outline, is 255, to be ignored. An image's class is the supercategory of its object with the largest
area, where at least so many images have it.
"""

import argparse
import contextlib
import io
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools.coco import COCO

CLASSES: Final = {"person": 1, "animal": 2, "vehicle": 3}
IGNORED: Final = 255


def main(argv: Sequence[str] | None = None) -> int:
    """Write both folders."""
    parser = argparse.ArgumentParser(description="Make data for `lostreg probe` of a COCO file.")
    parser.add_argument("--images", type=Path, required=True, metavar="DIR")
    parser.add_argument("--annotations", type=Path, required=True, metavar="FILE")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--least", type=int, default=15, metavar="N", help="images of a class (default: 15)")
    args = parser.parse_args(argv)
    with contextlib.redirect_stdout(io.StringIO()):
        index = COCO(args.annotations)
    bare = sum(not one.get("segmentation") for one in index.anns.values())
    if bare == len(index.anns):
        parser.error(f"{args.annotations}: none of its {bare} objects has a segmentation to make masks of")
    for name in ("images", "masks"):
        (args.out / "segmentation" / name).mkdir(parents=True, exist_ok=True)
    main_classes: dict[Path, str] = {}
    for entry in index.dataset["images"]:
        path = args.images / entry["file_name"]
        objects = sorted(index.imgToAnns[entry["id"]], key=lambda one: -one["area"])
        classes = [index.cats[one["category_id"]]["supercategory"] for one in objects]
        Image.fromarray(mask_of(index, entry, objects, classes)).save(
            args.out / "segmentation" / "masks" / f"{path.stem}.png"
        )
        shutil.copy(path, args.out / "segmentation" / "images" / path.name)
        single = [name for one, name in zip(objects, classes, strict=True) if not one["iscrowd"]]
        if single:
            main_classes[path] = single[0]
    counts = Counter(main_classes.values())
    for path, name in main_classes.items():
        if counts[name] >= args.least:
            folder = args.out / "classification" / name
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, folder / path.name)
    print(f"written to {args.out}: {len(index.dataset['images'])} masks, and classes {dict(counts)}")
    if bare:
        print(
            f"{bare} of {len(index.anns)} objects have no segmentation: their boxes are {IGNORED} in the masks, ignored"
        )
    return 0


def mask_of(index: COCO, entry: dict[str, Any], objects: list[dict[str, Any]], classes: list[str]) -> NDArray[np.uint8]:
    """An image's index mask, (height, width): smaller objects over larger ones, outlines over boxes."""
    mask = np.zeros((entry["height"], entry["width"]), np.uint8)
    for one in objects:
        if not one.get("segmentation"):
            x, y, width, height = one["bbox"]
            mask[int(y) : int(np.ceil(y + height)), int(x) : int(np.ceil(x + width))] = IGNORED
    for one, name in zip(objects, classes, strict=True):
        if one.get("segmentation"):
            mask[index.annToMask(one) > 0] = CLASSES.get(name, IGNORED)
    return mask


if __name__ == "__main__":
    raise SystemExit(main())
