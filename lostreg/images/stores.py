"""Images that are no files of their own: parts of larger files, and objects of a store that a URI names.

Files on this machine's disks need nothing but Python. Stores are read with pyarrow, of the extra ``lake``, which knows
S3, Google's, Azure's and Hadoop's; of any other kind with fsspec and whatever that needs.
"""

import os
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path, PurePath
from typing import Any, BinaryIO, Final, Literal, cast
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlsplit

from lostreg.errors import ImageError, ImageUnavailableError, OptionError
from lostreg.jsonio import full_disk_named

LAKE_HINT: Final = 'needs pyarrow: pip install "lostreg[lake]"'
CONNECT_SECONDS: Final = 10.0
REQUEST_SECONDS: Final = 30.0  # without a byte
ATTEMPTS: Final = 3  # of a request
_COPIED_BYTES: Final = 1 << 20  # at a time
_PROBE: Final = ".lostreg-probe"
_OPEN_FILES: Final = 64  # handles of stores' files that are kept
_S3_SCHEMES: Final = ("s3", "s3a")
_GOOGLE_SCHEMES: Final = ("gs", "gcs")
_ENDPOINTS: Final = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
_ANONYMOUS: Final = "anonymous"
_HARMLESS: Final = frozenset({"region", "scheme", "endpoint_override", "retry_limit_seconds"})  # of a URI's query
_DEFAULT_HOST: Final = ("hdfs", "viewfs")  # schemes whose settings name the host

CheckSize = Callable[[int], None]


class StoredImage(ABC):
    """An image that is read from somewhere else than a file of its own, each time anew.

    It is small, and can be pickled: another process or machine reads it from the same place.

    Attributes:
        name: what messages call it.
        file: where its bytes lie: an absolute path, or a URI.
    """

    __slots__ = ()
    name: str
    file: str

    def __str__(self) -> str:
        return self.name

    @property
    def is_remote(self) -> bool:
        """Whether a network may lie between."""
        return is_uri(self.file)

    @property
    @abstractmethod
    def locator(self) -> str:
        """Its place on one line."""

    @abstractmethod
    def _read(self, check_size: CheckSize) -> bytes | memoryview:
        """Its bytes; raises whatever its readers raise."""

    def read(self, check_size: CheckSize = lambda _: None) -> bytes | memoryview:
        """The encoded image.

        Args:
            check_size: is given the size in bytes, where it is known before; may raise `ImageError`.

        Raises:
            ImageUnavailableError: if it cannot be had now: it is gone, forbidden, or its store does not answer in time.
            ImageError: if there is no image at its place.
        """
        try:
            return self._read(check_size)
        except (ImageError, MemoryError):
            raise
        except FileNotFoundError as error:
            raise ImageUnavailableError(f"{self.name}: it is not there any more") from error
        except Exception as error:
            # Clients of stores raise whatever their transports raise; a ValueError is what readers say of the content.
            is_of_store = self.is_remote and not isinstance(error, ValueError)
            kind = ImageUnavailableError if isinstance(error, OSError | OptionError) or is_of_store else ImageError
            raise kind(f"{self.name}: cannot be read ({reason_of(error, self.file)})") from error


@dataclass(frozen=True, slots=True)
class FileRange(StoredImage):
    """Some bytes of a file, or all.

    Attributes:
        name: what messages call it.
        file: absolute path or URI.
        start: the first byte.
        size: how many; None for all.
    """

    name: str
    file: str
    start: int = 0
    size: int | None = None

    @property
    def locator(self) -> str:
        """The file, with ``#start=S&size=N`` where it is a part of it."""
        return self.file if self.size is None else f"{self.file}#start={self.start}&size={self.size}"

    def _read(self, check_size: CheckSize) -> bytes | memoryview:
        if self.size is None:
            with open_file(self.file) as whole:
                check_size(whole.seek(0, os.SEEK_END))
                whole.seek(0)
                return whole.read()
        check_size(self.size)
        if is_uri(self.file):
            content: bytes = _handle(self.file).read_at(self.size, self.start)
        else:
            with open(self.file, "rb") as file:  # noqa: PTH123 - lighter than paths
                file.seek(self.start)
                content = file.read(self.size)
        if len(content) < self.size:
            raise OSError(f"its file has changed: expected {self.size:,} bytes, found {len(content):,}")
        return content


def range_at(name: str, locator: str) -> FileRange | None:
    """The object of a store, or part of a file, that a locator names; None where it names none."""
    file, _, place = locator.rpartition("#")
    part = re.fullmatch(r"start=(\d{1,18})&size=(\d{1,18})", place)
    if part:
        return FileRange(name, file, int(part[1]), int(part[2]))
    return FileRange(name, locator) if is_uri(locator) else None


def reason_of(error: BaseException, file: str) -> str:
    """What an error says, on one line, without the folder of a file on this machine."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).replace(file, PurePath(file).name).split())


# ------------------------------------------------------------------------------------------------- stores


def is_uri(text: str) -> bool:
    """Whether a text names something in a store."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text) is not None


