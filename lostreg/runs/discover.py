"""The run that finds the objects of a collection: appended to files that survive a kill.

Nothing grows in memory with the number of images but their names.
"""

import csv
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final, Literal

from lostreg.datasets.folder import Collection
from lostreg.defaults import MAPS_FILE, PREDICTIONS_FILE, RESULTS_FILE
from lostreg.errors import ImageError, PredictionsError
from lostreg.images.masks import save_mask_png
from lostreg.inference.discoverer import Discoverer
from lostreg.inference.discovery import Discovery
from lostreg.jsonio import write_json
from lostreg.runs.folder import check_same_run, is_complete, locked, read_results, run_facts
from lostreg.runs.maps import keep_maps, maps_of
from lostreg.runs.predictions import Prediction, RunFiles, from_discovery, from_error, recover_predictions

FAILED_FILE: Final = "failed.csv"
MASKS_FOLDER: Final = "masks"
_LONGEST_NAME: Final = 240  # bytes, before the suffix


@dataclass
class Summary:
    """Counts of a run over its images so far, those of an earlier run that it continues among them.

    Attributes:
        images: all images.
        clear: images with a clear main object.
        unclear: images whose main object has a lower score than was asked for.
        unreadable: images that could not be read.
        boxes: boxes in all.
        known: images that an earlier run had done.
        seconds: what the others took.
    """

    images: int = 0
    clear: int = 0
    unclear: int = 0
    unreadable: int = 0
    boxes: int = 0
    known: int = 0
    seconds: float = 0.0

    def add(self, prediction: Prediction, min_score: float) -> None:
        """Count one image."""
        self.images += 1
        self.boxes += len(prediction.boxes)
        if prediction.error is not None:
            self.unreadable += 1
        elif prediction.scores and prediction.scores[0] >= min_score:
            self.clear += 1
        else:
            self.unclear += 1


def discover_collection(
    collection: Collection,
    discoverer: Discoverer,
    out: Path,
    *,
    overwrite: bool = False,
    strict: bool = False,
    masks: bool = False,
    mask_pictures: bool = False,
    on_progress: Callable[[Summary], None] | None = None,
) -> Summary:
    """Find the objects of every image of a collection, going on where an earlier run into the same folder stopped.

    Args:
        collection: the images.
        discoverer: backbone and options.
        out: folder for ``predictions.jsonl``, ``maps.jsonl``, ``failed.csv`` and ``results.json``; made if need be.
        overwrite: whether to start anew instead of going on.
        strict: whether to stop at the first image that cannot be read, instead of listing it.
        masks: whether predictions hold masks.
        mask_pictures: whether each image's masks are also written to ``masks``, as PNG.
        on_progress: called after each image.

    Returns:
        Counts over all images.

    Raises:
        PredictionsError: if the folder cannot be written, is in use, or holds a run with other settings or images.
        ImageError: with ``strict``, at the first image that cannot be read; what came before it is kept.
    """
    settings = {
        "collection": {
            "root": str(collection.root.absolute()),
            "images": len(collection),
            "fingerprint": collection.fingerprint(),
        },
        "options": {**discoverer.options.record(), "masks": masks, "mask_pictures": mask_pictures},
    }
    with locked(out):
        _check_folder(out, settings, overwrite=overwrite)
        run = _Run(collection, discoverer, out)
        run.take_over(strict=strict)
        finished = run.summary.known == len(collection) and is_complete(out / RESULTS_FILE)
        if not finished:
            write_json(out / RESULTS_FILE, {"complete": False, **settings})
        for _ in run.go_on(strict=strict, masks=masks, mask_pictures=mask_pictures):
            if on_progress:
                on_progress(run.summary)
        if finished:  # its speed and versions stay
            results = {**read_results(out / RESULTS_FILE), **_counts(run.summary, discoverer)}
        else:
            seconds, device = run.summary.seconds, discoverer.backbone.device
            facts = run_facts(run.summary.images - run.summary.known, seconds, device)
            results = {"complete": True, **_counts(run.summary, discoverer), **settings, **facts}
        write_json(out / RESULTS_FILE, results)
    return run.summary


