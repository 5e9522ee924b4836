"""``lostreg discover``: boxes for a whole collection of photos, into a folder that can be exported and looked at."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from lostreg import defaults
from lostreg.cli.build import (
    OBJECTNESS_FILE,
    REGISTERS_FILE,
    asked_session,
    asked_workers,
    make_discoverer,
    with_objectness,
    with_registers,
)
from lostreg.cli.files import check_mask_pictures, check_place
from lostreg.cli.options import (
    Subparsers,
    add_max_side,
    add_method_options,
    add_object_options,
    add_workers,
    positive_int,
    run_place,
    tell,
)
from lostreg.cli.progress import ProgressBar, judge_failures
from lostreg.errors import ObjectnessError, OptionError

if TYPE_CHECKING:
    from lostreg.datasets.folder import Collection
    from lostreg.inference.discoverer import Discoverer
    from lostreg.runs.discover import Summary


def add_parser(commands: Subparsers) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "discover",
        help="find the objects of a collection of photos",
        description="Find the objects of every photo of a source, however many there are. A run that was "
        "stopped, by whatever, goes on where it was, and so does one to whose photos others were added. Photos that "
        "cannot be read are listed in failed.csv; the exit code is 2 if that is all of them, or if more than a tenth "
        "were not there or could not be opened this time, which the same command tries again. Then see "
        "`lostreg report` and `lostreg export`.",
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="a folder with all its subfolders, or a glob in quotes: the image files there or, where there are none, "
        "the images in .tar, .parquet and .arrow files and frames of videos; one such file, or several "
        "('{000..099}.tar'); a URI of any of these (s3://BUCKET/DIR, gs://, file:// and so on); or a text file with a "
        "path or URI a line. docs/sources.md has the rules",
    )
    parser.add_argument(
        "--out",
        type=run_place,
        required=True,
        metavar="DIR",
        help="folder for predictions.jsonl, maps.jsonl, failed.csv and results.json; or a URI (s3://BUCKET/DIR and so "
        "on), to which they are copied in the end",
    )
    parser.add_argument(
        "--every",
        type=positive_int,
        metavar="N",
        help="of videos (extra video), each Nth frame (default: one a second, about)",
    )
    parser.add_argument("--overwrite", action="store_true", help="start anew instead of going on")
    parser.add_argument("--retry-failed", action="store_true", help="try photos again that are broken, too")
    parser.add_argument("--strict", action="store_true", help="stop at the first photo that cannot be read")
    parser.add_argument(
        "--mask-png",
        action="store_true",
        help="a PNG of each photo's masks, in OUT/masks: 0 where no object is, 1 on the first one, 2 on the second; of "
        "patches unless --masks refined is given",
    )
    add_max_side(parser, defaults.MAX_SIDE)
    add_object_options(parser, is_collection=True)
    add_method_options(parser, precision="auto")
    add_workers(parser)
    parser.set_defaults(run=run, goes_on=True)


def run(args: argparse.Namespace) -> int:
    """Discover; for the exit code see `judge_failures`."""
    from lostreg.runs.discover import MASKS_FOLDER
    from lostreg.runs.remote import below, folder_of

    if args.mask_png:
        check_mask_pictures("--mask-png", args.max_objects)
    check_place(args.out)
    place = args.out
    with folder_of(place) as args.out:
        summary = _run(args, apart=below(place, MASKS_FOLDER))
    print(_words(summary, args.min_score, place), flush=True)
    return judge_failures(summary.unreadable, summary.unavailable, summary.images, retry="--retry-failed")


def _run(args: argparse.Namespace, apart: Path | str) -> "Summary":
    from lostreg.datasets.folder import find_collection
    from lostreg.datasets.video import Video
    from lostreg.runs.discover import discover_collection

    collection = find_collection(args.source, apart=apart, every=args.every)
    if args.every is not None and not any(isinstance(part, Video) for part in collection.parts):
        raise OptionError(f"--every {args.every} is for videos, and {args.source} has no frame of any")
    with asked_session(args) as session:
        discoverer = _discoverer(args, collection)
        workers = asked_workers(args, session, discoverer)
        with ProgressBar(args.backbone) as bar:
            return discover_collection(
                collection,
                discoverer,
                args.out,
                overwrite=args.overwrite,
                retry_failed=args.retry_failed,
                strict=args.strict,
                masks=args.masks is not None,
                mask_pictures=args.mask_png,
                workers=workers,
                on_progress=bar,
            )


def _discoverer(args: argparse.Namespace, collection: "Collection") -> "Discoverer":
    """The discoverer, with what it learns from the collection first."""
    is_asked = args.objectness is not None
    _choose(args, len(collection.names))
    discoverer = make_discoverer(args, args.backbone)
    if args.test_time_registers is not None or args.objectness == "self":
        discoverer = with_registers(args, discoverer, collection, kept=args.out / REGISTERS_FILE)
        try:
            return with_objectness(args, discoverer, collection, kept=args.out / OBJECTNESS_FILE)
        except ObjectnessError as error:
            if is_asked:
                raise
            tell(f"{error}: going on without")
            return discoverer
    return discoverer if args.objectness is None else with_objectness(args, discoverer, [])


def _choose(args: argparse.Namespace, photos: int) -> None:
    """Decide what the user leaves open: as in the run that the folder holds, else as for a new one."""
    from lostreg.runs.results import results_of

    options = None if args.overwrite else (results_of(args.out) or {}).get("options")
    begun = options if isinstance(options, dict) else {}
    if args.precision == "auto" and begun.get("precision") in defaults.PRECISIONS:
        args.precision = begun["precision"]
        tell(f"{args.precision}, in which the run in {args.out} was begun")
    if args.method is None:
        args.method = "parts" if not begun else begun.get("method", "lost")
        if args.method not in defaults.METHODS:
            args.method = "parts"
        if begun and args.method != "parts":
            tell(f"{args.method}, with which the run in {args.out} was begun")
    if args.objectness is None and args.method == "parts":
        learns = (args.out / OBJECTNESS_FILE).exists() if begun else photos >= defaults.LEAST_TEACHERS
        args.objectness = "self" if learns else None


def _words(summary: "Summary", min_score: float, out: Path | str) -> str:
    lines = [f"{summary.images:,} photos, {summary.boxes:,} boxes"]
    lines.append(f"{summary.clear:,} with a clear object")
    lines.append(f"{summary.unclear:,} with no clear object (a score below {min_score:g})")
    lines.append(f"{summary.unreadable:,} could not be read" + (", see failed.csv" if summary.unreadable else ""))
    if summary.known:
        lines.append(f"{summary.known:,} of these had been done before")
    return "\n".join([*lines, f"written to {out}"])
