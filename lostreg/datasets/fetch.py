"""Downloading the public benchmarks. Every step can be cut and run again.

Archives are held against a known size and SHA-256 before anything of them is unpacked, wherever they come from: the
official server, a mirror, or the user's hand. Nothing is written through a symbolic link below the root.
"""

import hashlib
import lzma
import shutil
import sys
import tarfile
import threading
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from filelock import FileLock, Timeout
from tqdm import tqdm

from lostreg.datasets import coco20k
from lostreg.datasets.base import name_some
from lostreg.datasets.download import check_http, download
from lostreg.datasets.registry import BENCHMARKS, FETCHABLE, benchmark_info
from lostreg.datasets.voc import list_annotations, list_images, read_split
from lostreg.errors import DatasetError, ImageError, OptionError
from lostreg.images.decode import read_header, read_image


class Archive(NamedTuple):
    """A published file: its path on its server, its bytes, and their SHA-256 in hexadecimal digits."""

    path: str
    size: int
    sha256: str


# Sizes and SHA-256 are those of TensorFlow Datasets (tensorflow_datasets/url_checksums/voc.txt and coco.txt). Those of
# torchvision (prototype/datasets/_builtin/voc.py and coco.py) are the same, where it has them.
VOC_URL = "https://thor.robots.ox.ac.uk/pascal/VOC"  # HTTPS, as torchvision has it
VOC_ARCHIVES: Mapping[str, Mapping[str, Archive]] = {  # of a benchmark, by the split that each brings
    "voc07": {
        "trainval": Archive(
            "voc2007/VOCtrainval_06-Nov-2007.tar",
            460_032_000,
            "7d8cd951101b0957ddfd7a530bdc8a94f06121cfc1e511bb5937e973020c7508",
        ),
        "test": Archive(
            "voc2007/VOCtest_06-Nov-2007.tar",
            451_020_800,
            "6836888e2e01dca84577a849d339fa4f73e1e4f135d312430c4856b5609b4892",
        ),
    },
    "voc12": {
        "trainval": Archive(
            "voc2012/VOCtrainval_11-May-2012.tar",
            1_999_639_040,
            "e14f763270cf193d0b5f74b169f44157a4b0c6efa708f4dd0ff78ee691763bcb",
        ),
    },
}
# COCO is a bucket of S3 whose name has dots: over HTTPS, images.cocodataset.org shows the certificate of S3, which does
# not fit the name. Addressed by path, the same bucket is below a name that the certificate does fit.
COCO_URL = "https://s3.amazonaws.com/images.cocodataset.org"
COCO_ARCHIVE = Archive(
    "annotations/annotations_trainval2014.zip",
    252_872_794,
    "031296bbc80c45a1d1f76bf9a90ead27e94e99ec629208449507a4917a3bf009",
)

MAX_IMAGE_BYTES = 4 << 20
"""More than any picture of COCO could need: none has a side over 640 pixels, which is 1.2 MB without compression."""

GIVE_UP_AFTER = 50
"""So many images failing in a row mean that the server is gone, and the rest is not tried."""


def fetch(name: str, root: Path, *, mirror: str | None = None, workers: int = 8, progress: bool = True) -> Path:
    """Download a benchmark, or what is still missing of it.

    Args:
        name: ``voc07``, ``voc12`` or ``coco20k``.
        root: the folder to put it in; created if need be. VOC lands in ``root/VOCdevkit``, COCO in
            ``root/coco``.
        mirror: address to use in place of the official one: archives of VOC are expected directly
            below it, files of COCO under their original path. Archives are checked all the same.
        workers: how many images of COCO to download at a time, at least 1.
        progress: show bars on stderr.

    Returns:
        The folder of the benchmark, which `lostreg.datasets.load_benchmark` accepts as root.

    Raises:
        DatasetError: if the benchmark cannot be downloaded by name, the server fails, an archive or image is not the
            one expected, or the folder cannot be written or has symbolic links in the way. What was complete stays.
        OptionError: if ``workers`` or ``mirror`` is out of range.
    """
    info = benchmark_info(name)
    if name not in FETCHABLE:
        raise DatasetError(f"{name} is not downloaded ({info.source}); these are: {', '.join(FETCHABLE)}")
    if workers < 1:
        raise OptionError(f"workers must be at least 1, got {workers}")
    if mirror is not None:
        check_http(mirror)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _alone(_no_link(root, root / f".fetch-{name}.lock")):
            if name == "coco20k":
                return _fetch_coco20k(root, mirror, workers, progress=progress)
            return _fetch_voc(name, root, mirror, progress=progress)
    except OSError as error:
        raise DatasetError(f"cannot write {name} below {root}: {error}") from error


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Keep a second fetch of the same data out: both would write the same unfinished files."""
    try:
        with FileLock(lock, timeout=0):
            yield
    except Timeout:
        raise DatasetError(f"another fetch is at work in {lock.parent}: it holds {lock}") from None


def _no_link(root: Path, path: Path) -> Path:
    """``path``, if no symbolic link is in its place, nor on the way to it from ``root``."""
    for place in (path, *path.parents):
        if place == root:
            break
        if place.is_symlink():
            raise DatasetError(
                f"{place} is a symbolic link, and fetch writes through none below its root: "
                f"remove the link, or name another root"
            )
    return path


def _folder(root: Path, path: Path) -> Path:
    """A folder that is there, reached through no symbolic link."""
    _no_link(root, path).mkdir(parents=True, exist_ok=True)
    return path


def _get_archive(url: str, file: Path, archive: Archive, *, progress: bool) -> bool:
    """Have ``file`` complete and checked; True if this call downloaded it, False if the user's own does."""
    if file.exists():
        if fault := _archive_fault(file, archive):
            raise DatasetError(f"{file} {fault}; remove it to have it downloaded")
        return False
    _say(f"downloading {url}")
    download(url, file, lambda part: _archive_fault(part, archive), at_most=archive.size, progress=progress)
    return True


