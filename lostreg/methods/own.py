"""A bias and a score of a user's own: functions of one image's features, checked each time they answer.

They get copies: what they change in place changes no result.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lostreg.checks import shown
from lostreg.errors import OptionError
from lostreg.methods.bias import fixed_bias
from lostreg.methods.similarity import Similarities

BiasFunction = Callable[[Tensor], float]
"""The features of one image, (N, D), float32, to its Gram bias."""

ScoreFunction = Callable[[Tensor, Tensor], Tensor | NDArray[Any] | Sequence[float]]
"""The features of one image, (N, D), float32, and masks of it, (K, h, w), bool, N = h * w, to K scores in [0, 1]."""


@dataclass(frozen=True)
class _Own:
    function: Callable[..., Any]

    @classmethod
    def of(cls, function: Any) -> Self:
        """The function as one of these, which it may be already."""
        return function if isinstance(function, cls) else cls(function)

    @property
    def name(self) -> str:
        """What results call it."""
        function = self.function
        return f"{function.__module__}.{getattr(function, '__qualname__', type(function).__qualname__)}"


@dataclass(frozen=True)
class OwnBias(_Own):
    """A bias that a `BiasFunction` makes of each image's features."""

    def __call__(self, similarities: Similarities) -> Tensor:
        """One bias an image, shape (B, 1); raises `OptionError` where the function gives no finite number."""
        whose = f"the bias that {self.name} gives"
        biases = [fixed_bias(self.function(image.clone()), name=whose) for image in similarities.features]
        return similarities.features.new_tensor(biases)[:, None]


@dataclass(frozen=True)
class OwnScore(_Own):
    """A `ScoreFunction` in the place of `lostreg.methods.objectness.object_scores`: empty masks score 0."""

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise OptionError(f"score must be a function of features and masks, not {shown(self.function)}")

    def __call__(self, features: Tensor, masks: NDArray[np.bool_]) -> NDArray[np.float32]:
        """Scores of the K masks of each image, see there; raises `OptionError` unless they are K numbers in [0, 1]."""
        scores = np.zeros(masks.shape[:2], dtype=np.float32)
        for image, of_image, row in zip(features, masks, scores, strict=True):
            some = of_image.any(axis=(1, 2))  # what earlier objects left nothing of is none
            if some.any():
                row[some] = self._scores(image, torch.from_numpy(of_image[some]).to(image.device))  # a copy
        return scores

    def _scores(self, features: Tensor, masks: Tensor) -> NDArray[np.float32]:
        given = self.function(features.clone(), masks)
        try:
            values = torch.as_tensor(given).detach()
            if values.is_complex():
                raise TypeError("complex")
            scores = values.to("cpu", torch.float32).numpy()
        except (RuntimeError, TypeError, ValueError) as error:
            raise OptionError(f"{self._expected(len(masks))}, not {type(given).__name__}") from error
        if scores.shape != (len(masks),):
            raise OptionError(f"{self._expected(len(masks))}, not shape {scores.shape}")
        outside = scores[~((scores >= 0) & (scores <= 1))]
        if len(outside):
            raise OptionError(f"{self._expected(len(masks))}, not {outside[0]}")
        return scores

    def _expected(self, count: int) -> str:
        return f"the score {self.name} must give {count} numbers in [0, 1], one a mask"