def local_path(uri: str) -> str | None:
    """The path that a ``file://`` URI stands for; None for another one.

    Raises:
        OptionError: if it names another machine.
    """
    scheme, mark, rest = uri.partition("://")
    if scheme.lower() != "file" or not mark:
        return None
    host, slash, path = rest.partition("/")
    if host not in ("", "localhost"):
        raise OptionError(f"{uri}: expected file:///FOLDER, of this machine; it names the machine {host!r}")
    return unquote(slash + path)


def check_uri(uri: str) -> None:
    """Raise `OptionError` for a URI that names no place, or may hold a password: in a query, whatever is not known."""
    parts = _parts(uri)
    unknown = dict(parse_qsl(parts.query, keep_blank_values=True)).keys() - _HARMLESS
    if ":" in parts.netloc.rpartition("@")[0] or unknown:
        raise OptionError(
            f"{parts.scheme}://...{parts.path}: credentials in a URI would be written into results; expected them "
            "where the store's tools look: in the environment (AWS_ACCESS_KEY_ID and so on) or its settings, and "
            f"behind the ? nothing but {', '.join(sorted(_HARMLESS))}"
        )
    if not parts.netloc.rpartition("@")[2] and parts.scheme not in _DEFAULT_HOST:
        raise OptionError(f"{uri}: expected {parts.scheme}://BUCKET/NAME")


def plain_uri(uri: str) -> str:
    """What a URI names, without escapes and settings: to compare it."""
    return unquote(uri.partition("?")[0], errors="surrogateescape").rstrip("/")


def join_uri(folder: str, name: str) -> str:
    """The URI of what lies in a folder, by its name below."""
    path, mark, query = folder.partition("?")
    return f"{path.rstrip('/')}/{quote(name, safe='/', errors='surrogateescape')}{mark}{query}"


def parent_uri(uri: str) -> tuple[str, str]:
    """The URI of the folder that something in a store lies in, and its name there.

    Raises:
        OptionError: if it is a whole bucket, or hidden, or no file could be called so.
    """
    path, mark, query = uri.partition("?")
    scheme, _, rest = path.partition("://")
    folder, _, last = rest.rstrip("/").rpartition("/")
    name = unquote(last, errors="surrogateescape")
    if not folder or not name or name.startswith(".") or not {"/", "\0"}.isdisjoint(name):
        raise OptionError(f"{uri}: expected the place of a file or folder in a bucket, {scheme}://BUCKET/NAME")
    return f"{scheme}://{folder}{mark}{query}", name


def kind_at(uri: str) -> Literal["file", "folder"] | None:
    """What a URI names; None where that is nothing.

    Raises:
        OptionError: if the store does not say.
    """
    fs_module = arrow("fs", uri)
    with telling(uri):
        store, path = _opened(uri)
        kind = store.get_file_info(path).type if path.strip("/") else fs_module.FileType.Directory
    if kind == fs_module.FileType.NotFound:
        return None
    return "file" if kind == fs_module.FileType.File else "folder"


def list_files(uri: str) -> list[str] | None:
    """The files of a store's folder with all its subfolders, as they are called below it; None where the URI is a file.

    Raises:
        OptionError: if there is no such thing, or it cannot be listed.
    """
    kind = kind_at(uri)
    if kind is None:
        raise OptionError(f"{uri}: no such folder or file in that store")
    if kind == "file":
        return None
    fs_module = arrow("fs", uri)
    with telling(uri):
        store, path = _opened(uri)
        infos = store.get_file_info(fs_module.FileSelector(path, recursive=True))
        below = len(path.rstrip("/")) + 1
        return [info.path[below:] for info in infos if info.type == fs_module.FileType.File]


