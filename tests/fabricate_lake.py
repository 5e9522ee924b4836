"""Shards, tables and a store made by hand, as other people's programs write them."""

import contextlib
import io
import json
import tarfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

HF = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, members: Mapping[str, bytes], form: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def struct_table(images: Mapping[str | None, bytes], column: str = "image") -> pa.Table:
    """Hugging Face's layout, with a label beside it."""
    cells = [{"bytes": content, "path": name} for name, content in images.items()]
    return pa.table({column: pa.array(cells, HF), "label": pa.array(range(len(cells)), pa.int64())})


def write_parquet(path: Path, table: pa.Table, rows: int = 2) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=rows)
    return path


def write_arrow(path: Path, table: pa.Table, *, stream: bool, rows: int = 2) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        pa.OSFile(str(path), "wb") as sink,
        (pa.ipc.new_stream if stream else pa.ipc.new_file)(sink, table.schema) as writer,
    ):
        writer.write_table(table, max_chunksize=rows)
    return path


def write_saved(folder: Path, table: pa.Table, shards: int = 2) -> Path:
    """What `Dataset.save_to_disk` writes, and a cache as `Dataset.map` leaves it there."""
    size = -(-len(table) // shards)
    names = [f"data-{number:05}-of-{shards:05}.arrow" for number in range(shards)]
    for number, name in enumerate(names):
        write_arrow(folder / name, table.slice(number * size, size), stream=True)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text(json.dumps({"features": {"image": {"_type": "Image"}}}))
    write_arrow(folder / "cache-0123456789abcdef.arrow", pa.table({"label": [1, 2]}), stream=True)
    return folder


class S3Server:
    """moto's S3 on this machine, in which some requests meet what befalls real ones.

    Attributes:
        address: host and port.
        requests: method, path and range of what was asked.
        forbidden: parts of paths whose objects nobody may read.
        slow: parts of paths whose objects come after so many seconds.
    """

    def __init__(self) -> None:
        from moto.server import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import make_server

        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True)
        self.address = f"127.0.0.1:{self._server.port}"
        self.requests: list[tuple[str, str, str]] = []
        self.forbidden: set[str] = set()
        self.slow: dict[str, float] = {}
        self.at_once = self.most_at_once = 0
        self._lock = threading.Lock()

    def _answer(self, environ: dict[str, Any], start: Any) -> Any:
        path, method = environ["PATH_INFO"], environ["REQUEST_METHOD"]
        self.requests.append((method, path, environ.get("HTTP_RANGE", "")))
        if any(part in path for part in self.forbidden):
            start("403 Forbidden", [("Content-Type", "application/xml")])
            return [b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"]
        with self._lock:
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            if method == "GET":
                time.sleep(next((seconds for part, seconds in self.slow.items() if part in path), 0))
            return self._app(environ, start)
        finally:
            with self._lock:
                self.at_once -= 1

    @contextlib.contextmanager
    def running(self) -> Iterator["S3Server"]:
        thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            thread.join()

    def uri(self, path: str) -> str:
        return f"s3://{path}?scheme=http&endpoint_override={self.address}&region=us-east-1"

    def put(self, path: str, content: bytes) -> None:
        self._store.create_dir(path.partition("/")[0])
        with self._store.open_output_stream(path) as stream:
            stream.write(content)

    def remove(self, path: str) -> None:
        self._store.delete_file(path)

    @property
    def _store(self) -> Any:
        from pyarrow import fs

        return fs.S3FileSystem(
            endpoint_override=self.address, scheme="http", region="us-east-1", allow_bucket_creation=True
        )


def write_video(path: Path, codec: str = "libx264", frames: int = 90, options: dict[str, str] | None = None) -> Path:
    """A frame shows its number, in white bars for ones and black ones for zeros, the lowest digit on the left."""
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=30)
        stream.width, stream.height, stream.pix_fmt, stream.options = 160, 96, "yuv420p", {"g": "25"}
        for number in range(frames):
            bars = [255 * (number >> digit & 1) for digit in range(8)]
            pixels = np.tile(np.repeat(bars, 20)[:, None].astype(np.uint8), (96, 1, 3))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path
