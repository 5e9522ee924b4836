"""The frame that boxes refer to: the image as its file stores it, or turned as its EXIF orientation says."""

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

from lostreg.datasets.base import Benchmark, Example
from lostreg.errors import ImageError

if TYPE_CHECKING:
    from lostreg.images.decode import Header

# Published for the pixels as they are stored: their files need not be looked into.
_STORED = ("voc07", "voc12", "coco20k")


def choose_frames(benchmark: Benchmark, exif: bool | None = None) -> Benchmark:
    """Decide for each image of a benchmark whether its boxes refer to the stored or to the turned image.

    An image whose EXIF orientation swaps width and height is turned where that gives the size in its annotations. Where
    that cannot tell (no size, a square, an image that is upside down or mirrored), the images that could be told of
    decide by their majority, else it is as stored.

    Args:
        benchmark: its images must exist.
        exif: True for all turned, False for none; None to decide.

    Returns:
        The benchmark with `Example.exif` decided, and notes on what was.

    Example:
        >>> from lostreg.datasets import choose_frames
        >>> benchmark = choose_frames(lostreg.load_benchmark("voc", root=Path("VOCdevkit/VOC2007")))
        >>> [example.exif for example in benchmark.examples]
        [False, False, False]
    """
    if benchmark.name in _STORED and exif is None:
        return benchmark
    headers = {example.image_id: _header(example) for example in benchmark.examples}
    # Whether an image is turned, where it makes a difference; None where its size does not say.
    told = {
        example.image_id: _is_turned(example, header) if exif is None else exif
        for example in benchmark.examples
        if (header := headers[example.image_id]) and header.orientation.value != 1
    }
    votes = Counter(told.values())
    otherwise = votes[True] > votes[False]
    frames = {image_id: otherwise if turned is None else turned for image_id, turned in told.items()}
    examples = [replace(example, exif=frames.get(example.image_id, False)) for example in benchmark.examples]
    others = [
        (example, size)
        for example in examples
        if (header := headers[example.image_id]) and example.size not in (None, size := header.size(exif=example.exif))
    ]
    notes = []
    if turned := sum(frames.values()):
        reason = "the size in their annotations says so" if exif is None else "--exif"
        notes.append(f"{turned} of {len(examples)} images are turned as their EXIF orientation says ({reason})")
    if stored := len(frames) - sum(frames.values()):
        notes.append(f"{stored} of {len(examples)} images with an EXIF orientation are taken as they are stored")
    if doubtful := votes[None]:
        notes.append(
            f"of these, {doubtful} are taken as {'turned' if otherwise else 'stored'} though sizes do not tell: "
            f"--{'no-' * otherwise}exif takes all the other way"
        )
    if others:
        example, size = others[0]
        notes.append(
            f"{len(others)} images have another size than their annotations say, such as {example.path.name}: "
            f"{size[0]}x{size[1]}, not {example.size[0]}x{example.size[1]}; boxes may lie elsewhere"  # type: ignore[index]
        )
    return replace(benchmark, examples=tuple(examples), notes=(*benchmark.notes, *notes))


def _header(example: Example) -> "Header | None":
    """None of an image that cannot be read: that is told where it is decoded."""
    from lostreg.images.decode import read_header  # loads OpenCV, which `lostreg --help` does not need

    try:
        return read_header(example.path)
    except ImageError:
        return None


def _is_turned(example: Example, header: "Header") -> bool | None:
    stored, turned = header.size(exif=False), header.size(exif=True)
    if stored == turned or example.size not in (stored, turned):
        return None
    return example.size == turned
