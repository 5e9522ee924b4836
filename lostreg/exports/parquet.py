"""Parquet: one row an image, typed, for data frames and queries; written as it is read."""

from collections.abc import Iterable, Iterator
from importlib import metadata
from itertools import chain, count, islice
from pathlib import Path
from typing import Any, Final

from lostreg.checks import cut
from lostreg.errors import PredictionsError
from lostreg.exports.names import escaped
from lostreg.exports.writing import PART
from lostreg.images.rle import Rle, rle_area
from lostreg.images.stores import arrow
from lostreg.jsonio import whole_file
from lostreg.runs.predictions import Prediction

ROWS: Final = 10_000  # of a row group, and all that is in memory
PART_ROWS: Final = 1_000_000  # of a file, where there are several
FORMAT: Final = "lostreg predictions 1"


def write(out: Path, predictions: Iterable[Prediction], *, in_parts: bool = False) -> int:
    """Write the file, in row groups of `ROWS`, with the columns of `schema`; the same predictions give the same bytes.

    Args:
        out: the file, in a folder that is made if need be.
        predictions: one an image, in their order.
        in_parts: whether ``out`` is a folder instead, for files `PART` of `PART_ROWS` images.

    Returns:
        0: no image is encoded.

    Raises:
        OptionError: if pyarrow is missing.
        PredictionsError: if a mask is none, or the file cannot be written.
    """
    arrow("parquet", str(out))
    rows = map(_row, predictions)
    if not in_parts:
        _write_file(out, rows)
        return 0
    for number in count():
        first = list(islice(rows, 1))
        if number and not first:
            break
        _write_file(out / PART.format(number), chain(first, islice(rows, PART_ROWS - 1)))
    return 0


def _write_file(out: Path, rows: Iterator[dict[str, Any]]) -> None:
    lib, parquet = arrow("lib", str(out)), arrow("parquet", str(out))
    columns = schema()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(out) as beside, parquet.ParquetWriter(beside, columns, compression="zstd") as writer:
            while batch := list(islice(rows, ROWS)):
                writer.write_table(lib.Table.from_pylist(batch, schema=columns), row_group_size=ROWS)
    except OSError as error:
        raise PredictionsError(f"cannot write {out}: {error.strerror or error}") from error


def schema() -> Any:
    """The columns, as docs/photos.md tells them."""
    lib = arrow("lib", "a Parquet file")
    boxes = lib.list_(lib.list_(lib.field("element", lib.float32(), nullable=False), 4))
    seeds = lib.list_(lib.list_(lib.field("element", lib.int32(), nullable=False), 2))
    masks = lib.list_(lib.struct([("size", lib.list_(lib.int32())), ("counts", lib.string())]))
    return lib.schema(
        [
            lib.field("image_id", lib.string(), nullable=False),
            ("width", lib.int32()),
            ("height", lib.int32()),
            lib.field("boxes", boxes, nullable=False),
            ("scores", lib.list_(lib.float32())),
            ("seeds", seeds),
            ("masks", masks),
            ("error", lib.string()),
            lib.field("unavailable", lib.bool_(), nullable=False),
        ],
        {"format": FORMAT, "lostreg": metadata.version("lostreg")},
    )


def _row(prediction: Prediction) -> dict[str, Any]:
    boxes = prediction.boxes
    masks = prediction.masks if prediction.masks and len(prediction.masks) == len(boxes) else None
    return {
        "image_id": escaped(str(prediction.image_id)),
        "width": prediction.width or None,
        "height": prediction.height or None,
        "boxes": [list(map(float, box)) for box in boxes],
        "scores": list(map(float, prediction.scores)) if prediction.has_scores else None,
        "seeds": list(prediction.seeds) if len(prediction.seeds) == len(boxes) else None,
        "masks": None if masks is None or len(masks) < len(boxes) else [_checked(prediction, mask) for mask in masks],
        "error": None if prediction.error is None else escaped(prediction.error),
        "unavailable": prediction.unavailable,
    }


def _checked(prediction: Prediction, mask: Rle) -> Rle:
    try:
        rle_area(mask, (prediction.height, prediction.width) if prediction.width and prediction.height else None)
    except PredictionsError as error:
        raise PredictionsError(f"image {cut(repr(prediction.image_id))}: {error}") from error
    return mask
