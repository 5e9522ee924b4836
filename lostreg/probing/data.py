"""Labelled data for linear probes: folders of classes, and images with a map of classes or depths each."""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lostreg.artifacts.probes import HELD_OUT, MIN_CLASSES
from lostreg.checks import whole_number, whole_seed
from lostreg.datasets.base import name_some
from lostreg.datasets.folder import find_images
from lostreg.defaults import IGNORED, PROBE_TASKS
from lostreg.errors import DatasetError, ImageError, OptionError
from lostreg.images.decode import decoding, read_header
from lostreg.images.files import SUFFIXES, ImageFile, is_note
from lostreg.inference.stream import available_cores
from lostreg.jsonio import as_line

CHOSEN_ON: Final = 0.2  # share of the training images that the penalty is chosen on
MIN_PAIRS: Final = 4  # two to train on, one to choose the penalty on, one to measure on
_PARTS: Final = (("train", "training"), ("val", "validation", "test"))  # names of the folders, the first that is there
_VOC_PLACES: Final = ("", "VOC2012", "VOCdevkit/VOC2012", "TrainVal/VOCdevkit/VOC2012")

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class ProbeData:
    """Images of one task with what is to be read off them.

    Attributes:
        task: ``classification``, ``segmentation``, ``depth`` or ``zero-shot``.
        root: the folder.
        images: in a fixed order.
        held_out: which of them the data sets apart to be measured on, (n,), bool; None where it does not.
        classes: their names; those of an index mask are its values. None with depth.
        labels: of classification and zero-shot: the class of each image, (n,); empty otherwise.
        maps: otherwise: the file of each image's mask or depth map.
    """

    task: str
    root: Path
    images: tuple[ImageFile, ...]
    held_out: NDArray[np.bool_] | None
    classes: tuple[str, ...]
    labels: Indices
    maps: tuple[Path, ...]

    def read_map(self, number: int) -> NDArray[Any]:
        """What is to be read off an image's pixels, at its original size.

        Returns:
            Shape (height, width): of segmentation int64, places in `classes`, -1 where the mask is ignored; of depth
            float32, NaN where it is missing.

        Raises:
            ImageError: if the file cannot be read any more.
        """
        if self.task == "depth":
            return read_depth(self.maps[number])
        values = np.array([int(name) for name in self.classes])
        mask = read_mask(self.maps[number])
        places = np.searchsorted(values, mask).clip(max=len(values) - 1)
        return np.where(values[places] == mask, places, -1)

    def split(self, seed: int, usable: Indices) -> tuple[Indices, Indices, Indices]:
        """Images to train on, to choose the penalty on, and to measure on, as sorted places in `images`.

        Of the training images, 20 % are those to choose on. Where the data holds none out, 30 % of all are measured on.
        Both shares are drawn class by class where images have classes, at least one of each. Zero-shot trains nothing:
        all are measured on.

        Args:
            seed: of the draws.
            usable: places of the images that count, sorted.
        """
        if self.task == "zero-shot":
            return usable[:0], usable[:0], usable
        random = np.random.default_rng(seed)
        if self.held_out is None:
            training, measuring = self._draw(usable, HELD_OUT, random)
        else:
            training, measuring = usable[~self.held_out[usable]], usable[self.held_out[usable]]
        return *self._draw(training, CHOSEN_ON, random), measuring

    def _draw(self, images: Indices, share: float, random: np.random.Generator) -> tuple[Indices, Indices]:
        """The others, and those that are drawn."""
        classes = self.labels[images] if len(self.labels) else np.zeros(len(images), np.int64)
        drawn = np.zeros(len(images), bool)
        for code in np.unique(classes):
            places = random.permutation(np.flatnonzero(classes == code))
            drawn[places[: max(1, round(share * len(places)))]] = True
        return images[~drawn], images[drawn]

    def check(self, usable: Indices) -> None:
        """Raise `DatasetError` where so few of the images are left that no split leaves some for each of its parts."""
        if self.task == "zero-shot":
            return
        training = usable if self.held_out is None else usable[~self.held_out[usable]]
        if self.held_out is not None and len(training) == len(usable):
            raise DatasetError(f"{self.root}: none of the images that are held out can be read")
        least = MIN_PAIRS if self.held_out is None else MIN_PAIRS - 2
        apart = "" if self.held_out is None else " of the training part"
        if not len(self.labels):
            if len(training) < least:
                raise DatasetError(f"{self.root}: expected at least {least} images{apart}, found {len(training)}")
            return
        counts = np.bincount(self.labels[training], minlength=len(self.classes))
        few = [f"{self.classes[code]} ({counts[code]})" for code in np.flatnonzero(counts < least)]
        if few:
            raise DatasetError(f"{self.root}: expected at least {least} images a class{apart}, not {name_some(few)}")

    def fingerprint(self) -> str:
        """SHA-256 over the names and sizes of all files, their classes and which are held out, in order."""
        digest = hashlib.sha256()
        for number, image in enumerate(self.images):
            answer = self.maps[number].name if self.maps else self.classes[self.labels[number]]
            is_held_out = self.held_out is not None and bool(self.held_out[number])
            name = image.path.relative_to(self.root).as_posix()
            sizes = [path.stat().st_size for path in (image.path, *self.maps[number : number + 1])]
            line = as_line({"image": name, "answer": answer, "held_out": is_held_out, "bytes": sizes})
            digest.update(line.encode() + b"\n")
        return digest.hexdigest()


