"""Benchmarks in the layout of PASCAL VOC.

A VOC folder holds ``Annotations/*.xml``, ``JPEGImages/*`` and ``ImageSets/Main/<split>.txt``. Only the
annotations are read here: the image files may be absent until something wants to open them.
"""

import math
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lostreg.datasets.base import Benchmark, Example, name_some
from lostreg.errors import DatasetError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
"""Accepted endings in ``JPEGImages``; the first wins where a stem has several files."""

_CORNERS = ("xmin", "ymin", "xmax", "ymax")


def load_voc(
    root: Path,
    split: str = "trainval",
    *,
    name: str = "voc",
    no_hard: bool = False,
    expected: int | None = None,
) -> Benchmark:
    """Load one split of a folder in VOC layout.

    Corners are 1-based and inclusive in the files and become ``xmin - 1, ymin - 1, xmax, ymax``.

    Args:
        root: the folder with ``Annotations`` and ``ImageSets/Main``, such as ``VOCdevkit/VOC2007``.
        split: stem of a file in ``ImageSets/Main``.
        name: what the benchmark calls itself.
        no_hard: drop objects marked difficult or truncated, then images with no object left.
        expected: how many images the split must list, or None where that is not known.

    Returns:
        The examples in the order of the split file; ids are file stems.

    Raises:
        DatasetError: if the layout, the split or an annotation is missing or malformed, or the split
            does not list ``expected`` images.
    """
    _check_layout(root)
    stems = read_split(root, split)
    if expected is not None and len(stems) != expected:
        raise DatasetError(
            f"{name}: expected {expected} images in split {split!r}, found {len(stems)} in "
            f"{split_file(root, split)} (the benchmark 'voc' takes splits of any length)"
        )
    _check_annotations(root, stems, name)
    images = list_images(root)
    examples = []
    for stem in stems:
        boxes = read_voc_boxes(root / "Annotations" / f"{stem}.xml", no_hard=no_hard)
        if len(boxes):
            image = root / "JPEGImages" / images.get(stem, f"{stem}.jpg")
            examples.append(Example(stem, image, boxes))
    if not examples:
        raise DatasetError(f"{name}: every object of split {split!r} in {root} is difficult or truncated")
    left_out = frozenset(stems) - {example.image_id for example in examples}
    notes = (f"{len(left_out)} of {len(stems)} images left out: all their objects are difficult or truncated",)
    return Benchmark(name, split, tuple(examples), notes if left_out else (), left_out)


def find_voc(root: Path, year: int) -> Path:
    """Find the ``VOC<year>`` folder from wherever a user may point.

    Args:
        root: the ``VOC<year>`` folder itself, its ``VOCdevkit``, the folder above that, or a folder
            with ``TrainVal/VOCdevkit`` as some archives unpack.
        year: four digits, such as 2007.

    Returns:
        The folder that holds ``Annotations`` and ``ImageSets/Main``.

    Raises:
        DatasetError: if none of the places has the layout; the message lists them.
    """
    folder = f"VOC{year}"
    places = [
        root / folder,
        root / "VOCdevkit" / folder,
        root / "TrainVal" / "VOCdevkit" / folder,
    ]
    if not _is_another_year(root, folder):
        places.insert(0, root)
    for place in places:
        if has_voc_layout(place):
            return place
    tried = ", ".join(str(place) for place in places)
    raise DatasetError(
        f"no {folder} below {root}: looked for Annotations and ImageSets/Main in {tried}; {_describe_folder(root)}"
    )


def has_voc_layout(root: Path) -> bool:
    """Whether ``root`` has the two folders that loading needs."""
    try:
        return (root / "Annotations").is_dir() and (root / "ImageSets" / "Main").is_dir()
    except OSError:  # such as a folder that must not be entered
        return False


def split_file(root: Path, split: str) -> Path:
    """The file that lists a split."""
    return root / "ImageSets" / "Main" / f"{split}.txt"


