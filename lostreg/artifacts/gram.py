"""How LOST sees the patches of an image: spectrum and signs of the Gram matrix, degrees, with and without outliers."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lostreg.methods.exact import exact_float32
from lostreg.methods.lost import Bias, find_candidates, prepare
from lostreg.methods.similarity import Similarities

EIGENVALUES: Final = 16


@dataclass(frozen=True)
class GramView:
    """The Gram matrix of L2-normalised features of an image's patches, or its mean over images.

    Attributes:
        spectrum: the largest eigenvalues, falling, as shares of their sum, 16 of them; 0 beyond the rank.
        effective_rank: exponential of the entropy of all shares, at least 1: about how many directions matter.
        positive: share of pairs of different patches whose similarity is positive, in [0, 1].
        similarity: mean cosine similarity of these pairs.
    """

    spectrum: tuple[float, ...]
    effective_rank: float
    positive: float
    similarity: float

    @classmethod
    def average(cls, views: "Sequence[GramView]") -> "GramView":
        """The mean of each figure over at least one image."""
        spectra, *figures = zip(*(astuple(view) for view in views), strict=True)
        spectrum = tuple(np.mean(spectra, axis=0).tolist())
        return cls(spectrum, *(float(np.mean(figure)) for figure in figures))


@dataclass(frozen=True)
class GramViews:
    """One image, with outliers and without.

    Attributes:
        every: of all patches.
        normal: of those that are no outliers; None where there are no outliers, or fewer than two other patches.
        degrees: connections of each patch, shape (N,), int64.
        degrees_normal: the same at the same bias with outliers out of the graph, and -1 at these; None as ``normal``.
    """

    every: GramView
    normal: GramView | None
    degrees: NDArray[np.int64]
    degrees_normal: NDArray[np.int64] | None


def view_gram(
    features: Tensor,
    grid: tuple[int, int],
    outliers: NDArray[np.bool_],
    bias: Bias,
    k_patches: int,
    *,
    normalize: bool,
) -> GramViews:
    """Look at one image's patches as LOST does.

    Args:
        features: shape (N, D), float32.
        grid: (h, w); N = h * w.
        outliers: which patches are outliers, shape (N,).
        bias: of the degrees.
        k_patches: low-degree patches that may join the seed, which matters to ``auto``.
        normalize: whether the degrees are of L2-normalised features; everything else is.
    """
    found = find_candidates(prepare(features[None], normalize=normalize), grid, bias, k_patches).best()
    degrees = found.degrees.flatten().numpy()
    unit = prepare(features, normalize=True)
    with exact_float32(unit.device):
        every = _view(unit)
        kept = torch.from_numpy(~outliers).to(unit.device)
        if not outliers.any() or int(kept.sum()) < 2:
            return GramViews(every, None, degrees, None)
        among = Similarities(prepare(features, normalize=normalize)[kept][None])
        degrees_normal = np.full(len(degrees), -1, np.int64)
        degrees_normal[~outliers] = among.counts_above(-found.bias[None].to(unit.device)).flatten().cpu().numpy()
        return GramViews(every, _view(unit[kept]), degrees, degrees_normal)


def _view(unit: Tensor) -> GramView:
    count = len(unit)
    # The Gram matrix's eigenvalues but for zeros, from the smaller of the two products.
    product = unit @ unit.T if count < unit.shape[1] else unit.T @ unit
    values = torch.linalg.eigvalsh(product.cpu().double()).flip(0).clamp(min=0).numpy()
    shares = values / max(values.sum(), np.finfo(np.float64).tiny)
    entropy = -(shares[shares > 0] * np.log(shares[shares > 0])).sum()
    spectrum = np.zeros(EIGENVALUES)
    spectrum[: min(EIGENVALUES, len(shares))] = shares[:EIGENVALUES]
    similarities = Similarities(unit[None])
    pairs = max(1, count * (count - 1))
    positive = float(similarities.counts_above(unit.new_zeros(1, 1)).sum()) / pairs
    mean, _ = similarities.mean_and_deviation()
    return GramView(tuple(spectrum.tolist()), float(np.exp(entropy)), positive, float(mean))
