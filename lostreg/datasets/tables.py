"""Parquet and Arrow data sets with a column of image bytes, Hugging Face's layout among them."""

import re
import threading
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final
from urllib.parse import parse_qs, urlencode

import numpy as np
from numpy.typing import NDArray

from lostreg.datasets.base import name_some
from lostreg.datasets.parts import Listing, NoImagesError
from lostreg.errors import ImageError, OptionError
from lostreg.images.memory import describe_bytes, host_bytes
from lostreg.images.stores import CheckSize, StoredImage, arrow, is_uri, open_file, telling

_NAMES: Final = ("image", "bytes", "jpg")  # of a column, where several could be meant
_KEPT_BYTES: Final = 1 << 28  # of groups of rows; at least two of them are kept
_AHEAD: Final = 4  # groups of stores that are read before they are asked for, of all files
_NO_FILE: Final = frozenset(("", ".", ".."))
_MAGIC: Final = b"ARROW1"  # of a file; a stream has none


@dataclass(frozen=True, slots=True)
class TableCell(StoredImage):
    """The bytes of one row.

    Attributes:
        name: what messages call it.
        file: absolute path or URI.
        column: of the bytes, or of Hugging Face's struct around them.
        group: a row group of Parquet, a record batch of an Arrow file; 0 of an Arrow stream.
        row: within the group.
    """

    name: str
    file: str
    column: str
    group: int
    row: int

    @property
    def locator(self) -> str:
        """The file, with ``#column=C&group=G&row=R``."""
        place = urlencode({"column": self.column, "group": self.group, "row": self.row}, errors="surrogateescape")
        return f"{self.file}#{place}"

    def _read(self, check_size: CheckSize) -> bytes | memoryview:
        try:
            cells = _groups.get(self.file, self.column, self.group)
            content = cells[self.row].as_buffer()
        except IndexError as error:
            raise OSError("its file has changed") from error
        if content is None:
            raise ImageError(f"{self.name}: its row holds no bytes")
        check_size(content.size)
        return memoryview(content)


def cell_at(name: str, locator: str) -> TableCell | None:
    """The row that a locator names; None where it names none."""
    file, _, place = locator.rpartition("#")
    fields = parse_qs(place, errors="surrogateescape")
    if fields.keys() != {"column", "group", "row"}:
        return None
    numbers = [fields[field][0] for field in ("group", "row")]
    if not all(re.fullmatch(r"\d{1,18}", number) for number in numbers):
        return None
    return TableCell(name, file, fields["column"][0], int(numbers[0]), int(numbers[1]))


@dataclass(frozen=True, eq=False)
class Table:
    """The images of a Parquet or Arrow file: its rows.

    Attributes:
        file: absolute path or URI.
        column: that holds their bytes.
        ends: number of rows up to the end of each group, shape (groups,), int64.
    """

    file: str
    column: str
    ends: NDArray[np.int64]

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def image(self, number: int, name: str) -> StoredImage:
        """One of its images, by its row from 0."""
        group = int(np.searchsorted(self.ends, number, side="right"))
        start = int(self.ends[group - 1]) if group else 0
        return TableCell(name, self.file, self.column, group, number - start)


def list_table(file: str, name: str) -> Listing:
    """The images of a Parquet or Arrow file, and their names.

    An image is called ``NAME/PATH``, by the file name in the ``path`` of Hugging Face's struct, where these are there
    and different in the whole file, and all could be names of files; else ``NAME#ROW``, from 0.

    Args:
        file: absolute path or URI.
        name: of the file.

    Raises:
        NoImagesError: if no column could hold the images.
        OptionError: if it cannot be read, or several could.
    """
    with telling(file):
        reader = _reader(file)
        column = choose_column(reader.schema, name)
        counts, paths = reader.rows(column)
    ends = np.cumsum(counts, dtype=np.int64)
    table = Table(file, column, ends)
    last = [re.split(r"[/\\]", path)[-1] for path in paths if path]  # where it was made is nobody's business
    are_names = _NO_FILE.isdisjoint(last) and not any("\0" in path for path in last)
    if len(last) == len(table) and are_names and len(set(last)) == len(last):
        return Listing([f"{name}/{path}" for path in last], table)
    return Listing([f"{name}#{row}" for row in range(len(table))], table)


