"""Getting one file over HTTP so that a cut connection costs nothing, and nothing but the file expected is kept."""

import contextlib
import functools
import http.client
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Protocol
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
    length: int | None

    def read(self, amount: int, /) -> bytes: ...


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows to HTTP and HTTPS, and from HTTPS to HTTPS only; urllib alone would follow to FTP as well."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        fp.close()  # urllib would read this body to its end, and nothing says that it has one
        allowed = ("https",) if req.type == "https" else ("http", "https")
        if urlsplit(newurl).scheme not in allowed:
            raise DatasetError(
                f"cannot download {req.full_url}: expected a redirect to {' or '.join(allowed)}, got {newurl}"
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


@functools.cache
def _opener() -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(_Redirects)


def check_http(url: str) -> str:
    """Return ``url`` if it is HTTP or HTTPS with a host.

    Raises:
        OptionError: otherwise.
    """
    with contextlib.suppress(ValueError):
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.netloc:
            return url
    raise OptionError(f"expected an address such as https://host/path, got {url!r}")


def download(
    url: str,
    target: Path,
    check: Callable[[Path], str],
    *,
    at_most: int,
    resume: bool = True,
    tries: int = 5,
    progress: bool = True,
    stop: threading.Event | None = None,
) -> None:
    """Download a file to ``target`` by way of ``target`` plus ``.part``.

    Args:
        url: HTTP or HTTPS.
        target: where the complete file appears, in one step; its folder must exist.
        check: called with the complete file before it appears: says what is wrong with it, or nothing. Where
            something is, the download is removed.
        at_most: bytes that the file may have; a server that has more to send is not listened to.
        resume: continue a ``.part`` file that is there, also one of an earlier call, and keep it
            when the download fails. Otherwise every try starts over and nothing is left behind.
        tries: how often to connect before giving up, at least 1.
        progress: show a bar on stderr.
        stop: set by another thread to end the download soon.

    Raises:
        DatasetError: if the server refuses, cannot be reached, keeps cutting the transfer, sends too much, redirects
            to where none may lead, or sends something else than is expected.
        OSError: if the file cannot be written.
    """
    check_http(url)
    part = target.with_name(target.name + ".part")
    if part.is_symlink():
        raise DatasetError(f"{part} is a symbolic link, and a download writes through none: remove it")
    stop = stop or threading.Event()
    try:
        _try_often(url, part, at_most, resume=resume, tries=tries, progress=progress, stop=stop)
        if fault := check(part):
            part.unlink()
            raise DatasetError(f"{url} {fault}; the download was removed")
        part.replace(target)
    finally:
        if not resume:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)


def _try_often(
    url: str, part: Path, at_most: int, *, resume: bool, tries: int, progress: bool, stop: threading.Event
) -> None:
    reason = ""
    for attempt in range(tries):
        if attempt and stop.wait(RETRY_WAIT_S * attempt):
            break
        if not resume:
            part.unlink(missing_ok=True)
        try:
            _transfer(url, part, at_most, progress=progress, stop=stop)
            return
        except _CutError as cut:
            reason = str(cut)
    message = f"cannot download {url} after {tries} tries: {reason}"
    if resume and _size(part):
        message += f"; {_size(part)} bytes are in {part}, run the same command again to go on from there"
    raise DatasetError(message)


def _transfer(url: str, part: Path, at_most: int, *, progress: bool, stop: threading.Event) -> None:
    """One connection: append to ``part``, or start it over if the server does not resume."""
    start = _size(part)
    headers = {"User-Agent": "lostreg", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    request = urllib.request.Request(url, headers=headers)  # noqa: S310 - check_http has seen it
    try:
        response = _opener().open(request, timeout=_TIMEOUT_S)
    except urllib.error.HTTPError as error:
        with contextlib.closing(error):
            _refused(error, url, part, start)
        return
    except (OSError, http.client.HTTPException) as error:
        raise _CutError(str(getattr(error, "reason", error)) or type(error).__name__) from error
    except ValueError as error:  # of a redirect to something that is no address
        raise DatasetError(f"cannot download {url}: {error}") from error
    with response:
        start, total = _place(response, start, part)
        if total is not None and total > at_most:
            raise DatasetError(f"refused {url}: expected at most {at_most:,} bytes, the server has {total:,}")
        _write(response, part, start, total, at_most, progress=progress, stop=stop)
    if _size(part) > at_most:  # a server that did not say how much it has
        part.unlink()
        raise DatasetError(f"refused {url}: expected at most {at_most:,} bytes, the server sends more")


def _place(response: _Response, start: int, part: Path) -> tuple[int, int | None]:
    """Where the response's bytes belong, and the size of the whole file if the server told it."""
    if response.status != 206:
        return 0, response.length
    found = re.fullmatch(r"bytes ([0-9]{1,18})-[0-9]{1,18}/([0-9]{1,18}|\*)", response.headers.get("Content-Range", ""))
    if found is None or int(found[1]) != start:
        part.unlink(missing_ok=True)
        raise _CutError("the server resumed at the wrong place")
    return start, int(found[2]) if found[2] != "*" else None


def _write(
    response: _Response,
    part: Path,
    start: int,
    total: int | None,
    at_most: int,
    *,
    progress: bool,
    stop: threading.Event,
) -> None:
    label = part.name.removesuffix(".part")
    bar = tqdm(total=total, initial=start, desc=label, unit="B", unit_scale=True, leave=False, disable=not progress)
    size = start
    with bar, part.open("ab" if start else "wb") as file:
        while size <= at_most and (chunk := _read(response)):
            if stop.is_set():
                raise _CutError("stopped")
            file.write(chunk)
            bar.update(len(chunk))
            size += len(chunk)
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
    reason = " ".join(str(error.reason).split())  # urllib's own, of a redirect loop, has several lines
    raise DatasetError(f"cannot download {url}: HTTP {error.code} {reason}") from error


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
