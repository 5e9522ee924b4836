"""The class of each image: of its sub-folder, or of its largest object in VOC or COCO annotations."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from lostreg.artifacts.probes import MIN_CLASS_IMAGES, MIN_CLASSES
from lostreg.datasets.coco import main_categories
from lostreg.datasets.voc import main_class
from lostreg.errors import OptionError


def folder_classes(paths: Sequence[Path]) -> list[str | None]:
    """The name of each image's folder, where folders look like classes: several of them, with several images each.

    Returns:
        One name an image; None throughout where the folders are no classes.
    """
    counts = Counter(path.parent for path in paths)
    sizeable = [folder for folder, count in counts.items() if count >= MIN_CLASS_IMAGES]
    if len(sizeable) < MIN_CLASSES or len({folder.parent for folder in counts}) > 1:
        return [None] * len(paths)
    return [path.parent.name for path in paths]


def annotated_classes(paths: Sequence[Path], annotations: Path) -> list[str | None]:
    """The class of each image's largest object.

    Args:
        paths: the images.
        annotations: a COCO JSON file, whose file names end as the images' paths do, or VOC's folder ``Annotations``
            of XML files named as the images.

    Returns:
        One name an image; None where there are no annotations.

    Raises:
        OptionError: if no image is annotated.
        DatasetError: if annotations cannot be read.
    """
    if annotations.is_dir():
        files = [annotations / f"{path.stem}.xml" for path in paths]
        found = [main_class(file) if file.is_file() else None for file in files]
    else:
        found = _by_path(paths, main_categories(annotations))
    if not any(found):
        raise OptionError(f"{annotations} has no annotation of any of the {len(paths)} images")
    return found


def _by_path(paths: Sequence[Path], categories: Mapping[str, str]) -> list[str | None]:
    """Of each path the category of the file name that it ends with; else of the only file name that ends like it."""
    last: dict[str, list[str]] = {}
    for name, category in categories.items():
        last.setdefault(PurePosixPath(name).name, []).append(category)
    found: list[str | None] = []
    for path in paths:
        tails = ("/".join(path.parts[start:]) for start in range(len(path.parts)))
        whole = next((categories[tail] for tail in tails if tail in categories), None)
        alike = last.get(path.name, [])
        found.append(whole or (alike[0] if len(alike) == 1 else None))
    return found
