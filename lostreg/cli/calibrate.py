"""``lostreg calibrate``: one bias for a collection of unlabelled images."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from lostreg import defaults
from lostreg.cli.build import make_discoverer
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

if TYPE_CHECKING:
    from lostreg.inference.calibration import Calibration

_FILE = Path("bias.json")


def add_parser(commands: Subparsers) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "calibrate",
        help="choose one bias for a collection of unlabelled images",
        description="Choose one Gram bias for a backbone and a collection of images, without labels: the one that "
        "gives the box of `--bias auto` in as many images as any. The file that is written can be given as "
        "`--bias FILE` to predict and eval.",
    )
    add_images(parser)
    parser.add_argument(
        "--out", type=local_place, default=_FILE, metavar="FILE", help=f"where to write (default: {_FILE})"
    )
    add_sample(parser, defaults.CALIBRATION_IMAGES)
    add_max_side(parser, defaults.MAX_SIDE)
    add_backbone_options(parser, feature=True)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Calibrate; the exit code is 2 if any image could not be read, though the others count."""
    from lostreg.datasets.folder import find_sources
    from lostreg.inference.calibrate import calibrate

    check_writable(args.out, "a bias")
    images = find_sources(args.images)
    check_there(images)
    discoverer = make_discoverer(args, args.backbone)
    with ProgressBar(args.backbone, tell_errors=True) as bar:
        found = calibrate(images, discoverer, sample=args.sample, seed=args.seed, on_progress=bar)
    found.save(args.out)
    _show(found, len(images))
    print(f"written to {args.out}: use it as --bias {args.out}")
    return 2 if found.unreadable else 0


def _show(found: "Calibration", offered: int) -> None:
    low, high = found.interval
    print(f"{found.backbone}, {found.feature} of layer {found.layer}, {found.images} of {offered} images")
    print(f"bias          {found.bias:.4f}  (90 % of resamples of the images: {low:.4f} to {high:.4f})")
    print(f"connectivity  {100 * found.connectivity:.1f} % of pairs of patches")
    print(f"agreement     about {100 * found.agreement:.0f} % of images have the box of --bias auto")
    if found.images < 30:
        tell(f"{found.images} images say little about a bias: calibrate on more, or use --bias auto")
