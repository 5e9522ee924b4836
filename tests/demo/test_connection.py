"""Connections that keep the demo waiting, over sockets, with an app of a few lines behind them."""

import asyncio
import contextlib
import resource
import select
import socket
import threading
from collections.abc import Iterator

import pytest

pytest.importorskip("gradio")

import uvicorn
from starlette.types import Receive, Scope, Send

from lostreg.demo import connection
from lostreg.demo.connection import Connection, most_connections
from lostreg.demo.server import listen

HEAD = b"GET / HTTP/1.1\r\nHost: x\r\n"
POST = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n"
EVENTS = b"GET /events HTTP/1.1\r\nHost: x\r\n\r\n"
MUCH = 1 << 26
let_go = threading.Event()


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """Reads bodies but those sent to /refused, answers at /events for as long as it is listened to."""
    more = scope["method"] == "POST" and scope["path"] != "/refused"
    while more:
        message = await receive()
        more = message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]} | _open(scope))
    if scope["path"] == "/events":
        for _ in range(8):
            await asyncio.sleep(0.05)
            await send({"type": "http.response.body", "body": b"event", "more_body": True})
        while (await receive())["type"] != "http.disconnect":
            pass
    elif scope["path"] == "/much":
        await send({"type": "http.response.body", "body": bytes(MUCH), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": True})
        while (await receive())["type"] != "http.disconnect":
            pass
        let_go.set()
    else:
        await send({"type": "http.response.body", "body": b"ok"})


def _open(scope: Scope) -> dict[str, object]:
    return {"headers": []} if scope["path"] in ("/events", "/much") else {}


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    config = uvicorn.Config(app, http=Connection, log_config=None, lifespan="off", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    with listen("127.0.0.1", 0) as bound:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
        thread.start()
        yield bound.getsockname()[1]
        server.should_exit = True
        thread.join(30)


@contextlib.contextmanager
def connected(port: int, data: bytes = b"", source: str = "127.0.0.1") -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", port), timeout=30, source_address=(source, 0)) as visitor:
        visitor.sendall(data)
        yield visitor


def until_closed(visitor: socket.socket, drip: bytes = b"") -> bytes:
    """What is still answered while a byte comes now and then."""
    answer = b""
    visitor.settimeout(0.05)
    for _ in range(600):
        try:
            part = visitor.recv(1 << 16)
            if not part:
                return answer
            answer += part
        except TimeoutError:
            with contextlib.suppress(OSError):
                visitor.sendall(drip)
        except ConnectionError:
            return answer
    raise AssertionError("the connection stays open")


@pytest.mark.parametrize(
    ("data", "drip", "answers"),
    [
        (b"", b"", 0),
        (b"", b"\r\n", 0),
        (HEAD, b"", 0),
        (HEAD + b"X-A: ", b"a", 0),
        (HEAD + b"\r\n", b"", 1),
        (HEAD + b"\r\n" + HEAD + b"X-A: ", b"a", 1),
        (POST.replace(b"/", b"/refused", 1), b"", 1),
        (POST.replace(b"/", b"/refused", 1).replace(b"9", b"99999"), b"a", 1),
    ],
)
def test_a_connection_that_brings_no_request_is_closed_however_often_a_byte_comes(
    port: int, data: bytes, drip: bytes, answers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "_HEAD_SECONDS", 0.2)
    with connected(port, data) as visitor:
        assert until_closed(visitor, drip).count(b"200 OK") == answers


def test_an_answer_that_goes_on_outlasts_every_deadline(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_HEAD_SECONDS", "_READ_SECONDS"):
        monkeypatch.setattr(connection, name, 0.1)
    with connected(port, EVENTS) as visitor:
        answer = b""
        while answer.count(b"event") < 8:
            part = visitor.recv(1 << 16)
            assert part
            answer += part


def test_a_visitor_who_does_not_read_is_let_go(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_READ_SECONDS", 0.2)
    let_go.clear()
    with connected(port, b"GET /much HTTP/1.1\r\nHost: x\r\n\r\n"):
        assert let_go.wait(30)


def test_a_visitor_who_reads_slowly_gets_everything(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_HEAD_SECONDS", 0.1)
    with connected(port, b"GET /much HTTP/1.1\r\nHost: x\r\n\r\n") as visitor:
        read = 0
        while read < MUCH:
            part = visitor.recv(1 << 22)
            assert part
            read += len(part)


@pytest.mark.parametrize("unfinished", [HEAD, POST], ids=["head", "body"])
def test_beyond_the_bound_unfinished_requests_go_and_a_new_one_is_answered(
    port: int, unfinished: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "most_connections", lambda: 6)
    with contextlib.ExitStack() as stack:
        visitors = [stack.enter_context(connected(port, unfinished)) for _ in range(20)]
        for _ in range(3):
            with connected(port, HEAD + b"Connection: close\r\n\r\n") as visitor:
                assert b"200 OK" in until_closed(visitor)
        open_still = visitors
        while len(open_still) > 5:  # the first to be answered took the place of one more
            closed = select.select(open_still, [], [], 30)[0]
            assert closed
            assert not any(until_closed(visitor) for visitor in closed)
            open_still = [visitor for visitor in open_still if visitor not in closed]
        assert len(open_still) == 5


def test_a_flood_of_half_sent_heads_spares_what_has_begun(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "most_connections", lambda: 6)
    with contextlib.ExitStack() as stack:
        asking = POST.replace(b"Host", b"Expect: 100-continue\r\nHost")
        events, body = (stack.enter_context(connected(port, data)) for data in (EVENTS, asking))
        assert events.recv(1)
        assert b"100" in body.recv(1 << 16)  # both have begun
        for _ in range(20):
            stack.enter_context(connected(port, HEAD))
        body.sendall(b"123456789")
        assert b"200 OK" in body.recv(1 << 16)
        assert events.recv(1 << 16)


def test_whoever_holds_most_connections_makes_room_for_others(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "most_connections", lambda: 6)
    with contextlib.ExitStack() as stack:
        try:
            greedy = [stack.enter_context(connected(port, EVENTS, "127.0.0.2")) for _ in range(6)]
        except OSError:
            pytest.skip("this machine has one loopback address alone")
        for visitor in greedy:
            assert visitor.recv(1)
        mine = stack.enter_context(connected(port, EVENTS))
        assert mine.recv(1)
        until_closed(greedy[0])
        with connected(port, HEAD + b"\r\n", "127.0.0.2") as refused:  # all of theirs are being answered
            assert until_closed(refused) == b""
        assert mine.recv(1)


@pytest.mark.parametrize(("files", "most"), [(64, 8), (128, 32), (1024, 480), (1 << 20, 480), (-1, 480)])
def test_the_limit_of_open_files_is_never_reached(files: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    files = resource.RLIM_INFINITY if files < 0 else files
    monkeypatch.setattr(resource, "getrlimit", lambda _: (files, files))
    assert most_connections() == most
