"""JSON documents, written whole or not at all, and JSON Lines that grow as a run goes on and survive a kill."""

import errno
import glob
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from types import UnionType
from typing import Any, Final, TypeGuard, TypeVar, get_args, get_type_hints

from lostreg.checks import FARTHEST, shown
from lostreg.errors import LostregError

if sys.platform != "win32":
    import fcntl

Document = TypeVar("Document")
DEEPEST: Final = 32  # levels of a document


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file, whole; names that are no text become JSON escapes."""
    write_whole(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n", errors="backslashreplace")


def write_whole(path: Path, text: str, *, errors: str = "strict") -> None:
    """Write a text file by way of `whole_file`.

    Args:
        path: the file, in a folder that is there.
        text: written as UTF-8, line ends as they are.
        errors: what becomes of characters that UTF-8 has no bytes for, as `str.encode` has it.
    """
    with whole_file(path) as beside:
        beside.write_text(text, encoding="utf-8", errors=errors, newline="")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file to write, beside one that it replaces at the end: a reader, or a kill, meets the old content or the new.

    After an error nothing is replaced, and nothing left. A kill leaves a file ``NAME.part-PID``, which whoever writes
    the file next removes.
    """
    beside = part_of(path)
    try:
        with held(beside, beside.touch):
            remove_left(path)
            yield beside
            beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def part_of(path: Path) -> Path:
    """Where this process writes what takes a file's or folder's place in the end."""
    return path.with_name(f"{path.name}.part-{os.getpid()}")


def remove_left(path: Path, remove: Callable[[Path], None] = Path.unlink) -> None:
    """Remove what processes that are no more have begun to write for a file or folder.

    Whether one lives is told by its hold, see `held`: other containers and machines that write to the same disk have
    processes of the same numbers.
    """
    if sys.platform == "win32":
        return
    for part in path.parent.glob(f"{glob.escape(path.name)}.part-*"):
        if re.fullmatch(r"\.part-[1-9]\d*(-old)?", part.name[len(path.name) :]):
            with suppress(OSError), ExitStack() as stack:
                descriptor = _open(part)
                stack.callback(os.close, descriptor)
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove(part)


@contextmanager
def held(path: Path, make: Callable[[], None]) -> Iterator[Callable[[], bool]]:
    """Make a file or folder and hold it, which `remove_left` respects; the hold goes with the process.

    Args:
        path: of the file or folder.
        make: makes it.

    Yields:
        A function that says whether it is still there.
    """
    if sys.platform == "win32":  # there an open file can be neither replaced nor removed
        make()
        yield path.exists
        return
    while True:
        make()
        try:
            descriptor = _open(path)
        except FileNotFoundError:  # taken for a leftover before it was held
            continue
        try:
            with suppress(OSError):  # some disks know no holds: nothing is ever removed there
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if _is_at(descriptor, path):
                yield partial(_is_at, descriptor, path)
                return
        finally:
            os.close(descriptor)


def _open(path: Path) -> int:
    return os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)  # NFS holds only what may be written


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file or folder is the one that a path leads to."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False


def save_document(path: str | Path, kind: str, fields: dict[str, Any], error: type[LostregError]) -> None:
    """Write an object with its format's name, in a folder that is made if need be.

    Args:
        path: the file.
        kind: the format's name, such as ``lostreg bias 1``.
        fields: of the object.
        error: raised if the file cannot be written.
    """
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_json(Path(path), {"format": kind, **fields})
    except OSError as reason:
        raise error(f"cannot write {path}: {reason.strerror}") from reason


def read_json(text: str | bytes) -> Any:
    """What a small JSON document says.

    Raises:
        ValueError: if it is no JSON, or has more than `DEEPEST` levels: whatever walks through it would fail then.
    """
    try:
        content = json.loads(text)
    except RecursionError as error:
        raise ValueError("more levels than can be read") from error
    level = [content]
    for _ in range(DEEPEST + 1):
        level = [
            inner
            for value in level
            if isinstance(value, dict | list)
            for inner in (value.values() if isinstance(value, dict) else value)
        ]
    if level:
        raise ValueError(f"more than {DEEPEST} levels")
    return content


