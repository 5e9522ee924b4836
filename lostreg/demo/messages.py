"""What the page may ask of its functions, checked first: Gradio fetches or copies whatever file a value names."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from fastapi import HTTPException

NOT_OURS: Final = "Only photos that were uploaded here can be used."


class Refusal(HTTPException):
    """A request that is not answered, and why: the gate says it, or Gradio where it asks for the rest of a body."""


def checked(body: bytes, functions: Mapping[int, int], uploads: Path) -> bytes:
    """A message to the queue, written again as it was understood.

    Args:
        body: as it came.
        functions: how many values each function takes, by its number.
        uploads: the folder in which every file must lie.

    Raises:
        Refusal: if it calls no function of the page, or with what the page never sends.
    """
    try:
        message = json.loads(body, parse_constant=_refuse)
    except (ValueError, RecursionError):
        message = None
    if not isinstance(message, dict) or not isinstance(message.get("data"), list):
        raise Refusal(422, "expected a JSON object with a list as data")
    function, values = message.get("fn_index"), message["data"]
    if not isinstance(function, int) or functions.get(function) != len(values):
        raise Refusal(400, "the page has no such function, or it takes another number of values")
    if not all(_is_plain(value) or _is_ours(value, uploads) for value in values):
        raise Refusal(400, NOT_OURS)
    return json.dumps(message).encode()


def is_upload(path: str, uploads: Path) -> bool:
    """Whether a path, with its links followed, is that of a file in the upload folder."""
    try:
        file = Path(path).resolve()
        return file.is_relative_to(uploads) and file.is_file()
    except (OSError, ValueError, RuntimeError):
        return False


def _refuse(number: str) -> None:
    """No page sends what JSON knows no number for."""
    raise ValueError(number)


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float)


def _is_ours(value: Any, uploads: Path) -> bool:
    """Whether it describes an upload as the page does, and nothing within it describes another file."""
    if not isinstance(value, dict) or value.get("meta") != {"_type": "gradio.FileData"}:
        return False
    path, name = value.get("path"), value.get("orig_name")
    if not isinstance(path, str) or not isinstance(name, str | None):
        return False
    return all(_is_plain(part) for key, part in value.items() if key != "meta") and is_upload(path, uploads)
