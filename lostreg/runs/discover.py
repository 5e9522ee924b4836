"""The run that finds the objects of a collection of photos.

Nothing grows in memory with the number of images but their names.
"""

import csv
import hashlib
import io
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from lostreg.datasets.folder import Collection
from lostreg.defaults import MAPS_FILE, PREDICTIONS_FILE
from lostreg.errors import ImageError, PredictionsError
from lostreg.images.masks import write_picture
from lostreg.inference.discoverer import Discoverer
from lostreg.jsonio import count_lines, whole_file
from lostreg.progress import OnProgress, Progress
from lostreg.runs.entries import Asked, Entry, Workers, make_entry, missing_entries, until_error
from lostreg.runs.folder import Run
from lostreg.runs.locate import is_file
from lostreg.runs.maps import move_maps
from lostreg.runs.predictions import Prediction, parse_prediction, stream_predictions
from lostreg.runs.results import describe_device
from lostreg.text import spreadsheet_text

FAILED_FILE: Final = "failed.csv"
MASKS_FOLDER: Final = "masks"
_LONGEST_NAME: Final = 240  # bytes, before the suffix
_ELSEWHERE: Final = {"": "_root", ".": "_here", "..": "_up"}  # folders of masks of images that lie elsewhere
_TAKEN: Final = re.compile(r"^(_+(?:root|here|up))$")
_PICTURE: Final = re.compile(r"(\.png_*)$", re.IGNORECASE)


@dataclass
class Summary:
    """Counts of a run over its images so far, those of an earlier run that it continues among them.

    Attributes:
        images: all images.
        clear: images with a clear main object.
        unclear: images whose main object has a lower score than was asked for.
        unreadable: images that could not be read, for whatever reason.
        unavailable: of these, images that could not be had this time, and are tried again by the next run.
        boxes: boxes in all.
        known: images that an earlier run had done.
    """

    images: int = 0
    clear: int = 0
    unclear: int = 0
    unreadable: int = 0
    unavailable: int = 0
    boxes: int = 0
    known: int = 0

    def add(self, prediction: Prediction, min_score: float) -> None:
        """Count one image."""
        self.images += 1
        self.boxes += len(prediction.boxes)
        if prediction.error is not None:
            self.unreadable += 1
            self.unavailable += prediction.unavailable
        elif prediction.scores and prediction.scores[0] >= min_score:
            self.clear += 1
        else:
            self.unclear += 1

    def figures(self, min_score: float) -> dict[str, Any]:
        """As results record them."""
        return {
            "images": self.images,
            "clear": self.clear,
            "unclear": self.unclear,
            "clear_from": min_score,
            "unreadable": self.unreadable,
            "unavailable": self.unavailable,
            "boxes": self.boxes,
        }


def discover_collection(
    collection: Collection,
    discoverer: Discoverer,
    out: Path,
    *,
    overwrite: bool = False,
    retry_failed: bool = False,
    strict: bool = False,
    masks: bool = False,
    mask_pictures: bool = False,
    workers: Workers | None = None,
    on_progress: OnProgress = lambda _: None,
) -> Summary:
    """Find the objects of every image of a collection, going on where an earlier run into the same folder stopped.

    Images that were added since are computed; what was found in images that are gone is left out in the end. Images
    that could not be had, or whose pictures of masks are missing, are tried again. A folder that has been moved is
    known by the images' names, and ``maps.jsonl`` then says where they are now.

    Args:
        collection: the images.
        discoverer: backbone and options.
        out: folder for ``predictions.jsonl``, ``maps.jsonl``, ``failed.csv`` and ``results.json``; made if need be.
        overwrite: whether to start anew instead of going on.
        retry_failed: whether images that could not be read are tried again.
        strict: whether to stop at the first image that cannot be read, instead of listing it.
        masks: whether predictions hold masks.
        mask_pictures: whether each image's masks are also written to ``masks``, as PNG.
        workers: who computes, if not this process: see `lostreg.runs.cluster`.
        on_progress: called after each image.

    Returns:
        Counts over all images.

    Raises:
        PredictionsError: if the folder cannot be written, is in use, or holds a run with other settings, or over none
            of these images; or if what was written was deleted meanwhile.
        ImageError: with ``strict``, at the first image that cannot be read; what came before it is kept.
    """
    settings = {
        "collection": {
            "root": collection.place,
            "images": len(collection),
            "fingerprint": collection.fingerprint(),
        },
        "options": {**discoverer.options.record(), "masks": masks, "mask_pictures": mask_pictures},
    }
    min_score = discoverer.options.min_score
    summary = Summary()

    def try_again(prediction: Prediction) -> bool:
        if prediction.error is not None:
            return retry_failed or prediction.unavailable
        return mask_pictures and not is_file(mask_path(out, str(prediction.image_id)))

    with Run(
        out,
        collection.names,
        settings,
        workers.device if workers else describe_device(discoverer.backbone.device, discoverer.backbone.dtype),
        parse_prediction,
        memory=PREDICTIONS_FILE,
        beside=[MAPS_FILE],
        may_change=True,
        overwrite=overwrite,
        try_again=try_again,
        on_gone=lambda image_id: _remove_mask(out, str(image_id)),
    ) as run:
        failed_lines = _write_failed(out, _counted(run.resume(), summary, min_score, strict=strict))
        summary.known = summary.images
        drawn: list[str] = []

        def ask(name: str) -> Asked:
            source = collection.source(name)
            return Asked(name, source, source)

        make = partial(make_entry, masks=masks, mask_pictures=mask_pictures)
        batch_size = discoverer.options.batch_size
        computed = missing_entries(run, ask, make, compute=discoverer.outcomes, batch_size=batch_size, workers=workers)
        for entries in until_error(computed) if strict else computed:
            drawn += _draw(out, entries)
            run.append_all([(entry.line, entry.maps) for entry in entries])
            for entry in entries:
                failed_lines += _append_failed(out, entry.prediction)
                summary.add(entry.prediction, min_score)
                on_progress(Progress(summary.images, len(collection), known=summary.known, error=entry.error))
        if run.put_in_order() or count_lines(out / FAILED_FILE) != failed_lines:
            _write_failed(out, stream_predictions(out / PREDICTIONS_FILE))
        if summary.known:
            move_maps(out / MAPS_FILE, collection.source)
        _check_drawn(out, drawn)
        run.finish(summary.figures(min_score))
    return summary