def load_document(
    path: str | Path,
    kind: str,
    parse: Callable[[dict[str, Any]], Document],
    error: type[LostregError],
    *,
    name: str,
    command: str,
) -> Document:
    """Read such a file.

    Args:
        path: the file.
        kind: the format's name that is expected.
        parse: makes the document of its fields; a `ValueError` or `TypeError` says what is wrong with them.
        error: raised if the file cannot be read, or is of something else.
        name: what such files are called, for the message.
        command: that writes them.
    """
    try:
        fields = read_json(Path(path).read_text(encoding="utf-8"))
        if not isinstance(fields, dict) or fields.pop("format", None) != kind:
            raise ValueError(f'expected a JSON object with "format": "{kind}"')
        return parse(fields)
    except OSError as reason:
        raise error(f"cannot read the {name} {path}: {reason.strerror}") from reason
    except (ValueError, TypeError) as reason:
        raise error(f"{path} is no file of `{command}`: {reason}") from reason


def as_dataclass(kind: Callable[..., Document], fields: dict[str, Any]) -> Document:
    """A dataclass out of a document's fields: all of them, each of the type that it is annotated with.

    Raises:
        ValueError: if a field is missing or of another type.
        TypeError: if one is unknown.
    """
    hints = get_type_hints(kind)
    typed = {}
    for name in hints.keys() & fields.keys():
        try:
            typed[name] = _typed(fields[name], hints[name])
        except ValueError as error:
            raise ValueError(f"{name} is {shown(fields[name])}") from error
    document = kind(**{**fields, **typed})
    missing = [name for name in hints if name not in fields]
    if missing:
        raise ValueError(f"{', '.join(missing)} missing")
    return document


def _typed(value: Any, hint: Any) -> Any:
    """A value out of a JSON file as its annotation has it: lists become tuples."""
    options = get_args(hint)
    if isinstance(hint, UnionType):
        return None if value is None else _typed(value, options[0])
    if options and isinstance(value, list):
        kinds = options[:1] * len(value) if options[-1] is Ellipsis else options
        if len(kinds) == len(value):
            return tuple(_typed(entry, kind) for entry, kind in zip(value, kinds, strict=True))
    if is_finite_number(value) if hint is float else type(value) is hint:
        return value
    raise ValueError(hint)


def as_line(fields: dict[str, Any]) -> str:
    """A JSON object without line breaks.

    A file name that is not UTF-8 has lone surrogates: as JSON escapes they can be written and come back.
    """
    return json.dumps(fields, ensure_ascii=False).encode("utf-8", "backslashreplace").decode("utf-8")


def short_number(value: float) -> float | int:
    """At most three decimals, and none where there is nothing behind the point: patches end on whole pixels."""
    rounded = round(float(value), 3)
    return int(rounded) if rounded.is_integer() else rounded


@contextmanager
def full_disk_named(path: str | Path) -> Iterator[None]:
    """Say where a disk is full, which the system does not say of a file that is open.

    Args:
        path: of what is written.

    Raises:
        LostregError: in place of an `OSError` that says no more than that.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise LostregError(f"cannot write {path}: {error.strerror}") from error
        raise


def count_lines(path: Path) -> int:
    """How many whole lines a file has; none where there is no file."""
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        return sum(line.endswith(b"\n") for line in file)


def keep_lines(path: Path, most: int | None = None) -> None:
    """Cut off a file what follows its whole lines, or its first ``most`` of them; no more than a line is in memory."""
    if not path.exists():
        return
    end = 0
    with path.open("rb") as file:
        for number, line in enumerate(file):
            if number == most or not line.endswith(b"\n"):
                break
            end += len(line)
    if end < path.stat().st_size:
        with path.open("r+b") as file:
            file.truncate(end)


def is_finite_number(value: Any) -> bool:
    """Whether a value out of a JSON file is a number that can be reckoned with: none beyond what a float holds."""
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:
        return False


def is_box(value: Any) -> bool:
    """Whether a value out of a JSON file is ``[x1, y1, x2, y2]``, within `FARTHEST`."""
    if not isinstance(value, list) or len(value) != 4:
        return False
    return all(is_finite_number(number) and abs(number) <= FARTHEST for number in value)


def is_id(value: Any) -> TypeGuard[str | int]:
    """Whether a value out of a JSON file names an image."""
    return isinstance(value, str | int) and not isinstance(value, bool)
