"""The Gram bias: which values are allowed, and which ones ``auto`` tries.

``auto`` tries a few biases on each image and keeps the box with the highest score (`lostreg.methods.objectness`). No
label, no other image and no number that belongs to a backbone takes part: docs/bias.md has the reasons and the
measurements.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Final, Literal

import torch
from torch import Tensor

from lostreg.checks import LARGEST_FLOAT32, real_number
from lostreg.errors import OptionError
from lostreg.methods.similarity import Similarities

TRIALS: Final = (0.0, -0.25, -0.5, -0.75, -1.0, -1.25)
"""Where ``auto`` draws the line between similar and not: standard deviations from an image's mean similarity."""

_EQUAL: Final = 1e-6  # cosines as close to 1 as this are those of equal features, rounded


def check_bias(bias: object) -> float | Literal["auto"]:
    """A bias as a plain number, or ``auto``.

    Raises:
        OptionError: if it is neither, or beyond what float32 holds.
    """
    if isinstance(bias, str) and bias == "auto":
        return "auto"
    return fixed_bias(bias, expected="a finite number or 'auto'")


def fixed_bias(bias: object, *, name: str = "bias", expected: str = "a finite number") -> float:
    """A bias as a plain number; raises `OptionError` unless it is one, and float32 holds it."""
    number = real_number(bias, name, expected=expected)
    limit = f"within ±{LARGEST_FLOAT32:.4g}, what float32 holds"
    return real_number(number, name, least=-LARGEST_FLOAT32, most=LARGEST_FLOAT32, expected=limit)


def resolve_normalize(bias: object, normalize: bool | None, *, default: bool) -> bool:
    """Whether features are normalised: as asked for, else what ``auto`` needs, else ``default``.

    Raises:
        OptionError: if ``auto`` is asked for without normalisation.
    """
    automatic = isinstance(bias, str) and bias == "auto"
    if automatic and normalize is False:
        raise OptionError("bias 'auto' is defined on normalised features: give a number, or normalise")
    return (automatic or default) if normalize is None else normalize


def trial_biases(similarities: Similarities) -> Tensor:
    """The biases that ``auto`` tries on each image, the strictest first.

    With the first, patches are connected that are more similar than patches of the image are on average; with the last,
    patches that are less than 1.25 standard deviations below that. No seed is left unconnected: a patch is more
    similar to itself than any of these limits, unless its feature is zero.

    Args:
        similarities: of normalised features.

    Returns:
        Shape (B, K), float32, in [-1, 1].
    """
    return -limits(similarities, TRIALS)


def limits(similarities: Similarities, steps: Sequence[float]) -> Tensor:
    """Cosines so many standard deviations away from each image's mean similarity, within (-1, 1).

    Args:
        similarities: of normalised features.
        steps: in standard deviations.

    Returns:
        Shape (B, K), float32.
    """
    mean, deviation = similarities.mean_and_deviation()
    distances = deviation[:, None] * on_device(tuple(steps), deviation.device)
    return (mean[:, None] + distances).clamp(-1 + _EQUAL, 1 - _EQUAL)


def on_device(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    """As float32, shape (K,); for a GPU made once, as a copy to it waits for all that is queued there."""
    return torch.tensor(numbers) if device.type == "cpu" else _copied(numbers, device)


@lru_cache(maxsize=32)
def _copied(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(numbers, device=device)
