"""Many visitors at once in a demo of its own: do all get their answers, and does it stay the size that it was?

    python scripts/demo_soak.py --images datasets/sample

Each visitor does what the page does: upload a photo, wait for boxes and attention, then the next photo. The process's
memory and open files are read where Linux tells them.
"""

import argparse
import http.client
import json
import re
import secrets
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import IO, Any

from lostreg.inference.stream import draw_sample

_START = "import sys; from lostreg.cli.main import main; sys.exit(main())"
_SECONDS = 300  # for one answer


def main(argv: Sequence[str] | None = None) -> int:
    """Serve, visit, tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="photographs (*.jpg), also below it")
    parser.add_argument("--backbone", default="imgfocus_vits14")
    parser.add_argument("--uploads", type=int, default=200, help="of all visitors (default: 200)")
    parser.add_argument("--visitors", type=int, default=20, help="at once (default: 20)")
    args = parser.parse_args(argv)
    photos = draw_sample(sorted(args.images.rglob("*.jpg")), args.uploads, seed=0)
    with tempfile.TemporaryFile() as log, demo(args.backbone, log) as (process, address):
        for _ in range(2):  # the demo keeps the last two photos of the last 40 visitors
            soak(address, photos, 2 * args.visitors, args.visitors)
        before = held(process.pid)
        report = soak(address, photos, args.uploads, args.visitors)
        time.sleep(10)  # until the connections that browsers would keep have been closed
        report |= {"before": before, "after": held(process.pid), "log_bytes": log.seek(0, 2)}
    print(json.dumps(report, indent=2))
    return int(report["failed"] > 0)


@contextmanager
def demo(backbone: str, log: IO[bytes]) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A process that serves, and where."""
    command = [sys.executable, "-c", _START, "demo", "--port", "0", "--backbone", backbone]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log) as process:  # noqa: S603 - ourselves
        try:
            ready = re.search(rb"http://(\S+)", process.stdout.readline() if process.stdout else b"")
            if ready is None:
                raise SystemExit("the demo did not start")
            yield process, ready[1].decode()
        finally:
            process.send_signal(signal.SIGINT)


def soak(address: str, photos: Sequence[Path], uploads: int, visitors: int) -> dict[str, Any]:
    """What visitors at once meet with.

    Args:
        address: host and port.
        photos: sent again and again if they are fewer than the uploads.
        uploads: by all visitors together.
        visitors: each with a page of its own.
    """
    queue = list(islice(cycle(photos), uploads))
    start = time.perf_counter()
    with ThreadPoolExecutor(visitors) as pool:
        visits = [pool.submit(visit, address, queue[number::visitors]) for number in range(visitors)]
        seconds = [taken for done in visits for taken in done.result()]
    answered = [taken for taken in seconds if taken is not None]
    return {
        "uploads": uploads,
        "visitors": visitors,
        "failed": len(seconds) - len(answered),
        "seconds": round(time.perf_counter() - start, 1),
        "answer_s": {"median": round(statistics.median(answered or [0]), 2), "most": round(max(answered or [0]), 2)},
    }


def visit(address: str, photos: Sequence[Path]) -> list[float | None]:
    """Seconds to each photo's answer; None where none came."""
    session = secrets.token_hex(8)
    config = json.loads(request(address, "GET", "/config"))
    ask = partial(call, address, session, {item["api_name"]: item["id"] for item in config["dependencies"]})
    choice = {str(item["props"].get("elem_id")): item["props"].get("value") for item in config["components"]}
    model = [choice[name] for name in ("backbone", "feature", "layer", "registers")]
    view = [choice["method"], True, 0, 1, "patches", False]
    seconds: list[float | None] = []
    with closing(http.client.HTTPConnection(address, timeout=_SECONDS)) as heartbeat:
        heartbeat.request("GET", f"/gradio_api/heartbeat/{session}")  # what keeps a visitor's features
        for photo in photos:
            start = time.perf_counter()
            is_answered = looks_at(partial(upload, address), ask, photo, model, view)
            seconds.append(time.perf_counter() - start if is_answered else None)
    return seconds


def looks_at(
    send: Callable[[Path], str], ask: Callable[..., list[Any]], photo: Path, model: list[Any], view: list[Any]
) -> bool:
    """Whether a photo gets its boxes and its attention map."""
    try:
        kept = {"path": send(photo), "orig_name": photo.name, "meta": {"_type": "gradio.FileData"}}
        ask("receive", [kept, None])
        answer = ask("run", [None, *model, *view])
        attention = ask("attend", [None, *model])
    except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
        print(f"{photo.name}: {error!r}", file=sys.stderr)
        return False
    return photo.name in str(answer[8]) and attention[0] is not None


def upload(address: str, photo: Path) -> str:
    """Where the demo keeps it."""
    head = f'--mark\r\nContent-Disposition: form-data; name="files"; filename="{photo.name}"\r\n\r\n'
    body = head.encode() + photo.read_bytes() + b"\r\n--mark--\r\n"
    kind = {"Content-Type": "multipart/form-data; boundary=mark"}
    return str(json.loads(request(address, "POST", "/gradio_api/upload", body, kind))[0])


def call(address: str, session: str, functions: dict[str, int], name: str, values: list[Any]) -> list[Any]:
    """What a function of the page answers, through the queue."""
    body = json.dumps({"data": values, "fn_index": functions[name], "session_hash": session}).encode()
    request(address, "POST", "/gradio_api/queue/join", body, {"Content-Type": "application/json"})
    with closing(http.client.HTTPConnection(address, timeout=_SECONDS)) as connection:
        connection.request("GET", f"/gradio_api/queue/data?session_hash={session}")
        for line in connection.getresponse():
            message = json.loads(line.removeprefix(b"data:")) if line.startswith(b"data:") else {}
            if message.get("msg") == "process_completed":
                return list(message["output"]["data"])
    raise ValueError(f"{name} was not answered")


def request(address: str, method: str, path: str, body: bytes | None = None, headers: dict[str, str] = {}) -> bytes:  # noqa: B006
    """The body of an answer."""
    with closing(http.client.HTTPConnection(address, timeout=_SECONDS)) as connection:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        text = response.read()
    if response.status != 200:
        raise ValueError(f"{path}: {response.status} {text[:200].decode(errors='replace')}")
    return text


def held(process: int) -> dict[str, int]:
    """Memory and open files of a process, where /proc tells."""
    folder = Path("/proc") / str(process)
    if not folder.is_dir():
        return {}
    memory = re.search(r"VmRSS:\s*(\d+) kB", (folder / "status").read_text())
    return {"memory_mb": int(memory[1]) // 1024 if memory else 0, "open_files": len(list((folder / "fd").iterdir()))}


if __name__ == "__main__":
    sys.exit(main())