def _archive_fault(file: Path, archive: Archive) -> str:
    """What tells the file from the published one; empty if nothing does."""
    size = file.stat().st_size
    if size != archive.size:
        return f"is not the file published: expected {archive.size:,} bytes, found {size:,}"
    with file.open("rb") as content:
        sha256 = hashlib.file_digest(content, "sha256").hexdigest()
    if sha256 != archive.sha256:
        return f"is not the file published: expected SHA-256 {archive.sha256}, found {sha256}"
    return ""


# ------------------------------------------------------------------------------------ PASCAL VOC


def _fetch_voc(name: str, root: Path, mirror: str | None, *, progress: bool) -> Path:
    folder = root / "VOCdevkit" / f"VOC{BENCHMARKS[name].year}"
    missing = {split: archive for split, archive in VOC_ARCHIVES[name].items() if not _has_split(folder, split)}
    if missing:
        _folder(root, folder)  # before hundreds of megabytes are downloaded
    for split, archive in missing.items():
        file = root / PurePosixPath(archive.path).name
        url = f"{mirror.rstrip('/')}/{file.name}" if mirror else f"{VOC_URL}/{archive.path}"
        ours = _get_archive(url, file, archive, progress=progress)
        _say(f"unpacking {file.name}")
        _unpack_tar(file, root)
        if not _has_split(folder, split):
            raise DatasetError(f"{file} did not bring the whole split {split!r} of {folder}")
        if ours:
            file.unlink()
    _say(f"{name} is complete in {folder}" + ("" if missing else ": nothing to do"))
    return folder


def _has_split(folder: Path, split: str) -> bool:
    """Whether every image of the split is there with its annotation."""
    try:
        wanted = set(read_split(folder, split))
        return wanted <= list_annotations(folder) and wanted <= list_images(folder).keys()
    except DatasetError:
        return False


