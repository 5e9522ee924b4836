"""How long pieces of work tell where they stand. Imports nothing but the standard library."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

Outcome = TypeVar("Outcome")


@dataclass(frozen=True)
class Progress:
    """Where a piece of work stands, told after each image, or whatever it goes through.

    Attributes:
        done: how many are done, those of an earlier run among them.
        total: how many there are.
        known: of those that are done, how many an earlier run had done.
        step: which part of the work this is, where it has several.
        error: why the last one could not be done; None where it was.
        note: a figure so far, such as ``corloc 45.00``.
    """

    done: int
    total: int
    known: int = 0
    step: str = ""
    error: Exception | None = None
    note: str = ""


OnProgress = Callable[[Progress], None]


def telling(outcomes: Iterable[Outcome], total: int, on_progress: OnProgress, step: str = "") -> Iterator[Outcome]:
    """The outcomes of a piece of work, which tells where it stands once each has been taken; exceptions are errors."""
    for done, outcome in enumerate(outcomes, start=1):
        yield outcome
        error = outcome if isinstance(outcome, Exception) else None
        on_progress(Progress(done, total, step=step, error=error))
