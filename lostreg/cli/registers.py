"""``lostreg registers find``: the neurons that write a backbone's outliers, in a file."""

import argparse
from pathlib import Path

from lostreg import defaults
from lostreg.cli.build import REGISTERS_FILE, describe_neurons, make_discoverer
from lostreg.cli.files import check_writable
from lostreg.cli.options import (
    Subparsers,
    add_backbone_options,
    add_images,
    add_max_side,
    add_sample,
    add_threshold,
    positive_int,
)
from lostreg.cli.progress import ProgressBar


def add_parser(commands: Subparsers) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "registers",
        help="find the neurons that write a backbone's outliers",
        description="Find the hidden units that write a backbone's high-norm tokens, from unlabelled images. The file "
        "that is written can be given as `--test-time-registers FILE` to predict, eval, sweep, artifacts and "
        "attention, which then move what these units write to blank tokens that are added to each image.",
    )
    parser.add_argument("action", choices=("find",), help="what to do")
    add_images(parser)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(REGISTERS_FILE),
        metavar="FILE",
        help=f"where to write (default: {REGISTERS_FILE})",
    )
    parser.add_argument(
        "--count", type=positive_int, default=1, metavar="N", help="tokens to add to each image (default: 1)"
    )
    parser.add_argument(
        "--neurons",
        type=positive_int,
        metavar="N",
        help="how many units to take (default: the fewest that make nine in ten outliers ordinary patches)",
    )
    add_threshold(parser)
    add_sample(parser, defaults.REGISTER_IMAGES)
    add_max_side(parser, defaults.MAX_SIDE)
    add_backbone_options(parser, feature=False, lost=False)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Find the neurons; the exit code is 2 if any image could not be read, though the others count."""
    from lostreg.artifacts.register_search import find_registers
    from lostreg.datasets.folder import find_sources

    check_writable(args.out, "register neurons")
    images = find_sources(args.images)
    discoverer = make_discoverer(args, args.backbone)
    with ProgressBar("registers", tell_errors=True) as bar:
        found = find_registers(
            images,
            discoverer,
            count=args.count,
            neurons=args.neurons,
            rule=args.threshold,
            sample=args.sample,
            seed=args.seed,
            on_progress=bar,
        )
    found.save(args.out)
    print(describe_neurons(found))
    print(f"written to {args.out}: use it as --test-time-registers {args.out}")
    return 2 if bar.errors else 0
