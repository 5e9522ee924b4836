"""``lostreg learn``: what a collection of unlabelled images teaches about its objects."""

import argparse
from pathlib import Path

from lostreg import defaults
from lostreg.cli.build import OBJECTNESS_FILE, make_discoverer
from lostreg.cli.files import check_there, check_writable
from lostreg.cli.options import (
    Subparsers,
    add_backbone_options,
    add_images,
    add_max_side,
    add_sample,
    local_place,
    tell,
)
from lostreg.cli.progress import ProgressBar


def add_parser(commands: Subparsers) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "learn",
        help="learn from unlabelled images which patches are part of objects",
        description="Learn from a collection of images, without labels, which patches are part of objects: a "
        "linear map that agrees with the best candidates of many images. The file that is written can be given as "
        "`--objectness FILE` to predict, discover, eval and sweep with `--method parts`; `--objectness self` there "
        "learns from the images at hand.",
    )
    add_images(parser)
    parser.add_argument(
        "--out",
        type=local_place,
        default=Path(OBJECTNESS_FILE),
        metavar="FILE",
        help=f"where to write (default: {OBJECTNESS_FILE})",
    )
    add_sample(parser, defaults.OBJECTNESS_IMAGES)
    add_max_side(parser, defaults.MAX_SIDE)
    add_backbone_options(parser, feature=True)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Learn; the exit code is 2 if any image could not be read, though the others count."""
    from lostreg.datasets.folder import find_sources
    from lostreg.inference.learn import learn

    check_writable(args.out, "an objectness")
    images = find_sources(args.images)
    check_there(images)
    discoverer = make_discoverer(args, args.backbone)
    with ProgressBar(args.backbone, tell_errors=True) as bar:
        found = learn(images, discoverer, sample=args.sample, seed=args.seed, on_progress=bar)
    found.save(args.out)
    print(f"{found.facts.backbone}, {found.facts.images} of {len(images)} images")
    print(f"written to {args.out}: use it as --method parts --objectness {args.out}")
    if found.facts.images < defaults.LEAST_TEACHERS:
        tell(f"{found.facts.images} images teach little: learn from more, or do without")
    return 2 if found.facts.unreadable else 0
