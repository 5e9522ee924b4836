"""A bias and a score of a user's own: functions of one image's features, checked each time they answer.

They get copies: what they change in place changes no result.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

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
    """A `ScoreFunction` in the place of `lostreg.methods.objectness.object_scores`."""

    def __call__(self, features: Tensor, masks: NDArray[np.bool_]) -> NDArray[np.float32]:
        """Scores of the K masks of each image, see there; raises `OptionError` unless they are K numbers in [0, 1]."""
        on_device = torch.from_numpy(masks).to(features.device)
        scores = [self._scores(*image) for image in zip(features, on_device, strict=True)]
        return np.array(scores, dtype=np.float32).reshape(masks.shape[:2])

    def _scores(self, features: Tensor, masks: Tensor) -> NDArray[np.float32]:
        given = self.function(features.clone(), masks.clone())
        try:
            scores = torch.as_tensor(given).detach().to("cpu", torch.float32).numpy()
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
