"""``lostreg registers find``, and the option ``--test-time-registers`` of other commands."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lostreg import defaults
from lostreg.cli.files import check_writable
from lostreg.cli.parser import (
    Subparsers,
    add_backbone_options,
    add_images,
    add_max_side,
    add_seed,
    cutoff_rule,
    make_discoverer,
    positive_int,
    tell,
)
from lostreg.cli.progress import StepBars
from lostreg.errors import OptionError

if TYPE_CHECKING:
    from lostreg.artifacts.outliers import CutoffRule
    from lostreg.errors import ImageError
    from lostreg.images.decode import ImageSource
    from lostreg.inference.discoverer import Discoverer
    from lostreg.models.registers import RegisterNeurons

REGISTERS_FILE = "registers.json"
_RESULTS = ("results.json", "sweep.json")


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
    parser.add_argument(
        "--sample",
        type=positive_int,
        default=defaults.REGISTER_IMAGES,
        metavar="N",
        help=f"look at N of the images at most, drawn at random (default: {defaults.REGISTER_IMAGES})",
    )
    add_seed(parser)
    add_max_side(parser, defaults.MAX_SIDE)
    add_backbone_options(parser, feature=False, lost=False)
    parser.set_defaults(run=run)


def add_threshold(parser: argparse.ArgumentParser) -> None:
    """The option that says which tokens are outliers."""
    parser.add_argument(
        "--threshold",
        type=cutoff_rule,
        default="auto",
        metavar="RULE",
        help="norm from which a patch token at the output, before the final norm, is an outlier: a number such as 150, "
        "mean+3sigma, 99.5%%, or auto, which looks for a second mode and may find none (default: auto)",
    )


def run(args: argparse.Namespace) -> int:
    """Find the neurons; the exit code is 2 if any image could not be read, though the others count."""
    from lostreg.artifacts.register_search import find_registers
    from lostreg.datasets.folder import find_images

    check_writable(args.out, "register neurons")
    paths = find_images(args.images)
    discoverer = make_discoverer(args, args.backbone)
    unreadable = 0
    with StepBars("registers") as bars:

        def advance(step: str, done: int, total: int, error: "ImageError | None") -> None:
            nonlocal unreadable
            bars.advance(step, done, total)
            if error:
                bars.tell(f"error: {error}")
                unreadable += 1

        found = find_registers(
            paths,
            discoverer,
            count=args.count,
            neurons=args.neurons,
            rule=args.threshold,
            sample=args.sample,
            seed=args.seed,
            on_progress=advance,
        )
    found.save(args.out)
    print(_describe(found))
    print(f"written to {args.out}: use it as --test-time-registers {args.out}")
    return 2 if unreadable else 0


def with_registers(
    args: argparse.Namespace,
    discoverer: "Discoverer",
    images: "Sequence[ImageSource]",
    *,
    kept: Path | None = None,
    rule: "CutoffRule | None" = None,
    seed: int = 0,
) -> "Discoverer":
    """The discoverer with the test-time registers that ``--test-time-registers`` asks for.

    Args:
        args: with the option; a number of tokens means that neurons are looked for in the images at hand.
        discoverer: without them.
        images: what is about to be processed.
        kept: file for the neurons that are found: a run that goes on takes them from there.
        rule: which tokens are outliers; None looks for a second mode of the norms.
        seed: of the sample of images that neurons are looked for in.

    Raises:
        OptionError: if that file is of another number of tokens.
    """
    from lostreg.artifacts.register_search import find_registers
    from lostreg.models.registers import RegisterNeurons

    wanted = args.test_time_registers
    if wanted is None:
        return discoverer
    if isinstance(wanted, Path):
        return discoverer.with_registers(RegisterNeurons.load(wanted))
    if kept and not args.overwrite:
        earlier = _earlier(kept, wanted)
        if earlier:
            return discoverer.with_registers(earlier)
    with StepBars("registers") as bars:
        found = find_registers(
            images, discoverer, count=wanted, rule=rule, seed=seed, on_progress=lambda *told: bars.advance(*told[:3])
        )
    tell(_describe(found))
    if kept:
        found.save(kept)
    return discoverer.with_registers(found)


def _earlier(kept: Path, wanted: int) -> "RegisterNeurons | None":
    """The neurons that an earlier run into the same folder found; None where there was none.

    Raises:
        OptionError: if it added another number of tokens, or did not look for neurons.
    """
    from lostreg.models.registers import RegisterNeurons

    if kept.exists():
        found = RegisterNeurons.load(kept)
        if found.count == wanted:
            return found
        told = f"{found.count} test-time register{'s' * (found.count > 1)}, not {wanted}"
    elif any((kept.parent / results).exists() for results in _RESULTS):
        told = "other settings: it did not look for register neurons"
    else:
        return None
    raise OptionError(f"{kept.parent} holds a run with {told}; use --overwrite or another --out")


def _describe(found: "RegisterNeurons") -> str:
    layers = sorted({layer for layer, _ in found.neurons})
    return (
        f"{len(found.neurons)} register neurons in layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))} of "
        f"{found.backbone}: outliers have norms of {found.cutoff:.4g} and more, emerge in layer {found.layer} and are "
        f"{100 * found.outliers:.2f} % of patches of {found.images} images, {100 * found.outliers_left:.2f} % with "
        "the neurons moved (on a few of them)"
    )


def chosen_backbones(args: argparse.Namespace) -> list[str]:
    """The backbones that a command for several of them is to run, each known and each once.

    Raises:
        OptionError: if one file of weights or of neurons is given for several of them.
        BackboneError: if one is unknown.
    """
    from lostreg.models.backbone import find_spec

    backbones = list(dict.fromkeys(args.backbone or [defaults.BACKBONE]))
    for option, value in (("--weights", args.weights), ("--test-time-registers", args.test_time_registers)):
        if isinstance(value, Path) and len(backbones) > 1:
            raise OptionError(f"{option} is one file, but there are {len(backbones)} backbones")
    for backbone in backbones:
        find_spec(backbone)
    return backbones
