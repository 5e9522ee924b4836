"""``lostreg artifacts``: high-norm tokens of backbones, where they sit, what they hold, as a report folder."""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lostreg import defaults
from lostreg.cli.build import chosen_backbones, make_discoverer, with_registers
from lostreg.cli.files import check_there, make_folder, refuse_among_images
from lostreg.cli.options import (
    Subparsers,
    add_images,
    add_max_side,
    add_method_options,
    add_seed,
    add_threshold,
    local_place,
    positive_int,
)
from lostreg.cli.progress import ProgressBar
from lostreg.errors import RegistersError

if TYPE_CHECKING:
    from lostreg.artifacts.measurement import Measurement
    from lostreg.inference.discoverer import Discoverer

_OUT = Path("artifacts")
_OF_A_BACKBONE = ("backbone", "weights", "feature", "layer", "device", "test_time_registers")  # told with its numbers


def add_parser(commands: Subparsers) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "artifacts",
        help="find a backbone's high-norm tokens, where they sit and what they hold",
        description="Measure the norms of all tokens of a backbone over a folder of images; where outliers sit, what "
        "they hold, and what they do to LOST's similarities. Writes a folder with one HTML page, its pictures, and "
        "every number as JSON. Several backbones stand side by side.",
    )
    add_images(parser)
    parser.add_argument(
        "--out", type=local_place, default=_OUT, metavar="DIR", help=f"folder for the report (default: {_OUT})"
    )
    add_threshold(parser)
    parser.add_argument(
        "--sample",
        type=positive_int,
        default=defaults.ARTIFACT_IMAGES,
        metavar="N",
        help="images, drawn at random, that are run a second time for what tokens hold "
        f"(default: {defaults.ARTIFACT_IMAGES})",
    )
    add_seed(parser)
    parser.add_argument(
        "--annotations",
        type=Path,
        metavar="FILE|DIR",
        help="classes of the images: a COCO JSON file, or VOC's folder Annotations (default: sub-folders, where they "
        "look like classes)",
    )
    add_max_side(parser, defaults.MAX_SIDE)
    add_method_options(parser, several_backbones=True)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure and report; the exit code is 2 if any image could not be read, though the others count."""
    from lostreg.artifacts.labels import annotated_classes, folder_classes
    from lostreg.artifacts.report import NUMBERS, PAGE, write_report
    from lostreg.datasets.folder import find_images

    backbones = chosen_backbones(args)
    paths = find_images(args.images)
    check_there(paths)
    refuse_among_images("--out", args.out, args.images, paths)
    labels = annotated_classes(paths, args.annotations) if args.annotations else folder_classes(paths)
    make_folder(args.out)
    found: list[Measurement] = []
    for backbone in backbones:
        discoverer = make_discoverer(args, backbone)
        for measured in _measure(args, discoverer, paths, labels):
            found.append(measured)
            write_report(args.out, found, settings_of(args, discoverer, len(paths)))  # what comes next may fail
    for one in found:
        print(outliers_line(one))
    print(f"written to {args.out}: {PAGE}, {NUMBERS} and pictures")
    return 2 if any(one.seen.errors for one in found) else 0


def settings_of(args: argparse.Namespace, discoverer: "Discoverer", images: int) -> dict[str, object]:
    """How it was measured, for the record and for the end of the page."""
    from lostreg.runs.results import describe_device, package_versions

    return {
        "images": images,
        "sample": min(args.sample, images),
        "seed": args.seed,
        "annotations": args.annotations.name if args.annotations else None,
        **{name: value for name, value in discoverer.options.record().items() if name not in _OF_A_BACKBONE},
        "device": describe_device(discoverer.backbone.device, discoverer.backbone.dtype),
        "versions": package_versions(),
    }


def _measure(
    args: argparse.Namespace, discoverer: "Discoverer", paths: Sequence[Path], labels: Sequence[str | None]
) -> "Iterator[Measurement]":
    """The backbone and, where test-time registers are asked for and there is something to cure, the same with them."""
    from lostreg.artifacts.measurement import measure
    from lostreg.artifacts.outliers import CutoffRule

    cured: Discoverer | None = None
    if isinstance(args.test_time_registers, Path):
        cured = with_registers(args, discoverer, paths)  # a file that does not fit costs no pass
    with ProgressBar(discoverer.backbone.spec.name, tell_errors=True) as bar:
        options: dict[str, Any] = {
            "labels": labels,
            "sample": args.sample,
            "seed": args.seed,
            "on_progress": bar,
        }
        plain = measure(paths, discoverer, rule=args.threshold, **options)
        yield plain
        cutoff = plain.cutoff.value
        rule = args.threshold if cutoff is None else CutoffRule("number", cutoff)
        if isinstance(args.test_time_registers, int):
            try:
                cured = with_registers(args, discoverer, paths, rule=rule, seed=args.seed)
            except RegistersError as error:
                bar.tell(f"no test-time registers for {discoverer.backbone.spec.name}: {error}")
        if cured is not None:
            yield measure(paths, cured, rule=rule, like=plain, **options)


def outliers_line(one: "Measurement") -> str:
    """What was found, for the person at the terminal."""
    if one.cutoff.value is None:
        return f"{one.title}: no outliers found among {one.patches:,} patches ({one.cutoff.reason})"
    share = 100 * one.outliers / one.patches
    return (
        f"{one.title}: {one.outliers:,} outliers of {one.patches:,} patches ({share:.2f} %), "
        f"norms of {one.cutoff.value:.4g} and more, from layer {one.emerges} on"
    )
