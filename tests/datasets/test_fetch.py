import contextlib
import hashlib
import io
import json
import re
import stat
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.request import Request

import pytest
from filelock import FileLock
from PIL import Image

from lostreg.datasets import coco20k, download, fetch
from lostreg.datasets.voc import load_voc
from lostreg.errors import DatasetError, OptionError

ENDLESS = 64 << 20


class Site:
    """A web server on loopback whose faults a test can choose."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.cuts: dict[str, list[int]] = {}  # per path: send so many bytes, then hang up
        self.errors: dict[str, list[int]] = {}  # per path: answer with these statuses first
        self.honours_range = True
        self.tells_length = True
        self.redirects: dict[str, str] = {}  # per path: where to
        self.endless: set[str] = set()  # paths whose body, also that of a redirect, is longer than anyone should read
        self.sent = 0  # bytes of such bodies
        self.log: list[tuple[str, str | None]] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self.handler())
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def handler(site) -> type[BaseHTTPRequestHandler]:  # noqa: C901, N805 - self is the handler below
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                wanted = self.headers["Range"]
                site.log.append((self.path, wanted))
                if self.path in site.redirects:
                    self.send_response(302)
                    self.send_header("Location", site.redirects[self.path])
                    self.end_headers()
                    self.send_endless()
                elif site.errors.get(self.path):
                    self.send_error(site.errors[self.path].pop(0))
                elif self.path not in site.files:
                    self.send_error(404)
                else:
                    self.send_content(site.files[self.path], wanted if site.honours_range else None)

            def send_content(self, content: bytes, wanted: str | None) -> None:
                start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted else 0  # type: ignore[index]
                if start and start >= len(content):
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{len(content)}")
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                self.send_response(206 if wanted else 200)
                if wanted:
                    self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
                body = content[start:]
                if site.tells_length:
                    self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.send_endless()
                cuts = site.cuts.get(self.path)
                self.wfile.write(body[: cuts.pop(0)] if cuts else body)

            def send_endless(self) -> None:
                with contextlib.suppress(OSError):  # until the other side hangs up
                    while self.path in site.endless and site.sent < ENDLESS:
                        site.sent += self.wfile.write(bytes(1 << 16))

            def log_message(self, *args: Any) -> None:
                pass

        return Handler


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(download, "RETRY_WAIT_S", 0.0)
    site = Site()
    thread = threading.Thread(target=site.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield site
    site.server.shutdown()
    thread.join()
    site.server.server_close()


CONTENT = bytes(range(256)) * 40


def get(site: Site, folder: Path, **options: Any) -> Path:
    target = folder / "file.bin"
    settings = {"check": lambda part: "", "at_most": len(CONTENT), "progress": False} | options
    download.download(f"{site.url}/file.bin", target, **settings)
    return target


def test_a_plain_download_leaves_no_part(site: Site, tmp_path: Path) -> None:
    site.files["/file.bin"] = CONTENT
    assert get(site, tmp_path).read_bytes() == CONTENT
    assert [path.name for path in tmp_path.iterdir()] == ["file.bin"]


def test_cut_connections_are_resumed(site: Site, tmp_path: Path) -> None:
    site.files["/file.bin"] = CONTENT
    site.cuts["/file.bin"] = [1000, 500]
    assert get(site, tmp_path).read_bytes() == CONTENT
    assert [wanted for _, wanted in site.log] == [None, "bytes=1000-", "bytes=1500-"]


def test_a_part_of_an_earlier_run_is_resumed(site: Site, tmp_path: Path) -> None:
    site.files["/file.bin"] = CONTENT
    (tmp_path / "file.bin.part").write_bytes(CONTENT[:7000])
    assert get(site, tmp_path).read_bytes() == CONTENT
    assert site.log == [("/file.bin", "bytes=7000-")]


def test_a_server_without_ranges_is_read_from_the_start(site: Site, tmp_path: Path) -> None:
    site.files["/file.bin"] = CONTENT
    site.honours_range = False
    (tmp_path / "file.bin.part").write_bytes(b"x" * 7000)
    assert get(site, tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("size", [len(CONTENT), len(CONTENT) + 5])
def test_a_part_that_is_complete_or_too_long(site: Site, tmp_path: Path, size: int) -> None:
    site.files["/file.bin"] = CONTENT
    (tmp_path / "file.bin.part").write_bytes((CONTENT + b"extra")[:size])
    assert get(site, tmp_path).read_bytes() == CONTENT
    assert len(site.log) == (1 if size == len(CONTENT) else 2)


def test_giving_up_says_what_is_there_and_a_second_call_goes_on(site: Site, tmp_path: Path) -> None:
    site.files["/file.bin"] = CONTENT
    site.cuts["/file.bin"] = [100, 100, 100]
    with pytest.raises(DatasetError, match=r"after 3 tries: got 300 of 10240 bytes; 300 bytes are in .*part"):
        get(site, tmp_path, tries=3)
    assert not (tmp_path / "file.bin").exists()
    assert get(site, tmp_path).read_bytes() == CONTENT
    assert site.log[-1] == ("/file.bin", "bytes=300-")


def test_without_resume_every_try_starts_over_and_cleans_up(site: Site, tmp_path: Path) -> None:
    site.files["/file.bin"] = CONTENT
    site.cuts["/file.bin"] = [100, 100]
    with pytest.raises(DatasetError, match="after 2 tries"):
        get(site, tmp_path, tries=2, resume=False)
    assert site.log == [("/file.bin", None)] * 2
    assert list(tmp_path.iterdir()) == []


def test_a_busy_server_is_asked_again_but_a_refusal_is_final(site: Site, tmp_path: Path) -> None:
    site.files["/file.bin"] = CONTENT
    site.errors["/file.bin"] = [503, 429]
    assert get(site, tmp_path).read_bytes() == CONTENT
    site.log.clear()
    site.errors["/file.bin"] = [403, 403]
    with pytest.raises(DatasetError, match="HTTP 403"):
        get(site, tmp_path)
    assert len(site.log) == 1


@pytest.mark.parametrize("resume", [True, False])
def test_a_file_that_is_not_the_one_expected_is_removed(site: Site, tmp_path: Path, resume: bool) -> None:
    site.files["/file.bin"] = b"<html>please log in</html>"
    with pytest.raises(DatasetError, match=r"/file\.bin begins with b'<ht'; the download was removed"):
        get(site, tmp_path, check=lambda part: f"begins with {part.read_bytes()[:3]!r}", resume=resume)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_said_to_be_too_large_is_not_read(site: Site, tmp_path: Path) -> None:
    site.files["/file.bin"] = CONTENT
    with pytest.raises(DatasetError, match=r"refused .*: expected at most 10,239 bytes, the server has 10,240"):
        get(site, tmp_path, at_most=len(CONTENT) - 1)
    assert list(tmp_path.iterdir()) == []
    assert len(site.log) == 1
    assert get(site, tmp_path, at_most=len(CONTENT)).read_bytes() == CONTENT


def test_what_is_resumed_is_bounded_as_a_whole(site: Site, tmp_path: Path) -> None:
    site.files["/file.bin"] = CONTENT
    (tmp_path / "file.bin.part").write_bytes(CONTENT[:7000])
    with pytest.raises(DatasetError, match=r"expected at most 9,000 bytes, the server has 10,240"):
        get(site, tmp_path, at_most=9000)


@pytest.mark.parametrize("resume", [True, False])
def test_a_body_without_an_end_is_left(site: Site, tmp_path: Path, resume: bool) -> None:
    site.files["/file.bin"] = b""
    site.endless.add("/file.bin")
    site.tells_length = False
    with pytest.raises(DatasetError, match=r"refused .*: expected at most 200,000 bytes, the server sends more"):
        get(site, tmp_path, at_most=200_000, resume=resume)
    assert list(tmp_path.iterdir()) == []
    assert site.sent < ENDLESS


def test_a_file_whose_length_is_not_told_is_taken_within_bounds(site: Site, tmp_path: Path) -> None:
    site.files["/file.bin"] = CONTENT
    site.tells_length = False
    assert get(site, tmp_path).read_bytes() == CONTENT


def test_a_redirect_is_followed_and_its_own_body_not_read(site: Site, tmp_path: Path) -> None:
    site.files["/moved.bin"] = CONTENT
    site.redirects["/file.bin"] = f"{site.url}/moved.bin"
    site.endless.add("/file.bin")
    assert get(site, tmp_path).read_bytes() == CONTENT
    assert site.sent < ENDLESS


@pytest.mark.parametrize(
    "to", ["ftp://127.0.0.1/file.bin", "file:///etc/hostname", "http://[half/file.bin", "/file.bin"]
)
def test_redirects_that_lead_nowhere_good_are_refused_in_one_line(site: Site, tmp_path: Path, to: str) -> None:
    site.redirects["/file.bin"] = to
    with pytest.raises(DatasetError, match=r"cannot download http://.*/file\.bin: ") as caught:
        get(site, tmp_path)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("origin", "to", "allowed"),
    [("https", "https", True), ("http", "https", True), ("http", "http", True), ("https", "http", False)]
    + [(origin, "ftp", False) for origin in ("http", "https")],
)
def test_https_is_not_left(origin: str, to: str, allowed: bool) -> None:
    def redirect() -> Request | None:
        request = Request(f"{origin}://a.example/x")
        return download._Redirects().redirect_request(request, io.BytesIO(), 302, "Found", {}, f"{to}://b.example/y")

    if allowed:
        assert redirect().full_url == f"{to}://b.example/y"  # type: ignore[union-attr]
    else:
        with pytest.raises(DatasetError, match=rf"expected a redirect to (http or )?https, got {to}://b\.example/y"):
            redirect()


def test_a_link_in_place_of_the_unfinished_file_is_not_written_through(site: Site, tmp_path: Path) -> None:
    site.files["/file.bin"] = CONTENT
    (tmp_path / "mine").write_bytes(b"mine")
    (tmp_path / "file.bin.part").symlink_to(tmp_path / "mine")
    with pytest.raises(DatasetError, match=r"file\.bin\.part is a symbolic link"):
        get(site, tmp_path)
    assert (tmp_path / "mine").read_bytes() == b"mine"


def test_nobody_at_the_address(site: Site, tmp_path: Path) -> None:
    spare = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    port = spare.server_address[1]
    spare.server_close()
    with pytest.raises(DatasetError, match=r"cannot download .* after 5 tries: .*refused"):
        fetch.fetch("voc12", tmp_path, mirror=f"http://127.0.0.1:{port}", progress=False)


# --------------------------------------------------------------------------------------------- VOC

XML = (
    b"<annotation><object><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>5</xmax><ymax>5</ymax></bndbox>"
    b"</object></annotation>"
)


def tar_of(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def voc_tar(year: int, split: str, stems: str) -> bytes:
    base = f"VOCdevkit/VOC{year}"
    files = {f"{base}/Annotations/{stem}.xml": XML for stem in stems}
    files[f"{base}/ImageSets/Main/{split}.txt"] = "\n".join(stems).encode()
    return tar_of(files | {f"{base}/JPEGImages/{stem}.jpg": b"\xff\xd8" + b"." * 5000 for stem in stems})


def publish(site: Site, monkeypatch: pytest.MonkeyPatch, key: str, content: bytes) -> str:
    """Serve an archive under its real name and let the table know its size and hash."""
    name, _, split = key.partition(" ")
    archive = archive_of(fetch.VOC_ARCHIVES[name][split].path, content)
    monkeypatch.setitem(fetch.VOC_ARCHIVES[name], split, archive)  # type: ignore[arg-type]
    path = f"/mirror/{Path(archive.path).name}"
    site.files[path] = content
    return path


def archive_of(path: str, content: bytes) -> fetch.Archive:
    return fetch.Archive(path, len(content), hashlib.sha256(content).hexdigest())


def fetch_voc(site: Site, root: Path, name: str = "voc12") -> Path:
    return fetch.fetch(name, root, mirror=f"{site.url}/mirror/", progress=False)


def names_in(root: Path) -> set[str]:
    return {path.name for path in root.iterdir() if not path.name.endswith(".lock")}


def test_voc07_is_two_archives_in_one_folder(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(site, monkeypatch, "voc07 trainval", voc_tar(2007, "trainval", "abc"))
    publish(site, monkeypatch, "voc07 test", voc_tar(2007, "test", "de"))
    folder = fetch_voc(site, tmp_path / "new/root", "voc07")
    assert folder == tmp_path / "new/root/VOCdevkit/VOC2007"
    assert [len(load_voc(folder, split)) for split in ("trainval", "test")] == [3, 2]
    assert names_in(tmp_path / "new/root") == {"VOCdevkit"}
    requests = len(site.log)
    capsys.readouterr()
    assert fetch_voc(site, tmp_path / "new/root", "voc07") == folder
    assert len(site.log) == requests
    output = capsys.readouterr()
    assert output.out == ""
    assert "nothing to do" in output.err


def test_only_the_archive_that_is_missing_is_downloaded(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(site, monkeypatch, "voc07 trainval", voc_tar(2007, "trainval", "abc"))
    test = publish(site, monkeypatch, "voc07 test", voc_tar(2007, "test", "de"))
    folder = fetch_voc(site, tmp_path, "voc07")
    (folder / "JPEGImages/d.jpg").unlink()
    site.log.clear()
    fetch_voc(site, tmp_path, "voc07")
    assert [path for path, _ in site.log] == [test]
    assert (folder / "JPEGImages/d.jpg").is_file()


def test_a_cut_archive_is_resumed_by_the_next_fetch(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = publish(site, monkeypatch, "voc12 trainval", voc_tar(2012, "trainval", "ab"))
    site.cuts[path] = [512] * 5
    with pytest.raises(DatasetError, match=r"2560 bytes are in .* run the same command again"):
        fetch_voc(site, tmp_path)
    assert len(load_voc(fetch_voc(site, tmp_path))) == 2
    assert site.log[-1] == (path, "bytes=2560-")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda good: good[:-1] + b"!", "expected SHA-256 [0-9a-f]{64}, found [0-9a-f]{64}"),
        (lambda good: good[:-1], "expected 30,720 bytes, found 30,719"),
        (lambda good: good + b"!", "expected at most 30,720 bytes, the server has 30,721"),
    ],
)
def test_another_archive_than_the_published_one_is_refused(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, message: str
) -> None:
    path = publish(site, monkeypatch, "voc12 trainval", voc_tar(2012, "trainval", "abcd"))
    good = site.files[path]
    site.files[path] = change(good)
    with pytest.raises(DatasetError, match=message):
        fetch_voc(site, tmp_path)
    assert names_in(tmp_path) == {"VOCdevkit"}
    assert not [path for path in (tmp_path / "VOCdevkit").rglob("*") if path.is_file()]
    site.files[path] = good
    assert len(load_voc(fetch_voc(site, tmp_path))) == 4


def test_an_archive_put_there_by_hand_is_used_and_kept(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = publish(site, monkeypatch, "voc12 trainval", voc_tar(2012, "trainval", "ab"))
    archive = tmp_path / Path(path).name
    archive.write_bytes(site.files[path])
    fetch_voc(site, tmp_path)
    assert site.log == []
    assert names_in(tmp_path) == {archive.name, "VOCdevkit"}


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"half", "expected 20,480 bytes, found 4"), (bytes(20_480), "expected SHA-256 [0-9a-f]{64}, found [0-9a-f]{64}")],
)
def test_a_damaged_archive_put_there_is_refused_and_kept(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, message: str
) -> None:
    path = publish(site, monkeypatch, "voc12 trainval", voc_tar(2012, "trainval", "ab"))
    assert len(site.files[path]) == 20_480
    archive = tmp_path / Path(path).name
    archive.write_bytes(content)
    with pytest.raises(DatasetError, match=rf"{archive} is not the file published: {message}; remove it to have it"):
        fetch_voc(site, tmp_path)
    assert archive.read_bytes() == content
    assert site.log == []


LINKS = ["VOCdevkit", "VOCdevkit/VOC2012", "VOCdevkit/VOC2012/JPEGImages", "VOCdevkit/VOC2012/ImageSets/Main"]


@pytest.mark.parametrize("place", [*LINKS, ".unpack-VOCtrainval_11-May-2012.tar", ".fetch-voc12.lock"])
def test_nothing_is_written_through_a_link_in_the_data_folder(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    publish(site, monkeypatch, "voc12 trainval", voc_tar(2012, "trainval", "ab"))
    outside, link = tmp_path / "outside", tmp_path / "root" / place
    outside.mkdir()
    link.parent.mkdir(parents=True)
    link.symlink_to(outside)
    with pytest.raises(DatasetError, match=rf"{link} is a symbolic link"):
        fetch_voc(site, tmp_path / "root")
    assert list(outside.iterdir()) == []


def test_a_link_in_place_of_a_file_is_replaced_and_the_root_may_be_one(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(site, monkeypatch, "voc12 trainval", voc_tar(2012, "trainval", "ab"))
    (tmp_path / "disk/VOCdevkit/VOC2012/JPEGImages").mkdir(parents=True)
    (tmp_path / "mine").write_bytes(b"mine")
    (tmp_path / "disk/VOCdevkit/VOC2012/JPEGImages/a.jpg").symlink_to(tmp_path / "mine")
    (tmp_path / "root").symlink_to(tmp_path / "disk")
    assert len(load_voc(fetch_voc(site, tmp_path / "root"))) == 2
    assert (tmp_path / "mine").read_bytes() == b"mine"
    assert not (tmp_path / "disk/VOCdevkit/VOC2012/JPEGImages/a.jpg").is_symlink()


@pytest.mark.parametrize("name", ["../outside.txt", "/outside.txt", "VOCdevkit/../../outside.txt"])
def test_entries_that_leave_the_folder_are_refused(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    publish(site, monkeypatch, "voc12 trainval", tar_of({name: b"gotcha"}))
    with pytest.raises(DatasetError, match=f"entry '{re.escape(name)}' leaves the folder"):
        fetch_voc(site, tmp_path / "root")
    assert not list(tmp_path.rglob("outside.txt"))
    assert not list(tmp_path.rglob(".unpack*"))


def test_links_in_an_archive_are_not_made(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO(voc_tar(2012, "trainval", "ab"))
    with tarfile.open(fileobj=buffer, mode="a") as tar:
        for number, kind in enumerate((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE)):
            link = tarfile.TarInfo(f"VOCdevkit/link{number}")
            link.type, link.linkname = kind, "/etc"
            tar.addfile(link)
        tar.addfile(tarfile.TarInfo("."))  # a file in the folder's own place
    publish(site, monkeypatch, "voc12 trainval", buffer.getvalue())
    fetch_voc(site, tmp_path)
    assert names_in(tmp_path) == {"VOCdevkit"}
    assert names_in(tmp_path / "VOCdevkit") == {"VOC2012"}


def test_files_of_an_archive_get_no_rights_beyond_reading_and_writing(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffer = io.BytesIO(voc_tar(2012, "trainval", "ab"))
    with tarfile.open(fileobj=buffer, mode="a") as tar:
        member = tarfile.TarInfo("VOCdevkit/VOC2012/tool")
        member.mode = 0o6777
        tar.addfile(member)
    publish(site, monkeypatch, "voc12 trainval", buffer.getvalue())
    assert stat.S_IMODE((fetch_voc(site, tmp_path) / "tool").stat().st_mode) == 0o755


def test_something_that_is_no_tar_is_an_error(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(site, monkeypatch, "voc12 trainval", b"right hash, wrong kind of file" * 99)
    with pytest.raises(DatasetError, match="cannot unpack"):
        fetch_voc(site, tmp_path)


def test_an_archive_without_its_images_is_an_error(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(site, monkeypatch, "voc12 trainval", tar_of({"VOCdevkit/VOC2012/ImageSets/Main/trainval.txt": b"a"}))
    with pytest.raises(DatasetError, match="did not bring the whole split 'trainval'"):
        fetch_voc(site, tmp_path)


# ---------------------------------------------------------------------------------------- COCO 20k

ZIP_PATH = "/annotations/annotations_trainval2014.zip"
NAMED = "annotations/instances_train2014.json"


def zip_of(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def image_path(image_id: int) -> str:
    return f"/train2014/COCO_train2014_{image_id:012d}.jpg"


def jpeg(number: int, width: int = 40, height: int = 30) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((width, height), 9 + number).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture
def coco_site(site: Site, monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.setattr(coco20k, "coco20k_ids", lambda: tuple(range(1, 13)))
    images = [{"id": n, "file_name": Path(image_path(n)).name, "width": 40, "height": 30} for n in range(1, 14)]
    publish_annotations(site, monkeypatch, images)
    site.files |= {image_path(n): jpeg(n) for n in range(1, 14)}
    return site


def publish_annotations(site: Site, monkeypatch: pytest.MonkeyPatch, images: list[Any]) -> None:
    boxes = [{"id": 1, "image_id": 1, "bbox": [1, 2, 3, 4]}]
    content = json.dumps({"images": images, "annotations": boxes}).encode()
    site.files[ZIP_PATH] = zip_of({NAMED: content, "annotations/captions.json": b"{}"})
    monkeypatch.setattr(coco20k, "ANNOTATIONS_BYTES", len(content))
    monkeypatch.setattr(fetch, "COCO_ARCHIVE", archive_of(ZIP_PATH[1:], site.files[ZIP_PATH]))


def fetch_coco(site: Site, root: Path, **options: Any) -> Path:
    return fetch.fetch("coco20k", root, mirror=site.url, progress=False, **options)


def images_in(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "coco/train2014").iterdir())


def test_coco20k_gets_the_listed_images_and_one_annotation_file(
    coco_site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fetch_coco(coco_site, tmp_path) == tmp_path / "coco"
    assert names_in(tmp_path / "coco/annotations") == {"instances_train2014.json"}
    assert images_in(tmp_path) == [Path(image_path(n)).name for n in range(1, 13)]
    for n in range(1, 13):
        assert (tmp_path / f"coco{image_path(n)}").read_bytes() == coco_site.files[image_path(n)]
    requests = len(coco_site.log)
    fetch_coco(coco_site, tmp_path)
    fetch_coco(coco_site, tmp_path / "coco")
    assert len(coco_site.log) == requests
    assert capsys.readouterr().err.count("nothing to do") == 2


def test_only_missing_images_are_downloaded(coco_site: Site, tmp_path: Path) -> None:
    fetch_coco(coco_site, tmp_path)
    (tmp_path / f"coco{image_path(3)}").unlink()
    (tmp_path / f"coco{image_path(3)}.part").write_bytes(b"\xff\xd8 of an earlier, cut run")
    coco_site.log.clear()
    fetch_coco(coco_site, tmp_path)
    assert coco_site.log == [(image_path(3), None)]
    assert (tmp_path / f"coco{image_path(3)}").read_bytes() == coco_site.files[image_path(3)]
    assert len(images_in(tmp_path)) == 12


def test_failed_images_are_named_and_the_others_kept(coco_site: Site, tmp_path: Path) -> None:
    del coco_site.files[image_path(4)]
    good, coco_site.files[image_path(9)] = coco_site.files[image_path(9)], b"<html>"
    coco_site.cuts[image_path(5)] = [10, 10]
    coco_site.errors[image_path(6)] = [503]
    with pytest.raises(DatasetError, match=r"2 of 12 images .*all others are kept") as caught:
        fetch_coco(coco_site, tmp_path, workers=3)
    assert f"{image_path(4)}: HTTP 404" in str(caught.value)
    assert f"{image_path(9)} is not a complete JPEG: not a readable image (cannot identify" in str(caught.value)
    assert len(images_in(tmp_path)) == 10
    coco_site.files |= {image_path(4): good, image_path(9): good}
    fetch_coco(coco_site, tmp_path)
    assert len(images_in(tmp_path)) == 12


def test_a_server_that_has_nothing_is_left_alone_soon(
    coco_site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "GIVE_UP_AFTER", 3)
    monkeypatch.setattr(coco20k, "coco20k_ids", lambda: tuple(range(1001, 2001)))
    monkeypatch.setattr(coco20k, "coco20k_sizes", lambda annotations: dict.fromkeys(range(1001, 2001), (40, 30)))
    with pytest.raises(DatasetError, match="the last 3 in a row, so the rest was not tried"):
        fetch_coco(coco_site, tmp_path, workers=1)
    assert len(coco_site.log) < 900


def test_an_interrupt_stops_the_workers_and_leaves_no_part(
    coco_site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coco20k, "coco20k_ids", lambda: tuple(range(1, 14)))

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(fetch, "as_completed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch_coco(coco_site, tmp_path, workers=1)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("fetch")]
    assert not [name for name in images_in(tmp_path) if name.endswith(".part")]


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (jpeg(1)[:-200], "is not a complete JPEG: .*truncated"),
        (jpeg(1, 30, 40), "has 30x40 pixels, expected 40x30 as the annotations say"),
        (jpeg(1, 41, 30), "has 41x30 pixels, expected 40x30"),
        (b"", "is not a complete JPEG"),
        (jpeg(1) + bytes(4 << 20), r"expected at most 4,194,304 bytes, the server has 4,19\d,\d{3}"),
        (
            jpeg(1).replace(b"\x00\x1e\x00\x28", b"\xff\xdc\xff\xdc"),
            "has 65500x65500 pixels|could be decompression bomb",
        ),
    ],
)
def test_images_are_held_against_the_annotations(coco_site: Site, tmp_path: Path, content: bytes, fault: str) -> None:
    coco_site.files[image_path(7)] = content
    with pytest.raises(DatasetError, match=f"1 of 12 images could not be downloaded .*{fault}"):
        fetch_coco(coco_site, tmp_path)
    assert len(images_in(tmp_path)) == 11


def test_a_png_in_place_of_a_jpeg_is_refused(coco_site: Site, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30)).save(buffer, "PNG")
    coco_site.files[image_path(7)] = buffer.getvalue()
    with pytest.raises(DatasetError, match="is not a complete JPEG"):
        fetch_coco(coco_site, tmp_path)


def test_an_empty_image_counts_as_missing(coco_site: Site, tmp_path: Path) -> None:
    fetch_coco(coco_site, tmp_path)
    (tmp_path / f"coco{image_path(3)}").write_bytes(b"")
    fetch_coco(coco_site, tmp_path)
    assert (tmp_path / f"coco{image_path(3)}").read_bytes() == coco_site.files[image_path(3)]


@pytest.mark.parametrize("content", [b"not a zip", zip_of({NAMED: b'{"images": [{"id": 1}]}'})])
def test_forged_annotations_are_refused(coco_site: Site, tmp_path: Path, content: bytes) -> None:
    good = coco_site.files[ZIP_PATH]
    for forged in (content, content.ljust(len(good), b"\0")):
        coco_site.files[ZIP_PATH] = forged
        with pytest.raises(DatasetError, match=rf"{ZIP_PATH} is not the file published: .*; the download was removed"):
            fetch_coco(coco_site, tmp_path)
        assert names_in(tmp_path / "coco/annotations") == set()
    coco_site.files[ZIP_PATH] = good
    fetch_coco(coco_site, tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not a zip", "cannot unpack .*: File is not a zip file"),
        (zip_of({"annotations/captions.json": b"{}"}), "cannot unpack .*There is no item named"),
        (zip_of({NAMED: b"0123456789"}).replace(b"0123456789", b"0123456780"), "cannot unpack .*Bad CRC-32"),
        (zip_of({NAMED: bytes(11)}), "is not the file published: expected 10 bytes, found 11"),
    ],
)
def test_an_archive_that_does_not_unpack_to_what_is_expected_leaves_nothing_in_place(
    coco_site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, message: str
) -> None:
    coco_site.files[ZIP_PATH] = content
    monkeypatch.setattr(fetch, "COCO_ARCHIVE", archive_of(ZIP_PATH[1:], content))
    monkeypatch.setattr(coco20k, "ANNOTATIONS_BYTES", 10)
    with pytest.raises(DatasetError, match=message):
        fetch_coco(coco_site, tmp_path)
    assert names_in(tmp_path / "coco/annotations") == {Path(ZIP_PATH).name}


def test_an_annotations_archive_put_there_is_checked_used_and_kept(coco_site: Site, tmp_path: Path) -> None:
    archive = tmp_path / f"coco{ZIP_PATH}"
    archive.parent.mkdir(parents=True)
    archive.write_bytes(b"forged")
    with pytest.raises(DatasetError, match=rf"{archive} is not the file published.*; remove it to have it downloaded"):
        fetch_coco(coco_site, tmp_path)
    assert archive.read_bytes() == b"forged"
    archive.write_bytes(coco_site.files.pop(ZIP_PATH))
    fetch_coco(coco_site, tmp_path)
    assert names_in(archive.parent) == {archive.name, Path(NAMED).name}


def test_other_annotations_than_the_published_ones_are_refused_and_kept(coco_site: Site, tmp_path: Path) -> None:
    path = tmp_path / "coco" / NAMED
    path.parent.mkdir(parents=True)
    path.write_bytes(b'{"images": []}')
    with pytest.raises(
        DatasetError, match=rf"{path} is not the file published: expected [\d,]+ bytes, found 14; remove"
    ):
        fetch_coco(coco_site, tmp_path)
    assert path.read_bytes() == b'{"images": []}'
    assert coco_site.log == []


def test_annotations_without_the_sizes_of_the_images_are_an_error(
    coco_site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [{"id": n, "file_name": f"{n}.jpg", "width": 40, "height": 30} for n in range(1, 12)]
    publish_annotations(coco_site, monkeypatch, [*images, {"id": 12, "file_name": "12.jpg", "height": 30}])
    with pytest.raises(DatasetError, match=r"lacks width and height of 1 of the 12 images wanted: 12"):
        fetch_coco(coco_site, tmp_path)


@pytest.mark.parametrize(
    "place", ["coco", "coco/annotations", "coco/train2014", f"coco/{NAMED}.part", f"coco{ZIP_PATH}.part"]
)
def test_coco_is_written_through_no_link(coco_site: Site, tmp_path: Path, place: str) -> None:
    outside, link = tmp_path / "outside", tmp_path / "root" / place
    outside.mkdir()
    link.parent.mkdir(parents=True)
    link.symlink_to(outside / "new" if place.endswith(".part") else outside)
    with pytest.raises(DatasetError, match=rf"{link} is a symbolic link"):
        fetch_coco(coco_site, tmp_path / "root")
    assert list(outside.iterdir()) == []


def test_what_is_complete_may_lie_behind_a_link(coco_site: Site, tmp_path: Path) -> None:
    fetch_coco(coco_site, tmp_path)
    (tmp_path / "coco/train2014").rename(tmp_path / "disk")
    (tmp_path / "coco/train2014").symlink_to(tmp_path / "disk")
    assert fetch_coco(coco_site, tmp_path) == tmp_path / "coco"


def test_the_official_addresses_are_https(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[str] = []

    def refuse(url: str, *args: Any, **options: Any) -> None:
        asked.append(url)
        raise DatasetError("no network here")

    monkeypatch.setattr(fetch, "download", refuse)
    for name in ("voc07", "voc12", "coco20k"):
        with pytest.raises(DatasetError, match="no network here"):
            fetch.fetch(name, tmp_path, progress=False)
    assert asked == [
        "https://thor.robots.ox.ac.uk/pascal/VOC/voc2007/VOCtrainval_06-Nov-2007.tar",
        "https://thor.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
        "https://s3.amazonaws.com/images.cocodataset.org/annotations/annotations_trainval2014.zip",
    ]


# --------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize("name", ["sample", "voc", "coco"])
def test_benchmarks_that_are_not_downloaded(tmp_path: Path, name: str) -> None:
    with pytest.raises(DatasetError, match=f"{name} is not downloaded .*these are: voc07, voc12, coco20k"):
        fetch.fetch(name, tmp_path)


def test_unknown_names_and_options_out_of_range(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="did you mean voc07"):
        fetch.fetch("voc7", tmp_path)
    with pytest.raises(OptionError, match="workers must be at least 1, got 0"):
        fetch.fetch("coco20k", tmp_path, workers=0)
    for mirror in ("file:///etc", "mirror.example", "http://", "ftp://mirror.example", "http://[half"):
        with pytest.raises(OptionError, match="expected an address such as"):
            fetch.fetch("voc07", tmp_path, mirror=mirror)
    assert list(tmp_path.iterdir()) == []


def test_a_root_that_cannot_be_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DatasetError, match="cannot write voc07 below"):
        fetch.fetch("voc07", tmp_path / "file")


def test_two_fetches_of_the_same_data_do_not_mix(site: Site, tmp_path: Path) -> None:
    with FileLock(tmp_path / ".fetch-voc12.lock"), pytest.raises(DatasetError, match="another fetch"):
        fetch_voc(site, tmp_path)
    assert site.log == []
