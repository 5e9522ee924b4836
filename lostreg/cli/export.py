"""``lostreg export``: predictions in the formats of other tools; runs no model."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Final

from lostreg import defaults
from lostreg.checks import cut
from lostreg.cli.files import check_writable, refuse_among_images
from lostreg.cli.options import Subparsers, add_moved_images, as_finite, run_place, tell, unit_interval
from lostreg.cli.progress import ProgressBar
from lostreg.errors import OptionError, PredictionsError
from lostreg.exports.formats import FORMATS, OPTIONS, Format, described_places, formats_with

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lostreg.exports.items import ExportSet
    from lostreg.runs.locate import ImageFinder
    from lostreg.runs.predictions import Prediction

_OF_A_RUN: Final = (defaults.MAPS_FILE, defaults.RESULTS_FILE)


def add_parser(commands: Subparsers) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "export",
        help="predictions as COCO, VOC, YOLO, CSV, Parquet or Label Studio files",
        description="Write predictions in the format of another tool. yolo is a folder that Ultralytics trains on, "
        "with polygons where the run has masks (--masks), else with boxes; voc is one that `lostreg eval voc` reads. "
        "Both have the images. coco, csv, parquet and labelstudio are one file; parquet has a typed row an image and "
        "takes any number of them; labelstudio has its labelling configuration beside it, as .xml. Runs no model.",
    )
    parser.add_argument(
        "predictions", type=run_place, metavar="PREDICTIONS", help="predictions file, or folder of a run, or its URI"
    )
    parser.add_argument("--format", required=True, choices=FORMATS)
    parser.add_argument(
        "--out",
        required=True,
        type=run_place,
        metavar="PATH",
        help=f"{described_places()}. A file may be a URI; for parquet also that of a folder, which gets parts",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the file, or the folder of an earlier export")
    add_moved_images(parser)
    parser.add_argument(
        "--min-score",
        type=unit_interval,
        default=0.0,
        metavar="SCORE",
        help=f"leave out boxes with a lower score; below {defaults.CLEAR_SCORE} there is no clear object (default: 0)",
    )
    parser.add_argument(
        "--decisions",
        type=Path,
        metavar="FILE",
        help="that the page of `lostreg report` saved: rejected boxes are left out, kept ones stay at any score",
    )
    parser.add_argument(
        "--keep-empty",
        action="store_true",
        default=None,
        help="coco, voc, yolo: keep images without a box, as images without objects (default: left out)",
    )
    parser.add_argument(
        "--label", type=_label, help="name of the one class, csv and parquet have none (default: object)"
    )
    parser.add_argument(
        "--files",
        choices=("copy", "link", "none"),
        help="voc, yolo: what becomes of the image files; link makes symbolic links, none leaves them out "
        "(default: copy)",
    )
    parser.add_argument(
        "--val-share", type=_share, metavar="SHARE", help="yolo: share of images for validation (default: 0.2)"
    )
    parser.add_argument(
        "--image-url",
        metavar="PREFIX",
        help="labelstudio: what stands before each image's name (default: /data/local-files/?d=)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Read, check, write; the last line says what was exported."""
    from lostreg.images.stores import delete_file, parent_uri
    from lostreg.runs.locate import is_unfinished, predictions_file
    from lostreg.runs.remote import fetched, stored

    kind = FORMATS[args.format]
    _check_options(args, kind)
    earlier = _check_stored(args, kind) if isinstance(args.out, str) else []
    with fetched(args.predictions) as place:
        source = predictions_file(place)
        if isinstance(args.out, Path):
            _check_out(args, kind, source)
        if is_unfinished(source):
            run_folder = source.parent if isinstance(args.predictions, Path) else args.predictions
            tell(f"{run_folder} holds a run that did not come to its end: these are its images so far")
        with stored(args.out) as out:
            exported = (_stream if kind.is_streamed else _export)(args, kind, source, out)
            parts = [path.name for path in out.iterdir()] if earlier else []
    for uri in earlier:
        if parent_uri(uri)[1] not in parts:
            delete_file(uri)
    print(exported)
    return 0


def _export(args: argparse.Namespace, kind: Format, source: Path, out: Path) -> str:
    """Write a format that takes all predictions at once; what was exported, in words."""
    from lostreg.runs.locate import ImageFinder

    predictions = list(_chosen(args, source))
    finder = ImageFinder(source, args.images)
    if kind.is_folder and out.exists():
        _check_sources(out, source, predictions, finder)
    chosen = _gather(args, kind, predictions, finder)
    _write(args, kind, chosen, finder, out)
    return _report(args, kind, chosen)


