"""The formats of other tools: a row each, and a module that writes it. Nothing is imported before it is needed."""

from dataclasses import dataclass
from importlib import import_module
from typing import Any, Final

OPTIONS: Final = ("label", "keep_empty", "files", "val_share", "image_url")
"""What only some formats have."""


@dataclass(frozen=True)
class Format:
    """A format of another tool.

    Attributes:
        module: within `lostreg.exports`. Its function ``write`` takes the file or folder to write, an `ExportSet`, and
            as keywords the options of the format but ``keep_empty``; a folder's also ``on_progress``. One that is
            streamed takes predictions, one by one, in place of the `ExportSet`, and ``in_parts``.
        suffixes: of the files that are written, that of ``--out`` first; none for a folder with the images.
        options: which of `OPTIONS` it has.
        needs_sizes: whether it needs the sizes of the images; boxes are then cut to these.
        has_masks: whether it has a place for masks.
        has_scores: whether it has a place for scores.
        has_unreadable: whether it lists images that could not be read.
        names_files: whether readers look for image files by its names, of which those that are not UTF-8 are changed.
        is_streamed: whether it is written as the predictions are read, so that no number of them is too many; in a
            store then also as a folder of parts.
    """

    module: str
    suffixes: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    needs_sizes: bool = True
    has_masks: bool = False
    has_scores: bool = False
    has_unreadable: bool = False
    names_files: bool = False
    is_streamed: bool = False

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder with the images."""
        return not self.suffixes

    def write(self, *arguments: Any, **options: Any) -> int:
        """Write an export; how many images were encoded anew for it."""
        encoded: int = import_module(f"lostreg.exports.{self.module}").write(*arguments, **options)
        return encoded


FORMATS: Final[dict[str, Format]] = {
    "coco": Format("coco", (".json",), ("label", "keep_empty"), has_masks=True, has_scores=True, names_files=True),
    "voc": Format("voc", options=("label", "keep_empty", "files")),
    "yolo": Format("yolo", options=("label", "keep_empty", "files", "val_share"), has_masks=True),
    "csv": Format("csv_table", (".csv",), needs_sizes=False, has_scores=True, has_unreadable=True),
    "parquet": Format(
        "parquet",
        (".parquet",),
        needs_sizes=False,
        has_masks=True,
        has_scores=True,
        has_unreadable=True,
        is_streamed=True,
    ),
    "labelstudio": Format("labelstudio", (".json", ".xml"), ("label", "image_url"), has_scores=True, names_files=True),
}


def described_places() -> str:
    """What ``--out`` is for each format, in words."""
    folders = [name for name, row in FORMATS.items() if row.is_folder]
    files = [f"{row.suffixes[0]} for {name}" for name, row in FORMATS.items() if not row.is_folder]
    return f"a folder for {' and '.join(folders)}; a file for the others: {', '.join(files)}"


def formats_with(option: str) -> list[str]:
    """The names of the formats that have an option."""
    return [name for name, row in FORMATS.items() if option in row.options]
