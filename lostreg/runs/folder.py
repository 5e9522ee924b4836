"""The folder of a run: held by one process, tied to its settings, keyed by image, written so that a kill costs nothing.

Three kinds of run use it: `lostreg.runs.discover`, `lostreg.runs.evaluate` and `lostreg.runs.sweep` differ in what they
compute for an image.
"""

import json
import logging
import os
import time
import warnings
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain, tee
from pathlib import Path
from typing import Any, Final, Generic, Protocol, TextIO, TypeVar

import filelock

from lostreg.datasets.base import ImageId
from lostreg.defaults import RESULTS_FILE
from lostreg.errors import LostregWarning, PredictionsError
from lostreg.images.decode import ImageSource
from lostreg.jsonio import count_lines, full_disk_named, keep_lines, remove_left, whole_file, write_json
from lostreg.runs.results import AFRESH, check_same_run, run_facts

_LOG: Final = logging.getLogger(__name__)
_FACTS: Final = ("run", "versions")
_DEVICE: Final = "device"
_EARLIER_DEVICES: Final = "earlier_devices"  # of results whose images were not all computed on one
_WHERE: Final = (_DEVICE, _EARLIER_DEVICES)
_OF_THE_LIST: Final = ("root", "images", "fingerprint")  # settings that may differ where the list may change
_NAMES_THE_LIST: Final = "fingerprint"  # the one of these that tells whether it has
_RESUMED_AFTER: Final = "resumed_after"  # of unfinished results: lines that were there when this list was first met


class Line(Protocol):
    """What a run remembers of one image."""

    @property
    def image_id(self) -> ImageId:
        """Of the image."""

    def to_line(self) -> str:
        """The JSON object, without a line break."""


class Memory(Line, Protocol):
    """A line of the memory of a run."""

    @property
    def error(self) -> str | None:
        """Why the image could not be read; it then has no lines beside this one."""

    @property
    def unavailable(self) -> bool:
        """Whether the image could not be had this time, so that another run tries it again."""


AnyLine = TypeVar("AnyLine", bound=Memory)


def _unavailable(line: Memory) -> bool:
    return line.unavailable


Outcome = TypeVar("Outcome")


