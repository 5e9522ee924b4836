"""The demo's log on standard error: what visitors can cause as often as they like stands there once a minute."""

import contextlib
import logging
import time
from collections.abc import Iterator
from typing import Final

from lostreg.text import printable

_SECONDS: Final = 60.0


@contextlib.contextmanager
def quiet_log() -> Iterator[None]:
    """Log whatever is warned of, here and in the libraries, while this lasts."""
    handler = logging.StreamHandler()
    handler.setLevel(logging.WARNING)
    handler.setFormatter(_Printable())
    handler.addFilter(_Seldom())
    logging.getLogger().addHandler(handler)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        logging.getLogger().removeHandler(handler)


class _Printable(logging.Formatter):
    """Nothing of a message, such as a name in a traceback, moves the cursor or turns the line round."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(printable(line) for line in super().format(record).split("\n"))


class _Seldom(logging.Filter):
    """Lets a place in the code speak once a minute."""

    def __init__(self) -> None:
        super().__init__()
        self._silent_until: dict[tuple[str, int], float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        place, now = (record.pathname, record.lineno), time.monotonic()
        if now < self._silent_until.get(place, 0.0):
            return False
        self._silent_until[place] = now + _SECONDS
        return True
