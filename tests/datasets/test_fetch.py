import hashlib
import io
import re
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from torchvision.datasets import voc as torchvision_voc

from lostreg.datasets import coco20k, download, fetch
from lostreg.datasets.voc import load_voc
from lostreg.errors import DatasetError, OptionError


class Site:
    """A web server on loopback whose faults a test can choose."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.cuts: dict[str, list[int]] = {}  # per path: send so many bytes, then hang up
        self.errors: dict[str, list[int]] = {}  # per path: answer with these statuses first
        self.honours_range = True
        self.log: list[tuple[str, str | None]] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self.handler())
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def handler(site) -> type[BaseHTTPRequestHandler]:  # noqa: N805 - self is the handler below
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                wanted = self.headers["Range"]
                site.log.append((self.path, wanted))
                if site.errors.get(self.path):
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
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                cuts = site.cuts.get(self.path)
                self.wfile.write(body[: cuts.pop(0)] if cuts else body)

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
    download.download(f"{site.url}/file.bin", target, progress=False, **options)
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


def test_the_kind_of_file_is_checked(site: Site, tmp_path: Path) -> None:
    site.files["/file.bin"] = b"<html>please log in</html>"
    with pytest.raises(DatasetError, match="not the kind of file expected: it begins with b'<h'"):
        get(site, tmp_path, magic=b"\xff\xd8")
    assert list(tmp_path.iterdir()) == []


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
    """Serve an archive under its real name and let torchvision's table know its MD5."""
    facts = dict(torchvision_voc.DATASET_YEAR_DICT[key], md5=hashlib.md5(content).hexdigest())
    monkeypatch.setitem(torchvision_voc.DATASET_YEAR_DICT, key, facts)
    path = f"/mirror/{facts['filename']}"
    site.files[path] = content
    return path


def fetch_voc(site: Site, root: Path, name: str = "voc12") -> Path:
    return fetch.fetch(name, root, mirror=f"{site.url}/mirror/", progress=False)


def names_in(root: Path) -> set[str]:
    return {path.name for path in root.iterdir() if not path.name.endswith(".lock")}


