"""Compare rules for the Gram bias that need no labels, on a benchmark whose labels judge them.

    python scripts/bias_rules.py --images train2017 --annotations annotations/instances_train2017.json

Every image and feature is searched with LOST at 70 fixed biases, 0.02 apart, and at the trials of `auto`; a rule picks
one of them. Images are parted by their place in the file: `auto` was chosen by those at even places, and those at odd
places are for reporting. The best fixed bias is chosen with the labels of the very images that it is judged on.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from lostreg.datasets import Example, load_benchmark
from lostreg.defaults import CLEAR_SCORE
from lostreg.images.boxes import in_pixels, pairwise_iou
from lostreg.images.decode import read_image
from lostreg.images.patches import cut_patches
from lostreg.jsonio import write_json
from lostreg.methods.bias import TRIALS
from lostreg.methods.lost import find_candidates, prepare
from lostreg.methods.objectness import score_factors
from lostreg.metrics import Corloc, score_auc
from lostreg.models.backbone import load_backbone
from lostreg.models.features import FeatureExtractor
from lostreg.models.pixels import normalise_patches
from lostreg.models.table import FEATURES, Feature
from lostreg.runs.results import package_versions
from lostreg.runs.sweep import SweepRow, with_trials
from lostreg.runs.sweep_figure import plot_sweep

LIMITS: Final = np.round(np.arange(-0.4, 0.99, 0.02), 2)  # a pair more similar than this is connected: minus the bias
FIXED: Final = len(LIMITS)
HALVES: Final = {"tuning": slice(0, None, 2), "reporting": slice(1, None, 2)}
Table = dict[str, NDArray[Any]]
Choice = NDArray[np.int64]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write, draw, and print."""
    parser = argparse.ArgumentParser(description="Compare rules for the Gram bias that need no labels.")
    parser.add_argument("--images", type=Path, required=True, metavar="DIR")
    parser.add_argument("--annotations", type=Path, required=True, metavar="FILE")
    parser.add_argument("--backbone", default="imgfocus_vits14")
    parser.add_argument("--layers", type=int, nargs="+", default=[5, 8, 10, 11])
    parser.add_argument("--limit", type=int)
    parser.add_argument("--out", type=Path, help="default: eval/results/bias-rules-BACKBONE.json")
    parser.add_argument("--plot", type=Path, help="sweep plot of the reporting half")
    args = parser.parse_args(argv)
    benchmark = load_benchmark("coco", images=args.images, annotations=args.annotations).limited(args.limit)
    pairs = [(feature, layer) for layer in args.layers for feature in FEATURES]
    table = measure(args.backbone, pairs, benchmark.examples)
    halves = {name: {key: values[part] for key, values in table.items()} for name, part in HALVES.items()}
    rules = {name: {half: judge(rule, part) for half, part in halves.items()} for name, rule in RULES.items()}
    result = {
        "backbone": args.backbone,
        "features": [f"{feature} {layer}" for feature, layer in pairs],
        "images": {half: len(part["bias"]) for half, part in halves.items()},
        "fingerprint": benchmark.fingerprint(),
        "versions": package_versions(),
        "rules": rules,
    }
    out = args.out or Path("eval/results") / f"bias-rules-{args.backbone}.json"
    write_json(out, result)
    if args.plot:
        rows = as_rows(pairs, halves["reporting"])
        plot_sweep(args.plot, rows, f"{args.backbone}, {rows[0].auto.images} images of COCO for reporting")
    for name, found in rules.items():
        print(f"{name:50s}", *(f"{found[half]['mean']:+6.2f} {found[half]['worst']:+7.2f}" for half in HALVES))
    print(f"written to {out}")
    return 0


def measure(name: str, pairs: list[tuple[Feature, int]], examples: tuple[Example, ...]) -> Table:
    """For every image, feature and bias: the hit, the share of unconnected pairs, and the factors of the score.

    Returns:
        Arrays of shape (images, features, biases): the fixed ones, then the trials of `auto`.
    """
    backbone = load_backbone(name)
    extract = FeatureExtractor(backbone, pairs)
    biases = with_trials(tuple((-LIMITS).tolist()))
    rows: list[dict[str, list[Any]]] = []
    for example in tqdm(examples, unit="img"):
        picture = cut_patches(read_image(example.path, exif=False), backbone.spec.patch_size)
        patches = torch.from_numpy(picture.patches)[None]
        pixels = normalise_patches(patches, [picture.size], backbone.mean, backbone.std)
        row: dict[str, list[Any]] = {}
        for packed in extract([pixels], [picture.grid]):
            features = prepare(packed[None], normalize=True)
            candidates = find_candidates(features, picture.grid, biases, 100)
            boxes = in_pixels(candidates.boxes()[0], picture, backbone.spec.patch_size)
            count = features.shape[1]
            distinct, size, inside = (factor[0] for factor in score_factors(features, candidates.masks))
            found = {
                "hit": (pairwise_iou(boxes, example.boxes) >= 0.5).any(axis=1),
                "apart": 1 - candidates.maps.degrees[0].sum(dim=1).numpy() / max(1, count * (count - 1)),
                "distinct": np.where(candidates.connected[0], distinct, 0),
                "size": size,
                "inside": inside,
                "bias": candidates.maps.bias[0].numpy(),
                "connected": candidates.connected[0],
            }
            for key, value in found.items():
                row.setdefault(key, []).append(value)
        rows.append(row)
    return {key: np.array([row[key] for row in rows]) for key in rows[0]}


