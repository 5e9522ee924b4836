"""Files and folders that are there whole or not at all."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from lostreg.errors import OptionError, PredictionsError
from lostreg.lines import as_line

MARK: Final = "lostreg-export.json"
"""Written into every exported folder: only a folder that has it is ever replaced."""


def check_file(out: Path, suffix: str, *, overwrite: bool) -> None:
    """Raise `OptionError` unless the file may be written."""
    if out.suffix.lower() != suffix or out.is_dir():
        raise OptionError(f"--out {out}: expected a file ending in {suffix} for this format")
    if out.exists() and not overwrite:
        raise OptionError(f"--out {out} is there already: give another file, or --overwrite")
    _check_parent(out)


def check_folder(out: Path, *, overwrite: bool) -> None:
    """Raise `OptionError` unless the folder may be written: it is new, empty, or an earlier export."""
    if out.suffix.lower() in (".json", ".jsonl", ".csv", ".xml", ".yaml", ".yml", ".txt", ".zip"):
        raise OptionError(f"--out {out}: expected a folder for this format")
    if out.exists() and not out.is_dir():
        raise OptionError(f"--out {out} is a file: expected a folder for this format")
    if out.is_dir() and any(out.iterdir()):
        if not (out / MARK).is_file():
            raise OptionError(f"--out {out} holds other files, which an export would replace: give another folder")
        if not overwrite:
            raise OptionError(f"--out {out} holds an earlier export: give another folder, or --overwrite")
    _check_parent(out)


def _check_parent(out: Path) -> None:
    parent = next(place for place in out.absolute().parents if place.exists())
    if not parent.is_dir():
        raise OptionError(f"--out {out}: {parent} is a file, expected a folder")
    if not os.access(parent, os.W_OK):
        raise OptionError(f"--out {out} cannot be written: permission denied")


def write_whole(path: Path, content: str) -> None:
    """Write a text file, in a folder that is made if need be.

    Raises:
        PredictionsError: if it cannot be written; nothing of it is left.
    """
    beside = path.with_name(f"{path.name}.part-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(content, encoding="utf-8", newline="")
        beside.replace(path)
    except OSError as error:
        raise PredictionsError(f"cannot write {path}: {error.strerror}") from error
    finally:
        beside.unlink(missing_ok=True)


def put(path: Path, content: str) -> None:
    """Write a text file into a folder of `whole_folder`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8", newline="")


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A new folder to fill; at the end it takes the place of ``out``, after an error nothing of it is left.

    Raises:
        PredictionsError: if something cannot be written.
    """
    place = out.resolve()
    beside = place.with_name(f"{place.name}.part-{os.getpid()}")
    missing = [parent for parent in place.parents if not parent.exists()]
    try:
        beside.mkdir(parents=True)
        yield beside
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
    shutil.rmtree(old, ignore_errors=True)


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
