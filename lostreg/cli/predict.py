"""``lostreg predict``: boxes for images, as a table, as JSON Lines, as pictures."""

import argparse
import glob
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from lostreg import defaults
from lostreg.cli.parser import Subparsers, add_max_side, add_method_options, make_discoverer, tell
from lostreg.errors import ImageError, OptionError

_OTHER_PICTURES = (".bmp", ".eps", ".gif", ".pdf", ".svg", ".tif", ".tiff")  # no folder is meant

if TYPE_CHECKING:
    from lostreg.regions import Discovery


def add_parser(commands: Subparsers) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "predict",
        help="find the main object of images",
        description="Find the main object of each image. An image that cannot be read is reported, the others "
        "go on, and the exit code is 2 at the end.",
    )
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="files, folders (with all their subfolders) or globs; before the options",
    )
    parser.add_argument("--json", metavar="FILE|-", help="write predictions as JSON Lines; - is standard output")
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE|DIR",
        help="picture with box, seed and degree map: a file for one image, else a folder",
    )
    add_max_side(parser, defaults.MAX_SIDE)
    parser.add_argument("--strict", action="store_true", help="stop at the first image that cannot be read")
    add_method_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Predict; the exit code is 2 if any image could not be read."""
    paths = find_images(args.images)
    plots = _plot_paths(args.plot, args.images, paths) if args.plot else None
    failed = 0
    with ExitStack() as stack:
        output = _open_json(args.json, stack) if args.json else None
        discoverer = make_discoverer(args, args.backbone)
        if output and output is not sys.stdout and Path(args.json).is_file():
            output.truncate(0)  # only now: a mistake in the other options costs no earlier file
        if output is not sys.stdout:
            print(_row("image", "x1", "y1", "x2", "y2", "score"))
        for index, (path, outcome) in enumerate(zip(paths, discoverer.outcomes(paths), strict=True)):
            if isinstance(outcome, ImageError):
                if args.strict:
                    raise outcome
                failed += 1
            _report(path, outcome, output)  # before the picture, so that a full disk costs no box
            if plots and not isinstance(outcome, ImageError):
                _plot(plots[index], path, outcome, args)
    if failed and len(paths) > 1:
        tell(f"{failed} of {len(paths)} images could not be read")
    return 2 if failed else 0


def find_images(arguments: Iterable[str]) -> list[Path]:
    """The image files that files, folders and globs stand for, folders and globs sorted.

    Raises:
        OptionError: if a folder holds no images or a glob matches none.
    """
    from lostreg.images import SUFFIXES

    found: list[Path] = []
    for argument in arguments:
        if not argument:
            raise OptionError("expected a file, folder or glob, found an empty argument")
        path = Path(argument)
        if path.is_dir():
            inside = sorted(item for item in _walk(path) if item.suffix.lower() in SUFFIXES)
            if not inside:
                raise OptionError(f"no images in {path}: expected files ending in {', '.join(SUFFIXES)}")
            found += inside
        elif glob.has_magic(argument) and not path.exists():
            # pathlib's glob takes no absolute patterns
            matches = sorted(Path(match) for match in glob.glob(argument, recursive=True))  # noqa: PTH207
            files = [match for match in matches if match.is_file()]
            if not files:
                raise OptionError(f"no file matches '{argument}'")
            found += files
        else:
            found.append(path)
    return found


def _walk(folder: Path) -> Iterator[Path]:
    """The files of a folder and of its subfolders, also those that are links, each folder once."""
    seen: set[str] = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        yield from (Path(place) / name for name in files)


def _report(path: Path, outcome: "Discovery | ImageError", output: TextIO | None) -> None:
    from lostreg.predictions import from_discovery, from_error

    if isinstance(outcome, ImageError):
        tell(f"error: {outcome}")
        prediction = from_error(path.as_posix(), outcome)
    else:
        prediction = from_discovery(path.as_posix(), outcome)
        if output is not sys.stdout:
            box = [f"{value:.0f}" for value in outcome.xyxy[0]]
            print(_row(path.as_posix().replace("\n", "\\n"), *box, f"{outcome.scores[0]:.2f}"), flush=True)
    if output:
        output.write(prediction.to_line() + "\n")
        output.flush()


def _row(name: str, *values: str) -> str:
    return f"{name:<40}" + "".join(f" {value:>6}" for value in values)


def _open_json(target: str, stack: ExitStack) -> TextIO:
    from lostreg.images import SUFFIXES

    if target == "-":
        return sys.stdout
    path = Path(target)
    if path.suffix.lower() in SUFFIXES:  # most likely a list of images that follows --json without its FILE
        raise OptionError(f"--json {target} is named like an image: expected a file for JSON Lines, or -")
    _make_folder(path.parent)
    return stack.enter_context(path.open("a", encoding="utf-8", newline="\n"))


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(f"cannot make the folder {folder}: {error.strerror}") from error


def _plot_paths(target: Path, arguments: list[str], paths: list[Path]) -> list[Path]:
    """Where each picture goes; images of one name in different folders get different pictures.

    Raises:
        OptionError: if one file is asked for and there are several images, the folder cannot be written, or a
            picture would take the place of an image.
    """
    plots = _place_plots(target, paths)
    place, images = target.resolve(), {path.resolve() for path in paths}
    # Beside images, pictures would replace others of their name; in a folder that is searched, they would be
    # taken for images the next time.
    searched = [Path(argument).resolve() for argument in arguments if Path(argument).is_dir()]
    folder = plots != [target]
    if place in images or (
        folder and (place in {path.parent for path in images} or any(place.is_relative_to(path) for path in searched))
    ):
        raise OptionError(f"--plot {target} is among the images: give another folder")
    return plots


def _place_plots(target: Path, paths: list[Path]) -> list[Path]:
    from lostreg.plots import PLOT_SUFFIXES

    suffix = target.suffix.lower()
    if suffix in _OTHER_PICTURES and not target.is_dir():
        raise OptionError(f"--plot {target}: expected a folder or a file ending in {', '.join(PLOT_SUFFIXES)}")
    if suffix in PLOT_SUFFIXES and not target.is_dir():
        if len(paths) > 1:
            raise OptionError(f"--plot {target} is one file, but there are {len(paths)} images: give a folder")
        _make_folder(target.parent)
        return [target]
    _make_folder(target)
    if not os.access(target, os.W_OK):
        raise OptionError(f"cannot write to {target}: permission denied")
    return list(_unique_names(target, paths))


def _unique_names(folder: Path, paths: list[Path]) -> Iterator[Path]:
    used: set[str] = set()
    for path in paths:
        name, number = path.stem, 1
        while name in used:
            number += 1
            name = f"{path.stem}-{number}"
        used.add(name)
        yield folder / f"{name}.png"


def _plot(target: Path, path: Path, found: "Discovery", args: argparse.Namespace) -> None:
    from lostreg.images import read_image
    from lostreg.plots import plot_discovery, save_picture

    picture = read_image(path, max_side=args.max_side, max_pixels=args.max_pixels)
    save_picture(target, plot_discovery(picture.pixels, found))
