"""Compare LOST with parts, and with parts that are ranked by what the images themselves teach, on a benchmark.

    python scripts/object_methods.py --images train2017 --annotations annotations/instances_train2017.json

Images have their own size and frame, as in `lostreg eval`; one forward gives all features of an image. Images are
parted by their place in the file: everything was chosen on those at even places, and those at odd places are for
reporting.
Two ways of teaching: "taught" learns from the very images that it ranks, without their labels (transductive); "taught
by others" learns from one half of them and ranks the other half. Intervals are those of a bootstrap over the images.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from mask_quality import gain
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from lostreg.datasets import Example, choose_frames, load_benchmark
from lostreg.defaults import CLEAR_SCORE
from lostreg.images.boxes import in_pixels, pairwise_iou
from lostreg.images.decode import read_image
from lostreg.images.patches import PatchedPicture, cut_patches
from lostreg.jsonio import write_json
from lostreg.methods.learned import LinearObjectness, fit, taught_ranks
from lostreg.methods.lost import Candidates, Objects, find_candidates, prepare, tight_boxes
from lostreg.methods.multi_object import find_objects
from lostreg.methods.parts import Parted, candidate_masks, find_parts, part_labels, ranked_objects
from lostreg.metrics import IOU_THRESHOLD, Detections, detection_scores, is_hit, score_auc
from lostreg.models.backbone import load_backbone
from lostreg.models.features import FeatureExtractor
from lostreg.models.pixels import normalise_patches
from lostreg.models.table import FEATURES, Feature
from lostreg.runs.results import package_versions, processor_name

COMPARED: Final[tuple[Feature, ...]] = ("k", "v", "out")
HALVES: Final = {"choosing": slice(0, None, 2), "reporting": slice(1, None, 2), "all": slice(None)}
MOST: Final = 10  # objects of an image
SCORES: Final = (0, CLEAR_SCORE, 0.5, 0.75, 1)  # between which hits are counted
Boxes = tuple[NDArray[np.float64], NDArray[np.float32]]  # in pixels, and their scores


@dataclass(frozen=True)
class Searched:
    """What one feature of one image holds.

    Attributes:
        lost: the boxes of LOST alone.
        candidates: LOST's, with features in half precision.
        parted: all candidates.
        reachable: whether one of those that may be the main object would be a hit.
        seconds: that LOST took for one object, and the parts on top of it.
    """

    lost: Boxes
    candidates: Candidates
    parted: Parted
    reachable: bool
    seconds: tuple[float, float]


@dataclass(frozen=True)
class Seen:
    """One image: its patches' output tokens of the last layer, (N, D), float16, and what each feature holds."""

    example: Example
    to_pixels: Callable[[Objects], Boxes]
    tokens: Tensor
    features: tuple[Searched, ...]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write, and print."""
    parser = argparse.ArgumentParser(description="Compare LOST with parts, and with parts ranked by what images teach.")
    parser.add_argument("--images", type=Path, required=True, metavar="DIR")
    parser.add_argument("--annotations", type=Path, required=True, metavar="FILE")
    parser.add_argument("--backbone", default="imgfocus_vits14")
    parser.add_argument("--features", nargs="+", choices=FEATURES, default=COMPARED)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--out", type=Path, help="default: eval/results/objects-BACKBONE.json")
    args = parser.parse_args(argv)
    benchmark = load_benchmark("coco", images=args.images, annotations=args.annotations).limited(args.limit)
    benchmark = choose_frames(benchmark)
    images = look(args.backbone, args.features, benchmark.examples)
    result = {
        "backbone": args.backbone,
        "images": {name: len(images[half]) for name, half in HALVES.items()},
        "fingerprint": benchmark.fingerprint(),
        "features": {name: judge(images, place) for place, name in enumerate(args.features)},
        "cpu": processor_name(),
        "threads": torch.get_num_threads(),
        "versions": package_versions(),
    }
    out = args.out or Path("eval/results") / f"objects-{args.backbone}.json"
    write_json(out, result)
    for feature, judged in result["features"].items():
        for method, figures in judged["methods"].items():
            print(f"{feature:4s}{method:18s}{figures['reporting']}")
        print(f"{feature:4s}{judged['milliseconds']}")
    print(f"written to {out}")
    return 0


def look(name: str, features: Sequence[Feature], examples: Sequence[Example]) -> list[Seen]:
    """One forward an image, and all candidates in each feature."""
    backbone = load_backbone(name)
    extract = FeatureExtractor(backbone, [*((feature, -1) for feature in features), ("out", -1)])
    images = []
    for example in tqdm(examples, unit="img"):
        picture = cut_patches(read_image(example.path, exif=example.exif), backbone.spec.patch_size)
        patches = torch.from_numpy(picture.patches)[None]
        pixels = normalise_patches(patches, [picture.size], backbone.mean, backbone.std)
        *packed, tokens = extract([pixels], [picture.grid])
        to_pixels = pixel_boxes(picture, backbone.spec.patch_size)
        searched = tuple(search(values, picture, to_pixels, example) for values in packed)
        images.append(Seen(example, to_pixels, tokens.half(), searched))
    return images


def pixel_boxes(picture: PatchedPicture, patch_size: int) -> Callable[[Objects], Boxes]:
    """What makes boxes in pixels of an image's objects; keeps no pixels."""
    frame = replace(picture, patches=picture.patches[:, :, :0])
    return lambda objects: (in_pixels(objects.xyxy, frame, patch_size), objects.scores)


