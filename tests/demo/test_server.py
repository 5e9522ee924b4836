"""What the demo's server gives out, and what not, asked over HTTP."""

import contextlib
import http.client
import json
import logging
import os
import secrets
import socket
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio")

from serving import FIRST, served

from lostreg.demo.server import address_of, is_local, listen, upload_folder
from lostreg.errors import OptionError

pytestmark = pytest.mark.usefixtures("one_thread")
SECRET = "nothing that a visitor may see"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with served(max_upload_mb=1) as address:
        yield address


@pytest.fixture(scope="module")
def uploads(address: str) -> Path:
    return Path(os.environ["GRADIO_TEMP_DIR"])


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret.png"
    path.write_text(SECRET)
    return path


def ask(
    address: str, path: str, method: str = "GET", body: bytes | None = None, **headers: str
) -> tuple[int, bytes, dict[str, str]]:
    """A request whose path goes out as it is written: no client tidies it up."""
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(address).netloc, timeout=30)
    try:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        return response.status, response.read(), {name.lower(): value for name, value in response.getheaders()}
    finally:
        connection.close()


def upload(address: str, content: bytes, name: str = "photo.jpg") -> tuple[int, bytes]:
    mark = "----mark"
    head = f'--{mark}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode()
    body = head + content + f"\r\n--{mark}--\r\n".encode()
    return ask(
        address, "/gradio_api/upload", "POST", body, **{"Content-Type": f"multipart/form-data; boundary={mark}"}
    )[:2]


def join(address: str, function: str | int, data: Any, session: str) -> tuple[int, bytes]:
    """Ask for one function by its name or number, as the page's own code does."""
    config = json.loads(ask(address, "/config")[1])
    numbers = {item["api_name"]: item["id"] for item in config["dependencies"]}
    number = numbers[function] if isinstance(function, str) else function
    body = json.dumps({"data": data, "fn_index": number, "session_hash": session}).encode()
    return ask(address, "/gradio_api/queue/join", "POST", body, **{"Content-Type": "application/json"})[:2]


def call(address: str, function: str, data: list[Any], session: str = "") -> dict[str, Any]:
    """Join the queue, then wait for the end of one event."""
    session = session or secrets.token_hex(8)
    assert join(address, function, data, session)[0] == 200
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(address).netloc, timeout=60)
    try:
        connection.request("GET", f"/gradio_api/queue/data?session_hash={session}")
        for line in connection.getresponse():
            message = json.loads(line.removeprefix(b"data:")) if line.startswith(b"data:") else {}
            if message.get("msg") == "process_completed":
                return dict(message)
    finally:
        connection.close()
    raise AssertionError("the event never ended")


def sent(path: str, **others: Any) -> dict[str, Any]:
    return {"path": path, "orig_name": "photo.jpg", "meta": {"_type": "gradio.FileData"}, **others}


def test_the_page_is_served_and_may_fetch_nothing_from_elsewhere(address: str) -> None:
    status, page, headers = ask(address, "/")
    assert status == 200
    assert b"lostreg demo" in page
    assert "default-src 'self'" in headers["content-security-policy"]
    assert "connect-src 'self'" in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    status, style, _ = ask(address, "/theme.css")
    assert status == 200
    assert not any(mark in style for mark in (b"url(http", b"url('http", b'url("http', b"url(//", b"@import"))
    assert b"system-ui" in style


def test_no_file_of_the_server_is_given_out(address: str, uploads: Path, secret: Path) -> None:
    link = uploads / "link.png"
    link.symlink_to(secret)
    quoted = urllib.parse.quote(str(secret), safe="")
    relative = os.path.relpath(secret)
    paths = [
        f"/gradio_api/file={secret}",
        f"/gradio_api/file={quoted}",
        f"/gradio_api/file={urllib.parse.quote(quoted, safe='')}",
        f"/gradio_api/file={relative}",
        f"/gradio_api/file={uploads}/../../..{secret}",
        f"/gradio_api/file={link}",
        f"/gradio_api/file={uploads}",
        f"/gradio_api/file=file://{secret}",
        f"/gradio_api/file/{secret}",
        f"/file={secret}",
        f"/file/{secret}",
        f"/static/../../../../../../../../../../../..{secret}",
        f"/static/..%2f..%2f..%2f..%2f..%2f..%2f..%2f..%2f..{quoted}",
        f"/assets/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e{secret}",
        f"/assets/{quoted}",
        f"/static/{quoted}",
        f"/custom_component/1/client/component/..{quoted}",
        f"/gradio_api/custom_component/1/client/component/..{quoted}",
    ]
    for path in paths:
        for method in ("GET", "HEAD"):
            status, body, _ = ask(address, path, method)
            assert status in (403, 404, 405), path
            assert SECRET.encode() not in body, path


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=http://127.0.0.1:9/x.png",
        "/gradio_api/file=https://example.com/x.png",
        "/gradio_api/proxy=http://127.0.0.1:9/",
        "/gradio_api/proxy=https://x.hf.space/",
        "/proxy=http://127.0.0.1:9/",
        "/gradio_api/runs",
        "/gradio_api/deep_link?session_hash=x",
        "/gradio_api/openapi.json",
        "/monitoring",
        "/openapi.json",
        "/docs",
        "/gradio_api/mcp/sse",
        "/gradio_api/vibe-code",
        "/gradio_api/infox",
        "/gradio_api/queue/dataxx",
        "/gradio_api/app_id/x",
    ],
)
def test_what_the_page_does_not_need_is_not_answered(address: str, path: str) -> None:
    assert ask(address, path)[0] == 404


