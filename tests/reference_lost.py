"""LOST as slow NumPy, one image and one patch at a time, written from the paper to check the tensor code against.

Nothing of lostreg is imported here, and nothing is shared with it: other names, other algorithms (a full sort for
the lowest degrees, a flood fill for the component, a walk along the outline and two plain means for the score), and
numbers of twice the length.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

Place = tuple[int, int]


@dataclass
class Reference:
    """Box in patches (x1, y1, x2, y2; right and bottom exclusive), seed as (row, column), and the maps.

    `margin` is how clear the closest decision was: the distance from 0 of the biased similarity or sum of them that is
    nearest to it, and from the best score of the next object's where several biases were tried. Shorter numbers, or
    sums in another order, may decide otherwise what lies within their rounding.

    `alike` are the biases that give the same mask, `bias` the first of them: their scores are equal but for rounding,
    and so another of them may be the one that shorter numbers keep.
    """

    box: tuple[int, int, int, int]
    seed: Place
    score: float
    degrees: np.ndarray
    mask: np.ndarray
    bias: float
    margin: float
    alike: Sequence[float] = ()


def reference_lost(
    features: np.ndarray,
    grid: Place,
    bias: float | str | Sequence[float] = 0.0,
    k: int = 100,
    normalize: bool = False,
) -> Reference:
    """Run LOST on one image's features, shape (N, D); of several biases, the first with the highest score is kept."""
    return reference_several(features, grid, bias, k, normalize)[0]


def reference_several(
    features: np.ndarray,
    grid: Place,
    bias: float | str | Sequence[float] = 0.0,
    k: int = 100,
    normalize: bool = False,
    most: int = 1,
    least_score: float = 0.0,
) -> list[Reference]:
    """The objects of one image, each found on the patches that those before it left."""
    vectors = features.astype(np.float64)
    if normalize:
        lengths = np.sqrt((vectors**2).sum(axis=1, keepdims=True))
        vectors = vectors / np.where(lengths > 0, lengths, 1)
    similarity = vectors @ vectors.T
    if isinstance(bias, str):
        assert bias == "auto"
        biases = automatic_biases(similarity)
    else:
        biases = [bias] if isinstance(bias, float | int) else list(bias)
    left = np.ones(len(vectors), dtype=bool)
    found: list[Reference] = []
    for turn in range(most):
        if not left.any():
            break
        one = best_of_biases(vectors, similarity, grid, k, biases, left)
        one.margin = min(one.margin, abs(one.score - least_score) if least_score else 1)
        if turn and (one.score < least_score or one.score == 0):
            break
        left = left & ~one.mask.ravel()
        if all(overlap(one.box, before.box) < 0.5 for before in found):
            found.append(one)
        if one.score < least_score or one.score == 0:
            break
    return found


def best_of_biases(
    vectors: np.ndarray, similarity: np.ndarray, grid: Place, k: int, biases: Sequence[float], left: np.ndarray
) -> Reference:
    tried = [lost_with(vectors, similarity + added, grid, k, added, left) for added in biases]
    best = max(tried, key=lambda one: one.score)  # the first of equal ones
    others = [best.score - one.score for one in tried if not np.array_equal(one.mask, best.mask)]
    best.margin = min([one.margin for one in tried] + others)
    best.alike = [one.bias for one in tried if np.array_equal(one.mask, best.mask)]
    return best


def overlap(first: Sequence[int], second: Sequence[int]) -> float:
    """Intersection over union of two boxes, patch by patch."""
    patches = [{(x, y) for x in range(box[0], box[2]) for y in range(box[1], box[3])} for box in (first, second)]
    return len(patches[0] & patches[1]) / len(patches[0] | patches[1])


def automatic_biases(similarity: np.ndarray) -> list[float]:
    """Minus a few limits below the mean similarity of different patches, in steps of their standard deviation."""
    first, second = np.nonzero(~np.eye(len(similarity), dtype=bool))
    others = similarity[first, second]
    mean, deviation = (np.mean(others), np.sqrt(np.mean((others - np.mean(others)) ** 2))) if others.size else (0, 0)
    limits = [mean + steps * deviation for steps in (0, -0.25, -0.5, -0.75, -1, -1.25)]
    return [-min(max(limit, -1 + 1e-6), 1 - 1e-6) for limit in limits]


