"""The methods that look for objects, by name."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from lostreg.inference.jobs import Method
from lostreg.inference.options import ResolvedOptions
from lostreg.methods.lost import Lost, Objects
from lostreg.methods.multi_object import find_objects
from lostreg.methods.parts import Parts, find_parts
from lostreg.methods.spectral import MaskCut, TokenCut


@dataclass(frozen=True)
class Row:
    """A method.

    Attributes:
        make: the method with its options.
        objects: one `Objects` an image of what its maps hold.
    """

    make: Callable[[ResolvedOptions], Method]
    objects: Callable[[Any, ResolvedOptions], list[Objects]]


METHODS: Final = {
    "lost": Row(
        lambda options: Lost(options.bias, options.k_patches),
        lambda found, options: find_objects(found, options.k_patches, options.max_objects, options.min_score),
    ),
    "parts": Row(
        lambda options: Parts(options.bias, options.k_patches, options.objectness and options.objectness.head),
        lambda found, options: find_parts(found, options.max_objects, options.min_score),
    ),
    "tokencut": Row(
        lambda _: TokenCut(),
        lambda found, options: find_objects(found, options.k_patches, options.max_objects, options.min_score),
    ),
}
