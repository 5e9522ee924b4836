"""Files and folders that are there whole or not at all."""

import errno
import json
import os
import posixpath
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Final

from lostreg.checks import cut
from lostreg.defaults import MAPS_FILE, PREDICTIONS_FILE, RESULTS_FILE
from lostreg.errors import OptionError, PredictionsError
from lostreg.images.stores import check_uri, join_uri, kind_at, list_files, parent_uri
from lostreg.jsonio import as_line, held, part_of, remove_left, write_whole
from lostreg.runs.locate import is_file

MARK: Final = "lostreg-export.json"
"""Written into every exported folder: only a folder that has it is ever replaced."""

PART: Final = "part-{:05}.parquet"
"""What the parts of an export are called, by their number."""

_PART: Final = re.compile(r"part-\d{5,}\.parquet")
_OF_A_RUN: Final = (PREDICTIONS_FILE, MAPS_FILE, RESULTS_FILE)

# At the top of an export; Ultralytics adds its caches.
_WRITTEN: Final = (MARK, "images", "labels", "data.yaml", "Annotations", "ImageSets", "JPEGImages")


def check_file(out: Path, suffix: str, *, overwrite: bool) -> None:
    """Raise `OptionError` unless the file is of the format, and new or to be replaced."""
    if out.suffix.lower() != suffix or out.is_dir():
        found = " is a folder" if out.is_dir() else ""
        raise OptionError(f"--out {out}{found}: expected a file ending in {suffix} for this format")
    if out.exists() and not overwrite:
        raise OptionError(f"--out {out} is there already: give another file, or --overwrite")
    _check_outside(out)


def check_stored(out: str, suffixes: Sequence[str], *, has_parts: bool, overwrite: bool) -> list[str]:
    """Raise `OptionError` unless an export in a store is of the format, and new or to be replaced.

    Args:
        out: URI of the first file, or of a folder for parts.
        suffixes: of the files that are written, that of ``out`` first.
        has_parts: whether the format may be a folder of parts.
        overwrite: whether an earlier export is replaced.

    Returns:
        URIs of the parts of an earlier export.
    """
    check_uri(out)
    name = parent_uri(out)[1]
    path, mark, query = out.partition("?")
    stem, suffix = posixpath.splitext(path.rstrip("/"))
    if name in _OF_A_RUN:
        raise OptionError(f"--out {out} is called like a file of a run: give another one")
    if has_parts and not suffix:
        return _earlier_parts(out, overwrite=overwrite)
    if suffix.lower() != suffixes[0]:
        folder = " or a folder without an ending" if has_parts else ""
        raise OptionError(f"--out {out}: expected a file ending in {suffixes[0]}{folder} for this format")
    for file in (out, *(f"{stem}{other}{mark}{query}" for other in suffixes[1:])):
        kind = kind_at(file)
        if kind == "folder":
            raise OptionError(f"--out {file} is a folder: expected a file for this format")
        if kind and not overwrite:
            raise OptionError(f"--out {file} is there already: give another file, or --overwrite")
    return []


def _earlier_parts(out: str, *, overwrite: bool) -> list[str]:
    names = list_files(out) if kind_at(out) else []
    if names is None:
        raise OptionError(f"--out {out} is a file: expected a folder for the parts")
    foreign = [name for name in names if not _PART.fullmatch(name)]
    if foreign:
        raise OptionError(f"--out {out} holds {min(foreign)}, which no export writes: give another folder")
    if names and not overwrite:
        raise OptionError(f"--out {out} holds an earlier export: give another folder, or --overwrite")
    return [join_uri(out, name) for name in names]


def check_folder(out: Path, *, overwrite: bool) -> None:
    """Raise `OptionError` unless the folder may be written: it is new, empty, or nothing but an earlier export."""
    if out.suffix.lower() in (".json", ".jsonl", ".csv", ".parquet", ".xml", ".yaml", ".yml", ".txt", ".zip"):
        raise OptionError(f"--out {out} is named like a file: expected a folder for this format")
    if out.exists() and not out.is_dir():
        raise OptionError(f"--out {out} is a file: expected a folder for this format")
    if out.is_dir() and any(out.iterdir()):
        _check_earlier(out, overwrite=overwrite)
    _check_outside(out)
    parent = next(place for place in out.absolute().parents if place.exists())
    if not parent.is_dir():
        raise OptionError(f"--out {out}: {parent} is a file, expected a folder")
    if not os.access(parent, os.W_OK):
        raise OptionError(f"--out {out} cannot be written: permission denied")