class Run(Generic[AnyLine]):
    """A run over a list of images, into a folder that is this process's for as long as the run is entered.

    Its memory is a JSON Lines file with a line an image, appended as images are done: what is missing is the difference
    between the list and the memory. So a run that was stopped goes on, and so does one whose list has grown; lines of
    images that are gone are left out in the end, when the files are put in the list's order. Results are there from
    the start with the settings, so that a run with other settings is noticed.

    What shares a pack is a function of a list alone, which is cut into batches: each of them that has a missing image
    is computed whole, in whatever order. For a run that was merely stopped it is the whole list, so it ends with the
    same bytes as one that was not. For a run whose list has changed it is the list of the images that were missing when
    the change was met, however often the run is stopped then. Images tried again, and those that could not be had the
    last time are, make a new list each time.

    Args:
        out: the folder; made if need be.
        images: ids, in order, each once.
        settings: what makes two runs the same, by section.
        device: where images are computed, as `describe_device` says it; results name it, and a run that goes on
            elsewhere says so.
        parse: makes what is remembered of a line; a `ValueError`, `TypeError` or `KeyError` says what is wrong with it.
        memory: name of the file with a line an image.
        beside: names of files whose lines go with those of the memory: they are written first, and an image that has
            lost one is missing.
        results: name of the file with settings and figures.
        may_change: whether the list may have changed since an earlier run.
        overwrite: whether to start anew instead of going on.
        try_again: whether an image counts as missing in spite of its line; those that could not be had, unless given.
        on_gone: called with each image that has left the memory because it is gone, or will because all begins anew.

    Attributes:
        todo: ids of the images that are missing, in order; known once `resume` has come to its end.
        computed: how many of them have been appended.
    """

    def __init__(
        self,
        out: Path,
        images: Sequence[ImageId],
        settings: dict[str, Any],
        device: str,
        parse: Callable[[bytes], AnyLine],
        *,
        memory: str,
        beside: Sequence[str] = (),
        results: str = RESULTS_FILE,
        may_change: bool = False,
        overwrite: bool = False,
        try_again: Callable[[AnyLine], bool] = _unavailable,
        on_gone: Callable[[ImageId], None] = lambda _: None,
    ) -> None:
        self.out = out
        self.images = images
        self.todo: Sequence[ImageId] = ()
        self.computed = 0
        self._settings = settings
        self._device = device
        self._devices: dict[str, Any] = {}  # where the images were computed, as results have it
        self._marks: dict[str, Any] = {}  # of unfinished results
        self._parse = parse
        self._memory = out / memory
        self._beside = [out / name for name in beside]
        self._results = out / results
        self._may_change = may_change
        self._overwrite = overwrite
        self._try_again = try_again
        self._on_gone = on_gone
        self._written: list[ImageId] = []  # ids of the memory's lines, as they stand in the file
        self._gone_beside = False  # whether a file beside the memory has lines of images that are gone
        self._missing: set[ImageId] = set()
        self._list: Sequence[ImageId] = ()  # whose packs the missing images share
        self._earlier: dict[str, Any] = {}  # results of an earlier run
        self._stack = ExitStack()
        self._files: list[TextIO] = []
        self._lines: dict[Path, int] = {}  # how many each of the files has
        self._start = 0.0

    def __enter__(self) -> "Run[AnyLine]":
        """Hold the folder, and make sure that it belongs to this run.

        Raises:
            PredictionsError: if the folder cannot be written, is in use, or holds a run with other settings.
        """
        with ExitStack() as stack:
            stack.enter_context(full_disk_named(self.out))
            stack.enter_context(locked(self.out))
            for path in (self._memory, self._results, *self._beside):
                remove_left(path)
            if self._overwrite:
                for image_id in _ids_of(self._memory):
                    if image_id is not None:
                        self._on_gone(image_id)
                for path in (self._memory, self._results, *self._beside):
                    path.unlink(missing_ok=True)
            elif self._results.exists() or self._memory.exists():
                self._earlier = check_same_run(self._results, self._settings, _OF_THE_LIST * self._may_change)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def resume(self) -> Iterator[AnyLine]:
        """What an earlier run has done, each line read once; then `todo` is known, and `append` may be called.

        Raises:
            PredictionsError: if a line is malformed, or of an image that is not in the list where that may not change;
                or if none of the earlier run's images is in it, or only some and it is of another folder.
        """
        images, done, known = set(self.images), set[ImageId](), set[ImageId]()
        dropped = set[int]()  # numbers of the lines of images that are tried again
        beside = {path: list(_ids_of(path)) for path in self._beside}
        without = images.difference(images.intersection(*beside.values()))  # a line beside
        for number, line in self._read_memory():
            known.add(line.image_id)
            if (line.error is None and line.image_id in without) or self._try_again(line):
                dropped.add(number)
                continue
            self._written.append(line.image_id)
            if line.image_id in images and line.image_id not in done:
                done.add(line.image_id)
                yield line
        self._check_strangers(known - images, known & images)
        self.todo = [image_id for image_id in self.images if image_id not in done]
        self._missing = set(self.todo)
        _LOG.debug("%s: %d of %d images are known, %d are missing", self.out, len(done), len(images), len(self.todo))
        self._devices = self._name_devices()
        resumed_after = self._choose_list(is_new=bool(dropped) or self._has_changed())
        self._marks = {_RESUMED_AFTER: resumed_after} if resumed_after else {}
        if self._written != list(self.images) or not self._earlier:
            earlier: dict[str, Any] = {name: self._earlier[name] for name in _WHERE if name in self._earlier}
            self._write_unfinished(earlier if self._written else self._devices)
        if dropped:
            _drop_lines(self._memory, dropped)
        # Lines beside those of the memory are kept for images that are gone, too: they may come back.
        written = set(self._written)
        kept = [_cut_ahead(path, ids, written) for path, ids in beside.items()]
        self._gone_beside = not all(ids <= images for ids in kept)
        for path in (*self._beside, self._memory):
            self._lines[path] = count_lines(path)
            self._files.append(self._stack.enter_context(path.open("a", encoding="utf-8", newline="\n")))
        self._start = time.perf_counter()

    def _read_memory(self) -> Iterator[tuple[int, AnyLine]]:
        keep_lines(self._memory)
        if not self._memory.exists():
            return
        with self._memory.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                if not raw.strip():
                    continue
                try:
                    yield number, self._parse(raw)
                except (ValueError, TypeError, KeyError, RecursionError) as error:
                    raise PredictionsError(
                        f"{self._memory} is not of this run (line {number}: {error}): {AFRESH}"
                    ) from error

    def _check_strangers(self, strangers: set[ImageId], known: set[ImageId]) -> None:
        roots = [_root_of(settings) for settings in (self._earlier, self._settings)]
        if not strangers:
            if known and roots[0] not in (None, roots[1]):
                if _are_apart(roots[0], roots[1]):  # cameras name their photos alike
                    raise PredictionsError(
                        f"{self.out} holds a run over the images of {roots[0]}, which are still there: those of the "
                        f"same names in {roots[1]} may be others; {AFRESH}"
                    )
                message = f"the images that were in {roots[0]} are taken for those of the same names in {roots[1]}"
                warnings.warn(message, LostregWarning, stacklevel=4)
            return
        count, example = len(strangers), min(strangers, key=str)
        if not self._may_change:
            raise PredictionsError(
                f"{self._memory} holds {count} images that are none of this run, such as {example!r}: {AFRESH}"
            )
        if not known or roots[0] != roots[1]:  # cameras name their photos alike: those of another folder are others
            raise PredictionsError(
                f"{self.out} holds a run over other images, of {roots[0]}: {count} of them, such as {example!r}, are "
                f"not among the {len(self.images)} of now, of {roots[1]}; {AFRESH}"
            )
        message = f"{count} images of the earlier run are gone: what was found in them is left out in the end"
        warnings.warn(message, LostregWarning, stacklevel=4)

    def _write_unfinished(self, devices: dict[str, Any]) -> None:
        write_json(self._results, {"complete": False, **self._marks, **self._settings, **devices})

    def _name_devices(self) -> dict[str, Any]:
        """The device that computes the missing images and, if others have computed what there is, those before it."""
        device, before = self._earlier.get(_DEVICE), self._earlier.get(_EARLIER_DEVICES)
        before = before if self._written and isinstance(before, list) else []
        if not (self._written and device):
            device = self._device
        elif self.todo and device != self._device:
            message = (
                f"the earlier run computed on {device}, this one goes on with {self._device}: products are rounded "
                "otherwise there, so that a few boxes may not be those of a run on one device"
            )
            warnings.warn(message, LostregWarning, stacklevel=4)
            before, device = [*before, device], self._device
        return {_DEVICE: device, **({_EARLIER_DEVICES: before} if before else {})}

    def _has_changed(self) -> bool:
        """Whether the earlier run was over another list."""
        names = [
            values[_NAMES_THE_LIST]
            for settings in (self._earlier, self._settings)
            for values in settings.values()
            if isinstance(values, dict) and _NAMES_THE_LIST in values
        ]
        return len(set(map(str, names))) > 1

    def _choose_list(self, *, is_new: bool) -> int:
        """Choose the list whose packs the missing images share; how many lines there were when it was first met."""
        recorded = self._earlier.get(_RESUMED_AFTER)
        lines = len(self._written) if is_new else recorded if isinstance(recorded, int) else 0
        earlier = set(self._written[:lines])
        self._list = [image_id for image_id in self.images if image_id not in earlier]
        return lines

    def missing_batches(self, size: int) -> Iterator[Sequence[ImageId]]:
        """The batches of the list that have a missing image, in order and whole: what shares a pack stays together."""
        for start in range(0, len(self._list), size):
            batch = self._list[start : start + size]
            if not self._missing.isdisjoint(batch):
                yield batch

    def is_missing(self, image_id: ImageId) -> bool:
        """Whether an image has not been appended yet: of a batch that is computed whole, some may have been."""
        return image_id in self._missing

    def outcomes(
        self,
        compute: Callable[[Iterable[ImageSource]], Iterator[Outcome]],
        source_of: Callable[[Any], ImageSource],
        batch_size: int,
    ) -> Iterator[tuple[Any, Outcome]]:
        """Compute what is missing.

        Args:
            compute: as `Discoverer.outcomes`.
            source_of: the file of an image, by its id.
            batch_size: images that share packs at most.

        Yields:
            The ids of `todo` with their outcomes.
        """
        if self.todo:
            images, ahead = tee(chain.from_iterable(self.missing_batches(batch_size)))
            for image_id, outcome in zip(images, compute(source_of(image) for image in ahead), strict=True):
                if self.is_missing(image_id):
                    yield image_id, outcome

    def append(self, line: Line, *beside: Line | None) -> None:
        """Remember one more image; see `append_all`."""
        self.append_all([(line, *beside)])

    def append_all(self, entries: Sequence[Sequence[Line | None]]) -> None:
        """Remember more images; a kill leaves at most lines beside too many.

        Args:
            entries: of each image its line of the memory, and those of the files beside it; None where it has none.

        Raises:
            PredictionsError: if one of the files is gone.
        """
        if not entries:
            return
        if not self.computed and _EARLIER_DEVICES in self._devices:  # it goes on elsewhere, from now on
            self._write_unfinished(self._devices)
        memory, *beside = zip(*entries, strict=True)
        for path, file, lines in zip(self._lines, self._files, (*beside, memory), strict=True):
            texts = [line.to_line() + "\n" for line in lines if line is not None]
            if texts:
                file.write("".join(texts))
                file.flush()
                self._lines[path] += len(texts)
            if not path.exists():  # better now than after hours
                raise self._lost(path)
        ids = [line.image_id for line in memory if line is not None]
        self._written += ids
        self._missing.difference_update(ids)
        self.computed += len(ids)

    def put_in_order(self) -> bool:
        """Close the files and put them in the list's order, without images that are gone; whether that was needed.

        Images that are gone leave the memory first, so that whoever comes back is computed again; its order comes last:
        as long as it is another one, a run that was killed here has this still to do.

        Raises:
            PredictionsError: if one of the files has lost lines.
        """
        for file in self._files:
            file.close()
        for path, lines in self._lines.items():
            if count_lines(path) != lines:
                raise self._lost(path)
        needed = self._written != list(self.images) or self._gone_beside
        if not needed:
            return False
        images = set(self.images)
        kept = list(dict.fromkeys(image_id for image_id in self._written if image_id in images))
        if len(kept) < len(self._written):
            _put_in_order(self._memory, kept, last=False)
            for image_id in set(self._written) - images:
                self._on_gone(image_id)
        for path in self._beside:
            _put_in_order(path, self.images, last=True)
        _put_in_order(self._memory, self.images, last=False)
        return True

    def _lost(self, path: Path) -> PredictionsError:
        return PredictionsError(
            f"{path} was deleted or changed while the run went on: expected {self._lines[path]:,} lines, found "
            f"{count_lines(path):,}; run the same command again, which computes what is lost anew"
        )

    def finish(self, figures: dict[str, Any]) -> None:
        """Write the results; the facts of an earlier run stay where it had done everything.

        Args:
            figures: what came out.
        """
        facts: dict[str, Any] = {name: self._earlier[name] for name in _FACTS if name in self._earlier}
        if self.computed or not self._earlier.get("complete"):
            facts = run_facts(self.computed, time.perf_counter() - self._start)
        write_json(self._results, {"complete": True, **figures, **self._settings, **facts, **self._devices})


