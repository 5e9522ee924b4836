"""Argument types and option groups that several commands share. Imports no model library."""

import argparse
import logging
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from lostreg import defaults
from lostreg.checks import LARGEST, cut, whole_seed
from lostreg.errors import BackboneError, OptionError
from lostreg.images.stores import is_uri, local_path
from lostreg.models.table import FEATURES, check_name
from lostreg.text import did_you_mean, printable
from lostreg.training.processes import fails_first

if TYPE_CHECKING:
    from lostreg.artifacts.outliers import CutoffRule

Subparsers = Any  # argparse keeps these classes to itself
Group = Any


class Parser(argparse.ArgumentParser):
    """Reports a bad argument in one line, and takes options by their whole names alone.

    All of them, those of commands among them, take what decides how much is told.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})
        told = self.add_mutually_exclusive_group()
        flag: Any = {"action": "store_const", "dest": "told_from", "default": argparse.SUPPRESS}
        told.add_argument("--quiet", const=logging.WARNING, help="tell warnings and errors alone, show no bars", **flag)
        told.add_argument("--verbose", const=logging.DEBUG, help="tell what the library does, too", **flag)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does, but a command itself refuses what it does not know: its help is the one to see."""
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            option = next((word.partition("=")[0] for word in unknown if word.startswith("--")), None)
            near = did_you_mean(option, self._option_string_actions, most=1, likeness=0.75) if option else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{near}")
        return parsed, unknown

    def error(self, message: str) -> NoReturn:
        """Exit with code 2 and one line on standard error."""
        told = f"{self.prog}: error: {cut(one_line(name_variable(message)), 1000)} (see {self.prog} --help)\n"
        self.exit(2, told if fails_first() else None)


def join_bias(arguments: Sequence[str]) -> list[str]:
    """``--bias -1e-3`` as one word: argparse before Python 3.13 takes such a number for an option."""
    joined: list[str] = []
    for word in arguments:
        if joined and joined[-1] in ("--bias", "--biases") and word.startswith("-"):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def positive_int(text: str, least: int = 1) -> int:
    """An integer of at least 1, or another least one, for argparse."""
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"expected an integer of at least {least}, not '{text}'")
    return value


def bias_value(text: str) -> float | Literal["auto"] | Path:
    """``auto``, a finite number, or a file that is there, for argparse."""
    if text == "auto":
        return "auto"
    value = as_finite(text)
    if value is not None:
        return value
    if not _is_file(text):
        raise argparse.ArgumentTypeError(
            f"expected 'auto', a finite number, or a file of `lostreg calibrate`, not '{text}'"
        )
    return Path(text)


def registers_value(text: str) -> int | Path:
    """A number of tokens, or a file that is there, for argparse."""
    if text.isdecimal() and 0 < float(text) < LARGEST:
        return int(text)
    if not _is_file(text):
        raise argparse.ArgumentTypeError(
            f"expected a number of tokens of at least 1, or a file of `lostreg registers find`, not '{text}'"
        )
    return Path(text)


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except OSError:  # a name too long
        return False


def objectness_value(text: str) -> Literal["none", "self"] | Path:
    """``none``, ``self``, or a file that is there, for argparse."""
    if text == "none":
        return "none"
    if text == "self":
        return "self"
    if not _is_file(text):
        raise argparse.ArgumentTypeError(f"expected 'none', 'self', or a file of `lostreg learn`, not '{text}'")
    return Path(text)


def cutoff_rule(text: str) -> "CutoffRule":
    """A rule for outliers, see `lostreg.artifacts.outliers.parse_rule`, for argparse."""
    from lostreg.artifacts.outliers import parse_rule

    try:
        return parse_rule(text)
    except OptionError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def as_finite(text: str) -> float | None:
    """The finite number that a text is, or None."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def backbone_name(text: str) -> str:
    """A row of the table, or ``timm:NAME``, for argparse."""
    try:
        check_name(text)
    except BackboneError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def device_name(text: str) -> str:
    """What names a device, whether or not it is there, for argparse."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"device must be auto, cpu, cuda, cuda:N or mps, not '{text}'")
    return text