def _check_earlier(out: Path, *, overwrite: bool) -> None:
    if not (out / MARK).is_file():
        raise OptionError(f"--out {out} holds other files, which an export would replace: give another folder")
    if not overwrite:
        raise OptionError(f"--out {out} holds an earlier export: give another folder, or --overwrite")
    foreign = [path.name for path in out.iterdir() if path.name not in _WRITTEN and path.suffix != ".cache"]
    if foreign:
        raise OptionError(
            f"--out {out} holds {min(foreign)}, which no export writes and --overwrite would delete: move it away, or "
            "give another folder"
        )


def _check_outside(out: Path) -> None:
    """Raise `OptionError` where the next export of a folder would delete this one."""
    earlier = next((parent for parent in out.resolve().parents if is_file(parent / MARK)), None)
    if earlier:
        raise OptionError(f"--out {out} lies in an earlier export, {earlier}: give another place")


def check_sources(out: Path, sources: Iterable[Path]) -> None:
    """Raise `OptionError` if what is exported lies in the folder that an export would replace.

    Args:
        out: the folder.
        sources: files, there or not.
    """
    place = out.resolve()
    inside = next((path for path in sources if _leads_below(path, place)), None)
    if inside:
        raise OptionError(f"--out {out} holds {cut(str(inside), 200)}, which is exported: give another folder")


def _leads_below(path: Path, folder: Path) -> bool:
    """Whether a file, or the link to it, lies below a folder."""
    try:
        return any(place.resolve().is_relative_to(folder) for place in (path.parent, path))
    except (OSError, ValueError):  # no file has such a name
        return False


def write_file(path: Path, content: str) -> None:
    """Write a text file, whole, in a folder that is made if need be.

    Raises:
        PredictionsError: if it cannot be written; nothing of it is left.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)
    except OSError as error:
        raise PredictionsError(f"cannot write {path}: {error.strerror}") from error


def put(path: Path, content: str) -> None:
    """Write a text file into a folder of `whole_folder`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8", newline="")


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A new folder to fill; at the end it takes the place of ``out``, after an error nothing of it is left.

    A kill leaves a folder ``NAME.part-PID``, which the next export to the same place removes.

    Raises:
        PredictionsError: if something cannot be written.
    """
    place = out.resolve()
    beside = part_of(place)
    missing = [parent for parent in place.parents if not parent.exists()]
    try:
        remove_left(place, _remove)
        with held(beside, partial(beside.mkdir, parents=True)) as is_there:
            (beside / MARK).touch()  # a kill leaves a folder that is known as ours
            yield beside
            if not is_there():
                raise FileNotFoundError(errno.ENOENT, "it was deleted before it was done", str(beside))
            _replace(place, beside)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise PredictionsError(f"cannot make the export {out}: {error.strerror or error}{where}") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        for parent in () if place.exists() else missing:
            with suppress(OSError):
                parent.rmdir()


def _replace(place: Path, new: Path) -> None:
    old = new.with_name(new.name + "-old")
    if place.exists():
        place.rename(old)
    new.rename(place)
    with suppress(OSError):
        _remove(old)


def _remove(folder: Path) -> None:
    """Delete an export, the file that tells it for one last: of another folder nothing is deleted."""
    if not is_file(folder / MARK) and any(folder.iterdir()):
        return
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != MARK:
            path.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def as_text(content: Any) -> str:
    """JSON of few lines: one for each member of the lists that an object has."""
    if isinstance(content, list):
        return _lines(content) + "\n"
    fields = [
        f"{json.dumps(key)}: {_lines(value) if isinstance(value, list) else as_line(value)}"
        for key, value in content.items()
    ]
    return "{\n" + ",\n".join(fields) + "\n}\n"


def _lines(values: list[Any]) -> str:
    return "[\n" + ",\n".join(as_line(value) for value in values) + "\n]" if values else "[]"
