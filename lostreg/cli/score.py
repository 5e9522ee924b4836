"""``lostreg score``: the corloc of any predictions; runs no model and needs no images."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from lostreg.cli.build import open_benchmark
from lostreg.cli.options import Subparsers, add_benchmark_options, run_place, tell
from lostreg.defaults import PREDICTIONS_FILE

if TYPE_CHECKING:
    from lostreg.datasets.base import Benchmark
    from lostreg.runs.predictions import Prediction


def add_parser(commands: Subparsers) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "score",
        help="score a predictions file",
        description="Score predictions of any origin: JSON Lines with image_id (file stem for VOC, id for COCO, or "
        "paths of the image files as `lostreg discover` writes them) and boxes [x1, y1, x2, y2] in pixels; a JSON list "
        "of such objects; or COCO's results, a JSON list with image_id, bbox [x, y, width, height] and score, whose "
        "categories are ignored. Runs no model. The last line is like `corloc 61.90 (3102/5011)`.",
    )
    parser.add_argument("predictions", type=run_place, help="the file, or the folder of a run, or its URI")
    parser.add_argument("benchmark", help="voc07, voc12, coco20k, sample, voc or coco: see `lostreg datasets`")
    parser.add_argument(
        "--against",
        type=run_place,
        metavar="PREDICTIONS",
        help="other predictions: tells how much corloc these gain over them on the same images, with the 95 %% "
        "interval of that difference",
    )
    add_benchmark_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Score; images without a prediction are misses, and are counted."""
    from lostreg.metrics import paired_gain
    from lostreg.runs.evaluate import hits_of, note_other_sizes, score_detections, score_predictions

    predictions = _read(args.predictions)
    others = None if args.against is None else _read(args.against)
    benchmark = open_benchmark(args, with_images=False)
    predictions = _named(predictions, benchmark)
    score, missing = score_predictions(predictions, benchmark)
    detection = score_detections(predictions, benchmark)
    if note := note_other_sizes(predictions, benchmark):
        tell(note)
    _tell_missing(missing, benchmark)
    unreadable = sum(prediction.error is not None for prediction in predictions)
    if unreadable:
        tell(f"{unreadable} images could not be read when predicting and count as misses")
    low, high = score.wilson_interval()
    print(f"{benchmark.title}: 95 % interval {low:.2f} to {high:.2f}")
    if detection:
        print(detection)
    if others is not None:
        others = _named(others, benchmark)
        _tell_missing(score_predictions(others, benchmark)[1], benchmark, f" in {args.against}")
        before = hits_of(others, benchmark)
        gain, low, high = paired_gain(before, hits_of(predictions, benchmark))
        corloc = 100 * sum(before) / len(before)
        interval = f"95 % interval {low:+.2f} to {high:+.2f}, paired by image"
        print(f"{gain:+.2f} over the {corloc:.2f} of {args.against}: {interval}")
    print(score)
    return 0


def _tell_missing(missing: int, benchmark: "Benchmark", where: str = "") -> None:
    if missing:
        tell(f"{missing} of {len(benchmark)} images have no prediction{where} and count as misses")


def _read(place: Path | str) -> "list[Prediction]":
    from lostreg.runs.predictions import read_predictions
    from lostreg.runs.remote import fetched

    with fetched(place, beside=(PREDICTIONS_FILE,)) as file:
        return read_predictions(file)


def _named(predictions: "list[Prediction]", benchmark: "Benchmark") -> "list[Prediction]":
    """The predictions with the ids of the benchmark, where theirs are names of files."""
    from lostreg.runs.evaluate import named_by_files

    named = named_by_files(predictions, benchmark)
    if named is None:
        return predictions
    given, known = predictions[0].image_id, named[0].image_id
    if str(given) != str(known):
        tell(f"images are known by their files' names: {given} is {known}")
    return named