def load_probe_data(folder: str | Path, task: str, *, ignore: Sequence[int] = IGNORED) -> ProbeData:
    """The labelled images of a folder, all checked but for the images' own pixels.

    Args:
        folder: laid out as docs/probes.md says.
        task: ``classification``, ``segmentation``, ``depth`` or ``zero-shot``.
        ignore: values of index masks that are no class.

    Raises:
        OptionError: if there is no such task.
        DatasetError: if the folder is not laid out so, a class or a map is missing, a map is of another size than its
            image, or there is nothing to tell apart.
        ImageError: if a map cannot be read.

    Example:
        >>> data = lostreg.load_probe_data("pets", "classification")
        >>> data.classes, len(data.images)
        (('cat', 'dog'), 10)
    """
    if task not in PROBE_TASKS:
        raise OptionError(f"task must be one of {', '.join(PROBE_TASKS)}, not {task!r}")
    root = Path(folder)
    if not root.is_dir():
        raise DatasetError(f"{root}: no such folder")
    if task == "classification":
        return _load_classes(root)
    if task == "zero-shot":
        return _load_named(root)
    return _load_maps(root, task, tuple(whole_number(value, "ignore", least=0) for value in ignore))


def check_seeds(seeds: Sequence[int]) -> tuple[int, ...]:
    """Seeds of splits, as plain integers.

    Raises:
        OptionError: if there is none, or one is not an integer of at least 0.
    """
    if not len(seeds):
        raise OptionError("expected at least one seed")
    return tuple(whole_seed(seed) for seed in seeds)


def _parts(folder: Path) -> tuple[Path, Path] | None:
    """The sub-folders to train on and to measure on; None where there is neither."""
    found = [next((folder / name for name in names if (folder / name).is_dir()), None) for names in _PARTS]
    if found[0] is not None and found[1] is not None:
        return found[0], found[1]
    for present, missing in zip(found, reversed(_PARTS), strict=True):
        if present is not None:
            raise DatasetError(f"{folder} has {present.name}, but none of {', '.join(missing)} beside it")
    return None


def _load_classes(root: Path) -> ProbeData:
    parts = _parts(root)
    training = _class_folders(root if parts is None else parts[0])
    measuring = _class_folders(parts[1]) if parts else {}
    classes = tuple(training)
    unknown = sorted(measuring.keys() - training.keys())
    if parts and unknown:
        raise DatasetError(f"{parts[0]} has no images of classes that are in {parts[1]}: {name_some(unknown)}")
    entries = [(path, name, False) for name, paths in training.items() for path in paths]
    entries += [(path, name, True) for name, paths in measuring.items() for path in paths]
    paths, names, apart = zip(*entries, strict=True)
    data = ProbeData(
        task="classification",
        root=root,
        images=tuple(ImageFile(path, exif=True) for path in paths),
        held_out=np.array(apart) if parts else None,
        classes=classes,
        labels=np.array([classes.index(name) for name in names]),
        maps=(),
    )
    data.check(np.arange(len(paths)))
    return data


def _load_named(root: Path) -> ProbeData:
    """Of two parts the one that is measured on alone; the other need not be there."""
    folders = _class_folders(next((root / name for name in _PARTS[1] if (root / name).is_dir()), root))
    return ProbeData(
        task="zero-shot",
        root=root,
        images=tuple(ImageFile(path, exif=True) for paths in folders.values() for path in paths),
        held_out=None,
        classes=tuple(folders),
        labels=np.repeat(np.arange(len(folders)), [len(paths) for paths in folders.values()]),
        maps=(),
    )