class _Run:
    """A run into a folder that is its own."""

    def __init__(self, collection: Collection, discoverer: Discoverer, out: Path) -> None:
        self.collection = collection
        self.discoverer = discoverer
        self.out = out
        self.summary = Summary()
        self._min_score = discoverer.options.min_score

    def take_over(self, *, strict: bool) -> None:
        """Count what an earlier run has done, one line after the other, and list what failed anew."""
        path = self.out / PREDICTIONS_FILE
        for prediction in recover_predictions(path):
            place = self.summary.images
            if place >= len(self.collection) or prediction.image_id != self.collection.names[place]:
                raise PredictionsError(
                    f"{path} does not follow the order of the images: it is not of this run; "
                    "use --overwrite or another --out"
                )
            if strict and prediction.error is not None:
                raise ImageError(prediction.error)
            self.summary.add(prediction, self._min_score)
        self.summary.known = self.summary.images
        with _FailedFile(self.out, "w") as failed:
            failed.begin()
            for prediction in recover_predictions(path):
                failed.add(prediction)
        keep_maps(self.out / MAPS_FILE, (one.image_id for one in recover_predictions(path)))

    def go_on(self, *, strict: bool, masks: bool, mask_pictures: bool) -> Iterator[None]:
        """Compute what is missing, image by image."""
        names = self.collection.names[self.summary.known :]
        start = time.perf_counter()
        with RunFiles(self.out) as files, _FailedFile(self.out, "a") as failed:
            for name, outcome in zip(names, self._outcomes(), strict=True):
                path = self.collection.path(name)
                if isinstance(outcome, Discovery):
                    prediction, maps = from_discovery(name, outcome, masks=masks), maps_of(name, path, outcome)
                    if mask_pictures:
                        save_mask_png(mask_path(self.out, name), outcome)
                elif strict:
                    raise outcome
                else:
                    prediction, maps = from_error(name, outcome, path), None
                files.add(prediction, maps)
                failed.add(prediction)
                self.summary.add(prediction, self._min_score)
                self.summary.seconds = time.perf_counter() - start
                yield

    def _outcomes(self) -> Iterator[Discovery | ImageError]:
        if self.summary.known == len(self.collection):
            return iter(())
        paths = (self.collection.path(name) for name in self.collection.names)
        return self.discoverer.outcomes(paths, skip=self.summary.known)


class _FailedFile:
    """The table of the images that could not be read; names that are no text keep their bytes."""

    def __init__(self, out: Path, mode: Literal["w", "a"]) -> None:
        path = out / FAILED_FILE
        self._file = path.open(mode, encoding="utf-8", errors="surrogateescape", newline="")
        self._table = csv.writer(self._file, lineterminator="\n")

    def __enter__(self) -> "_FailedFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def begin(self) -> None:
        """The names of the columns."""
        self._table.writerow(["image_id", "reason"])

    def add(self, prediction: Prediction) -> None:
        """One image, if it could not be read."""
        if prediction.error is not None:
            self._table.writerow([prediction.image_id, prediction.error])
            self._file.flush()


def mask_path(out: Path, name: str) -> Path:
    """Where the picture of an image's masks goes: beneath the run's folder, wherever the image lies."""
    elsewhere = {"/": "_root", "..": "_up"}
    *folders, last = [elsewhere.get(part, part) for part in PurePosixPath(name).parts]
    if len(os.fsencode(last)) > _LONGEST_NAME:  # file systems take 255 bytes
        digest = hashlib.sha256(os.fsencode(last)).hexdigest()[:12]
        last = os.fsdecode(os.fsencode(last)[: _LONGEST_NAME - 13]) + "-" + digest
    return out.joinpath(MASKS_FOLDER, *folders, last + ".png")


def _check_folder(out: Path, settings: dict[str, Any], *, overwrite: bool) -> None:
    """Make sure that the folder belongs to this run; the images may lie elsewhere by now."""
    files = [out / name for name in (PREDICTIONS_FILE, RESULTS_FILE, MAPS_FILE)]
    if overwrite:
        for file in files:
            file.unlink(missing_ok=True)
    elif any(file.exists() for file in files[:2]):
        earlier = read_results(out / RESULTS_FILE).get("collection")
        ours = settings["collection"]
        if isinstance(earlier, dict) and earlier.get("fingerprint") != ours["fingerprint"]:
            raise PredictionsError(
                f"{out} holds a run over other photos, {earlier.get('images')} then and {ours['images']} now: some "
                "were added, removed or renamed; give another --out, or --overwrite to start anew"
            )
        check_same_run(out / RESULTS_FILE, settings, apart=("root",))


def _counts(summary: Summary, discoverer: Discoverer) -> dict[str, Any]:
    return {
        "images": summary.images,
        "clear": summary.clear,
        "unclear": summary.unclear,
        "clear_from": discoverer.options.min_score,
        "unreadable": summary.unreadable,
        "boxes": summary.boxes,
    }
