"""TokenCut, MaskCut and DINO-seg as slow NumPy, written from the papers to check the tensor code against.

Nothing of lostreg is imported here: the whole graph, SciPy's dense solver and a flood fill, one image at a time.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from reference_lost import Place, flood, object_score
from scipy.linalg import eigh

Box = tuple[int, int, int, int]


@dataclass
class Cut:
    """An object: box in patches, seed as (row, column), mask, score, the graph's degrees, and what it was cut by.

    `margin` is how clear the closest decision was: cosines from tau, values from their mean and from the largest, and a
    five-hundredth of the way from the eigenvalue to the next. Shorter numbers, and fewer steps towards the eigenvector,
    may decide otherwise what lies within their error.
    """

    box: Box
    seed: Place
    mask: np.ndarray
    score: float
    degrees: np.ndarray
    margin: float
    values: np.ndarray


def reference_tokencut(features: np.ndarray, grid: Place, tau: float) -> Cut:
    return _cut(_unit(features), grid, tau, corners=False)


def reference_maskcut(
    features: np.ndarray, grid: Place, tau: float, most: int = 1, least_score: float = 0.0
) -> list[Cut]:
    unit = _unit(features)
    cuts = [_cut(unit, grid, tau, corners=True)]
    before = taken = cuts[0].mask
    while len(cuts) < most and cuts[-1].score > 0 and cuts[-1].score >= least_score:
        cut = _cut(np.where(taken.ravel()[:, None], 0, unit), grid, tau, corners=True)
        whole = cut.mask
        cuts[0].margin = min(cuts[0].margin, cut.margin)
        if np.sum(whole & before) > 0.5 * np.sum(whole | before) or whole.mean() <= 0.01 or not (whole & ~taken).any():
            break
        cut.mask = whole & ~taken
        cut.box, cut.score = box_around(cut.mask), object_score(unit, cut.mask)
        cut.seed = divmod(_first_largest(np.where(cut.mask.ravel(), cut.values, -9)), grid[1])
        if cut.score == 0 or cut.score < least_score:
            break
        cuts.append(cut)
        before, taken = whole, taken | whole
    return cuts


def _unit(features: np.ndarray) -> np.ndarray:
    vectors = features.astype(np.float64)
    lengths = np.sqrt((vectors**2).sum(axis=1, keepdims=True))
    return vectors / np.where(lengths > 0, lengths, 1)


def _cut(unit: np.ndarray, grid: Place, tau: float, corners: bool) -> Cut:
    cosines = unit @ unit.T
    similar = cosines > tau
    degrees = (similar & ~np.eye(len(unit), dtype=bool)).sum(axis=1).reshape(grid)
    margin = float(np.abs(cosines - tau).min())
    if similar.all() or not similar.any():
        everything = np.ones(grid, dtype=bool)
        return Cut((0, 0, grid[1], grid[0]), (0, 0), everything, 0.0, degrees, margin, np.zeros(len(unit)))
    weights = np.where(similar, 1, 1e-5)
    total = np.diag(weights.sum(axis=1))
    eigenvalues, eigenvectors = eigh(total - weights, total)
    values = eigenvectors[:, 1]
    if len(values) > 2:
        margin = min(margin, (eigenvalues[2] - eigenvalues[1]) / 500)
    values = values / np.abs(values).max()
    strongest = _first_largest(np.abs(values))
    values = values * np.sign(values[strongest])
    inside = values > values.mean()
    margin = min(margin, np.abs(values - values.mean()).min(), _lead(np.abs(values)))
    rows = inside.reshape(grid)
    if corners and int(rows[0, 0]) + int(rows[0, -1]) + int(rows[-1, 0]) + int(rows[-1, -1]) >= 3:
        inside, values = ~inside, -values
        margin = min(margin, _lead(values))
    seed = divmod(_first_largest(values), grid[1])
    mask = flood(inside.reshape(grid), seed)
    return Cut(box_around(mask), seed, mask, object_score(unit, mask), degrees, float(margin), values)


def _first_largest(values: np.ndarray) -> int:
    """Of the largest values, which LAPACK's rounding sets apart, the first."""
    return int(np.flatnonzero(values > values.max() - 1e-7)[0])


def _lead(values: np.ndarray) -> float:
    """How far the largest value lies above the next smaller one; what differs less than rounding is equal."""
    steps = [high - low for high, low in pairwise(sorted(values, reverse=True)) if high - low > 1e-9]
    return steps[0] if steps else 1.0


def box_around(mask: np.ndarray) -> Box:
    inside = np.argwhere(mask)
    (top, left), (bottom, right) = inside.min(axis=0), inside.max(axis=0) + 1
    return (int(left), int(top), int(right), int(bottom))


def reference_dinoseg(attention: np.ndarray, grid: Place) -> np.ndarray:
    """The object's mask, of one head's attention to each patch, shape (N,)."""
    by_attention = sorted(range(len(attention)), key=lambda patch: (-attention[patch], patch))
    kept, mass = np.zeros(len(attention), dtype=bool), 0.0
    for patch in by_attention:
        if mass >= 0.6 * attention.sum():
            break
        kept[patch] = True
        mass += attention[patch]
    left, parts = kept.reshape(grid).copy(), []
    while left.any():
        parts.append(flood(left, tuple(np.argwhere(left)[0])))
        left &= ~parts[-1]
    return max(parts, key=np.sum)