def default_backbone(otherwise: str = defaults.BACKBONE) -> str:
    """The backbone unless the user names one: what the variable of the environment says, where it is set."""
    return os.environ.get(defaults.BACKBONE_VARIABLE) or otherwise


def name_variable(message: str) -> str:
    """An error, with the variable of the environment that holds the name in it, if one does."""
    for variable in (defaults.BACKBONE_VARIABLE, defaults.DEVICE_VARIABLE):
        value = os.environ.get(variable)
        if value and f"'{value.removeprefix('timm:')}'" in message:
            message += f" ({variable} says so)"
    return message


def unit_interval(text: str) -> float:
    """A number in [0, 1], for argparse."""
    value = as_finite(text)
    if value is None or not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number in [0, 1], not '{text}'")
    return value


def add_method_options(
    parser: argparse.ArgumentParser, *, several_backbones: bool = False, precision: defaults.Precision = "fp32"
) -> None:
    """The options of the method, shared by ``predict``, ``discover``, ``eval`` and ``artifacts``.

    Args:
        parser: of the command.
        several_backbones: whether the command takes several backbones.
        precision: of the backbone, unless the user asks for another.
    """
    group = parser.add_argument_group("method")
    _add_backbone(group, several=several_backbones)
    _add_feature(group)
    group.add_argument(
        "--bias",
        type=bias_value,
        metavar="{auto|FLOAT|FILE}",
        help="added to every similarity: auto chooses for each image, a FILE comes from `lostreg calibrate` "
        "(default: the backbone's)",
    )
    group.add_argument(
        "--normalize",
        action=argparse.BooleanOptionalAction,
        help="L2-normalise the features (default: the backbone's; always for auto and a FILE)",
    )
    _add_k_patches(group)
    _add_running(group, precision)
    add_registers(group)


def add_method_choice(group: Group, *, is_collection: bool = False) -> None:
    """The options that say what looks for objects; for a collection, see `add_object_options`."""
    add_method(group, "parts" if is_collection else "lost", is_open=is_collection)
    own = f", self from {defaults.LEAST_TEACHERS} images on with parts" if is_collection else ""
    group.add_argument(
        "--objectness",
        type=objectness_value,
        metavar="{none|self|FILE}",
        help="by what parts ranks its candidates instead of the score: self learns from up to "
        f"{defaults.MOST_TEACHERS} of these images first, without labels; a FILE comes from `lostreg learn` (default: "
        f"none{own})",
    )


def add_method(group: Group, default: str, *, is_open: bool = False) -> None:
    """The option that names the method.

    Args:
        group: of options.
        default: what it is unless the user asks for another.
        is_open: whether an option that is not given is None, and the command decides.
    """
    group.add_argument(
        "--method",
        choices=defaults.METHODS,
        default=None if is_open else default,
        help="lost; parts, which takes clusters of patches as candidates beside LOST's and finds more objects; "
        f"tokencut, maskcut and dinoseg as published (default: {default})",
    )


def add_object_options(parser: argparse.ArgumentParser, *, is_collection: bool = False) -> None:
    """The options that say what looks for objects, for how many, and what is made of their masks.

    Args:
        parser: of the command.
        is_collection: whether the command takes what finds most objects, unless the user asks for LOST.
    """
    group = parser.add_argument_group("objects")
    add_method_choice(group, is_collection=is_collection)
    group.add_argument(
        "--max-objects",
        type=positive_int,
        default=1,
        metavar="N",
        help="look for up to N objects: what was found leaves the graph, and LOST runs again on the "
        "rest; with parts, the best candidates that overlap little (default: 1)",
    )
    group.add_argument(
        "--min-score",
        type=unit_interval,
        default=defaults.CLEAR_SCORE,
        metavar="SCORE",
        help="further objects with a lower score are left out and end the search; a first one is kept, and told to be "
        f"`no clear object` (default: {defaults.CLEAR_SCORE})",
    )
    group.add_argument(
        "--masks",
        choices=("patches", "refined"),
        help="write a mask for each box as COCO run-length encoding: the object's patches, or these sharpened on the "
        "pixels (default: none)",
    )
    group.add_argument(
        "--box-from",
        choices=("patches", "mask"),
        default="patches",
        help="take boxes around the patches, or around the refined masks (default: patches)",
    )