@pytest.mark.parametrize(
    "path",
    ["/gradio_api/call/run", "/gradio_api/run/run", "/gradio_api/api/run", "/gradio_api/run/predict", "/login", "/"],
)
def test_functions_are_called_through_the_queue_alone(address: str, path: str) -> None:
    assert ask(address, path, "POST", b"{}", **{"Content-Type": "application/json"})[0] == 404


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH"])
def test_other_methods_are_refused(address: str, method: str) -> None:
    assert ask(address, "/gradio_api/upload", method)[0] == 404


@pytest.fixture(scope="module")
def kept(address: str, repository: Path) -> str:
    """Where an uploaded photo lies."""
    photo = min((repository / "datasets" / "sample").rglob("*.jpg"))
    return str(json.loads(upload(address, photo.read_bytes())[1])[0])


def test_a_path_or_address_instead_of_a_photo_is_refused_whatever_was_asked_before(
    address: str, uploads: Path, secret: Path, kept: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = []
    for name in ("async_ssrf_protected_download", "save_file_to_cache"):
        monkeypatch.setattr(f"gradio.processing_utils.{name}", lambda *found, **_: fetched.append(found))
    session = secrets.token_hex(8)
    places = (str(secret), os.path.relpath(secret), f"{uploads}/../../..{secret}", "http://192.0.2.1/x.png", "\0")
    odd: list[Any] = [sent(place) for place in places]
    odd += [{"photo": sent(places[3])}, [sent(places[3])], {**sent(kept), "meta": sent(places[3])}]
    odd += [sent(kept, size=sent(places[3])), sent(kept, orig_name=["a"])]
    for _ in range(2):
        for value in odd:
            status, told = join(address, "receive", [value, None], session)
            assert (status, told.decode()) == (400, "Only photos that were uploaded here can be used."), value
        slid = [
            None,
            "lost",
            True,
            sent(places[3]),
            1,
            "patches",
            False,
        ]  # no photo, but Gradio would fetch it all the same
        assert join(address, "redraw", slid, session)[0] == 400
        assert call(address, "receive", [sent(kept), None], session)["success"] is True
        answer = call(address, "run", [None, FIRST, "k", 1, 0, "parts", True, 0, 1, "patches", False], session)
        assert "object" in answer["output"]["data"][1]
    assert fetched == []


def test_values_that_the_page_never_sends_are_answered_in_words_and_one_line_of_the_log(
    address: str, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    unknown: list[tuple[int, Any]] = [(999, []), (-1, []), (1, [None] * 40), (1, {})]
    for number, data in unknown:
        assert join(address, number, data, "mine")[0] in (400, 422)
    assert call(address, "receive", ["/etc/passwd\0", None])["output"]["error"] == "These values cannot be used."
    for bias in ("x", 1e300, "\ud800"):
        done = call(address, "redraw", [None, "lost", False, bias, 1, "patches", False])
        assert done["success"] is False
        assert done["output"]["error"]
    assert call(address, "run", [None, "\ud800", "k", 1, 0, "parts", True, 0, 1, "patches", False])["success"] is False
    refused = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(refused) == 5
    assert all(len(line.splitlines()) == 1 for line in refused)
    assert "Traceback" not in capfd.readouterr().err
    assert "Traceback" not in caplog.text


def test_a_name_that_cannot_be_sent_back_is_shown_with_escapes(address: str, kept: str) -> None:
    session = secrets.token_hex(8)
    call(address, "receive", [sent(kept, orig_name="a\ud800\n\x1b[2Jgpj.\u202e.jpg"), None], session)
    done = call(address, "run", [None, FIRST, "k", 1, 0, "parts", True, 0, 1, "patches", False], session)
    assert done["success"] is True
    name = r"a\ud800\u000a\u001b[2Jgpj.\u202e.jpg"
    assert json.dumps(name)[1:-1] in json.dumps(done).replace("\\\\", "\\")


def test_an_upload_is_taken_kept_private_and_given_back(address: str, uploads: Path, photo: Path) -> None:
    status, body = upload(address, photo.read_bytes(), "../../photo.jpg")
    assert status == 200
    (kept,) = json.loads(body)
    assert Path(kept).is_relative_to(uploads)
    assert ask(address, f"/gradio_api/file={kept}")[1] == photo.read_bytes()
    assert uploads.stat().st_mode & 0o077 == 0
    assert call(address, "receive", [sent(kept), None])["success"] is True


def test_large_files_and_messages_are_refused(address: str, uploads: Path) -> None:
    before = sorted(uploads.rglob("*"))
    for size in ((1 << 20) + 1, 3 << 20):
        assert upload(address, bytes(size))[0] == 413
    assert sorted(path for path in uploads.rglob("*") if path.is_file()) == [path for path in before if path.is_file()]
    kind = {"Content-Type": "application/json"}
    assert ask(address, "/gradio_api/queue/join", "POST", bytes(1 << 19), **kind)[0] == 413
    for path in ("/gradio_api/queue/join", "/gradio_api/upload"):
        for chunked in (
            {"Transfer-Encoding": "chunked", **kind},
            {"Transfer-Encoding": "chunked", "Content-Length": "5"},
        ):
            assert ask(address, path, "POST", b"2\r\n{}\r\n0\r\n\r\n", **chunked)[0] == 411


def test_stalled_uploads_keep_out_no_other_and_end_in_words(
    address: str, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    netloc = urllib.parse.urlsplit(address).netloc
    host, port = netloc.split(":")
    head = f"POST /gradio_api/upload HTTP/1.1\r\nHost: {netloc}\r\n"
    head += "Content-Type: multipart/form-data; boundary=mark\r\nContent-Length: %d\r\n\r\n--mark\r"
    sizes = [(2 << 20) >> max(0, number - 48) for number in range(60)]  # together all the room that there is
    with contextlib.ExitStack() as stack:
        for size in sizes:
            stalled = stack.enter_context(socket.create_connection((host, int(port)), timeout=30))
            stalled.sendall((head % size).encode())
        assert upload(address, photo.read_bytes())[0] == 200
    monkeypatch.setattr("lostreg.demo.gate._PATIENCE", 0.1)
    with socket.create_connection((host, int(port)), timeout=30) as stalled, stalled.makefile("rb") as answer:
        stalled.sendall((head % sizes[0]).encode())
        told = answer.read()
    assert told.startswith(b"HTTP/1.1 408 ")
    assert b"This came too slowly." in told


def test_another_site_in_the_same_browser_gets_no_answer(address: str) -> None:
    host = urllib.parse.urlsplit(address).netloc
    port = host.rpartition(":")[2]
    for name in (f"localhost:{port}", "LOCALHOST", "127.0.0.1", f"[::1]:{port}", "127.1.2.3"):
        assert ask(address, "/config", Host=name)[0] == 200, name
    for name in (f"evil.example:{port}", "127.evil.example", "localhost.evil.example", "192.168.0.2", ""):
        assert ask(address, "/config", Host=name)[0] == 421, name
    kind = {"Content-Type": "application/json"}
    for origin in ("https://evil.example", "null", f"http://localhost:{port}", "http://127.0.0.1:1"):
        assert ask(address, "/gradio_api/reset", "POST", b"{}", Origin=origin, **kind)[0] == 403, origin
    assert ask(address, "/gradio_api/reset", "POST", b"{}", Origin=f"http://{host}", **kind)[0] == 422


def test_addresses_in_the_page_are_those_that_were_asked(address: str) -> None:
    lies = {"X-Forwarded-Host": "evil.example", "X-Forwarded-Proto": "https", "X-Gradio-Server": "http://evil.example"}
    for path in ("/", "/config"):
        page = ask(address, path, **lies)[1]
        assert b"evil.example" not in page
        assert b"https://127.0.0.1" not in page


def test_the_upload_folder_goes_with_the_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", "/chosen/before")
    with upload_folder() as folder:
        assert os.environ["GRADIO_TEMP_DIR"] == str(folder)
        (folder / "photo.jpg").touch()
    assert not folder.exists()
    assert os.environ["GRADIO_TEMP_DIR"] == "/chosen/before"


def test_a_port_that_is_taken_is_told() -> None:
    with listen("127.0.0.1", 0) as bound:
        port = bound.getsockname()[1]
        assert address_of(bound) == f"http://127.0.0.1:{port}"
        with pytest.raises(OptionError, match=f"port {port} of 127.0.0.1 is in use: give another --port"):
            listen("127.0.0.1", port)


def test_a_host_that_is_not_ours_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match=r"--host 192\.0\.2\.1 is no address of this machine"):
        listen("192.0.2.1", 0)

    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "unknown")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(OptionError, match="expected a name or address of this machine"):
        listen("no.such.name", 0)


def test_only_loopback_is_local(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, local in (("127.0.0.1", True), ("localhost", True), ("127.0.1.1", True), ("0.0.0.0", False)):
        with listen(name, 0) as bound:
            assert is_local(bound) is local, name
    find = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda _, *rest, **named: find("0.0.0.0", *rest, **named))
    with listen("127.evil.example", 0) as bound:
        assert not is_local(bound)


def test_an_address_for_all_is_shown_as_one_that_can_be_opened() -> None:
    with listen("0.0.0.0", 0) as bound:
        assert address_of(bound) == f"http://127.0.0.1:{bound.getsockname()[1]}"