def _unpack_tar(archive: Path, root: Path) -> None:
    """Unpack beside the data and move file by file, so that no half-written file is ever in place."""
    if not hasattr(tarfile, "data_filter"):
        raise DatasetError("unpacking needs Python 3.11.4 or newer: older ones cannot refuse what leaves the folder")
    staging = _no_link(root, root / f".unpack-{archive.name}")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        with tarfile.open(archive, "r:") as tar:
            tar.extractall(staging, filter=_plain_file)  # noqa: S202 - the filter sees every member
        files = [path for path in staging.rglob("*") if path.is_file()]
        for folder in {path.parent for path in files}:  # first of all, so that a link is found before a file is moved
            _folder(root, root / folder.relative_to(staging))
        for source in sorted(files):
            source.replace(root / source.relative_to(staging))  # a link in the file's own place is replaced
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise DatasetError(f"cannot unpack {archive}: {error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _plain_file(member: tarfile.TarInfo, folder: str) -> tarfile.TarInfo | None:
    """The standard library's filter for data, and no links, devices or sparse files: VOC has none of them."""
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts or "\\" in member.name or ":" in member.name:
        raise DatasetError(f"refused to unpack an archive whose entry {member.name!r} leaves the folder")
    is_plain = member.isdir() or (member.isfile() and not member.issparse())
    if not (path.parts and is_plain):  # no parts: the folder itself
        return None
    return tarfile.data_filter(member, folder)


# --------------------------------------------------------------------------------------- COCO 20k


def _fetch_coco20k(root: Path, mirror: str | None, workers: int, *, progress: bool) -> Path:
    base = root if (root / coco20k.ANNOTATIONS).is_file() else root / "coco"
    origin = (mirror or COCO_URL).rstrip("/")
    annotations = base / coco20k.ANNOTATIONS
    complete = annotations.is_file()
    if not complete:
        _folder(root, annotations.parent)
        _fetch_annotations(origin, root, annotations, progress=progress)
    elif fault := _annotations_fault(annotations.stat().st_size):
        raise DatasetError(f"{annotations} {fault}; remove it to have it downloaded")
    folder = base / "train2014"
    found = folder.iterdir() if folder.is_dir() else ()
    present = {entry.name for entry in found if entry.is_file() and entry.stat().st_size}
    names = {image_id: Path(coco20k.coco20k_file_name(image_id)).name for image_id in coco20k.coco20k_ids()}
    if missing := {image_id: folder / name for image_id, name in names.items() if name not in present}:
        _folder(root, folder)
        _say(f"downloading {len(missing)} of {len(names)} images to {folder}")
        sizes = coco20k.coco20k_sizes(annotations)
        wanted = {target: sizes[image_id] for image_id, target in missing.items()}
        _fetch_images(f"{origin}/{folder.name}", wanted, workers, progress=progress)
    _say(f"coco20k is complete in {base}" + (": nothing to do" if complete and not missing else ""))
    return base


_UNZIP_ERRORS = (OSError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, RuntimeError, KeyError, EOFError, ValueError)


def _annotations_fault(size: int) -> str:
    expected = coco20k.ANNOTATIONS_BYTES
    return f"is not the file published: expected {expected:,} bytes, found {size:,}" if size != expected else ""


def _fetch_annotations(origin: str, root: Path, annotations: Path, *, progress: bool) -> None:
    """Download the archive, keep the one file of it that is needed, and remove the archive."""
    file = annotations.parent / PurePosixPath(COCO_ARCHIVE.path).name
    part = _no_link(root, annotations.with_name(annotations.name + ".part"))
    ours = _get_archive(f"{origin}/{COCO_ARCHIVE.path}", file, COCO_ARCHIVE, progress=progress)
    try:
        # The member goes to a path of our choosing. zipfile reads no more of it than its catalogue says, and checks
        # its CRC.
        with zipfile.ZipFile(file) as content:
            if fault := _annotations_fault(content.getinfo(coco20k.ANNOTATIONS).file_size):
                raise DatasetError(f"{coco20k.ANNOTATIONS} in {file} {fault}")
            with content.open(coco20k.ANNOTATIONS) as source, part.open("wb") as target:
                shutil.copyfileobj(source, target)
    except _UNZIP_ERRORS as error:
        part.unlink(missing_ok=True)
        raise DatasetError(f"cannot unpack {coco20k.ANNOTATIONS} of {file}: {error}") from error
    part.replace(annotations)
    if ours:
        file.unlink()


def _fetch_images(origin: str, wanted: dict[Path, tuple[int, int]], workers: int, *, progress: bool) -> None:
    """Download images of known width and height side by side; those that fail are named at the end, all others stay."""
    stop = threading.Event()
    failed: dict[Path, str] = {}
    in_a_row = 0
    pool = ThreadPoolExecutor(workers, thread_name_prefix="fetch")
    try:
        jobs = {pool.submit(_fetch_image, origin, target, size, stop): target for target, size in wanted.items()}
        with tqdm(as_completed(jobs), total=len(jobs), unit="image", disable=not progress) as bar:
            for job in bar:
                try:
                    job.result()
                    in_a_row = 0
                except DatasetError as error:
                    failed[jobs[job]] = str(error)
                    in_a_row += 1
                if in_a_row >= GIVE_UP_AFTER:
                    break
    finally:  # also on Ctrl-C: running downloads end soon, waiting ones never start
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)
    if failed:
        gave_up = f"the last {in_a_row} in a row, so the rest was not tried"
        raise DatasetError(
            f"{len(failed)} of {len(wanted)} images could not be downloaded "
            f"({gave_up if in_a_row >= GIVE_UP_AFTER else 'all others are kept'}), "
            f"run the same command again: {name_some(list(failed.values()))}"
        )


def _fetch_image(origin: str, target: Path, size: tuple[int, int], stop: threading.Event) -> None:
    if stop.is_set():
        return
    # Nothing could tell a wrongly resumed picture from a right one, and they are small: no resume.
    download(
        f"{origin}/{target.name}",
        target,
        lambda part: _image_fault(part, size),
        at_most=MAX_IMAGE_BYTES,
        resume=False,
        tries=3,
        progress=False,
        stop=stop,
    )


def _image_fault(file: Path, size: tuple[int, int]) -> str:
    """What is wrong with an image of COCO; empty if nothing is.

    No list of their hashes or bytes is published, so that each is held against the annotations' width and height,
    and decoded to its end.
    """
    try:
        header = read_header(file)
        if header.format != "JPEG":
            return f"is not a complete JPEG: it is {header.format}"
        width, height = header.size(exif=False)
        if (width, height) != size:
            return f"has {width}x{height} pixels, expected {size[0]}x{size[1]} as the annotations say"
        read_image(file)
    except ImageError as error:
        return f"is not a complete JPEG: {str(error).removeprefix(f'{file}: ')}"
    return ""


def _say(text: str) -> None:
    tqdm.write(text, file=sys.stderr)
