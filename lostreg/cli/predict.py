"""``lostreg predict``: boxes for images, as a table, as JSON Lines, as pictures."""

import argparse
import logging
import os
import stat
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from lostreg import defaults
from lostreg.cli.build import make_discoverer, with_objectness, with_registers
from lostreg.cli.files import (
    check_mask_pictures,
    check_written,
    make_folder,
    mask_paths,
    may_be_there,
    refuse_among_images,
    unique_names,
)
from lostreg.cli.options import (
    Subparsers,
    add_images,
    add_mask_folder,
    add_max_side,
    add_method_options,
    add_object_options,
    local_place,
    tell,
)
from lostreg.errors import ImageError, ImageUnavailableError, LostregError, OptionError
from lostreg.jsonio import count_lines, full_disk_named
from lostreg.text import printable

_OTHER_PICTURES = (".bmp", ".eps", ".gif", ".pdf", ".svg", ".tif", ".tiff")  # no folder is meant

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lostreg.images.stores import StoredImage
    from lostreg.inference.discovery import Discovery


def add_parser(commands: Subparsers) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "predict",
        help="find the main objects of images",
        description="Find the main object of each image, or several. An image that cannot be read is reported, "
        "the others go on, and the exit code is 2 at the end.",
    )
    add_images(parser)
    parser.add_argument("--json", metavar="FILE|-", help="write predictions as JSON Lines; - is standard output")
    parser.add_argument(
        "--plot",
        type=local_place,
        metavar="FILE|DIR",
        help="picture with box, seed and degree map: a file for one image, else a folder",
    )
    add_max_side(parser, defaults.MAX_SIDE)
    parser.add_argument("--strict", action="store_true", help="stop at the first image that cannot be read")
    add_mask_folder(parser)
    add_object_options(parser)
    add_method_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Predict; the exit code is 2 if any image could not be read."""
    from lostreg.datasets.folder import find_sources
    from lostreg.images.draw import save_picture
    from lostreg.images.masks import save_mask_png

    sources = find_sources(args.images)
    plots = _plot_paths(args.plot, args.images, sources) if args.plot else None
    masks = _mask_paths(args, sources)
    failed, written = 0, list[Path]()
    with ExitStack() as stack:
        output = _open_json(args.json, stack) if args.json else None
        outcomes = _outcomes(args, sources, keep_pixels=plots is not None)
        if output and output is not sys.stdout and Path(args.json).is_file():
            output.truncate(0)  # only now: a mistake in the other options costs no earlier file
        has_heading = output is sys.stdout
        for index, (source, outcome) in enumerate(zip(sources, outcomes, strict=True)):
            if isinstance(outcome, ImageError):
                if args.strict:
                    raise outcome
                failed += 1
            elif not has_heading:
                print(_row("image", "x1", "y1", "x2", "y2", "score"))
                has_heading = True
            name = source.as_posix() if isinstance(source, Path) else source.name
            _report(name, outcome, output, args)  # before the picture, so that a full disk costs no box
            if plots and not isinstance(outcome, ImageError):
                save_picture(plots[index], outcome.plot())
                written.append(plots[index])
            if masks and not isinstance(outcome, ImageError):
                save_mask_png(masks[index], outcome.labels())
                written.append(masks[index])
        if output:
            _check_json(args.json, output, len(sources))
    check_written(written)
    if failed and len(sources) > 1:
        tell(f"{failed} of {len(sources)} images could not be read", logging.WARNING)
    return 2 if failed else 0


def _outcomes(
    args: argparse.Namespace, sources: "list[Path | StoredImage]", *, keep_pixels: bool
) -> "Iterator[Discovery | ImageError]":
    """What becomes of each image; where none is there no model is loaded."""
    if not any(map(may_be_there, sources)):
        return (ImageUnavailableError(f"{source}: no such file") for source in sources)
    discoverer = with_registers(args, make_discoverer(args, args.backbone), sources)
    return with_objectness(args, discoverer, sources).outcomes(sources, keep_pixels=keep_pixels)


def _mask_paths(args: argparse.Namespace, images: "list[Path | StoredImage]") -> list[Path] | None:
    """Where the picture of each image's masks goes, if that was asked for."""
    if args.mask_dir:
        check_mask_pictures("--mask-dir", args.max_objects)
        return mask_paths(args.mask_dir, args.images, images)
    if args.masks and args.box_from == "patches" and not (args.json or args.plot):
        raise OptionError("--masks shows nowhere: add --json, --plot or --mask-dir, or take boxes --box-from mask")
    return None


