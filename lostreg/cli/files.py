"""Files and folders that commands write: whether they may, and what they are called."""

import os
import posixpath
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lostreg.errors import ImageUnavailableError, LostregError, OptionError
from lostreg.text import Unused

if TYPE_CHECKING:
    from lostreg.images.stores import StoredImage


def check_writable(target: Path, purpose: str) -> None:
    """Raise `OptionError` if the file could not or should not be written in the end: better now than after the pass.

    Args:
        target: the file.
        purpose: what it is for, for the message.
    """
    from lostreg.images.files import SUFFIXES

    if target.suffix.lower() in SUFFIXES or target.is_dir():
        raise OptionError(f"--out {target}: expected a file for {purpose}, not an image or a folder")
    folder = next(parent for parent in target.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise OptionError(f"--out {target}: {folder} is a file, expected a folder")
    if not os.access(target if target.exists() else folder, os.W_OK):
        raise OptionError(f"--out {target} cannot be written: permission denied")


def make_folder(folder: Path) -> None:
    """Make a folder, or raise `OptionError` if that or writing to it is impossible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(f"cannot make the folder {folder}: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise OptionError(f"cannot write to {folder}: permission denied")


def check_place(folder: Path | str) -> None:
    """Raise `OptionError` if a folder of this machine could not be made or written: better now than with a model.

    Args:
        folder: that a command writes; nothing is said of the URI of a store's.
    """
    if isinstance(folder, str):
        return
    place = next(one for one in (folder.absolute(), *folder.absolute().parents) if one.exists())
    if not place.is_dir():
        raise OptionError(f"--out {folder}: {place} is a file, expected a folder")
    if not os.access(place, os.W_OK):
        raise OptionError(f"--out {folder} cannot be written: permission denied")


def check_there(images: "Sequence[Path | StoredImage]") -> None:
    """Raise `ImageUnavailableError` if not one of the images can be there: that needs no model to be seen."""
    if not any(may_be_there(image) for image in images):
        others = f", nor any of {len(images) - 1} others" if len(images) > 1 else ""
        raise ImageUnavailableError(f"{images[0]}: no such file{others}")


def may_be_there(image: "Path | StoredImage") -> bool:
    """Whether an image is a file of this machine that exists, or lies elsewhere."""
    return not isinstance(image, Path) or os.path.exists(image)  # noqa: PTH110 - of a name too long it says False


def check_written(paths: Iterable[Path]) -> None:
    """Raise `LostregError` if files that were written are not there any more: no command says that they are."""
    gone = [path for path in paths if not path.exists()]
    if gone:
        raise LostregError(
            f"{len(gone)} files that were written are gone, such as {gone[0]}: someone deleted them meanwhile; run the "
            "command again"
        )


def unique_names(images: Iterable["Path | StoredImage"]) -> Iterator[str]:
    """A name for a file of each image: images of one name in different folders get different ones.

    It is that of the image's file without suffix; the whole last part of another image's name, as in `t.parquet#17`.
    """
    unused = Unused()
    return (unused.name(image.stem if isinstance(image, Path) else posixpath.basename(image.name)) for image in images)


def check_mask_pictures(option: str, max_objects: int) -> None:
    """Raise `OptionError` if pictures of masks could not tell so many objects apart."""
    from lostreg.images.masks import MOST_OBJECTS

    if max_objects > MOST_OBJECTS:
        raise OptionError(f"{option} tells {MOST_OBJECTS} objects apart, not {max_objects}: see --max-objects")


def mask_paths(folder: Path, arguments: Iterable[str], images: "list[Path | StoredImage]") -> list[Path]:
    """Where the mask of each image goes.

    Raises:
        OptionError: if the folder cannot be written, or masks could be taken for images there.
    """
    make_folder(folder)
    refuse_among_images("--mask-dir", folder, arguments, images)
    return [folder / f"{name}.png" for name in unique_names(images)]


def refuse_among_images(
    option: str, folder: Path, arguments: Iterable[str], images: Iterable["Path | StoredImage"]
) -> None:
    """Raise `OptionError` if pictures in a folder could replace images, or be taken for images the next time.

    Args:
        option: that names the folder.
        folder: where pictures go.
        arguments: what the user named as images: those that are folders are searched whole.
        images: these.
    """
    place = folder.resolve()
    searched = [Path(argument).resolve() for argument in arguments if Path(argument).is_dir()]
    taken = {image.resolve().parent for image in images if isinstance(image, Path)}
    if place in taken or any(place.is_relative_to(path) for path in searched):
        raise OptionError(f"{option} {folder} is among the images: give another folder")
