"""A run whose folder is in a store: written on this machine, and copied there when it ends, however it ends."""

import hashlib
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lostreg.defaults import RESULTS_FILE
from lostreg.errors import LostregWarning, OptionError, PredictionsError
from lostreg.images.stores import check_uri, fetch_folder, store_folder


@contextmanager
def folder_of(out: Path | str) -> Iterator[Path]:
    """The folder on this machine in which a run is written.

    What a store has of the run is fetched first, so that it goes on from any machine; the store cannot keep two of them
    from going on at once. A run that was killed is left on this machine, and goes on from there.

    Args:
        out: a folder of this machine, or the URI of a store's.

    Raises:
        OptionError: if the store cannot be read.
        PredictionsError: if it cannot be written to: what was computed stays on this machine.
    """
    if isinstance(out, Path):
        yield out
        return
    check_uri(out)
    folder = _left_by_runs() / hashlib.sha256(out.encode(errors="surrogateescape")).hexdigest()[:16]
    if (folder / RESULTS_FILE).exists():
        message = f"going on with what a run into {out} has left on this machine, in {folder}"
        warnings.warn(message, LostregWarning, stacklevel=3)
    else:
        part = folder.with_suffix(".part")  # a run that was fetched in part would take the place of the whole one
        for left in (part, folder):
            shutil.rmtree(left, ignore_errors=True)
        part.mkdir(parents=True)
        fetch_folder(out, part)
        part.rename(folder)
    try:
        yield folder
    finally:
        try:
            store_folder(folder, out)
        except OptionError as error:
            raise PredictionsError(
                f"{error}; what was computed is in {folder}, and the same command goes on"
            ) from error
        shutil.rmtree(folder, ignore_errors=True)


def _left_by_runs() -> Path:
    configured = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (configured if configured.is_absolute() else Path.home() / ".cache") / "lostreg" / "runs"