def add_mask_folder(parser: argparse.ArgumentParser) -> None:
    """The option that writes masks as pictures."""
    parser.add_argument(
        "--mask-dir",
        type=local_place,
        metavar="DIR",
        help="a PNG of each image's masks: 0 where there is no object, 1 on the first one, 2 on the second",
    )


def add_backbone_options(
    parser: argparse.ArgumentParser,
    *,
    feature: bool,
    lost: bool = True,
    registers: bool = False,
    several: bool = False,
    named: bool = True,
) -> None:
    """The options of the method for commands without ``--bias``.

    Args:
        parser: of the command.
        feature: whether the user chooses the feature.
        lost: whether LOST runs on it.
        registers: whether test-time registers can be added.
        several: whether the command takes several backbones.
        named: whether an option names them; else they are the command's arguments.
    """
    group = parser.add_argument_group("method")
    if named:
        _add_backbone(group, several=several)
    else:
        _add_weights(group)
    if feature:
        _add_feature(group)
    if lost:
        _add_k_patches(group)
    else:
        parser.set_defaults(k_patches=defaults.K_PATCHES)
    _add_running(group)
    if registers:
        add_registers(group)


def add_registers(group: Group) -> None:
    """The option that adds test-time registers."""
    group.add_argument(
        "--test-time-registers",
        type=registers_value,
        metavar="N|FILE",
        help="add N blank tokens to each image and move to them what the neurons write that make outliers (Jiang et "
        "al. 2025); these neurons are found on the images at hand, or come from a FILE of `lostreg registers find`",
    )


def _add_backbone(group: Group, *, several: bool = False) -> None:
    default = default_backbone()
    told = _told_default(defaults.BACKBONE_VARIABLE, defaults.BACKBONE)
    help_text = f"a row of `lostreg backbones`, or timm:NAME ({told})"
    kind: Any = {"type": backbone_name, "metavar": "NAME"}
    if several:
        help_text += "; several run one after the other and end with one table"
        group.add_argument("--backbone", nargs="+", action="extend", help=help_text, **kind)
    else:
        group.add_argument("--backbone", default=default, help=help_text, **kind)
    _add_weights(group)


def _add_weights(group: Group) -> None:
    group.add_argument(
        "--weights",
        type=Path,
        metavar="FILE",
        help="checkpoint in timm's, DINO's, DINOv2's or DeiT-III's naming (default: from the hub)",
    )


def _add_feature(group: Group) -> None:
    """The options that name one feature of one layer."""
    group.add_argument("--feature", choices=FEATURES, help="patch feature (default: the backbone's)")
    group.add_argument(
        "--layer", type=int, default=-1, help="block, from 0, or from the end when negative (default: -1)"
    )


def _add_k_patches(group: Group) -> None:
    group.add_argument(
        "--k-patches",
        type=positive_int,
        default=defaults.K_PATCHES,
        metavar="N",
        help=f"low-degree patches that may join the seed (default: {defaults.K_PATCHES})",
    )


def add_backbone(group: Group) -> None:
    """The options that name a backbone, and where it runs."""
    _add_backbone(group)
    _add_device(group)


