"""Downloading the public benchmarks. Every step can be cut and run again."""

import shutil
import sys
import tarfile
import threading
import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from filelock import FileLock, Timeout
from tqdm import tqdm

from lostreg.datasets import coco20k
from lostreg.datasets.base import name_some
from lostreg.datasets.download import check_http, download
from lostreg.datasets.registry import BENCHMARKS, FETCHABLE, benchmark_info
from lostreg.datasets.voc import list_annotations, list_images, read_split
from lostreg.errors import DatasetError, OptionError

COCO_ANNOTATIONS_URL = "http://images.cocodataset.org/annotations/annotations_trainval2014.zip"
COCO_IMAGES_URL = "http://images.cocodataset.org/"

GIVE_UP_AFTER = 50
"""So many images failing in a row mean that the server is gone, and the rest is not tried."""

_JPEG = b"\xff\xd8"

# Which of torchvision's VOC archives make up a benchmark, and the split that each brings.
_VOC_ARCHIVES = {
    "voc07": (("2007", "trainval"), ("2007-test", "test")),
    "voc12": (("2012", "trainval"),),
}


def fetch(name: str, root: Path, *, mirror: str | None = None, workers: int = 8, progress: bool = True) -> Path:
    """Download a benchmark, or what is still missing of it.

    Args:
        name: ``voc07``, ``voc12`` or ``coco20k``.
        root: the folder to put it in; created if need be. VOC lands in ``root/VOCdevkit``, COCO in
            ``root/coco``.
        mirror: address to use in place of the official one: archives of VOC are expected directly
            below it, files of COCO under their original path.
        workers: how many images of COCO to download at a time, at least 1.
        progress: show bars on stderr.

    Returns:
        The folder of the benchmark, which `lostreg.datasets.load_benchmark` accepts as root.

    Raises:
        DatasetError: if the benchmark cannot be downloaded by name, the server fails, an archive is
            damaged, or the folder cannot be written. What was complete stays.
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
        with _alone(root / f".fetch-{name}.lock"):
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


# ------------------------------------------------------------------------------------ PASCAL VOC


def _fetch_voc(name: str, root: Path, mirror: str | None, *, progress: bool) -> Path:
    from torchvision.datasets.voc import DATASET_YEAR_DICT

    folder = root / "VOCdevkit" / f"VOC{BENCHMARKS[name].year}"
    missing = [(key, split) for key, split in _VOC_ARCHIVES[name] if not _has_split(folder, split)]
    for key, split in missing:
        facts = DATASET_YEAR_DICT[key]
        archive = root / facts["filename"]
        url = f"{mirror.rstrip('/')}/{facts['filename']}" if mirror else facts["url"]
        ours = _get_archive(url, archive, facts["md5"], progress=progress)
        _say(f"unpacking {archive.name}")
        _unpack_tar(archive, root)
        if not _has_split(folder, split):
            raise DatasetError(f"{archive} did not bring the whole split {split!r} of {folder}")
        if ours:
            archive.unlink()
    _say(f"{name} is complete in {folder}" + ("" if missing else ": nothing to do"))
    return folder


def _has_split(folder: Path, split: str) -> bool:
    """Whether every image of the split is there with its annotation."""
    try:
        wanted = set(read_split(folder, split))
        return wanted <= list_annotations(folder) and wanted <= list_images(folder).keys()
    except DatasetError:
        return False


def _get_archive(url: str, archive: Path, md5: str, *, progress: bool) -> bool:
    """Have ``archive`` complete and checked; True if this call downloaded it."""
    from torchvision.datasets.utils import check_integrity

    if archive.exists():
        if check_integrity(archive, md5):
            return False
        _say(f"{archive} is damaged: downloading it again")
        archive.unlink()
    _say(f"downloading {url}")
    download(url, archive, progress=progress)
    if not check_integrity(archive, md5):
        archive.unlink()
        raise DatasetError(
            f"{url} is damaged or not the expected file: its MD5 is not {md5}; "
            f"the download was removed, run the same command again"
        )
    return True


def _unpack_tar(archive: Path, root: Path) -> None:
    """Unpack beside the data and move file by file, so that no half-written file is ever in place."""
    staging = root / f".unpack-{archive.name}"
    shutil.rmtree(staging, ignore_errors=True)
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                _unpack_member(tar, member, staging)
        for source in sorted(path for path in staging.rglob("*") if path.is_file()):
            target = root / source.relative_to(staging)
            target.parent.mkdir(parents=True, exist_ok=True)
            source.replace(target)
    except (tarfile.TarError, EOFError) as error:
        raise DatasetError(f"cannot unpack {archive}: {error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _unpack_member(tar: tarfile.TarFile, member: tarfile.TarInfo, staging: Path) -> None:
    """Write one regular file; folders follow from their files, links and devices are ignored."""
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts or "\\" in member.name or ":" in member.name:
        raise DatasetError(f"refused to unpack an archive whose entry {member.name!r} leaves the folder")
    content = tar.extractfile(member) if member.isfile() else None
    if content is None:
        return
    target = staging.joinpath(*path.parts)
    target.parent.mkdir(parents=True, exist_ok=True)
    with content, target.open("wb") as file:
        shutil.copyfileobj(content, file)


# --------------------------------------------------------------------------------------- COCO 20k


def _fetch_coco20k(root: Path, mirror: str | None, workers: int, *, progress: bool) -> Path:
    base = root if (root / coco20k.ANNOTATIONS).is_file() else root / "coco"
    annotations = base / coco20k.ANNOTATIONS
    complete = annotations.is_file()
    if not complete:
        _fetch_annotations(_mirrored(COCO_ANNOTATIONS_URL, mirror), annotations, progress=progress)
    ids = coco20k.coco20k_ids()
    folder = base / "train2014"
    folder.mkdir(parents=True, exist_ok=True)
    present = {entry.name for entry in folder.iterdir()}
    targets = [base / coco20k.coco20k_file_name(image_id) for image_id in ids]
    missing = [target for target in targets if target.name not in present]
    if missing:
        _say(f"downloading {len(missing)} of {len(ids)} images to {folder}")
        origin = _mirrored(COCO_IMAGES_URL, mirror)
        _fetch_images(origin, base, missing, workers, progress=progress)
    _say(f"coco20k is complete in {base}" + (": nothing to do" if complete and not missing else ""))
    return base


def _fetch_annotations(url: str, annotations: Path, *, progress: bool) -> None:
    """Download the archive, keep the one file of it that is needed, and remove the archive."""
    annotations.parent.mkdir(parents=True, exist_ok=True)
    archive = annotations.parent / PurePosixPath(urlsplit(url).path).name
    part = annotations.with_name(annotations.name + ".part")
    if not archive.exists():
        _say(f"downloading {url}")
        download(url, archive, progress=progress)
    try:
        # The member goes to a path of our choosing, and zipfile checks its CRC.
        with (
            zipfile.ZipFile(archive) as content,
            content.open(coco20k.ANNOTATIONS) as source,
            part.open("wb") as file,
        ):
            shutil.copyfileobj(source, file)
    except (zipfile.BadZipFile, zlib.error, RuntimeError, KeyError, EOFError) as error:
        part.unlink(missing_ok=True)
        archive.unlink()
        raise DatasetError(
            f"{url} is damaged or not the expected archive with {coco20k.ANNOTATIONS}: {error}; "
            f"the download was removed, run the same command again"
        ) from error
    part.replace(annotations)
    archive.unlink()


def _fetch_images(origin: str, base: Path, targets: list[Path], workers: int, *, progress: bool) -> None:
    """Download images side by side; those that fail are named at the end, all others stay."""
    stop = threading.Event()
    failed: dict[Path, str] = {}
    in_a_row = 0
    pool = ThreadPoolExecutor(workers, thread_name_prefix="fetch")
    try:
        jobs = {pool.submit(_fetch_image, origin, base, target, stop): target for target in targets}
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
            f"{len(failed)} of {len(targets)} images could not be downloaded "
            f"({gave_up if in_a_row >= GIVE_UP_AFTER else 'all others are kept'}), "
            f"run the same command again: {name_some(list(failed.values()))}"
        )


def _fetch_image(origin: str, base: Path, target: Path, stop: threading.Event) -> None:
    if stop.is_set():
        return
    url = origin.rstrip("/") + "/" + target.relative_to(base).as_posix()
    # Nothing could tell a wrongly resumed picture from a right one, and they are small: no resume.
    download(url, target, resume=False, magic=_JPEG, tries=3, progress=False, stop=stop)


def _mirrored(url: str, mirror: str | None) -> str:
    """The same path on another server."""
    return url if mirror is None else mirror.rstrip("/") + urlsplit(url).path


def _say(text: str) -> None:
    tqdm.write(text, file=sys.stderr)
