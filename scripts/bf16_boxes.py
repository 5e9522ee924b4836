"""Compare the boxes of bf16 with those of fp32 on a benchmark, for several features of the last layer.

    python scripts/bf16_boxes.py --images train2017 --annotations annotations/instances_train2017.json

Images have their own size and frame, as in `lostreg eval`; one forward gives all features of an image. Boxes are the
first of each image. The interval of the difference in corloc is that of a paired bootstrap over the images.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from mask_quality import gain
from numpy.typing import NDArray
from tqdm import tqdm

from lostreg.datasets import choose_frames, load_benchmark
from lostreg.errors import ImageError
from lostreg.images.boxes import pairwise_iou
from lostreg.images.decode import ImageSource
from lostreg.images.patches import PatchedPicture
from lostreg.inference.discoverer import Discoverer
from lostreg.inference.jobs import FeaturesJob, ObjectsJob
from lostreg.inference.postprocess import discoveries
from lostreg.jsonio import write_json
from lostreg.methods.lost import Candidates, Lost
from lostreg.metrics import Corloc, is_hit
from lostreg.models.table import FEATURES, Feature
from lostreg.runs.results import describe_device, package_versions, processor_name

COMPARED: Final[tuple[Feature, ...]] = ("k", "v", "out")
Boxes = tuple[NDArray[np.float32], ...]  # of shape (1, 4)
LIKE: Final = 0.9  # boxes of a larger IoU are alike, as in benchmark.py


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write, and print."""
    parser = argparse.ArgumentParser(description="Compare the boxes of bf16 with those of fp32.")
    parser.add_argument("--images", type=Path, required=True, metavar="DIR")
    parser.add_argument("--annotations", type=Path, required=True, metavar="FILE")
    parser.add_argument("--backbone", default="imgfocus_vits14")
    parser.add_argument("--features", nargs="+", choices=FEATURES, default=COMPARED)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--out", type=Path, default=Path("eval/results/bf16-coco-sample.json"))
    args = parser.parse_args(argv)
    benchmark = load_benchmark("coco", images=args.images, annotations=args.annotations).limited(args.limit)
    benchmark = choose_frames(benchmark)
    sources = [example.source for example in benchmark.examples]
    truths = [example.boxes for example in benchmark.examples]
    options = {"device": args.device, "bias": "auto", "max_side": None, "exif": False}
    full = Discoverer(args.backbone, **options)
    half = Discoverer(full.backbone, precision="bf16", **options)
    fp32, bf16 = (first_boxes(discoverer, args.features, sources) for discoverer in (full, half))
    features = {name: compare(fp32[place], bf16[place], truths) for place, name in enumerate(args.features)}
    result = {
        "options": {key: value for key, value in full.options.record().items() if key not in ("feature", "precision")},
        "images": len(sources),
        "fingerprint": benchmark.fingerprint(),
        "features": features,
        "device": describe_device(half.backbone.device, half.backbone.dtype),
        "cpu": processor_name(),
        "threads": torch.get_num_threads(),
        "versions": package_versions(),
    }
    write_json(args.out, result)
    for feature, compared in features.items():
        print(f"{feature:4s}{compared}")
    print(f"written to {args.out}")
    return 0


def first_boxes(discoverer: Discoverer, features: Sequence[Feature], sources: Sequence[ImageSource]) -> list[Boxes]:
    """For each feature, the first box of each image, with the discoverer's other options."""
    backbone, options = discoverer.backbone, discoverer.options

    def convert(candidates: list[Candidates], pictures: list[PatchedPicture]) -> list[Boxes]:
        by_feature = [discoveries(of_run, pictures, backbone.spec.patch_size, options) for of_run in candidates]
        return [tuple(found.xyxy[:1] for found in of_image) for of_image in zip(*by_feature, strict=True)]

    job = ObjectsJob(
        FeaturesJob(backbone, [(feature, options.layer) for feature in features]),
        Lost(options.bias, options.k_patches),
        normalize=options.normalize,
        convert=convert,
    )
    boxes: list[Boxes] = []
    outcomes = discoverer.stream_of(job).outcomes(sources)
    for outcome in tqdm(outcomes, options.precision, len(sources), unit="img"):
        if isinstance(outcome, ImageError):
            raise outcome
        boxes.append(outcome)
    return list(zip(*boxes, strict=True))


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
