"""What a run writes of an image: made where the image is computed, appended where the run's folder is."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice, takewhile
from pathlib import Path
from typing import Any, Protocol, cast

from lostreg.datasets.base import ImageId
from lostreg.errors import ImageError
from lostreg.images.decode import ImageSource
from lostreg.images.masks import mask_png
from lostreg.images.stores import StoredImage
from lostreg.inference.discovery import Discovery
from lostreg.runs.folder import Run
from lostreg.runs.maps import maps_of
from lostreg.runs.predictions import Prediction, from_discovery, from_error


@dataclass(frozen=True)
class Asked:
    """An image that is to be computed.

    Attributes:
        image_id: of its lines.
        source: what is decoded.
        place: where it is kept, as its lines say it.
        truth: ground-truth boxes that its maps tell of, shape (m, 4); None where there is no ground truth.
    """

    image_id: ImageId
    source: ImageSource
    place: Path | StoredImage
    truth: Any = None


@dataclass(frozen=True)
class WrittenLine:
    """A line whose text is made already."""

    image_id: ImageId
    text: str

    def to_line(self) -> str:
        """The text."""
        return self.text


@dataclass(frozen=True)
class Entry:
    """What is kept of an image.

    Attributes:
        prediction: without masks, which only its line holds.
        line: of the predictions file.
        maps: the line of the maps file; None for an image that could not be read.
        error: why it could not be.
        picture: of its masks, as PNG; None where that was not asked for.
    """

    prediction: Prediction
    line: WrittenLine
    maps: WrittenLine | None = None
    error: ImageError | None = None
    picture: bytes | None = None


Make = Callable[[Asked, Discovery | ImageError], Entry]


def make_entry(
    asked: Asked, outcome: Discovery | ImageError, *, masks: bool = False, mask_pictures: bool = False
) -> Entry:
    """The entry of an image.

    Args:
        asked: the image.
        outcome: what was found in it.
        masks: whether its prediction holds masks.
        mask_pictures: whether a picture of the masks is made.
    """
    image_id = asked.image_id
    if isinstance(outcome, ImageError):
        prediction = from_error(image_id, outcome, asked.place)
        return Entry(prediction, WrittenLine(image_id, prediction.to_line()), error=outcome)
    prediction = from_discovery(image_id, outcome, masks=masks)
    return Entry(
        replace(prediction, masks=None),
        WrittenLine(image_id, prediction.to_line()),
        WrittenLine(image_id, maps_of(image_id, asked.place, outcome, asked.truth).to_line()),
        picture=mask_png(outcome.labels()) if mask_pictures else None,
    )


Compute = Callable[[Iterable[ImageSource]], Iterator[Discovery | ImageError]]


class Workers(Protocol):
    """Processes, here or on other machines, each of which computes images as this one would."""

    @property
    def device(self) -> str:
        """Where each of them computes, as `describe_device` says it."""

    @property
    def chunk_images(self) -> int:
        """How many images go to one of them at a time: a multiple of what shares packs."""

    def entries(self, make: Make, chunks: Iterable[Sequence[Asked]]) -> Iterator[Sequence[Entry]]:
        """The entries of chunks, in whatever order they are done; of chunks that are lost, none."""


def missing_entries(
    run: Run[Any],
    ask: Callable[[Any], Asked],
    make: Make,
    *,
    compute: Compute,
    batch_size: int,
    workers: Workers | None = None,
) -> Iterator[Sequence[Entry]]:
    """The entries of the images that a run misses, some at a time.

    Args:
        run: resumed.
        ask: the image of an id.
        make: makes an entry; for workers, one that can be pickled.
        compute: as `Discoverer.outcomes`, for images that are computed here.
        batch_size: images that share packs at most.
        workers: who computes, if not this process.
    """
    if workers is None:
        for image_id, outcome in run.outcomes(compute, lambda image_id: ask(image_id).source, batch_size):
            yield [make(ask(image_id), outcome)]
    else:
        while any(True for _ in run.missing_batches(batch_size)):  # what was at hand of a lost worker is missing still
            chunks = _chunks(run.missing_batches(batch_size), ask, workers.chunk_images // batch_size)
            for entries in workers.entries(make, chunks):
                yield [entry for entry in entries if run.is_missing(entry.line.image_id)]


def until_error(computed: Iterable[Sequence[Entry]]) -> Iterator[Sequence[Entry]]:
    """The same up to the first image that cannot be read, whose error is raised."""
    for entries in computed:
        kept = list(takewhile(lambda entry: entry.error is None, entries))
        yield kept
        for entry in entries[len(kept) :]:
            raise cast("ImageError", entry.error)


def _chunks(batches: Iterator[Sequence[ImageId]], ask: Callable[[Any], Asked], count: int) -> Iterator[Sequence[Asked]]:
    while several := list(islice(batches, count)):
        yield [ask(image_id) for image_id in chain.from_iterable(several)]
