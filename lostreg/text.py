"""Names from outside, made harmless where they are shown or written, and told apart. Imports nothing of the package."""

import difflib
import re
from collections.abc import Callable, Collection
from typing import Final

# What a terminal acts on, or what reorders a line: controls, line and paragraph separators, bidirectional marks,
# embeddings, overrides and isolates; and surrogates, which are bytes of a name that are not UTF-8.
_ACTING: Final = re.compile("[\0-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
# Spreadsheets take a cell for a formula by its first sign, East Asian ones by its full-width form too.
_FORMULA: Final = re.compile("[\\s\0\u200b\ufeff]*[=+\\-@＝＋－＠']|[\t\r\n]")  # noqa: RUF001


def printable(text: str, keep: str = "") -> str:
    r"""A text that can be shown on one line of a terminal: what a terminal would act on becomes a JSON escape.

    JSON stays JSON, of the same meaning.

    Args:
        text: such as the name of a file.
        keep: characters that stay all the same.

    Example:
        >>> print(lostreg.text.printable("\x1b[31mred \u202egpj.exe"))
        \u001b[31mred \u202egpj.exe
    """
    return _ACTING.sub(lambda sign: sign[0] if sign[0] in keep else f"\\u{ord(sign[0]):04x}", text)


def spreadsheet_text(text: str) -> str:
    """A text that no spreadsheet takes for a formula: an apostrophe goes in front where it is needed.

    It does so too where the text begins with one: whoever takes the first apostrophe off has the text as it was.

    Example:
        >>> [lostreg.text.spreadsheet_text(name) for name in ("+cmd|calc.jpg", "'a.jpg", "a.jpg")]
        ["'+cmd|calc.jpg", "''a.jpg", 'a.jpg']
    """
    return "'" + text if _FORMULA.match(text) else text


class Unused:
    """Hands out names, each once: the second of a name ends in ``-2``.

    Args:
        alike: two names for which it gives the same are one.

    Example:
        >>> unused = lostreg.text.Unused()
        >>> [unused.name(name) for name in ("a", "a", "a-2", "a")]
        ['a', 'a-2', 'a-2-2', 'a-3']
    """

    def __init__(self, alike: Callable[[str], str] = str) -> None:
        self._alike = alike
        self._numbers: dict[str, int] = {}  # the last number behind each name that has been handed out

    def name(self, wanted: str) -> str:
        """The name, or the next free one behind it."""
        free, start = wanted, self._alike(wanted)
        while self._alike(free) in self._numbers:
            self._numbers[start] += 1
            free = f"{wanted}-{self._numbers[start]}"
        self._numbers[self._alike(free)] = 1
        return free


def did_you_mean(name: str, names: Collection[str], most: int = 3, likeness: float = 0.5) -> str:
    """`` (did you mean A or B?)``, to put behind a name that is not among these; empty where none is near.

    Args:
        name: as it was given.
        names: that there are.
        most: of them that are told.
        likeness: that each has at least, in [0, 1], as `difflib.get_close_matches` measures it.

    Example:
        >>> lostreg.text.did_you_mean("dino_vits61", ["dino_vits16", "registers"])
        ' (did you mean dino_vits16?)'
    """
    near = difflib.get_close_matches(name.lower(), names, n=most, cutoff=likeness)
    return f" (did you mean {' or '.join(near)}?)" if near else ""