def forget_tables() -> None:
    """Let go of what is kept of files: they may have been written anew."""
    _reader.cache_clear()
    _groups.clear()


def choose_column(schema: Any, name: str) -> str:
    """The column of a schema that holds encoded images.

    Of binary columns and structs with ``bytes`` the one that is called image, bytes or jpg; else the one struct, else
    the one binary column.

    Raises:
        NoImagesError: if there is none.
        OptionError: if several could be meant.
    """
    types = arrow("types", name)
    structs = [field.name for field in schema if types.is_struct(field.type) and _has_bytes(types, field.type)]
    plain = [field.name for field in schema if _is_binary(types, field.type)]
    called = [column for column in _NAMES if column in structs + plain]
    for columns in (called[:1], structs, plain):
        if len(columns) == 1:
            return str(columns[0])
    columns = [f"{field.name} ({field.type})" for field in schema]
    raise (OptionError if structs or plain else NoImagesError)(
        f"{name}: expected one column of image bytes, binary or a struct with bytes, or one of these called "
        f"{', '.join(_NAMES)}; found {name_some(columns, 12) or 'no columns'}"
    )


def _is_binary(types: Any, kind: Any) -> bool:
    return bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind))


def _has_bytes(types: Any, struct: Any) -> bool:
    return any(field.name == "bytes" and _is_binary(types, field.type) for field in struct)


def _child(column: Any, name: str) -> Any:
    """A field of a column of structs; the column itself, where it is none."""
    types, compute = arrow("types", name), arrow("compute", name)
    return compute.struct_field(column, name) if types.is_struct(column.type) else column


def _texts(column: Any) -> list[str | None]:
    """The cells of a column of texts; none, where one is no UTF-8."""
    try:
        column.validate(full=True)  # Arrow would read wherever places within the file lead
        return list(column.to_pylist())
    except ValueError:
        return []


# ---------------------------------------------------------------------------------------------- readers


def _source(file: str) -> Any:
    return open_file(file) if is_uri(file) else arrow("lib", file).OSFile(file)


def _has_paths(kind: Any) -> bool:
    """Whether a type is a struct with ``path``, a text."""
    types = arrow("types", "path")
    if not types.is_struct(kind) or kind.get_field_index("path") < 0:
        return False
    path = kind.field("path").type
    return bool(types.is_string(path) or types.is_large_string(path) or types.is_string_view(path))


class _Parquet:
    """A Parquet file, of which one column of one row group is read at a time."""

    def __init__(self, file: str) -> None:
        self.file = file
        self._parquet = arrow("parquet", file)
        with _source(file) as source:
            reader = self._parquet.ParquetFile(source)
            self._metadata, self.schema = reader.metadata, reader.schema_arrow
        self.groups = int(self._metadata.num_row_groups)

    def _open(self, source: Any) -> Any:
        """A reader of its own for each of several threads."""
        return self._parquet.ParquetFile(source, metadata=self._metadata, pre_buffer=is_uri(self.file))

    def rows(self, column: str) -> tuple[list[int], list[str | None]]:
        """How many rows each group has, and the paths of all, or none."""
        counts = [self._metadata.row_group(group).num_rows for group in range(self.groups)]
        if not _has_paths(self.schema.field(column).type):
            return counts, []
        with _source(self.file) as source:
            paths = self._open(source).read(columns=[f"{column}.path"], use_threads=False).column(0)
        return counts, _texts(_child(paths, "path"))

    def cells(self, column: str, group: int) -> Any:
        """The images of a group.

        Raises:
            OSError: also if there is not enough memory for it.
        """
        is_struct = arrow("types", self.file).is_struct(self.schema.field(column).type)
        path = f"{column}.bytes" if is_struct else column
        self._check_memory(path, group)
        with _source(self.file) as source:
            found = self._open(source).read_row_group(group, columns=[path], use_threads=False)
        return _child(found.column(0), "bytes")

    def _check_memory(self, path: str, group: int) -> None:
        about = self._metadata.row_group(group)
        columns = (about.column(number) for number in range(about.num_columns))
        size = sum(column.total_uncompressed_size for column in columns if column.path_in_schema == path)
        free = host_bytes() if size > _KEPT_BYTES else None
        if free is not None and size > free:
            raise OSError(
                f"its row group takes {describe_bytes(size)} of memory, but {describe_bytes(free)} are free: expected "
                "groups of some hundred MB"
            )


