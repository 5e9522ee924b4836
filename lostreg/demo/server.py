"""Serving the demo's page: a socket, a private folder for uploads, and the page behind its gate."""

import contextlib
import errno
import ipaddress
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Final

import gradio as gr
import uvicorn
from fastapi import FastAPI

from lostreg.demo.connection import ACCEPTED_AT_ONCE, Connection
from lostreg.demo.gate import Gate
from lostreg.demo.log import quiet_log
from lostreg.demo.looks import SCRIPT, STYLE, example_style, theme
from lostreg.demo.page import Page, in_a_loop
from lostreg.demo.session import DemoSettings, Models
from lostreg.errors import OptionError

_MB: Final = 1 << 20
_QUEUE: Final = 1024  # connections that the system keeps until they are accepted


class _Server(uvicorn.Server):
    """Says when it is ready."""

    on_ready: Callable[[], None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for bound in sockets or ():
            bound.listen(_QUEUE)
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


def is_local(bound: socket.socket) -> bool:
    """Whether only this machine can reach it."""
    return ipaddress.ip_address(bound.getsockname()[0]).is_loopback


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


def make_server(settings: DemoSettings, uploads: Path, models: Models | None = None, local: bool = True) -> _Server:
    """The server of a demo, not yet running.

    Args:
        settings: of the demo.
        uploads: as `upload_folder` gives it.
        models: loaded already; None loads the first backbone.
        local: whether only this machine can reach it, see `is_local`.
    """
    page = Page(settings, uploads, models)
    limit = settings.max_upload_mb * _MB
    functions = {number: len(function.inputs) for number, function in page.blocks.fns.items()}
    app = in_a_loop(partial(_mounted, page, limit))
    gate = Gate(app, uploads, limit + _MB, functions, local)  # room for what surrounds the file
    config = uvicorn.Config(
        gate,
        http=Connection,
        backlog=ACCEPTED_AT_ONCE,
        log_config=None,
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        ws="none",
        server_header=False,
        timeout_graceful_shutdown=2,
        lifespan="on",
    )
    return _Server(config)


def _mounted(page: Page, max_file: int) -> FastAPI:
    """Gradio with nothing that the page does not use."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    gr.mount_gradio_app(
        app,
        page.blocks,
        path="/",
        allowed_paths=[],
        show_error=False,
        max_file_size=max_file,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        run_history=False,
        footer_links=[],
        theme=theme(),
        css=STYLE + example_style(page.settings.examples),
        head=SCRIPT,
    )
    page.blocks.has_launched = True  # mounted pages never are, and unless they are, Gradio checks no path
    return app


def serve(settings: DemoSettings, models: Models, bound: socket.socket, on_ready: Callable[[], None]) -> None:
    """Serve the page until Ctrl-C or a request to end.

    Args:
        settings: of the demo.
        models: with what is loaded already.
        bound: as `listen` gives it.
        on_ready: called when visitors can come.
    """
    with quiet_log(), upload_folder() as uploads:
        server = make_server(settings, uploads, models, is_local(bound))
        server.on_ready = on_ready
        server.run(sockets=[bound])