def _predictions_of(source: Path) -> "Iterator[Prediction]":
    """The predictions of a run that may have been killed in the middle of a line."""
    from lostreg.runs.predictions import stream_predictions

    is_empty = True
    for prediction in stream_predictions(source):
        is_empty = False
        yield prediction
    if is_empty:
        raise PredictionsError(f"{source} holds no predictions: expected one JSON object a line")


def _chosen(args: argparse.Namespace, source: Path) -> "Iterator[Prediction]":
    """The predictions with the boxes that are exported."""
    from lostreg.runs.decisions import choose_boxes, read_decisions

    decided = read_decisions(args.decisions) if args.decisions else None
    if decided is not None:
        decisions = [decision for of_image in decided.values() for decision in of_image.decisions]
        tell(f"{args.decisions}: {decisions.count('reject')} boxes are rejected, {decisions.count('keep')} kept")
    yield from choose_boxes(_predictions_of(source), min_score=args.min_score, decided=decided)


def _stream(args: argparse.Namespace, kind: Format, source: Path, out: Path) -> str:
    """Write a format that takes predictions one by one; what was exported, in words."""
    _refuse_among_packed(args.out, source)
    images, boxes, unreadable = set[str](), 0, 0

    def counted() -> "Iterator[Prediction]":
        nonlocal boxes, unreadable
        for prediction in _chosen(args, source):
            if str(prediction.image_id) in images:
                raise PredictionsError(f"the predictions have an image twice: {cut(str(prediction.image_id))}")
            images.add(str(prediction.image_id))
            boxes += len(prediction.boxes)
            unreadable += prediction.error is not None
            yield prediction

    in_parts = isinstance(args.out, str) and not out.suffix
    kind.write(out, counted(), in_parts=in_parts)
    note = f" ({unreadable} unreadable)" if unreadable else ""
    return f"exported {len(images) - unreadable} images, {boxes} boxes to {args.out}{note}"


def _gather(
    args: argparse.Namespace, kind: Format, predictions: "list[Prediction]", finder: "ImageFinder"
) -> "ExportSet":
    from lostreg.exports.items import gather

    chosen = gather(
        predictions,
        finder,
        keep_empty=args.keep_empty or "keep_empty" not in kind.options,
        sized=kind.needs_sizes,
        masks=kind.has_masks,
    )
    if not chosen.images and not kind.has_unreadable:
        raise OptionError(
            f"nothing to export: of {len(predictions)} images {len(chosen.unreadable)} could not be read, and "
            f"{chosen.empty} have no box with a score of at least {args.min_score:g}"
            f"{' that was not rejected' if args.decisions else ''}"
        )
    return chosen


def _check_options(args: argparse.Namespace, kind: Format) -> None:
    for option in OPTIONS:
        if getattr(args, option) is not None and option not in kind.options:
            words = f"--{option.replace('_', '-')} is for {', '.join(formats_with(option))}"
            raise OptionError(f"{words}, not for {args.format}")


def _check_stored(args: argparse.Namespace, kind: Format) -> list[str]:
    """Raise `OptionError` unless the place in a store may be written; URIs of an earlier export's parts."""
    from lostreg.exports.writing import check_stored

    if kind.is_folder:
        raise OptionError(
            f"{args.format} is a folder with the images: expected --out on this machine's disks, not {args.out}"
        )
    return check_stored(args.out, kind.suffixes, has_parts=kind.is_streamed, overwrite=args.overwrite)


def _check_out(args: argparse.Namespace, kind: Format, source: Path) -> None:
    from lostreg.exports.writing import check_file, check_folder

    if kind.is_folder:
        check_folder(args.out, overwrite=args.overwrite)
        return
    for suffix in kind.suffixes:
        out = args.out if suffix == kind.suffixes[0] else args.out.with_suffix(suffix)
        check_file(out, suffix, overwrite=args.overwrite)
        check_writable(out, "this format")
    read = [source, *map(source.with_name, _OF_A_RUN), *([args.decisions] if args.decisions else [])]
    if args.out.resolve() in [place.resolve() for place in read]:
        raise OptionError(f"--out {args.out} is a file of the run: give another one")


def _check_sources(out: Path, source: Path, predictions: "list[Prediction]", finder: "ImageFinder") -> None:
    """Raise if an export would delete what it is made of."""
    from lostreg.exports.writing import check_sources

    places = (finder.place(line.image_id) for line in predictions)
    check_sources(out, [source, *(place for place in places if place is not None)])


