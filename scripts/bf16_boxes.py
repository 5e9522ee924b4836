"""Compare the boxes of bf16 with those of fp32 on a benchmark, for several features of the last layer.

    python scripts/bf16_boxes.py --images train2017 --annotations annotations/instances_train2017.json

Images have their own size and frame, as in `lostreg eval`. Boxes are the first of each image. The interval of the
difference in corloc is that of a paired bootstrap over the images.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, get_args

import numpy as np
import torch
from benchmark import processor_name
from mask_quality import gain
from numpy.typing import NDArray
from tqdm import tqdm

from lostreg.datasets import choose_frames, load_benchmark
from lostreg.images.boxes import pairwise_iou
from lostreg.inference.discoverer import Discoverer
from lostreg.jsonio import write_json
from lostreg.metrics import Corloc, is_hit
from lostreg.models.backbone import load_backbone
from lostreg.models.table import Feature
from lostreg.runs.results import describe_device, package_versions

COMPARED: Final[tuple[Feature, ...]] = ("k", "v", "out")
LIKE: Final = 0.9  # boxes of a larger IoU are alike, as in benchmark.py


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write, and print."""
    parser = argparse.ArgumentParser(description="Compare the boxes of bf16 with those of fp32.")
    parser.add_argument("--images", type=Path, required=True, metavar="DIR")
    parser.add_argument("--annotations", type=Path, required=True, metavar="FILE")
    parser.add_argument("--backbone", default="imgfocus_vits14")
    parser.add_argument("--features", nargs="+", choices=get_args(Feature), default=COMPARED)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--out", type=Path, default=Path("eval/results/bf16-coco-sample.json"))
    args = parser.parse_args(argv)
    benchmark = load_benchmark("coco", images=args.images, annotations=args.annotations).limited(args.limit)
    benchmark = choose_frames(benchmark)
    sources = [example.source for example in benchmark.examples]
    truths = [example.boxes for example in benchmark.examples]
    backbone = load_backbone(args.backbone)
    features: dict[str, Any] = {}
    for feature in args.features:
        boxes = {}
        for precision in ("fp32", "bf16"):
            discoverer = Discoverer(
                backbone, feature=feature, device=args.device, precision=precision, max_side=None, exif=False
            )
            outcomes = tqdm(discoverer.discover_many(sources), f"{feature} {precision}", len(sources), unit="img")
            boxes[precision] = [found.xyxy[:1] for found in outcomes]
        features[feature] = compare(boxes["fp32"], boxes["bf16"], truths)
        print(feature, features[feature], flush=True)
    options = discoverer.options.record()
    result = {
        "options": {name: value for name, value in options.items() if name not in ("feature", "precision")},
        "images": len(sources),
        "fingerprint": benchmark.fingerprint(),
        "features": features,
        "device": describe_device(discoverer.backbone.device),
        "cpu": processor_name(),
        "threads": torch.get_num_threads(),
        "versions": package_versions(),
    }
    write_json(args.out, result)
    print(f"written to {args.out}")
    return 0


def compare(
    fp32: Sequence[NDArray[np.float32]], bf16: Sequence[NDArray[np.float32]], truths: Sequence[NDArray[np.float64]]
) -> dict[str, Any]:
    """Corloc of both in percent, what bf16 gains with its 95 % interval, and how many boxes are alike.

    Args:
        fp32: the first box of each image, shape (1, 4).
        bf16: the same of the other precision.
        truths: for each image, objects of shape (m, 4).
    """
    hits = np.array([[is_hit(box, truth) for box, truth in zip(boxes, truths, strict=True)] for boxes in (fp32, bf16)])
    ious = np.array([pairwise_iou(*pair).item() for pair in zip(fp32, bf16, strict=True)])
    return {
        "fp32": _score(hits[0]),
        "bf16": _score(hits[1]),
        "hits_of_one_alone": [int((hits[0] & ~hits[1]).sum()), int((hits[1] & ~hits[0]).sum())],
        **gain(100.0 * (hits[1].astype(np.float64) - hits[0])),
        f"iou_{LIKE}": int((ious >= LIKE).sum()),
        "iou_0.5": int((ious >= 0.5).sum()),
        "identical": sum(map(np.array_equal, fp32, bf16)),
    }


def _score(hits: NDArray[np.bool_]) -> dict[str, Any]:
    score = Corloc(int(hits.sum()), len(hits))
    return {"corloc": round(score.percent, 4), "hits": score.hits}


if __name__ == "__main__":
    sys.exit(main())
