"""Numbers that users give: of Python's types, NumPy's or PyTorch's, and within what can be computed with."""

import math
from numbers import Integral, Real
from typing import Any, Final

from lostreg.errors import OptionError

LARGEST: Final = 2**63 - 1
LARGEST_FLOAT32: Final = (2 - 2**-23) * 2.0**127
FARTHEST: Final = 1 << 31  # coordinate of a box, in pixels


def whole_number(value: object, name: str, *, least: int = 1, most: int = LARGEST) -> int:
    """An integer in a range, as a plain one: what NumPy and PyTorch have in its place cannot be recorded.

    Args:
        value: an integer of any kind, or an array or tensor of no dimensions that holds one; no bool.
        name: of the option or argument, for the message.
        least: that is allowed.
        most: that is allowed.

    Raises:
        OptionError: if it is anything else.

    Example:
        >>> lostreg.checks.whole_number(np.int64(3), "k_patches")
        3
    """
    number = _scalar(value)
    whole = int(number) if isinstance(number, Integral) and not isinstance(number, bool) else None
    if whole is not None and least <= whole <= most:
        return whole
    ends = f"from {least} to {most}" if most < LARGEST else f"of at least {least}"
    limit = " and below 2**63" if whole is not None and whole > LARGEST == most else ""
    raise OptionError(f"{name} must be an integer {ends}{limit}, not {shown(value)}")


def real_number(
    value: object, name: str, *, least: float = -math.inf, most: float = math.inf, expected: str = "a finite number"
) -> float:
    """A finite number in a range, as a plain float.

    Args:
        value: a real number of any kind, or an array or tensor of no dimensions that holds one; no bool.
        name: of the option or argument, for the message.
        least: that is allowed.
        most: that is allowed.
        expected: the range in words.

    Raises:
        OptionError: if it is anything else.

    Example:
        >>> lostreg.checks.real_number(torch.tensor(0.5), "min_score")
        0.5
    """
    number = _scalar(value)
    real = _float(number) if isinstance(number, Real) and not isinstance(number, bool) else math.nan
    if math.isfinite(real) and least <= real <= most:
        return real
    raise OptionError(f"{name} must be {expected}, not {shown(value)}")


def whole_seed(value: object) -> int:
    """The seed of a generator of random numbers, as `whole_number` has it: from 0 to 2**128."""
    return whole_number(value, "seed", least=0, most=1 << 128)


def share(value: object, name: str) -> float:
    """A number in [0, 1], as `real_number` has it."""
    return real_number(value, name, least=0, most=1, expected="a number in [0, 1]")


def shown(value: object) -> str:
    """A value for a message: one line, without its middle where it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python does not write integers of more than a few thousand digits
        text = "an integer of thousands of digits"
    except RecursionError:
        text = "a value of many levels"
    return cut(" ".join(text.split()))


def cut(text: str, most: int = 60) -> str:
    """A value for a message, without its middle where it is long."""
    half = (most - 3) // 2
    return text if len(text) <= most else f"{text[:half]}...{text[-half:]}"


def _scalar(value: Any) -> Any:
    """What an array or tensor without dimensions holds; anything else as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def _float(number: Real) -> float:
    try:
        return float(number)
    except OverflowError:  # an integer beyond the largest float
        return math.inf
