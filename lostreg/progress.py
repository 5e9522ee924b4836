"""How long pieces of work tell where they stand. Imports nothing."""

from collections.abc import Callable
from dataclasses import dataclass


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
