"""The standard streams as commands write to them: whatever a name holds, and wherever they lead."""

import io
import logging
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from lostreg.cli.options import one_line
from lostreg.errors import LostregError
from lostreg.text import printable

_BARS = set("\n\r\x1b[A")  # what tqdm writes to move from bar to bar, as writes of their own


class OutputError(LostregError):
    """Standard output cannot be written, as on a full disk."""


class _Stream:
    """A text stream on which no name moves the cursor or turns a line round.

    Args:
        stream: that is written; None where the caller has closed it.
        keep: control characters that are written as they are.

    Attributes:
        is_closed: whether what is written goes nowhere.
    """

    def __init__(self, stream: TextIO | None, keep: str) -> None:
        self.is_closed = stream is None
        self._stream = stream or Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
        self._keep = keep
        if isinstance(self._stream, io.TextIOWrapper):
            self._stream.reconfigure(errors="backslashreplace")  # names need not be text of any encoding

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._stream.write(text if _BARS.issuperset(text) else printable(text, self._keep))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def end(self) -> None:
        """Send what is still there; where that cannot be, Python need not try it again when it ends."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


class _Output(_Stream):
    """Standard output: what cannot be written is an error."""

    def write(self, text: str) -> int:
        with self._told():
            return super().write(text)

    def flush(self) -> None:
        with self._told():
            self._stream.flush()

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:  # its reader has seen enough
            raise
        except OSError as error:
            raise OutputError(f"cannot write to standard output: {error.strerror}") from error


class _Messages(_Stream):
    """Standard error: what cannot be told, to a full disk or a reader that is gone, stops no work."""

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()


@contextmanager
def standard_streams() -> Iterator[None]:
    """Standard output and error, safe to write to for as long as a command runs."""
    for number in range(3):  # a file that is opened later would get the number, and what C libraries print
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    before = sys.stdout, sys.stderr
    output, messages = _Output(sys.stdout, "\n"), _Messages(sys.stderr, "\n\r\t")
    sys.stdout, sys.stderr = output, messages
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        output.end()
        messages.end()


class _Teller(logging.Handler):
    """Records as lines on standard error, wherever that leads now; in front of debugging ones stands who tells."""

    def emit(self, record: logging.LogRecord) -> None:
        teller = record.name if record.levelno < logging.INFO else "lostreg"
        sys.stderr.write(f"{teller}: {one_line(record.getMessage())}\n")

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.name.startswith("lostreg.demo")  # see `lostreg.demo.log`


@contextmanager
def told(level: int) -> Iterator[None]:
    """What the logger `lostreg` and those below it say, from a level on, on standard error while this lasts."""
    log, teller = logging.getLogger("lostreg"), _Teller()
    before = log.level
    log.addHandler(teller)
    log.setLevel(level)
    try:
        yield
    finally:
        log.removeHandler(teller)
        log.setLevel(before)
