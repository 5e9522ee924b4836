"""Compare ways to sharpen LOST's patch masks, on a benchmark whose polygons judge them.

    python scripts/mask_quality.py --images train2017 --annotations annotations/instances_train2017.json

A mask is judged by its IoU with the polygon that it fits best, over the images that have polygons, and the box around
it by corloc, over all images. `lostreg.images.masks.refine` is the way called "watershed". Images are parted by their
place in the file: every way was tuned on those at even places, and those at odd places are for reporting.
"""

import argparse
import contextlib
import dataclasses
import io
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import cv2
import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from tqdm import tqdm

from lostreg.datasets import load_benchmark
from lostreg.images.decode import read_image
from lostreg.images.masks import Mask, at_working_size, largest_part, markers, mask_boxes, plausible, refine
from lostreg.images.rle import encode_rle
from lostreg.inference.discoverer import Discoverer
from lostreg.inference.discovery import Discovery
from lostreg.jsonio import write_json
from lostreg.metrics import is_hit
from lostreg.runs.results import package_versions

PARTS: Final = {"all": slice(None), "tuning": slice(0, None, 2), "reporting": slice(1, None, 2)}
RESAMPLES: Final = 10_000
Way = Callable[[NDArray[np.uint8], Mask, tuple[float, float]], Mask]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write, and print."""
    parser = argparse.ArgumentParser(description="Compare ways to sharpen LOST's patch masks.")
    parser.add_argument("--images", type=Path, required=True, metavar="DIR")
    parser.add_argument("--annotations", type=Path, required=True, metavar="FILE")
    parser.add_argument("--backbone", default="imgfocus_vits14")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--out", type=Path, default=Path("eval/results/masks-coco-sample.json"))
    args = parser.parse_args(argv)
    benchmark = load_benchmark("coco", images=args.images, annotations=args.annotations).limited(args.limit)
    with contextlib.redirect_stdout(io.StringIO()):
        index = COCO(args.annotations)
    discoverer = Discoverer(args.backbone, exif=False)
    rows: list[dict[str, Any]] = []
    outcomes = discoverer.discover_many(example.path for example in benchmark.examples)
    for example, found in zip(benchmark.examples, tqdm(outcomes, unit="img", total=len(benchmark)), strict=True):
        polygons = polygons_of(index, int(example.image_id))
        rows.append(measure(read_image(example.path, exif=False).pixels, found, polygons, example.boxes))
    result = {
        "options": discoverer.options.record(),
        "images": len(rows),
        "fingerprint": benchmark.fingerprint(),
        "versions": {**package_versions(), "pycocotools": metadata.version("pycocotools")},
        **{name: summary([row[name] for row in rows], [row["patches"] for row in rows]) for name in rows[0]},
    }
    write_json(args.out, result)
    for name in rows[0]:
        print(f"{name:10s} {result[name]}")
    print(f"written to {args.out}")
    return 0


def polygons_of(index: COCO, image_id: int) -> list[Any]:
    """The instances of an image that have polygons, run-length encoded."""
    entries = [entry for entry in index.imgToAnns[image_id] if not entry["iscrowd"]]
    return [index.annToRLE(entry) for entry in entries if isinstance(entry.get("segmentation"), list)]


def measure(
    pixels: NDArray[np.uint8], found: Discovery, polygons: list[Any], truth: NDArray[np.float64]
) -> dict[str, dict[str, Any]]:
    """IoU with the best polygon (NaN where there are none), hit, and milliseconds, of the patches and of each way."""
    judged: dict[str, dict[str, Any]] = {"patches": judge(found.pixel_mask(), polygons, truth)}
    for name, way in WAYS.items():
        start = time.perf_counter()
        refined = way(pixels, found.masks, (found.patch_width, found.patch_height))
        elapsed = 1000 * (time.perf_counter() - start)
        mask = dataclasses.replace(found, refined=refined).pixel_mask()
        judged[name] = {**judge(mask, polygons, truth), "ms": elapsed}
    return judged


def judge(mask: Mask, polygons: list[Any], truth: NDArray[np.float64]) -> dict[str, Any]:
    """IoU with the best polygon, and whether the box around the mask hits a box."""
    ious = coco_mask.iou([encode_rle(mask)], polygons, [0] * len(polygons)) if polygons else np.array([np.nan])
    return {"iou": float(ious.max()), "hit": is_hit(mask_boxes(mask[None], mask.shape[1], mask.shape[0]), truth)}


def summary(rows: list[dict[str, Any]], patches: list[dict[str, Any]]) -> dict[str, Any]:
    """Means in percent of each part of the images, and by how much they are above those of the patches."""
    times = [row["ms"] for row in rows if "ms" in row]
    result: dict[str, Any] = {"median_ms": round(float(np.median(times)), 1)} if times else {}
    for part, places in PARTS.items():
        result[part] = {}
        for key, name in (("iou", "iou"), ("hit", "corloc")):
            values = 100 * np.array([row[key] for row in rows[places]], dtype=np.float64)
            gains = values - 100 * np.array([row[key] for row in patches[places]], dtype=np.float64)
            known = ~np.isnan(values)
            if known.any():
                result[part][name] = {"images": int(known.sum()), "mean": round(float(values[known].mean()), 2)}
                result[part][name] |= gain(gains[known])
    return result


def gain(gains: NDArray[np.float64]) -> dict[str, Any]:
    """The mean gain with its 95 % interval, of images drawn anew with replacement."""
    draws = np.random.default_rng(0).integers(len(gains), size=(RESAMPLES, len(gains)))
    low, high = np.percentile(gains[draws].mean(axis=1), [2.5, 97.5])
    return {"gain": round(float(gains.mean()), 2), "gain_95": [round(float(low), 2), round(float(high), 2)]}


# Ways: of the same arguments and result as `refine`, for one object


def grabcut(pixels: NDArray[np.uint8], masks: Mask, patch: tuple[float, float]) -> Mask:
    """GrabCut, sure of what lies 1.5 patches inside and half a patch outside."""
    small, coarse, side = at_working_size(pixels, masks, patch)
    certain = markers(coarse, 1.5 * side, 0.5 * side)
    labels = np.where(coarse[0], cv2.GC_PR_FGD, cv2.GC_PR_BGD).astype(np.uint8)
    labels[certain == 1] = cv2.GC_FGD
    labels[certain == 2] = cv2.GC_BGD
    if coarse[0].all() or not coarse[0].any():
        return coarse
    cv2.setRNGSeed(0)  # for its k-means
    bgr, models = cv2.cvtColor(small, cv2.COLOR_RGB2BGR), [np.zeros((1, 65)) for _ in range(2)]
    cv2.grabCut(bgr, labels, (0, 0, 0, 0), models[0], models[1], 2, cv2.GC_INIT_WITH_MASK)
    return plausible(largest_part(labels % 2 == 1), coarse[0])[None]


def smooth(pixels: NDArray[np.uint8], masks: Mask, patch: tuple[float, float]) -> Mask:
    """Rounded corners, whatever the image shows."""
    _, coarse, side = at_working_size(pixels, masks, patch)
    blurred = cv2.GaussianBlur(coarse[0].astype(np.float32), (0, 0), 0.7 * side, borderType=cv2.BORDER_REPLICATE)
    return plausible(largest_part(blurred > 0.5), coarse[0])[None]


WAYS: Final[dict[str, Way]] = {"watershed": refine, "grabcut": grabcut, "smooth": smooth}


if __name__ == "__main__":
    sys.exit(main())
