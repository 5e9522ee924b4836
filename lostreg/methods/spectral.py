"""TokenCut (Wang et al., CVPR 2022) and MaskCut (Wang et al., CVPR 2023): a normalised cut of the graph of patches.

    W[i, j] = 1 where cos(F[i], F[j]) > τ, else 0     the similar pairs, each patch with itself among them
    A = W + ε (1 - W)                                 all other pairs are connected, too, by ε = 1e-5 (TokenCut, 3.2)
    (D - A) y = λ D y                                 D: the row sums of A; y of the second smallest λ is the cut
    D^(-1/2) A D^(-1/2) z = (1 - λ) z                 the same for z = D^(1/2) y: the largest 1 - λ but the trivial 1

One side of the cut are the patches whose y lies above its mean; TokenCut's object is the side with the largest |y|, and
of it the 4-connected part around that patch. MaskCut takes the other side where this one holds three of the four
corners, and cuts again after what was found has left the graph.

The published code asks LAPACK for y. Here it comes from a fixed number of Lanczos steps (Golub & Van Loan, Matrix
Computations, 10.1), each of them a product with W, in tiles: `Similarities` bounds the memory, and nothing waits for
the device. Products with W are exact, so that neither batch nor tiles nor device change them by rounding. Ten steps
give LAPACK's cut on the features of ViTs; a graph of many parts with no similar pair between them may take more.

LAPACK's sign of y is arbitrary, and MaskCut's published corner rule acts for one of the two signs only. Here the sign
is that which makes the largest |y| positive: then the rule looks at the corners of the object, as it is meant to.
Shapes as in `lostreg.methods.lost`: B images, N = h*w patches, D dimensions.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import compress
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lostreg.methods.exact import exact_float32
from lostreg.methods.lost import (
    Maps,
    Objects,
    check_shape,
    joined_maps,
    main_objects,
    require_finite,
    seed_components,
)
from lostreg.methods.multi_object import joined, may_count
from lostreg.methods.objectness import Scorer, object_scores
from lostreg.methods.similarity import Similarities, Tile

TOKENCUT_TAU: Final = 0.2
MASKCUT_TAU: Final = 0.15

_WEAK: Final = 1e-5  # ε
_STEPS: Final = 16  # of Lanczos
_LIMBS: Final = 3  # whole numbers that a vector is split into
_SQUARINGS: Final = 30  # of the small matrix: tells eigenvalues apart that differ by 1e-7
_NOTHING: Final = 1e-9  # a vector of unit length is used up where this is left of it
_EQUAL: Final = 1e-6  # values of an eigenvector that differ by less, of its largest, are equal but for rounding
_CORNERS: Final = 3  # of the image: an object does not hold as many (MaskCut)
_OVERLAP: Final = 0.5  # a mask that overlaps the one before by more is the same again (MaskCut)
_LEAST_SHARE: Final = 0.01  # of the image's patches: a further mask has more (MaskCut)
_GOLDEN: Final = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class SpectralMaps(Maps):
    """The cut of each image's graph.

    Attributes:
        vectors: of each patch, its value in the eigenvector y of the second smallest eigenvalue, of any sign and size;
            shape (B, N), float64. All 0 where there is nothing to cut: all patches are similar to each other.
        degrees: how many other patches each patch is similar to, shape (B, N), int64.
        finite: whether each image's features were, shape (B,), bool.
        tau: the cosine above which two patches are similar.
    """

    vectors: Tensor
    degrees: Tensor
    finite: Tensor
    tau: float


@torch.no_grad()
def spectral_maps(features: Tensor, grid: tuple[int, int], tau: float) -> SpectralMaps:
    """The second eigenvector of each image's graph, in memory that grows with the number of patches, not its square.

    Args:
        features: shape (B, N, D), float32, of length 1 or 0 each, as `lostreg.methods.lost.prepare` makes them with
            ``normalize=True``.
        grid: (h, w), rows and columns of patches; N = h * w.
        tau: two patches are similar where their cosine is above it: `TOKENCUT_TAU`, `MASKCUT_TAU`.

    Returns:
        `SpectralMaps` on the device of the features. Whether these were finite is noted, not raised: asking would
        wait for the device.

    Raises:
        OptionError: if the shapes disagree.
    """
    check_shape(features, grid)
    at_once = Similarities.images_at_once(features.shape[1], features.device)
    with exact_float32(features.device):
        return joined_maps([_maps_of_part(part, tau) for part in torch.split(features, at_once)])


def tokencut_objects(
    maps: SpectralMaps, features: Tensor, grid: tuple[int, int], scorer: Scorer = object_scores
) -> list[Objects]:
    """TokenCut's object of each image.

    Where there is nothing to cut, as all patches are similar to each other, that is all of them, with score 0.

    Args:
        maps: on the CPU.
        features: what they were made of, shape (B, N, D), on any device.
        grid: (h, w), rows and columns of patches.
        scorer: what scores the objects.

    Returns:
        One `Objects` an image, of one object each: its seed is the patch of the largest |y|, its bias is minus tau, and
        the heat is the degrees.

    Raises:
        OptionError: if a feature was not finite.
    """
    require_finite(maps.finite)
    return _as_objects(*_cut(maps, grid, corners=False), maps, features, scorer)


def maskcut_objects(
    maps: SpectralMaps,
    features: Tensor,
    grid: tuple[int, int],
    max_objects: int,
    min_score: float,
    scorer: Scorer = object_scores,
) -> list[Objects]:
    """MaskCut's objects of each image.

    After each object its patches leave the graph, which is cut again, ``max_objects`` times in all; patches of earlier
    objects are taken out of a mask. The search ends at a mask that overlaps the one before by an intersection over
    union above 0.5, or has no more than 1 % of the patches, or whose score is 0 or below ``min_score``: it is left out,
    unless it is the first.

    The published code knows no score, takes further masks of square images only, and goes on after a mask that it
    leaves out: the next cut is the same, compared with an empty mask, and what earlier masks left of it is kept.

    Args:
        maps: on the CPU.
        features: what they were made of, shape (B, N, D), on any device, which is waited for.
        grid: (h, w), rows and columns of patches.
        max_objects: at least 1.
        min_score: in [0, 1].
        scorer: what scores the objects.

    Returns:
        One `Objects` an image, as those of `tokencut_objects`, with one object at least; the heat is that of the
        whole graph.

    Raises:
        OptionError: if a feature was not finite.
    """
    require_finite(maps.finite)
    masks, values = _cut(maps, grid, corners=True)
    objects = _as_objects(masks, values, maps, features, scorer)
    images = [image for image, one in enumerate(objects) if may_count(one, min_score)]
    latest, taken = masks.copy(), masks.copy()
    for _ in range(max_objects - 1):
        if not images:
            break
        vectors = features[torch.tensor(images, device=features.device)]
        left = torch.from_numpy(~taken[images]).to(vectors).flatten(1)
        rest = spectral_maps(vectors * left[..., None], grid, maps.tau).to_host()
        masks, values = _cut(rest, grid, corners=True)
        further = _as_objects(masks & ~taken[images], values, rest, vectors, scorer)
        goes_on = [
            may_count(one, min_score) and not repeated
            for one, repeated in zip(further, _repeats(masks, latest[images]), strict=True)
        ]
        latest[images] = masks
        taken[images] |= masks
        for image, one in compress(zip(images, further, strict=True), goes_on):
            objects[image] = joined(objects[image], one)
        images = list(compress(images, goes_on))
    return objects


def _repeats(masks: NDArray[np.bool_], before: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Whether each mask is hardly other than the one before, or next to nothing; (B, h, w) both, to (B,)."""
    shared, either = (masks & before).sum(axis=(1, 2)), (masks | before).sum(axis=(1, 2))
    again: NDArray[np.bool_] = (shared > _OVERLAP * either) | (masks.mean(axis=(1, 2)) <= _LEAST_SHARE)
    return again