class _Arrow:
    """An Arrow file or stream: on this machine nothing is read of it but what is asked for."""

    def __init__(self, file: str) -> None:
        self.file = file
        self._arrow, self._ipc = arrow("lib", file), arrow("ipc", file)
        with _source(file) as source:
            self._is_stream = source.read(len(_MAGIC)) != _MAGIC
        reader = self._open()
        self.schema = reader.schema
        self.groups = 1 if self._is_stream else int(reader.num_record_batches)

    def _open(self) -> Any:
        source = _source(self.file) if is_uri(self.file) else self._arrow.memory_map(self.file)
        return self._ipc.open_stream(source) if self._is_stream else self._ipc.open_file(source)

    def _batches(self) -> Iterator[Any]:
        reader = self._open()
        yield from reader if self._is_stream else map(reader.get_batch, range(reader.num_record_batches))

    def rows(self, column: str) -> tuple[list[int], list[str | None]]:
        """How many rows each group has, and the paths of all, or none."""
        counts, paths = list[int](), list[str | None]()
        for batch in self._batches():
            counts.append(len(_images(batch, column)))
            if _has_paths(batch.schema.field(column).type):
                paths += _texts(_child(batch.column(column), "path"))
        return [sum(counts)] if self._is_stream else counts, paths  # nothing says where a stream's batches begin

    def cells(self, column: str, group: int) -> Any:
        """The images of a group."""
        if not self._is_stream:
            return _images(self._open().get_batch(group), column)
        return self._arrow.chunked_array([_images(batch, column) for batch in self._batches()])


@lru_cache(64)
def _reader(file: str) -> _Parquet | _Arrow:
    return _Arrow(file) if file.partition("?")[0].lower().endswith(".arrow") else _Parquet(file)


def _images(batch: Any, name: str) -> Any:
    """The images of a record batch, whose places in the file are checked: Arrow would read wherever they lead."""
    column = batch.column(name)
    column.validate()
    images = _child(column, "bytes")
    images.validate(full=True)
    return images


_Key = tuple[str, str, int]  # file, column, group


class _Groups:
    """The groups of rows that were read last, for several threads: one reads a group, and the others wait for it.

    Where groups of a store are read in their order, the next one is read meanwhile.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[_Key, Future[Any]] = OrderedDict()
        self._ahead = ThreadPoolExecutor(_AHEAD)

    def get(self, file: str, column: str, group: int) -> Any:
        """A column of a group: an array of bytes.

        Raises:
            OptionError: if pyarrow is not installed.
            OSError: if it cannot be read.
        """
        cells, is_new = self._cells((file, column, group))
        if is_uri(file) and (file, column, group - 1) in self._kept and group + 1 < _reader(file).groups:
            following, is_unread = self._cells((file, column, group + 1))
            if is_unread:
                self._ahead.submit(self._read, (file, column, group + 1), following)
        if is_new:
            self._read((file, column, group), cells)
        return cells.result()

    def _cells(self, key: _Key) -> tuple[Future[Any], bool]:
        """The group that will be there, and whether it has yet to be read."""
        with self._lock:
            is_new = key not in self._kept
            cells = self._kept.setdefault(key, Future())
            self._kept.move_to_end(key)
        return cells, is_new

    def _read(self, key: _Key, cells: Future[Any]) -> None:
        file, column, group = key
        try:
            cells.set_result(_reader(file).cells(column, group))
        except BaseException as error:
            with self._lock:
                self._kept.pop(key, None)
            cells.set_exception(error)
        else:
            self._forget()

    def clear(self) -> None:
        """Let go of all of them."""
        with self._lock:
            self._kept.clear()

    def _forget(self) -> None:
        """Let go of the oldest groups."""
        with self._lock:
            done = [(key, cells.result().nbytes) for key, cells in self._kept.items() if cells.done()]
            taken = sum(size for _, size in done)
            for key, size in done[:-2]:
                if taken > _KEPT_BYTES:
                    taken -= size
                    del self._kept[key]


_groups: Final = _Groups()