def _class_folders(folder: Path) -> dict[str, list[Path]]:
    """The images of each class, whose sub-folder has its name."""
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if len(names) < MIN_CLASSES:
        has = name_some(names) if names else "none"
        raise DatasetError(f"{folder}: expected a sub-folder for each of at least {MIN_CLASSES} classes, found {has}")
    found = {}
    for name in names:
        try:
            found[name] = find_images([str(folder / name)])
        except OptionError as error:  # no image in it
            raise DatasetError(f"class {name!r}: {error}") from error
    return found


@dataclass(frozen=True)
class _Kind:
    """What one task's maps are called, and how they are read."""

    word: str
    folders: tuple[str, ...]
    suffixes: tuple[str, ...]


_KINDS: Final = {
    "segmentation": _Kind("mask", ("masks", "annotations"), (".png",)),
    "depth": _Kind("depth map", ("depth", "depths"), (".png", ".tif", ".tiff", ".npy", ".npz")),
}

_Pair = tuple[Path, Path]


def _load_maps(root: Path, task: str, ignore: tuple[int, ...]) -> ProbeData:
    kind = _KINDS[task]
    voc = next((root / place for place in _VOC_PLACES if (root / place / "SegmentationClass").is_dir()), None)
    measuring: list[_Pair] | None
    if task == "segmentation" and voc is not None:
        training, measuring = _voc_pairs(voc)
    else:
        training, measuring = _folder_pairs(root, kind)
    pairs = training + (measuring or [])
    with ThreadPoolExecutor(available_cores()) as pool:
        checked = list(pool.map(lambda pair: _check_pair(pair, kind, _READERS[task]), pairs))
    images, seen = zip(*checked, strict=True)
    classes: tuple[str, ...] = ()
    if task == "segmentation":
        values = sorted(set().union(*(values.tolist() for values in seen)) - set(ignore))
        classes = tuple(str(value) for value in values)
        if len(classes) < MIN_CLASSES:
            raise DatasetError(
                f"{root}: expected masks of at least {MIN_CLASSES} classes, found {', '.join(classes) or 'none'} "
                f"(ignored: {', '.join(map(str, ignore)) or 'nothing'})"
            )
    elif not any(len(values) for values in seen):
        raise DatasetError(f"{root}: no pixel of the {len(pairs)} depth maps has a depth: 0, negative and NaN are none")
    data = ProbeData(
        task=task,
        root=root,
        images=images,
        held_out=np.arange(len(pairs)) >= len(training) if measuring is not None else None,
        classes=classes,
        labels=np.zeros(0, np.int64),
        maps=tuple(path for _, path in pairs),
    )
    data.check(np.arange(len(pairs)))
    return data


def _voc_pairs(root: Path) -> tuple[list[_Pair], list[_Pair]]:
    """Those of VOC's splits ``train`` and ``val``."""
    found = []
    for split in ("train", "val"):
        path = root / "ImageSets" / "Segmentation" / f"{split}.txt"
        try:
            stems = path.read_text(encoding="utf-8").split()
        except (OSError, UnicodeDecodeError) as error:
            raise DatasetError(f"cannot read the split file {path}: {error}") from error
        if not stems:
            raise DatasetError(f"the split file {path} lists no image")
        pairs = [(root / "JPEGImages" / f"{stem}.jpg", root / "SegmentationClass" / f"{stem}.png") for stem in stems]
        missing = [str(file) for pair in pairs for file in pair if not file.is_file()]
        if missing:
            raise DatasetError(f"{path} lists {len(missing)} files that are missing: {name_some(missing)}")
        found.append(pairs)
    return found[0], found[1]


def _folder_pairs(root: Path, kind: _Kind) -> tuple[list[_Pair], list[_Pair] | None]:
    """Those of ``images`` and of the folder of maps beside it, by name without ending; in two parts or in one."""
    images = root / "images"
    maps = next((root / name for name in kind.folders if (root / name).is_dir()), None)
    if not images.is_dir() or maps is None:
        places = ", ".join(place or "itself" for place in _VOC_PLACES)
        voc = f", or VOC 2012, whose SegmentationClass was looked for in {places}" if kind.word == "mask" else ""
        raise DatasetError(f"{root}: expected the folders images and {kind.folders[0]}{voc} (see docs/probes.md)")
    parts, map_parts = _parts(images), _parts(maps)
    if (parts is None) != (map_parts is None):
        raise DatasetError(f"{root}: expected the same parts in {images.name} and {maps.name}, such as train and val")
    if parts is None or map_parts is None:
        return _match(images, maps, kind), None
    return _match(parts[0], map_parts[0], kind), _match(parts[1], map_parts[1], kind)


