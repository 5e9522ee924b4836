"""The gate before Gradio: it lets through what the demo's page needs, from the page itself, and no more than fits."""

import asyncio
import re
import stat
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lostreg.demo.messages import Refusal, checked, is_upload

_READ: Final = (
    "/",
    "/config",
    "/theme.css",
    "/favicon.ico",
    "/manifest.json",
    "/robots.txt",
    "/gradio_api/queue/data",
    "/gradio_api/upload_progress",
    "/gradio_api/info",
    "/gradio_api/app_id",
    "/gradio_api/startup-events",
    "/gradio_api/theme.css",
)
_READ_BELOW: Final = ("/assets/", "/static/", "/gradio_api/heartbeat/")
_FILE: Final = "/gradio_api/file="
_UPLOAD: Final = "/gradio_api/upload"
_JOIN: Final = "/gradio_api/queue/join"
_WRITE: Final = (_JOIN, "/gradio_api/cancel", "/gradio_api/reset")
_LARGEST_MESSAGE: Final = 1 << 18
_KEPT_UPLOADS: Final = 50  # of the largest size
_KEPT_SECONDS: Final = 3600
_PATIENCE: Final = 20.0  # seconds that a body may keep the demo waiting
_RATE: Final = 5000  # bytes a second that keep the patience up
_LOOPBACK: Final = re.compile(r"(localhost|127(\.[0-9]{1,3}){3}|\[::1\])(:[0-9]{1,5})?", re.IGNORECASE)
# Gradio would believe them, and write addresses of their choice into the page.
_NOT_BELIEVED: Final = (b"forwarded", b"x-forwarded-", b"x-gradio-server")
# Whatever a future version of the page's libraries may want to fetch, it comes from here or not at all.
_POLICY: Final = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; connect-src 'self' data: blob:; form-action 'self'; base-uri 'self'; "
    "object-src 'none'"
)
_HEADERS: Final = (
    (b"content-security-policy", _POLICY.encode()),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
)


class Gate:
    """Refuses every request that the page does not need.

    Gradio answers many more: it fetches addresses for whoever asks, and calls functions with paths.

    Args:
        app: what answers the others.
        uploads: the only folder whose files are given out.
        max_upload: bytes of one request that uploads, with what surrounds the file.
        functions: how many values each function of the page takes, by its number.
        local: whether only this machine can reach the demo; it is then asked for by a name of this machine alone.
    """

    def __init__(
        self, app: ASGIApp, uploads: Path, max_upload: int, functions: Mapping[int, int], local: bool = True
    ) -> None:
        self._app = app
        self._uploads = uploads.resolve()
        self._max_upload = max_upload
        self._functions = functions
        self._local = local
        self._room = 0  # bytes of uploads that may yet arrive; counted anew before any is refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or pass on."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            send = _with_headers(send)
            try:
                await self._pass_on(scope, receive, send)
            except ClientDisconnect:
                pass  # in the middle of a body: nobody is left to be told
            except Refusal as refusal:
                answer = PlainTextResponse(refusal.detail, refusal.status_code, refusal.headers)
                await answer(scope, receive, send)

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, headers = scope["path"].rstrip("/") or "/", Headers(scope=scope)
        self._check_sender(headers)
        limit = self._limit(scope["method"], path)
        size = _announced(headers, limit, needed=scope["method"] == "POST")
        receive = _counted(_timely(receive), limit)
        scope = {**scope, "headers": [item for item in scope["headers"] if not item[0].startswith(_NOT_BELIEVED)]}
        if path == _JOIN:
            receive = _given(checked(await _whole(receive), self._functions, self._uploads), receive)
        if path == _UPLOAD:
            self._check_room(size)
            receive = self._taking_room(receive)
        await self._app(scope, receive, send)

    def _check_sender(self, headers: Headers) -> None:
        """No other site in the visitor's browser may ask, under whatever name it knows this machine."""
        host = headers.get("host", "").lower()
        if self._local and not _LOOPBACK.fullmatch(host):
            raise Refusal(421, "this demo answers to localhost and 127.0.0.1 alone")
        if any(origin.lower().partition("://")[2] != host for origin in headers.getlist("origin")):
            raise Refusal(403, "only the demo's own page may ask")

    def _limit(self, method: str, path: str) -> int:
        """Bytes that a request may bring."""
        if method in ("GET", "HEAD"):
            below = path.startswith(_READ_BELOW) and ".." not in path
            if below or path in _READ or (path.startswith(_FILE) and is_upload(path[len(_FILE) :], self._uploads)):
                return 0
        elif method == "POST" and path in (_UPLOAD, *_WRITE):
            return self._max_upload if path == _UPLOAD else _LARGEST_MESSAGE
        raise Refusal(404, "not found")

    def _check_room(self, size: int) -> None:
        """Make room for an upload; what is older than an hour goes first."""
        if size > self._room:
            _forget_old(self._uploads)
            self._room = _KEPT_UPLOADS * self._max_upload - _held(self._uploads)
        if size > self._room:
            raise Refusal(507, "There is no room for more photos now; there will be within an hour.")

    def _taking_room(self, receive: Receive) -> Receive:
        """The same, which takes room as it arrives: an upload that only announces its bytes keeps out no other."""

        async def receive_taking() -> Message:
            message = await receive()
            arrived = len(message.get("body", b""))
            self._check_room(arrived)
            self._room -= arrived
            return message

        return receive_taking


