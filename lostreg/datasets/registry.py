"""The table of benchmarks, and loading one by its name."""

import difflib
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from lostreg.datasets.base import Benchmark
from lostreg.datasets.coco import load_coco
from lostreg.datasets.coco20k import COCO20K_COUNT, find_coco20k, load_coco20k
from lostreg.datasets.voc import find_voc, has_voc_layout, load_voc
from lostreg.errors import DatasetError, OptionError

DEFAULT_ROOT = Path("datasets")
FETCHABLE = ("voc07", "voc12", "coco20k")

_VOC_TERMS = "images from Flickr, under Flickr's terms of use and their owners' rights"
_COCO_TERMS = "annotations CC BY 4.0; images from Flickr under Flickr's terms of use"


@dataclass(frozen=True)
class Split:
    """One split of a benchmark.

    Attributes:
        name: ``trainval`` and the like.
        images: how many images it has, or None where that is not fixed.
    """

    name: str
    images: int | None


@dataclass(frozen=True)
class BenchmarkInfo:
    """One row of the table: what there is to know of a benchmark without having it.

    Attributes:
        name: what the user types.
        title: what it is, in a few words.
        default_split: loaded when no split is asked for; empty for benchmarks without splits.
        splits: the splits with public boxes, the default one first; empty where any or none goes.
        images: how many images it has in its default split, or None where that is not fixed.
        options: the arguments of `load_benchmark` that apply to it.
        terms: licence or terms of use, in one line.
        source: where to get it, in one line.
        year: of VOC, or None.
    """

    name: str
    title: str
    default_split: str
    splits: tuple[Split, ...]
    images: int | None
    options: tuple[str, ...]
    terms: str
    source: str
    year: int | None = None


@dataclass(frozen=True)
class FoundBenchmark:
    """A row of the table with the folder it was found in.

    Attributes:
        info: the row.
        path: the folder, or None where it is not there.
    """

    info: BenchmarkInfo
    path: Path | None


def _voc_row(year: int, *splits: tuple[str, int]) -> BenchmarkInfo:
    name = f"voc{year % 100:02d}"
    return BenchmarkInfo(
        name=name,
        title=f"PASCAL VOC {year}",
        default_split=splits[0][0],
        splits=tuple(Split(*split) for split in splits),
        images=splits[0][1],
        options=("root", "split", "no_hard"),
        terms=_VOC_TERMS,
        source=f"lostreg datasets fetch {name}",
        year=year,
    )


_ROWS = (
    _voc_row(2007, ("trainval", 5011), ("train", 2501), ("val", 2510), ("test", 4952)),
    _voc_row(2012, ("trainval", 11540), ("train", 5717), ("val", 5823)),
    BenchmarkInfo(
        name="coco20k",
        title="COCO 20k, a subset of COCO train2014",
        default_split="",
        splits=(),
        images=COCO20K_COUNT,
        options=("root",),
        terms=_COCO_TERMS,
        source="lostreg datasets fetch coco20k",
    ),
    BenchmarkInfo(
        name="sample",
        title="a few images that come with the source of lostreg",
        default_split="all",
        splits=(Split("all", None),),
        images=None,
        options=("root", "split", "no_hard"),
        terms="see datasets/sample/README.md",
        source="datasets/sample in the repository",
    ),
    BenchmarkInfo(
        name="voc",
        title="any folder in VOC layout",
        default_split="trainval",
        splits=(),
        images=None,
        options=("root", "split", "no_hard"),
        terms="those of your data",
        source="your own: --root DIR [--split NAME]",
    ),
    BenchmarkInfo(
        name="coco",
        title="any COCO instances file with its images",
        default_split="",
        splits=(),
        images=None,
        options=("images", "annotations"),
        terms="those of your data",
        source="your own: --images DIR --annotations FILE.json",
    ),
)

BENCHMARKS: Mapping[str, BenchmarkInfo] = MappingProxyType({row.name: row for row in _ROWS})
"""The rows by name, in the order in which they are shown."""


