"""Getting one file over HTTP so that a cut connection costs nothing."""

import contextlib
import http.client
import re
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from tqdm import tqdm

from lostreg.errors import DatasetError, OptionError

RETRY_WAIT_S = 1.0
"""Pause before the second try of a download; it grows by as much with each further one."""

_CHUNK = 1 << 16
_TIMEOUT_S = 60.0
_RETRIED_STATUS = {408, 429, 500, 502, 503, 504}


class _CutError(Exception):
    """The transfer broke in a way that another try may mend."""


class _Response(Protocol):
    status: int
    headers: http.client.HTTPMessage

    def read(self, amount: int, /) -> bytes: ...


def check_http(url: str) -> str:
    """Return ``url`` if it is HTTP or HTTPS with a host.

    Raises:
        OptionError: otherwise.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise OptionError(f"expected an address such as http://host/path, got {url!r}")
    return url


def download(
    url: str,
    target: Path,
    *,
    resume: bool = True,
    magic: bytes = b"",
    tries: int = 5,
    progress: bool = True,
    stop: threading.Event | None = None,
) -> None:
    """Download a file to ``target`` by way of ``target`` plus ``.part``.

    Args:
        url: HTTP or HTTPS.
        target: where the complete file appears, in one step; its folder must exist.
        resume: continue a ``.part`` file that is there, also one of an earlier call, and keep it
            when the download fails. Otherwise every try starts over and nothing is left behind.
        magic: the bytes that the file must begin with; anything else counts as a failure.
        tries: how often to connect before giving up, at least 1.
        progress: show a bar on stderr.
        stop: set by another thread to end the download soon.

    Raises:
        DatasetError: if the server refuses, cannot be reached, or keeps cutting the transfer.
        OSError: if the file cannot be written.
    """
    check_http(url)
    part = target.with_name(target.name + ".part")
    stop = stop or threading.Event()
    try:
        _try_often(url, part, resume=resume, tries=tries, progress=progress, stop=stop)
        _check_magic(url, part, magic)
        part.replace(target)
    finally:
        if not resume:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)


def _try_often(url: str, part: Path, *, resume: bool, tries: int, progress: bool, stop: threading.Event) -> None:
    reason = ""
    for attempt in range(tries):
        if attempt and stop.wait(RETRY_WAIT_S * attempt):
            break
        if not resume:
            part.unlink(missing_ok=True)
        try:
            _transfer(url, part, progress=progress, stop=stop)
            return
        except _CutError as cut:
            reason = str(cut)
    message = f"cannot download {url} after {tries} tries: {reason}"
    if resume and _size(part):
        message += f"; {_size(part)} bytes are in {part}, run the same command again to go on from there"
    raise DatasetError(message)


def _check_magic(url: str, part: Path, magic: bytes) -> None:
    with part.open("rb") as file:
        begins = file.read(len(magic))
    if begins != magic:
        part.unlink()
        raise DatasetError(f"{url} is not the kind of file expected: it begins with {begins!r}")


def _transfer(url: str, part: Path, *, progress: bool, stop: threading.Event) -> None:
    """One connection: append to ``part``, or start it over if the server does not resume."""
    start = _size(part)
    headers = {"User-Agent": "lostreg", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    request = urllib.request.Request(url, headers=headers)  # noqa: S310 - check_http has seen it
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT_S)  # noqa: S310
    except urllib.error.HTTPError as error:
        with error:
            _refused(error, url, part, start)
        return
    except (OSError, http.client.HTTPException) as error:
        raise _CutError(str(getattr(error, "reason", error)) or type(error).__name__) from error
    with response:
        start, total = _place(response, start, part)
        _write(response, part, start, total, progress=progress, stop=stop)


def _place(response: _Response, start: int, part: Path) -> tuple[int, int | None]:
    """Where the response's bytes belong, and the size of the whole file if the server told it."""
    if response.status != 206:
        length = response.headers.get("Content-Length", "")
        return 0, int(length) if length.isdigit() else None
    found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
    if found is None or int(found[1]) != start:
        part.unlink(missing_ok=True)
        raise _CutError("the server resumed at the wrong place")
    return start, int(found[2]) if found[2] != "*" else None


def _write(
    response: _Response, part: Path, start: int, total: int | None, *, progress: bool, stop: threading.Event
) -> None:
    label = part.name.removesuffix(".part")
    bar = tqdm(total=total, initial=start, desc=label, unit="B", unit_scale=True, leave=False, disable=not progress)
    with bar, part.open("ab" if start else "wb") as file:
        while chunk := _read(response):
            if stop.is_set():
                raise _CutError("stopped")
            file.write(chunk)
            bar.update(len(chunk))
    size = _size(part)
    if total is not None and size != total:
        if size > total:
            part.unlink()
        raise _CutError(f"got {size} of {total} bytes")


def _read(response: _Response) -> bytes:
    """Read a piece; whatever breaks here is the network's doing, not the disk's."""
    try:
        return response.read(_CHUNK)
    except (OSError, http.client.HTTPException) as error:
        raise _CutError(str(error) or type(error).__name__) from error


def _refused(error: urllib.error.HTTPError, url: str, part: Path, start: int) -> None:
    """Decide on an error status; returns only if ``part`` turns out to be complete already."""
    if error.code == 416 and start:
        if error.headers.get("Content-Range", "") == f"bytes */{start}":
            return
        part.unlink(missing_ok=True)
        raise _CutError("the unfinished file did not fit what the server has") from error
    if error.code in _RETRIED_STATUS:
        raise _CutError(f"HTTP {error.code} {error.reason}") from error
    raise DatasetError(f"cannot download {url}: HTTP {error.code} {error.reason}") from error


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