def _report(name: str, outcome: "Discovery | ImageError", output: TextIO | None, args: argparse.Namespace) -> None:
    from lostreg.images.draw import score_text
    from lostreg.runs.predictions import from_discovery, from_error

    if isinstance(outcome, ImageError):
        tell(f"error: {outcome}", logging.ERROR)
        prediction = from_error(name, outcome)
    else:
        prediction = from_discovery(name, outcome, masks=args.masks is not None)
        if output is not sys.stdout:
            shown = printable(name)
            for box, score in zip(prediction.boxes, prediction.scores, strict=True):
                note = "" if score >= args.min_score else "  no clear object"
                print(_row(shown, *(f"{value:.0f}" for value in box), score_text(score)) + note, flush=True)
    if output:
        output.write(prediction.to_line() + "\n")
        output.flush()


def _check_json(target: str, output: TextIO, lines: int) -> None:
    """Raise if the lines are not in the file that was named: it may have been deleted or replaced meanwhile."""
    if output is not sys.stdout and stat.S_ISREG(os.fstat(output.fileno()).st_mode):
        found = count_lines(Path(target))
        if found < lines:
            raise LostregError(
                f"{target} was deleted or changed meanwhile: expected {lines} lines, found {found}; run the command "
                "again"
            )


def _row(name: str, *values: str) -> str:
    return f"{name:<40}" + "".join(f" {value:>6}" for value in values)


def _open_json(target: str, stack: ExitStack) -> TextIO:
    from lostreg.images.files import SUFFIXES

    if target == "-":
        if getattr(sys.stdout, "is_closed", False):
            raise OptionError("--json -: standard output is closed")
        return sys.stdout
    path = Path(target)
    if path.suffix.lower() in SUFFIXES:  # most likely a list of images that follows --json without its FILE
        raise OptionError(f"--json {target} is named like an image: expected a file for JSON Lines, or -")
    make_folder(path.parent)
    stack.enter_context(full_disk_named(path))
    return stack.enter_context(path.open("a", encoding="utf-8", newline="\n"))


def _plot_paths(target: Path, arguments: list[str], images: "list[Path | StoredImage]") -> list[Path]:
    """Where each picture goes; images of one name in different folders get different pictures.

    Raises:
        OptionError: if one file is asked for and there are several images, the folder cannot be written, or a
            picture would take the place of an image.
    """
    plots = _place_plots(target, images)
    if plots != [target]:
        refuse_among_images("--plot", target, arguments, images)
    elif target.resolve() in {image.resolve() for image in images if isinstance(image, Path)}:
        raise OptionError(f"--plot {target} is among the images: give another folder")
    return plots


def _place_plots(target: Path, images: "list[Path | StoredImage]") -> list[Path]:
    from lostreg.images.draw import PLOT_SUFFIXES

    suffix = target.suffix.lower()
    if target.is_dir():
        suffix = ""
    is_foreign = suffix in _OTHER_PICTURES or (len(images) == 1 and suffix)  # of one image most likely a file is meant
    if is_foreign and suffix not in PLOT_SUFFIXES:
        raise OptionError(
            f"--plot {target}: expected a folder or a file ending in {', '.join(PLOT_SUFFIXES)}; a folder whose name "
            "has an ending must be there already"
        )
    if suffix in PLOT_SUFFIXES:
        if len(images) > 1:
            raise OptionError(f"--plot {target} is one file, but there are {len(images)} images: give a folder")
        make_folder(target.parent)
        return [target]
    make_folder(target)
    return [target / f"{name}.png" for name in unique_names(images)]