# Rules: the place among the biases for every image and feature, (images, features)


def quantile(share: float, table: Table) -> Choice:
    """The fixed bias that leaves this share of an image's pairs unconnected."""
    return cast("Choice", np.abs(table["apart"][..., :FIXED] - share).argmin(axis=2))


def pooled_quantile(share: float, table: Table) -> Choice:
    """The same over all images together: one bias a feature."""
    place = np.abs(table["apart"][..., :FIXED].mean(axis=0) - share).argmin(axis=1)
    return cast("Choice", np.broadcast_to(place, table["hit"].shape[:2]))


def between(share: float, table: Table) -> Choice:
    """Halfway between an image's own quantile and that of all images."""
    halfway = (LIMITS[quantile(share, table)] + LIMITS[pooled_quantile(share, table)]) / 2
    return cast("Choice", np.abs(LIMITS - halfway[..., None]).argmin(axis=-1))


def trial(steps: float, table: Table) -> Choice:
    """Always the same trial of `auto`."""
    return np.full(table["hit"].shape[:2], FIXED + TRIALS.index(steps))


def highest(table: Table, *factors: str) -> Choice:
    """Of the trials of `auto` the one with the highest score, or part of the score."""
    scores = product(table, *factors)[..., FIXED:]
    return cast("Choice", FIXED + scores.argmax(axis=2))


def product(table: Table, *factors: str) -> NDArray[np.float64]:
    """The score, or a part of it."""
    return cast("NDArray[np.float64]", np.prod([table[factor] for factor in factors], axis=0))


AUTO: Final = "auto: the highest score of six trials"
RULES: Final[dict[str, Callable[[Table], Choice]]] = {
    AUTO: lambda table: highest(table, "distinct", "size", "inside"),
    "auto without `inside`": lambda table: highest(table, "distinct", "size"),
    "auto without `size`": lambda table: highest(table, "distinct", "inside"),
    "auto without `distinct`": lambda table: highest(table, "size", "inside"),
    "mean similarity of each image": lambda table: trial(0.0, table),
    "0.75 deviations below the mean of each image": lambda table: trial(-0.75, table),
    "25 % quantile of each image": lambda table: quantile(0.25, table),
    "30 % quantile of each image": lambda table: quantile(0.3, table),
    "25 % quantile of all images": lambda table: pooled_quantile(0.25, table),
    "halfway between the two at 25 %": lambda table: between(0.25, table),
}


def judge(rule: Callable[[Table], Choice], table: Table) -> dict[str, Any]:
    """Corloc of the rule in each feature, beside the best fixed bias, and how well scores tell hits from misses."""
    chosen = rule(table)[..., None]
    hits = np.take_along_axis(table["hit"], chosen, axis=2)[..., 0]
    scores = np.take_along_axis(product(table, "distinct", "size", "inside"), chosen, axis=2)[..., 0]
    best = 100 * table["hit"][..., :FIXED].mean(axis=0).max(axis=1)
    corloc = 100 * hits.mean(axis=0)
    areas = [score_auc(scores[:, place], hits[:, place]) for place in range(hits.shape[1])]
    known = [area for area in areas if area is not None]
    return {
        "mean": round(float((corloc - best).mean()), 2),
        "worst": round(float((corloc - best).min()), 2),
        "unconnected": int((~np.take_along_axis(table["connected"], chosen, axis=2)).sum()),
        "corloc": corloc.round(2).tolist(),
        "best_fixed": best.round(2).tolist(),
        "best_bias": (-LIMITS[table["hit"][..., :FIXED].mean(axis=0).argmax(axis=1)]).tolist(),
        "auc": [None if area is None else round(area, 3) for area in areas],
        "auc_mean": round(float(np.mean(known)), 3) if known else None,
        "clear": judge_clear(scores[:, -len(FEATURES) :], hits[:, -len(FEATURES) :]),
    }


def judge_clear(scores: NDArray[np.float64], hits: NDArray[np.bool_]) -> dict[str, float]:
    """How many boxes of the last layer are no clear objects, in percent, and how many of them and of the others hit."""
    below = scores < CLEAR_SCORE
    parts = {"share": below, "hits_below": hits[below], "hits_above": hits[~below]}
    return {name: round(100 * float(part.mean()), 1) if part.size else 0.0 for name, part in parts.items()}


def as_rows(pairs: list[tuple[Feature, int]], table: Table) -> list[SweepRow]:
    """What `lostreg sweep` would give on these images."""
    count = len(table["hit"])
    chosen = RULES[AUTO](table)[..., None]
    hits = np.take_along_axis(table["hit"], chosen, axis=2).sum(axis=(0, 2))
    return [
        SweepRow(
            feature,
            layer,
            biases=tuple((-LIMITS).tolist()),
            fixed=tuple(Corloc(int(total), count) for total in table["hit"][:, place, :FIXED].sum(axis=0)),
            auto=Corloc(int(hits[place]), count),
            auto_biases=(),
            auc=None,
            unconnected=0,
        )
        for place, (feature, layer) in enumerate(pairs)
    ]


if __name__ == "__main__":
    sys.exit(main())