def lost_with(vectors: np.ndarray, biased: np.ndarray, grid: Place, k: int, bias: float, left: np.ndarray) -> Reference:
    """LOST on similarities to which the bias has been added, and on the patches that are left."""
    count, columns = len(biased), grid[1]
    degrees = np.zeros(count, dtype=int)
    for patch in range(count):
        connected = (biased[patch] > 0) & left
        connected[patch] = False
        degrees[patch] = np.count_nonzero(connected)

    by_degree = sorted(np.flatnonzero(left).tolist(), key=lambda patch: (degrees[patch], patch))
    seed = by_degree[0]
    companions = [patch for patch in by_degree[:k] if biased[seed, patch] > 0]

    total = np.zeros(count)
    for patch in companions:
        total += biased[patch]
    raw = ((total > 0) & left).reshape(grid)

    start = divmod(seed, columns)
    if not raw[start]:
        mask = np.zeros(grid, dtype=bool)
        mask[start] = True
        score = 0.0
    else:
        mask = flood(raw, start)
        score = object_score(vectors, mask)
    inside = np.argwhere(mask)
    (top, left), (bottom, right) = inside.min(axis=0), inside.max(axis=0) + 1
    box = (int(left), int(top), int(right), int(bottom))
    margin = min(np.abs(biased).min(), np.abs(total).min()) if companions else np.abs(biased).min()
    return Reference(box, start, score, degrees.reshape(grid), mask, float(bias), float(margin))


def flood(mask: np.ndarray, start: Place) -> np.ndarray:
    """The part of a mask that can be reached from ``start`` by steps up, down, left and right."""
    reached = np.zeros_like(mask)
    reached[start] = True
    queue = deque([start])
    while queue:
        for near in neighbours(queue.popleft()):
            if is_inside(near, mask.shape) and mask[near] and not reached[near]:
                reached[near] = True
                queue.append(near)
    return reached


def neighbours(place: Place) -> Iterator[Place]:
    """The patches above, below, left and right, whether the image has them or not."""
    row, column = place
    yield from ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1))


def is_inside(place: Place, shape: tuple[int, ...]) -> bool:
    return 0 <= place[0] < shape[0] and 0 <= place[1] < shape[1]


def object_score(vectors: np.ndarray, mask: np.ndarray) -> float:
    """How clearly a mask is an object of an image, whose features are ``vectors``."""
    share = np.count_nonzero(mask) / mask.size
    size = (4 * share * (1 - share)) ** 0.25
    inside_image = (1 - outline_on_border(mask)) ** 4
    return float(difference(vectors[mask.ravel()], vectors[~mask.ravel()]) * size * inside_image)


def difference(group: np.ndarray, rest: np.ndarray) -> float:
    """The correlation ratio of two groups of vectors that weigh the same: 0 alike, 1 where all else is equal."""
    if not len(group) or not len(rest):
        return 0.0
    middle = (group.mean(axis=0) + rest.mean(axis=0)) / 2
    between = within = length = 0.0
    for part in (group, rest):
        mean = part.mean(axis=0)
        between += ((mean - middle) ** 2).sum() / 2
        within += sum(((vector - mean) ** 2).sum() for vector in part) / len(part) / 2
        length += (part**2).sum() / len(part) / 2
    if between + within <= 1e-20 * length:  # rounding of equal vectors
        return 0.0
    return float(np.sqrt(between / (between + within)))


def outline_on_border(mask: np.ndarray) -> float:
    """The share of the sides of patches along a mask's outline beyond which the image ends."""
    on_border = within = 0
    for place in np.argwhere(mask):
        for near in neighbours((int(place[0]), int(place[1]))):
            if not is_inside(near, mask.shape):
                on_border += 1
            elif not mask[near]:
                within += 1
    return on_border / (on_border + within) if on_border + within else 0.0
