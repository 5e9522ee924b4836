"""Benchmarks in the layout of PASCAL VOC.

A VOC folder holds ``Annotations/*.xml``, ``JPEGImages/*`` and ``ImageSets/Main/<split>.txt``. Only the
annotations are read here: the image files may be absent until something wants to open them.
"""

import math
import re
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lostreg.datasets.base import Benchmark, Example, name_some, read_size
from lostreg.errors import DatasetError
from lostreg.images.files import SUFFIXES, is_note

_CORNERS = ("xmin", "ymin", "xmax", "ymax")
_SECOND_COLUMN = re.compile(r"\s+(-1|0|1)$")


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
        boxes, size = read_voc(root / "Annotations" / f"{stem}.xml", no_hard=no_hard)
        if len(boxes):
            image = root / "JPEGImages" / images.get(stem, f"{stem}.jpg")
            examples.append(Example(stem, image, boxes, size=size))
    why = "have no object" + (", or only difficult or truncated ones" if no_hard else "")
    if not examples:
        raise DatasetError(
            f"{name}: all {len(stems)} images of split {split!r} in {root} {why}: nothing can be scored; "
            "`lostreg discover` finds objects where there are no annotations"
        )
    left_out = frozenset(stems) - {example.image_id for example in examples}
    notes = (f"{len(left_out)} of {len(stems)} images left out: they {why}",)
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
    """Read the image stems of a split, which may hold spaces.

    Args:
        root: a folder in VOC layout.
        split: stem of a file in ``ImageSets/Main``; files of one class have a second column of -1, 0 and 1, which is
            left out where no annotation file has the name of the whole line.

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
    annotated = list_annotations(root)
    lines = [line.strip() for line in text.split("\n") if line.strip()]  # names may hold what else ends lines
    stems = [line if line in annotated else _SECOND_COLUMN.sub("", line) for line in lines]
    if not stems:
        raise DatasetError(f"the split file {path} lists no image")
    twice = _repeated(stems)
    if twice:
        raise DatasetError(f"the split file {path} lists {len(twice)} images twice: {name_some(twice)}")
    return stems


def read_voc(path: Path, *, no_hard: bool = False) -> tuple[NDArray[np.float64], tuple[int, int] | None]:
    """Read one annotation file.

    Args:
        path: a VOC XML file.
        no_hard: drop objects marked difficult or truncated.

    Returns:
        Boxes of shape (n, 4), float64, pixels, ``xmin - 1, ymin - 1, xmax, ymax``; and the image's (width, height) in
        pixels, None where the file has no size.

    Raises:
        DatasetError: naming the file, if it is no XML of this kind or has a malformed box.
    """
    root = _read_xml(path)
    # Every box is checked, also of objects that no_hard drops.
    boxes = [(_read_box(item, path), _is_hard(item)) for item in root.findall("object")]
    kept = [box for box, hard in boxes if not (no_hard and hard)]
    size = read_size(root.findtext("size/width"), root.findtext("size/height"))
    return np.asarray(kept, dtype=np.float64).reshape(-1, 4), size


def main_class(path: Path) -> str | None:
    """The class of the largest object of an annotation file; None where it has no object.

    Raises:
        DatasetError: as `read_voc`, and if an object has no name.
    """
    objects = _read_xml(path).findall("object")
    if not objects:
        return None
    corners = np.asarray([_read_box(item, path) for item in objects])
    sizes = (corners[:, 2] - corners[:, 0]) * (corners[:, 3] - corners[:, 1])
    name = objects[int(sizes.argmax())].findtext("name", "").strip()
    if not name:
        raise DatasetError(f"{path} has an <object> without a <name>")
    return name


def _read_xml(path: Path) -> ET.Element:
    """The root of an annotation file, its namespaces left out."""
    try:
        root = ET.fromstring(path.read_bytes())  # noqa: S314 - local files; expat stops entity bombs
    except OSError as error:
        raise DatasetError(f"cannot read {path}: {error}") from error
    except (ET.ParseError, LookupError, ValueError, RecursionError) as error:
        raise DatasetError(f"{path} is not well-formed XML: {error}") from error
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
    if root.tag != "annotation" and root.find("object") is None:
        raise DatasetError(f"{path}: expected a VOC <annotation>, found <{root.tag}>")
    return root


def list_images(root: Path) -> dict[str, str]:
    """Map stems to file names in ``JPEGImages`` with one directory listing; empty if it is absent."""
    ranked = []
    for name in _listing(root / "JPEGImages"):
        stem, dot, ending = name.rpartition(".")
        suffix = (dot + ending).lower()
        if suffix in SUFFIXES and not is_note(name):
            ranked.append((SUFFIXES.index(suffix), name, stem))
    return {stem: name for _, name, stem in sorted(ranked, reverse=True)}  # the first of the endings wins


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