def _cut(maps: SpectralMaps, grid: tuple[int, int], *, corners: bool) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """The object of each image, and the eigenvector with the sign that is positive there.

    Args:
        maps: on the CPU.
        grid: (h, w), rows and columns of patches.
        corners: whether MaskCut's corner rule acts.

    Returns:
        Masks, shape (B, h, w), and values, shape (B, h, w), of patches.
    """
    values = maps.vectors.numpy()
    images = np.arange(len(values))
    peaks = np.abs(values).max(axis=1, keepdims=True, initial=0)
    values = values * np.sign(values[images, _strongest(np.abs(values))])[:, None]
    foreground = (values - values.mean(axis=1, keepdims=True) > _EQUAL * peaks).reshape(-1, *grid)
    if corners:
        reverse = foreground[:, [0, 0, -1, -1], [0, -1, 0, -1]].sum(axis=1) >= _CORNERS
        foreground ^= reverse[:, None, None]
        values[reverse] *= -1
    foreground |= peaks[..., None] == 0  # nothing to cut
    masks = seed_components(foreground, *np.divmod(_strongest(values), grid[1]))
    return masks, values.reshape(-1, *grid)


def _strongest(values: NDArray[np.float64]) -> NDArray[np.int64]:
    """The patch of the largest value, of equal ones the first; (B, N) to (B,)."""
    largest = values.max(axis=1, keepdims=True)
    strongest: NDArray[np.int64] = (values >= largest - _EQUAL * np.abs(largest)).argmax(axis=1)
    return strongest