def search(
    values: Tensor, picture: PatchedPicture, to_pixels: Callable[[Objects], Boxes], example: Example
) -> Searched:
    """All candidates in one feature, (N, D)."""
    features = prepare(values[None], normalize=True)
    times = [time.perf_counter()]
    candidates = find_candidates(features, picture.grid, "auto", 100)
    times.append(time.perf_counter())
    find_parts(candidates, part_labels(features).numpy(), 1, 0)
    times.append(time.perf_counter())
    (lost,) = find_objects(candidates, 100, MOST, 0)
    (parted,) = candidate_masks(candidates, part_labels(features, several=True).numpy())
    every = to_pixels(replace(lost, xyxy=tight_boxes(parted.masks[: parted.leading])))[0]
    reachable = bool((pairwise_iou(every, example.boxes) >= IOU_THRESHOLD).any())
    smaller = replace(candidates, features=features.half())
    return Searched(to_pixels(lost), smaller, parted, reachable, (times[1] - times[0], times[2] - times[1]))


def judge(images: Sequence[Seen], feature: int) -> dict[str, Any]:
    """Each method in one feature."""
    searched = [image.features[feature] for image in images]
    plain = [boxes(image, feature, None) for image in images]
    teachers = [
        (image.tokens, one.parted.masks[: one.parted.leading], one.parted.scores[: one.parted.leading])
        for image, one in zip(images, searched, strict=True)
    ]
    own, halves = fit(teachers), [fit(teachers[1 - half :: 2]) for half in (0, 1)]
    methods = {
        "lost": [one.lost for one in searched],
        "parts": plain,
        "taught": [boxes(image, feature, own) for image in images],
        "taught by others": [boxes(image, feature, halves[place % 2]) for place, image in enumerate(images)],
    }
    return {
        "methods": {
            name: {half: figures(found[part], methods["lost"][part], images[part]) for half, part in HALVES.items()}
            for name, found in methods.items()
        },
        "reachable": {
            half: round(100 * float(np.mean([one.reachable for one in searched[part]])), 2)
            for half, part in HALVES.items()
        },
        "milliseconds": dict(
            zip(
                ("lost", "parts beside it"),
                (1000 * np.median([one.seconds for one in searched], axis=0)).round(1).tolist(),
                strict=True,
            )
        ),
    }


def boxes(image: Seen, feature: int, objectness: LinearObjectness | None) -> Boxes:
    """The objects among all candidates of an image."""
    one = image.features[feature]
    taught = None
    if objectness is not None:
        taught = taught_ranks(objectness.probabilities(image.tokens).numpy(), one.parted.masks)
    return image.to_pixels(ranked_objects(one.candidates, 0, one.parted, taught, MOST, 0))


def figures(found: Sequence[Boxes], lost: Sequence[Boxes], images: Sequence[Seen]) -> dict[str, Any]:
    """Corloc, gain on LOST, AUC of the first score, and how well ten boxes find all objects."""
    if not images:
        return {}
    hits, before = first_hits(found, images), first_hits(lost, images)
    clear = np.array([scores[0] for _, scores in found])
    auc = score_auc(clear.tolist(), hits)
    several = detection_scores(
        [
            Detections(xyxy, scores, image.example.boxes, image.example.crowds)
            for (xyxy, scores), image in zip(found, images, strict=True)
        ]
    )
    return {
        "corloc": round(100 * float(hits.mean()), 2),
        "corloc_95": gain(100.0 * hits.astype(np.float64))["gain_95"],
        **gain(100.0 * (hits.astype(np.float64) - before)),
        "auc": None if auc is None else round(auc, 3),
        "hits_by_score": {
            f"{low:g} to {high:g}": [int(within.sum()), int(hits[within].sum())]
            for low, high in pairwise(SCORES)
            for within in [(clear >= low) & ((clear < high) | (high == 1))]
        },
        "ap50": round(several.ap50, 2),
        "ar10": round(several.ar, 2),
    }


def first_hits(found: Sequence[Boxes], images: Sequence[Seen]) -> NDArray[np.bool_]:
    """Whether each image's first box is a hit."""
    return np.array([is_hit(xyxy, image.example.boxes) for (xyxy, _), image in zip(found, images, strict=True)])


if __name__ == "__main__":
    sys.exit(main())
