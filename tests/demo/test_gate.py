"""What the gate passes on, without Gradio behind it."""

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio")

from hypothesis import given
from hypothesis import strategies as st
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from lostreg.demo.gate import Gate
from lostreg.text import printable

LIMIT = 100


class Behind:
    """An app that reads what it is given."""

    def __init__(self) -> None:
        self.read = b""
        self.asked = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.asked += 1
        more = True
        while more:
            message = await receive()
            self.read += message["body"]
            more = message["more_body"]


def post(gate: Gate, *parts: bytes, path: str = "/gradio_api/upload", **headers: str) -> int | None:
    """The status that a request in parts is refused with; None where it is passed on."""
    named = {"host": "localhost", "content-length": str(sum(map(len, parts))), **headers}
    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in named.items()]
    scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": raw}
    left = list(parts)
    status: list[int] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            status.append(message["status"])

    asyncio.run(gate(scope, receive, send))
    return status[0] if status else None


async def answered(
    gate: Gate, parts: list[bytes], seconds: float = 0.0, path: str = "/gradio_api/upload"
) -> int | None:
    """The same for parts of a body of `LIMIT` bytes that come one after the other, and then no more."""
    raw = [(b"host", b"localhost"), (b"content-length", str(LIMIT).encode())]
    scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": raw}
    left = list(parts)
    status: list[int] = []

    async def receive() -> dict[str, Any]:
        await (asyncio.sleep(seconds) if left else asyncio.Event().wait())
        body = left.pop(0)
        return {"type": "http.request", "body": body, "more_body": bool(left) or len(body) * len(parts) < LIMIT}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            status.append(message["status"])

    await gate(scope, receive, send)
    return status[0] if status else None


def test_more_than_was_announced_is_not_passed_on(tmp_path: Path) -> None:
    behind = Behind()
    gate = Gate(behind, tmp_path, LIMIT, {})
    assert post(gate, bytes(60), bytes(40)) is None
    assert len(behind.read) == LIMIT
    assert post(gate, *[bytes(60)] * 1000, **{"content-length": "5"}) == 413
    assert len(behind.read) == LIMIT + 60
    for length in ("", "-1", "5x", "\u00b2", "9" * 5000):
        assert post(gate, b"", **{"content-length": length}) in (411, 413), length
    assert behind.asked == 2


def test_a_body_that_is_too_large_is_an_answer_that_the_app_knows_how_to_give(tmp_path: Path) -> None:
    seen: list[int] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await receive()
        except HTTPException as error:
            seen.append(error.status_code)

    post(Gate(app, tmp_path, LIMIT, {}), bytes(LIMIT + 1), **{"content-length": "5"})
    assert seen == [413]


def test_uploads_are_refused_once_the_folder_is_full_and_old_files_make_room(tmp_path: Path) -> None:
    gate = Gate(Behind(), tmp_path, LIMIT, {})
    file = tmp_path / "below" / "photo.jpg"
    file.parent.mkdir()
    file.write_bytes(bytes(49 * LIMIT))
    assert post(gate, bytes(LIMIT)) is None
    (tmp_path / "half").write_bytes(b"1")
    assert post(gate, bytes(LIMIT)) == 507
    assert file.exists()
    os.utime(file, (0, 0))
    assert post(gate, bytes(LIMIT)) is None
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["below", "half"]


def test_uploads_take_room_as_they_arrive(tmp_path: Path) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        with (tmp_path / str(len(list(tmp_path.iterdir())))).open("wb", buffering=0) as file:
            while True:
                file.write((await receive())["body"])

    async def in_turns() -> list[int | None]:
        gate = Gate(app, tmp_path, LIMIT, {})
        arriving = [asyncio.create_task(answered(gate, [bytes(LIMIT - 1)])) for _ in range(60)]
        done, rest = await asyncio.wait(arriving, timeout=5, return_when=asyncio.FIRST_COMPLETED)
        for task in rest:
            task.cancel()
        return [task.result() for task in done]

    assert asyncio.run(in_turns()) == [507] * 10


def test_uploads_that_do_not_arrive_keep_out_no_other(tmp_path: Path) -> None:
    behind = Behind()
    gate = Gate(behind, tmp_path, LIMIT, {})

    async def stalled_and_one() -> None:
        stalled = [asyncio.create_task(answered(gate, [b"1234567"])) for _ in range(60)]
        await asyncio.sleep(0)
        assert behind.asked == 60
        assert await answered(gate, [bytes(LIMIT)]) is None
        for task in stalled:
            task.cancel()

    asyncio.run(stalled_and_one())
    assert len(behind.read) == 60 * 7 + LIMIT


@pytest.mark.parametrize("path", ["/gradio_api/upload", "/gradio_api/queue/join"])
@pytest.mark.parametrize("parts", [[], [b"1234567"], [b"1"] * 90], ids=["nothing", "seven", "drip"])
def test_a_body_that_does_not_come_is_not_waited_for(
    tmp_path: Path, path: str, parts: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lostreg.demo.gate._PATIENCE", 0.05)
    gate = Gate(Behind(), tmp_path, LIMIT, {})
    assert asyncio.run(answered(gate, parts, seconds=0.01, path=path)) == 408


def test_a_body_that_keeps_coming_is_taken_and_what_follows_it_takes_any_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lostreg.demo.gate._PATIENCE", 0.5)
    monkeypatch.setattr("lostreg.demo.gate._RATE", 1)
    listened: list[bool] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive())["more_body"]:
            pass
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.6):
                await receive()
        listened.append(True)

    assert asyncio.run(answered(Gate(app, tmp_path, LIMIT, {}), [bytes(10)] * 10, seconds=0.06)) is None
    assert listened


def test_a_demo_that_others_reach_is_asked_by_any_name_but_by_its_own_page_alone(tmp_path: Path) -> None:
    gate = Gate(Behind(), tmp_path, LIMIT, {}, local=False)
    assert post(gate, b"", host="demo.example:80") is None
    assert post(gate, b"", host="demo.example:80", origin="http://demo.example:80") is None
    assert post(gate, b"", host="demo.example:80", origin="http://evil.example:80") == 403
    assert post(Gate(Behind(), tmp_path, LIMIT, {}), b"", host="demo.example:80") == 421


def test_a_message_is_passed_on_as_it_was_understood(tmp_path: Path) -> None:
    behind = Behind()
    gate = Gate(behind, tmp_path, LIMIT, {3: 2})
    twice = b'{"data": [{"path": "x"}, 1], "fn_index": 3, "data": [null, 1]}'
    assert post(gate, twice[:20], twice[20:], path="/gradio_api/queue/join") is None
    assert behind.read == b'{"data": [null, 1], "fn_index": 3}'
    for body in (
        b"",
        b"[]",
        b"{}",
        b"[" * 100_000,
        b"\xff",
        b'{"data": [1], "fn_index": 3}',
        b'{"data": [], "fn_index": []}',
        b'{"data": [null, NaN], "fn_index": 3}',
    ):
        assert post(gate, body, path="/gradio_api/queue/join") in (400, 422), body[:40]
    assert behind.asked == 1


@given(st.text(st.characters()))
def test_every_name_can_be_sent_and_stands_on_one_line(name: str) -> None:
    shown = printable(name)
    assert shown.encode().decode() == shown
    assert len(shown.splitlines()) <= 1
    assert printable(shown) == shown