def _put_in_order(path: Path, images: Iterable[ImageId], *, last: bool) -> None:
    """One line an image, the first or last that it has, in the order of the images; they are found by their places."""
    if not path.exists():
        return
    places: dict[ImageId, int] = {}
    with whole_file(path) as beside, beside.open("wb") as ordered, path.open("rb") as file:
        place = 0
        for raw in file:
            image_id = _image_id_of(raw)
            if image_id is not None and (last or image_id not in places):
                places[image_id] = place
            place += len(raw)
        for image_id in images:
            if image_id in places:
                file.seek(places[image_id])
                ordered.write(file.readline())


def _cut_ahead(path: Path, ids: Sequence[ImageId | None], written: set[ImageId]) -> set[ImageId]:
    """Cut off the lines at a file's end whose images have no line in the memory: a run that was killed is ahead there.

    Args:
        path: of the file.
        ids: of its lines, as `_ids_of` has them.
        written: those of the memory.

    Returns:
        The images of the other lines.
    """
    kept = max((number for number, image_id in enumerate(ids, start=1) if image_id in written), default=0)
    keep_lines(path, kept)
    return {image_id for image_id in ids[:kept] if image_id is not None}


def _drop_lines(path: Path, numbers: Container[int]) -> None:
    """Leave lines out of a file, by their numbers from 1."""
    with whole_file(path) as beside, beside.open("wb") as kept, path.open("rb") as file:
        kept.writelines(raw for number, raw in enumerate(file, start=1) if number not in numbers)