def add_training_options(group: Group) -> None:
    """What decides the weights of a training, beside the number of registers."""
    group.add_argument(
        "--steps",
        type=positive_int,
        default=defaults.TRAINING_STEPS,
        metavar="N",
        help="updates at most; it ends early where the loss on the images that are held out falls no more (default: "
        f"{defaults.TRAINING_STEPS})",
    )
    group.add_argument(
        "--max-side",
        type=positive_int,
        default=defaults.TRAINING_SIDE,
        metavar="N",
        help=f"side of the square windows that are looked at, in pixels (default: {defaults.TRAINING_SIDE})",
    )
    group.add_argument(
        "--views",
        type=positive_int,
        default=defaults.TRAINING_VIEWS,
        metavar="N",
        help=f"of each image that the teacher looks at (default: {defaults.TRAINING_VIEWS})",
    )
    group.add_argument(
        "--aggregate",
        choices=defaults.AGGREGATES,
        default=defaults.AGGREGATES[0],
        help=f"how the teacher brings views together (default: {defaults.AGGREGATES[0]})",
    )
    group.add_argument(
        "--learning-rate",
        type=float,
        default=defaults.LEARNING_RATE,
        metavar="RATE",
        help=f"of AdamW at its highest (default: {defaults.LEARNING_RATE:g})",
    )
    group.add_argument(
        "--unlock",
        nargs="+",
        default=list(defaults.UNLOCKED),
        metavar="PART",
        help="what learns: registers, positions, patches (their embedding), norm (the final one), last:N (blocks), all "
        f"(default: {' '.join(defaults.UNLOCKED)})",
    )


def seed(text: str) -> int:
    """See `lostreg.checks.whole_seed`, for argparse."""
    try:
        return whole_seed(int(text))
    except ValueError as error:  # an OptionError is one, too
        told = str(error) if isinstance(error, OptionError) else f"expected an integer of at least 0, not '{text}'"
        raise argparse.ArgumentTypeError(told) from error


def count(text: str) -> int:
    """An integer of at least 0, for argparse."""
    return positive_int(text, 0)


def _add_device(group: Group) -> None:
    group.add_argument(
        "--device",
        type=device_name,
        default=os.environ.get(defaults.DEVICE_VARIABLE) or "auto",
        help=f"auto, cpu, cuda, cuda:N or mps ({_told_default(defaults.DEVICE_VARIABLE, 'auto')})",
    )


def _told_default(variable: str, otherwise: str) -> str:
    value = os.environ.get(variable, "").replace("%", "%%")
    return f"default: {value}, of {variable}" if value else f"default: {otherwise}, unless {variable} is set"


def _add_running(group: Group, precision: defaults.Precision = "fp32") -> None:
    """The options that say how the backbone runs."""
    add_device(group, precision)
    group.add_argument(
        "--batch-size",
        type=positive_int,
        metavar="N",
        help="images, of whatever shapes, that run together at most "
        f"(default: {defaults.BATCH_SIZE}, on CUDA {defaults.CUDA_BATCH_SIZE})",
    )
    group.add_argument(
        "--compile",
        action="store_true",
        help="compile the backbone's blocks first, which takes up to minutes and pays in long runs",
    )
    add_max_pixels(group)


def add_workers(parser: argparse.ArgumentParser) -> None:
    """The options that have Ray's workers compute."""
    group = parser.add_argument_group("workers")
    group.add_argument(
        "--ray",
        nargs="?",
        const="auto",
        metavar="ADDRESS",
        help="have workers compute that Ray runs, one a GPU, with the same predictions: on this machine, or on the "
        "cluster whose head is at ADDRESS, HOST:PORT; after the other arguments, or with auto for this machine",
    )
    group.add_argument(
        "--workers",
        type=positive_int,
        metavar="N",
        help="with --ray, how many (default: one a GPU, or as many as have the threads of this command on a CPU)",
    )


def add_device(group: Group, precision: defaults.Precision = "fp32") -> None:
    """Where the backbone runs, and in what precision."""
    _add_device(group)
    group.add_argument(
        "--precision",
        choices=defaults.PRECISIONS,
        default=precision,
        help=f"of the backbone; auto: bf16 where the device is quick at it, else fp32 (default: {precision})",
    )


def add_max_pixels(group: Group) -> None:
    """The option that bounds what is decoded."""
    group.add_argument(
        "--max-pixels",
        type=positive_int,
        default=defaults.MAX_PIXELS,
        metavar="N",
        help=f"larger images are refused before they are decoded (default: {defaults.MAX_PIXELS})",
    )