def _as_objects(
    masks: NDArray[np.bool_], values: NDArray[np.float64], maps: SpectralMaps, features: Tensor, scorer: Scorer
) -> list[Objects]:
    """One object an image; masks and values as `_cut` gives them."""
    seeds = _strongest(np.where(masks, values, -np.inf).reshape(maps.vectors.shape))
    return main_objects(features, masks, seeds, maps.degrees.numpy().reshape(masks.shape), -maps.tau, scorer)


def _maps_of_part(features: Tensor, tau: float) -> SpectralMaps:
    graph = _Graph(features, tau)
    similar = graph.times(features.new_ones(features.shape[:2]).double())  # patches, each itself among them
    own = features.square().sum(dim=2) > tau
    finite = features.sum(dim=2).isfinite().all(dim=1)
    return SpectralMaps(_second_eigenvector(graph, similar), (similar - own.double()).long(), finite, tau)


class _Graph:
    """The similar pairs of a batch: 1 in W for each of them, tile by tile.

    Args:
        features: shape (B, N, D), float32, of length 1 or 0.
        tau: as for `spectral_maps`.
    """

    def __init__(self, features: Tensor, tau: float) -> None:
        self.count = features.shape[1]
        self._similarities = Similarities(features)
        self._tau = tau
        self._marked = False  # whether the tiles that are kept are of 0 and 1 already

    def times(self, vectors: Tensor) -> Tensor:
        """W x: sums over the similar patches of each; (B, N) to (B, N), float64.

        Vectors are split into whole numbers, ``x = s (l1/c + l2/c² + l3/c³)``, of so few bits that float32 holds any
        sum of N of them: such sums are the same in any order.
        """
        scale = 2.0 ** (24 - self.count.bit_length())  # c: sums of N numbers up to c stay within 2**24
        exponent = vectors.abs().amax(dim=1, keepdim=True).frexp().exponent
        rest, limbs = torch.ldexp(vectors, -exponent), []
        for _ in range(_LIMBS):
            rest = rest * scale
            limbs.append(rest.round())
            rest = rest - limbs[-1]
        whole = torch.stack(limbs, dim=1).float()  # (B, limbs, N): as columns they would be slower by far
        sums = torch.zeros_like(whole)
        for tile in self._tiles():
            sums[..., tile.rows] += whole[..., tile.columns] @ tile.values.mT
            if tile.weight == 2:
                sums[..., tile.columns] += whole[..., tile.rows] @ tile.values
        product = torch.zeros_like(vectors)
        for limb in reversed(sums.double().unbind(dim=1)):
            product = (product + limb) / scale
        return torch.ldexp(product, exponent)

    def _tiles(self) -> Iterator[Tile]:
        for tile in self._similarities.tiles():
            if not self._marked:
                tile.values.gt_(self._tau)
            yield tile
        self._marked = self._similarities.keeps


