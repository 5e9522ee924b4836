"""A run whose folder is in a store: written on this machine, and copied there when it ends, however it ends."""

import hashlib
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lostreg.datasets.base import cache_folder
from lostreg.defaults import RESULTS_FILE
from lostreg.errors import LostregWarning, OptionError, PredictionsError
from lostreg.images.stores import check_uri, fetch_folder, store_folder
from lostreg.runs.folder import locked


@contextmanager
def folder_of(out: Path | str) -> Iterator[Path]:
    """The folder on this machine in which a run is written.

    What a store has of the run is fetched first, so that it goes on from any machine; the store cannot keep two of them
    from going on at once. A run that was killed is left on this machine, and goes on from there.

    Args:
        out: a folder of this machine, or the URI of a store's.

    Raises:
        OptionError: if the store cannot be read.
        PredictionsError: if it cannot be written to, and what was computed stays on this machine; or if another run of
            this machine is writing there.
    """
    if isinstance(out, Path):
        yield out
        return
    check_uri(out)
    caches = cache_folder()
    if caches is None:
        raise PredictionsError(f"no folder on this machine to write the run for {out} in: set XDG_CACHE_HOME")
    held = caches / "runs" / hashlib.sha256(out.encode(errors="surrogateescape")).hexdigest()[:16]
    with locked(held):  # a second run into the same place must not take the first one's files away
        folder, part = held / "run", held / "part"
        if (folder / RESULTS_FILE).exists():
            message = f"going on with what a run into {out} has left on this machine, in {folder}"
            warnings.warn(message, LostregWarning, stacklevel=3)
        else:
            for left in (part, folder):  # what was fetched in part would take the place of the whole run
                shutil.rmtree(left, ignore_errors=True)
            part.mkdir()
            fetch_folder(out, part)
            part.rename(folder)
        try:
            yield folder
        finally:
            try:
                store_folder(folder, out)
            except OptionError as error:
                message = f"{error}; what was computed is in {folder}: the same command goes on"
                raise PredictionsError(message) from error
            shutil.rmtree(held, ignore_errors=True)