def add_images(parser: argparse.ArgumentParser) -> None:
    """The images that a command is about, for `find_images` and `find_sources` of `lostreg.datasets.folder`."""
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="files, folders (with all their subfolders) or globs; before the options. predict, learn, calibrate and "
        "registers also take .tar, .parquet and .arrow files and URIs such as s3://BUCKET/DIR",
    )


def add_moved_images(parser: argparse.ArgumentParser) -> None:
    """The folder of a run's images, for commands that show or copy them."""
    parser.add_argument(
        "--images",
        type=Path,
        metavar="DIR",
        help="where the images are now, by their ids: for folders that have moved, and for runs without maps.jsonl "
        "(default: where the run found them)",
    )


def add_seed(parser: argparse.ArgumentParser) -> None:
    """The seed of a random sample of the images."""
    parser.add_argument("--seed", type=seed, default=0, help="of the draw, at least 0 (default: 0)")


def add_sample(parser: argparse.ArgumentParser, most: int) -> None:
    """The size and the seed of a random sample of the images."""
    parser.add_argument(
        "--sample",
        type=positive_int,
        default=most,
        metavar="N",
        help=f"look at N of the images at most, drawn at random (default: {most})",
    )
    add_seed(parser)


def add_max_side(parser: argparse.ArgumentParser, default: int | str | None, told: str | None = None) -> None:
    """The option that bounds the size of images, whose default depends on the command."""
    told = told or str(default or "none")
    parser.add_argument(
        "--max-side",
        type=_max_side,
        default=default,
        metavar="N|none",
        help=f"scale longer images down to this side; boxes stay in original pixels (default: {told})",
    )


def _max_side(text: str) -> int | None:
    return None if text == "none" else positive_int(text)


def add_benchmark_options(parser: argparse.ArgumentParser) -> None:
    """The options that name a benchmark, shared by ``eval``, ``score`` and ``sweep``."""
    group = parser.add_argument_group("benchmark")
    group.add_argument("--root", type=Path, metavar="DIR", help="where the benchmark lies (default: ./datasets)")
    group.add_argument("--split", help="trainval, train, val or test, where the benchmark has it")
    group.add_argument("--images", type=Path, metavar="DIR", help="image folder, for coco")
    group.add_argument("--annotations", type=Path, metavar="FILE", help="COCO JSON file, for coco")
    group.add_argument("--no-hard", action="store_true", help="drop difficult and truncated objects (VOC layout)")
    group.add_argument("--limit", type=positive_int, metavar="N", help="only the first N images")


def add_frame(parser: argparse.ArgumentParser) -> None:
    """The option that says which way up a benchmark's boxes see their images."""
    parser.add_argument(
        "--exif",
        action=argparse.BooleanOptionalAction,
        dest="turned",
        help="whether boxes refer to images turned as their EXIF orientation says, or to stored pixels (default: "
        "whichever has the size in the annotations, else stored)",
    )


def tell(message: str, level: int = logging.INFO) -> None:
    """A line for the person at the terminal, out of the way of standard output: see `lostreg.cli.terminal.told`.

    Args:
        message: in words.
        level: of `logging`: notes are left out with ``--quiet``, warnings and errors are not.
    """
    logging.getLogger("lostreg").log(level, "%s", message)


def run_place(text: str) -> Path | str:
    """A file or folder of this machine, or the URI of a store's."""
    if not is_uri(text):
        return Path(text)
    try:
        path = local_path(text)
    except OptionError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text if path is None else Path(path)


def local_place(text: str) -> Path:
    """A file or folder to write on this machine's disks, for argparse: of the URI of a store's no local one is made."""
    place = run_place(text)
    if isinstance(place, str):
        raise argparse.ArgumentTypeError(f"expected a place on this machine's disks, not {text}")
    return place


def one_line(message: str) -> str:
    """A message on one line, on which no name acts on the terminal."""
    return printable(re.sub(r"\s*\n\s*", " ", message.strip()))


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
