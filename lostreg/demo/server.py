"""Serving the demo's page: a socket, a private folder for uploads, and a gate that lets through what the page needs."""

import contextlib
import errno
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import gradio as gr
import uvicorn
from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lostreg.demo.looks import STYLE, theme
from lostreg.demo.page import Page
from lostreg.demo.session import DemoSettings, Models
from lostreg.errors import OptionError

_LOCAL: Final = ("127.0.0.1", "localhost", "::1")
_READ: Final = ("/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt")
_READ_BELOW: Final = (
    "/assets/",
    "/static/",
    "/gradio_api/heartbeat/",
    "/gradio_api/queue/data",
    "/gradio_api/upload_progress",
    "/gradio_api/info",
    "/gradio_api/app_id",
    "/gradio_api/startup-events",
    "/gradio_api/theme.css",
)
_FILE: Final = "/gradio_api/file="
_UPLOAD: Final = "/gradio_api/upload"
_WRITE: Final = ("/gradio_api/queue/join", "/gradio_api/cancel", "/gradio_api/reset")
_LARGEST_MESSAGE: Final = 1 << 18
_MB: Final = 1 << 20
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
        max_upload: bytes of one upload.
    """

    def __init__(self, app: ASGIApp, uploads: Path, max_upload: int) -> None:
        self._app = app
        self._uploads = uploads.resolve()
        self._max_upload = max_upload

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or pass on."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal:
            await PlainTextResponse(refusal[1], status_code=refusal[0])(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *_HEADERS]
            await send(message)

        await self._app(scope, receive, send_with_headers)

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        path = scope["path"].rstrip("/") or "/"
        if scope["method"] in ("GET", "HEAD"):
            if path in _READ or (path.startswith(_READ_BELOW) and ".." not in path) or self._is_upload(path):
                return None
        elif scope["method"] == "POST" and path in (_UPLOAD, *_WRITE):
            return self._too_large(scope, self._max_upload if path == _UPLOAD else _LARGEST_MESSAGE)
        return 404, "not found"

    def _is_upload(self, path: str) -> bool:
        if not path.startswith(_FILE):
            return False
        try:
            file = Path(path.removeprefix(_FILE)).resolve()
            return file.is_relative_to(self._uploads) and file.is_file()
        except (OSError, ValueError):
            return False

    @staticmethod
    def _too_large(scope: Scope, limit: int) -> tuple[int, str] | None:
        length = Headers(scope=scope).get("content-length", "")
        if not length.isdecimal():
            return 411, "expected a Content-Length"
        return (413, f"expected at most {limit:,} bytes") if int(length) > limit else None


class _Server(uvicorn.Server):
    """Says when it is ready."""

    on_ready: Callable[[], None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.on_ready and self.started:
            self.on_ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Ctrl-C and a request to end stop the server and go no further: what it made is then tidied up."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to an address of this machine.

    Args:
        host: name or address.
        port: 0 takes any that is free.

    Raises:
        OptionError: if the address is none of this machine's, or the port cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError) as error:
        raise OptionError(f"--host {host}: expected a name or address of this machine") from error
    bound = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen()
    except OSError as error:
        bound.close()
        raise OptionError(_why_not(host, port, error)) from error
    return bound


def _why_not(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} of {host} is in use: give another --port, or 0 for any that is free"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"--host {host} is no address of this machine: 127.0.0.1 is always one, 0.0.0.0 stands for all"
    return f"cannot listen on port {port} of {host}: {error.strerror}"


def address_of(bound: socket.socket) -> str:
    """Where a browser on this machine finds it."""
    host, port = bound.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - compared, not bound
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_local(host: str) -> bool:
    """Whether only this machine can reach it."""
    return host in _LOCAL or host.startswith("127.")


@contextlib.contextmanager
def upload_folder() -> Iterator[Path]:
    """A folder that only this user can read, which Gradio uses, and which is gone afterwards."""
    before = os.environ.get("GRADIO_TEMP_DIR")
    with tempfile.TemporaryDirectory(prefix="lostreg-demo-", ignore_cleanup_errors=True) as name:
        folder = Path(name).resolve()
        os.environ["GRADIO_TEMP_DIR"] = str(folder)
        try:
            yield folder
        finally:
            if before is None:
                del os.environ["GRADIO_TEMP_DIR"]
            else:
                os.environ["GRADIO_TEMP_DIR"] = before


def make_server(settings: DemoSettings, uploads: Path, models: Models | None = None) -> _Server:
    """The server of a demo, not yet running.

    Args:
        settings: of the demo.
        uploads: as `upload_folder` gives it.
        models: loaded already; None loads the first backbone.
    """
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    page = Page(settings, uploads, models)
    limit = settings.max_upload_mb * _MB
    gr.mount_gradio_app(
        app,
        page.blocks,
        path="/",
        allowed_paths=[],
        show_error=False,
        max_file_size=limit,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        run_history=False,
        footer_links=[],
        theme=theme(),
        css=STYLE,
    )
    page.blocks.has_launched = True  # mounted pages never are, and unless they are, Gradio checks no path
    gate = Gate(app, uploads, limit + _MB)  # room for what surrounds the file
    config = uvicorn.Config(
        gate,
        log_config=None,
        log_level="warning",
        access_log=False,
        ws="none",
        server_header=False,
        timeout_graceful_shutdown=2,
        lifespan="on",
    )
    return _Server(config)


def serve(settings: DemoSettings, models: Models, bound: socket.socket, on_ready: Callable[[], None]) -> None:
    """Serve the page until Ctrl-C or a request to end.

    Args:
        settings: of the demo.
        models: with what is loaded already.
        bound: as `listen` gives it.
        on_ready: called when visitors can come.
    """
    with upload_folder() as uploads:
        server = make_server(settings, uploads, models)
        server.on_ready = on_ready
        server.run(sockets=[bound])