def _counted(
    predictions: Iterable[Prediction], summary: Summary, min_score: float, *, strict: bool
) -> Iterator[Prediction]:
    """What an earlier run has done, counted as it goes by."""
    for prediction in predictions:
        if strict and prediction.error is not None:
            raise ImageError(prediction.error)
        summary.add(prediction, min_score)
        yield prediction


def _draw(out: Path, entries: Iterable[Entry]) -> list[str]:
    """Write the pictures of masks that entries bring; their images."""
    drawn = {str(entry.line.image_id): entry.picture for entry in entries if entry.picture is not None}
    for name, picture in drawn.items():
        write_picture(mask_path(out, name), picture)
    return list(drawn)


def _write_failed(out: Path, predictions: Iterable[Prediction]) -> int:
    """The table of the images that could not be read, written whole, of a run's predictions; how many lines it has."""
    with whole_file(out / FAILED_FILE) as beside:
        with beside.open("wb") as file:
            file.write(b"image_id,reason,cause\n")
            file.writelines(_failed_row(prediction) for prediction in predictions if prediction.error is not None)
        return count_lines(beside)


def _append_failed(out: Path, prediction: Prediction) -> int:
    """Add a row to the table for an image that could not be read; how many lines it takes."""
    if prediction.error is None:
        return 0
    row = _failed_row(prediction)
    with (out / FAILED_FILE).open("ab") as file:
        file.write(row)
    return row.count(b"\n")


def _failed_row(prediction: Prediction) -> bytes:
    """A row of the table, without formulas; names that are no text keep their bytes."""
    row = io.StringIO()
    cause = "unavailable" if prediction.unavailable else "unreadable"
    cells = (spreadsheet_text(str(prediction.image_id)), spreadsheet_text(prediction.error or ""), cause)
    csv.writer(row, lineterminator="\n").writerow(cells)
    try:
        return row.getvalue().encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # no file name: edited by hand
        return row.getvalue().encode("utf-8", "backslashreplace")


def mask_path(out: Path, name: str) -> Path:
    """Where the picture of an image's masks goes: beneath the run's folder, wherever the image lies; no two share one.

    Folders of such names get an underscore more, and so do folders that are named like a picture.
    """
    *folders, last = name.split("/")  # stores tell a//b.jpg and a/b.jpg apart
    folders = [_ELSEWHERE.get(part) or _TAKEN.sub(r"_\1", _PICTURE.sub(r"\1_", part)) for part in folders]
    return out.joinpath(MASKS_FOLDER, *map(_cut, folders), _cut(last) + ".png")


def _cut(part: str) -> str:
    """A name that file systems take, which is 255 bytes; cut ones are of just one length, which no other one has."""
    try:
        name = os.fsencode(part)
    except UnicodeEncodeError:  # edited by hand: no file has such a name
        return part
    if len(name) < _LONGEST_NAME:
        return part
    return os.fsdecode(name[: _LONGEST_NAME - 13]) + "-" + hashlib.sha256(name).hexdigest()[:12]


def _remove_mask(out: Path, name: str) -> None:
    """Remove the picture of an image's masks, and folders that are empty then; nothing else in them is ours."""
    picture = mask_path(out, name)
    with suppress(OSError, ValueError):  # no file has such a name, or a folder holds more
        picture.unlink(missing_ok=True)
        for folder in picture.parents:
            folder.rmdir()
            if folder == out / MASKS_FOLDER:
                break


def _check_drawn(out: Path, names: Iterable[str]) -> None:
    missing = [name for name in names if not is_file(mask_path(out, name))]
    if missing:
        raise PredictionsError(
            f"{len(missing)} pictures of masks were deleted while the run went on, such as "
            f"{mask_path(out, missing[0])}: run the same command again, which makes them anew"
        )