def load_benchmark(
    name: str,
    *,
    root: str | Path | None = None,
    split: str | None = None,
    images: str | Path | None = None,
    annotations: str | Path | None = None,
    no_hard: bool = False,
) -> Benchmark:
    """Load a benchmark by its name. The image files need not be there: see `require_images`.

    Args:
        name: a key of `BENCHMARKS`.
        root: where the data is; None means ``datasets`` below the working directory.
        split: None means the benchmark's default split.
        images: folder of images, for ``coco`` only; None means that of the annotations file, which will do
            for scoring.
        annotations: COCO instances file, for ``coco`` only.
        no_hard: drop difficult and truncated objects, for benchmarks in VOC layout.

    Returns:
        The loaded benchmark, with as many images as the table promises.

    Raises:
        DatasetError: if the name or the split is unknown, or the data is missing or malformed.
        OptionError: if an argument does not apply to this benchmark, or a needed one is missing.

    Example:
        >>> benchmark = lostreg.load_benchmark("voc", root=Path("VOCdevkit/VOC2007"))
        >>> len(benchmark), benchmark.examples[0].boxes.tolist()
        (3, [[9.0, 9.0, 60.0, 60.0]])
    """
    info = benchmark_info(name)
    given = {"root": root, "split": split, "images": images, "annotations": annotations}
    used = {key for key, value in given.items() if value is not None} | ({"no_hard"} if no_hard else set())
    _check_options(info, used)
    if info.name == "coco":
        if annotations is None:
            raise OptionError("coco needs an annotations file")
        folder = Path(annotations).parent if images is None else Path(images)
        return load_coco(folder, Path(annotations), name=name)
    place = DEFAULT_ROOT if root is None else Path(root)
    split = info.default_split if split is None else split
    expected = _expected_images(info, split)
    try:
        folder = _FINDERS[info.name](place)
    except DatasetError as error:
        if name not in FETCHABLE:
            raise
        raise DatasetError(f"{error}; `{fetch_command(name, root)}` fetches it") from error
    if info.name == "coco20k":
        return load_coco20k(folder, name=name)
    return load_voc(folder, split, name=name, no_hard=no_hard, expected=expected)


def find_benchmarks(root: Path | None = None) -> list[FoundBenchmark]:
    """Look where each benchmark would be found, without reading any annotation.

    Args:
        root: as in `load_benchmark`.

    Returns:
        One entry per row of `BENCHMARKS`, in order. ``voc`` and ``coco`` are never found: they are
        wherever the user says.
    """
    place = DEFAULT_ROOT if root is None else root
    return [FoundBenchmark(info, _look_for(info, place)) for info in BENCHMARKS.values()]


def benchmark_info(name: str) -> BenchmarkInfo:
    """The row of a benchmark.

    Raises:
        DatasetError: if there is none; the message has the nearest names and the whole list.
    """
    if name in BENCHMARKS:
        return BENCHMARKS[name]
    near = difflib.get_close_matches(name.lower(), BENCHMARKS, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise DatasetError(f"unknown benchmark {name!r}: {hint}known are {', '.join(BENCHMARKS)}")


def fetch_command(name: str, root: str | Path | None) -> str:
    """The command that downloads a benchmark of `FETCHABLE` to where it is looked for."""
    return shlex.join(["lostreg", "datasets", "fetch", name, *([] if root is None else ["--root", str(root)])])


def find_sample(root: Path) -> Path:
    """The folder of the sample benchmark: ``root`` itself or ``root/sample``.

    Raises:
        DatasetError: if neither is in VOC layout.
    """
    # The split file tells the sample from any other folder in VOC layout.
    for place in (root, root / "sample"):
        if has_voc_layout(place) and (place / "ImageSets" / "Main" / "all.txt").is_file():
            return place
    raise DatasetError(
        f"no sample benchmark below {root}: looked for Annotations and ImageSets/Main/all.txt in "
        f"{root} and {root / 'sample'}; it comes with the repository of lostreg, in datasets/sample"
    )


def _your_own(root: Path) -> Path:
    """The general ``voc`` is exactly where the user says."""
    return root


_FINDERS: Mapping[str, Callable[[Path], Path]] = {
    "voc07": lambda root: find_voc(root, 2007),
    "voc12": lambda root: find_voc(root, 2012),
    "coco20k": find_coco20k,
    "sample": find_sample,
    "voc": _your_own,
}


def _look_for(info: BenchmarkInfo, root: Path) -> Path | None:
    if info.name in ("voc", "coco"):
        return None
    try:
        return _FINDERS[info.name](root)
    except DatasetError:
        return None


def _check_options(info: BenchmarkInfo, used: set[str]) -> None:
    if info.name == "voc" and "root" not in used:
        raise OptionError("voc needs a root: the folder that holds Annotations and ImageSets")
    wrong = sorted(used - set(info.options))
    if wrong:
        raise OptionError(f"{info.name} takes no {' or '.join(wrong)}: it takes {', '.join(info.options)}")


def _expected_images(info: BenchmarkInfo, split: str) -> int | None:
    """How many images the split must have; raises if the benchmark has no such split."""
    if not info.splits:
        return None
    counts = {entry.name: entry.images for entry in info.splits}
    if split in counts:
        return counts[split]
    known = ", ".join(counts)
    if info.name == "voc12" and split == "test":
        raise DatasetError(
            f"voc12: the boxes of the test split were never published, so it cannot be scored; use {known}"
        )
    raise DatasetError(f"{info.name} has no split {split!r}: expected {known} (the benchmark 'voc' takes any split)")
