"""What uvicorn sets no bound to: how long a connection keeps the demo waiting, and how many there are."""

import asyncio
import sys
from collections import Counter
from typing import Any, Final

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

if sys.platform != "win32":
    import resource

_HEAD_SECONDS: Final = 20.0  # for the head of a request, in whatever pieces
_READ_SECONDS: Final = 60.0  # for a visitor to read what was written
_MOST: Final = 480  # connections
ACCEPTED_AT_ONCE: Final = 16


class Connection(H11Protocol):
    """A connection that is let go when its time is over, or when another visitor needs the room.

    The gate sees to the bodies of requests. Streams of events are answers that go on, and may take any time.
    """

    _waiting: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take it, and let another go if there are too many."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(0)  # writing pauses as soon as something is left unread
        self.opened = self.loop.time()
        self._watch()
        self._keep_the_bound()

    def data_received(self, data: bytes) -> None:
        """Take what arrived."""
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        super().on_response_complete()
        self._watch()

    def pause_writing(self) -> None:
        """Wait for the visitor to read."""
        super().pause_writing()
        self._unread = self.loop.call_later(_READ_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """Go on."""
        super().resume_writing()
        if self._unread:
            self._unread.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget it."""
        super().connection_lost(exc)
        for timer in (self._waiting, self._unread):
            if timer:
                timer.cancel()

    @property
    def is_answered(self) -> bool:
        """Whether a request has come whose answer is not complete."""
        return self.conn.our_state in (h11.SEND_RESPONSE, h11.SEND_BODY)

    def _watch(self) -> None:
        """Time runs from one answer to the next request."""
        if self.is_answered and self._waiting:
            self._waiting.cancel()
            self._waiting = None
        elif not self.is_answered and not self._waiting:
            self._waiting = self.loop.call_later(_HEAD_SECONDS, self.transport.abort)

    def _keep_the_bound(self) -> None:
        """Let one of the visitor with most connections go, if there are too many.

        The oldest that has no request goes first, then the oldest whose request is not whole, then this new one.
        """
        present = [connection for connection in self.connections if not connection.transport.is_closing()]
        if len(present) <= most_connections():
            return
        held = Counter(_visitor(connection) for connection in present)

        def worth(connection: Any) -> tuple[int, int, float]:
            whole = connection.conn.their_state is not h11.SEND_BODY
            rank = 2 if connection is self else connection.is_answered * (1 + 2 * whole)
            return -held[_visitor(connection)], rank, connection.opened

        min(present, key=worth).transport.abort()


def _visitor(connection: Any) -> str:
    return connection.client[0] if connection.client else ""


def most_connections() -> int:
    """How many the limit of open files allows: each may open a file, and some arrive before another is let go."""
    if sys.platform == "win32":
        return _MOST
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return _MOST if files == resource.RLIM_INFINITY else min(_MOST, max(8, files // 2 - 2 * ACCEPTED_AT_ONCE))
