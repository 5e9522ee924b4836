"""Files that hold many images, and what a list of their images is."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from lostreg.errors import OptionError
from lostreg.images.stores import StoredImage


class NoImagesError(OptionError):
    """A file that could hold many images, but by its kind holds none."""


class Part(Protocol):
    """Images that lie together, in an order of their own."""

    def __len__(self) -> int: ...

    def image(self, number: int, name: str) -> StoredImage:
        """One of them, by its number from 0, to be called by a name."""


@dataclass(frozen=True)
class Listing:
    """What a file, or the folder of a store, holds.

    Attributes:
        names: of its images, each once.
        part: where they are.
        others: what else lies in it, counted by endings.
        fault: why not all of it counts, for people; empty where all does.
    """

    names: Sequence[str]
    part: Part
    others: Counter[str] = field(default_factory=Counter)
    fault: str = ""
