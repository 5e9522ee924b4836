"""JSON Lines files that grow as a run goes on, and survive a kill; what may be expected of their values."""

import json
import math
from pathlib import Path
from typing import Any, TypeGuard


def as_line(fields: dict[str, Any]) -> str:
    """A JSON object without line breaks.

    A file name that is not UTF-8 has lone surrogates: as JSON escapes they can be written and come back.
    """
    return json.dumps(fields, ensure_ascii=False).encode("utf-8", "backslashreplace").decode("utf-8")


def whole_lines(path: Path) -> bytes:
    """The whole lines of a file whose writer may have been killed; what it left of a line is cut off the file."""
    keep_lines(path)
    return path.read_bytes() if path.exists() else b""


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
    """Whether a value out of a JSON file is ``[x1, y1, x2, y2]``."""
    return isinstance(value, list) and len(value) == 4 and all(is_finite_number(number) for number in value)


def is_id(value: Any) -> TypeGuard[str | int]:
    """Whether a value out of a JSON file names an image."""
    return isinstance(value, str | int) and not isinstance(value, bool)
