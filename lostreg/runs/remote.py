"""Runs and exports whose place is in a store: written and read on this machine, and copied there and from there."""

import hashlib
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from lostreg.datasets.base import cache_folder
from lostreg.defaults import MAPS_FILE, PREDICTIONS_FILE, RESULTS_FILE
from lostreg.errors import LostregError, LostregWarning, OptionError, PredictionsError
from lostreg.images.stores import (
    check_uri,
    check_writable,
    delete_file,
    fetch_file,
    fetch_folder,
    files_below,
    join_uri,
    kind_at,
    parent_uri,
    store_folder,
)
from lostreg.runs.folder import locked

_RUN_FILES: Final = (PREDICTIONS_FILE, MAPS_FILE, RESULTS_FILE)  # that reports and exports read
_PREFIX: Final = "lostreg-"  # of temporary folders


@contextmanager
def folder_of(out: Path | str) -> Iterator[Path]:
    """The folder on this machine in which a run is written.

    What a store has of the run is fetched first, so that it goes on from any machine; the store cannot keep two of them
    from going on at once. What a run has deleted when it ends well is deleted there, too. A run that was killed is left
    on this machine, and goes on from there.

    Args:
        out: a folder of this machine, or the URI of a store's.

    Raises:
        OptionError: if the store cannot be read, or written to when the run begins.
        PredictionsError: if it cannot be written to at its end, and what was computed stays on this machine; or if
            another run of this machine is writing there.
    """
    if isinstance(out, Path):
        yield out
        return
    check_uri(out)
    caches = cache_folder()
    if caches is None:
        raise PredictionsError(f"no folder on this machine to write the run for {out} in: set XDG_CACHE_HOME")
    name = join_uri(out, "")  # with and without a / at its end
    held = caches / "runs" / hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()[:16]
    with locked(held):  # a second run into the same place must not take the first one's files away
        folder, part = held / "run", held / "part"
        if folder.is_dir() and any(folder.iterdir()):
            message = f"going on with what a run into {out} has left on this machine, in {folder}"
            warnings.warn(message, LostregWarning, stacklevel=3)
        else:
            for left in (part, folder):  # what was fetched in part would take the place of the whole run
                shutil.rmtree(left, ignore_errors=True)
            part.mkdir()
            try:
                fetch_folder(out, part)
                check_writable(out)
            except BaseException:
                shutil.rmtree(held, ignore_errors=True)
                raise
            part.rename(folder)
        before = files_below(folder)
        try:
            with _called({folder: out}):
                yield folder
            gone = [join_uri(out, name) for name in before if not (folder / name).exists()]
        finally:
            try:
                store_folder(folder, out)
            except OptionError as error:
                message = f"{error}; what was computed is in {folder}: the same command goes on"
                raise PredictionsError(message) from error
            shutil.rmtree(held, ignore_errors=True)
        for uri in gone:
            if kind_at(uri) == "file":  # a store need not have what a run that was killed has left
                delete_file(uri)


@contextmanager
def fetched(place: Path | str, beside: Iterable[str] = _RUN_FILES) -> Iterator[Path]:
    """A predictions file, or the folder of a run, on this machine: of a store's a copy that goes in the end.

    Args:
        place: a file or folder of this machine, or the URI of a store's.
        beside: names of the files that are fetched of a folder, or with a file, where they are there.

    Raises:
        OptionError: if the store cannot be read, or there is nothing.
    """
    if isinstance(place, Path):
        yield place
        return
    check_uri(place)
    kind = kind_at(place)
    if kind is None:
        raise OptionError(f"{place}: no such file or folder in that store")
    with TemporaryDirectory(prefix=_PREFIX) as held:
        here = Path(held)
        if kind == "file":
            folder, name = parent_uri(place)
            copy = here / name
            fetch_file(place, copy)
        else:
            name = Path(os.path.normpath(place.partition("?")[0])).name  # which pages tell
            folder, copy = place, here / (name or "run")
            copy.mkdir()
            here = copy
        for other in beside:
            file = join_uri(folder, other)
            if not (here / other).exists() and kind_at(file) == "file":
                fetch_file(file, here / other)
        with _called({copy: place, here: folder}):
            yield copy


@contextmanager
def stored(out: Path | str) -> Iterator[Path]:
    """Where a file or folder is written: itself, or for a store a place on this machine, copied there unless it fails.

    What is written beside it, under other names, is copied, too.

    Args:
        out: a file or folder of this machine, or the URI of a store's.

    Raises:
        OptionError: if the store cannot be written to.
    """
    if isinstance(out, Path):
        yield out
        return
    check_uri(out)
    uri, name = parent_uri(out)
    with TemporaryDirectory(prefix=_PREFIX) as held:
        folder = Path(held)
        with _called({folder / name: out, folder: uri}):
            yield folder / name
        store_folder(folder, uri)


def below(place: Path | str, name: str) -> Path | str:
    """What lies in a folder of this machine or a store, by its name."""
    return place / name if isinstance(place, Path) else join_uri(place, name)


@contextmanager
def _called(places: dict[Path, str]) -> Iterator[None]:
    """Errors name the URIs that places on this machine stand for, as these places are gone when they are read."""
    try:
        yield
    except LostregError as error:
        message = str(error)
        for path, uri in places.items():
            message = message.replace(str(path), uri.partition("?")[0])
        error.args = (message,)
        raise
