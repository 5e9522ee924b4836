"""What each step of a training sees, and its learning rate: by its number and the seed alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from lostreg.models.forward import Grid
from lostreg.training.options import TrainingOptions
from lostreg.training.views import Layout, View

_WARM_UP: Final = 0.1  # of the steps
_LAST_RATE: Final = 5e-6
_NARROWEST: Final = 0.6  # shorter side of what the student sees over the longer one


@dataclass(frozen=True)
class Batch:
    """Windows of pictures.

    Attributes:
        numbers: of the pictures.
        views: one of each.
        shape: rows and columns of all windows, in patches.
    """

    numbers: Sequence[int]
    views: Sequence[View]
    shape: Grid

    def share(self, index: int, count: int) -> "Batch":
        """Every so many of them, from one on."""
        return Batch(self.numbers[index::count], self.views[index::count], self.shape)


class Schedule:
    """Of the steps of a training.

    Args:
        options: of the training.
        layout: of the teacher's windows.
    """

    def __init__(self, options: TrainingOptions, layout: Layout) -> None:
        self._options = options
        self._layout = layout

    def batch(self, step: int, pictures: Sequence[int]) -> Batch:
        """The next of the pictures, each as often as the others, and what is seen of them."""
        size, count = self._options.batch_size, len(pictures)
        generator = np.random.default_rng([self._options.seed, 1, step])
        places = range(step * size, (step + 1) * size)
        orders = {epoch: self._order(epoch, count) for epoch in {place // count for place in places}}
        numbers = [pictures[orders[place // count][place % count]] for place in places]
        shape = self._draw_shape(generator)
        return Batch(numbers, [self._draw_view(shape, generator) for _ in numbers], shape)

    def _draw_shape(self, generator: np.random.Generator) -> Grid:
        """A grid as photos have them, so that positions are learned on all of them: one side is a window's."""
        window = self._layout.window
        other = int(generator.integers(math.ceil(_NARROWEST * window), window, endpoint=True))
        return (window, other) if generator.integers(2) else (other, window)

    def _draw_view(self, shape: Grid, generator: np.random.Generator) -> View:
        row, column = (int(generator.integers(self._layout.picture - side, endpoint=True)) for side in shape)
        return View(row, column, bool(generator.integers(2)))

    def _order(self, epoch: int, count: int) -> list[int]:
        order: list[int] = np.random.default_rng([self._options.seed, 2, epoch]).permutation(count).tolist()
        return order

    def rate(self, step: int) -> float:
        """Linear up, then half a cosine down."""
        highest, steps = self._options.learning_rate, self._options.steps
        warm = max(1, round(_WARM_UP * steps))
        if step < warm:
            return highest * (step + 1) / warm
        lowest = min(_LAST_RATE, highest)
        return lowest + (highest - lowest) * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))) / 2