def fetch_file(uri: str, path: Path) -> None:
    """Copy a file of a store to this machine, into a folder that is made if need be.

    Raises:
        OptionError: if it cannot be read.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with telling(uri), full_disk_named(path), open_file(uri) as there, path.open("wb") as here:
        shutil.copyfileobj(there, here, _COPIED_BYTES)


def fetch_folder(uri: str, folder: Path) -> None:
    """Copy a store's folder, with all its subfolders but no hidden files, into one of this machine, if it is there.

    Raises:
        OptionError: if it is a file, or cannot be read.
    """
    names = list_files(uri) if kind_at(uri) else []
    if names is None:
        raise OptionError(f"{uri} is a file: expected a folder")
    for name in names:
        if not Path(name).name.startswith("."):
            fetch_file(join_uri(uri, name), folder / name)


def files_below(folder: Path) -> list[str]:
    """The files of a folder of this machine and its subfolders but hidden ones, as they are called below it."""
    return [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("[!.]*")) if path.is_file()]


def store_folder(folder: Path, uri: str) -> None:
    """Copy a folder of this machine, with all its subfolders but no hidden files, into one of a store.

    Raises:
        OptionError: if it cannot be written to.
    """
    for name in files_below(folder):
        with telling(uri, "written to"):
            store, path = _opened(join_uri(uri, name))
            with (folder / name).open("rb") as here, store.open_output_stream(path) as there:
                shutil.copyfileobj(here, there, _COPIED_BYTES)


def check_writable(uri: str) -> None:
    """Make sure that a store's folder takes files, by an empty hidden one that is deleted where that is allowed.

    Raises:
        OptionError: if it cannot be written to.
    """
    place = join_uri(uri, _PROBE)
    with telling(uri, "written to"):
        store, path = _opened(place)
        store.open_output_stream(path).close()
    with suppress(OptionError):
        delete_file(place)


def delete_file(uri: str) -> None:
    """Delete a file of a store.

    Raises:
        OptionError: if it cannot be deleted.
    """
    with telling(uri, "deleted"):
        store, path = _opened(uri)
        store.delete_file(path)


@contextmanager
def telling(file: str, what: str = "read") -> Iterator[None]:
    """Whatever a store or a reader of data sets raises comes out as one line on that file.

    Raises:
        OptionError: in place of the others.
    """
    try:
        yield
    except OptionError:
        raise
    except FileNotFoundError as error:
        raise OptionError(f"{file}: no such file") from error
    except MemoryError as error:
        raise OptionError(f"{file}: not enough memory to read it") from error
    except Exception as error:
        raise OptionError(f"{file}: cannot be {what} ({reason_of(error, file)})") from error


def open_file(file: str) -> BinaryIO:
    """A file to read at any place: of this machine, by its path, or of a store."""
    if is_uri(file):
        store, path = _opened(file)
        return cast("BinaryIO", store.open_input_file(path))
    return open(file, "rb")  # noqa: PTH123 - lighter than paths


@lru_cache(_OPEN_FILES)
def _handle(file: str) -> Any:
    """A file of a store that stays open: threads read parts of it at the same time."""
    return open_file(file)


def close_files() -> None:
    """Let go of the files of stores that are kept open: they may have been written anew."""
    _handle.cache_clear()


def _opened(uri: str) -> tuple[Any, str]:
    """The store of a URI, and what the URI names as the store calls it."""
    parts = _parts(uri)
    store, root = _store(parts.scheme, parts.netloc, parts.query)
    return store, root.rstrip("/") + unquote(parts.path, errors="surrogateescape")


def _parts(uri: str) -> SplitResult:
    try:
        return urlsplit(uri, allow_fragments=False)
    except ValueError as error:
        raise OptionError(f"{uri}: expected SCHEME://BUCKET/NAME ({error})") from error


@lru_cache
def _store(scheme: str, netloc: str, query: str) -> tuple[Any, str]:
    """A store, and what its paths begin with."""
    if scheme in _GOOGLE_SCHEMES and "retry_limit_seconds" not in query:  # it would try for a quarter of an hour
        query = f"{query}&retry_limit_seconds={ATTEMPTS * REQUEST_SECONDS}".removeprefix("&")
    uri = f"{scheme}://{netloc}/" + (f"?{query}" if query else "")
    fs_module = arrow("fs", uri)
    if scheme in _S3_SCHEMES:
        return _s3(fs_module, netloc, dict(parse_qsl(query)))
    try:
        opened: tuple[Any, str] = fs_module.FileSystem.from_uri(uri)
        return opened
    except ValueError as error:
        if "Unrecognized" not in str(error):
            raise
    return _of_fsspec(fs_module, uri)


def _s3(fs_module: Any, netloc: str, query: dict[str, str]) -> tuple[Any, str]:
    """Amazon's store, or one that speaks like it, with bounded waiting."""
    user, _, bucket = netloc.rpartition("@")
    unknown = query.keys() - {"region", "scheme", "endpoint_override"}
    if unknown or user not in ("", _ANONYMOUS):
        raise OptionError(
            f"s3://{bucket}: expected region, scheme or endpoint_override behind the ?, and nothing or {_ANONYMOUS}@ "
            "in front of the bucket"
        )
    given = next((os.environ[name] for name in _ENDPOINTS if os.environ.get(name)), "")
    endpoint = query.get("endpoint_override", given)
    scheme, _, host = endpoint.rpartition("://")
    region = query.get("region") or (None if endpoint else fs_module.resolve_s3_region(bucket))
    store = fs_module.S3FileSystem(
        anonymous=user == _ANONYMOUS,
        region=region,
        scheme=query.get("scheme") or scheme or None,
        endpoint_override=host.rstrip("/") or None,
        connect_timeout=CONNECT_SECONDS,
        request_timeout=REQUEST_SECONDS,
        retry_strategy=fs_module.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS),
    )
    return store, bucket


def _of_fsspec(fs_module: Any, uri: str) -> tuple[Any, str]:
    try:
        from fsspec.core import url_to_fs

        store, root = url_to_fs(uri)
    except (ImportError, ValueError) as error:
        raise OptionError(f"{uri}: pyarrow knows no such store, and fsspec says: {error}") from error
    return fs_module.PyFileSystem(fs_module.FSSpecHandler(store)), root


def arrow(module: str, file: str) -> Any:
    """A module of pyarrow.

    Raises:
        OptionError: if it is not installed; it names the file that it is needed for.
    """
    try:
        return import_module(f"pyarrow.{module}")
    except ImportError as error:
        raise OptionError(f"{file} {LAKE_HINT}") from error
