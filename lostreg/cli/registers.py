"""``lostreg registers``: find the neurons that write a backbone's outliers, or train registers into it."""

import argparse
import logging
from pathlib import Path

from lostreg import defaults
from lostreg.cli import ablate
from lostreg.cli.build import REGISTERS_FILE, describe_neurons, make_discoverer
from lostreg.cli.files import check_place, check_there, check_writable
from lostreg.cli.options import (
    Subparsers,
    add_backbone,
    add_backbone_options,
    add_images,
    add_max_side,
    add_sample,
    add_threshold,
    add_training_options,
    count,
    local_place,
    positive_int,
    tell,
)
from lostreg.cli.progress import ProgressBar


def add_parser(commands: Subparsers) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "registers",
        help="find the neurons that write a backbone's outliers, or train registers into it",
        description="Registers for a backbone that was trained without: at test time, or by training.",
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    _add_find(actions)
    _add_train(actions)
    ablate.add_parser(actions)


def _add_find(actions: Subparsers) -> None:
    parser = actions.add_parser(
        "find",
        help="find the neurons that write a backbone's outliers",
        description="Find the hidden units that write a backbone's high-norm tokens, from unlabelled images. The file "
        "that is written can be given as `--test-time-registers FILE` to predict, discover, eval, sweep, "
        "artifacts, attention and probe, which then move what these units write to blank tokens that are added to each "
        "image.",
    )
    add_images(parser)
    parser.add_argument(
        "--out",
        type=local_place,
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
    parser.set_defaults(run=find)


def _add_train(actions: Subparsers) -> None:
    parser = actions.add_parser(
        "train",
        help="train registers into a backbone, without labels",
        description="Add register tokens to a trained backbone and have it learn to use them, from unlabelled images: "
        "a student learns to give in one look what its frozen teacher gives over shifted and mirrored views, in which "
        f"artifacts that stay with a position are gone. `DIR/{defaults.TRAINED_FILE}` can be given as `--weights FILE` "
        "with the same backbone wherever one is named. A command that was stopped goes on where it was. On several "
        "GPUs: `torchrun --nproc-per-node N -m lostreg registers train ...`, or `accelerate launch` (extra train).",
    )
    add_images(parser)
    parser.add_argument(
        "--out",
        type=local_place,
        required=True,
        metavar="DIR",
        help="folder of the weights and of training.json",
    )
    group = parser.add_argument_group("training")
    group.add_argument(
        "--registers",
        type=count,
        default=defaults.TRAINING_REGISTERS,
        metavar="N",
        help=f"tokens to add; 0 trains a control (default: {defaults.TRAINING_REGISTERS})",
    )
    add_training_options(group)
    group.add_argument(
        "--batch-size",
        type=positive_int,
        default=defaults.BATCH_SIZE,
        metavar="N",
        help=f"images a step, over all processes (default: {defaults.BATCH_SIZE})",
    )
    group.add_argument(
        "--teacher",
        type=local_place,
        metavar="DIR",
        help="folder of the teacher's features, which trainings of one backbone on the same images may share if they "
        "differ in registers, steps, rates or batches alone (default: teacher in --out)",
    )
    parser.add_argument("--overwrite", action="store_true", help="start anew in --out, instead of going on")
    add_sample(parser, defaults.TRAINING_IMAGES)
    add_backbone(parser.add_argument_group("backbone"))
    parser.set_defaults(run=train, goes_on=True)


def find(args: argparse.Namespace) -> int:
    """Find the neurons; the exit code is 2 if any image could not be read, though the others count."""
    from lostreg.artifacts.register_search import find_registers
    from lostreg.datasets.folder import find_sources

    check_writable(args.out, "register neurons")
    images = find_sources(args.images)
    check_there(images)
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


def train(args: argparse.Namespace) -> int:
    """Train; the exit code is 2 if any image could not be used, though the others count."""
    from lostreg.datasets.folder import find_sources
    from lostreg.models.backbone import load_backbone, resolve_device
    from lostreg.training.options import TrainingOptions
    from lostreg.training.processes import Processes, own_device
    from lostreg.training.train import train_registers

    names = TrainingOptions.__dataclass_fields__.keys()
    check_place(args.out)
    options = TrainingOptions(**{name: value for name, value in vars(args).items() if name in names})
    device = own_device(resolve_device(args.device))
    processes = Processes.meet(device)
    images = find_sources(args.images)
    check_there(images)
    backbone = load_backbone(args.backbone, weights=args.weights, device=device)
    with ProgressBar(args.backbone, tell_errors=True) as bar:
        trained = train_registers(
            images, backbone, args.out, options, teacher=args.teacher, overwrite=args.overwrite, on_progress=bar
        )
    processes.close()
    if not processes.is_main:
        return 0
    before, best = trained.curve[0], min(trained.curve, key=lambda look: look.held_out)
    print(
        f"{args.backbone} with {trained.registers} new registers, from {trained.images} images: the loss on "
        f"{trained.held_out} others fell from {before.held_out:.4f} to {best.held_out:.4f} in {best.step} steps"
    )
    if not best.step:
        tell(
            "no step made it lower: these are the weights as given, with registers that learned nothing; a lower "
            "--learning-rate may help",
            logging.WARNING,
        )
    print(f"written to {trained.weights}: use it as --backbone {args.backbone} --weights {trained.weights}")
    return 2 if trained.unreadable else 0
