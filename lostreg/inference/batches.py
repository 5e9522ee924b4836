"""Discoveries for pipelines that exist already: tables of image files' contents in, the same with typed columns out."""

from typing import TYPE_CHECKING, Any, Final, TypeVar

from lostreg.defaults import BACKBONE
from lostreg.errors import ImageError, OptionError
from lostreg.inference.discoverer import Discoverer
from lostreg.models.backbone import Backbone
from lostreg.models.own import OwnModel

if TYPE_CHECKING:
    import pyarrow as pa

    Batch = TypeVar("Batch", pa.Table, pa.RecordBatch)

COLUMNS: Final = ("width", "height", "boxes", "scores", "error")


class MapBatches:
    """Finds the objects of each row of a table: a callable for Ray Data, Spark and Dask, made once in each process.

    To a table it appends ``width`` and ``height`` (int32, pixels; null for an image that could not be read), ``boxes``
    (lists of four float32, ``x1, y1, x2, y2`` in pixels, best first), ``scores`` (lists of float32, one a box, in
    [0, 1]) and ``error`` (why the image could not be read, else null). Images of one table are computed together, so
    that their boxes may differ by rounding where the pipeline cuts tables otherwise.

    Args:
        backbone: as for `Discoverer`.
        column: which one holds the images: contents of files, or structs with a field ``bytes``, as Hugging Face has
            them.
        prefix: of the names of the columns that are appended.
        options: the other fields of `lostreg.Options`, as keywords.

    Raises:
        OptionError: as `Discoverer`.
        BackboneError: as `Discoverer`.

    Example:
        >>> import pyarrow as pa
        >>> find = lostreg.MapBatches("dinov2_vits14_reg", column="jpg", device="cpu")
        >>> found = find(pa.table({"jpg": [open("dog.jpg", "rb").read(), b"no picture"]}))
        >>> found.column_names, [len(boxes) for boxes in found["boxes"].to_pylist()]
        (['jpg', 'width', 'height', 'boxes', 'scores', 'error'], [1, 0])
    """

    def __init__(
        self, backbone: str | Backbone | OwnModel = BACKBONE, *, column: str = "bytes", prefix: str = "", **options: Any
    ) -> None:
        self.column = column
        self.prefix = prefix
        self.discoverer = Discoverer(backbone, **options)

    def __call__(self, batch: "Batch") -> "Batch":
        """A `pyarrow.Table` or `pyarrow.RecordBatch` with the columns, as the same kind.

        Raises:
            OptionError: if it is of another library, or has no column of images, or of something else, or one of those
                that are appended.
        """
        import pyarrow as pa

        if not isinstance(batch, pa.Table | pa.RecordBatch):
            raise OptionError(
                f"expected a pyarrow.Table or pyarrow.RecordBatch, not {type(batch).__name__}: Ray Data's map_batches "
                'has batch_format="pyarrow", and pyarrow.Table has from_pandas, from_pydict and from_pylist'
            )
        if self.column not in batch.schema.names:
            raise OptionError(f"no column {self.column!r} of images: expected one of {', '.join(batch.schema.names)}")
        taken = sorted({self.prefix + name for name in COLUMNS} & set(batch.schema.names))
        if taken:
            raise OptionError(f"the table has {', '.join(taken)} already: choose another prefix")
        images = [self._content(value.as_py()) for value in batch.column(self.column)]
        outcomes = list(self.discoverer.outcomes(images))
        rows = [
            (None, None, [], [], str(one))
            if isinstance(one, ImageError)
            else (one.width, one.height, one.xyxy.tolist(), one.scores.tolist(), None)
            for one in outcomes
        ]
        types = (pa.int32(), pa.int32(), pa.list_(pa.list_(pa.float32(), 4)), pa.list_(pa.float32()), pa.string())
        for place, (name, kind) in enumerate(zip(COLUMNS, types, strict=True)):
            batch = batch.append_column(self.prefix + name, pa.array([row[place] for row in rows], kind))
        return batch

    def _content(self, value: Any) -> bytes:
        """An image file's content; nothing where there is none, which cannot be read."""
        content = value.get("bytes") if isinstance(value, dict) else value
        if content is None:
            return b""
        if not isinstance(content, bytes):
            what = f"contents of files, or structs with a field bytes, not {type(content).__name__}"
            raise OptionError(f"expected column {self.column!r} to hold {what}")
        return content