def _ids_of(path: Path) -> Iterator[ImageId | None]:
    """The image of each line of a file, if there is one; None where it is not whole, or tells none."""
    if path.exists():
        with path.open("rb") as file:
            for raw in file:
                yield _image_id_of(raw) if raw.endswith(b"\n") else None


def _are_apart(before: Any, now: Any) -> bool:
    """Whether two places of a collection are there at the same time, on this machine."""
    if not (isinstance(before, str) and isinstance(now, str)):
        return False
    first, second = (place.parent if place.is_file() else place for place in (Path(before), Path(now)))  # of a shard
    return first.exists() and not (second.exists() and first.samefile(second))


def _root_of(settings: dict[str, Any]) -> Any:
    """The folder of a collection, by a run's settings; None where none is told."""
    collection = settings.get("collection")
    return collection.get("root") if isinstance(collection, dict) else None


def _image_id_of(raw: bytes) -> ImageId | None:
    try:
        image_id = json.loads(raw)["image_id"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return image_id if isinstance(image_id, str | int) else None


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold the folder: the lock goes with the process, however it ends."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(out / ".lock", timeout=0)
        lock.acquire()
    except filelock.Timeout as error:
        raise PredictionsError(f"{out} is in use: another run is writing there") from error
    except OSError as error:
        reason = "it is a file" if isinstance(error, FileExistsError) else error.strerror
        raise PredictionsError(f"cannot write to {out}, expected a folder: {reason}") from error
    try:
        if not os.access(out, os.W_OK):
            raise PredictionsError(f"cannot write to {out}: permission denied")
        yield
    finally:
        lock.release()