def _second_eigenvector(graph: _Graph, similar: Tensor) -> Tensor:
    """What cuts each graph, y; of the sums of W's rows, shape (B, N), the same shape, float64."""
    count = similar.shape[1]
    weights = _WEAK * count + (1 - _WEAK) * similar  # of D
    root = weights.rsqrt()

    def normalised_graph(vectors: Tensor) -> Tensor:  # D^(-1/2) A D^(-1/2) z
        scaled = root * vectors
        everything = scaled.sum(dim=1, keepdim=True)
        return root * (_WEAK * everything + (1 - _WEAK) * graph.times(scaled))

    # The Krylov basis: its first vector is the trivial one, so that all others are free of it.
    basis = similar.new_zeros(len(similar), _STEPS + 1, count)
    basis[:, 0] = _unit(weights.sqrt())[0]
    diagonal, beside = [], []
    # One product first: patches that are similar to the same others have equal values from the start.
    vectors = _orthogonal(normalised_graph(_unit(_start(similar))[0]), basis[:, :1])
    for step in range(1, _STEPS + 1):
        basis[:, step], length = _unit(vectors)
        vectors = normalised_graph(basis[:, step])
        along = (basis[:, step] * vectors).sum(dim=1)
        diagonal.append(torch.where(length > 0, along, -1))  # of what is used up: less than any eigenvalue
        beside.append(length)
        vectors = _orthogonal(vectors, basis[:, : step + 1])
    tridiagonal = torch.diag_embed(torch.stack(diagonal, dim=1))
    above = torch.diag_embed(torch.stack(beside[1:], dim=1), offset=1)
    mix = _largest_eigenvector(tridiagonal + above + above.mT)
    values = root * (basis[:, 1:] * mix[..., None]).sum(dim=1)
    uncut = (similar == count).all(dim=1) | (similar == 0).all(dim=1)  # all patches are connected alike
    return values.masked_fill(uncut[:, None], 0)


def _start(similar: Tensor) -> Tensor:
    """Where Lanczos starts: how unusual each patch's degree is, as objects are smaller than the rest, and some noise.

    Noise that is the same in each image: graphs whose patches all have the same degree can be cut, too.
    """
    index = torch.arange(1, similar.shape[1] + 1, dtype=similar.dtype, device=similar.device)
    noise = (index.square() * _GOLDEN).frac() - 0.5
    return (similar - similar.mean(dim=1, keepdim=True)) / similar.shape[1] + noise


def _unit(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors of length 1, and the lengths they had; 0 and 0 where next to nothing is left; (B, N) to (B, N), (B,)."""
    length = torch.linalg.vector_norm(vectors, dim=1)
    length = torch.where(length > _NOTHING, length, 0)
    return torch.where(length[:, None] > 0, vectors / length[:, None], 0), length


def _orthogonal(vectors: Tensor, basis: Tensor) -> Tensor:
    """Vectors without what lies along a basis; (B, N), (B, K, N) to (B, N)."""
    for _ in range(2):  # twice is enough (Parlett)
        along = (basis * vectors[:, None]).sum(dim=2, keepdim=True)
        vectors = vectors - (basis * along).sum(dim=1)
    return vectors


def _largest_eigenvector(matrices: Tensor) -> Tensor:
    """Of each symmetric matrix with eigenvalues in [-1, 1], by squaring: LAPACK's ways wait for a GPU.

    Args:
        matrices: shape (B, K, K).

    Returns:
        Shape (B, K): 0 where all eigenvalues are -1.
    """
    power = (matrices + torch.eye(matrices.shape[1], dtype=matrices.dtype, device=matrices.device)) / 2
    for _ in range(_SQUARINGS):
        power = power @ power
        power = power / power.abs().amax(dim=(1, 2), keepdim=True).clamp(min=torch.finfo(power.dtype).tiny)
    # What is left is x xᵀ: its longest column is the clearest.
    longest = power.diagonal(dim1=1, dim2=2).argmax(dim=1)
    return power.gather(2, longest[:, None, None].expand(-1, power.shape[1], 1)).squeeze(2)