def read_split(root: Path, split: str) -> list[str]:
    """Read the image stems of a split: the first column of its file.

    Args:
        root: a folder in VOC layout.
        split: stem of a file in ``ImageSets/Main``; files of one class have a second column, which
            is ignored.

    Returns:
        Stems in file order, at least one.

    Raises:
        DatasetError: if the file is missing, unreadable, empty, or lists an image twice.
    """
    if Path(split).name != split:
        raise DatasetError(f"expected the name of a split such as trainval, not {split!r}")
    path = split_file(root, split)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        present = sorted(entry.stem for entry in path.parent.glob("*.txt"))
        has = f"there are {name_some(present, 8)}" if present else "there are none"
        raise DatasetError(f"no split {split!r}: {path} does not exist; {has}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"cannot read the split file {path}: {error}") from error
    stems = [line.split()[0] for line in text.splitlines() if line.strip()]
    if not stems:
        raise DatasetError(f"the split file {path} lists no image")
    twice = _repeated(stems)
    if twice:
        raise DatasetError(f"the split file {path} lists {len(twice)} images twice: {name_some(twice)}")
    return stems


def read_voc_boxes(path: Path, *, no_hard: bool = False) -> NDArray[np.float64]:
    """Read the object boxes of one annotation file.

    Args:
        path: a VOC XML file.
        no_hard: drop objects marked difficult or truncated.

    Returns:
        Boxes of shape (n, 4), float64, pixels, ``xmin - 1, ymin - 1, xmax, ymax``. n is 0 only where
        ``no_hard`` dropped everything.

    Raises:
        DatasetError: naming the file, if it is not XML, has no object, or has a malformed box.
    """
    objects = _read_objects(path)
    # Every box is checked, also of objects that no_hard drops.
    boxes = [(_read_box(item, path), _is_hard(item)) for item in objects]
    kept = [box for box, hard in boxes if not (no_hard and hard)]
    return np.asarray(kept, dtype=np.float64).reshape(-1, 4)


def main_class(path: Path) -> str:
    """The class of the largest object of an annotation file.

    Raises:
        DatasetError: as `read_voc_boxes`, and if an object has no name.
    """
    objects = _read_objects(path)
    corners = np.asarray([_read_box(item, path) for item in objects])
    sizes = (corners[:, 2] - corners[:, 0]) * (corners[:, 3] - corners[:, 1])
    name = objects[int(sizes.argmax())].findtext("name", "").strip()
    if not name:
        raise DatasetError(f"{path} has an <object> without a <name>")
    return name


def _read_objects(path: Path) -> list[ET.Element]:
    try:
        tree = ET.fromstring(path.read_bytes())  # noqa: S314 - local files; expat stops entity bombs
    except OSError as error:
        raise DatasetError(f"cannot read {path}: {error}") from error
    except (ET.ParseError, LookupError, ValueError) as error:
        raise DatasetError(f"{path} is not well-formed XML: {error}") from error
    objects = tree.findall("object")
    if not objects:
        raise DatasetError(f"{path} has no <object>: an image without a box cannot be scored")
    return objects


def list_images(root: Path) -> dict[str, str]:
    """Map stems to file names in ``JPEGImages`` with one directory listing; empty if it is absent."""
    folder = root / "JPEGImages"
    found: dict[str, str] = {}
    ranks: dict[str, int] = {}
    for name in _listing(folder):
        stem, dot, ending = name.rpartition(".")
        suffix = (dot + ending).lower()
        if suffix not in IMAGE_SUFFIXES:
            continue
        rank = IMAGE_SUFFIXES.index(suffix)
        if rank < ranks.get(stem, len(IMAGE_SUFFIXES)):
            found[stem], ranks[stem] = name, rank
    return found


def list_annotations(root: Path) -> set[str]:
    """Stems of the XML files in ``Annotations``; empty if the folder is absent."""
    return {name.removesuffix(".xml") for name in _listing(root / "Annotations") if name.endswith(".xml")}


def _read_box(item: ET.Element, path: Path) -> tuple[float, float, float, float]:
    box = item.find("bndbox")  # a direct child: VOC2012 nests further boxes in <part>
    if box is None:
        raise DatasetError(f"{path}: an <object> has no <bndbox>")
    corners = [box.findtext(key, default="").strip() for key in _CORNERS]
    try:
        xmin, ymin, xmax, ymax = (float(text) for text in corners)
    except ValueError:
        raise DatasetError(f"{path}: {_CORNERS} must be numbers, got {tuple(corners)}") from None
    x1, y1 = xmin - 1, ymin - 1
    if not all(math.isfinite(value) for value in (xmin, ymin, xmax, ymax)):
        raise DatasetError(f"{path}: {_CORNERS} must be finite, got {tuple(corners)}")
    if xmax <= x1 or ymax <= y1:
        raise DatasetError(f"{path}: a <bndbox> is empty or inside out: {_CORNERS} = {tuple(corners)}")
    return x1, y1, xmax, ymax


def _is_hard(item: ET.Element) -> bool:
    return any(item.findtext(key, default="0").strip() == "1" for key in ("difficult", "truncated"))


def _check_layout(root: Path) -> None:
    if not has_voc_layout(root):
        raise DatasetError(
            f"{root} is not in VOC layout: looked for the folders Annotations and ImageSets/Main; "
            f"{_describe_folder(root)}"
        )


def _check_annotations(root: Path, stems: Sequence[str], name: str) -> None:
    present = list_annotations(root)
    missing = [f"{stem}.xml" for stem in stems if stem not in present]
    if missing:
        raise DatasetError(
            f"{name}: {len(missing)} of {len(stems)} annotation files are missing in "
            f"{root / 'Annotations'}: {name_some(missing)}"
        )


def _is_another_year(root: Path, folder: str) -> bool:
    """Whether the folder's own name says that it is a VOC of a different year."""
    name = root.name.upper()
    return len(name) == 7 and name.startswith("VOC") and name[3:].isdigit() and name != folder


def _describe_folder(root: Path) -> str:
    try:
        if not root.exists():
            return f"{root} does not exist"
        if not root.is_dir():
            return f"{root} is not a folder"
    except OSError as error:
        return f"{root} cannot be looked into: {error.strerror}"
    names = sorted(_listing(root))
    return f"{root} has {name_some(names, 8)}" if names else f"{root} is empty"


def _listing(folder: Path) -> list[str]:
    try:
        return [entry.name for entry in folder.iterdir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise DatasetError(f"cannot list {folder}: {error}") from error


def _repeated(names: Sequence[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]
