"""Image files in an exported folder: copied or linked where its readers take them as they are, else encoded anew."""

import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Final, Literal

from PIL import ExifTags, Image

from lostreg.checks import cut
from lostreg.datasets.video import VideoFrame
from lostreg.errors import ImageError, PredictionsError
from lostreg.exports.items import ExportImage
from lostreg.images.decode import Header, read_header, read_image
from lostreg.images.stores import StoredImage
from lostreg.jsonio import full_disk_named
from lostreg.runs.locate import Source, is_file

Placing = Literal["copy", "link", "none"]

_ANY_SIZE: Final = 1 << 62  # what was searched has passed the limit before
_SUFFIXES: Final = {
    "JPEG": (".jpg", ".jpeg"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
}
_JPEG_END: Final = b"\xff\xd9"


@dataclass(frozen=True)
class Reader:
    """What those who read a format take as it is.

    Attributes:
        kinds: of files, by Pillow's names.
        turns: whether JPEG files are turned as their EXIF orientation says.
    """

    kinds: tuple[str, ...]
    turns: bool


@dataclass(frozen=True)
class Plan:
    """What is to become of an image file.

    Attributes:
        source: the file, or the image's place in another one or in a store.
        suffix: of the new file.
        exif: whether boxes are in pixels turned as the file's EXIF orientation says.
        encode: whether it must be encoded anew.
        private: whether readers may mend the file in place, so that it must not be a link.
    """

    source: Path | StoredImage
    suffix: str
    exif: bool
    encode: bool
    private: bool = False


def plan(image: ExportImage, reader: Reader) -> Plan:
    """Look at the head of an image file, and say what is to become of it.

    Raises:
        ImageError: if it cannot be read.
        PredictionsError: if it was not found, or is of another size than the predictions say.
    """
    if image.source is None:
        name = cut(repr(image.image_id))
        raise PredictionsError(f"no file found for image {name}: --images DIR says where the images lie")
    source = image.source.path
    if isinstance(source, Path) and not is_file(source):
        raise PredictionsError(f"{cut(str(source), 200)} is not there: --images DIR says where the images lie now")
    with _on_disk(source) as path:
        return _plan(image, image.source, path, reader)


def _plan(image: ExportImage, source: Source, path: Path, reader: Reader) -> Plan:
    header = read_header(path)
    kind, orientation = header.format, header.orientation
    exif = _is_turned(image, source, header)
    if isinstance(source.path, VideoFrame):  # no file holds it as it is; a codec has taken more from it than JPEG will
        return Plan(source.path, ".jpg", exif, encode=True)
    is_plain = kind in reader.kinds and (kind != "TIFF" or header.mode in ("RGB", "L"))
    is_upright = orientation.value == 1 or (kind == "JPEG" and exif and reader.turns)
    if not (is_plain and is_upright and orientation.is_plain and _readers_agree(path, orientation.value)):
        return Plan(source.path, ".jpg" if kind == "JPEG" else ".png", exif, encode=True)
    suffix = PurePath(source.path.name).suffix
    suffix = suffix if suffix.lower() in _SUFFIXES[kind] else _SUFFIXES[kind][0]
    may_mend = kind == "JPEG" and not _ends_well(path)
    return Plan(source.path, suffix, exif, encode=False, private=may_mend)


@contextmanager
def _on_disk(source: Path | StoredImage) -> Iterator[Path]:
    """A file of the image: its own, or one that goes afterwards."""
    if isinstance(source, Path):
        yield source
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image"
        with full_disk_named(path):
            path.write_bytes(source.read())
        try:
            yield path
        except (ImageError, PredictionsError) as error:
            raise type(error)(str(error).replace(str(path), source.name)) from error


def plan_all(images: Sequence[ExportImage], reader: Reader, placing: Placing) -> list[Plan | None]:
    """The plans of all images, before anything is written; none where the files are left out."""
    return [None if placing == "none" else plan(image, reader) for image in images]


def _readers_agree(path: Path, orientation: int) -> bool:
    """Whether readers built on Pillow or OpenCV see the file as it was read here.

    They may turn it by XMP, fail on a tag, take another of several pictures (but a phone's JPEG), show what is
    transparent, or cut 16 bits off.
    """
    with warnings.catch_warnings(action="error"):
        try:
            with Image.open(path) as image:
                is_still = getattr(image, "n_frames", 1) == 1 or image.format == "MPO"
                is_plain = is_still and not image.has_transparency_data and not image.mode.startswith("I")
                exif = image.getexif()
            if orientation != 1:
                exif.tobytes()  # turning an image writes its tags anew
            return is_plain and bool(exif.get(ExifTags.Base.Orientation, 1) == orientation)
        except Exception:
            return False


def _is_turned(image: ExportImage, source: Source, header: Header) -> bool:
    """Whether the boxes are in turned pixels: as recorded, else as the size says, else yes."""
    turned, stored = header.size(exif=True), header.size(exif=False)
    size = image.width, image.height
    sizes = {True: (turned,), False: (stored,), None: (turned, stored)}[source.exif]
    if size not in sizes:
        raise PredictionsError(
            f"{source.path} has {sizes[0][0]}x{sizes[0][1]} pixels, but the predictions say {size[0]}x{size[1]}: "
            "not the image that was searched"
        )
    return size == turned if source.exif is None else source.exif


def _ends_well(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-2, 2)
        return file.read() == _JPEG_END


def place(what: Plan, target: Path, how: Placing) -> None:
    """Make the new file.

    Raises:
        ImageError: if the image cannot be decoded.
        OSError: if the file cannot be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if what.encode:
        pixels = read_image(what.source, exif=what.exif, max_pixels=_ANY_SIZE).pixels
        Image.fromarray(pixels).save(target, quality=95, subsampling=0)
    elif isinstance(what.source, StoredImage):
        target.write_bytes(what.source.read())
    elif how == "link" and not what.private:
        target.symlink_to(what.source.resolve())
    else:
        shutil.copyfile(what.source, target)
