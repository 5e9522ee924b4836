"""CSV: one row a box, and one for each image without."""

import csv
import io
from pathlib import Path
from typing import Any, Final

from lostreg.exports.items import ExportSet
from lostreg.exports.names import escaped
from lostreg.exports.writing import write_file
from lostreg.text import spreadsheet_text

COLUMNS: Final = ("image_id", "width", "height", "x1", "y1", "x2", "y2", "score", "seed_row", "seed_col", "error")


def write(out: Path, collection: ExportSet) -> int:
    """Write the file; see `as_csv`."""
    write_file(out, as_csv(collection))
    return 0


def as_csv(collection: ExportSet) -> str:
    """The table, its lines ended as RFC 4180 has it.

    Ids and errors are as `lostreg.text.spreadsheet_text` has them: whoever takes a first apostrophe off has them as
    they were.

    Args:
        collection: what is exported; its unreadable images come last, with their errors.
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(COLUMNS)
    for image in collection.images:
        size = (image.width or "", image.height or "")
        for box in image.boxes:
            score = "" if box.score is None else box.score
            writer.writerow([_text(image.image_id), *size, *box.xyxy, score, *(box.seed or ("", "")), ""])
        if not image.boxes:
            writer.writerow([_text(image.image_id), *size, *[""] * 8])
    for line in collection.unreadable:
        writer.writerow([_text(line.image_id), *[""] * 9, _text(str(line.error))])
    return escaped(buffer.getvalue())


def _text(value: Any) -> Any:
    return spreadsheet_text(value) if isinstance(value, str) else value
