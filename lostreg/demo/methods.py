"""What the page says of each method, and which of its controls a method knows."""

from dataclasses import dataclass
from typing import Final

_DEGREES: Final = "<b>Degree map:</b> how many other patches each patch resembles; dark is few, as objects have. "
_FROM_SEED: Final = (
    "LOST starts from the darkest patch, the seed (red), because objects are smaller than background, and grows it "
    "over patches that resemble it."
)
_CUT: Final = "The red square is the patch that the cut sets apart most."
_CUTS: Final = (
    "cuts the patches in two so that it parts as few alike ones as it can. The box holds what it sets apart most"
)


@dataclass(frozen=True)
class Telling:
    """One method in words.

    Attributes:
        label: in the list.
        info: below it.
        why: how its box came about, for the verdict; ``{bias}`` stands for the bias of the first one.
        caption: of its map over the patches, as HTML.
        has_bias: whether it takes one.
        has_several: whether it finds several objects.
    """

    label: str
    info: str
    why: str
    caption: str
    has_bias: bool = False
    has_several: bool = True


METHODS: Final = {
    "parts": Telling(
        "parts: compares many pieces",
        "Pieces of the photo whose patches are alike compete with LOST's; the clearest one wins.",
        "parts, which compares LOST's objects and pieces of the photo whose patches are alike",
        _DEGREES + _FROM_SEED,
        has_bias=True,
    ),
    "lost": Telling(
        "LOST: grows from one patch",
        "Starts where a patch resembles the fewest others, and grows over what resembles it.",
        "LOST with the bias {bias:.2f}, which grows from one patch, its seed, and compares no candidates",
        _DEGREES + _FROM_SEED,
        has_bias=True,
    ),
    "tokencut": Telling(
        "TokenCut: cuts the photo in two",
        "The cut parts as few alike patches as it can; one side is the object. It finds one.",
        f"TokenCut, which {_CUTS}",
        _DEGREES + _CUT,
        has_several=False,
    ),
    "maskcut": Telling(
        "MaskCut: cuts again and again",
        "As TokenCut; what was found is taken out, and the rest is cut again.",
        f"MaskCut, which {_CUTS}; what was found is then left out, and the rest is cut",
        _DEGREES + _CUT,
    ),
    "dinoseg": Telling(
        "DINO-seg: where the network looks",
        "The patches that the network itself attends to most; the largest piece is the object. It finds one.",
        "DINO-seg, which boxes the largest piece of what one head of the network's attention looks at, and compares no "
        "patches",
        "<b>Attention of one head, by rank:</b> the darker, the more the network looks there. The red square is the "
        "patch of the object that it looks at most.",
        has_several=False,
    ),
}
CUTS: Final = ("tokencut", "maskcut")