def _write(args: argparse.Namespace, kind: Format, chosen: "ExportSet", finder: "ImageFinder", out: Path) -> None:
    from importlib import metadata

    from lostreg.exports.writing import MARK, whole_folder
    from lostreg.jsonio import write_json

    names = [name for name in kind.options if name != "keep_empty" and getattr(args, name) is not None]
    options = {name: getattr(args, name) for name in names}  # the formats know what holds else
    if not kind.is_folder:
        kind.write(out, chosen, **options)
        return
    _refuse_among_images(out, chosen, finder)
    with whole_folder(out) as folder, ProgressBar("export") as bar:
        encoded = kind.write(folder, chosen, **options, on_progress=bar)
        about = {"kind": args.format, "lostreg": metadata.version("lostreg")}
        about |= {"images": len(chosen.images), "boxes": chosen.boxes, "min_score": args.min_score}
        write_json(folder / MARK, {"format": "lostreg export 1", **about})
    if encoded:
        tell(
            f"{encoded} images were encoded anew, upright, as JPEG or PNG: not all readers of {args.format} take them "
            "as they are"
        )


def _refuse_among_packed(out: Path | str, source: Path) -> None:
    """Raise if a file would replace one that holds the run's images, or be taken for such a one the next time."""
    from lostreg.datasets.lake import PACKED
    from lostreg.defaults import MAPS_FILE
    from lostreg.runs.maps import read_maps
    from lostreg.runs.results import results_of

    maps, place = source.with_name(MAPS_FILE), _plain(str(out))
    collection = (results_of(source.parent) or {}).get("collection")
    root = collection.get("root") if isinstance(collection, dict) else None
    files = {one.path.rpartition("#")[0] for one in read_maps(maps)} if maps.is_file() else set()
    packed = {path for path in map(_plain, files) if path.suffix.lower() in PACKED}
    folders = {path.parent for path in packed if path != _plain(str(root))}  # whose other files are searched, too
    if place in packed or not folders.isdisjoint((place, place.parent)):
        raise OptionError(f"--out {out} is among the files that hold the images: give another folder")


def _plain(place: str) -> Path:
    """A path or URI in one of the ways to write it, to compare it."""
    from lostreg.images.stores import is_uri, plain_uri

    return Path(plain_uri(place)) if is_uri(place) else Path(place).resolve()


def _refuse_among_images(out: Path, chosen: "ExportSet", finder: "ImageFinder") -> None:
    """Raise if the export could be taken for images the next time."""
    from lostreg.runs.locate import is_file

    places = (image.source.path for image in chosen.images if image.source)
    paths = [place for place in places if isinstance(place, Path) and is_file(place)]
    refuse_among_images("--out", out, [str(finder.folder)] if finder.folder else [], paths)


def _report(args: argparse.Namespace, kind: Format, chosen: "ExportSet") -> str:
    """Tell what a user should know of; what was exported, in words."""
    from lostreg.exports.names import utf8_name

    if chosen.clipped:
        tell(f"{chosen.clipped} boxes reached beyond their images and were cut")
    unclear = chosen.below(defaults.CLEAR_SCORE)
    if unclear and not kind.has_scores:
        tell(
            f"{unclear} of {chosen.boxes} boxes have a score below {defaults.CLEAR_SCORE}, where there is no clear "
            f"object: --min-score {defaults.CLEAR_SCORE} leaves them out"
        )
    strange = sum(utf8_name(image.name) != image.name for image in chosen.images)
    if strange and kind.names_files:
        tell(
            f"{strange} file names are not UTF-8 and were changed: other tools find these images once their files have "
            "the names in the export"
        )
    parts = [image.name for image in chosen.images if image.is_part]
    if parts and kind.names_files:
        tell(
            f"{len(parts)} images are no files of their own, such as {cut(parts[0])}: other tools do not find them. "
            "--format yolo and voc write each as a file"
        )
    notes = []
    if chosen.unreadable:
        notes.append(f"{len(chosen.unreadable)} unreadable" + ("" if kind.has_unreadable else " left out"))
    if chosen.empty:
        notes.append(f"{chosen.empty} without a box left out")
    note = f" ({', '.join(notes)})" if notes else ""
    return f"exported {len(chosen.images)} images, {chosen.boxes} boxes to {args.out}{note}"


def _label(text: str) -> str:
    if not text.strip() or not text.isprintable():
        raise argparse.ArgumentTypeError(f"expected the name of a class, not {text!r}")
    return text


def _share(text: str) -> float:
    value = as_finite(text)
    if value is None or not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 0 and below 1, not '{text}'")
    return value
