"""``lostreg report``: one page to look through the images of a run."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lostreg.cli.files import check_writable
from lostreg.cli.options import Subparsers, add_moved_images, positive_int, run_place, tell
from lostreg.cli.progress import ProgressBar
from lostreg.errors import OptionError

if TYPE_CHECKING:
    from lostreg.gallery.build import Written

_CHOICES = ("first", "lowest", "highest", "even")
_LIMIT = 2000
_PAGE = "report.html"
_MADE_BY = b'content="lostreg report"'
_SUFFIXES = (".html", ".htm")


def add_parser(commands: Subparsers) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "report",
        help="one HTML page to look through a run's images",
        description="Write one HTML page that shows the images of a run with their boxes, seeds, masks and degree map, "
        "to sort, filter and look through. It needs no network, no server and no other file. The run may be "
        "unfinished.",
    )
    parser.add_argument(
        "run_folder",
        type=run_place,
        metavar="DIR",
        help="the --out of `lostreg discover` or `lostreg eval`, a folder or a URI",
    )
    parser.add_argument(
        "--out", type=run_place, metavar="FILE", help=f"the page, an .html file or its URI (default: DIR/{_PAGE})"
    )
    add_moved_images(parser)
    parser.add_argument(
        "--limit",
        type=positive_int,
        default=_LIMIT,
        metavar="N",
        help=f"images on the page at most; 1000 photographs make about 50 MB (default: {_LIMIT})",
    )
    parser.add_argument(
        "--choose",
        choices=_CHOICES,
        default=_CHOICES[0],
        help="which images, where a run has more: the first, those with the lowest or highest scores, or evenly "
        f"spread over the run (default: {_CHOICES[0]})",
    )
    parser.set_defaults(run=run)


def _pictures_on(target: Path | str) -> int:
    """How many pictures an earlier page has, of which there may be none.

    Raises:
        OptionError: if there is something else.
    """
    from lostreg.gallery.page import pictures_on
    from lostreg.images.stores import kind_at, open_file, telling

    if not (target.exists() if isinstance(target, Path) else kind_at(target)):
        return 0
    with telling(str(target)), open_file(str(target)) as page:
        if _MADE_BY not in page.read(4096):
            raise OptionError(f"--out {target} is there already, and no page of lostreg report: give another file")
        page.seek(0)
        return pictures_on(page)


def run(args: argparse.Namespace) -> int:
    """Write the page."""
    from lostreg.runs.remote import below, fetched, stored

    target = below(args.run_folder, _PAGE) if args.out is None else args.out
    if not str(target).partition("?")[0].lower().endswith(_SUFFIXES):
        raise OptionError(f"--out {target}: expected a file ending in {' or '.join(_SUFFIXES)}")
    if args.images is not None and not args.images.is_dir():
        raise OptionError(f"--images {args.images}: expected a folder")
    with fetched(args.run_folder) as folder, stored(target) as page:
        written, size = _write(args, folder, target, page)
    if written.gone:
        tell(
            f"{written.gone} of {written.shown} image files cannot be read any more: placeholders stand for them; "
            "--images DIR says where they are now"
        )
    if written.changed:
        tell(f"{written.changed} of {written.shown} image files have another size than in the run")
    if written.bare:
        tell(f"{written.bare} of {written.shown} degree maps are left out: they do not fit their image, or a page")
    if written.left_out:
        tell(f"{written.left_out} of {written.shown + written.left_out} images are left out: see --limit and --choose")
    print(f"written to {target}: {written.shown} images, {size / 1e6:.1f} MB")
    return 0


def _write(args: argparse.Namespace, folder: Path, target: Path | str, page: Path) -> "tuple[Written, int]":
    """Write the page on this machine; what is on it, and its bytes."""
    from lostreg.gallery.build import write_gallery
    from lostreg.runs.reader import RunFolder

    run = RunFolder(folder, needs_maps=args.images is None)
    check_writable(page, "the page")
    chosen: dict[str, Any] = {"images": args.images, "limit": args.limit, "choose": args.choose}
    with ProgressBar("report") as bar:
        written = write_gallery(run, page, **chosen, pictures=_pictures_on(target), on_progress=bar)
    return written, page.stat().st_size
