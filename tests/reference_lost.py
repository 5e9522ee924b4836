"""LOST as slow NumPy, one image and one patch at a time, written from the paper to check the tensor code against.

Nothing of lostreg is imported here, and nothing is shared with it: other names, other algorithms (a full sort for
the lowest degrees, a flood fill for the component, `numpy.quantile` for the automatic bias).
"""

from collections import deque
from dataclasses import dataclass

import numpy as np


@dataclass
class Reference:
    """Box in patches (x1, y1, x2, y2; right and bottom exclusive), seed as (row, column), and the maps."""

    box: tuple[int, int, int, int]
    seed: tuple[int, int]
    score: float
    degrees: np.ndarray
    mask: np.ndarray
    bias: float


def reference_lost(
    features: np.ndarray,
    grid: tuple[int, int],
    bias: float | str = 0.0,
    k: int = 100,
    normalize: bool = False,
) -> Reference:
    """Run LOST on one image's features, shape (N, D)."""
    rows, columns = grid
    count = rows * columns
    vectors = features.astype(np.float32)
    if normalize:
        lengths = np.sqrt((vectors.astype(np.float64) ** 2).sum(axis=1, keepdims=True))
        vectors = (vectors / np.maximum(lengths, 1e-12)).astype(np.float32)
    similarity = vectors @ vectors.T
    added = np.float32(automatic_bias(similarity) if bias == "auto" else bias)
    similarity = similarity + added

    degrees = np.zeros(count, dtype=int)
    for patch in range(count):
        connected = similarity[patch] > 0
        connected[patch] = False
        degrees[patch] = np.count_nonzero(connected)

    by_degree = sorted(range(count), key=lambda patch: (degrees[patch], patch))
    seed = by_degree[0]
    companions = [patch for patch in by_degree[:k] if similarity[seed, patch] > 0]

    total = np.zeros(count, dtype=np.float32)
    for patch in companions:
        total += similarity[patch]
    raw = (total > 0).reshape(grid)

    start = divmod(seed, columns)
    if not raw[start]:
        mask = np.zeros(grid, dtype=bool)
        mask[start] = True
        score = 0.0
    else:
        mask = flood(raw, start)
        score = 1.0
    inside = np.argwhere(mask)
    (top, left), (bottom, right) = inside.min(axis=0), inside.max(axis=0) + 1
    return Reference(
        (int(left), int(top), int(right), int(bottom)), start, score, degrees.reshape(grid), mask, float(added)
    )


def automatic_bias(similarity: np.ndarray) -> float:
    """Minus the lower 25 % quantile of the similarities of different patches."""
    count = len(similarity)
    others = similarity[~np.eye(count, dtype=bool)]
    return -float(np.quantile(others, 0.25, method="lower")) if others.size else 0.0


def flood(mask: np.ndarray, start: tuple[int, int]) -> np.ndarray:
    """The part of a mask that can be reached from ``start`` by steps up, down, left and right."""
    reached = np.zeros_like(mask)
    reached[start] = True
    queue = deque([start])
    while queue:
        row, column = queue.popleft()
        for near in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
            inside = 0 <= near[0] < mask.shape[0] and 0 <= near[1] < mask.shape[1]
            if inside and mask[near] and not reached[near]:
                reached[near] = True
                queue.append(near)
    return reached
