"""A progress bar for long passes over images."""

import sys
from types import TracebackType
from typing import TYPE_CHECKING

from lostreg.cli.options import tell

if TYPE_CHECKING:
    from tqdm import tqdm


class ProgressBar:
    """A bar on standard error from the first image on: an error before that is one line, without an empty bar.

    Args:
        description: in front of the bar.
        total: images in all.
        unit: what is counted, if not images.
    """

    def __init__(self, description: str, total: int, unit: str = "img") -> None:
        self._description = description
        self._total = total
        self._unit = unit
        self._bar: tqdm[None] | None = None

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()

    def advance(self, done: int | None = None) -> None:
        """One more image is done, or so many in all: what an earlier run did does not count as fast."""
        from tqdm import tqdm

        if self._bar is None:
            known = 0 if done is None else done - 1
            self._bar = tqdm(total=self._total, initial=known, desc=self._description, unit=self._unit, file=sys.stderr)
        self._bar.update()

    def tell(self, message: str) -> None:
        """A line for the person at the terminal, on a line of its own."""
        if self._bar is not None:
            self._bar.clear()
        tell(message)


class StepBars:
    """A bar for each step of some work, one after the other.

    Args:
        description: in front of the steps' names.
    """

    def __init__(self, description: str) -> None:
        self._description = description
        self._step = ""
        self._bar: ProgressBar | None = None

    def __enter__(self) -> "StepBars":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def advance(self, step: str, done: int, total: int, unit: str = "img") -> None:
        """So many of so many are done in a step; the first one, or another step, begins a new bar."""
        if self._bar is None or step != self._step or done == 1:
            self._close()
            self._step, self._bar = step, ProgressBar(f"{self._description}, {step}", total, unit)
        self._bar.advance()

    def tell(self, message: str) -> None:
        """A line for the person at the terminal, on a line of its own."""
        if self._bar is None:
            tell(message)
        else:
            self._bar.tell(message)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