def test_voc07_is_two_archives_in_one_folder(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(site, monkeypatch, "2007", voc_tar(2007, "trainval", "abc"))
    publish(site, monkeypatch, "2007-test", voc_tar(2007, "test", "de"))
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
    publish(site, monkeypatch, "2007", voc_tar(2007, "trainval", "abc"))
    test = publish(site, monkeypatch, "2007-test", voc_tar(2007, "test", "de"))
    folder = fetch_voc(site, tmp_path, "voc07")
    (folder / "JPEGImages/d.jpg").unlink()
    site.log.clear()
    fetch_voc(site, tmp_path, "voc07")
    assert [path for path, _ in site.log] == [test]
    assert (folder / "JPEGImages/d.jpg").is_file()


def test_a_cut_archive_is_resumed_by_the_next_fetch(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = publish(site, monkeypatch, "2012", voc_tar(2012, "trainval", "ab"))
    site.cuts[path] = [512] * 5
    with pytest.raises(DatasetError, match=r"2560 bytes are in .* run the same command again"):
        fetch_voc(site, tmp_path)
    assert len(load_voc(fetch_voc(site, tmp_path))) == 2
    assert site.log[-1] == (path, "bytes=2560-")


def test_a_wrong_md5_removes_the_download(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = publish(site, monkeypatch, "2012", voc_tar(2012, "trainval", "ab"))
    good, site.files[path] = site.files[path], b"not the archive"
    with pytest.raises(DatasetError, match="its MD5 is not"):
        fetch_voc(site, tmp_path)
    assert names_in(tmp_path) == set()
    site.files[path] = good
    assert len(load_voc(fetch_voc(site, tmp_path))) == 2


def test_an_archive_put_there_by_hand_is_used_and_kept(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = publish(site, monkeypatch, "2012", voc_tar(2012, "trainval", "ab"))
    archive = tmp_path / Path(path).name
    archive.write_bytes(site.files[path])
    fetch_voc(site, tmp_path)
    assert site.log == []
    assert names_in(tmp_path) == {archive.name, "VOCdevkit"}


def test_a_damaged_archive_put_there_is_downloaded_again(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = publish(site, monkeypatch, "2012", voc_tar(2012, "trainval", "ab"))
    (tmp_path / Path(path).name).write_bytes(b"half")
    assert len(load_voc(fetch_voc(site, tmp_path))) == 2
    assert site.log == [(path, None)]


@pytest.mark.parametrize("name", ["../outside.txt", "/outside.txt", "VOCdevkit/../../outside.txt"])
def test_entries_that_leave_the_folder_are_refused(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    publish(site, monkeypatch, "2012", tar_of({name: b"gotcha"}))
    with pytest.raises(DatasetError, match=f"entry '{re.escape(name)}' leaves the folder"):
        fetch_voc(site, tmp_path / "root")
    assert not list(tmp_path.rglob("outside.txt"))
    assert not list(tmp_path.rglob(".unpack*"))


def test_links_in_an_archive_are_not_made(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO(voc_tar(2012, "trainval", "ab"))
    with tarfile.open(fileobj=buffer, mode="a") as tar:
        link = tarfile.TarInfo("VOCdevkit/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc"
        tar.addfile(link)
    publish(site, monkeypatch, "2012", buffer.getvalue())
    fetch_voc(site, tmp_path)
    assert names_in(tmp_path / "VOCdevkit") == {"VOC2012"}


def test_something_that_is_no_tar_is_an_error(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(site, monkeypatch, "2012", b"right MD5, wrong kind of file" * 99)
    with pytest.raises(DatasetError, match="cannot unpack"):
        fetch_voc(site, tmp_path)


def test_an_archive_without_its_images_is_an_error(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(site, monkeypatch, "2012", tar_of({"VOCdevkit/VOC2012/ImageSets/Main/trainval.txt": b"a"}))
    with pytest.raises(DatasetError, match="did not bring the whole split 'trainval'"):
        fetch_voc(site, tmp_path)


# ---------------------------------------------------------------------------------------- COCO 20k

ZIP_PATH = "/annotations/annotations_trainval2014.zip"


def zip_of(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def image_path(image_id: int) -> str:
    return f"/train2014/COCO_train2014_{image_id:012d}.jpg"


@pytest.fixture
def coco_site(site: Site, monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.setattr(coco20k, "coco20k_ids", lambda: tuple(range(1, 13)))
    site.files[ZIP_PATH] = zip_of(
        {"annotations/instances_train2014.json": b'{"images": []}', "annotations/captions.json": b"{}"}
    )
    site.files |= {image_path(n): b"\xff\xd8" + bytes([n]) * 300 for n in range(1, 14)}
    return site


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
    coco_site.files[image_path(9)] = b"<html>"
    coco_site.cuts[image_path(5)] = [10, 10]
    coco_site.errors[image_path(6)] = [503]
    with pytest.raises(DatasetError, match=r"2 of 12 images .*all others are kept") as caught:
        fetch_coco(coco_site, tmp_path, workers=3)
    assert f"{image_path(4)}: HTTP 404" in str(caught.value)
    assert f"{image_path(9)} is not the kind of file" in str(caught.value)
    assert len(images_in(tmp_path)) == 10
    coco_site.files |= {image_path(4): b"\xff\xd8", image_path(9): b"\xff\xd8"}
    fetch_coco(coco_site, tmp_path)
    assert len(images_in(tmp_path)) == 12


def test_a_server_that_has_nothing_is_left_alone_soon(
    coco_site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "GIVE_UP_AFTER", 3)
    monkeypatch.setattr(coco20k, "coco20k_ids", lambda: tuple(range(1001, 2001)))
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
    "content",
    [
        b"not a zip",
        zip_of({"annotations/captions.json": b"{}"}),
        zip_of({"annotations/instances_train2014.json": b"0123456789"}).replace(b"0123456789", b"0123456780"),
    ],
)
def test_a_damaged_annotation_archive_is_removed(coco_site: Site, tmp_path: Path, content: bytes) -> None:
    good, coco_site.files[ZIP_PATH] = coco_site.files[ZIP_PATH], content
    with pytest.raises(DatasetError, match="damaged or not the expected archive"):
        fetch_coco(coco_site, tmp_path)
    assert names_in(tmp_path / "coco/annotations") == set()
    coco_site.files[ZIP_PATH] = good
    fetch_coco(coco_site, tmp_path)


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
    for mirror in ("file:///etc", "mirror.example", "http://"):
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