def _with_headers(send: Send) -> Send:
    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message["headers"], *_HEADERS]
        await send(message)

    return send_with_headers


def _announced(headers: Headers, limit: int, needed: bool) -> int:
    """The size that a request announces: it must, and that alone ends it."""
    text = headers.get("content-length", "" if needed else "0")
    if "transfer-encoding" in headers or not (text.isascii() and text.isdecimal()):
        raise Refusal(411, "expected a Content-Length, and no Transfer-Encoding")
    if len(text) > 15 or int(text) > limit:
        raise _too_large(limit)
    return int(text)


def _too_large(limit: int) -> Refusal:
    return Refusal(413, f"This is too large: at most {limit:,} bytes are taken.")


def _timely(receive: Receive) -> Receive:
    """The same, as long as the body keeps coming; what follows the body may take any time."""
    patience, more = _PATIENCE, True

    async def receive_timely() -> Message:
        nonlocal patience, more
        if not more:
            return await receive()
        began = time.monotonic()
        try:
            async with asyncio.timeout(patience):
                message = await receive()
        except TimeoutError as error:
            raise Refusal(408, "This came too slowly.", {"connection": "close"}) from error
        more = message.get("more_body", False)
        waited, earned = time.monotonic() - began, len(message.get("body", b"")) / _RATE
        patience = min(_PATIENCE, patience - waited + earned)
        return message

    return receive_timely


def _counted(receive: Receive, limit: int) -> Receive:
    """The same, up to so many bytes, whatever was announced."""
    seen = 0

    async def receive_counted() -> Message:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > limit:
            raise _too_large(limit)
        return message

    return receive_counted


async def _whole(receive: Receive) -> bytes:
    parts, more = [], True
    while more:
        message = await receive()
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(parts)


def _given(body: bytes, receive: Receive) -> Receive:
    """A body that was read already, and then what follows it."""
    messages: list[dict[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_given() -> Message:
        return messages.pop() if messages else await receive()

    return receive_given


def _held(folder: Path) -> int:
    """Bytes of the files below a folder."""
    return sum(_stat(file)[0] for file in folder.rglob("*"))


def _forget_old(folder: Path) -> None:
    """Also what a broken connection left behind, which Gradio does not know of."""
    for file in folder.rglob("*"):
        if file.is_file() and time.time() - _stat(file)[1] > _KEPT_SECONDS:
            file.unlink(missing_ok=True)


def _stat(file: Path) -> tuple[int, float]:
    """Size and time of a file, and nothing of a folder; Gradio may take a file away at any moment."""
    try:
        found = file.lstat()
    except OSError:
        return 0, time.time()
    return (0 if stat.S_ISDIR(found.st_mode) else found.st_size), found.st_mtime
