"""The class of each image: of its sub-folder, or of its largest object in VOC or COCO annotations."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

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
        by_name = {Path(name).name: category for name, category in main_categories(annotations).items()}
        found = [by_name.get(path.name) for path in paths]
    if not any(found):
        raise OptionError(f"{annotations} has no annotation of any of the {len(paths)} images")
    return found