def _match(images: Path, maps: Path, kind: _Kind) -> list[_Pair]:
    sources, answers = _by_stem(images, SUFFIXES), _by_stem(maps, kind.suffixes)
    if not sources.keys() & answers.keys():
        endings = ", ".join(kind.suffixes)
        raise DatasetError(f"no pairs: no image in {images} has a {kind.word} of its name in {maps} ({endings})")
    for what, alone in (
        (f"images in {images} have no {kind.word} in {maps}", sources.keys() - answers.keys()),
        (f"{kind.word}s in {maps} have no image in {images}", answers.keys() - sources.keys()),
    ):
        if alone:
            raise DatasetError(f"{len(alone)} {what}: {name_some(sorted(alone))}")
    return [(sources[stem], answers[stem]) for stem in sorted(sources)]


def _by_stem(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    """The files with these endings in a folder and below, by name without ending."""
    files = (path for path in folder.rglob("*") if path.suffix.lower() in suffixes and path.is_file())
    paths = sorted(path for path in files if not is_note(path.name))
    names = [path.relative_to(folder).with_suffix("").as_posix() for path in paths]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise DatasetError(f"{folder} has several files of one name: {name_some(twice)}")
    return dict(zip(names, paths, strict=True))


def _check_pair(pair: _Pair, kind: _Kind, read: Callable[[Path], NDArray[Any]]) -> tuple[ImageFile, NDArray[np.int64]]:
    """The image, seen the way up that its map has; and which values the map has, or whether it has any depth."""
    path, answer = pair
    found = read(answer)
    values = np.unique(found) if kind.word == "mask" else np.flatnonzero(~np.isnan(found).all())
    try:
        header = read_header(path)
    except ImageError:  # told when its turn comes
        return ImageFile(path, exif=False), values
    size = found.shape[1], found.shape[0]
    for exif in (False, True):
        if header.size(exif=exif) == size:
            return ImageFile(path, exif), values
    width, height = header.size(exif=True)
    raise DatasetError(
        f"{answer}: expected a {kind.word} of its image's {width}x{height} pixels, not {size[0]}x{size[1]}"
    )


def read_mask(path: Path) -> NDArray[np.int64]:
    """An index mask: a PNG file of one channel or with a palette, whose values or palette indices name classes.

    Returns:
        Shape (height, width).

    Raises:
        ImageError: if it cannot be read.
        DatasetError: if it has colours.
    """
    values, mode = _read_picture(path, ("PNG",))
    if mode not in ("P", "L", "1") and not mode.startswith("I"):
        raise DatasetError(f"{path}: expected an index mask, of one channel or with a palette, found {mode}")
    return values.astype(np.int64)


def read_depth(path: Path) -> NDArray[np.float32]:
    """A depth map: PNG or TIFF of one channel, ``.npy``, or ``.npz`` with one array or one called ``depth``.

    Returns:
        Shape (height, width), in the file's unit; NaN where the file has 0, less, NaN or infinity.

    Raises:
        ImageError: if it cannot be read.
        DatasetError: if it is of another shape or type.
    """
    values: NDArray[Any]
    if path.suffix.lower() in (".npy", ".npz"):
        with decoding(str(path)):
            loaded = np.load(path, mmap_mode="r", allow_pickle=False)  # whatever size the header says
            if isinstance(loaded, np.ndarray):
                values = loaded
            else:
                with loaded:
                    values = loaded[loaded.files[0] if len(loaded.files) == 1 else "depth"]
    else:
        values, mode = _read_picture(path, ("PNG", "TIFF"))
        if mode not in ("L", "F") and not mode.startswith("I"):
            raise DatasetError(f"{path}: expected a depth map of one channel, found {mode}")
    plane = values[..., 0] if values.ndim == 3 and values.shape[2] == 1 else values
    if plane.ndim != 2 or plane.dtype.kind not in "fiu" or not plane.size:
        raise DatasetError(f"{path}: expected depths of shape (height, width), found {values.dtype} {values.shape}")
    with np.errstate(over="ignore", invalid="ignore"):  # beyond float32 is infinity, and so missing
        depths = plane.astype(np.float32)
        depths[~(np.isfinite(depths) & (depths > 0))] = np.nan
    return depths


def _read_picture(path: Path, formats: tuple[str, ...]) -> tuple[NDArray[Any], str]:
    """Pixels as they are stored, and Pillow's word for their kind."""
    with decoding(str(path)), Image.open(path, formats=formats) as picture:
        return np.asarray(picture), picture.mode


_READERS: Final[dict[str, Callable[[Path], NDArray[Any]]]] = {"segmentation": read_mask, "depth": read_depth}
